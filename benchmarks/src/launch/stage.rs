//! Launchers at work, the ranks they have started, and what those say. Dropped, all of it ends.

use super::stamp::{Kind, Stamp, now_ns};
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Bytes that ranks may write before the bench reads: it never holds one up.
const PIPE_BYTES: usize = 1 << 20;
/// How often to look whether a launcher has ended while ranks are waited for.
const LOOK: Duration = Duration::from_millis(500);

/// One measurement's processes, in a folder of its own.
pub struct Stage {
    folder: Rc<tempfile::TempDir>,
    pipe: fs_err::File,
    unread: Vec<u8>,
    launchers: Vec<Launcher>,
    ranks: Vec<Rank>,
    stamps: Vec<Stamp>,
}

struct Launcher {
    child: Child,
    pidfd: OwnedFd,
    ended: Option<ExitStatus>,
}

struct Rank {
    stamp: Stamp,
    /// `None`: it was gone before this was asked for.
    pidfd: Option<OwnedFd>,
}

impl Stage {
    /// Is removed when nobody holds it any more.
    pub fn folder(&self) -> Rc<tempfile::TempDir> {
        Rc::clone(&self.folder)
    }

    pub fn new() -> Result<Stage> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("ranks");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        fs_err::create_dir_all(folder.path().join("tmp"))?;
        // For both ways, so that it never ends while no rank has it open.
        let pipe = fs_err::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)?;
        rustix::pipe::fcntl_setpipe_size(&pipe, PIPE_BYTES)
            .context("the kernel gives no pipe of 1 MiB (fs.pipe-max-size)")?;
        Ok(Stage {
            folder: Rc::new(folder),
            pipe,
            unread: Vec::new(),
            launchers: Vec::new(),
            ranks: Vec::new(),
            stamps: Vec::new(),
        })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What a rank is told to write to.
    pub fn pipe(&self) -> PathBuf {
        self.path("ranks")
    }

    /// Starts a launcher in the folder: its number, and the time right before.
    pub fn start(&mut self, command: &mut Command) -> Result<(usize, u64)> {
        let number = self.launchers.len();
        let out = fs_err::File::create(self.output(number))?.into_parts().0;
        command
            .current_dir(self.folder.path())
            // What is left there by a launcher that was killed goes with the folder.
            .env("TMPDIR", self.path("tmp"))
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out);
        for name in tsm_launch::plan::RANK_VARIABLES {
            command.env_remove(name);
        }
        let before = now_ns();
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let pid = Pid::from_child(&child);
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                bail!("no pidfd of {program}: {e}");
            }
        };
        self.launchers.push(Launcher {
            child,
            pidfd,
            ended: None,
        });
        Ok((number, before))
    }

    fn output(&self, launcher: usize) -> PathBuf {
        self.path(&format!("launcher{launcher}.txt"))
    }

    /// What a launcher has printed.
    pub fn printed(&self, launcher: usize) -> String {
        String::from_utf8_lossy(&fs_err::read(self.output(launcher)).unwrap_or_default())
            .into_owned()
    }

    pub fn launcher_pid(&self, launcher: usize) -> i32 {
        self.launchers[launcher].child.id() as i32
    }

    /// Signals a launcher; the time right before.
    pub fn signal(&self, launcher: usize, signal: Signal) -> Result<u64> {
        let before = now_ns();
        pidfd_send_signal(&self.launchers[launcher].pidfd, signal)
            .context("a launcher has ended")?;
        Ok(before)
    }

    /// Waits until `num` ranks have said `kind`, as far as `filter` takes them: those stamps, or `None` when
    /// `patience` is over before.
    ///
    /// # Errors
    /// When all launchers end before, with what they printed.
    pub fn wait(
        &mut self,
        kind: Kind,
        num: usize,
        patience: Duration,
        filter: impl Fn(&Stamp) -> bool,
    ) -> Result<Option<Vec<Stamp>>> {
        let until = Instant::now() + patience;
        let mut all_ended = false;
        loop {
            let wanted = |s: &&Stamp| s.kind == kind && filter(s);
            let found: Vec<Stamp> = self.stamps.iter().filter(wanted).cloned().collect();
            if found.len() >= num {
                return Ok(Some(found));
            }
            let now = Instant::now();
            if now >= until {
                return Ok(None);
            }
            if !self.read(LOOK.min(until - now))? {
                if all_ended {
                    let printed: Vec<String> = (0..self.launchers.len())
                        .map(|i| tail(&self.printed(i)))
                        .collect();
                    bail!(
                        "ended with {} of {num} ranks {kind:?}:\n{}",
                        found.len(),
                        printed.join("\n")
                    );
                }
                // Once more, for what was said last.
                all_ended = self.reap();
            }
        }
    }

    /// As [`Stage::wait`] for the first start of all ranks, which has to come.
    pub fn started(&mut self, num: usize, patience: Duration) -> Result<Vec<Stamp>> {
        match self.wait(Kind::Started, num, patience, |_| true)? {
            Some(stamps) => Ok(stamps),
            None => {
                let have = self.ranks.len();
                bail!(
                    "{have} of {num} ranks started within {patience:?}\n{}",
                    tail(&self.printed(0))
                )
            }
        }
    }

    /// Takes in what ranks have said, or waits for it; whether there was something.
    fn read(&mut self, patience: Duration) -> Result<bool> {
        if !wait_for(&self.pipe, patience)? {
            return Ok(false);
        }
        let mut buffer = [0; 64 << 10];
        let n = rustix::io::read(&self.pipe, &mut buffer)?;
        self.unread.extend(&buffer[..n]);
        while let Some(end) = self.unread.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.unread.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line[..end]);
            let stamp: Stamp = line.parse().map_err(anyhow::Error::msg)?;
            if stamp.kind == Kind::Started {
                let pid = Pid::from_raw(stamp.pid).context("a rank has a pid")?;
                let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok();
                self.ranks.push(Rank {
                    stamp: stamp.clone(),
                    pidfd,
                });
            }
            self.stamps.push(stamp);
        }
        Ok(true)
    }

    /// Whether all launchers have ended.
    fn reap(&mut self) -> bool {
        for launcher in &mut self.launchers {
            if launcher.ended.is_none() {
                launcher.ended = launcher.child.try_wait().unwrap_or(None);
            }
        }
        self.launchers.iter().all(|l| l.ended.is_some())
    }

    /// Signals a rank of the first start; the time right before.
    pub fn signal_rank(&self, rank: u32, signal: Signal) -> Result<u64> {
        let of = |r: &&Rank| r.stamp.rank == rank;
        let found = self.ranks.iter().find(of).and_then(|r| r.pidfd.as_ref());
        let pidfd = found.with_context(|| format!("rank {rank} is gone"))?;
        let before = now_ns();
        pidfd_send_signal(pidfd, signal).with_context(|| format!("rank {rank} is gone"))?;
        Ok(before)
    }

    /// Waits until the ranks that `filter` takes have ended; how many are left when `patience` is over, and when
    /// the last ended.
    pub fn gone(
        &self,
        patience: Duration,
        filter: impl Fn(&Stamp) -> bool,
    ) -> Result<(usize, u64)> {
        let until = Instant::now() + patience;
        let mut left = 0;
        let mut last = now_ns();
        for rank in self.ranks.iter().filter(|r| filter(&r.stamp)) {
            let Some(pidfd) = &rank.pidfd else { continue };
            if wait_for(pidfd, until.saturating_duration_since(Instant::now()))? {
                last = now_ns();
            } else {
                left += 1;
            }
        }
        Ok((left, last))
    }

    /// Waits for the end of a launcher: when, or `None` when `patience` is over.
    pub fn ended(&mut self, launcher: usize, patience: Duration) -> Result<Option<u64>> {
        let launcher = &mut self.launchers[launcher];
        if !wait_for(&launcher.pidfd, patience)? {
            return Ok(None);
        }
        let at = now_ns();
        launcher.ended = Some(launcher.child.wait()?);
        Ok(Some(at))
    }

    /// Pids of the ranks that were started.
    pub fn rank_pids(&self) -> Vec<i32> {
        self.ranks.iter().map(|r| r.stamp.pid).collect()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for launcher in &mut self.launchers {
            // One that is stopped dies too.
            let _ = launcher.child.kill();
        }
        for pidfd in self.ranks.iter().filter_map(|r| r.pidfd.as_ref()) {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
        for launcher in &mut self.launchers {
            let _ = launcher.child.wait();
        }
        // Ranks that were on their way end when the pipe has no reader.
    }
}

/// Whether `fd` is readable within `patience`; a pidfd is when its process has ended.
fn wait_for(fd: &impl std::os::fd::AsFd, patience: Duration) -> Result<bool> {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left)?;
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&left)) {
            Ok(n) => return Ok(n > 0),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// The last lines.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}
