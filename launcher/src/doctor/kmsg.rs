//! GPU faults, and processes that the out-of-memory killer ended, in the kernel's log.

use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, SeekFrom, open, seek};
use rustix::io::{Errno, read};
use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::time::Duration;

use crate::cluster::message::Finding;

/// Numbers of NVIDIA's list that speak of the hardware or the driver; others, such as 13, 31 and 43, are
/// mostly the fault of a program.
const HARDWARE: [u32; 13] = [48, 62, 64, 74, 79, 92, 94, 95, 110, 119, 120, 140, 143];

/// `NVRM: Xid (PCI:0000:81:00): 79, pid=1234, name=python, GPU has fallen off the bus.`
#[derive(Clone, Debug, PartialEq)]
pub struct Xid {
    /// Since the machine was started.
    pub at: Duration,
    pub number: u32,
    /// `PCI:0000:81:00`
    pub device: String,
    /// The line from `Xid` on.
    pub text: String,
}

/// Time since the machine was started, as [`Xid::at`] counts it.
pub fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// `Memory cgroup out of memory: Killed process 4711 (python) total-vm:35476kB, anon-rss:32512kB, ...`
#[derive(Clone, Debug, PartialEq)]
pub struct Kill {
    /// In the machine's first namespace of processes.
    pub pid: i32,
    pub text: String,
}

/// The kernel's log, from one record on.
pub struct Log(OwnedFd);

/// What it holds that matters here.
#[derive(Debug, PartialEq)]
pub struct Logged {
    pub xids: Vec<Xid>,
    pub kills: Vec<Kill>,
    /// Nothing was overwritten before it was read.
    pub is_whole: bool,
}

impl Log {
    /// From the oldest record that is left; `None` where it may not be read.
    pub fn whole() -> Option<Log> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        open("/dev/kmsg", flags, Mode::empty()).ok().map(Log)
    }

    /// From the next record on; `None` where it may not be read.
    pub fn from_now() -> Option<Log> {
        let log = Log::whole()?;
        seek(&log.0, SeekFrom::End(0)).ok()?;
        Some(log)
    }

    /// All that came since the last time; `None` where it cannot be read.
    pub fn read(&self) -> Option<Logged> {
        let mut logged = Logged {
            xids: Vec::new(),
            kills: Vec::new(),
            is_whole: true,
        };
        let mut record = [0; 8192];
        loop {
            match read(&self.0, &mut record) {
                Ok(0) | Err(Errno::AGAIN) => return Some(logged),
                Ok(len) => {
                    let record = String::from_utf8_lossy(&record[..len]);
                    logged.xids.extend(Xid::parse(&record));
                    logged.kills.extend(Kill::parse(&record));
                }
                Err(Errno::PIPE) => logged.is_whole = false,
                // It is longer than any of ours.
                Err(Errno::INTR | Errno::INVAL) => {}
                Err(_) => return None,
            }
        }
    }
}

/// `4,1234,5678901,-;NVRM: Xid (...): ...`: the third field counts microseconds; the first holds the level, and eight
/// times who wrote the record, 0 for the kernel.
fn parts(record: &str) -> Option<(Duration, &str)> {
    let (head, text) = record.lines().next()?.split_once(';')?;
    let mut fields = head.split(',');
    let is_kernels = fields.next()?.parse::<u32>().ok()? < 8;
    let at = Duration::from_micros(fields.nth(1)?.parse().ok()?);
    is_kernels.then_some((at, text))
}

impl Xid {
    fn parse(record: &str) -> Option<Xid> {
        let (at, text) = parts(record)?;
        let text = text.strip_prefix("NVRM: ")?;
        let (device, rest) = text.strip_prefix("Xid (")?.split_once("): ")?;
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        Some(Xid {
            at,
            number: digits.parse().ok()?,
            device: device.into(),
            text: text.into(),
        })
    }
}

impl Kill {
    fn parse(record: &str) -> Option<Kill> {
        let (_, text) = parts(record)?;
        let (why, rest) = text.split_once(": Killed process ")?;
        let pid = rest.split_once(" (")?.0.parse().ok()?;
        let text = text.into();
        why.to_ascii_lowercase()
            .contains("out of memory")
            .then_some(Kill { pid, text })
    }
}

