//! `manifest.json` and `events.jsonl`: what was run, on what, and what became of it.

use fs_err::File;
use serde::Serialize;
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;
use tsm_job::RunDir;

use crate::clock::Utc;
use crate::end::End;
use crate::gpus::Gpu;

/// Everything there is to say about a run.
#[derive(Clone, Debug, Serialize)]
pub struct Manifest {
    pub run_id: String,
    pub argv: Vec<String>,
    pub overrides: Vec<String>,
    pub command: Vec<String>,
    pub folder: String,
    pub resumed_from: Option<String>,
    pub tsm_launch: &'static str,
    pub commit: Option<Commit>,
    pub host: String,
    pub machine: Option<Machine>,
    pub gpus: Vec<Gpu>,
    pub world_size: usize,
    pub started: String,
    pub ended: Option<String>,
    /// `running`, `succeeded`, `failed`, `stopped`.
    pub outcome: &'static str,
    pub exit_code: Option<i32>,
    pub ranks: Vec<RankEntry>,
}

#[derive(Clone, Debug, Serialize)]
pub struct RankEntry {
    pub rank: u32,
    pub pid: i32,
    pub device: String,
    pub cores: Vec<usize>,
    pub end: Option<End>,
}

/// State of the source tree in the current directory.
#[derive(Clone, Debug, Serialize)]
pub struct Commit {
    pub id: String,
    /// Tracked files differ from it.
    pub modified: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub num_cpus: usize,
    pub mem_bytes: u64,
    pub kernel: String,
}

impl Manifest {
    /// Finds out what takes a moment, the machine and the commit, and writes the file. Meant for a
    /// thread of its own, after the workers are started.
    pub fn complete(mut self, dir: &RunDir) -> Manifest {
        self.machine = Some(machine());
        self.commit = commit();
        self.write(dir);
        self
    }

    /// Replaces the file in one step, so that a reader never sees half of it.
    pub fn write(&self, dir: &RunDir) {
        if let Err(e) = write_json(&dir.manifest(), self) {
            eprintln!("warning: the manifest is not written: {e}");
        }
    }
}

/// Writes `value` beside `path`, then renames it there.
///
/// # Errors
/// When the disk is full or the folder is gone.
pub fn write_json(path: &Path, value: &impl Serialize) -> std::io::Result<()> {
    let partial = path.with_extension("json.partial");
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    fs_err::write(&partial, text)?;
    fs_err::rename(&partial, path)
}

fn machine() -> Machine {
    use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};
    let what = RefreshKind::nothing()
        .with_cpu(CpuRefreshKind::nothing())
        .with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(what);
    Machine {
        cpu: system
            .cpus()
            .first()
            .map_or("unknown".into(), |cpu| cpu.brand().trim().into()),
        num_cpus: system.cpus().len(),
        mem_bytes: system.total_memory(),
        kernel: System::kernel_version().unwrap_or_default(),
    }
}

fn commit() -> Option<Commit> {
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        let output = command
            .args(args)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_string();
        output.status.success().then_some(text)
    };
    let id = git(&["rev-parse", "HEAD"])?;
    let modified =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| !s.is_empty());
    Some(Commit { id, modified })
}

/// The launcher's diary. A line that cannot be written is left out: the job matters more.
pub struct Events {
    file: Option<File>,
    start: Instant,
}

impl Events {
    pub fn open(dir: &RunDir, start: Instant) -> Events {
        Events {
            file: File::options()
                .create(true)
                .append(true)
                .open(dir.events())
                .ok(),
            start,
        }
    }

    /// Adds a line: `fields` after the time, the milliseconds since the start, and the kind.
    pub fn write(&mut self, kind: &str, fields: Value) {
        let Some(file) = &mut self.file else { return };
        let ms = self.start.elapsed().as_secs_f64() * 1e3;
        let mut line =
            json!({"time": Utc::now().rfc3339(), "ms": (ms * 1e3).round() / 1e3, "event": kind});
        if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields) {
            line.extend(fields);
        }
        if writeln!(file, "{line}").is_err() {
            self.file = None;
        }
    }
}

/// This machine's name.
pub fn host() -> String {
    let name = fs_err::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "localhost".into(),
        name => name.replace('/', "-"),
    }
}
