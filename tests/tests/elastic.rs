//! A run goes on with another number of ranks, in the middle of an epoch: the learning rate follows
//! the batch, the schedule stays one of epochs, and no clip comes twice.

use crate::crew::{Job, finish};
use crate::job::{Scene, contains, events, history};
use crate::resume::tensors;
use std::f64::consts::PI;
use tsm_job::{RunDir, exit};

const CLIPS: u64 = 96;
const EPOCHS: u32 = 6;
/// Of [`Scene::overrides`].
const CLIPS_PER_RANK: u64 = 4;

const JOB: [&str; 9] = [
    "run.seed=5",
    "train.epochs=6",
    "train.checkpoint_steps=1",
    "train.keep_last=200",
    "train.log_every=1",
    "optim.lr=0.005",
    "optim.base_batch=8",
    "optim.warmup=null",
    "optim.schedule={cosine: {per_step: true}}",
];

/// `lr` by hand: linear in the batch, half a cosine over the epochs.
fn lr(world_size: u64, epoch: u32, clips_in_epoch: u64) -> f64 {
    let base = 0.005 * (world_size * CLIPS_PER_RANK) as f64 / 8.0;
    let epochs = f64::from(epoch) + clips_in_epoch as f64 / CLIPS as f64;
    base * (1.0 + (PI * epochs / f64::from(EPOCHS)).cos()) / 2.0
}

/// Trains until the checkpoint of `until` steps is there, then kills every rank.
fn train_and_kill(scene: &Scene, job: &Job, run: &RunDir, until: u64) {
    let mut ranks = job.start_all(scene, "run");
    let manifest = tensors(run, until).with_extension("json");
    ranks[0]
        .running
        .until("checkpoint", || manifest.exists().then_some(()));
    for rank in &ranks {
        rank.signal(rustix::process::Signal::KILL);
    }
    finish(ranks, exit::SIGNAL_BASE + libc::SIGKILL);
    // Whatever came after it is trained again.
    for entry in fs_err::read_dir(run.checkpoints()).unwrap().flatten() {
        let step = entry.file_name().to_string_lossy().into_owned();
        let step = step
            .strip_prefix("step-")
            .and_then(|s| s.get(..8)?.parse::<u64>().ok());
        if step.is_some_and(|s| s > until) {
            fs_err::remove_file(entry.path()).unwrap();
        }
    }
}

#[test]
fn ranks_come_and_go_in_the_middle_of_an_epoch() {
    let scene = Scene::new();
    scene.motion_set(CLIPS as usize, 8);
    let run = scene.run("run");
    // Four ranks for 6 + 2 steps of 16 clips: 32 clips into the second epoch.
    train_and_kill(&scene, &Job::new(&scene, 4, &JOB), &run, 8);
    // Three for the other 64 clips, 5 steps of 12 with 4 left out, and 3 steps of the third epoch.
    let job = Job::new(&scene, 3, &JOB).resumed();
    train_and_kill(&scene, &job, &run, 16);
    // Two for its other 60, 7 steps of 8 with 4 left out, and 1 step of the fourth epoch.
    let job = Job::new(&scene, 2, &JOB).resumed();
    train_and_kill(&scene, &job, &run, 24);
    // Four again: 88 clips, 5 steps of 16 with 8 left out, and two epochs of 6.
    let job = Job::new(&scene, 4, &JOB).resumed();
    let outcomes = finish(job.start_all(&scene, "run"), exit::OK);
    contains(
        &outcomes[0].out,
        &[
            "world size 2 -> 4: lr 0.005 -> 0.01",
            "epoch 4: 88 of its 96 clips are left for 5 steps of 16; 8 left out, none repeated",
        ],
    );

    let mut expected = Vec::new();
    for (world, epoch, done, steps) in [
        (4, 0, 0, 6),
        (4, 1, 0, 2),
        (3, 1, 32, 5),
        (3, 2, 0, 3),
        (2, 2, 36, 7),
        (2, 3, 0, 1),
        (4, 3, 8, 5),
        (4, 4, 0, 6),
        (4, 5, 0, 6),
    ] {
        let step = |n| lr(world, epoch, done + n * world * CLIPS_PER_RANK);
        expected.extend((0..steps).map(|n| (epoch + 1, step(n))));
    }
    let history = history(&run);
    assert_eq!(history.steps.len(), expected.len());
    for (i, (step, (epoch, lr))) in history.steps.iter().zip(expected).enumerate() {
        assert_eq!((step.step, step.epoch), (i as u64 + 1, epoch));
        let got = step.lr.unwrap();
        assert!((got - lr).abs() < 1e-12, "step {}: {got}, not {lr}", i + 1);
    }
    let loss = |epoch: u32| {
        let of: Vec<f64> = history
            .steps
            .iter()
            .filter(|s| s.epoch == epoch)
            .map(|s| s.loss.unwrap())
            .collect();
        of.iter().sum::<f64>() / of.len() as f64
    };
    let losses: Vec<f64> = (1..=EPOCHS).map(loss).collect();
    // So few clips teach little: two epochs each, for the noise.
    let (first, last) = (losses[0] + losses[1], losses[4] + losses[5]);
    assert!(last < first, "{losses:?}");
    let worlds = events(&run.metrics(), "start");
    let worlds: Vec<u64> = worlds
        .iter()
        .map(|s| s["world_size"].as_u64().unwrap())
        .collect();
    assert_eq!(worlds, [4, 3, 2, 4]);
    assert_eq!(history.validations.len(), EPOCHS as usize);
}

#[test]
fn without_the_scaling_rule_the_rate_is_said_to_stay() {
    let scene = Scene::new();
    scene.motion_set(32, 8);
    let job = [&JOB[..], &["optim.scale_lr=false", "train.epochs=1"]].concat();
    finish(Job::new(&scene, 2, &job).start_all(&scene, "run"), exit::OK);
    let more = [&job[..], &["train.epochs=2"]].concat();
    let alone = Job::new(&scene, 1, &more).resumed();
    let outcome = finish(alone.start_all(&scene, "run"), exit::OK);
    contains(
        &outcome[0].out,
        &[
            "world size 2 -> 1: lr 0.005 unchanged (optim.scale_lr is off), though a step has 4 clips, before 8",
        ],
    );
    // TensorBoard's text page has it too.
    let tb = fs_err::read_dir(scene.run("run").tb()).unwrap().flatten();
    let said = tb.filter(|f| {
        let bytes = fs_err::read(f.path()).unwrap();
        String::from_utf8_lossy(&bytes).contains("world size 2 -> 1")
    });
    assert_eq!(said.count(), 1);
}
