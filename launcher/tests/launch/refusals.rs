//! What is refused, with which code, before anything starts.

use crate::demo::DEMO;
use crate::harness::{FAKE, Outcome, Scene, finish, start};
use std::collections::BTreeSet;
use std::net::TcpListener;
use std::time::Duration;
use tsm_launch::cluster::key::Key;

/// Runs `words` in an empty folder and checks that nothing was made in it.
fn refused(words: &[&str], env: &[(&str, &str)]) -> Outcome {
    let scene = Scene::new();
    let mut command = scene.command(words);
    let outcome = finish(start(command.envs(env.iter().copied())));
    let left: Vec<_> = fs_err::read_dir(scene.path("."))
        .unwrap()
        .flatten()
        .map(|e| e.file_name())
        .collect();
    assert!(left.is_empty(), "{left:?}\n{}", outcome.err);
    outcome
}

#[test]
fn more_gpus_than_there_are() {
    let outcome = refused(&["--gpus", "1000", "--", FAKE, "--touch", "started"], &[]);
    assert_eq!(outcome.code, 69);
    let expected = "error: cannot start 1000 workers: --gpus is 1000, ";
    assert!(outcome.err.starts_with(expected), "{}", outcome.err);
    assert!(outcome.err.contains("\n  hint: "), "{}", outcome.err);
}

#[test]
fn no_gpu_where_all_are_wanted() {
    let outcome = refused(
        &["--gpus", "auto", "--", FAKE],
        &[("CUDA_VISIBLE_DEVICES", "")],
    );
    assert_eq!(outcome.code, 69);
    assert!(
        outcome.err.contains("0 GPUs are visible") && outcome.err.contains("--cpus N"),
        "{}",
        outcome.err
    );
}

