//! SIGUSR2: all ranks stop at one step, a checkpoint holds it, and the run goes on from there as if
//! nothing had happened.

use crate::crew::{Job, Rank, finish};
use crate::job::{Outcome, Scene, TRAINER, contains, events, history};
use crate::resume::{assert_identical, learned, tensors};
use std::process::Command;
use tsm_job::message::WorkerMessage;
use tsm_job::{RunDir, exit};

/// The sum over three ranks rounds, also where their numbers are equal.
const RANKS: u32 = 3;
const STEPS_PER_EPOCH: u64 = 8;

/// Everything random is on.
const JOB: [&str; 7] = [
    "run.seed=5",
    "model.head.dropout=0.5",
    "data.train.size=24",
    "data.train.flip=0.5",
    "train.epochs=2",
    "train.keep_last=100",
    "train.log_every=1",
];

fn scene() -> Scene {
    let scene = Scene::new();
    scene.motion_set(RANKS as usize * 4 * STEPS_PER_EPOCH as usize, 8);
    scene
}

/// The step that all ranks name, with their exit code 75.
fn saved_at(outcomes: &[Outcome]) -> u64 {
    let step = |o: &Outcome| -> u64 {
        let text = o.out.split("saved at step ").nth(1);
        let text = text.unwrap_or_else(|| panic!("{o:#?}"));
        let (step, rest) = text.split_once(';').unwrap();
        assert_eq!(rest, " exit 75\n");
        step.parse().unwrap()
    };
    let steps: Vec<u64> = outcomes.iter().map(step).collect();
    assert!(steps.iter().all(|s| *s == steps[0]), "{steps:?}");
    steps[0]
}

fn sections(rank: &Rank) -> Vec<String> {
    let section = |m: WorkerMessage| match m {
        WorkerMessage::Section { name } => Some(name),
        _ => None,
    };
    rank.told().into_iter().filter_map(section).collect()
}

/// Both runs trained the same steps to the same numbers and end in the same tensors.
fn assert_same(whole: &RunDir, other: &RunDir) {
    let (one, two) = (history(whole), history(other));
    assert_eq!(one.steps.len() as u64, 2 * STEPS_PER_EPOCH);
    let steps = |h: &tsm_trainer::meter::History| h.steps.iter().map(learned).collect::<Vec<_>>();
    assert_eq!(steps(&one), steps(&two));
    let validations = |h: &tsm_trainer::meter::History| -> Vec<_> {
        let numbers = |v: &tsm_trainer::meter::ValidationRecord| (v.step, v.loss, v.top1);
        h.validations.iter().map(numbers).collect()
    };
    assert_eq!(validations(&one), validations(&two));
    assert_eq!(one.validations.len(), 2);
    let last = 2 * STEPS_PER_EPOCH;
    assert_identical(&tensors(whole, last), &tensors(other, last));
}

#[test]
fn one_signalled_rank_stops_all_at_one_step_and_nothing_is_lost() {
    let scene = scene();
    let whole = Job::new(&scene, RANKS, &JOB);
    finish(whole.start_all(&scene, "whole"), exit::OK);

    // In the middle of an epoch, at a step at which no checkpoint would have been made.
    let mut ranks = Job::new(&scene, RANKS, &JOB).start_all(&scene, "asked");
    ranks[1].until_step(2);
    ranks[1].ask_to_save();
    ranks[1].ask_to_save();
    let outcomes = {
        for rank in &mut ranks {
            rank.until_section("checkpoint");
        }
        // While rank 0 writes, and when some may have ended: nothing changes.
        ranks.iter().for_each(Rank::ask_to_save);
        finish(ranks, exit::REQUEUE)
    };
    let stopped = saved_at(&outcomes);
    assert!((2..STEPS_PER_EPOCH).contains(&stopped), "{stopped}");
    let run = scene.run("asked");
    let steps = events(&run.metrics(), "step");
    assert_eq!(
        steps.last().unwrap()["step"],
        stopped,
        "all is written down"
    );

    // Again, at another step, each rank on its own account.
    let mut ranks = Job::new(&scene, RANKS, &JOB)
        .resumed()
        .start_all(&scene, "asked");
    ranks[0].until_step(stopped + 1);
    for rank in [2, 0, 1] {
        ranks[rank].ask_to_save();
    }
    let again = saved_at(&finish(ranks, exit::REQUEUE));
    assert!(again > stopped, "{again}");
    finish(
        Job::new(&scene, RANKS, &JOB)
            .resumed()
            .start_all(&scene, "asked"),
        exit::OK,
    );
    let starts = events(&run.metrics(), "start");
    let starts: Vec<u64> = starts.iter().map(|s| s["step"].as_u64().unwrap()).collect();
    assert_eq!(starts, [0, stopped, again]);
    assert_same(&scene.run("whole"), &run);
}

