//! Ranks that no longer step, and ranks that step slowly: found, named, and looked into.
//!
//! ```text
//! beats -> progress::Tracker --hang--> look_into (on every node: probe, and on one: ras) -> report
//!              \-> slow -> a straggler, named
//! ```

pub mod probe;
pub mod process;
mod procfs;
pub mod progress;
pub mod ras;
pub mod report;
pub mod slow;
mod syscalls;
mod tool;

use std::time::Duration;

/// For NCCL's answer: the time it takes itself to give up a process, and some.
const RAS_PATIENCE: Duration = Duration::from_secs(15);

/// What a node finds out about its ranks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Findings {
    /// In the order of the ranks that were asked for; with stacks about 64 KiB each.
    pub processes: Vec<process::Process>,
    pub ras: Option<ras::Answer>,
}

/// Looks into these processes, and asks NCCL at `ras` (`NCCL_RAS_ADDR` of the ranks), on threads of its own. The
/// answer comes within 16 s.
pub fn look_into(
    probe: probe::Probe,
    pids: Vec<i32>,
    ras: Option<String>,
) -> tokio::sync::oneshot::Receiver<Findings> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let look = move || {
        let findings = std::thread::scope(|scope| {
            let ask = |address: String| {
                let thread = std::thread::Builder::new().name("ras".into());
                let ask = move || ras::answer(&address, RAS_PATIENCE);
                // Where none can be started, what the processes do is still known.
                thread.spawn_scoped(scope, ask).ok()
            };
            let ras = ras.and_then(ask);
            Findings {
                processes: probe.inspect_all(&pids),
                ras: ras.and_then(|thread| thread.join().ok()),
            }
        });
        let _ = sender.send(findings);
    };
    // Where no thread can be started, the sender is dropped, and the receiver says so.
    let _ = (std::thread::Builder::new().name("inspect".into())).spawn(look);
    receiver
}
