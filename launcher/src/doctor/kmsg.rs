//! GPU faults in the kernel's log.

use rustix::fs::{Mode, OFlags, open};
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

/// The faults logged since `since`; `None` where the log may not be read.
pub fn xids(since: Duration) -> Option<Vec<Xid>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let log = open("/dev/kmsg", flags, Mode::empty()).ok()?;
    let mut found = Vec::new();
    let mut record = [0; 8192];
    loop {
        match read(&log, &mut record) {
            Ok(0) | Err(Errno::AGAIN) => return Some(found),
            Ok(len) => found
                .extend(parse(&String::from_utf8_lossy(&record[..len])).filter(|x| x.at >= since)),
            // A record was overwritten before it was read; or it is longer than any of ours.
            Err(Errno::PIPE | Errno::INTR | Errno::INVAL) => {}
            Err(_) => return None,
        }
    }
}

/// `4,1234,5678901,-;NVRM: Xid (...): ...`: the third field counts microseconds.
fn parse(record: &str) -> Option<Xid> {
    let (head, text) = record.lines().next()?.split_once(';')?;
    let at = Duration::from_micros(head.split(',').nth(2)?.parse().ok()?);
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
        let xid = parse(LOST).unwrap();
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
            "nonsense",
            "",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn hardware_is_told_from_programs_and_repeats_are_one_finding() {
        let lost = parse(LOST).unwrap();
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
    fn the_log_of_this_machine_is_read_without_waiting() {
        // Allowed or not, it returns.
        assert_eq!(xids(Duration::MAX).unwrap_or_default(), []);
    }
}
