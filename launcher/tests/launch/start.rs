//! Success, environment, plan, folders.

use crate::harness::{Scene, finish, start, until};
use std::collections::BTreeMap;
use std::net::TcpListener;

#[test]
fn success_leaves_logs_and_a_manifest() {
    let scene = Scene::new();
    let outcome = scene.launch("--cpus 3", "--say done");
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    for rank in 0..3 {
        assert_eq!(scene.log(rank, "err"), b"done\n");
    }
    assert!(outcome.err.contains(" | done\n"), "{}", outcome.err);
    let manifest = scene.json("manifest.json");
    assert_eq!(manifest["outcome"], "succeeded");
    assert_eq!(manifest["world_size"], 3);
    let path = manifest["binaries"][1]["path"].as_str().unwrap();
    assert!(path.ends_with("fake-worker"), "{path}");
    let environment = manifest["environment"].as_array().unwrap();
    let world_size = environment.iter().find(|v| v["name"] == "WORLD_SIZE");
    assert_eq!(world_size.unwrap()["after"], "3");
    assert_eq!(manifest["ranks"][2]["end"]["code"], 0);
    assert!(manifest["ranks"][2]["pid"].as_i64().unwrap() > 0);
    assert!(manifest["machine"]["mem_bytes"].as_u64().unwrap() > 0);
    assert_eq!(
        scene
            .read("events.jsonl")
            .matches(r#""event":"spawn""#)
            .count(),
        3
    );
    assert!(!scene.run_dir().join("failure.json").exists());
}

#[test]
fn workers_find_torchs_environment() {
    let scene = Scene::new();
    assert_eq!(scene.launch("--cpus 2", "--print-env").code, 0);
    let env = |rank: u32| -> BTreeMap<String, String> {
        let text = String::from_utf8(scene.log(rank, "out")).unwrap();
        text.lines()
            .filter_map(|l| l.split_once('='))
            .map(|(n, v)| (n.into(), v.into()))
            .collect()
    };
    let (zero, one) = (env(0), env(1));
    let run_dir = scene.run_dir().to_string_lossy().into_owned();
    let host = tsm_launch::manifest::host();
    for (name, value) in [
        ("RANK", "1"),
        ("LOCAL_RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("GROUP_RANK", "0"),
        ("NODE_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("GLOO_SOCKET_IFNAME", "lo"),
        ("NCCL_SOCKET_IFNAME", "lo"),
        ("TORCHELASTIC_RUN_ID", "run"),
        ("TORCHELASTIC_RESTART_COUNT", "0"),
        ("TORCHELASTIC_MAX_RESTARTS", "0"),
        (
            "TORCHELASTIC_ERROR_FILE",
            &format!("{run_dir}/logs/{host}-1.error.json"),
        ),
        ("TSM_RUN_DIR", &run_dir),
        ("TSM_RUN_ID", "run"),
        ("TSM_GENERATION", "0"),
        ("TSM_RESTART_COUNT", "0"),
    ] {
        assert_eq!(one.get(name).map(String::as_str), Some(value), "{name}");
    }
    assert!(one["OMP_NUM_THREADS"].parse::<u32>().unwrap() >= 1);
    assert!(one["TSM_AGENT_FD"].parse::<i32>().unwrap() > 2);
    assert_eq!(zero["MASTER_PORT"], one["MASTER_PORT"]);
    let port: u16 = one["MASTER_PORT"].parse().unwrap();
    // It is free after the run, or for a moment somebody else's.
    until("the port", || TcpListener::bind(("127.0.0.1", port)).ok());
}

#[test]
fn what_the_user_set_reaches_the_workers() {
    let scene = Scene::new();
    let words = [
        "--cpus",
        "1",
        "--run-dir",
        "run",
        "--",
        crate::harness::FAKE,
        "--print-env",
    ];
    let mut command = scene.command(&words);
    command
        .env("OMP_NUM_THREADS", "5")
        .env("GLOO_SOCKET_IFNAME", "eth7")
        .env("MINE", "yes");
    let outcome = finish(start(&mut command));
    for line in [
        "0 | OMP_NUM_THREADS=5\n",
        "0 | GLOO_SOCKET_IFNAME=eth7\n",
        "0 | MINE=yes\n",
    ] {
        assert!(outcome.out.contains(line), "{line}{}", outcome.out);
    }
}

#[test]
fn every_rank_has_its_own_cores() {
    let cores = tsm_launch::cores::allowed();
    if cores.len() < 2 {
        eprintln!("skipped: one core cannot be shared out");
        return;
    }
    let scene = Scene::new();
    scene.launch("--cpus 2", "--print-cores");
    for rank in 0..2 {
        let expected = tsm_launch::cores::to_list(tsm_launch::cores::share(&cores, rank, 2));
        assert_eq!(
            String::from_utf8(scene.log(rank as u32, "out")).unwrap(),
            format!("cores {expected}\n")
        );
    }
    let scene = Scene::new();
    scene.launch("--cpus 2 --no-affinity", "--print-cores");
    let all = tsm_launch::cores::to_list(&cores);
    assert_eq!(
        String::from_utf8(scene.log(1, "out")).unwrap(),
        format!("cores {all}\n")
    );
}

#[test]
fn a_dry_run_prints_the_plan_and_makes_nothing() {
    let scene = Scene::new();
    let outcome = scene.launch("--cpus 2 --dry-run", "--touch started");
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    for part in [
        "world size  2",
        "RANK=1",
        "MASTER_PORT=(a free port)",
        "--touch started",
        "rank 1: cpu, cores ",
    ] {
        assert!(outcome.out.contains(part), "{part}\n{}", outcome.out);
    }
    assert!(fs_err::read_dir(scene.path(".")).unwrap().next().is_none());
}

#[test]
fn without_a_name_a_folder_is_made_below_runs() {
    let scene = Scene::new();
    let words = ["--cpus", "1", "--", crate::harness::FAKE];
    let running: Vec<_> = (0..4).map(|_| start(&mut scene.command(&words))).collect();
    for outcome in running.into_iter().map(finish) {
        assert_eq!(outcome.code, 0, "{}", outcome.err);
    }
    let names: Vec<_> = fs_err::read_dir(scene.path("runs"))
        .unwrap()
        .flatten()
        .collect();
    assert_eq!(
        names.len(),
        4,
        "four runs, started at once, have four folders"
    );
    assert!(
        names
            .iter()
            .all(|e| e.file_name().to_string_lossy().starts_with("fake-worker-2"))
    );
}

#[test]
fn a_shell_command_is_a_program_too() {
    let scene = Scene::new();
    let outcome = scene.shell("--cpus 2", "echo rank $RANK of $WORLD_SIZE");
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert!(outcome.out.contains("1 | rank 1 of 2\n"), "{}", outcome.out);
}

#[test]
fn many_ranks_need_no_higher_limit_of_open_files() {
    let scene = Scene::new();
    let launch = env!("CARGO_BIN_EXE_tsm-launch");
    let script = format!(
        "ulimit -S -n 100; exec {launch} --cpus 32 --run-dir run --show-ranks none -- {} --say up",
        crate::harness::FAKE
    );
    let outcome = finish(start(
        std::process::Command::new("sh")
            .args(["-c", &script])
            .current_dir(scene.path(".")),
    ));
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert_eq!(scene.log(31, "err"), b"up\n");
}

#[test]
fn a_hard_limit_of_open_files_below_the_need_is_said_before_the_start() {
    let scene = Scene::new();
    let launch = env!("CARGO_BIN_EXE_tsm-launch");
    let script = format!("ulimit -n 64; exec {launch} --cpus 64 --run-dir run -- true");
    let outcome = finish(start(
        std::process::Command::new("sh")
            .args(["-c", &script])
            .current_dir(scene.path(".")),
    ));
    assert_eq!(outcome.code, 69, "{}", outcome.err);
    let said = "64 ranks need 448 open files, and the hard limit is 64\n  hint: ulimit -Hn 448";
    assert!(outcome.err.contains(said), "{}", outcome.err);
}
