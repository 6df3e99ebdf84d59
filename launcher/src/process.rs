//! Processes: start a worker through the shim, signal it, and guard it. What workers start: [`crate::contain`].
//!
//! `pre_exec` would switch std off `posix_spawn`, so what must happen between fork and exec is
//! done by [`crate::shim`], which becomes the worker by exec.

use anyhow::Context;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open,
    pidfd_send_signal, waitid,
};
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ChildStderr, ChildStdin, ChildStdout, Stdio};

use crate::contain::{self, Containment};
use crate::end::End;
use crate::own::Executable;
use crate::stat::{self, Stat};

/// What to start.
pub struct Spec<'a> {
    /// Started as the shim.
    pub shim: &'a Executable,
    pub command: &'a [OsString],
    /// Replaces what is inherited of the same names.
    pub base_env: &'a [(OsString, OsString)],
    /// Where to run it; `None`: here.
    pub directory: Option<&'a Path>,
    /// Set on top of the environment, after `remove`.
    pub env: &'a [(String, String)],
    pub remove: &'a [String],
    /// Cores to bind to; empty: no binding.
    pub cores: &'a [usize],
    /// It ignores SIGTERM.
    pub shielded: bool,
    pub containment: &'a Containment,
}

/// A started worker. It leads a session of its own and dies with this process.
pub struct Worker {
    pub pid: Pid,
    pidfd: OwnedFd,
}

/// The launcher's ends of a new worker's streams.
pub struct Streams {
    pub out: ChildStdout,
    pub err: ChildStderr,
}

/// Starts a worker, with `agent` as its `TSM_AGENT_FD`. Call from the main thread only: the worker's parent-death signal
/// fires when the *thread* that started it ends.
///
/// # Errors
/// When the shim cannot be started, or the kernel has no pidfd.
pub fn spawn(spec: &Spec, agent: UnixStream) -> anyhow::Result<(Worker, Streams)> {
    let mut command = spec.shim.command();
    let group = spec.containment.group();
    command
        .args(crate::shim::bound(spec.cores, spec.shielded, group))
        .args(spec.command);
    if let Some(directory) = spec.directory {
        command.current_dir(directory);
    }
    command.envs(spec.base_env.iter().map(|(k, v)| (k, v)));
    for name in spec.remove {
        command.env_remove(name);
    }
    command
        .envs(spec.env.iter().map(|(k, v)| (k, v)))
        .env(contain::MARK, spec.containment.mark());
    // As its stdin, which the shim moves: a descriptor of this process that can be inherited would also be by what
    // other threads start in the same moment, and the socket would stay open when the worker has died.
    command
        .stdin(Stdio::from(OwnedFd::from(agent)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {}", spec.shim.name()))?;

    let pid = Pid::from_child(&child);
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(e) => {
            // Nobody else knows of it.
            let _ = child.kill();
            let _ = child.wait();
            let what =
                "cannot watch a worker: pidfd_open failed; tsm-launch needs Linux 5.4 or newer";
            return Err(e).context(what);
        }
    };
    let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) else {
        unreachable!("both streams were asked for")
    };
    Ok((Worker { pid, pidfd }, Streams { out, err }))
}

impl Worker {
    /// How it ended, if it has. The zombie stays, so that its pid, which is also the number of its
    /// session, cannot name another process before [`Worker::reap`].
    pub fn end(&self) -> Option<End> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), options).ok()??;
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Some(End::Code(code)),
            (None, Some(signal)) => Some(End::Signal(signal)),
            (None, None) => None,
        }
    }

    /// See [`stat::is_exiting`].
    pub fn is_exiting(&self) -> bool {
        stat::is_exiting(self.pid.as_raw_nonzero().get())
    }

    /// Frees the process table entry of a worker that has ended.
    pub fn reap(&self) {
        let _ = waitid(
            WaitId::PidFd(self.pidfd.as_fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        );
    }

    /// Signals the worker alone; its children hear of it from the worker. A worker that has ended is no error.
    pub fn signal(&self, signal: i32) {
        if let Some(signal) = Signal::from_named_raw(signal) {
            let _ = pidfd_send_signal(&self.pidfd, signal);
        }
    }

    /// SIGKILL to the worker and its process group.
    pub fn kill(&self) {
        self.signal(libc::SIGKILL);
        let _ = kill_process_group(self.pid, Signal::KILL);
    }

    /// See [`stuck_in`].
    pub fn stuck_in(&self) -> String {
        stuck_in(self.pid.as_raw_nonzero().get())
    }
}

/// State letter and kernel function of a process that does not end, such as `state D (in nfs_wait)`.
pub fn stuck_in(pid: i32) -> String {
    let state = Stat::read(pid).map_or('?', |stat| stat.state);
    match fs_err::read_to_string(format!("/proc/{pid}/wchan")) {
        Ok(wchan) if !wchan.is_empty() && wchan != "0" => format!("state {state} (in {wchan})"),
        _ => format!("state {state}"),
    }
}

impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// The process that ends what the workers started if this process is killed, see [`crate::shim::guard`].
pub struct Guard(ChildStdin);

impl Guard {
    /// # Errors
    /// When the process cannot be started.
    pub fn start(shim: &Executable, containment: &Containment) -> anyhow::Result<Guard> {
        let mut command = shim.command();
        command
            .arg(crate::shim::GUARD)
            .args(containment.words())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {}", shim.name()))?;
        let stdin = child.stdin.take().context("the guard has no stdin")?;
        // A guard that is stopped must not stop this process, when it has not read for long.
        fcntl_setfl(&stdin, OFlags::NONBLOCK).context("cannot write to the guard")?;
        Ok(Guard(stdin))
    }

    /// Names the sessions to end.
    pub fn watch(&mut self, workers: &[Worker]) {
        let pids: Vec<String> = workers
            .iter()
            .map(|w| w.pid.as_raw_nonzero().to_string())
            .collect();
        self.tell(&pids.join(" "));
    }

    /// Kills all processes of the generation unless this is called again within `time`.
    pub fn lease(&mut self, time: std::time::Duration) {
        self.tell(&format!("{} {}", crate::shim::LEASE, time.as_millis()));
    }

    /// Lets the guard go without doing anything.
    pub fn dismiss(mut self) {
        self.tell(crate::shim::DISMISS);
    }

    /// Without its guard the launcher still works; only grandchildren could outlive a SIGKILL.
    fn tell(&mut self, line: &str) {
        use std::io::Write;
        // In one piece, which is written whole or not at all.
        let _ = self.0.write(format!("{line}\n").as_bytes());
    }
}
