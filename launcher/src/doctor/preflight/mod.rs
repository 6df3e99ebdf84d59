//! `--preflight full`: measure the nodes and the network between them, and find the slow or faulty one.
//!
//! ```text
//! memory    how fast a node copies, and whether the copy is equal
//! ring      a sum over the members of a group, over TCP, compared bit for bit
//! gpus      the same over their GPUs, through NCCL
//! link      what of its stated speed the network reaches (pure)
//! schedule  who is measured with whom, and who is to blame (pure)
//! ```

mod gpus;
pub mod link;
mod memory;
mod ring;
mod schedule;

pub use gpus::{GPU_WAIT, GpuTask, all_reduce, own_gpus};
pub use memory::memory;
pub use ring::{Measured, Ring, Task};
pub use schedule::{
    Outcome, Verdict, conviction, findings, judge, judge_memory, next_round, range,
};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use tokio::sync::oneshot::Receiver;
use tsm_job::config::duration;

use crate::cluster::message::Finding;
use crate::cores;
use crate::text::count;

/// Bytes summed up in each round of a measurement; also beyond the last-level cache, with all cores together.
pub const BYTES: usize = 64 << 20;
/// A measurement goes on for about so long.
pub const BUDGET: Duration = Duration::from_secs(2);
/// At most for the loopback interface, which is quick, and tells less.
const LOOPBACK_BYTES: usize = 8 << 20;
const LOOPBACK_BUDGET: Duration = Duration::from_millis(500);
/// A group that is not done by then has failed; a gigabit network needs 2 s for a round.
pub const WAIT: Duration = Duration::from_secs(30);

/// How much is measured, and for how long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scale {
    /// Summed up in each round of a measurement, and copied by each thread.
    pub bytes: usize,
    pub budget: Duration,
    pub wait: Duration,
    /// The job's workers, where they are `tsm-trainer`: it measures nodes that have GPUs.
    #[serde(default)]
    pub trainer: Option<PathBuf>,
    /// It measures nodes without GPUs too, as tests want it.
    #[serde(default)]
    pub on_cpus: bool,
}

impl Scale {
    /// By when a node, or a group of them, has to be done.
    pub fn patience(&self) -> Duration {
        match self.trainer {
            Some(_) => self.wait + GPU_WAIT,
            None => self.wait,
        }
    }
}

impl Default for Scale {
    fn default() -> Scale {
        Scale {
            bytes: BYTES,
            budget: BUDGET,
            wait: WAIT,
            trainer: None,
            on_cpus: false,
        }
    }
}

impl FromStr for Scale {
    type Err = String;

    /// `1048576,200ms,5s`: bytes, budget, wait; and `,cpus` to measure CPUs as GPUs are.
    fn from_str(text: &str) -> Result<Scale, String> {
        let refuse = || format!("`{text}` is not BYTES,BUDGET,WAIT, such as 1048576,200ms,5s");
        let (numbers, on_cpus) = match text.strip_suffix(",cpus") {
            Some(numbers) => (numbers, true),
            None => (text, false),
        };
        let [bytes, budget, wait] = numbers.split(',').collect::<Vec<_>>()[..] else {
            return Err(refuse());
        };
        Ok(Scale {
            bytes: bytes.parse().map_err(|_| refuse())?,
            budget: duration::parse(budget).map_err(|_| refuse())?,
            wait: duration::parse(wait).map_err(|_| refuse())?,
            trainer: None,
            on_cpus,
        })
    }
}

/// What a node measured of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnNode {
    /// GB/s copied by all its cores.
    pub memory_gbyte_s: Option<f64>,
    /// Through the loopback interface.
    pub loopback_gbit_s: Option<f64>,
    /// Bus bandwidth of an all-reduce over its GPUs, in GB/s.
    #[serde(default)]
    pub all_reduce_gb_s: Option<f64>,
    /// Mbit/s that the kernel states for its network cards.
    #[serde(default)]
    pub links: BTreeMap<String, u32>,
    pub findings: Vec<Finding>,
}

impl OwnNode {
    /// It could not be measured.
    pub fn failed(why: impl Into<String>) -> OwnNode {
        let hint = "look at its load and its kernel log, or leave it out";
        OwnNode {
            findings: vec![Finding::error("preflight", why, hint)],
            ..OwnNode::default()
        }
    }
}

/// Measures this node alone: its memory, and a sum over two threads through the loopback interface.
pub fn own_node(scale: &Scale) -> OwnNode {
    let num_cores = cores::allowed().len().max(1);
    let own = count(num_cores, "core");
    let memory = memory(num_cores, scale.bytes);
    let loopback = loopback(scale);
    let of_memory = match &memory {
        Ok(gbyte_s) => Finding::ok("memory", format!("{gbyte_s:.1} GB/s copied by {own}")),
        Err(e) => Finding::error(
            "memory",
            e,
            "the memory of this machine is broken: leave it out, run memtest",
        ),
    };
    let of_network = match &loopback {
        Ok(measured) => match &measured.wrong {
            None => Finding::ok(
                "network",
                format!("loopback: {measured}, every sum is right"),
            ),
            Some(e) => Finding::error(
                "network",
                format!("loopback: {e}"),
                "this machine computes wrong: leave it out",
            ),
        },
        Err(e) => Finding::error(
            "network",
            format!("a sum over two threads through loopback failed: {e}"),
            "check that the loopback interface is up (ip link set lo up) and not filtered",
        ),
    };
    OwnNode {
        memory_gbyte_s: memory.ok(),
        loopback_gbit_s: loopback.ok().map(|measured| measured.gbit_s),
        all_reduce_gb_s: None,
        links: link::speeds(),
        findings: vec![of_memory, of_network],
    }
}

fn loopback(scale: &Scale) -> Result<Measured, String> {
    let rings = [Ring::open(), Ring::open()];
    let [first, second] = rings.map(|ring| ring.map_err(|e| e.to_string()));
    let (first, second) = (first?, second?);
    let at = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    let scale = Scale {
        bytes: scale.bytes.min(LOOPBACK_BYTES),
        budget: scale.budget.min(LOOPBACK_BUDGET),
        trainer: None,
        ..scale.clone()
    };
    let task = Task::new(vec![at(first.port), at(second.port)], 0, &scale);
    // Both are here: any answer will do.
    let prove = |nonce: [u8; 16]| [nonce[15]; 32];
    let other = second.start(
        Task {
            me: 1,
            ..task.clone()
        },
        prove,
    );
    let own = first.start(task, prove);
    let answer = |result: Receiver<_>| {
        let ended = |e| Err(format!("the thread ended: {e}"));
        result.blocking_recv().unwrap_or_else(ended)
    };
    Outcome::new(vec![0, 1], vec![answer(own), answer(other)]).result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::message::Severity;

    #[test]
    fn a_healthy_node_is_measured() {
        let own = own_node(&"1048576,10ms,60s".parse().unwrap());
        assert!(own.memory_gbyte_s > Some(0.0) && own.loopback_gbit_s > Some(0.0));
        let found = own.findings;
        assert_eq!(found.len(), 2);
        assert!(
            found.iter().all(|f| f.severity == Severity::Ok),
            "{found:?}"
        );
        assert!(
            found[0].text.contains("GB/s") && found[1].text.contains("Gbit/s"),
            "{found:?}"
        );
    }
}
