//! Trainers started by `mpirun`, without tsm-launch.

use crate::job::{Scene, TRAINER, config, contains, events, expect, json, start};
use std::path::PathBuf;
use std::process::Command;
use tsm_job::{RunDir, exit};

/// The arguments of a small job whose run folders are made in `runs`.
fn arguments(scene: &Scene, more: &[&str]) -> Vec<String> {
    let mut all = vec!["--config".into(), config("demo.yaml").display().to_string()];
    all.extend(scene.overrides(more));
    all.extend(["run.dir=runs".into(), "launch.device=cpu".into()]);
    all
}

fn without_ranks(mut command: Command, scene: &Scene) -> Command {
    for name in tsm_launch::plan::RANK_VARIABLES {
        command.env_remove(name);
    }
    command.env("OMP_NUM_THREADS", "1");
    command.current_dir(scene.path("."));
    command
}

/// The one thing in `runs`.
fn only_run(scene: &Scene) -> RunDir {
    let all = fs_err::read_dir(scene.path("runs")).unwrap().flatten();
    let all: Vec<PathBuf> = all.map(|e| e.path()).collect();
    assert_eq!(all.len(), 1, "{all:?}");
    RunDir::new(&all[0])
}

#[test]
fn mpirun_starts_the_ranks_of_one_run() {
    let found = Command::new("mpirun").arg("--version").output();
    let text = found.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    if !text.as_ref().is_ok_and(|t| t.contains("Open MPI")) {
        eprintln!("skipped: no mpirun of Open MPI here");
        return;
    }
    let scene = Scene::new();
    scene.motion_set(32, 8);
    let mut mpirun = without_ranks(Command::new("mpirun"), &scene);
    mpirun.args(["--allow-run-as-root", "--oversubscribe", "-n", "3", TRAINER]);
    mpirun.args(arguments(&scene, &[]));
    let outcome = expect(mpirun, exit::OK);
    contains(
        &outcome.out,
        &["rank 0 of 3 on Cpu, 1 threads", "best top1"],
    );
    let run = only_run(&scene);
    assert_eq!(events(&run.metrics(), "start")[0]["world_size"], 3);
    // 32 clips for 3 ranks of 4.
    assert_eq!(json(&run.summary())["final_step"], 2);
    assert!(tsm_trainer::checkpoint::find(run.path()).is_ok());
}

/// As two hosts would see it: no rank shares one with another.
#[test]
fn ranks_on_several_hosts_find_rank_0_by_its_file() {
    let scene = Scene::new();
    scene.motion_set(16, 8);
    let rank = |rank: &str, more: &[(&str, &str)]| {
        let mut command = without_ranks(Command::new(TRAINER), &scene);
        command.args(arguments(&scene, &["launch.collective_timeout=60s"]));
        command.envs([
            ("OMPI_COMM_WORLD_RANK", rank),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "1"),
            ("PMIX_NAMESPACE", "the-job"),
        ]);
        command.envs(more.iter().copied());
        command
    };
    // What an earlier job of this name left, which nobody answers any more.
    let stale = scene.path("runs");
    fs_err::create_dir(&stale).unwrap();
    let mut second = start(rank("1", &[]));
    let first = start(rank("0", &[]));
    second.until("first step", || {
        let any = fs_err::read_dir(&stale).unwrap().flatten();
        any.map(|e| e.path().join("metrics.jsonl"))
            .find(|p| p.exists())
    });
    assert_eq!(first.finish(crate::job::DEADLINE).code, exit::OK);
    assert_eq!(second.finish(crate::job::DEADLINE).code, exit::OK);
    assert_eq!(
        events(&only_run(&scene).metrics(), "start")[0]["world_size"],
        2
    );

    // Alone, with a word of what to do.
    let outcome = expect(
        {
            let mut lonely = rank("1", &[("PMIX_NAMESPACE", "another")]);
            lonely.arg("launch.collective_timeout=1s");
            lonely
        },
        exit::PEER,
    );
    contains(
        &outcome.err,
        &[
            "rank 1 could not meet the other 1 ranks through runs/.rendezvous-",
            "hint: run.dir (runs)",
        ],
    );
}
