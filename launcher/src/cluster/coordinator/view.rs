//! What a status shows of the state.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Phase, State};
use crate::cluster::message::Progress;
use crate::median::median;
use crate::status::{NodeStatus, RankStatus, Snapshot};

/// Steps over which the median of a rank's own work is taken.
const WORK: usize = 32;

/// How far a rank has come.
#[derive(Clone, Debug, Default)]
pub struct Rank {
    pub step: Option<u64>,
    pub epoch: Option<u32>,
    pub section: Option<String>,
    stepped: Option<Duration>,
    work_ms: VecDeque<f32>,
}

impl Rank {
    pub fn take(&mut self, progress: &Progress, now: Duration) {
        if progress.step.is_some() && progress.step != self.step {
            (self.step, self.stepped) = (progress.step, Some(now));
        }
        self.epoch = progress.epoch.or(self.epoch);
        if progress.section.is_some() {
            self.section.clone_from(&progress.section);
        }
        self.work_ms.extend(&progress.work_ms);
        let excess = self.work_ms.len().saturating_sub(WORK);
        self.work_ms.drain(..excess);
    }

    fn median_ms(&self) -> Option<f64> {
        let mut work_ms: Vec<f64> = self.work_ms.iter().copied().map(f64::from).collect();
        median(&mut work_ms)
    }
}

impl State {
    /// The job at this moment. The goodput is left to whoever knows the earlier generations.
    pub fn snapshot(&self, now: Duration) -> Snapshot {
        let phase = match self.phase {
            Phase::Gather { .. } => "gather",
            Phase::Form { .. } => "form",
            Phase::Measure { .. } => "measure",
            Phase::Run => "run",
            Phase::Stop { .. } => "stop",
            Phase::Pause { .. } => "backoff",
            Phase::Leave { .. } | Phase::Finished { .. } => "finished",
        };
        Snapshot {
            run_id: self.settings.job.run_id.clone(),
            run_dir: self.settings.job.run_dir.clone(),
            phase: phase.into(),
            generation: self.generation,
            world_size: self.world_size(),
            elapsed_s: now.as_secs_f64(),
            goodput: None,
            nodes: self.node_statuses(now),
            ranks: self.rank_statuses(now),
            restarts: self.restarts.clone(),
            metrics: self.metrics.clone(),
        }
    }

    fn node_statuses(&self, now: Duration) -> Vec<NodeStatus> {
        let node = |id: &u64, node: &super::Node| {
            let member = self.member(*id);
            let state = match member {
                _ if member.is_none() && self.is_out(node, now).is_some() => "left out",
                Some(_) => "running",
                None => "spare",
            };
            NodeStatus {
                host: node.join.host.clone(),
                state: state.into(),
                first_rank: member.map(|m| m.ranks.start),
                num_ranks: member.map_or(0, |m| m.ranks.len() as u32),
                load: node.load,
                mem_used_bytes: node.mem_used_bytes,
                mem_total_bytes: node.join.facts.mem_bytes,
                rtt_ms: (2.0 * node.clock.error().as_secs_f64() * 1e3) as f32,
            }
        };
        let lost = self.lost.iter().map(|lost| NodeStatus {
            host: lost.host.clone(),
            state: "lost".into(),
            ..NodeStatus::default()
        });
        let mut nodes: Vec<NodeStatus> = self.nodes.iter().map(|(id, n)| node(id, n)).collect();
        nodes.sort_by_key(|n| n.first_rank.unwrap_or(u32::MAX));
        nodes.extend(lost);
        nodes
    }

    fn rank_statuses(&self, now: Duration) -> Vec<RankStatus> {
        let none = Rank::default();
        let late = self
            .inspection
            .as_ref()
            .map(|i| i.late.as_slice())
            .unwrap_or_default();
        let ranks = self.members.iter().flat_map(|member| {
            let node = self.nodes.get(&member.id);
            member
                .ranks
                .clone()
                .enumerate()
                .map(move |(i, rank)| (member, node, i, rank))
        });
        ranks
            .map(|(member, node, i, rank)| {
                let said = self.progress.get(&rank);
                let progress = said.unwrap_or(&none);
                let pid = node.and_then(|n| n.pids.get(i)).copied();
                let talks = self.settings.job.saves || said.is_some();
                let ended = self.reports.contains_key(&member.id);
                let state = match progress.step {
                    _ if ended || node.is_none() => "ended",
                    _ if late.contains(&rank) => "late",
                    _ if self.watch.is_slow(rank) => "slow",
                    // Of a program that says nothing more is not known.
                    None if pid.is_none() || talks => "starting",
                    _ => "running",
                };
                RankStatus {
                    rank,
                    host: self.host(member.id).into(),
                    device: node
                        .and_then(|n| n.join.devices.get(i))
                        .cloned()
                        .unwrap_or_default(),
                    pid: pid.unwrap_or(0),
                    state: state.into(),
                    step: progress.step,
                    epoch: progress.epoch,
                    section: progress.section.clone(),
                    step_age_s: progress
                        .stepped
                        .map(|at| now.saturating_sub(at).as_secs_f64()),
                    work_ms: progress.median_ms(),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_work_of_a_step_is_the_median_of_the_last_ones() {
        let mut rank = Rank::default();
        assert_eq!(rank.median_ms(), None);
        let mut take = |work_ms: Vec<f32>| {
            let progress = Progress {
                work_ms,
                ..Progress::default()
            };
            rank.take(&progress, Duration::ZERO);
            rank.median_ms()
        };
        assert_eq!(take(vec![100.0, 200.0]), Some(150.0));
        assert_eq!(take(vec![300.0]), Some(200.0));
        assert_eq!(take(vec![1.0; WORK]), Some(1.0));
    }
}