#[test]
fn a_variable_of_another_job() {
    let words = ["--cpus", "1", "--", FAKE, "--touch", "started"];
    let outcome = refused(&words, &[("MASTER_ADDR", "node-7")]);
    assert_eq!(outcome.code, 64);
    assert!(
        outcome.err.contains(r#"MASTER_ADDR is "node-7""#),
        "{}",
        outcome.err
    );
    assert!(outcome.err.contains("--ignore-env"), "{}", outcome.err);

    let scene = Scene::new();
    let words = ["--cpus", "1", "--ignore-env", "--", FAKE, "--print-env"];
    let outcome = finish(start(
        scene
            .command(&words)
            .env("MASTER_ADDR", "node-7")
            .env("RANK", "9"),
    ));
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert!(
        outcome.out.contains("| MASTER_ADDR=127.0.0.1\n") && outcome.out.contains("| RANK=0\n")
    );
}

#[test]
fn a_wrong_command_line() {
    for words in [
        &["--cpus", "2", "--gpus", "1", "--", FAKE][..],
        &["--cpus", "0", "--", FAKE],
        &["--gpus", "x", "--", FAKE],
        &["--cpus", "1", "--grace", "30", "--", FAKE],
        &["--cpus", "1"],
        &["--", FAKE],
        &["--cpus", "1", "a.yaml", "--", FAKE],
        &["--nonsense"],
    ] {
        let outcome = refused(words, &[]);
        assert_eq!(outcome.code, 64, "{words:?}\n{}", outcome.err);
        assert!(
            outcome.err.starts_with("error: "),
            "{words:?}\n{}",
            outcome.err
        );
    }
}

#[test]
fn a_program_or_checkpoint_that_is_not_there() {
    assert_eq!(
        refused(&["--cpus", "1", "--", "no-such-program"], &[]).code,
        69
    );
    assert_eq!(
        refused(&["--cpus", "1", "--resume", "none", "--", FAKE], &[]).code,
        65
    );
}

#[test]
fn a_program_without_the_dashes_before_it() {
    for words in [
        &["--cpus", "1", "train.py"][..],
        &["train.py", "--lr", "1"],
        &["--nproc-per-node=8", "train.py"],
        &["sh", "train.sh"],
    ] {
        let outcome = refused(words, &[]);
        assert_eq!(outcome.code, 64, "{words:?}\n{}", outcome.err);
        let hint = "hint: a program comes after --: tsm-launch ";
        assert!(outcome.err.contains(hint), "{words:?}\n{}", outcome.err);
    }
    let outcome = refused(&["help"], &[]);
    assert_eq!(outcome.code, 64, "{}", outcome.err);
    assert!(outcome.err.contains("--help"), "{}", outcome.err);
    // After the dashes it is a program's own.
    let outcome = refused(&["--nonsense", "--", "train.py"], &[]);
    assert!(!outcome.err.contains("is a program"), "{}", outcome.err);
}

#[test]
fn a_current_folder_that_was_removed() {
    let launch = env!("CARGO_BIN_EXE_tsm-launch");
    for words in ["--cpus 1 -- true", "--cpus 1 --dry-run -- true"] {
        let scene = Scene::new();
        let script = format!("mkdir gone && cd gone && rmdir ../gone && exec {launch} {words}");
        let outcome = finish(start(scene.command_of("sh").args(["-c", &script])));
        assert_eq!(outcome.code, 69, "{}", outcome.err);
        let text =
            "error: the current folder is gone: No such file or directory (os error 2)\n  hint: ";
        assert!(outcome.err.starts_with(text), "{}", outcome.err);
    }
}

#[test]
fn a_log_that_cannot_be_written() {
    let scene = Scene::new();
    let name = format!("logs/{}-1.out", tsm_launch::manifest::host());
    let log = scene.run_dir().join(name);
    fs_err::create_dir_all(&log).unwrap();
    let outcome = scene.launch("--cpus 2", "--touch started --hang");
    assert_eq!(outcome.code, 73, "{}", outcome.err);
    let text = format!(
        "cannot start rank 1: cannot write to the run folder: failed to open file `{}`: Is a directory (os error 21)\n  hint: move away",
        log.display()
    );
    assert!(outcome.err.contains(&text), "{}", outcome.err);
}

#[test]
fn a_config_that_is_missing_or_broken() {
    let outcome = refused(&["--cpus", "1", "none.yaml"], &[]);
    assert_eq!(outcome.code, 78, "{}", outcome.err);
    assert!(outcome.err.contains("none.yaml"), "{}", outcome.err);

    let scene = Scene::new();
    fs_err::write(scene.path("bad.yaml"), "run: {nam: x}\n").unwrap();
    let outcome = finish(start(&mut scene.command(&["--cpus", "1", "bad.yaml"])));
    assert_eq!(outcome.code, 78, "{}", outcome.err);
    assert!(!scene.path("runs").exists());
}

/// Files with which something is wrong, in an empty folder.
fn junk(scene: &Scene) {
    let config = fs_err::read_to_string(DEMO).unwrap();
    let write = |name: &str, bytes: &[u8]| fs_err::write(scene.path(name), bytes).unwrap();
    write("ok.yaml", config.as_bytes());
    write(
        "typo.yaml",
        config.replacen("\noptim:", "\noptmi:", 1).as_bytes(),
    );
    write("binary.yaml", &[0xff, 0xfe, 0, 1]);
    write("empty", b"");
    fs_err::create_dir(scene.path("folder")).unwrap();
    Key::random().write_file(&scene.path("good.key")).unwrap();
    fs_err::copy(scene.path("good.key"), scene.path("open.key")).unwrap();
    for (name, mode) in [("open.key", 0o644), ("empty", 0o600), ("folder", 0o700)] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs_err::set_permissions(scene.path(name), mode).unwrap();
    }
}

