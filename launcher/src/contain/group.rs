//! A control group (version 2) for the processes of a generation.
//!
//! It lies in the group of this process and has no controllers, so limits and counts of memory stay where they were.
//! Whoever uses it holds a shared lock on its folder: one that nobody locks is left over from a launcher that died
//! and whose guard died with it, and is removed by the next one if it is empty.

use rustix::fs::{Access, FlockOperation, access, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use super::Process;
use super::carriers::Look;
use crate::own::Executable;
use crate::shim;
use crate::stat::Stat;

const PREFIX: &str = "tsm-launch.";
const TRIES: u32 = 5;
/// Of a run id in the name; the kernel's limit for all of it is 255.
const MAX_RUN_ID: usize = 120;

pub fn name(run_id: &str, generation: u32, mark: &str) -> String {
    let plain = |c: char| match c {
        c if c.is_ascii_alphanumeric() || "-_".contains(c) => c,
        _ => '_',
    };
    let run_id: String = run_id.chars().take(MAX_RUN_ID).map(plain).collect();
    format!("{PREFIX}{run_id}.{generation}.{mark}")
}

pub struct Group {
    pub path: PathBuf,
    _lock: Option<File>,
}

impl Group {
    /// Makes an empty group in that of this process; its name begins with `name`.
    ///
    /// # Errors
    /// Why this is not possible here.
    pub fn create(name: &str) -> Result<Group, String> {
        Group::create_in(&own()?, name)
    }

    fn create_in(own: &Path, name: &str) -> Result<Group, String> {
        remove_left_over(own);
        let mut why = String::new();
        // Before it is locked, another launcher may take it for one that is left over. That one removes what it finds
        // by its name, perhaps only after the next try has begun: no name is used twice.
        for attempt in 0..TRIES {
            let path = own.join(format!("{name}.{attempt}"));
            fs_err::create_dir(&path).map_err(|e| e.to_string())?;
            let group = Group {
                _lock: lock(&path, FlockOperation::NonBlockingLockShared),
                path: path.clone(),
            };
            match group.unusable() {
                None => return Ok(group),
                Some(reason) => why = reason,
            }
            if !group.remove() {
                break;
            }
        }
        Err(why)
    }

    fn unusable(&self) -> Option<String> {
        if self._lock.is_none() {
            return Some(format!("{} cannot be locked", self.path.display()));
        }
        let kind = fs_err::read_to_string(self.path.join("cgroup.type")).unwrap_or_default();
        // In a group of threads another one cannot hold processes.
        (kind.trim() != "domain").then(|| format!("{} is {:?}", self.path.display(), kind.trim()))
    }

    /// Starts to find out whether a process can really be moved into it, which a security module may forbid.
    ///
    /// # Errors
    /// When none can be started.
    pub fn try_out(self, shim: &Executable) -> Result<Trial, String> {
        let mut command = shim.command();
        command.arg(shim::ENTER).arg(&self.path);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.stderr(Stdio::null()).spawn();
        Ok(Trial {
            child: child.map_err(|e| e.to_string())?,
            group: Some(self),
        })
    }

    /// One that another process made.
    pub fn join(path: PathBuf) -> Group {
        let _lock = lock(&path, FlockOperation::NonBlockingLockShared);
        Group { path, _lock }
    }

    /// One that is gone is empty; one that cannot be looked at, since no descriptor is left, need not be.
    pub fn is_empty(&self) -> bool {
        match fs_err::read_to_string(self.path.join("cgroup.events")) {
            Ok(text) => text.lines().any(|line| line == "populated 0"),
            Err(_) => !self.path.exists(),
        }
    }

    pub fn look(&self) -> Look {
        let process = |pid| {
            let stat = Stat::read(pid).filter(Stat::is_alive)?;
            Some(Process { pid, stat })
        };
        Look {
            found: self.pids().into_iter().filter_map(process).collect(),
            is_sure: true,
        }
    }

    /// Of this group and those that its processes made below it.
    fn pids(&self) -> Vec<i32> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut pids = Vec::new();
        for folder in with_below(&self.path) {
            let text = fs_err::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|pid| pid.parse::<i32>().ok()));
        }
        pids
    }

    pub fn signal(&self, processes: &[Process], signal: Signal) {
        let open = |process: &Process| {
            let pidfd = pidfd_open(Pid::from_raw(process.pid)?, PidfdFlags::empty()).ok()?;
            Some((process.pid, pidfd))
        };
        let opened: Vec<_> = processes.iter().filter_map(open).collect();
        // A number that is still a member's has not been used again for another process.
        let members = self.pids();
        for (_, pidfd) in opened.iter().filter(|(pid, _)| members.contains(pid)) {
            let _ = pidfd_send_signal(pidfd, signal);
        }
    }

    pub fn kill(&self) {
        use std::io::Write;
        let killed = file(&self.path, "cgroup.kill").and_then(|mut file| file.write_all(b"1"));
        // Before Linux 5.14.
        if killed.is_err() {
            self.signal(&self.look().found, Signal::KILL);
        }
    }

    /// Whether it is gone now.
    pub fn remove(&self) -> bool {
        remove(&self.path)
    }
}

