//! Success, environment, plan, folders.

use crate::harness::{FAKE, Scene, finish, start, until};
use crate::program::write_program;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use tsm_job::exit;
use tsm_job::message::WorkerMessage;

#[test]
fn success_leaves_logs_and_a_manifest() {
    let scene = Scene::new();
    let running = scene.start("--cpus 3", "--say done --wait-for go");
    // A short run may end before the machine has been looked at.
    until("the machine in the manifest", || {
        let text = fs_err::read_to_string(scene.run_dir().join("manifest.json")).ok()?;
        text.contains("mem_bytes").then_some(())
    });
    fs_err::write(scene.path("go"), "").unwrap();
    let outcome = finish(running);
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
        ("GROUP_WORLD_SIZE", "1"),
        ("ROLE_NAME", "default"),
        ("ROLE_RANK", "1"),
        ("ROLE_WORLD_SIZE", "2"),
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
    let outcome = finish(start(scene.command_of("sh").args(["-c", &script])));
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert_eq!(scene.log(31, "err"), b"up\n");
}

#[test]
fn a_hard_limit_of_open_files_below_the_need_is_said_before_the_start() {
    let scene = Scene::new();
    let launch = env!("CARGO_BIN_EXE_tsm-launch");
    let script = format!("ulimit -n 64; exec {launch} --cpus 64 --run-dir run -- true");
    let outcome = finish(start(scene.command_of("sh").args(["-c", &script])));
    assert_eq!(outcome.code, 69, "{}", outcome.err);
    let said =
        "512 open files are needed for 64 ranks, and the hard limit is 64\n  hint: ulimit -Hn 512";
    assert!(outcome.err.contains(said), "{}", outcome.err);
}

/// The shim tells its agent, so that no report takes it for a fault of the program.
#[test]
fn a_worker_that_cannot_be_prepared_says_so_to_its_agent() {
    let scene = Scene::new();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let gone = scene.path("gone").display().to_string();
    let parent = std::process::id().to_string();
    let mut shim = scene.command(&["__worker", &parent, "", "", &gone, "agent", "true"]);
    shim.stdin(OwnedFd::from(theirs)).env("RANK", "3");
    let running = start(&mut shim);
    drop(shim);
    let outcome = finish(running);
    let said =
        format!("cannot start true: cannot enter its control group: failed to open file `{gone}");
    assert_eq!(outcome.code, exit::PREFLIGHT, "{}", outcome.err);
    assert!(outcome.err.contains(&said), "{}", outcome.err);
    let mut text = String::new();
    ours.read_to_string(&mut text).unwrap();
    let WorkerMessage::Failure(record) = serde_json::from_str(&text).unwrap() else {
        panic!("{text}");
    };
    assert_eq!((record.rank, record.code), (3, exit::PREFLIGHT));
    assert_eq!(record.cause, "not prepared");
    assert!(record.message.starts_with(&said), "{}", record.message);
}

