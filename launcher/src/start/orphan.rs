//! A launcher below mpirun that is killed is nobody's child: nobody would stop it, or read what it says. So it ends with
//! whoever started it, by the same path as at a SIGTERM.
//!
//! Not by a parent-death signal: that comes when the *thread* ends that started this process, and says nothing of a
//! shell in between. Agents below ssh have their connection, and SLURM ends the tasks of a step itself.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, kill_process, pidfd_open};

use crate::say::say;
use crate::stat::Stat;

/// Set in every process that Open MPI's mpirun starts, and in what those start.
const STARTED: &str = "OMPI_COMM_WORLD_RANK";

/// Sends SIGTERM to this process when the mpirun, or its daemon on this node, that it was started by is gone. Does
/// nothing elsewhere.
pub fn end_with_mpirun() {
    if std::env::var_os(STARTED).is_none() {
        return;
    }
    let found = || starter(getpid().as_raw_nonzero().get(), parent, was_started);
    let Some(pid) = found() else { return };
    let pidfd = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    // It may have ended meanwhile, and its number be another's.
    let pidfd = pidfd.filter(|_| found() == Some(pid));
    let wait = move || {
        if let Some(pidfd) = pidfd {
            while let Err(rustix::io::Errno::INTR) =
                poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None)
            {}
        }
        // Most likely nobody reads it.
        say("the mpirun that started this node is gone");
        let _ = kill_process(getpid(), Signal::TERM);
    };
    // Without the thread the job runs as well.
    let _ = std::thread::Builder::new()
        .name("mpirun".into())
        .spawn(wait);
}

/// The nearest ancestor of `pid` that was not started by mpirun, and so is mpirun or its daemon: between it and us there
/// may be shells.
fn starter(
    pid: i32,
    parent: impl Fn(i32) -> Option<i32>,
    was_started: impl Fn(i32) -> bool,
) -> Option<i32> {
    let mut ancestors = std::iter::successors(parent(pid), |&pid| parent(pid));
    // 0 is outside this container.
    ancestors
        .find(|&pid| !was_started(pid))
        .filter(|&pid| pid > 0)
}

fn parent(pid: i32) -> Option<i32> {
    Stat::read(pid).map(|stat| stat.parent)
}

/// By the environment with which it was executed.
fn was_started(pid: i32) -> bool {
    let environment = fs_err::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let mut variables = environment.split(|&byte| byte == 0);
    variables.any(|variable| {
        let name = variable.split(|&byte| byte == b'=').next();
        name == Some(STARTED.as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shells_between_mpirun_and_us_do_not_count() {
        let parent = |pid: i32| (pid > 0).then(|| pid - 10);
        assert_eq!(starter(50, parent, |pid| pid > 20), Some(20));
        assert_eq!(starter(50, parent, |pid| pid > 40), Some(40));
        assert_eq!(starter(50, parent, |pid| pid > 0), None);
        assert_eq!(starter(50, |_| None, |_| true), None);
    }

    #[test]
    fn this_process_has_a_parent() {
        let me = std::process::id() as i32;
        assert_eq!(parent(me), Some(std::os::unix::process::parent_id() as i32));
        assert!(!was_started(i32::MAX));
    }
}