/// A file of a group, to be written to.
pub fn file(group: &Path, name: &str) -> std::io::Result<fs_err::File> {
    let mut options = fs_err::File::options();
    options.write(true).open(group.join(name))
}

/// A process that tries to enter a group.
pub struct Trial {
    child: Child,
    group: Option<Group>,
}

impl Trial {
    /// Whether it could. Waits for it.
    pub fn is_passed(&mut self) -> bool {
        let passed = self.child.wait().is_ok_and(|status| status.success());
        if let Some(group) = self.group.take() {
            group.remove();
        }
        passed
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.is_passed();
    }
}

fn lock(path: &Path, how: FlockOperation) -> Option<File> {
    let folder: File = fs_err::File::open(path).ok()?.into_parts().0;
    flock(&folder, how).ok().map(|()| folder)
}

/// A group and all below it, the lowest last.
fn with_below(path: &Path) -> Vec<PathBuf> {
    let mut all = vec![path.to_path_buf()];
    let mut next = 0;
    while let Some(folder) = all.get(next) {
        let entries = fs_err::read_dir(folder).into_iter().flatten().flatten();
        let folders = entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir()));
        let below: Vec<PathBuf> = folders.map(|e| e.path()).collect();
        all.extend(below);
        next += 1;
    }
    all
}

/// Whether it is gone now. The kernel removes no group that holds a process.
fn remove(path: &Path) -> bool {
    for folder in with_below(path).iter().rev() {
        match fs_err::remove_dir(folder) {
            Err(e) if e.kind() != ErrorKind::NotFound => return false,
            _ => {}
        }
    }
    true
}

fn remove_left_over(own: &Path) {
    let entries = fs_err::read_dir(own).into_iter().flatten().flatten();
    for entry in entries.filter(|e| e.file_name().to_string_lossy().starts_with(PREFIX)) {
        let path = entry.path();
        // Held until it is removed, so that one which another launcher has just made and locks now is not.
        if let Some(_lock) = lock(&path, FlockOperation::NonBlockingLockExclusive) {
            remove(&path);
        }
    }
}

/// The folder of the group of this process, if it may have others in it.
pub fn own() -> Result<PathBuf, String> {
    let read = |path| fs_err::read_to_string(path).map_err(|e| e.to_string());
    let own = find(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?)?;
    // To move a process, one needs the right to write to what holds both groups.
    match access(own.join("cgroup.procs"), Access::WRITE_OK) {
        Ok(()) => Ok(own),
        Err(e) => Err(format!("{}: {e}", own.display())),
    }
}

