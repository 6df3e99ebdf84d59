//! `tsm-bench step` as a program, on steps that take milliseconds.

use serde_json::Value;
use std::process::{Command, Output};

/// A step small enough for a test; `more` comes behind.
fn step(more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tsm-bench"))
        .args("step --arch mobilenetv2 --size 32 --segments 2 --clips 2 --warmup 1 --steps 2 --threads 1".split(' '))
        .args(more)
        .output()
        .expect("tsm-bench starts")
}

fn measured(more: &[&str]) -> (Value, String) {
    let folder = tempfile::tempdir().unwrap();
    let (json, markdown) = (folder.path().join("r.json"), folder.path().join("r.md"));
    let files = [
        "--json",
        json.to_str().unwrap(),
        "--markdown",
        markdown.to_str().unwrap(),
    ];
    let output = step(&[more, &files].concat());
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let table = fs_err::read_to_string(&markdown).unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        table,
        "the file is what was printed"
    );
    (
        serde_json::from_str(&fs_err::read_to_string(&json).unwrap()).unwrap(),
        table,
    )
}

#[test]
fn a_rank_alone_is_measured_in_fresh_processes() {
    let (report, table) = measured(&["--precision", "bf16", "--rounds", "2"]);
    let row = &report["rows"][0];
    assert_eq!(
        (report["ranks"].as_u64(), report["rounds"].as_u64()),
        (Some(1), Some(2))
    );
    assert_eq!(
        row["step_ms"]["samples"].as_u64(),
        Some(4),
        "2 rounds of 2 steps"
    );
    let (median, rate) = (
        row["step_ms"]["median"].as_f64().unwrap(),
        row["clips_per_s"].as_f64().unwrap(),
    );
    assert!(
        median > 0.0 && (rate * median - 2000.0).abs() < 1e-6,
        "2 clips in {median} ms are not {rate} clips/s"
    );
    // libtorch alone is larger than this.
    assert!(row["peak_bytes"].as_u64().unwrap() > 50_000_000, "{row}");
    assert!(
        table.contains("| tsm-launch | bf16 nhwc, one-op shift, fused SGD |"),
        "{table}"
    );
}

#[test]
fn two_ranks_share_a_step() {
    let (report, _) = measured(&["--precision", "fp32", "--rounds", "1", "--ranks", "2"]);
    let row = &report["rows"][0];
    let (median, rate) = (
        row["step_ms"]["median"].as_f64().unwrap(),
        row["clips_per_s"].as_f64().unwrap(),
    );
    assert!(
        (rate * median - 4000.0).abs() < 1e-6,
        "4 clips in {median} ms are not {rate} clips/s"
    );
}

#[test]
fn what_cannot_be_measured_is_said() {
    let output = step(&["--rounds", "1", "--against", "/nonexistent/python"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("cannot start /nonexistent/python"), "{said}");
    assert_eq!(step(&["--rounds", "0"]).status.code(), Some(1));
    assert_eq!(step(&["--precision", "fp8"]).status.code(), Some(64));
}