#[test]
fn a_request_before_the_first_step_is_kept() {
    let scene = scene();
    let job = Job::new(&scene, 2, &JOB);
    let mut second = job.start(&scene, "run", 1);
    second.until("hello", |m| {
        matches!(m, WorkerMessage::Hello { .. }).then_some(())
    });
    second.ask_to_save();
    let first = job.start(&scene, "run", 0);
    assert_eq!(saved_at(&finish(vec![first, second], exit::REQUEUE)), 0);

    // Also one that came before the program could listen.
    let job = Job::new(&scene, 1, &JOB).resumed();
    let mut early = Command::new("env");
    early.current_dir(scene.path(".")).args([
        "--block-signal=USR2",
        "sh",
        "-c",
        "kill -USR2 $$; exec \"$@\"",
        "sh",
        TRAINER,
    ]);
    let early = Rank::start(job.command(early, &scene.path("run"), 0));
    assert_eq!(saved_at(&finish(vec![early], exit::REQUEUE)), 0);
}

#[test]
fn a_validation_is_abandoned_and_made_up_for() {
    let scene = scene();
    // Minutes of validation.
    let list = scene.path("motion").join("val.txt");
    let few = fs_err::read_to_string(&list).unwrap();
    fs_err::write(&list, few.repeat(5000)).unwrap();
    let job = || Job::new(&scene, RANKS, &JOB);
    let mut ranks = job().start_all(&scene, "asked");
    ranks[2].until_section("validate");
    ranks[2].ask_to_save();
    for rank in &mut ranks {
        rank.until_section("checkpoint");
    }
    let seen = sections(&ranks[1]);
    assert_eq!(saved_at(&finish(ranks, exit::REQUEUE)), STEPS_PER_EPOCH);
    assert_eq!(seen, ["load", "train", "validate", "checkpoint"]);
    let run = scene.run("asked");
    assert!(events(&run.metrics(), "validation").is_empty());

    fs_err::write(&list, &few).unwrap();
    finish(job().resumed().start_all(&scene, "asked"), exit::OK);
    finish(job().start_all(&scene, "whole"), exit::OK);
    assert_same(&scene.run("whole"), &run);
    assert_eq!(events(&run.metrics(), "epoch").len(), 2);
}

#[test]
fn a_signal_in_the_middle_of_a_save_harms_nothing() {
    let scene = scene();
    let job = [&JOB[..], &["train.checkpoint_steps=1"]].concat();
    let mut rank = Job::new(&scene, 1, &job).start(&scene, "run", 0);
    rank.until_section("checkpoint");
    for _ in 0..50 {
        rank.ask_to_save();
    }
    let step = saved_at(&finish(vec![rank], exit::REQUEUE));
    let found = tsm_trainer::checkpoint::find(scene.run("run").path()).unwrap();
    assert_eq!(found.snapshot.meta.step, step);
    assert!(found.skipped.is_empty());
}

