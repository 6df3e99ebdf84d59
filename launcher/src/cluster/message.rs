//! What coordinator and agents say to each other. Nothing but data; every message that belongs to a
//! generation carries its number, and one of an older generation is dropped. What gets too long for a frame is split or
//! cut by [`super::fit`] on its way.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::IpAddr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use crate::console::lines::Batch;
use crate::contain;
use crate::doctor::preflight::{Measured, OwnNode, Scale, Task};
use crate::end::End;
use crate::gpus::Gpu;
use crate::hang::ras;
use crate::hang::report::Inspection;
use crate::manifest::environment::Change;
use crate::oom::OomKills;
use crate::report::Place;
use crate::supervisor::Rank;

/// Time by an agent's own monotonic clock, since it started. Only differences mean anything elsewhere.
pub type AgentTime = Duration;

/// An agent to the coordinator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum FromAgent {
    /// First message.
    Join(Box<Join>),
    /// Instead of [`FromAgent::Join`]: this node cannot run the job.
    Unfit {
        host: String,
        code: i32,
        message: String,
    },
    /// [`BEATS_PER_LEASE`] times a lease, and answered by [`ToAgent::Ack`].
    Beat(Beat),
    /// Answer to [`ToAgent::Reserve`].
    Reserved {
        generation: u32,
        attempt: u32,
        master_port: u16,
        probe_port: u16,
    },
    /// Answer to [`ToAgent::Probe`]: the addresses of the first node that this node reached, with the
    /// interface through which it did, the quickest first.
    Reached {
        generation: u32,
        attempt: u32,
        by: Vec<(IpAddr, String)>,
    },
    /// Answer to [`ToAgent::MeasureNode`].
    NodeMeasured { round: Round, own: OwnNode },
    /// Answer to [`ToAgent::OpenRing`]: the port, or why there is none.
    RingOpen {
        round: Round,
        port: Result<u16, String>,
    },
    /// Answer to [`ToAgent::Measure`].
    Measured {
        round: Round,
        result: Result<Measured, String>,
    },
    /// All ranks of this node are started.
    Started {
        generation: u32,
        pids: Vec<i32>,
        /// The cores that each is bound to, as [`crate::cores::to_list`] writes them; empty: to none.
        #[serde(default)]
        cores: Vec<String>,
        at: AgentTime,
        /// What was changed in their environment; from the first node only.
        environment: Vec<Change>,
        /// What holds their processes.
        #[serde(default)]
        containment: contain::Kind,
    },
    /// What rank 0 says of itself; from the first node only.
    About { generation: u32, word: About },
    /// The ranks of this node cannot be started; none is left.
    CannotStart {
        generation: u32,
        code: i32,
        message: String,
    },
    /// The first sign that a rank ends in failure. Its node stops the other ranks by itself.
    Failing {
        generation: u32,
        local_rank: u32,
        end: Option<End>,
        at: AgentTime,
    },
    /// A rank saved and ended, or has no handler for a SIGUSR2 that was passed on. Its node goes on.
    Answered {
        generation: u32,
        local_rank: u32,
        end: End,
    },
    /// The next ranks of a report that is too long for one message; [`FromAgent::Clean`] follows with the last ones.
    Ranks {
        generation: u32,
        ranks: Vec<(Rank, Place)>,
    },
    /// Every process of this generation on this node has ended, or is named in the report.
    Clean {
        generation: u32,
        report: Box<NodeReport>,
    },
    /// Whole lines to show.
    Output { batch: Batch },
    /// Something the user should know.
    Notice { text: String },
    /// Answer to [`ToAgent::Inspect`].
    Inspected {
        generation: u32,
        looks: Vec<Inspection>,
        /// What NCCL says on this node.
        ras: Option<ras::Answer>,
        /// The rest follows: it is too long for one message.
        #[serde(default)]
        more: bool,
    },
    /// The agent was told to stop by a signal of its own: Ctrl-C, or the scheduler.
    Signal { signal: i32 },
    /// The same, by a scheduler that has signalled every agent, each of which sees to its own ranks.
    StepSignal { signal: i32 },
}

