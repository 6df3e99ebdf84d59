//! A config, and a stand-in for the trainer.

use crate::demo::{DEMO, write_lists};
use crate::harness::{Outcome, Scene, finish, start};
use crate::program::write_program;
use std::path::Path;

/// A scene with the demo's data files and a trainer that is this shell script.
fn scene(script: &str) -> Scene {
    let scene = Scene::new();
    write_lists(&scene.path(""));
    write_program(&scene.path("trainer"), format!("#!/bin/sh\n{script}\n"));
    scene
}

fn launch(scene: &Scene, words: &[&str]) -> Outcome {
    finish(start(scene.command(&["--trainer", "trainer"]).args(words)))
}

/// The only folder below `runs`.
fn run_dir(scene: &Scene) -> std::path::PathBuf {
    let mut found: Vec<_> = fs_err::read_dir(scene.path("runs"))
        .unwrap()
        .flatten()
        .collect();
    assert_eq!(found.len(), 1);
    found.remove(0).path()
}

fn load(path: &Path) -> tsm_job::Config {
    tsm_job::Config::load(path, &[]).unwrap()
}

#[test]
fn the_trainer_gets_the_resolved_config() {
    let scene = scene("echo rank $RANK: $@");
    let outcome = launch(&scene, &[DEMO, "optim.lr=0.125", "run.name=mine"]);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let dir = run_dir(&scene);
    assert!(
        dir.file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with("mine-2"),
        "{dir:?}"
    );
    assert_eq!(load(&dir.join("config.yaml")).optim.lr, 0.125);
    let settled = load(&dir.join("config.yaml")).launch;
    assert_eq!(settled.device, tsm_job::config::DeviceKind::Cpu);
    assert_eq!(settled.nproc_per_node, Some(2));
    let expected = format!(
        "0 | rank 0: --config {}\n",
        dir.join("config.yaml").display()
    );
    assert_eq!(
        outcome.out, expected,
        "of a training only rank 0 is shown; the config asks for 2 workers on the CPU"
    );
    let text = fs_err::read_to_string(dir.join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(manifest["overrides"][0], "optim.lr=0.125");
    assert_eq!(manifest["world_size"], 2);
}

/// Its manifest would say that the training has ended as the program did.
#[test]
fn a_program_does_not_continue_the_run_of_a_training() {
    let scene = scene("exit 9");
    assert_eq!(launch(&scene, &["--cpus", "1", DEMO]).code, 9);
    let dir = run_dir(&scene);
    let manifest = || fs_err::read_to_string(dir.join("manifest.json")).unwrap();
    let before = manifest();
    let path = dir.to_string_lossy();
    let words = ["--cpus", "1", "--resume", &path, "--", "true"];
    let outcome = finish(start(&mut scene.command(&words)));
    assert_eq!(outcome.code, 64, "{}", outcome.err);
    let text = format!(
        "error: {path} is the run of a training, which a program cannot continue\n  hint: "
    );
    assert!(outcome.err.starts_with(&text), "{}", outcome.err);
    assert_eq!(manifest(), before);
}

#[test]
fn a_run_folder_is_enough_to_resume() {
    let scene = scene("echo $@ from $TSM_RESUME_FROM; exit $(cat code)");
    fs_err::write(scene.path("code"), "9").unwrap();
    let outcome = launch(&scene, &["--cpus", "1", DEMO]);
    assert_eq!(outcome.code, 9, "{}", outcome.err);
    let dir = run_dir(&scene);
    let hint = format!(
        "tsm-launch --cpus 1 --trainer trainer --resume {}",
        dir.display()
    );
    assert!(outcome.err.contains(&hint), "{}", outcome.err);

    fs_err::write(scene.path("code"), "0").unwrap();
    let path = dir.to_string_lossy();
    let outcome = launch(&scene, &["--cpus", "1", "--resume", &path]);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert_eq!(
        outcome.out,
        format!("0 | --config {path}/config.yaml from {path}\n")
    );

    let outcome = launch(
        &scene,
        &[
            "--cpus",
            "1",
            "--resume",
            &path,
            &format!("{path}/config.yaml"),
            "optim.lr=0.5",
        ],
    );
    assert_eq!(
        outcome.out,
        format!("0 | --config {path}/config-2.yaml from {path}\n"),
        "{}",
        outcome.err
    );
    assert_eq!(load(&dir.join("config-2.yaml")).optim.lr, 0.5);
    assert_ne!(load(&dir.join("config.yaml")).optim.lr, 0.5);
}

/// A trainer finds both, and takes the run's own checkpoint where there is one.
#[test]
fn whoever_continues_a_run_is_told_what_it_began_from() {
    let scene = scene("echo $TSM_RESUME_FROM from $TSM_START_FROM; exit $(cat code)");
    fs_err::write(scene.path("old.safetensors"), "").unwrap();
    fs_err::write(scene.path("code"), "9").unwrap();
    let old = scene.path("old.safetensors").display().to_string();
    let words = [
        "--cpus=1",
        "--run-dir=run",
        "--resume=old.safetensors",
        DEMO,
    ];
    assert_eq!(launch(&scene, &words).out, format!("0 | {old} from\n"));
    let run = scene.run_dir().display().to_string();
    for code in ["9", "0"] {
        fs_err::write(scene.path("code"), code).unwrap();
        let outcome = launch(&scene, &["--cpus=1", "--resume=run"]);
        let told = format!("0 | {run} from {old}\n");
        assert_eq!(outcome.out, told, "{}", outcome.err);
    }
    // A new run has a beginning of its own.
    let words = ["--cpus=1", "--run-dir=other", "--resume=run", DEMO];
    assert_eq!(launch(&scene, &words).out, format!("0 | {run} from\n"));
}

#[test]
fn problems_are_found_before_anything_is_made() {
    let scene = scene("touch started");
    for (words, code, text) in [
        (&[DEMO, "optim.lrr=1"][..], 78, "optim.lrr"),
        (
            &[DEMO, "data.train_list=none.txt"],
            65,
            "data.train_list is none.txt: no such file",
        ),
        (&[DEMO, "--gpus", "99"], 69, "--gpus is 99"),
    ] {
        let outcome = launch(&scene, words);
        assert_eq!(outcome.code, code, "{}", outcome.err);
        assert!(
            outcome.err.starts_with("error: ") && outcome.err.contains(text),
            "{}",
            outcome.err
        );
        assert!(!scene.path("runs").exists() && !scene.path("started").exists());
    }
    let outcome = finish(start(&mut scene.command(&["--trainer", "none", DEMO])));
    assert_eq!(outcome.code, 69);
    assert!(
        outcome.err.contains("cannot start the trainer: "),
        "{}",
        outcome.err
    );
}

#[test]
fn a_dry_run_shows_the_trainer_s_command() {
    let scene = scene("touch started");
    let outcome = launch(&scene, &["--dry-run", DEMO]);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert!(
        outcome.out.contains("/trainer --config ") && outcome.out.contains("/runs/demo-2"),
        "{}",
        outcome.out
    );
    assert!(!scene.path("runs").exists() && !scene.path("started").exists());
}
