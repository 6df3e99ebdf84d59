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
        self.logs().join(format!(
            "{host}-{rank}.{}",
            if stderr { "err" } else { "out" }
        ))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_has_its_own_place_below_the_folder() {
        let run = RunDir::new("runs/a");
        let files = [
            run.config(),
            run.manifest(),
            run.events(),
            run.metrics(),
            run.tb(),
            run.checkpoints(),
            run.logs(),
            run.failure(),
            run.summary(),
            run.report(),
        ];
        for (i, file) in files.iter().enumerate() {
            assert_eq!(file.parent(), Some(run.path()));
            assert!(!files[..i].contains(file), "{}", file.display());
        }
    }

    #[test]
    fn a_log_names_host_rank_and_stream() {
        let run = RunDir::new("runs/a");
        assert_eq!(
            run.log("gpu-03", 12, false),
            Path::new("runs/a/logs/gpu-03-12.out")
        );
        assert_eq!(
            run.log("gpu-03", 12, true),
            Path::new("runs/a/logs/gpu-03-12.err")
        );
    }
}
