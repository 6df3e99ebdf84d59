//! `manifest.json` and `events.jsonl`: what was run, on what, and what became of it.

pub mod description;
pub mod earlier;
pub mod environment;
pub mod files;
pub mod generations;
pub mod versions;

use fs_err::File;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tsm_job::RunDir;

use self::environment::Change;
use self::files::{Binary, Checkpoint};
use self::generations::Generations;
use crate::clock::Utc;
use crate::cluster::coordinator::{Excluded, Report};
use crate::cluster::message::Join;
use crate::end::End;
use crate::gpus::Gpu;

/// Everything there is to say about a run. The launcher's own host, machine and GPUs stand by themselves; in
/// a job over several nodes, `nodes` has them all.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Manifest {
    pub run_id: String,
    pub argv: Vec<String>,
    pub overrides: Vec<String>,
    pub command: Vec<String>,
    pub folder: String,
    pub resumed_from: Option<String>,
    pub tsm_launch: &'static str,
    /// By name: `tsm-launch`, what the workers say of theirs (`tsm-trainer`, `libtorch`, `cuda`, `nccl`), what the nodes
    /// have (`driver`, `kernel`), and what started the launcher (`slurm`, `open mpi`).
    pub versions: BTreeMap<String, String>,
    /// Tsm-launch, and the program of the workers where it is a file.
    pub binaries: Vec<Binary>,
    pub commit: Option<Commit>,
    pub host: String,
    pub machine: Option<Machine>,
    pub gpus: Vec<Gpu>,
    /// In the order in which they joined.
    pub nodes: Vec<Node>,
    /// What the workers' environment has that the launcher's had not, and the other way round.
    pub environment: Vec<Change>,
    /// Of the newest generation.
    pub world_size: usize,
    pub started: String,
    pub ended: Option<String>,
    /// `running`, `succeeded`, `failed`, `stopped`.
    pub outcome: &'static str,
    pub exit_code: Option<i32>,
    /// Of the newest generation.
    pub ranks: Vec<RankEntry>,
    /// Nodes that got no ranks from some time on.
    pub left_out: Vec<LeftOut>,
    /// What `--preflight full` found.
    pub preflight: Vec<Report>,
    pub generations: Generations,
    /// See [`generations::goodput`].
    pub goodput: Option<f64>,
    /// Those in the run folder when this was written.
    pub checkpoints: Vec<Checkpoint>,
}

/// A machine that joined the job.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Node {
    pub host: String,
    /// One worker each.
    pub devices: Vec<String>,
    pub gpus: Vec<Gpu>,
    /// Of the GPUs.
    pub driver: Option<String>,
    pub nccl: Option<String>,
    pub kernel: String,
    pub cpu: String,
    pub num_cpus: u32,
    pub mem_bytes: u64,
    /// Of its tsm-launch.
    pub version: String,
}

impl From<&Join> for Node {
    fn from(join: &Join) -> Node {
        let facts = join.facts.clone();
        Node {
            host: join.host.clone(),
            devices: join.devices.clone(),
            gpus: join.gpus.clone(),
            driver: facts.driver,
            nccl: facts.nccl,
            kernel: facts.kernel,
            cpu: facts.cpu,
            num_cpus: facts.num_cpus,
            mem_bytes: facts.mem_bytes,
            version: join.version.clone(),
        }
    }
}

/// A node that got no ranks.
#[derive(Clone, Debug, Serialize)]
pub struct LeftOut {
    pub host: String,
    /// Only this of its agents, from 0; `None`: the whole machine.
    pub agent: Option<u32>,
    pub reason: String,
    /// RFC 3339, UTC.
    pub since: String,
    /// `None`: to the end of the job.
    pub until: Option<String>,
    /// Also where the other nodes are too few.
    pub must: bool,
}

impl LeftOut {
    /// `time` is the moment `excluded.now`.
    pub fn at(time: Utc, excluded: Excluded) -> LeftOut {
        let Excluded { left_out, now } = excluded;
        let until = |until: Duration| time.after(until.saturating_sub(now)).rfc3339();
        LeftOut {
            host: left_out.host,
            agent: left_out.agent,
            reason: left_out.why,
            since: time.rfc3339(),
            until: left_out.until.map(until),
            must: left_out.must,
        }
    }
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
    /// Finds out what takes a moment: the machine, the commit, the digests. Meant for a thread of its own,
    /// after the workers are started.
    #[must_use]
    pub fn complete(mut self) -> Manifest {
        self.machine = Some(machine());
        self.commit = commit();
        self.binaries = files::binaries(&self.command);
        self.versions.extend(versions::of_starters());
        self
    }

    /// Looks for checkpoints, then replaces the file in one step, so that a reader never sees half of it.
    ///
    /// # Errors
    /// When the disk is full or the folder is gone.
    pub fn write(&mut self, dir: &RunDir) -> std::io::Result<()> {
        self.checkpoints = files::checkpoints(dir);
        write_json(&dir.manifest(), self)
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
    /// What is written next begins a line: the last one may have been written in part.
    broken: bool,
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
            broken: false,
            start,
        }
    }

    /// Adds a line: `fields` after the time, the milliseconds since the start, and the kind.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, kind: &str, fields: Value) -> std::io::Result<()> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let ms = self.start.elapsed().as_secs_f64() * 1e3;
        let mut line =
            json!({"time": Utc::now().rfc3339(), "ms": (ms * 1e3).round() / 1e3, "event": kind});
        if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields) {
            line.extend(fields);
        }
        let before = if self.broken { "\n" } else { "" };
        let written = file.write_all(format!("{before}{line}\n").as_bytes());
        self.broken = written.is_err();
        written
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
