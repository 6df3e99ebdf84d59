//! Which file lies where in a run folder.

use std::path::{Path, PathBuf};

/// A run folder.
#[derive(Clone, Debug, PartialEq)]
pub struct RunDir(PathBuf);

impl RunDir {
    pub fn new(path: impl Into<PathBuf>) -> RunDir {
        RunDir(path.into())
    }
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// The resolved configuration, every default written out.
    pub fn config(&self) -> PathBuf {
        self.0.join("config.yaml")
    }
    /// What was run: arguments, versions, commit, hosts, devices. Written by the launcher.
    pub fn manifest(&self) -> PathBuf {
        self.0.join("manifest.json")
    }
    /// The launcher's events: spawns, exits, signals; one JSON object a line.
    pub fn events(&self) -> PathBuf {
        self.0.join("events.jsonl")
    }
    /// The trainer's numbers: a JSON object per step and per validation, written by rank 0.
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }
    /// TensorBoard event files.
    pub fn tb(&self) -> PathBuf {
        self.0.join("tb")
    }
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }
    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }
    /// One worker's output: `<host>-<rank>.out` or `.err`.
    pub fn log(&self, host: &str, rank: u32, stderr: bool) -> PathBuf {
        self.logs().join(format!("{host}-{rank}.{}", if stderr { "err" } else { "out" }))
    }
    /// The first failure, if the job failed.
    pub fn failure(&self) -> PathBuf {
        self.0.join("failure.json")
    }
    /// Final numbers for programs, written by rank 0 at the end.
    pub fn summary(&self) -> PathBuf {
        self.0.join("summary.json")
    }
    /// Final report for people, with the curves.
    pub fn report(&self) -> PathBuf {
        self.0.join("report.md")
    }
}
