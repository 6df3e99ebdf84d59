//! What kind of failure it was, in the report and in failure.json.

use crate::harness::{FAKE, Outcome, Scene, finish, start};

/// Rank 1 of 2 prints `stderr` and then does `last`; rank 0 hangs.
fn fails(scene: &Scene, stderr: &str, last: &[&str]) -> Outcome {
    let mut words = vec![
        "--cpus",
        "2",
        "--run-dir",
        "run",
        "--",
        FAKE,
        "--on-rank",
        "1",
    ];
    for line in stderr.lines() {
        words.extend(["--say", line]);
    }
    words.extend(last);
    finish(start(&mut scene.command(&words)))
}

#[test]
fn a_message_of_a_library_is_quoted_with_what_to_do() {
    let scene = Scene::new();
    let stderr = "Traceback (most recent call last):
  File \"/home/me/train.py\", line 85, in step
  File \"/opt/lib/python3.11/site-packages/torch/_tensor.py\", line 626, in backward
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.00 MiB.
[rank1]:[W514 18:33:36.536327028 ProcessGroupNCCL.cpp:1250] Warning: destroy_process_group() was not called";
    let outcome = fails(&scene, stderr, &["--exit", "1"]);
    let evidence = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.00 MiB., at /home/me/train.py:85 in step";
    for part in [
        "error: rank 1 failed first: exit code 1\n  class: out of GPU memory\n",
        &format!("  evidence: {evidence}\n"),
        "  hint: a smaller batch per rank",
    ] {
        assert!(outcome.err.contains(part), "{}\nlacks {part}", outcome.err);
    }
    let failure = scene.json("failure.json");
    assert_eq!(failure["class"], "gpu_out_of_memory");
    assert_eq!(failure["evidence"], evidence);
    assert_eq!((outcome.code, &failure["exit_code"]), (1, &1.into()));
}

#[test]
fn the_same_error_has_the_same_signature_in_two_runs() {
    let signature = |line: &str, last: &[&str]| {
        let scene = Scene::new();
        fails(&scene, line, last);
        scene.json("failure.json")["signature"].clone()
    };
    let one = signature(
        "error: worker 4711 died at 0x7f3b6e7236fc",
        &["--exit", "1"],
    );
    let other = signature("error: worker 12 died at 0x55d0", &["--kill", "6"]);
    assert_eq!(one, other);
    assert_eq!(one, "program error: error: worker # died at #");
    assert_eq!(
        signature("", &["--exit", "17"]),
        "program error: exit code 17"
    );
}

#[test]
fn a_kill_from_outside_and_torchs_error_file_are_told_apart() {
    let class = |last: &[&str]| {
        let scene = Scene::new();
        fails(&scene, "", last);
        let failure = scene.json("failure.json");
        (failure["class"].clone(), failure["evidence"].clone())
    };
    assert_eq!(
        class(&["--kill", "15"]),
        ("killed".into(), "signal 15 (SIGTERM)".into())
    );
    let import = "ModuleNotFoundError: No module named 'decord'";
    assert_eq!(
        class(&["--error-file", import, "--exit", "1"]),
        ("program".into(), import.into())
    );
    let (class, evidence) = class(&["--record", "panic", "--exit", "1"]);
    assert_eq!(class, "program");
    assert_eq!(evidence, "index 7 out of range for a clip of 7 frames");
}

/// Users of other launchers expect that `--max-restarts` counts for any program.
#[test]
fn a_program_that_reports_no_steps_is_started_again_as_often_as_is_allowed() {
    let scene = Scene::new();
    let script = "[ $RANK = 1 ] && exit 7; exec sleep 1000";
    let words = [
        "--cpus=2",
        "--max-restarts=2",
        "--grace=5s",
        "--run-dir=run",
        "--",
        "sh",
        "-c",
        script,
    ];
    let outcome = finish(start(&mut scene.command(&words)));
    assert_eq!(outcome.code, 7, "{}", outcome.err);
    let generations = &scene.json("manifest.json")["generations"];
    assert_eq!(generations.as_array().unwrap().len(), 3, "{}", outcome.err);
    for text in [
        "the program reports no steps, so --max-restarts counts alone, after a pause of 1.",
        "restarts left: 0",
        "all 2 restarts are used (--max-restarts), which count alone since the program reports no steps",
    ] {
        assert!(outcome.err.contains(text), "{text}\n{}", outcome.err);
    }
    // What has to be changed first is not tried again.
    for (end, code) in [("exit 78", 78), ("exec /no/such/program", 127)] {
        let scene = Scene::new();
        let words = [
            "--cpus=1",
            "--max-restarts=2",
            "--run-dir=run",
            "--",
            "sh",
            "-c",
            end,
        ];
        let outcome = finish(start(&mut scene.command(&words)));
        assert_eq!(outcome.code, code, "{}", outcome.err);
        let generations = &scene.json("manifest.json")["generations"];
        assert_eq!(generations.as_array().unwrap().len(), 1, "{}", outcome.err);
    }
}

/// A broken machine is left out where there is another.
#[test]
fn a_machine_that_cannot_run_the_job_and_is_alone_is_no_reason_for_a_restart() {
    let scene = Scene::new();
    let words = "--cpus=1 --max-restarts=2 --run-dir=run -- sh -c";
    let mut words: Vec<&str> = words.split(' ').collect();
    words.push("exit 69");
    let outcome = finish(start(&mut scene.command(&words)));
    assert_eq!(outcome.code, 69, "{}", outcome.err);
    let manifest = scene.json("manifest.json");
    assert_eq!(manifest["generations"].as_array().unwrap().len(), 1);
    assert_eq!(manifest["reason"], "rank 0 failed first: exit code 69");
    assert_eq!(manifest["left_out"], serde_json::json!([]));
    let last = "\ntsm-launch: hardware: there is no other node to start it on\n";
    assert!(outcome.err.ends_with(last), "{}", outcome.err);
    // It is no program of ours, so nobody knows what its codes mean.
    for text in ["restarts left", "gets no ranks", "are left", "meaning:"] {
        assert!(!outcome.err.contains(text), "{text}\n{}", outcome.err);
    }
}