/// The coordinator to an agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ToAgent {
    /// Answer to [`FromAgent::Join`]. Without an acknowledged beat for `lease` the agent kills its ranks.
    Welcome {
        lease: Duration,
    },
    /// Answer to a [`FromAgent::Beat`]: renews the lease.
    Ack {
        seq: u64,
    },
    /// To the first node: hold a port for rank 0, and answer probes.
    Reserve {
        generation: u32,
        /// Counts how often the nodes of a start were chosen: one that is lost before it leads to another choice.
        attempt: u32,
    },
    /// To the other nodes: find out which of these addresses of the first node can be reached.
    Probe {
        generation: u32,
        attempt: u32,
        addresses: Vec<IpAddr>,
        port: u16,
    },
    /// Measure this node alone.
    MeasureNode {
        round: Round,
        scale: Scale,
    },
    /// Open a place in a ring. It takes that of an earlier round.
    OpenRing {
        round: Round,
    },
    /// Measure the network together with others, in the place that was opened.
    Measure {
        round: Round,
        task: Task,
    },
    Start(Box<Start>),
    /// Stop all ranks: the signal, the grace, SIGKILL.
    Stop {
        generation: u32,
        signal: i32,
        grace: Duration,
    },
    /// Pass a signal on to all ranks, and leave them running.
    Signal {
        generation: u32,
        signal: i32,
    },
    /// A scheduler has signalled all processes: see to the ranks of this node.
    StepSignal {
        generation: u32,
        signal: i32,
    },
    /// SIGKILL to all ranks, now.
    Kill {
        generation: u32,
    },
    /// Describe what the ranks are doing.
    Inspect {
        generation: u32,
    },
    /// Say this to whoever has started the agent by hand.
    Tell {
        text: String,
    },
    /// Leave, with this exit code. `message` is for the agent's own stderr.
    Exit {
        code: i32,
        message: Option<String>,
    },
}

/// What a worker says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum About {
    /// See [`tsm_job::message::WorkerMessage::Versions`].
    Versions(BTreeMap<String, String>),
    /// See [`tsm_job::message::WorkerMessage::Resumed`].
    Resumed { path: PathBuf, step: u64 },
}

/// Of the measurements before a start. One that is asked for ends those of earlier rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Round {
    pub generation: u32,
    pub attempt: u32,
    /// From 0, where each node measures itself.
    pub number: u32,
}

/// Within this time of a node's last sign of life the ranks of the others have their signal.
pub const SILENCE: Duration = Duration::from_millis(1500);
/// Of it, what telling the others takes, on machines that are busy.
const TELLING: Duration = Duration::from_millis(100);
/// A node that was not heard for this long is lost, unless `--node-timeout` says otherwise.
pub const LEASE: Duration = SILENCE.saturating_sub(TELLING);
/// An agent shows that it lives so many times within a lease: a connection that works again one beat before its end
/// has lost nothing.
pub const BEATS_PER_LEASE: u32 = 7;

/// Who joins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Join {
    /// Of tsm-launch.
    pub version: String,
    pub host: String,
    /// Place of this node where a scheduler gave it one.
    pub order: Option<u32>,
    pub pid: i32,
    /// One worker each.
    pub devices: Vec<String>,
    pub gpus: Vec<Gpu>,
    /// Every address of this node that others might reach, without loopback.
    pub addresses: Vec<(IpAddr, String)>,
    /// Digest of the job on the agent's own command line; `None` where it has none.
    pub job: Option<String>,
    /// What else is on it that counts on the coordinator's alone: flags and values.
    #[serde(default)]
    pub options: Vec<(String, String)>,
    pub facts: Facts,
    /// Milliseconds since 1970 by the coordinator's clock, when it came in; 0 until then.
    #[serde(default)]
    pub received_ms: u64,
}

/// What has to agree on all nodes, or is worth knowing of each.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    pub driver: Option<String>,
    pub nccl: Option<String>,
    pub kernel: String,
    pub cpu: String,
    pub num_cpus: u32,
    pub mem_bytes: u64,
    /// Milliseconds since 1970 by this node's clock, when the message was made.
    pub clock_ms: u64,
    /// What the preflight of this node found.
    pub findings: Vec<Finding>,
}

/// Something about a machine that harms a job, or may.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    pub severity: Severity,
    /// `gpu`, `disk`, `clock`, `limits`, ...
    pub area: String,
    /// What was seen, with its values.
    pub text: String,
    /// What to do.
    pub hint: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Ok,
    Warning,
    /// The job would fail.
    Error,
}

/// A sign of life.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Beat {
    pub seq: u64,
    pub generation: u32,
    pub at: AgentTime,
    /// Round trip of the last answered beat.
    pub rtt: Option<Duration>,
    /// Ranks whose state changed since the last beat.
    pub ranks: Vec<Progress>,
    /// New metrics of the ranks of this node.
    pub metrics: Vec<(String, f64)>,
    /// One-minute load average.
    pub load: f32,
    pub mem_used_bytes: u64,
}

/// How far a rank has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub local_rank: u32,
    /// The newest step that was finished, and the first since the last beat.
    pub step: Option<u64>,
    pub first_step: Option<u64>,
    pub epoch: Option<u32>,
    pub section: Option<String>,
    /// The step at which a checkpoint was finished since the last beat.
    pub checkpoint: Option<u64>,
    /// Own work in each step since the last beat, see `WorkerMessage::Step`.
    pub work_ms: Vec<f32>,
}

