//! A node goes: its connection is gone, or it is silent for longer than its lease.

use serde_json::json;
use std::time::Duration;
use tsm_job::config::duration::format;

use super::{Action, Cause, FENCE, Member, Phase, State, record};
use crate::cluster::topology::NodeId;

/// In what is said of the loss of a node that may only have given the coordinator up.
pub const NOT_RUNNING: &str = ", after the coordinator itself, on ";

/// A node of this generation whose connection is gone.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LostNode {
    pub member: Member,
    pub host: String,
    pub how: String,
    /// When it was heard for the last time, and when it was given up.
    pub heard: Duration,
    pub at: Duration,
    pub devices: Vec<String>,
}

/// The coordinator did not run.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stall {
    pub host: String,
    pub time: Duration,
    /// When that was found.
    pub at: Duration,
}

impl State {
    pub(super) fn lost_connection(
        &mut self,
        id: NodeId,
        how: &str,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(node) = self.nodes.remove(&id) else {
            return;
        };
        self.trying.forget(id);
        let host = node.join.host.clone();
        if matches!(self.phase, Phase::Leave { .. }) {
            return;
        }
        if self.member(id).is_some() {
            self.gone.insert(id, node.clone());
        }
        let how = match &self.stalled {
            Some(Stall { host, time, at }) if now < *at + self.settings.lease => {
                let time = time.as_secs_f64();
                format!("{how}{NOT_RUNNING}{host}, had not run for {time:.1} s")
            }
            _ => self.why_lost(&host, how, now),
        };
        actions.push(record(
            "lost",
            json!({"node": id, "host": host, "how": how}),
        ));
        let member = self.member(id).cloned();
        let busy = matches!(self.phase, Phase::Run | Phase::Stop { .. });
        match member {
            Some(member) if busy && !self.reports.contains_key(&id) => {
                // It may have been heard long ago, but only its silence since then is sure.
                self.fence = self.fence.max(node.heard + self.settings.lease + FENCE);
                actions.push(Action::Notice(format!("{host} is lost: {how}")));
                let devices = node.join.devices.clone();
                self.lost.push(LostNode {
                    member,
                    host,
                    how,
                    heard: node.heard,
                    at: now,
                    devices,
                });
                let ranks = self.lost[self.lost.len() - 1].member.ranks.clone();
                ranks.for_each(|rank| self.watch.ended(rank, now));
                if self.cause.is_none() {
                    self.stop(Cause::NodeLost, libc::SIGTERM, now, actions);
                }
                self.end_save(None, now, actions);
            }
            // Before its ranks were started, or after it was clean.
            Some(_) if matches!(self.phase, Phase::Form { .. } | Phase::Measure { .. }) => {
                actions.push(Action::Notice(format!("{host} is lost: {how}")));
                self.gather(now);
            }
            _ if self.settings.max_nodes > 1 => {
                actions.push(Action::Notice(format!("{host} left: {how}")));
            }
            _ => {}
        }
    }

    /// The coordinator was stopped itself, or its machine overloaded or suspended.
    pub(super) fn stalled(
        &mut self,
        host: &str,
        time: Duration,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        actions.push(record("stalled", json!({"ms": time.as_millis() as u64})));
        self.stalled = Some(Stall {
            host: host.into(),
            time,
            at: now,
        });
        let (time, lease) = (time.as_secs_f64(), format(self.settings.lease));
        if self.settings.max_nodes > 1 {
            actions.push(Action::Notice(format!(
                "warning: the coordinator did not run for {time:.1} s; nodes that hear nothing of it for {lease} end their ranks"
            )));
        }
    }

    /// Gives up the nodes whose lease has run out.
    pub(super) fn look_for_silence(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let lease = self.settings.lease;
        let remote = self.nodes.iter().filter(|(_, n)| !n.local);
        let silent: Vec<NodeId> = remote
            .filter(|(_, n)| now >= n.heard + lease)
            .map(|(id, _)| *id)
            .collect();
        for id in silent {
            let how = format!("silent for {}", format(lease));
            self.cut_off(id, &how, now, actions);
        }
        let left = self.nodes.values().filter(|n| !n.local);
        self.next_lease = left.map(|n| n.heard + lease).min();
    }

    /// Takes a node for lost that is still connected.
    pub(super) fn cut_off(
        &mut self,
        id: NodeId,
        how: &str,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        actions.push(Action::Drop { node: id });
        self.lost_connection(id, how, now, actions);
    }
}