/// The command line, the exit code, and what the error says: the place, the value, and what to do.
const CASES: &[(&str, i32, &[&str])] = &[
    (
        "typo.yaml",
        78,
        &[
            "typo.yaml:",
            "unknown section `optmi`",
            "did you mean `optim`",
        ],
    ),
    (
        "none.yaml",
        78,
        &["none.yaml: ", "No such file", "hint: check the name"],
    ),
    (
        "folder",
        78,
        &["folder: ", "Is a directory", "hint: give a YAML file in it"],
    ),
    (
        "binary.yaml",
        78,
        &["binary.yaml: ", "UTF-8", "hint: a config is a text"],
    ),
    ("empty", 78, &["the file is empty", "hint: "]),
    (
        "ok.yaml optim.lr=abc",
        78,
        &["override optim.lr=abc", "expected a number", "hint: "],
    ),
    ("--gpus 0 -- FAKE", 64, &["'0' for '--gpus", "--cpus N"]),
    ("--gpus -1 -- FAKE", 64, &["'-1' for '--gpus"]),
    ("--cpus 5000 -- FAKE", 64, &["5000 is not in 1..=4096"]),
    (
        "--nodes 0 -- FAKE",
        64,
        &["'0' for '--nodes", "write 4, or 2:4"],
    ),
    (
        "--nodes 3:2 -- FAKE",
        64,
        &["the minimum 3 is above the maximum 2"],
    ),
    (
        "--nodes 2 -- FAKE",
        64,
        &["--nodes is 2", "--rendezvous HOST:PORT"],
    ),
    (
        "--nodes 2 --rendezvous here --key-file good.key -- FAKE",
        64,
        &["\"here\"", "write HOST:PORT"],
    ),
    (
        "--nodes 2 --rendezvous :29400 --key-file good.key -- FAKE",
        64,
        &["names no host", "write HOST:PORT"],
    ),
    (
        "--nodes 2 --rendezvous h:99999 --key-file good.key -- FAKE",
        64,
        &["\"h:99999\"", "write HOST:PORT"],
    ),
    (
        "--nodes 2 --rendezvous 0.0.0.0:1 --key-file good.key -- FAKE",
        64,
        &["0.0.0.0:1", "hint: give the address"],
    ),
    (
        "--nodes 2 --rendezvous none.invalid:1 --key-file good.key -- FAKE",
        69,
        &["none.invalid cannot be found", "hint: "],
    ),
    (
        "--nodes 2 --rendezvous 127.0.0.1:9 --key-file none.key -- FAKE",
        64,
        &["none.key", "No such file", "tsm-launch key none.key"],
    ),
    (
        "--nodes 2 --rendezvous 127.0.0.1:9 --key-file empty -- FAKE",
        64,
        &["key file empty holds no key", "0 characters", "hint: "],
    ),
    (
        "--nodes 2 --rendezvous 127.0.0.1:9 --key-file open.key -- FAKE",
        64,
        &["its mode is 0644", "hint: chmod 600 open.key"],
    ),
    (
        "--nodes 2 --rendezvous 127.0.0.1:9 --key-file folder -- FAKE",
        64,
        &["folder: it is no regular file"],
    ),
    (
        "--nodes 2 --rendezvous 127.0.0.1:9 -- FAKE",
        64,
        &["--key-file <FILE>|--key-fd <N>"],
    ),
    (
        "--nodes 2 --rendezvous 127.0.0.1:9 --key-file good.key --key-fd 0 -- FAKE",
        64,
        &["cannot be used with '--key-fd <N>'"],
    ),
    (
        "--nodes 2 --rendezvous 127.0.0.1:9 --key-fd 0 -- FAKE",
        64,
        &["descriptor 0: it has 0 characters", "hint: send one line"],
    ),
    (
        "--nodes 2 --rendezvous 127.0.0.1:9 --key-fd 93 -- FAKE",
        64,
        &["descriptor 93: it is not open", "93<FILE"],
    ),
    (
        "--key-fd 0 -- FAKE",
        64,
        &["--key-fd would have no effect", "hint: give --rendezvous"],
    ),
    (
        "--hosts a,a -- FAKE",
        64,
        &["a is named twice", "hint: write --hosts"],
    ),
    (
        "--hosts a,,b -- FAKE",
        64,
        &["\"\" names no host", "hint: write --hosts"],
    ),
    (
        "--hosts %$(id) -- FAKE",
        64,
        &["is no name of a host", "hint: write --hosts"],
    ),
    (
        "--hosts a:0 -- FAKE",
        64,
        &["\"0\" is not a number of workers", "hint: "],
    ),
    (
        "--hostfile empty -- FAKE",
        64,
        &["empty names no host", "hint: "],
    ),
    (
        "--hostfile folder -- FAKE",
        64,
        &["--hostfile", "Is a directory"],
    ),
    (
        "--run-dir good.key/run -- FAKE",
        73,
        &["good.key/run", "Not a directory", "give another --run-dir"],
    ),
    (
        "--run-dir /proc/run -- FAKE",
        73,
        &["/proc/run", "give another --run-dir"],
    ),
    (
        "--max-restarts -1 -- FAKE",
        64,
        &["'-1' for '--max-restarts", "0..="],
    ),
    (
        "--grace abc -- FAKE",
        64,
        &["'abc' for '--grace", "write it like 500ms, 30s"],
    ),
    (
        "--grace -1s -- FAKE",
        64,
        &["'-1s' for '--grace", "write it like"],
    ),
    (
        "--grace 18000000000000000000s -- FAKE",
        64,
        &["is too long", "9999h"],
    ),
    (
        "--hang-timeout 0s -- FAKE",
        64,
        &["'0s' for '--hang-timeout", "write `off`"],
    ),
    (
        "--node-timeout 1ms -- FAKE",
        64,
        &["'1ms' for '--node-timeout", "200ms"],
    ),
    (
        "--env =x -- FAKE",
        64,
        &["--env =x: a variable needs a name"],
    ),
    (
        "--env NOT_SET_HERE -- FAKE",
        64,
        &[
            "NOT_SET_HERE: the variable is not set",
            "hint: write NAME=VALUE",
        ],
    ),
    (
        "--env A=1 --env RANK=7 -- FAKE",
        64,
        &[
            "--env RANK=7: the launcher sets RANK itself",
            "hint: ",
            "RANK, LOCAL_RANK, WORLD_SIZE",
        ],
    ),
    (
        "--dry-run --env A\u{a0}B=1 -- FAKE",
        64,
        &["is no name of a variable", "hint: write NAME=VALUE"],
    ),
    (
        "--key-file good.key -- FAKE",
        64,
        &["--key-file would have no effect", "hint: give --rendezvous"],
    ),
    (
        "--hosts a --key-file good.key -- FAKE",
        64,
        &["--key-file would have no effect", "--hosts"],
    ),
    (
        "--share-host -- FAKE",
        64,
        &["--share-host would have no effect", "hint: leave it out"],
    ),
    (
        "--rendezvous-dir folder -- FAKE",
        64,
        &[
            "--rendezvous-dir would have no effect",
            "hint: leave it out",
        ],
    ),
    (
        "--hosts a --rendezvous-dir folder -- FAKE",
        64,
        &["'--rendezvous-dir <PATH>' cannot be used with", "--hosts"],
    ),
    (
        "--trainer FAKE -- FAKE",
        64,
        &["'--trainer <PATH>' cannot be used with"],
    ),
    ("--ssh x -- FAKE", 64, &["--hosts"]),
    ("--remote-launcher /x -- FAKE", 64, &["--hosts"]),
    (
        "--show-ranks 0,5 -- FAKE",
        64,
        &[
            "--show-ranks names rank 5, the job has rank 0 alone",
            "hint: ",
        ],
    ),
    ("-- ./folder", 69, &["./folder: it is a folder"]),
    (
        "-- ./good.key",
        69,
        &["./good.key: it is not executable", "hint: chmod +x"],
    ),
];

