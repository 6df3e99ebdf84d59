//! `--preflight full`: measure the nodes and the network between them, and find the slow or faulty one.
//!
//! ```text
//! memory    how fast a node copies, and whether the copy is equal
//! ring      a sum over the members of a group, over TCP, compared bit for bit
//! gpus      the same over their GPUs, through NCCL
//! schedule  who is measured with whom, and who is to blame (pure)
//! ```

mod gpus;
mod memory;
mod ring;
mod schedule;

pub use gpus::{GPU_WAIT, GpuTask, all_reduce, own_gpus};
pub use memory::memory;
pub use ring::{Measured, Ring, Task};
pub use schedule::{Outcome, Verdict, findings, judge, judge_memory, next_round};

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::count;
use crate::cluster::message::Finding;
use crate::cores;

/// Bytes summed up in each round of a measurement.
pub const BYTES: usize = 64 << 20;
/// A measurement goes on for about so long.
pub const BUDGET: Duration = Duration::from_secs(2);
/// A group that is not done by then has failed; a gigabit network needs 2 s for a round.
pub const WAIT: Duration = Duration::from_secs(30);

/// Measures this node alone: its memory, and a sum over two threads through the loopback interface.
pub fn own_node() -> Vec<Finding> {
    let num_cores = cores::allowed().len().max(1);
    let own = count(num_cores as u64, "core");
    let memory = match memory(num_cores) {
        Ok(gbyte_s) => Finding::ok("memory", format!("{gbyte_s:.1} GB/s copied by {own}")),
        Err(e) => Finding::error(
            "memory",
            e,
            "the memory of this machine is broken: leave it out, run memtest",
        ),
    };
    let network = match loopback() {
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
    vec![memory, network]
}

fn loopback() -> Result<Measured, String> {
    let rings = [Ring::open(), Ring::open()];
    let [first, second] = rings.map(|ring| ring.map_err(|e| e.to_string()));
    let (first, second) = (first?, second?);
    let at = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    let task = Task::new(vec![at(first.port), at(second.port)], 0);
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
    let ended = |e| format!("the thread ended: {e}");
    let measured = own.blocking_recv().map_err(ended)??;
    let other = other.blocking_recv().map_err(ended)??;
    Ok(Measured {
        wrong: measured.wrong.or(other.wrong),
        ..measured
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::message::Severity;

    #[test]
    fn a_healthy_node_is_measured() {
        let found = own_node();
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
