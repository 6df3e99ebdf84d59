//! Nodes whose run folders are not shared: only that of rank 0 holds checkpoints, and all ranks go on from them.

use crate::crew::{Job, Rank, finish};
use crate::job::{Scene, config, contains, events, expect, history, json, start, survivors};
use crate::resume::{assert_identical, learned, tensors};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use tsm_job::{RunDir, exit};

const STEPS_PER_EPOCH: u64 = 8;
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
    let sent = |rank: u32, step: u64, to: u32| {
        format!(
            "rank {rank} sent its checkpoint of step {step} to rank {to}, which did not have it"
        )
    };
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

/// `tsm-launch` on a node of its own: with this host name, and `disk` where the others have another.
fn node(scene: &Scene, name: &str, port: u16) -> Command {
    let (disk, run) = (scene.path(name), scene.path("run"));
    for folder in [&disk, &run] {
        fs_err::create_dir_all(folder).unwrap();
    }
    let words = [
        "--cpus=1",
        "--nodes=2",
        "--run-dir=run",
        "--key-file=key",
        "--max-restarts=3",
    ];
    let launch = scene.launch(&words);
    let mut command = Command::new("unshare");
    // A mount that is gone with the last process that sees it.
    let script = r#"hostname "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@""#;
    command.args([
        "--mount",
        "--uts",
        "--propagation=private",
        "sh",
        "-c",
        script,
        "sh",
        name,
    ]);
    command.args([&disk, &run]);
    command.arg(launch.get_program()).args(launch.get_args());
    command.arg(format!("--rendezvous=127.0.0.1:{port}"));
    command.arg(config("demo.yaml"));
    command.args(scene.overrides(&JOB));
    command.current_dir(scene.path("."));
    for (name, _) in launch.get_envs() {
        command.env_remove(name);
    }
    // As the other ranks, on one node, have.
    command.env("OMP_NUM_THREADS", "1");
    command
}

#[test]
fn a_rank_that_dies_on_a_node_with_its_own_disk_is_started_again() {
    let allowed = Command::new("unshare")
        .args(["--mount", "--uts", "true"])
        .output();
    if !allowed.is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: no mount namespaces here; needs root and unshare");
        return;
    }
    let scene = scene();
    let mut whole = scene.job("whole", 2, &JOB);
    whole.env("OMP_NUM_THREADS", "1");
    expect(whole, exit::OK);

    let key = tsm_launch::cluster::key::Key::random();
    key.write_file(&scene.path("key")).unwrap();
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let (a, b) = (scene.run("node-a"), scene.run("node-b"));
    let mut first = start(node(&scene, "node-a", free));
    first.until("the first node", || {
        (!events(&a.events(), "join").is_empty()).then_some(())
    });
    let second = start(node(&scene, "node-b", free));
    let manifest = tensors(&a, 6).with_extension("json");
    first.until("checkpoint of step 6", || manifest.exists().then_some(()));
    crate::job::kill_rank(&a, 1);
    let said = first.finish(crate::job::DEADLINE);
    assert_eq!(said.code, exit::OK, "{said:#?}");
    assert_eq!(second.finish(crate::job::DEADLINE).code, exit::OK);

    let [0, from] = starts(&a)[..] else {
        panic!("{:?}", starts(&a));
    };
    assert!(from >= 6, "{from}");
    let sent = format!("rank 0 sent its checkpoint of step {from} to rank 1");
    contains(&said.out, &[&sent]);
    assert!(
        !said.err.contains("warning: this start is at step"),
        "{}",
        said.err
    );
    assert_eq!(json(&a.manifest())["nodes"].as_array().unwrap().len(), 2);
    assert!(is_empty(&b.checkpoints()) && b.log("node-b", 1, false).exists());
    assert!(
        is_empty(scene.run("run").path()),
        "it was hidden below the disks"
    );
    let whole = scene.run("whole");
    assert_identical(&tensors(&whole, LAST), &tensors(&a, LAST));
    assert_eq!(survivors(&scene.path("run")), Vec::<String>::new());
}
