//! TensorBoard's own reader reads what we write. Needs a Python with tensorboard: `$TSM_PYTHON`, or
//! `.test-venv/bin/python3` in the repository root.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tsm_trainer::meter::EventWriter;

const READ: &str = r#"
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
reader = EventAccumulator(sys.argv[1]).Reload()
for tag in sorted(reader.Tags()["scalars"]):
    for event in reader.Scalars(tag):
        print(tag, event.step, event.value, event.wall_time)
for tag in sorted(reader.Tags()["tensors"]):
    for event in reader.Tensors(tag):
        print(tag, event.step, event.tensor_proto.string_val[0].decode())
"#;

/// A Python that imports tensorboard, or why there is none.
fn python() -> Result<String, String> {
    let venv = concat!(env!("CARGO_MANIFEST_DIR"), "/../.test-venv/bin/python3");
    let python = std::env::var("TSM_PYTHON").unwrap_or_else(|_| venv.into());
    match Command::new(&python)
        .args(["-c", "import tensorboard"])
        .output()
    {
        Err(error) => Err(format!("{python}: {error}")),
        Ok(output) if !output.status.success() => {
            Err(format!("{python} cannot import tensorboard"))
        }
        Ok(_) => Ok(python),
    }
}

fn read_back(python: &str, folder: &Path) -> Vec<String> {
    let output = Command::new(python)
        .args(["-c", READ])
        .arg(folder)
        .env("PYTHONIOENCODING", "utf-8")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(String::from)
        .collect()
}

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

#[test]
fn tensorboard_reads_scalars_text_and_a_resume() {
    let python = match python() {
        Ok(python) => python,
        Err(reason) => return eprintln!("skipped: {reason}"),
    };
    let dir = tempfile::tempdir().unwrap();
    let every = Duration::from_secs(10);
    let mut writer = EventWriter::create(dir.path(), None, every, at(1_700_000_000));
    writer.text("config", 0, "run:\n  name: größer", at(1_700_000_000));
    for step in 1..=4 {
        writer.scalars(
            step,
            &[("train/loss", step as f64 / 2.0), ("train/lr", 0.125)],
            at(1_700_000_000 + step),
        );
    }
    drop(writer);
    assert_eq!(
        read_back(&python, dir.path()),
        [
            "train/loss 1 0.5 1700000001.0",
            "train/loss 2 1.0 1700000002.0",
            "train/loss 3 1.5 1700000003.0",
            "train/loss 4 2.0 1700000004.0",
            "train/lr 1 0.125 1700000001.0",
            "train/lr 2 0.125 1700000002.0",
            "train/lr 3 0.125 1700000003.0",
            "train/lr 4 0.125 1700000004.0",
            "config 0 run:",
            "  name: größer",
        ]
    );

    // The run is killed after step 4 and goes on from the checkpoint of step 2.
    let mut writer = EventWriter::create(dir.path(), Some(2), every, at(1_700_000_002));
    writer.scalar("train/loss", 3, 8.0, at(1_700_000_020));
    drop(writer);
    let loss: Vec<String> = read_back(&python, dir.path())
        .into_iter()
        .filter(|line| line.starts_with("train/loss"))
        .collect();
    assert_eq!(
        loss,
        [
            "train/loss 1 0.5 1700000001.0",
            "train/loss 2 1.0 1700000002.0",
            "train/loss 3 8.0 1700000020.0"
        ]
    );
}
