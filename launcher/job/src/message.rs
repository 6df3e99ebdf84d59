//! What a worker tells its launcher over the Unix stream socket `TSM_AGENT_FD`: one JSON object a line.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Mutex;

/// One line from a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum WorkerMessage {
    /// First line: who speaks.
    Hello {
        rank: u32,
        pid: u32,
        version: String,
    },
    /// Versions of what the worker is made of, by name: `tsm-trainer`, `libtorch`, `cuda`, `nccl`. It may come more than
    /// once; the launcher takes those of rank 0 to the manifest.
    Versions { versions: BTreeMap<String, String> },
    /// The worker goes on from this checkpoint, which holds so many steps. A fresh start says nothing.
    Resumed { path: PathBuf, step: u64 },
    /// An optimizer step was finished.
    Step {
        step: u64,
        /// The one that the step belongs to; the first is 1.
        epoch: u32,
        /// Milliseconds of this rank's own work, by which a straggler differs although all ranks
        /// take the same time for a step: from the start of the step, the wait for its data
        /// included, without the wait for other ranks. Checkpoints and validations count for no
        /// step. On a CPU it is the host's time of this step less the time in collectives, the update
        /// included; on a GPU the device's time until it had this rank's gradients, and of the step
        /// two before, since the host never waits for one (`None` in the first two).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        work_ms: Option<f64>,
    },
    /// A number worth showing: `loss`, `clips_per_s` (over all ranks), `lr`, `top1`. The launcher takes in the first
    /// 1,000 names of a job, of up to 128 bytes each.
    Metric { name: String, value: f64 },
    /// What the worker is doing: `load`, `train`, `validate`, `checkpoint`.
    Section { name: String },
    /// The worker is about to end because of this.
    Failure(FailureRecord),
}

/// Why a worker ends, in its own words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailureRecord {
    pub rank: u32,
    /// Optimizer steps finished before.
    pub step: Option<u64>,
    /// The exit code that will follow, see [`crate::exit`].
    pub code: i32,
    /// `panic`, `error`, `peer` (the consequence of another rank's failure); `not prepared` and `not executed` come from
    /// the launcher itself, before the program runs.
    pub cause: String,
    pub message: String,
    pub backtrace: Option<String>,
}

impl FailureRecord {
    /// Longest message and longest backtrace that the launcher takes, in bytes; what is longer loses its middle.
    pub const MAX_TEXT: usize = 64 << 10;

    pub fn shortened(self) -> FailureRecord {
        let short = |text: String| crate::text::cut(&text, Self::MAX_TEXT);
        FailureRecord {
            cause: crate::text::cut(&self.cause, 100),
            message: short(self.message),
            backtrace: self.backtrace.map(short),
            ..self
        }
    }
}

/// A worker's end of the socket. Without a launcher, messages go nowhere.
pub struct AgentLink(Option<Mutex<UnixStream>>);

impl AgentLink {
    /// Takes over the descriptor of `TSM_AGENT_FD`. Call once a process.
    #[expect(
        unsafe_code,
        reason = "a descriptor number from the environment becomes a socket"
    )]
    pub fn open(agent_fd: Option<i32>) -> AgentLink {
        // SAFETY: the launcher passes the descriptor for this process alone; nothing else owns it.
        AgentLink(agent_fd.map(|fd| Mutex::new(unsafe { UnixStream::from_raw_fd(fd) })))
    }

    /// Sends one message. A launcher that is gone is not an error: the worker's death signal follows.
    pub fn send(&self, message: &WorkerMessage) {
        let Some(stream) = &self.0 else { return };
        let short = match message {
            WorkerMessage::Failure(record) => WorkerMessage::Failure(record.clone().shortened()),
            message => message.clone(),
        };
        let message = &short;
        if let (Ok(mut line), Ok(mut stream)) = (serde_json::to_string(message), stream.lock()) {
            line.push('\n');
            let _ = stream.write_all(line.as_bytes());
        }
    }
}
