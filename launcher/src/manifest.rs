//! `manifest.json`, and `events.jsonl` beside it: what was run, on what, and what became of it.

mod course;
pub mod description;
pub mod earlier;
pub mod environment;
pub mod events;
pub mod files;
pub mod generations;
pub mod killed;
pub mod versions;
pub mod writer;

use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tsm_job::RunDir;

use self::description::{Commit, Machine};
use self::environment::Change;
use self::files::{Binary, Checkpoint};
use self::generations::Generations;
use crate::clock::Utc;
use crate::cluster::coordinator::{Excluded, Report};
use crate::cluster::message::Join;
use crate::end::End;
use crate::gpus::Gpu;
use crate::replace::replace;

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
    /// `running`, `succeeded`, `failed`, `stopped`; `killed` in the manifest of a former launcher that could not write
    /// its own end: `ended` then is when something was last written into the folder.
    pub outcome: &'static str,
    pub exit_code: Option<i32>,
    /// Why it ended so, where it did not succeed.
    pub reason: Option<String>,
    /// Of the newest generation.
    pub ranks: Vec<RankEntry>,
    /// Nodes that got no ranks from some time on.
    pub left_out: Vec<LeftOut>,
    /// What `--preflight full` found.
    pub preflight: Vec<Report>,
    pub generations: Generations,
    /// See [`generations::goodput`].
    pub goodput: Option<f64>,
    /// Those in the run folder when this was written. While the job runs, that is whenever something happens to it, and
    /// once a minute.
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
    /// `None`: it has not been started yet.
    pub pid: Option<i32>,
    pub device: String,
    /// That it is bound to, as `0-3,8`; `None`: to none.
    pub cores: Option<String>,
    /// `None`: it runs, or is not known.
    pub end: Option<End>,
}

impl Manifest {
    /// Looks for checkpoints, then replaces the file in one step, so that a reader never sees half of it.
    ///
    /// # Errors
    /// When the disk is full or the folder is gone.
    pub fn write(&mut self, dir: &RunDir) -> std::io::Result<()> {
        self.checkpoints = files::checkpoints(dir);
        write_json(&dir.manifest(), self)
    }
}

/// Puts `value` in its place in one step, see [`replace`].
///
/// # Errors
/// When the disk is full or the folder is gone.
pub fn write_json(path: &Path, value: &impl Serialize) -> std::io::Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    replace(path, &text, 0o666)
}

/// This machine's name.
pub fn host() -> String {
    let name = fs_err::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "localhost".into(),
        name => name.replace('/', "-"),
    }
}
