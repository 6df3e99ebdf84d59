//! What a run leaves to be looked at. Needs a Python with tensorboard: `$TSM_PYTHON`, or
//! `.test-venv/bin/python3` in the repository root.

use crate::job::{Scene, contains, expect, history, json};
use fs_err as fs;
use std::collections::BTreeMap;
use std::process::Command;
use tsm_job::{RunDir, exit};

const READ: &str = r#"
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
reader = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0}).Reload()
tags = reader.Tags()["scalars"]
print(json.dumps({tag: [[e.step, e.value] for e in reader.Scalars(tag)] for tag in tags}))
"#;

pub type Scalars = BTreeMap<String, Vec<(u64, f64)>>;

/// What TensorBoard's own reader finds; `None`, with a word on stderr, where it is not installed.
pub fn read(run: &RunDir) -> Option<Scalars> {
    let venv = concat!(env!("CARGO_MANIFEST_DIR"), "/../.test-venv/bin/python3");
    let python = std::env::var("TSM_PYTHON").unwrap_or_else(|_| venv.into());
    let probe = Command::new(&python)
        .args(["-c", "import tensorboard"])
        .output();
    if !probe.is_ok_and(|p| p.status.success()) {
        eprintln!("skipped: {python} cannot import tensorboard");
        return None;
    }
    let mut command = Command::new(python);
    command.args(["-c", READ]).arg(run.tb());
    let outcome = expect(command, exit::OK);
    Some(serde_json::from_str(&outcome.out).expect("JSON"))
}

#[test]
fn a_run_can_be_looked_at() {
    let scene = Scene::new();
    scene.motion_set(64, 9);
    let overrides = [
        "train.epochs=2",
        "train.log_every=2",
        "run.reference=a row of a table",
    ];
    expect(scene.job("run", 2, &overrides), exit::OK);
    let run = scene.run("run");
    summary_agrees_with_metrics(&run);

    let report = fs::read_to_string(run.report()).unwrap();
    contains(&report, &["curves.svg", "a row of a table"]);
    let svg = fs::read_to_string(run.path().join("curves.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    assert!(svg.contains("<polyline"), "no curve in:\n{svg}");

    let Some(tb) = read(&run) else { return };
    let history = history(&run);
    assert_eq!(history.steps.len(), 16);
    let steps = &history.steps;
    let of = |value: fn(&tsm_trainer::meter::StepRecord) -> Option<f64>| {
        steps
            .iter()
            .filter_map(|r| Some((r.step, value(r)?)))
            .collect::<Vec<_>>()
    };
    let wanted = [
        ("train/loss", of(|r| r.loss), 16),
        ("train/top1", of(|r| r.top1), 16),
        ("train/top5", of(|r| r.top5), 16),
        ("train/lr", of(|r| r.lr), 16),
        ("train/grad_norm", of(|r| r.grad_norm), 16),
        ("speed/data_time_ms", of(|r| r.data_time_ms), 16),
        ("speed/step_time_ms", of(|r| r.step_time_ms), 16),
        // Measured over the steps between two log lines.
        ("speed/clips_per_s", of(|r| r.clips_per_s), 8),
        ("load/mem_bytes", of(|r| r.mem_bytes.map(|b| b as f64)), 8),
    ];
    for (tag, values, at_least) in wanted {
        let shown = tb
            .get(tag)
            .unwrap_or_else(|| panic!("no {tag} in {:?}", tb.keys()));
        assert!(values.len() >= at_least, "{tag}: {} values", values.len());
        assert_eq!(shown.len(), values.len(), "{tag}");
        for ((step, value), (in_file, number)) in shown.iter().zip(&values) {
            // TensorBoard's scalars are float32.
            let close = (value - number).abs() <= 1e-6 * number.abs();
            assert!(
                step == in_file && close,
                "{tag}: {value} at {step}, {number} at {in_file}"
            );
        }
    }
    let validations: Vec<u64> = tb["validation/top1"].iter().map(|v| v.0).collect();
    assert_eq!(validations, [8, 16]);
}

fn summary_agrees_with_metrics(run: &RunDir) {
    let (summary, history) = (json(&run.summary()), history(run));
    assert_eq!(summary["final_step"], history.steps.last().unwrap().step);
    let last = history.validations.last().unwrap();
    assert_eq!(last.num_clips, 9);
    assert_eq!(summary["last"]["top1"].as_f64(), last.top1);
    assert_eq!(summary["last"]["loss"].as_f64(), last.loss);
    let tops = history.validations.iter().filter_map(|v| v.top1);
    assert_eq!(summary["best_top1"].as_f64(), tops.reduce(f64::max));
    assert_eq!(
        (
            &summary["world_size"],
            &summary["global_batch"],
            &summary["epochs"]
        ),
        (&2.into(), &8.into(), &2.into())
    );
    // All clips by all step time, from the epochs' records.
    let clips: u64 = history.epochs.iter().map(|e| e.num_clips).sum();
    let seconds: f64 = history.epochs.iter().map(|e| e.train_s).sum();
    assert_eq!(clips, 128);
    let rate = summary["fps_total"].as_f64().unwrap();
    assert!(
        (rate - clips as f64 / seconds).abs() < 1e-3 * rate,
        "{rate}"
    );
}