/// SIGTERM ends a rank at once, as before.
#[test]
fn sigterm_does_not_save() {
    let scene = scene();
    let mut rank = Job::new(&scene, 1, &JOB).start(&scene, "run", 0);
    rank.until_step(1);
    rank.signal(rustix::process::Signal::TERM);
    finish(vec![rank], exit::SIGNAL_BASE + libc::SIGTERM);
}

#[test]
fn the_launcher_hears_how_a_rank_gets_on() {
    let scene = scene();
    let job = Job::new(&scene, 2, &JOB);
    let mut ranks = job.start_all(&scene, "run");
    ranks[0].until("top1", |m| match m {
        WorkerMessage::Metric { name, value } if name == "top1" => Some(*value),
        _ => None,
    });
    let told = ranks[0].told();
    let metric = |wanted: &str| {
        told.iter().find_map(|m| match m {
            WorkerMessage::Metric { name, value } if name == wanted => Some(*value),
            _ => None,
        })
    };
    // ln 8 for eight classes, before anything is learned.
    let loss = metric("loss").unwrap();
    assert!((1.5..3.5).contains(&loss), "{loss}");
    assert!(metric("lr").unwrap() > 0.0 && metric("clips_per_s").unwrap() > 0.0);
    // As its own lines and files count them. Here two ranks share the clips of three.
    let steps_per_epoch = STEPS_PER_EPOCH * u64::from(RANKS) / 2;
    for message in &told {
        if let WorkerMessage::Step { step, epoch, .. } = message {
            assert_eq!(u64::from(*epoch), 1 + (step - 1) / steps_per_epoch);
        }
    }
    let work = |rank: &Rank| -> Vec<f64> {
        let work = |m: WorkerMessage| match m {
            WorkerMessage::Step { work_ms, .. } => Some(work_ms.expect("known on a CPU")),
            _ => None,
        };
        rank.told().into_iter().filter_map(work).collect()
    };
    assert!(work(&ranks[0]).iter().all(|ms| *ms > 0.0));
    assert!(sections(&ranks[1]).iter().all(|s| s != "checkpoint"));
    let told = finish(ranks, exit::OK);
    contains(&told[0].out, &["best top1"]);
}

/// A rank whose own work takes longer stands out, though all ranks take the same time for a step.
#[test]
fn a_straggler_s_own_work_is_longer() {
    let scene = scene();
    let mut job = Job::new(&scene, 2, &JOB);
    let mut fast = job.start(&scene, "run", 0);
    // Larger pictures for one rank alone: the same network, more work.
    job = job.with("data.train.size=160");
    let mut slow = job.start(&scene, "run", 1);
    for rank in [&mut fast, &mut slow] {
        rank.until_step(2 * STEPS_PER_EPOCH);
    }
    let work = |rank: &Rank| -> Vec<f64> {
        let mut all: Vec<f64> = rank
            .told()
            .into_iter()
            .filter_map(|m| match m {
                WorkerMessage::Step { work_ms, .. } => work_ms,
                _ => None,
            })
            .collect();
        all.sort_by(f64::total_cmp);
        all
    };
    let middle = |all: Vec<f64>| all[all.len() / 2];
    let (fast_ms, slow_ms) = (middle(work(&fast)), middle(work(&slow)));
    assert!(slow_ms > 2.0 * fast_ms, "{fast_ms} ms and {slow_ms} ms");
    finish(vec![fast, slow], exit::OK);
}

#[test]
fn a_restart_before_the_first_checkpoint_begins_again() {
    let scene = scene();
    let mut job = Job::new(&scene, 1, &JOB).resumed();
    // Continued by hand or by a scheduler, and restarted by the launcher.
    for (run, restart_count, start) in [
        ("run", 0, "start from the beginning: "),
        ("again", 2, "restart 2 from the beginning: "),
    ] {
        job.restart_count = restart_count;
        fs_err::create_dir_all(scene.run(run).checkpoints()).unwrap();
        let outcome = finish(vec![job.start(&scene, run, 0)], exit::OK);
        contains(&outcome[0].out, &[start, "holds no usable checkpoint yet"]);
    }
}
