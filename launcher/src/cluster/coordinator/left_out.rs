//! Nodes that get no ranks: the user is told, the node itself, events.jsonl and the manifest.

use serde_json::json;
use std::time::Duration;

use super::{Action, Node, State, record, send};
use crate::cluster::message::ToAgent;
use crate::cluster::policy::LeftOut;

/// A node that gets no ranks, as it is told.
#[derive(Clone, Debug)]
pub struct Excluded {
    pub left_out: LeftOut,
    pub now: Duration,
}

impl State {
    /// All that get no ranks, for what happened or for what was measured.
    pub(super) fn left_out(&self) -> impl Iterator<Item = &LeftOut> {
        self.left_out.iter().chain(&self.convicted)
    }

    /// Why an agent of `host` gets no ranks; the reason that admits no exception before one that does.
    pub(super) fn why_out(&self, host: &str, agent: u32, now: Duration) -> Option<&LeftOut> {
        let of_node = |l: &&LeftOut| l.covers(host, agent) && !l.is_over(now);
        self.left_out()
            .filter(of_node)
            .min_by_key(|l| (!l.must, l.until.is_some()))
    }

    pub(super) fn is_out(&self, node: &Node, now: Duration) -> Option<&LeftOut> {
        self.why_out(&node.join.host, node.agent, now)
    }

    /// For what happened, these and no others are left out from now on.
    pub(super) fn leave_out(
        &mut self,
        all: Vec<LeftOut>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let before = std::mem::replace(&mut self.left_out, all.clone());
        for left_out in all {
            if !before.iter().any(|old| old.repeats(&left_out)) {
                self.tell_left_out(left_out, "", now, actions);
            }
        }
    }

    /// For what was found about it, a node is left out to the end. `hint` says what to do.
    pub(super) fn convict(
        &mut self,
        left_out: LeftOut,
        hint: &str,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        self.convicted.push(left_out.clone());
        self.tell_left_out(left_out, hint, now, actions);
    }

    fn tell_left_out(
        &self,
        left_out: LeftOut,
        hint: &str,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let LeftOut {
            host,
            agent,
            must,
            until,
            why,
        } = &left_out;
        let fields = json!({"host": host, "agent": agent, "must": must, "why": why,
            "until_ms": until.map(|until| until.as_secs_f64() * 1e3)});
        actions.push(record("left_out", fields));
        let mut text = words(&left_out, now);
        if !hint.is_empty() {
            text += &format!("\n  hint: {hint}");
        }
        let covered = |n: &&Node| left_out.covers(&n.join.host, n.agent);
        let of_host = self.nodes.values().filter(covered);
        let own = |n: &Node| n.join.host == *host && agent.is_some() && n.agent > 0;
        let name = match of_host.clone().find(|n| own(n)) {
            Some(node) => node.name(),
            None => host.clone(),
        };
        actions.push(Action::Notice(format!("{name} {text}")));
        for (id, node) in &self.nodes {
            if covered(&node) && self.settings.open && !node.local {
                let text = format!("this node {text}");
                actions.push(send(*id, ToAgent::Tell { text }));
            }
        }
        actions.push(Action::LeftOut(Box::new(Excluded { left_out, now })));
    }
}

/// `gets no ranks for 42 s, as long as the others suffice: node lost`.
pub(super) fn words(left_out: &LeftOut, now: Duration) -> String {
    let why = &left_out.why;
    let enough = "as long as the others suffice";
    match left_out.until {
        _ if left_out.must => format!("gets no ranks any more: {why}"),
        None => format!("gets no ranks {enough}: {why}"),
        Some(until) => {
            let seconds = until.saturating_sub(now).as_secs_f64().ceil();
            format!("gets no ranks for {seconds} s, {enough}: {why}")
        }
    }
}
