//! What an answer says, whichever its format.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What an answer says is wrong. Empty: nothing that was understood.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of NCCL.
    pub nccl: Option<String>,
    /// How many communicators there are, these and those without faults; only JSON tells.
    pub num_communicators: Option<usize>,
    /// Processes that do not answer.
    pub silent: Vec<Member>,
    pub communicators: Vec<Communicator>,
}

/// A communicator about which there is something to say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Communicator {
    /// Its hash, as in NCCL's own log, in hexadecimal digits.
    pub hash: String,
    /// Number of ranks, where it is said.
    pub size: Option<u32>,
    /// No data from these.
    pub missing: Vec<Member>,
    /// These have launched fewer operations than others. While the job moves that is usual; in one that hangs the
    /// others wait for them.
    pub behind: Vec<Behind>,
}

/// A rank of a communicator, or a process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// In its communicator, which need not be the rank in the job.
    pub rank: Option<u32>,
    pub pid: Option<i32>,
    pub node: Option<String>,
    pub gpu: Option<String>,
    /// NCCL has given it up.
    pub dead: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Behind {
    pub member: Member,
    /// `AllReduce`; `None` before NCCL 2.26.
    pub operation: Option<String>,
    /// Operations launched.
    pub count: u64,
    /// By the foremost.
    pub most: u64,
}

impl Status {
    /// Ranks of the communicators of `world_size` ranks, in which ranks usually have the job's numbers, that
    /// do not answer; without any, those that are behind.
    pub fn suspects(&self, world_size: u32) -> Vec<u32> {
        let whole = || {
            let is_whole = move |c: &&Communicator| c.size == Some(world_size);
            self.communicators.iter().filter(is_whole)
        };
        let missing = whole()
            .flat_map(|c| c.missing.iter())
            .filter_map(|m| m.rank);
        let behind = whole()
            .flat_map(|c| c.behind.iter())
            .filter_map(|b| b.member.rank);
        let mut ranks: Vec<u32> = missing.collect();
        if ranks.is_empty() {
            ranks = behind.collect();
        }
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rank = self.rank.map(|r| format!("rank {r}"));
        let pid = self.pid.map(|p| format!("process {p}"));
        let node = self.node.as_ref().map(|n| format!("on {n}"));
        let gpu = self.gpu.as_ref().map(|g| format!("GPU {g}"));
        let place: Vec<String> = [pid, node, gpu].into_iter().flatten().collect();
        match (rank, place.is_empty()) {
            (Some(rank), true) => write!(f, "{rank}"),
            (Some(rank), false) => write!(f, "{rank} ({})", place.join(" ")),
            (None, _) => write!(f, "{}", place.join(" ")),
        }?;
        write!(f, "{}", if self.dead { ", given up as dead" } else { "" })
    }
}

impl fmt::Display for Status {
    /// A line for each fault, at most 8 members in each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST: usize = 8;
        let more = |n: usize| match n.saturating_sub(MOST) {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        let list = |members: &[Member]| {
            let shown: Vec<String> = members.iter().take(MOST).map(Member::to_string).collect();
            shown.join(", ") + &more(members.len())
        };
        if !self.silent.is_empty() {
            writeln!(f, "no answer from {}", list(&self.silent))?;
        }
        for communicator in &self.communicators {
            let name = match communicator.size {
                Some(size) => format!("communicator {} of {size} ranks", communicator.hash),
                None => format!("communicator {}", communicator.hash),
            };
            if !communicator.missing.is_empty() {
                writeln!(f, "{name}: no data from {}", list(&communicator.missing))?;
            }
            for behind in communicator.behind.iter().take(MOST) {
                let operation = behind.operation.as_deref().unwrap_or("operation");
                let (member, count, most) = (&behind.member, behind.count, behind.most);
                writeln!(
                    f,
                    "{name}: {member} has launched {operation} {count}, others {most}"
                )?;
            }
            if communicator.behind.len() > MOST {
                let rest = more(communicator.behind.len());
                writeln!(f, "{name}: {} that are behind", &rest[2..])?;
            }
        }
        Ok(())
    }
}
