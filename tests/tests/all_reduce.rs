//! `tsm-trainer all-reduce` below the real launcher, and below the doctor.

use crate::job::{LAUNCH, Scene, TRAINER, contains, events, expect, json, kill_rank, start};
use std::ffi::OsString;
use std::process::Command;
use tsm_job::all_reduce::{AllReduce, DIR_VARIABLE};
use tsm_job::exit;
use tsm_launch::cluster::key::Key;
use tsm_launch::port::Port;

/// `ranks` ranks on the CPU that measure with these words.
fn measure(scene: &Scene, ranks: u32, words: &[&str]) -> Command {
    let ranks = ranks.to_string();
    let launch = ["--cpus", &ranks, "--run-dir", "run", "--", TRAINER];
    let mut command = scene.launch(&launch);
    command.args(["all-reduce", "--bytes", "1MiB"]).args(words);
    command
}

#[test]
fn every_rank_says_what_it_measured() {
    let scene = Scene::new();
    fs_err::create_dir(scene.path("lines")).unwrap();
    let mut command = measure(&scene, 3, &["--json", "--seconds", "0.2"]);
    command.env(DIR_VARIABLE, scene.path("lines"));
    let out = expect(command, exit::OK).out;
    let mut lines: Vec<AllReduce> = out
        .lines()
        .map(|line| serde_json::from_str(line.split_once("| ").unwrap().1).unwrap())
        .collect();
    lines.sort_by_key(|line| line.rank);
    for (rank, line) in lines.iter().enumerate() {
        assert_eq!((line.rank, line.world_size), (rank as u32, 3));
        assert_eq!((line.bytes, line.device.as_str()), (1 << 20, "cpu"));
        assert_eq!((line.rounds, &line.wrong), (lines[0].rounds, &None));
        let (algorithm, bus) = (line.algbw_gb_s.unwrap(), line.busbw_gb_s.unwrap());
        let expected = (1 << 20) as f64 * 1e-9 / line.seconds;
        assert!((algorithm / expected - 1.0).abs() < 1e-9, "{line:?}");
        assert!((bus / algorithm - 4.0 / 3.0).abs() < 1e-9, "{line:?}");
        let file = scene.path(&format!("lines/rank-{rank}.json"));
        assert_eq!(
            &serde_json::from_value::<AllReduce>(json(&file)).unwrap(),
            line
        );
    }
    assert_eq!(lines.len(), 3);
}

#[test]
fn rank_0_prints_a_table_and_a_rank_alone_has_no_rate() {
    for (ranks, rate) in [(2, true), (1, false)] {
        let scene = Scene::new();
        let out = expect(measure(&scene, ranks, &["--seconds", "0"]), exit::OK).out;
        let lines: Vec<Vec<&str>> = out
            .lines()
            .map(|line| line.split_whitespace().skip(2).collect())
            .collect();
        let [header, words] = &lines[..] else {
            panic!("{out}");
        };
        assert_eq!(header[0], "ranks");
        assert_eq!(words[..3], [&ranks.to_string()[..], "1048576", "1"]);
        assert_eq!(words[4].parse::<f64>().is_ok(), rate, "{out}");
        assert_eq!(words[words.len() - 2..], ["right", "cpu"]);
    }
}

#[test]
fn a_killed_rank_is_named_first() {
    let scene = Scene::new();
    let mut command = measure(&scene, 2, &["--seconds", "600", "--json"]);
    command.args(["--timeout", "60s"]);
    let mut running = start(command);
    let run = scene.run("run");
    running.until("start of both ranks", || {
        (events(&run.events(), "spawn").len() == 2).then_some(())
    });
    kill_rank(&run, 1);
    let outcome = running.finish(crate::job::DEADLINE);
    assert_eq!(outcome.code, exit::SIGNAL_BASE + libc::SIGKILL);
    contains(&outcome.err, &["rank 1 failed first: signal 9 (SIGKILL)"]);
}

#[test]
fn the_doctor_measures_with_the_real_trainer() {
    let scene = Scene::new();
    let mut doctor = Command::new(LAUNCH);
    doctor.args(["doctor", "--cpus", "2", "--preflight", "full", "--json"]);
    doctor.args(["--trainer", TRAINER, "--run-dir", "run"]);
    for name in tsm_launch::plan::RANK_VARIABLES {
        doctor.env_remove(name);
    }
    doctor.current_dir(scene.path("."));
    // Other findings about this machine may be errors.
    let outcome = start(doctor).finish(crate::job::DEADLINE);
    let found: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
    let found = found["facts"]["findings"].as_array().unwrap();
    let ours: Vec<_> = found.iter().filter(|f| f["area"] == "all-reduce").collect();
    assert_eq!(ours.len(), 1, "{found:#?}");
    let text = ours[0]["text"].as_str().unwrap();
    assert!(
        text.starts_with("2 ranks on the CPU (cpu): ") && text.ends_with("every sum is right"),
        "{text}"
    );
}

/// Two nodes that are both this machine; their CPUs are measured as GPUs would be.
#[test]
fn two_nodes_are_measured_with_the_trainer_before_a_job() {
    let scene = Scene::new();
    scene.motion_set(16, 8);
    let key = scene.path("key");
    Key::random().write_file(&key).unwrap();
    let held = Port::reserve().unwrap();
    let point = format!("127.0.0.1:{}", held.number);
    let node = || {
        let mut command = scene.job("run", 2, &[]);
        command.args(["--nodes", "2", "--rendezvous", &point]);
        command.arg("--key-file").arg(&key);
        // A busy machine is no lost one.
        command.args(["--node-timeout", "30s", "--preflight", "full"]);
        command.args(["--preflight-scale", "1048576,100ms,60s,cpus"]);
        command.env("TMPDIR", scene.path("."));
        start(command)
    };
    let nodes = [node(), node()];
    let outcomes = nodes.map(|n| n.finish(crate::job::DEADLINE));
    assert_eq!(
        [outcomes[0].code, outcomes[1].code],
        [0, 0],
        "{outcomes:#?}"
    );
    let told = outcomes.map(|o| o.err).concat();
    contains(
        &told,
        &[
            "all-reduce within a node ",
            "GB/s bus bandwidth on 2 nodes",
            "2 nodes in 1 group: ",
        ],
    );
    let manifest = json(&scene.run("run").manifest());
    let report = &manifest["preflight"][0];
    assert!(
        report["nodes"][1]["all_reduce_gb_s"].as_f64() > Some(0.0),
        "{report}"
    );
    let group = &report["groups"][0][0];
    assert!(group["gbit_s"].as_f64() > Some(0.0), "{report}");
    // Rings are timed by their round trip; the trainer's sums have none.
    assert!(group["round_trip_us"].is_null(), "{report}");
    let left = fs_err::read_dir(scene.path(".")).unwrap().flatten();
    let left: Vec<_> = left.map(|e| e.file_name()).collect();
    let is_ours = |name: &OsString| name.to_string_lossy().starts_with("tsm-all-reduce");
    assert!(!left.iter().any(is_ours), "{left:?}");
}