/// One generation on one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start {
    pub generation: u32,
    pub run_id: String,
    pub run_dir: PathBuf,
    /// Name and text of the config file in the run folder, where there is one.
    pub config: Option<(String, String)>,
    #[serde(with = "words")]
    pub command: Vec<OsString>,
    /// Where to run it.
    pub directory: PathBuf,
    /// The environment to start from, for an agent that has none of the job's own.
    #[serde(with = "variables")]
    pub base_env: Option<Vec<(OsString, OsString)>>,
    /// On top of it, from the command line.
    pub env: Vec<(String, String)>,
    pub node_rank: u32,
    pub num_nodes: u32,
    pub first_rank: u32,
    pub num_ranks: u32,
    pub world_size: u32,
    pub master_addr: IpAddr,
    /// 0: a node alone takes one of its own.
    pub master_port: u16,
    /// The interface that reaches the other nodes.
    pub interface: Option<String>,
    pub restart_count: u32,
    pub max_restarts: u32,
    pub resume_from: Option<PathBuf>,
    /// See [`tsm_job::WorkerEnv::start_from`].
    pub start_from: Option<PathBuf>,
    pub grace: Duration,
    /// Ranks whose output the coordinator shows; `None`: all.
    pub show: Option<Vec<u32>>,
    pub affinity: bool,
    /// The worker is ours: SIGUSR2 makes it save and end with code 75.
    pub saves: bool,
    /// The workers ignore SIGTERM, and SIGINT stops them instead: the scheduler sends SIGTERM to every process of
    /// the job when it is time to save.
    #[serde(default)]
    pub shielded: bool,
}

/// What became of one generation on one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    /// In order of local rank.
    pub ranks: Vec<(Rank, Place)>,
    /// When the generation was started; the times in `ranks` count from the agent's own start.
    pub started_at: AgentTime,
    pub oom_kills: OomKills,
    /// Lines of the kernel's log about GPUs (`Xid`) since the start of the generation.
    pub xids: Vec<String>,
    pub warnings: Vec<String>,
    /// Why some of the output is not in the log files; it was said when it was noticed.
    #[serde(default)]
    pub missing: Option<String>,
}

/// Words of the system are nearly always UTF-8. As the bytes that serde makes of them, an environment of a megabyte would
/// be several, and take an agent longer to read than its lease lasts.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Word {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<&OsString> for Word {
    fn from(word: &OsString) -> Word {
        match word.to_str() {
            Some(text) => Word::Text(text.into()),
            None => Word::Bytes(word.as_bytes().into()),
        }
    }
}

impl From<Word> for OsString {
    fn from(word: Word) -> OsString {
        match word {
            Word::Text(text) => text.into(),
            Word::Bytes(bytes) => OsString::from_vec(bytes),
        }
    }
}

mod words {
    use super::{OsString, Word};
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(words: &[OsString], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(words.iter().map(Word::from))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<OsString>, D::Error> {
        let words = Vec::<Word>::deserialize(from)?;
        Ok(words.into_iter().map(OsString::from).collect())
    }
}

mod variables {
    use super::{OsString, Word};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    type Variables = Option<Vec<(OsString, OsString)>>;

    pub fn serialize<S: Serializer>(variables: &Variables, to: S) -> Result<S::Ok, S::Error> {
        let words = |(name, value): &(OsString, OsString)| (Word::from(name), Word::from(value));
        let all = variables.as_ref();
        let all: Option<Vec<(Word, Word)>> = all.map(|all| all.iter().map(words).collect());
        all.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Variables, D::Error> {
        let all = Option::<Vec<(Word, Word)>>::deserialize(from)?;
        let words = |(name, value): (Word, Word)| (name.into(), value.into());
        Ok(all.map(|all| all.into_iter().map(words).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Job {
        #[serde(with = "words")]
        command: Vec<OsString>,
        #[serde(with = "variables")]
        env: Option<Vec<(OsString, OsString)>>,
    }

    #[test]
    fn words_of_the_system_are_as_short_as_they_can_be_and_lose_no_byte() {
        let odd = OsString::from_vec(vec![b'a', 0xff, b'"']);
        let job = Job {
            command: vec!["träin".into(), odd.clone()],
            env: Some(vec![("A".into(), odd), ("B".into(), "".into())]),
        };
        let text = serde_json::to_string(&job).unwrap();
        assert!(
            text.starts_with(r#"{"command":[{"text":"träin"},{"bytes":[97,255,34]}]"#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Job>(&text).unwrap(), job);
        let none = Job {
            command: Vec::new(),
            env: None,
        };
        let text = serde_json::to_string(&none).unwrap();
        assert_eq!(serde_json::from_str::<Job>(&text).unwrap(), none);
    }
}