/// A rank whose death the launcher cannot place among the others must not have lived.
#[test]
fn a_program_begins_when_it_is_watched_and_not_before() {
    let parent = std::process::id().to_string();
    for is_watched in [true, false] {
        let scene = Scene::new();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let began = scene.path("began");
        let touch = ["__worker", &parent, "", "", "", "agent", "touch"];
        let mut shim = scene.command(&touch);
        shim.arg(&began).stdin(OwnedFd::from(theirs));
        let running = start(&mut shim);
        drop(shim);
        if is_watched {
            ours.write_all(b"!").unwrap();
        } else {
            ours.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let outcome = finish(running);
        let code = if is_watched {
            exit::OK
        } else {
            exit::PREFLIGHT
        };
        assert_eq!(outcome.code, code, "{}", outcome.err);
        assert_eq!(began.exists(), is_watched);
    }
}

#[test]
fn what_keeps_a_program_from_being_executed_is_told_with_its_remedy() {
    let scene = Scene::new();
    let file = |name: &str, bytes: &[u8]| {
        let path = scene.path(name);
        write_program(&path, bytes);
        path.display().to_string()
    };
    // The machine that a binary is for is in these two bytes of its head.
    let mut foreign = fs_err::read(FAKE).unwrap();
    foreign[18..20].copy_from_slice(&[0xff, 0xfe]);
    let cases = [
        (
            file("foreign", &foreign),
            126,
            8,
            "built for another kind of machine",
        ),
        (
            file("orphan", b"#!/nowhere/sh\n"),
            127,
            2,
            "the interpreter in its first line",
        ),
    ];
    for (n, (program, code, errno, hint)) in cases.into_iter().enumerate() {
        let dir = format!("run-{n}");
        let words = [
            "--cpus=1",
            "--max-restarts=2",
            "--run-dir",
            &dir,
            "--",
            &program,
        ];
        let outcome = finish(start(&mut scene.command(&words)));
        let err = &outcome.err;
        assert_eq!(outcome.code, code, "{err}");
        let said = format!("not executed: cannot start {program}: exec: ");
        let line = err
            .lines()
            .find(|line| line.contains(&said))
            .unwrap_or_else(|| panic!("{err}"));
        assert!(line.ends_with(&format!("(os error {errno})")), "{line}");
        assert!(err.contains("class: configuration"), "{err}");
        assert!(
            err.lines()
                .any(|line| line.starts_with("  hint: ") && line.contains(hint)),
            "{err}"
        );
        assert!(!err.contains("start 2"), "it was started again: {err}");
    }
}

/// Rust ignores SIGPIPE in its own programs.
#[test]
fn a_program_starts_with_the_usual_signals() {
    for program in ["grep", "./script"] {
        let scene = Scene::new();
        write_program(&scene.path("script"), "#!/bin/sh\nexec grep \"$@\"\n");
        let words = [
            "--cpus=1",
            "--run-dir=run",
            "--",
            program,
            "-E",
            "^Sig(Ign|Blk)",
            "/proc/self/status",
        ];
        let outcome = finish(start(&mut scene.command(&words)));
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        let masks = outcome.out.lines().map(|line| {
            let mask = line.rsplit_once('\t').unwrap().1;
            u64::from_str_radix(mask, 16).unwrap()
        });
        let masks: Vec<u64> = masks.collect();
        assert_eq!(masks.len(), 2, "{}", outcome.out);
        assert!(
            masks.iter().all(|mask| mask & (1 << 12) == 0),
            "{program}: {masks:x?}"
        );
    }
}
/// Too few for the launcher itself.
#[test]
fn whatever_the_limit_of_open_files_is_the_launcher_says_what_it_needs() {
    for limit in [6, 10, 30] {
        let scene = Scene::new();
        let launch = env!("CARGO_BIN_EXE_tsm-launch");
        let script = format!("ulimit -n {limit}; exec {launch} --cpus 1 --run-dir run -- true");
        let outcome = finish(start(scene.command_of("sh").args(["-c", &script])));
        let said = format!(
            "error: 64 open files are needed for the launcher and its connections, and the hard limit is {limit}\n  hint: ulimit -Hn 64"
        );
        assert_eq!(outcome.code, 69, "{limit}: {}", outcome.err);
        assert!(outcome.err.contains(&said), "{limit}: {}", outcome.err);
    }
}

/// `ulimit -u` counts the processes and threads of a user, who has to be one without others.
#[test]
fn whatever_the_limit_of_threads_is_the_job_runs_or_is_refused() {
    let first = 2_000_000_000 + 100 * std::process::id();
    // It runs in the folder of a test.
    let mut other = std::process::Command::new("ls");
    other.arg(std::env::temp_dir()).stdout(Stdio::null());
    if !other.uid(first).status().is_ok_and(|s| s.success()) {
        return eprintln!("skipped: to be another user needs root, and a folder for all");
    }
    let (mut ran, mut refused) = (0, 0);
    for limit in 1..=24 {
        let scene = Scene::new();
        let user = first + limit;
        let all = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        fs_err::set_permissions(scene.path(""), all).unwrap();
        let launch = scene.own_launcher();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs_err::set_permissions(&launch, executable).unwrap();
        let launch = launch.display();
        let script = format!("ulimit -u {limit}; exec {launch} --cpus 1 --run-dir run -- true");
        let mut command = scene.command_of("bash");
        let outcome = finish(start(command.args(["-c", &script]).uid(user).gid(user)));
        let err = &outcome.err;
        match outcome.code {
            0 => ran += 1,
            69 => {
                refused += 1;
                assert!(
                    err.contains("Resource temporarily unavailable"),
                    "{limit}: {err}"
                );
            }
            code => panic!("{limit}: {code}: {err}"),
        }
        assert!(!err.contains("panicked"), "{limit}: {err}");
        scene.assert_nothing_survives();
    }
    assert!(ran > 0 && refused > 0, "{ran} ran, {refused} were refused");
}
