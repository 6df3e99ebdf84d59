//! An unmodified PyTorch program runs under the launcher.

use crate::harness::{Scene, finish, start};
use std::process::Command;

/// The first Python that has torch; tests without one are skipped.
fn python() -> Option<String> {
    let candidates = [
        std::env::var("TSM_PYTHON").ok(),
        Some("/usr/bin/python3".into()),
    ];
    let has_torch = |python: &String| {
        Command::new(python)
            .args(["-c", "import torch"])
            .output()
            .is_ok_and(|output| output.status.success())
    };
    let found = candidates.into_iter().flatten().find(has_torch);
    if found.is_none() {
        eprintln!("skipped: no python with torch; name one in TSM_PYTHON");
    }
    found
}

fn launch(python: &str, args: &[&str]) -> (Scene, crate::harness::Outcome) {
    let scene = Scene::new();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/ddp_gloo.py");
    let words: Vec<&str> = ["--cpus", "2", "--run-dir", "run", "--", python, script]
        .into_iter()
        .chain(args.iter().copied())
        .collect();
    let outcome = finish(start(&mut scene.command(&words)));
    (scene, outcome)
}

#[test]
fn ddp_over_gloo_trains() {
    let Some(python) = python() else { return };
    let (scene, outcome) = launch(&python, &[]);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    for rank in 0..2 {
        let out = String::from_utf8(scene.log(rank, "out")).unwrap();
        assert!(
            out.contains(&format!(
                "rank {rank} of 2: parameters are equal after 3 steps"
            )),
            "{out}"
        );
    }
}

#[test]
fn the_exception_of_the_rank_that_raised_it_is_reported() {
    let Some(python) = python() else { return };
    let (scene, outcome) = launch(&python, &["--fail-on", "1"]);
    // 134: torch's abort at the end of Python, see the script.
    assert!([1, 134].contains(&outcome.code), "{}", outcome.err);
    assert_eq!(scene.json("failure.json")["rank"], 1, "{}", outcome.err);
    assert!(
        outcome.err.contains("ValueError: broken clip"),
        "{}",
        outcome.err
    );
}
