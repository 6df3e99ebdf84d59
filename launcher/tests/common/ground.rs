//! Where a launcher runs: in a control group of the test, in which it may make groups of its own, or may not.

use crate::harness::{alive, until};
use rustix::process::{Pid, Signal};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use tsm_launch::contain::{self, Kind};

pub struct Ground {
    /// How launchers contain their processes here.
    pub kind: Kind,
    /// `None` where the test may not make one.
    group: Option<PathBuf>,
}

/// Both kinds, where they can be had.
pub fn grounds() -> Vec<Ground> {
    let grounds = [Kind::Cgroup, Kind::Environment];
    grounds.into_iter().filter_map(Ground::new).collect()
}

impl Ground {
    pub fn new(kind: Kind) -> Option<Ground> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("tsm-test-{}-{number}", std::process::id());
        let made = contain::own_group().and_then(|own| {
            let path = own.join(name);
            fs_err::create_dir(&path).map_err(|e| e.to_string())?;
            Ok(path)
        });
        match made {
            Ok(path) => {
                if kind == Kind::Environment {
                    // Groups below it are refused.
                    fs_err::write(path.join("cgroup.max.descendants"), "0").expect("a group");
                }
                let group = Some(path);
                Some(Ground { kind, group })
            }
            Err(_) if kind == Kind::Environment => Some(Ground { kind, group: None }),
            Err(why) => {
                eprintln!(
                    "skipped: no control group can be made ({why}); needs root or delegation"
                );
                None
            }
        }
    }

    /// A command that runs here.
    #[expect(unsafe_code, reason = "it moves between fork and exec")]
    pub fn enter(&self, command: &mut Command) {
        let Some(group) = &self.group else { return };
        let mut options = fs_err::File::options();
        let procs = options.write(true).open(group.join("cgroup.procs"));
        let procs = procs.expect("a group").into_parts().0;
        let enter = move || (&procs).write_all(b"0");
        // SAFETY: the closure makes one system call, on a descriptor that is open.
        unsafe { command.pre_exec(enter) };
    }

    /// All that ever came from the launchers here and still lives, whatever it left.
    pub fn processes(&self) -> Vec<i32> {
        let read = |path: &Path| -> Vec<i32> {
            let text = fs_err::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
            text.lines().filter_map(|pid| pid.parse().ok()).collect()
        };
        let Some(group) = &self.group else {
            return Vec::new();
        };
        let below = self.groups().into_iter();
        let all = below.chain([group.clone()]).flat_map(|path| read(&path));
        all.filter(|pid| alive(*pid)).collect()
    }

    /// Groups that launchers have made here.
    pub fn groups(&self) -> Vec<PathBuf> {
        let entries = self
            .group
            .iter()
            .filter_map(|path| fs_err::read_dir(path).ok());
        let paths = entries.flatten().flatten().map(|entry| entry.path());
        paths.filter(|path| path.is_dir()).collect()
    }

    /// A group below that of the test.
    pub fn make(&self, name: &str) -> PathBuf {
        let path = self.group.as_ref().expect("a group").join(name);
        fs_err::create_dir(&path).expect("a group");
        path
    }

    /// Waits until no process and no group of a launcher is left.
    pub fn wait_until_empty(&self) {
        until("all processes and groups to be gone", || {
            let gone = self.processes().is_empty() && self.groups().is_empty();
            gone.then_some(())
        });
    }
}

impl Drop for Ground {
    /// After a test that failed, some may be left.
    fn drop(&mut self) {
        let Some(group) = &self.group else { return };
        let _ = fs_err::write(group.join("cgroup.kill"), "1");
        for _ in 0..1000 {
            for below in self.groups() {
                let _ = fs_err::remove_dir(below);
            }
            if fs_err::remove_dir(group).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

/// Kills a process that a test started outside all groups, when dropped.
pub struct Bystander(pub i32);

impl Drop for Bystander {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.0) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}
