//! A node comes: it is taken in, at once or as a spare, or it is sent away.

use serde_json::json;
use std::time::Duration;
use tsm_job::exit;

use super::left_out::words;
use super::running::refusal;
use super::{Action, Clock, Node, Phase, Reason, State, dismiss, record, send};
use crate::cluster::message::{Finding, Join, Severity, ToAgent};
use crate::cluster::policy::LeftOut;
use crate::cluster::topology::NodeId;
use crate::text::count;

/// Of one node.
const MAX_WORKERS: usize = 4096;

/// A name that can be shown, whoever gave it.
pub(super) fn tidy(host: &str) -> String {
    host.chars().filter(|c| !c.is_control()).take(255).collect()
}

impl State {
    pub(super) fn join(
        &mut self,
        id: NodeId,
        local: bool,
        mut join: Join,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let host = tidy(&join.host);
        join.host.clone_from(&host);
        let agent = self.free_agent_number(&host);
        let out = self.why_out(&host, agent, now).cloned();
        if let Some(why) = self.why_refused(&join, out.as_ref()) {
            actions.push(Action::Notice(format!("{host} was sent away: {why}")));
            return actions.push(dismiss(id, exit::PREFLIGHT, Some(why)));
        }
        let found = join.facts.findings.iter();
        let found: Vec<&Finding> = found.filter(|f| f.severity > Severity::Ok).collect();
        if let Some(error) = found.iter().find(|f| f.severity == Severity::Error) {
            let why = error.to_string() + "; --preflight off starts all the same";
            let message = Some(format!("{host} cannot run the job: {why}"));
            let code = exit::PREFLIGHT;
            actions.push(dismiss(id, code, message));
            return self.unfit(id, &host, code, &why, now, actions);
        }
        if !self.fits(id, &join, agent, now, actions) {
            return;
        }
        let fields = json!({"node": id, "host": join.host, "pid": join.pid, "devices": join.devices, "found": found});
        actions.push(record("join", fields));
        actions.push(send(
            id,
            ToAgent::Welcome {
                lease: self.settings.lease,
            },
        ));
        let clock = if local { Clock::SAME } else { Clock::default() };
        let node = Node {
            local,
            heard: now,
            clock,
            agent,
            load: 0.0,
            mem_used_bytes: 0,
            pids: Vec::new(),
            join,
        };
        self.waiting.arrived(&host);
        let here = self.nodes.len() + 1;
        self.nodes.insert(id, node);
        self.tell_ignored(id, actions);
        if !local {
            self.next_lease.get_or_insert(now + self.settings.lease);
        }
        if let Some(out) = out {
            let text = words(&out, now);
            actions.push(Action::Notice(format!("{host} joined, and {text}")));
            if self.settings.open && !local {
                let text = format!("this node {text}");
                actions.push(send(id, ToAgent::Tell { text }));
            }
        } else if self.settings.max_nodes > 1 && matches!(self.phase, Phase::Gather { .. }) {
            self.tell_joined(id, "", actions);
            let (min, max) = (self.settings.min_nodes, self.settings.max_nodes);
            let of = if min == max {
                max.to_string()
            } else {
                format!("{min} to {max}")
            };
            actions.push(Action::Notice(format!(
                "{host} joined: {here} of {of} nodes"
            )));
        } else if self.settings.max_nodes > 1 {
            self.tell_joined(id, " as a spare, until it is needed", actions);
            actions.push(Action::Notice(format!(
                "{host} joined: a spare until it is needed"
            )));
            self.try_next(now, actions);
        }
        if let Phase::Leave { code, .. } = self.phase {
            actions.push(dismiss(id, code, None));
        }
    }

    /// Why a node is not taken, whatever was found on it. `out`: why it gets no ranks.
    fn why_refused(&self, join: &Join, out: Option<&LeftOut>) -> Option<String> {
        let host = &join.host;
        let (theirs, ours) = (&join.version, env!("CARGO_PKG_VERSION"));
        if theirs != ours {
            return Some(format!(
                "{host} is tsm-launch {theirs}, the coordinator is {ours}: install the same version on all nodes"
            ));
        }
        let job = join.job.as_ref();
        if job.is_some_and(|job| *job != self.settings.job.digest) {
            return Some(format!(
                "{host} was started with another config or program than the first node: give the same command on every node"
            ));
        }
        let workers = join.devices.len();
        if !(1..=MAX_WORKERS).contains(&workers) {
            let workers = count(workers, "worker");
            return Some(format!(
                "{host} has room for {workers}: it has to be 1 to {MAX_WORKERS}"
            ));
        }
        let must = out.filter(|out| out.must);
        must.map(|out| format!("{host} is left out: {}", out.why))
    }

    /// The first that no connected agent of `host` has.
    fn free_agent_number(&self, host: &str) -> u32 {
        let of_host = self.nodes.values().filter(|n| n.join.host == host);
        let taken: Vec<u32> = of_host.map(|n| n.agent).collect();
        (0..).find(|n| !taken.contains(n)).unwrap_or(0)
    }

    pub(super) fn unfit(
        &mut self,
        id: NodeId,
        host: &str,
        code: i32,
        message: &str,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let (code, host) = (refusal(code), tidy(host));
        actions.push(record(
            "unfit",
            json!({"host": host, "code": code, "message": message}),
        ));
        actions.push(dismiss(id, code, None));
        let exact = self.settings.min_nodes == self.settings.max_nodes && !self.settings.open;
        let starting = self.generation == 0
            && matches!(
                self.phase,
                Phase::Gather { .. } | Phase::Form { .. } | Phase::Measure { .. }
            );
        if starting && (exact || self.settings.max_nodes == 1) {
            let text = format!("{host} cannot run the job: {message}");
            actions.push(Action::Notice(text.clone()));
            self.leave(code, Some(Reason::Text(text)), None, now, actions);
        } else {
            actions.push(Action::Notice(format!(
                "{host} cannot take part: {message}"
            )));
        }
    }
}