/// The folder of a group by `/proc/self/cgroup` and `/proc/self/mountinfo`.
fn find(groups: &str, mounts: &str) -> Result<PathBuf, String> {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::"));
    let own = Path::new(own.ok_or("the kernel has no control groups of version 2")?);
    let mount = |line: &str| {
        let (fields, kind) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        let writable = fields.next()?.split(',').any(|option| option == "rw");
        // A container may see a part only, at whose top it need not be.
        let below = own.strip_prefix(root).ok()?;
        (kind.starts_with("cgroup2 ") && !below.starts_with(".."))
            .then(|| (Path::new(at).join(below), writable))
    };
    let mounts: Vec<_> = mounts.lines().filter_map(mount).collect();
    match (
        mounts.iter().find(|(_, writable)| *writable),
        mounts.first(),
    ) {
        (Some((path, _)), _) => Ok(path.clone()),
        (None, Some((path, _))) => Err(format!("{} is mounted read-only", path.display())),
        (None, None) => Err("control groups of version 2 are not mounted".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    const HYBRID: &str = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";
    const RO: &str = "41 31 0:38 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate";

    #[test]
    fn the_own_group_is_found_where_it_is_mounted() {
        let find = |groups, mounts| find(groups, mounts).map(|p| p.display().to_string());
        let v1 = "4:memory:/a\n0::/\n";
        assert_eq!(find(v1, HYBRID).unwrap(), "/sys/fs/cgroup/unified/");
        let own = "0::/user.slice/app.scope\n";
        let expected = "/sys/fs/cgroup/unified/user.slice/app.scope";
        assert_eq!(find(own, HYBRID).unwrap(), expected);
        // Bound from the host, and a writable mount beside a read-only one.
        let bound = "5 1 0:38 /docker/1 /sys/fs/cgroup rw - cgroup2 cgroup rw";
        let both = format!("{RO}\n{bound}");
        assert_eq!(find("0::/docker/1\n", &both).unwrap(), "/sys/fs/cgroup/");
        for (groups, mounts, why) in [
            ("4:memory:/a\n", HYBRID, "no control groups of version 2"),
            ("0::/a\n", "", "not mounted"),
            ("0::/a\n", RO, "/sys/fs/cgroup/a is mounted read-only"),
            ("0::/../a\n", HYBRID, "not mounted"),
            ("0::/docker/2\n", bound, "not mounted"),
        ] {
            let error = find(groups, mounts).unwrap_err();
            assert!(error.contains(why), "{groups} {mounts}: {error}");
        }
    }

    /// Launchers that start at the same time remove what is left over while the others make their groups.
    #[test]
    fn a_group_that_was_made_stays_while_others_remove_what_is_left_over() {
        let own = match own() {
            Ok(own) => own,
            Err(why) => return eprintln!("skipped: {why}"),
        };
        // Not beside the groups of the other tests.
        let own = own.join(format!("test.{}", std::process::id()));
        if let Err(e) = fs_err::create_dir(&own) {
            return eprintln!("skipped: {e}");
        }
        let usable = Group::create_in(&own, &name("alone", 0, "0"));
        if let Err(why) = usable.map(|group| group.remove()) {
            remove(&own);
            return eprintln!("skipped: {why}");
        }
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        remove_left_over(&own);
                    }
                });
            }
            let (mut made, mut gone) = (0, Vec::new());
            for i in 0..200 {
                // All tries may have met one that removes.
                let Ok(group) = Group::create_in(&own, &name("race", i, "0")) else {
                    continue;
                };
                made += 1;
                for _ in 0..20 {
                    std::thread::yield_now();
                }
                if !group.path.join("cgroup.procs").exists() {
                    gone.push(i);
                }
                group.remove();
            }
            done.store(true, Ordering::Relaxed);
            assert!(gone.is_empty(), "removed by others: {gone:?}");
            assert!(made >= 100, "{made} of 200 were made");
        });
        fs_err::remove_dir(&own).unwrap();
    }

    #[test]
    fn a_group_that_cannot_be_looked_at_is_not_taken_for_empty() {
        let folder = tempfile::tempdir().unwrap();
        let (path, _lock) = (folder.path().join("group"), None);
        let group = Group { path, _lock };
        assert!(group.is_empty(), "it is gone");
        fs_err::create_dir(&group.path).unwrap();
        assert!(!group.is_empty());
    }

    #[test]
    fn a_name_is_a_file_name_that_no_controller_has() {
        assert_eq!(name("a/b c.d-e", 3, "ff"), "tsm-launch.a_b_c_d-e.3.ff");
        assert!(name(&"ü".repeat(999), u32::MAX, &"f".repeat(16)).len() < 200);
    }
}