/// Far longer than any of them takes, and far shorter than a wait for another node.
const AT_ONCE: Duration = Duration::from_secs(55);

#[test]
fn what_cannot_run_is_refused_with_one_error_that_says_what_to_do_and_leaves_nothing() {
    let scene = Scene::new();
    junk(&scene);
    let files = || {
        let entries = fs_err::read_dir(scene.path(".")).unwrap().flatten();
        entries.map(|e| e.file_name()).collect::<BTreeSet<_>>()
    };
    let before = files();
    for (line, code, parts) in CASES {
        let mut words: Vec<&str> = line.split_ascii_whitespace().collect();
        for fake in words.iter_mut().filter(|word| **word == "FAKE") {
            *fake = FAKE;
        }
        if !line.contains("--gpus") && !line.contains("--cpus") {
            words.splice(0..0, ["--cpus", "1"]);
        }
        let outcome = finish(start(&mut scene.command(&words)));
        let err = &outcome.err;
        assert_eq!(outcome.code, *code, "{line}\n{err}");
        assert!(err.starts_with("error: "), "{line}\n{err}");
        assert_eq!(err.matches("error: ").count(), 1, "{line}\n{err}");
        for part in *parts {
            assert!(err.contains(part), "{line}: {part}\n{err}");
        }
        assert!(!err.contains("panicked"), "{line}\n{err}");
        assert!(outcome.took < AT_ONCE, "{line}: {:?}", outcome.took);
        assert_eq!(files(), before, "{line}");
    }
}

