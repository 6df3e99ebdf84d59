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
