//! The launcher below and the folders that it writes into: neither outlives the measurement.

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::DirBuilder;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{fmt, io};
use tsm_job::RunDir;
use tsm_job::all_reduce::AllReduce;

use super::GpuTask;
use crate::doctor::preflight::ring::LATE;

/// The launcher below may take so long to end in order.
const GRACE: Duration = Duration::from_secs(3);
/// How often somebody who gave up on the measurement is looked for.
const LOOK: Duration = Duration::from_millis(50);

const STDERR: &str = "stderr";

/// Where the nested job writes; gone with this.
pub(super) struct Folders {
    /// Of this process: the key and the results.
    pub own: PathBuf,
    /// Of the nested job on this node.
    pub run: PathBuf,
    first: bool,
}

impl Folders {
    pub fn make(task: &GpuTask) -> anyhow::Result<Folders> {
        let run = task.run_dir();
        let me = format!("{}-{}", std::process::id(), task.task.me);
        let own = run.with_extension(me);
        let folders = Folders {
            own,
            run,
            first: task.first(),
        };
        for path in [&folders.own, &folders.run] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
            made.with_context(|| format!("cannot make the temporary folder {}", path.display()))?;
        }
        Ok(folders)
    }

    /// Where the launcher below writes what [`Folders::last_words`] reads.
    pub fn stderr(&self) -> io::Result<Stdio> {
        let file = fs_err::File::create(self.own.join(STDERR))?;
        Ok(Stdio::from(file.into_file()))
    }

    pub fn last_words(&self) -> String {
        fs_err::read_to_string(self.own.join(STDERR)).unwrap_or_default()
    }

    /// The failure.json of the nested job, where it has one.
    pub fn failure(&self) -> Option<String> {
        fs_err::read_to_string(RunDir::new(&self.run).failure()).ok()
    }

    /// Of the ranks that came to the end, by rank.
    pub fn lines(&self) -> Vec<AllReduce> {
        let files = fs_err::read_dir(&self.own).into_iter().flatten().flatten();
        let files = files.map(|e| e.path());
        let lines = files.filter(|path| path.extension().is_some_and(|e| e == "json"));
        let line = |path: PathBuf| serde_json::from_str(&fs_err::read_to_string(path).ok()?).ok();
        let mut lines: Vec<AllReduce> = lines.filter_map(line).collect();
        lines.sort_by_key(|line| line.rank);
        lines
    }
}

impl Drop for Folders {
    fn drop(&mut self) {
        let _ = fs_err::remove_dir_all(&self.own);
        // Two members on one file system, as in tests: the coordinator's is the one to go.
        let shared = self.run.join("launcher.lock").exists();
        if self.first || !shared {
            let _ = fs_err::remove_dir_all(&self.run);
        }
    }
}

/// Why there is no result.
pub(super) enum Given {
    Up,
    Late(Duration),
    Lost(io::Error),
}

impl fmt::Display for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Given::Up => f.write_str("nobody waits for the measurement any more"),
            Given::Late(wait) => write!(f, "{LATE} {wait:?}"),
            Given::Lost(e) => write!(f, "the launcher of the measurement is lost: {e}"),
        }
    }
}

/// The launcher below. Ended with this.
pub(super) struct Nested {
    child: Child,
    pidfd: OwnedFd,
}

impl Nested {
    pub fn start(mut command: Command) -> anyhow::Result<Nested> {
        let mut child = command
            .spawn()
            .context("cannot start the launcher of a measurement")?;
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Nested { child, pidfd }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e).context("cannot watch the launcher of a measurement")
            }
        }
    }

    pub fn wait(
        mut self,
        wait: Duration,
        cancelled: impl Fn() -> bool,
    ) -> Result<ExitStatus, Given> {
        let deadline = Instant::now() + wait;
        while !self.ended_within(LOOK).map_err(Given::Lost)? {
            if cancelled() {
                return Err(Given::Up);
            }
            if Instant::now() >= deadline {
                return Err(Given::Late(wait));
            }
        }
        self.child.wait().map_err(Given::Lost)
    }

    fn ended_within(&self, time: Duration) -> io::Result<bool> {
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&time)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        // In order first, so that the workers' children and the other nodes hear of it from the launcher.
        let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
        let _ = self.ended_within(GRACE);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