/// One warning for each kind of fault of each GPU.
pub fn judge(xids: &[Xid], now: Duration) -> Vec<Finding> {
    let mut kinds: BTreeMap<(&str, u32), Vec<&Xid>> = BTreeMap::new();
    for xid in xids.iter().filter(|x| HARDWARE.contains(&x.number)) {
        kinds
            .entry((&xid.device, xid.number))
            .or_default()
            .push(xid);
    }
    let warning = |all: Vec<&Xid>| {
        let last = all.iter().max_by_key(|x| x.at)?;
        let ago = ago(now.saturating_sub(last.at));
        let times = if all.len() > 1 {
            format!(", {} times in all", all.len())
        } else {
            String::new()
        };
        Some(Finding::warning(
            "gpu",
            format!(
                "the kernel logged a GPU fault {ago} ago{times}: {}",
                last.text
            ),
            "if the GPU was not reset since (nvidia-smi -r) or the fault returns, leave this node out; \
             docs.nvidia.com/deploy/xid-errors explains the number",
        ))
    };
    kinds.into_values().filter_map(warning).collect()
}

fn ago(time: Duration) -> String {
    match time.as_secs() {
        s @ 0..120 => format!("{s} s"),
        s @ 120..7_200 => format!("{} min", s / 60),
        s @ 7_200..172_800 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOST: &str = "4,1234,5678901,-;NVRM: Xid (PCI:0000:81:00): 79, pid=1234, name=python, GPU has fallen off the bus.\n SUBSYSTEM=pci\n";

    #[test]
    fn a_fault_is_read_from_its_record() {
        let xid = Xid::parse(LOST).unwrap();
        assert_eq!((xid.number, xid.device.as_str()), (79, "PCI:0000:81:00"));
        assert_eq!(xid.at, Duration::from_micros(5_678_901));
        assert!(
            xid.text.starts_with("Xid (PCI") && xid.text.ends_with("off the bus."),
            "{}",
            xid.text
        );
        for other in [
            "6,1,0,-;Linux version 6.1",
            "4,1,2,-;NVRM: loading",
            // Written by a program.
            "12,1,2,-;NVRM: Xid (PCI:0000:81:00): 79, pid=1234",
            "nonsense",
            "",
        ] {
            assert_eq!(Xid::parse(other), None, "{other}");
        }
    }

    #[test]
    fn hardware_is_told_from_programs_and_repeats_are_one_finding() {
        let lost = Xid::parse(LOST).unwrap();
        let again = Xid {
            at: Duration::from_secs(3600),
            ..lost.clone()
        };
        let program = Xid {
            number: 31,
            ..lost.clone()
        };
        let found = judge(&[lost, program, again], Duration::from_secs(3 * 3600));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0]
                .text
                .contains("2 h ago, 2 times in all: Xid (PCI:0000:81:00): 79"),
            "{found:?}"
        );
    }

    #[test]
    fn a_kill_is_read_as_the_kernel_writes_it() {
        let killed = "Killed process 4711 (python x) total-vm:35476kB, anon-rss:32512kB, UID:0";
        for why in [
            "Memory cgroup out of memory",
            "Out of memory",
            "Out of memory (oom_kill_allocating_task)",
        ] {
            let kill = Kill::parse(&format!("3,9,1,-;{why}: {killed}\n")).unwrap();
            assert_eq!((kill.pid, kill.text), (4711, format!("{why}: {killed}")));
        }
        for other in [
            format!("11,9,1,-;Out of memory: {killed}"),
            format!("3,9,1,-;Tasks: {killed}"),
            "6,9,1,-;oom_reaper: reaped process 4711 (python)".into(),
            LOST.into(),
        ] {
            assert_eq!(Kill::parse(&other), None, "{other}");
        }
    }

    #[test]
    fn the_log_of_this_machine_is_read_without_waiting() {
        // Allowed or not, it returns.
        let _ = Log::whole().and_then(|log| log.read());
        let Some(log) = Log::from_now() else { return };
        let Some(new) = log.read() else { return };
        assert!(new.is_whole && new.kills.len() <= 1, "{new:?}");
    }
}
