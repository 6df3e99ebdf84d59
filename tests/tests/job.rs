//! Starts jobs as a user would and reads what they leave.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

pub const LAUNCH: &str = env!("CARGO_BIN_EXE_e2e-launch");
pub const TRAINER: &str = env!("CARGO_BIN_EXE_e2e-trainer");

/// `tsm-launch --cpus 2` on `config`, not started yet.
pub fn launch(run_dir: &Path, config: &Path, overrides: &[String]) -> Command {
    let mut command = Command::new(LAUNCH);
    command
        .args(["--cpus", "2", "--trainer", TRAINER, "--run-dir"])
        .arg(run_dir)
        .arg(config)
        .args(overrides)
        .stdin(Stdio::null());
    for name in ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
        command.env_remove(name);
    }
    command
}

/// Runs to the end; panics with both streams unless the exit code is `want`.
pub fn expect(mut command: Command, want: i32) -> Output {
    let output = command.output().expect("the launcher starts");
    let code = output.status.code();
    assert_eq!(
        code,
        Some(want),
        "exit code\n--- stdout\n{}\n--- stderr\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

pub fn config_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs").join(name)
}

/// The lines of a JSONL file whose `event` is `event`.
pub fn events(file: &Path, event: &str) -> Vec<Value> {
    let Ok(text) = fs_err::read_to_string(file) else { return Vec::new() };
    text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).filter(|v| v["event"] == event).collect()
}

pub fn summary(run_dir: &Path) -> Value {
    serde_json::from_str(&fs_err::read_to_string(run_dir.join("summary.json")).expect("a summary")).expect("JSON")
}

/// A small synthetic motion set below `folder` and the overrides that point the demo's configuration at it.
pub fn motion_set(folder: &Path, num_train: u64, num_val: u64) -> Vec<String> {
    let data = folder.join("motion");
    tsm_data::demo::Demo { num_train, num_val, ..tsm_data::demo::Demo::default() }.write(&data).expect("the set is written");
    let set = |key: &str, path: PathBuf| format!("data.{key}={}", path.display());
    vec![
        set("root", data.clone()),
        set("train_list", data.join("train.txt")),
        set("val_list", data.join("val.txt")),
        set("class_names", data.join("classes.txt")),
    ]
}