#[test]
fn a_port_that_another_program_holds_is_named() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let point = other.local_addr().unwrap().to_string();
    let scene = Scene::new();
    junk(&scene);
    let words = [
        "--cpus=1",
        "--nodes=2",
        "--join-timeout=1s",
        "--key-file=good.key",
    ];
    let mut command = scene.command(&words);
    command.args(["--rendezvous", &point, "--", FAKE]);
    let outcome = finish(start(&mut command));
    assert_eq!(outcome.code, 76, "{}", outcome.err);
    let text = format!("error: cannot join the job: {point} did not prove");
    assert!(outcome.err.starts_with(&text), "{}", outcome.err);
    let hint = "hint: see which program listens there";
    assert!(outcome.err.contains(hint), "{}", outcome.err);
}

/// At whatever file the space ends.
#[test]
fn a_full_disk_is_no_fault_of_the_job() {
    let scene = Scene::new();
    let full = scene.path("full");
    fs_err::create_dir(&full).unwrap();
    let Some(_mount) = Mount::tmpfs(&full) else {
        return;
    };
    let filler = full.join("filler");
    for free_kib in [0u64, 4, 8, 12, 16] {
        let _ = fs_err::remove_dir_all(full.join("run"));
        let _ = fs_err::remove_file(&filler);
        let free = rustix::fs::statvfs(&full).unwrap();
        let free = free.f_bavail * free.f_frsize;
        fs_err::write(&filler, vec![1; (free - free_kib * 1024) as usize]).unwrap();
        let words = ["--cpus=1", "--run-dir=full/run", "--", FAKE];
        let outcome = finish(start(&mut scene.command(&words)));
        let err = &outcome.err;
        match outcome.code {
            // It ran, and says what it could not write.
            0 => assert!(free_kib > 0, "{err}"),
            code => {
                assert!(matches!(code, 69 | 73), "{free_kib} KiB: {code}\n{err}");
                assert!(
                    err.contains("No space left") || err.contains("full"),
                    "{err}"
                );
            }
        }
        assert!(!err.contains("panicked"), "{err}");
    }
}

/// A file system of 64 KiB, until it is dropped.
pub struct Mount(std::path::PathBuf);

impl Mount {
    pub fn tmpfs(at: &std::path::Path) -> Option<Mount> {
        let mut command = std::process::Command::new("mount");
        command
            .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
            .arg(at);
        match command.stderr(std::process::Stdio::null()).status() {
            Ok(status) if status.success() => Some(Mount(at.into())),
            _ => {
                eprintln!("skipped: no tmpfs can be mounted; needs root");
                None
            }
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let mut command = std::process::Command::new("umount");
        let _ = command.arg("-l").arg(&self.0).status();
    }
}

/// What the same command line needs elsewhere.
#[test]
fn a_dry_run_shows_the_variables_and_needs_no_more_than_its_options_mean() {
    let scene = Scene::new();
    junk(&scene);
    for words in [
        "--nodes 1 --rendezvous none.invalid:1 --key-file good.key",
        "--env OMP_NUM_THREADS=3 --env NEW=b",
    ] {
        let mut command = scene.command(&["--cpus=2", "--dry-run"]);
        command.args(words.split(' ')).args(["--", FAKE]);
        let outcome = finish(start(&mut command));
        assert_eq!(outcome.code, 0, "{words}\n{}", outcome.err);
        if words.contains("--env") {
            let lines = "every rank\n  OMP_NUM_THREADS=3\n  NEW=b\n";
            assert!(outcome.out.contains(lines), "{}", outcome.out);
            assert_eq!(outcome.out.matches("OMP_NUM_THREADS").count(), 1);
        }
    }
}

#[test]
fn help_and_version_are_no_errors() {
    let help = refused(&["--help"], &[]);
    assert_eq!(help.code, 0);
    assert!(
        help.out.contains("Exit codes:") && help.out.contains("--show-ranks"),
        "{}",
        help.out
    );
    assert_eq!(refused(&["--version"], &[]).code, 0);
}
