//! Continuing a run folder.

use crate::harness::{FAKE, Scene, finish, start};

#[test]
fn a_run_folder_is_continued_in_place() {
    let scene = Scene::new();
    assert_eq!(
        scene
            .launch("--cpus 2", "--say first --on-rank 1 --exit 9")
            .code,
        9
    );
    let words = [
        "--cpus",
        "2",
        "--resume",
        "run",
        "--",
        FAKE,
        "--say",
        "second",
        "--print-env",
    ];
    let outcome = finish(start(&mut scene.command(&words)));
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert_eq!(
        scene.log(1, "err"),
        b"first\nsecond\n",
        "logs are continued"
    );
    let resume_from = format!("1 | TSM_RESUME_FROM={}\n", scene.run_dir().display());
    assert!(outcome.out.contains(&resume_from), "{}", outcome.out);
    assert_eq!(scene.json("manifest-1.json")["exit_code"], 9);
    assert_eq!(scene.json("manifest.json")["exit_code"], 0);
    assert!(scene.run_dir().join("failure-1.json").exists());
    assert!(!scene.run_dir().join("failure.json").exists());
}

/// A supervisor gives the same command until it succeeds.
#[test]
fn the_same_command_starts_a_run_goes_on_with_it_and_finds_it_finished() {
    let scene = Scene::new();
    fs_err::write(scene.path("code"), "9").unwrap();
    let with = |option: &str| {
        let words = "--cpus=1 --continue --run-dir=run -- bash -c";
        let mut words: Vec<&str> = words.split(' ').collect();
        words.insert(0, option);
        words.push("echo from ${TSM_RESUME_FROM:-nothing}; exit $(cat code)");
        finish(start(&mut scene.command(&words)))
    };
    let again = || with("--no-view");
    let run = scene.run_dir().display().to_string();
    let outcome = again();
    assert_eq!(outcome.code, 9, "{}", outcome.err);
    assert_eq!(outcome.out, "0 | from nothing\n");
    // One that comes to nothing leaves it a run.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let outcome = with(&format!("--status-port={port}"));
    assert_eq!(outcome.code, 69, "{}", outcome.err);
    fs_err::write(scene.path("code"), "0").unwrap();
    let outcome = again();
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert_eq!(outcome.out, format!("0 | from {run}\n"));
    let outcome = again();
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let finished = format!("tsm-launch: the run has finished in {run} with exit code 0\n");
    assert_eq!(outcome.out, finished);
    assert!(!scene.run_dir().join("manifest-2.json").exists());
    // A machine that lost its power leaves an empty file, or a part of one.
    fs_err::write(scene.run_dir().join("manifest.json"), "").unwrap();
    let outcome = again();
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert_eq!(outcome.out, format!("0 | from {run}\n"));
    let warning = format!("warning: {run}/manifest.json cannot be read: ");
    assert!(outcome.err.contains(&warning), "{}", outcome.err);
    let outcome = finish(start(&mut scene.command(&[
        "--cpus=1",
        "--continue",
        "--",
        FAKE,
    ])));
    assert_eq!(outcome.code, 64, "{}", outcome.err);
    assert!(outcome.err.contains("--run-dir"), "{}", outcome.err);
}

#[test]
fn a_checkpoint_starts_a_new_run() {
    let scene = Scene::new();
    fs_err::write(scene.path("c.safetensors"), "x").unwrap();
    let outcome = scene.launch("--cpus 1 --resume c.safetensors", "--print-env");
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let from = format!(
        "TSM_RESUME_FROM={}\n",
        scene.path("c.safetensors").display()
    );
    assert!(outcome.out.contains(&from), "{}", outcome.out);
    assert_eq!(
        scene.launch("--cpus 1", "").code,
        64,
        "the folder holds a run already"
    );
}

#[test]
fn two_launchers_do_not_share_a_folder() {
    let scene = Scene::new();
    let ready = scene.path("ready").display().to_string();
    let running = scene.start("--cpus 1", &format!("--touch {ready}{{rank}} --hang"));
    scene.wait_for_pids("ready", 1);
    let outcome = finish(start(&mut scene.command(&[
        "--cpus",
        "1",
        "--run-dir",
        "run",
        "--resume",
        "run",
        "--",
        FAKE,
    ])));
    assert_eq!(outcome.code, 64, "{}", outcome.err);
    running.signal(rustix::process::Signal::TERM);
    finish(running);
}
