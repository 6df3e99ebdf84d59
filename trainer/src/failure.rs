//! How a worker ends: one clear error on stderr, one record to the launcher, a documented code.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tsm_job::exit;
use tsm_job::message::{AgentLink, FailureRecord, WorkerMessage};

/// Optimizer steps finished, for the record; `u64::MAX` before the first epoch.
static STEP: AtomicU64 = AtomicU64::new(u64::MAX);

/// Notes that `step` optimizer steps are finished.
pub fn at_step(step: u64) {
    STEP.store(step, Ordering::Relaxed);
}

fn record(
    rank: u32,
    code: i32,
    cause: &str,
    message: String,
    backtrace: Option<String>,
) -> WorkerMessage {
    let step = STEP.load(Ordering::Relaxed);
    WorkerMessage::Failure(FailureRecord {
        rank,
        step: (step != u64::MAX).then_some(step),
        code,
        cause: cause.into(),
        message,
        backtrace,
    })
}

/// Makes a panic on any thread end the process with [`exit::BUG`] after telling the launcher.
pub fn install(rank: u32, link: Arc<AgentLink>) {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        let message = info
            .payload()
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| info.payload().downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "panic without a message".into());
        let place = info
            .location()
            .map(|l| format!(" at {l}"))
            .unwrap_or_default();
        let backtrace = std::backtrace::Backtrace::force_capture().to_string();
        link.send(&record(
            rank,
            exit::BUG,
            "panic",
            format!("{message}{place}"),
            Some(backtrace),
        ));
        leave(exit::BUG);
    }));
}

/// Ends the process at once, and with an error code the other ranks too where they run under MPI.
/// Other threads may hold locks or wait in a collective, and exit handlers of libtorch or NCCL
/// would wait for them for ever.
#[expect(unsafe_code, reason = "std has no exit without exit handlers")]
pub fn leave(code: i32) -> ! {
    if code != exit::OK {
        crate::ddp::mpi::abort(code);
    }
    // SAFETY: `_exit` never returns and touches no memory of ours.
    unsafe { libc::_exit(code) }
}

/// Prints `error`, tells the launcher, and ends the process with the error's code.
pub fn end(rank: u32, link: &AgentLink, error: &anyhow::Error) -> ! {
    let code = exit::code_of(error);
    let cause = if code == exit::PEER { "peer" } else { "error" };
    link.send(&record(rank, code, cause, format!("{error:#}"), None));
    eprintln!("error: rank {rank}: {error:#}");
    leave(code)
}
