//! Nodes whose run folders are not shared: only that of rank 0 holds checkpoints, and all ranks go on from them.

use crate::crew::{Job, Rank, finish};
use crate::job::{DEADLINE, Scene, contains, events, expect, history, json, kill_rank, survivors};
use crate::nodes::Nodes;
use crate::resume::{assert_identical, learned, tensors};
use rustix::process::{Signal, kill_process};
use std::path::Path;
use tsm_job::{RunDir, exit};

const STEPS_PER_EPOCH: u64 = 12;
const LAST: u64 = 2 * STEPS_PER_EPOCH;

/// Everything random is on.
const JOB: [&str; 8] = [
    "run.seed=5",
    "model.head.dropout=0.5",
    "data.train.size=24",
    "data.train.flip=0.5",
    "train.epochs=2",
    "train.checkpoint_steps=3",
    "train.keep_last=100",
    "train.log_every=1",
];

fn scene() -> Scene {
    let scene = Scene::new();
    scene.motion_set(2 * 4 * STEPS_PER_EPOCH as usize, 8);
    scene
}

fn starts(run: &RunDir) -> Vec<u64> {
    let starts = events(&run.metrics(), "start");
    starts.iter().map(|s| s["step"].as_u64().unwrap()).collect()
}

fn is_empty(folder: &Path) -> bool {
    fs_err::read_dir(folder).map_or(true, |mut f| f.next().is_none())
}

fn sent(rank: u32, step: u64, to: u32) -> String {
    format!("rank {rank} sent its checkpoint of step {step} to rank {to}, which did not have it")
}

/// A start of both ranks, each with its own run folder.
fn ranks(scene: &Scene, job: &Job, runs: [&str; 2]) -> Vec<Rank> {
    let rank = |(run, rank)| job.start(scene, run, rank);
    runs.into_iter().zip(0..).map(rank).collect()
}

#[test]
fn a_checkpoint_on_one_disk_is_enough_for_all_ranks() {
    let scene = scene();
    let job = || Job::new(&scene, 2, &JOB);
    finish(ranks(&scene, &job(), ["whole", "whole"]), exit::OK);

    let mut both = ranks(&scene, &job(), ["a", "b"]);
    both[0].until_step(4);
    both[1].ask_to_save();
    finish(both, exit::REQUEUE);
    assert!(is_empty(&scene.run("b").checkpoints()));

    // Goes on, though rank 1 has nothing to go on from, and later rank 0 neither: they have changed places.
    let mut both = ranks(&scene, &job().resumed(), ["a", "b"]);
    both[0].until_step(LAST - 3);
    both[1].ask_to_save();
    let said = finish(both, exit::REQUEUE);
    let saved = starts(&scene.run("a"))[1];
    contains(
        &said[0].out,
        &["run folder is not shared", &sent(0, saved, 1)],
    );
    let said = finish(ranks(&scene, &job().resumed(), ["b", "a"]), exit::OK);
    let [last] = starts(&scene.run("b"))[..] else {
        panic!("{said:#?}");
    };
    assert!(saved < last && last < LAST, "{saved} {last}");
    contains(&said[0].out, &[&sent(1, last, 0)]);

    let (whole, b) = (scene.run("whole"), scene.run("b"));
    assert_identical(&tensors(&whole, LAST), &tensors(&b, LAST));
    let (whole, [a, b]) = (
        history(&whole),
        [scene.run("a"), scene.run("b")].map(|r| history(&r)),
    );
    let parts = a.steps.iter().chain(&b.steps);
    assert_eq!(
        parts.map(learned).collect::<Vec<_>>(),
        whole.steps.iter().map(learned).collect::<Vec<_>>()
    );
}

#[test]
fn nodes_with_disks_of_their_own_restart_save_and_resume() {
    let Some(nodes) = Nodes::new(scene(), true) else {
        return;
    };
    let scene = &nodes.scene;
    let mut whole = scene.job("whole", 2, &JOB);
    whole.env("OMP_NUM_THREADS", "1");
    expect(whole, exit::OK);

    let (a, b) = (scene.run("node-a"), scene.run("node-b"));
    let size = ["--cpus=1".to_string(), "--nodes=2".into()];
    let [mut first, second] = nodes.start(&[&size[..], &nodes.job(&JOB)].concat());
    let manifest = tensors(&a, 6).with_extension("json");
    first.until("checkpoint of step 6", || manifest.exists().then_some(()));
    kill_rank(&a, 1);
    let from = first.until("the restart", || starts(&a).get(1).copied());
    // The newest before it was killed.
    assert!(from >= 6, "{from}");
    first.until("a step", || {
        let steps = events(&a.metrics(), "step");
        steps
            .last()
            .is_some_and(|s| s["step"] == from + 1)
            .then_some(())
    });
    kill_process(first.pid(), Signal::USR2).unwrap();
    let said = first.finish(DEADLINE);
    assert_eq!(said.code, exit::REQUEUE, "{said:#?}");
    assert_eq!(second.finish(DEADLINE).code, exit::REQUEUE);
    contains(&said.out, &[&sent(0, from, 1)]);
    assert!(!said.err.contains("this start is at step"), "{}", said.err);
    assert!(is_empty(&b.checkpoints()) && b.log("node-b", 1, false).exists());

    // By the command that the launcher gives for it, on both nodes.
    let run = scene.path("run").display().to_string();
    let resume = ["--resume".to_string(), run];
    let [first, second] = nodes.start(&[size, resume].concat());
    let said = first.finish(DEADLINE);
    assert_eq!(said.code, exit::OK, "{said:#?}");
    assert_eq!(second.finish(DEADLINE).code, exit::OK);
    let saved = starts(&a)[2];
    assert!(from < saved && saved < LAST, "{saved}");
    contains(&said.out, &[&sent(0, saved, 1)]);

    assert_eq!(json(&a.manifest())["nodes"].as_array().unwrap().len(), 2);
    let folder = scene.path("run");
    assert!(is_empty(&folder), "it was hidden below the disks");
    assert_identical(&tensors(&scene.run("whole"), LAST), &tensors(&a, LAST));
    assert_eq!(survivors(&folder), Vec::<String>::new());
}
