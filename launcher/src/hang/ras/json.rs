//! The answer as JSON, of NCCL 2.28.7 and newer.

use serde::Deserialize;
use std::collections::BTreeMap;

use super::status::{Behind, Communicator, Member, Status};

#[derive(Deserialize)]
pub struct Answer {
    nccl_version: Option<String>,
    communicators: Vec<Comm>,
}

#[derive(Deserialize)]
struct Comm {
    hash: String,
    size: Option<u32>,
    #[serde(default)]
    ranks: Vec<Rank>,
    #[serde(default)]
    missing_ranks: Vec<Rank>,
}

#[derive(Deserialize)]
struct Rank {
    rank: u32,
    host: Option<String>,
    pid: Option<i32>,
    cuda_dev: Option<i32>,
    #[serde(default)]
    status: State,
    #[serde(default)]
    collective_counts: BTreeMap<String, u64>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct State {
    unresponsive: bool,
    considered_dead: bool,
}

impl Rank {
    fn member(&self) -> Member {
        Member {
            rank: Some(self.rank),
            pid: self.pid,
            node: self.host.clone(),
            gpu: self.cuda_dev.map(|d| d.to_string()),
            dead: self.status.considered_dead,
        }
    }
}

impl Answer {
    pub fn into_status(self) -> Status {
        let mut silent: Vec<Member> = Vec::new();
        let mut communicators = Vec::new();
        for comm in &self.communicators {
            // A process that answers but is no member has not yet joined, or has left.
            let absent = |r: &&Rank| r.status.unresponsive || r.status.considered_dead;
            let missing: Vec<Member> =
                (comm.missing_ranks.iter().filter(absent).map(Rank::member)).collect();
            for member in &missing {
                if !silent
                    .iter()
                    .any(|s| (s.pid, &s.node) == (member.pid, &member.node))
                {
                    silent.push(Member {
                        rank: None,
                        ..member.clone()
                    });
                }
            }
            let mut counts: BTreeMap<&str, Vec<(Member, u64)>> = BTreeMap::new();
            for rank in &comm.ranks {
                for (operation, count) in &rank.collective_counts {
                    counts
                        .entry(operation)
                        .or_default()
                        .push((rank.member(), *count));
                }
            }
            let behind: Vec<_> = (counts.iter())
                .flat_map(|(operation, counts)| behind(operation, counts))
                .collect();
            if !missing.is_empty() || !behind.is_empty() {
                communicators.push(Communicator {
                    hash: comm.hash.trim_start_matches("0x").to_string(),
                    size: comm.size,
                    missing,
                    behind,
                });
            }
        }
        Status {
            nccl: self.nccl_version,
            num_communicators: Some(self.communicators.len()),
            silent,
            communicators,
        }
    }
}

/// The ranks whose count is not the highest.
fn behind(operation: &str, counts: &[(Member, u64)]) -> Vec<Behind> {
    let most = counts.iter().map(|(_, count)| *count).max().unwrap_or(0);
    let late = counts.iter().filter(|(_, count)| *count < most);
    late.map(|(member, count)| Behind {
        member: member.clone(),
        operation: Some(operation.into()),
        count: *count,
        most,
    })
    .collect()
}
