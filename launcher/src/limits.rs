//! What the limits of this process (`ulimit`) leave it: open files and threads.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use tsm_job::exit::{self, Coded};

/// Raises the limit of open files to `needed` where it is lower; workers inherit it. The hard limit where that is
/// lower still.
///
/// # Errors
/// The hard limit.
pub fn allow_open_files(needed: u64) -> Result<(), u64> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < needed) {
        let current = Some(limit.maximum.map_or(needed, |maximum| needed.min(maximum)));
        let _ = setrlimit(Resource::Nofile, Rlimit { current, ..limit });
    }
    match limit.maximum {
        Some(maximum) if maximum < needed => Err(maximum),
        _ => Ok(()),
    }
}

/// As [`allow_open_files`], for those without whom there is no job: `32 ranks`.
///
/// # Errors
/// [`exit::PREFLIGHT`] where the hard limit is lower.
pub fn need_open_files(needed: u64, who: &str) -> Result<(), Coded> {
    allow_open_files(needed).map_err(|limit| {
        let text = format!(
            "{needed} open files are needed for {who}, and the hard limit is {limit}\n  hint: ulimit -Hn {needed}, \
            nofile in /etc/security/limits.conf, LimitNOFILE= of systemd, docker run --ulimit nofile={needed}"
        );
        Coded::new(exit::PREFLIGHT, text)
    })
}

/// Starts a thread without which there is no job; `purpose`: `shows the output`.
///
/// # Errors
/// [`exit::PREFLIGHT`] where none may be started.
pub fn thread<T: Send + 'static>(
    name: &str,
    purpose: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, Coded> {
    let started = Builder::new().name(name.into()).spawn(work);
    started.map_err(|e| {
        let text = format!(
            "cannot start the thread that {purpose}: {e}\n  hint: end other processes of this user, or raise their \
            number: ulimit -u, nproc in /etc/security/limits.conf, TasksMax= of systemd, docker run --pids-limit"
        );
        Coded::new(exit::PREFLIGHT, text)
    })
}

/// Does `work`, which may take its time, on a thread; here where none can be started.
pub fn beside(name: &str, work: impl FnOnce() + Send + 'static) {
    let work = Arc::new(Mutex::new(Some(work)));
    let theirs = Arc::clone(&work);
    let started = Builder::new().name(name.into()).spawn(move || run(&theirs));
    if started.is_err() {
        run(&work);
    }
}

fn run(work: &Mutex<Option<impl FnOnce()>>) {
    let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(work) = work {
        work();
    }
}
