//! What happens to a job, as its manifest tells it. Pure: `now`, from the start of the launcher, and `time`, the same
//! moment, are arguments.

use std::time::Duration;

use super::generations::{self, Culprit};
use super::{LeftOut, Manifest, Node, RankEntry, versions};
use crate::clock::Utc;
use crate::cluster::coordinator::{Ending, Excluded, Launched, Spawned};
use crate::cluster::message::{About, Join};

/// Versions that are taken in; workers say what they like.
const MAX_VERSIONS: usize = 64;

impl Manifest {
    pub fn started(&mut self, launched: &Launched, now: Duration, time: Utc) {
        self.world_size = launched.world_size as usize;
        for (_, node) in &launched.members {
            let node = Node::from(&node.join);
            if !self.nodes.contains(&node) {
                self.nodes.push(node);
            }
        }
        let joins: Vec<&Join> = launched.members.iter().map(|(_, n)| &n.join).collect();
        self.versions.extend(versions::of_nodes(&joins));
        self.generations.start(
            now,
            time.rfc3339(),
            launched.world_size,
            joins.iter().map(|join| join.host.clone()).collect(),
            launched.resumed_from.clone(),
        );
        let entries = launched.members.iter().flat_map(|(member, node)| {
            let ranks = member.ranks.clone().zip(&node.join.devices);
            ranks.map(|(rank, device)| RankEntry {
                rank,
                pid: None,
                device: device.clone(),
                cores: None,
                end: None,
            })
        });
        self.ranks = entries.collect();
    }

    pub fn spawned(&mut self, spawned: Spawned) {
        let Spawned {
            first_rank,
            pids,
            cores,
            environment,
        } = spawned;
        let mut cores = cores.into_iter();
        let entries = self.ranks.iter_mut().skip(first_rank as usize);
        for (entry, pid) in entries.zip(pids) {
            entry.pid = Some(pid);
            entry.cores = cores.next().filter(|list| !list.is_empty());
        }
        if !environment.is_empty() {
            self.environment = environment;
        }
    }

    /// What the workers say of themselves.
    pub fn told(&mut self, word: About) {
        match word {
            About::Versions(versions) => {
                let room = MAX_VERSIONS.saturating_sub(self.versions.len());
                self.versions.extend(versions.into_iter().take(room));
            }
            About::Resumed { path, step } => {
                let path = path.to_string_lossy().into_owned();
                self.generations.resumed(path, step);
            }
        }
    }

    pub fn left_out(&mut self, excluded: Excluded, time: Utc) {
        self.left_out.push(LeftOut::at(time, excluded));
    }

    pub fn ended(&mut self, ending: &Ending, time: Utc) {
        if let Some(steps) = ending.steps {
            self.generations.step(ending.ended_at, steps);
        }
        let failure = ending.failure.as_deref();
        let cause = match (ending.outcome, &ending.reason) {
            ("failed", Some(reason)) => reason.to_string(),
            (outcome, Some(reason)) => format!("{outcome}: {reason}"),
            (outcome, None) => outcome.to_string(),
        };
        let culprit = failure.and_then(|f| {
            let (rank, device) = (f.rank? as u32, f.device.clone().unwrap_or_default());
            Some(Culprit {
                rank,
                host: f.host.clone(),
                device,
            })
        });
        let why = generations::Ending {
            cause,
            class: failure.map(|f| f.class),
            culprit,
        };
        self.generations.end(time.rfc3339(), why);
        for (i, entry) in self.ranks.iter_mut().enumerate() {
            entry.end = ending.ends.get(i).copied().flatten();
            // Of ranks on a lost node nothing is reported.
            let pid = ending.pids.get(i).copied().filter(|&pid| pid > 0);
            entry.pid = pid.or(entry.pid);
        }
        if !ending.again {
            self.outcome = match ending.outcome {
                "saved" => "stopped",
                outcome => outcome,
            };
        }
    }
}
