//! The programs around a training.

use crate::job::{Scene, TRAINER, contains, expect, json};
use std::process::Command;
use tsm_job::exit;

#[test]
fn compare_puts_two_runs_side_by_side() {
    let scene = Scene::new();
    scene.motion_set(16, 8);
    expect(scene.job("a", 2, &["run.name=tsm"]), exit::OK);
    expect(
        scene.job("b", 2, &["run.name=tsn", "model.shift.mode=none"]),
        exit::OK,
    );
    let mut compare = Command::new(TRAINER);
    compare
        .current_dir(scene.path("."))
        .args(["compare", "a", "b"]);
    let text = expect(compare, exit::OK).out;
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|l| l.starts_with('|'))
        .map(|l| l.split('|').map(str::trim).collect())
        .collect();
    assert_eq!(rows.len(), 4, "a header, a rule and two runs:\n{text}");
    for (row, (run, name, shift)) in rows[2..]
        .iter()
        .zip([("a", "tsm", "bi"), ("b", "tsn", "none")])
    {
        let summary = json(&scene.run(run).summary());
        let best = format!("{:.2}", summary["best_top1"].as_f64().unwrap());
        assert_eq!(row[1..4], [name, shift, &best], "{text}");
    }
    contains(&text, &["a/report.md", "--logdir b/tb"]);
}

#[test]
fn compare_refuses_folders_without_a_summary() {
    let scene = Scene::new();
    let mut compare = Command::new(TRAINER);
    compare.current_dir(scene.path(".")).args(["compare", "."]);
    let outcome = expect(compare, exit::DATA);
    contains(
        &outcome.err,
        &["nothing to compare: no summary.json in .", "hint: "],
    );
}
