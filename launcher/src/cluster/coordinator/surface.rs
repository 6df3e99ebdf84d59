//! What the coordinator is given, what it hears, and what it has done: all that its surroundings know of it.

use serde_json::Value;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use super::{Ending, Excluded, Member, Node, Reason, Report};
use crate::cluster::message::{About, FromAgent, ToAgent};
use crate::cluster::policy;
use crate::cluster::topology::NodeId;
use crate::console::lines::Batch;
use crate::doctor::preflight::Scale;
use crate::hang::progress::Limits;
use crate::manifest::environment::Change;
use crate::report::GoOn;

/// What is decided before the job starts.
#[derive(Clone, Debug)]
pub struct Settings {
    pub min_nodes: u32,
    pub max_nodes: u32,
    /// How long to wait for nodes.
    pub join: Duration,
    /// How long to wait for more nodes once there are `min_nodes`.
    pub last_call: Duration,
    pub lease: Duration,
    /// Nodes may join that nobody here has started.
    pub open: bool,
    /// Whoever has started another node reads what is said there, on a screen or in a log of its own.
    pub is_read: bool,
    /// Hosts on which agents were started from here; empty: it is not known who comes.
    pub hosts: Vec<String>,
    pub job: Job,
    pub policy: policy::Options,
    pub hang: Limits,
    /// Measure nodes before their ranks are started.
    pub measure: Option<Scale>,
    /// A scheduler ends the job at this time: save before it.
    pub save_at: Option<Duration>,
    /// A scheduler queues the job again when it ends with 75, on whatever nodes.
    pub requeues: bool,
}

/// What every rank of the job has in common.
#[derive(Clone, Debug)]
pub struct Job {
    pub run_id: String,
    pub run_dir: PathBuf,
    pub config: Option<(String, String)>,
    /// Digest of all that must be equal on every node's command line.
    pub digest: String,
    /// What counts on this command line alone: flags and values.
    pub options: Vec<(String, String)>,
    pub command: Vec<OsString>,
    pub directory: PathBuf,
    pub base_env: Option<Vec<(OsString, OsString)>>,
    pub env: Vec<(String, String)>,
    pub resume_from: Option<PathBuf>,
    /// What the run began from, which counts as long as it holds no checkpoint of its own.
    pub start_from: Option<PathBuf>,
    pub grace: Duration,
    pub show: Option<Vec<u32>>,
    pub affinity: bool,
    /// How the run is continued, where the workers know how to.
    pub resume: Option<GoOn>,
    /// The workers save and end with code 75 on SIGUSR2, and find their own checkpoints.
    pub saves: bool,
    /// See [`crate::cluster::message::Start::shielded`].
    pub shielded: bool,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// From an agent whose connection is authenticated. `local`: it lives in this process.
    Said {
        node: NodeId,
        local: bool,
        message: FromAgent,
    },
    /// The connection is gone.
    Lost { node: NodeId, how: String },
    /// The program that starts the agent of `host` says something, as long as there is none.
    Starter { host: String, line: String },
    /// The program that holds the agent of `host`, or of all where it is called as none of them, was killed.
    StarterKilled { host: String, killed: String },
    /// To the coordinator itself.
    Signal(i32),
    /// The same, by a scheduler that has signalled all agents too.
    StepSignal(i32),
    /// The coordinator was not run for this long, though there was something to do.
    Stalled { host: String, time: Duration },
    /// [`super::State::deadline`] has come.
    Deadline,
}

/// Something to do.
#[derive(Clone, Debug)]
pub enum Action {
    Send {
        node: NodeId,
        message: ToAgent,
    },
    /// Close the connection.
    Drop {
        node: NodeId,
    },
    /// Tell the user.
    Notice(String),
    /// A line for events.jsonl.
    Record {
        kind: &'static str,
        fields: Value,
    },
    /// Nodes were measured.
    Measured(Box<Report>),
    /// A node gets no ranks from now on.
    LeftOut(Box<Excluded>),
    /// Lines of ranks to show.
    Show(Batch),
    /// A generation was started on these nodes.
    Started(Box<Launched>),
    /// What rank 0 says of itself.
    Told(About),
    /// The ranks of a node of it have their processes.
    Spawned(Box<Spawned>),
    /// A generation is over.
    Ended(Box<Ending>),
    /// Everybody leaves, and this is why.
    Left(Reason),
}

/// A generation that starts.
#[derive(Clone, Debug)]
pub struct Launched {
    pub generation: u32,
    pub world_size: u32,
    pub members: Vec<(Member, Node)>,
    /// What the ranks are told to go on from, where they do not say themselves what they found there.
    pub resumed_from: Option<String>,
}

/// The processes of a node's ranks.
#[derive(Clone, Debug)]
pub struct Spawned {
    pub first_rank: u32,
    /// Of this rank and the next ones.
    pub pids: Vec<i32>,
    /// Likewise; see [`FromAgent::Started`].
    pub cores: Vec<String>,
    /// What the first node changed in the environment of its workers; empty for the others.
    pub environment: Vec<Change>,
}

pub(super) fn send(node: NodeId, message: ToAgent) -> Action {
    Action::Send { node, message }
}

/// Tells an agent to go.
pub(super) fn dismiss(node: NodeId, code: i32, message: Option<String>) -> Action {
    send(node, ToAgent::Exit { code, message })
}

pub(super) fn record(kind: &'static str, fields: Value) -> Action {
    Action::Record { kind, fields }
}
