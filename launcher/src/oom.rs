//! What the kernel's out-of-memory killer did meanwhile, and to whom.

use serde::{Deserialize, Serialize};

use crate::doctor::kmsg::{Kill, Logged};

/// The number that the kernel gives the first namespace of processes, in which its log counts them.
const FIRST_NAMESPACE: &str = "pid:[4026531836]";

/// How many processes of a machine it has ended meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OomKills {
    pub all: u64,
    /// Of which nothing tells the process.
    pub unnamed: u64,
}

impl OomKills {
    /// From the kernel's counter, and from its log where that can be read and has the numbers that are known here.
    /// The counter is to be read before the log at the end, and before its position at the start: a kill is counted
    /// first and logged then.
    pub fn new(all: u64, logged: Option<&Logged>) -> OomKills {
        let named = logged.filter(|logged| logged.is_whole && is_in_first_namespace());
        let named = named.map_or(0, |logged| logged.kills.len() as u64);
        OomKills {
            all,
            unnamed: all.saturating_sub(named),
        }
    }
}

/// What the log says of the end of a process.
pub fn of_process(logged: Option<&Logged>, pid: i32) -> Option<&str> {
    let logged = logged.filter(|_| is_in_first_namespace())?;
    let kill = logged.kills.iter().find(|kill| kill.pid == pid);
    kill.map(|Kill { text, .. }| text.as_str())
}

fn is_in_first_namespace() -> bool {
    let own = fs_err::read_link("/proc/self/ns/pid");
    own.is_ok_and(|own| own.as_os_str() == FIRST_NAMESPACE)
}

/// How many processes it has ended since the machine started.
pub fn count() -> u64 {
    let text = fs_err::read_to_string("/proc/vmstat").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_log_with_our_numbers_clears_a_process() {
        let kill = |pid| Kill {
            pid,
            text: format!("killed {pid}"),
        };
        let logged = |is_whole| Logged {
            xids: Vec::new(),
            kills: vec![kill(7), kill(8)],
            is_whole,
        };
        let unnamed = |all, logged: Option<Logged>| OomKills::new(all, logged.as_ref()).unnamed;
        assert_eq!(unnamed(2, None), 2);
        assert_eq!(unnamed(2, Some(logged(false))), 2);
        let (third, second, first) = match is_in_first_namespace() {
            true => (1, 0, 0),
            false => (3, 2, 1),
        };
        assert_eq!(unnamed(3, Some(logged(true))), third);
        assert_eq!(unnamed(2, Some(logged(true))), second);
        assert_eq!(unnamed(1, Some(logged(true))), first);
        let text = is_in_first_namespace().then_some("killed 8");
        assert_eq!(of_process(Some(&logged(false)), 8), text);
        assert_eq!(of_process(Some(&logged(true)), 9), None);
        assert_eq!(of_process(None, 8), None);
    }
}
