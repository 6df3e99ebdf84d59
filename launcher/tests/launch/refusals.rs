//! What is refused, with which code, before anything starts.

use crate::harness::{FAKE, Outcome, Scene, finish, start};

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
