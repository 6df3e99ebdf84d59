//! What a rank says to the bench: one line in a pipe, with the time at which it happened.

use std::fmt;
use std::str::FromStr;

/// What happened to a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Its program runs.
    Started,
    /// It watches the rank whose death it follows.
    Ready,
    /// SIGTERM was delivered.
    Signalled,
}

/// One line of a rank. Shorter than what a pipe takes as a whole (`PIPE_BUF`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub kind: Kind,
    pub rank: u32,
    pub pid: i32,
    /// Its launcher, where that starts its ranks itself.
    pub parent: i32,
    /// By the machine's real-time clock, since 1970.
    pub ns: u64,
}

/// Nanoseconds since 1970, by the clock that all processes of this machine share.
pub fn now_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |t| t.as_nanos() as u64)
}

/// Line `i` of a rank that prints: another one of another length for each.
pub fn log_line(rank: u32, i: u32) -> String {
    format!("{rank} {i} {}", "o".repeat(i as usize % 90))
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stamp {
            kind,
            rank,
            pid,
            parent,
            ns,
        } = self;
        write!(f, "{kind:?} {rank} {pid} {parent} {ns}")
    }
}

impl FromStr for Stamp {
    type Err = String;

    fn from_str(line: &str) -> Result<Stamp, String> {
        let wrong = || format!("no line of a rank: {line:?}");
        let (kind, numbers) = line.split_once(' ').ok_or_else(wrong)?;
        let kind = [Kind::Started, Kind::Ready, Kind::Signalled]
            .into_iter()
            .find(|k| format!("{k:?}") == kind)
            .ok_or_else(wrong)?;
        let numbers: Vec<u64> = numbers
            .split(' ')
            .map(|n| n.parse().map_err(|_| wrong()))
            .collect::<Result<_, _>>()?;
        let [rank, pid, parent, ns] = numbers[..] else {
            return Err(wrong());
        };
        Ok(Stamp {
            kind,
            rank: rank as u32,
            pid: pid as i32,
            parent: parent as i32,
            ns,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_comes_back_as_it_was() {
        let stamp = Stamp {
            kind: Kind::Signalled,
            rank: 1023,
            pid: 4_194_303,
            parent: 17,
            ns: now_ns(),
        };
        assert!(
            stamp.ns > 1_700_000_000_000_000_000,
            "nanoseconds since 1970"
        );
        assert_eq!(stamp.to_string().parse(), Ok(stamp));
        for bad in [
            "",
            "Started",
            "Started 1 2 3",
            "Gone 1 2 3 4",
            "Started 1 2 3 x",
        ] {
            assert!(bad.parse::<Stamp>().is_err(), "{bad}");
        }
    }
}
