//! What the kernel's out-of-memory killer did meanwhile, and to whom; and what else its log tells.

use serde::{Deserialize, Serialize};

use crate::doctor::kmsg::{Kill, Log, Logged, Xid};

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
    /// In words; `None` of none.
    pub fn words(self) -> Option<String> {
        let all = Some(self.all).filter(|&all| all > 0)?;
        Some(format!(
            "the kernel's out-of-memory killer ended {all} process(es)"
        ))
    }
}

/// Where the kernel's counter and its log stand at a moment.
pub struct Mark {
    count: u64,
    log: Option<Log>,
}

/// What came since.
pub struct Since {
    pub oom_kills: OomKills,
    pub xids: Vec<Xid>,
    /// By the numbers that processes have here.
    kills: Vec<Kill>,
}

impl Mark {
    /// A kill is counted first and logged then. So the counter is read first, here and later: a kill in between is
    /// one that nothing tells, never one that hides another.
    pub fn now() -> Mark {
        Mark {
            count: count(),
            log: Log::from_now(),
        }
    }

    /// Tells each record of the log once.
    pub fn since(&self) -> Since {
        let all = count().saturating_sub(self.count);
        let logged = self.log.as_ref().and_then(Log::read);
        Since::new(all, logged, is_in_first_namespace())
    }
}

impl Since {
    /// `is_ours`: the log has the numbers that are known here.
    fn new(all: u64, logged: Option<Logged>, is_ours: bool) -> Since {
        let Some(logged) = logged else {
            return Since {
                oom_kills: OomKills { all, unnamed: all },
                xids: Vec::new(),
                kills: Vec::new(),
            };
        };
        let named = match is_ours && logged.is_whole {
            true => logged.kills.len() as u64,
            false => 0,
        };
        let unnamed = all.saturating_sub(named);
        Since {
            oom_kills: OomKills { all, unnamed },
            xids: logged.xids,
            kills: if is_ours { logged.kills } else { Vec::new() },
        }
    }

    /// What the log says of the end of a process.
    pub fn kill_of(&self, pid: i32) -> Option<&str> {
        let kill = self.kills.iter().find(|kill| kill.pid == pid);
        kill.map(|Kill { text, .. }| text.as_str())
    }
}

fn is_in_first_namespace() -> bool {
    let own = fs_err::read_link("/proc/self/ns/pid");
    own.is_ok_and(|own| own.as_os_str() == FIRST_NAMESPACE)
}

/// How many processes it has ended since the machine started.
fn count() -> u64 {
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
        let since = |all, is_whole, is_ours| {
            let logged = Logged {
                xids: Vec::new(),
                kills: vec![kill(7), kill(8)],
                is_whole,
            };
            Since::new(all, Some(logged), is_ours)
        };
        let unnamed = |all, is_whole, is_ours| {
            let OomKills { all: told, unnamed } = since(all, is_whole, is_ours).oom_kills;
            assert_eq!(told, all);
            unnamed
        };
        assert_eq!(Since::new(2, None, true).oom_kills.unnamed, 2);
        assert_eq!(unnamed(2, false, true), 2);
        assert_eq!([3, 2, 1].map(|all| unnamed(all, true, true)), [1, 0, 0]);
        assert_eq!([3, 2, 1].map(|all| unnamed(all, true, false)), [3, 2, 1]);
        assert_eq!(since(2, false, true).kill_of(8), Some("killed 8"));
        assert_eq!(since(2, false, false).kill_of(8), None);
        assert_eq!(since(2, true, true).kill_of(9), None);
        assert_eq!(Since::new(2, None, true).kill_of(8), None);
    }
}
