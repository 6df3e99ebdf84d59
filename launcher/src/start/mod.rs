//! How the nodes of a job are found: SLURM, ssh, MPI, Kubernetes, or by hand.

pub mod adopt;
pub mod agent;
pub mod by_hand;
pub mod children;
pub mod hosts;
pub mod meet;
pub mod orphan;
pub mod slurm;
pub mod ssh;

use std::future::Future;
use tokio::task::LocalSet;

use crate::limits;

/// Open files of this process beside those for its ranks and other nodes.
const FILES: u64 = 64;

/// Runs a future on this thread, which is the one that may start workers.
///
/// # Errors
/// Those of the future; [`tsm_job::exit::PREFLIGHT`] where the limits leave no room for it.
pub fn run_here<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    limits::need_open_files(FILES, "the launcher and its connections")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    let result = LocalSet::new().block_on(&runtime, future);
    // A thread that still waits for a stuck file system must not hold up the end.
    runtime.shutdown_background();
    result
}
