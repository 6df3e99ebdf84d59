//! What differs between nodes: those that start together, and a later one from those that run.

use serde_json::json;
use std::time::Duration;
use tsm_job::exit;

use super::{Action, Excluded, State, record, send};
use crate::cluster::message::{Finding, Join, Severity, ToAgent};
use crate::cluster::policy::LeftOut;
use crate::cluster::topology::NodeId;
use crate::doctor::{self, ClockSample};

/// How to start in spite of what was found.
const ALL_THE_SAME: &str = "--preflight off starts all the same";

impl State {
    /// Tells what differs between the members; false when the job would fail of it.
    pub(super) fn compare_nodes(&mut self, now: Duration, actions: &mut Vec<Action>) -> bool {
        let joins = self.members.iter().filter_map(|m| self.nodes.get(&m.id));
        let joins: Vec<&Join> = joins.map(|n| &n.join).collect();
        if joins.len() < 2 {
            return true;
        }
        let mut findings = doctor::across(&joins);
        findings.extend(clocks(&joins));
        warn(&findings, actions);
        let Some(finding) = first_error(&findings) else {
            return true;
        };
        let text = format!("{}\n  hint: {}; {ALL_THE_SAME}", finding.text, finding.hint);
        self.give_up(text, now, actions);
        false
    }

    /// Tells how a node that joins differs from those that got ranks before it; false when the job would fail with it, and
    /// it was sent away.
    pub(super) fn fits(
        &self,
        id: NodeId,
        join: &Join,
        agent: u32,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> bool {
        let running: Vec<&Join> = self.compared.iter().collect();
        if running.is_empty() {
            return true;
        }
        let mut findings = doctor::late(&running, join);
        let all: Vec<&Join> = running.into_iter().chain([join]).collect();
        let of_node = format!("the clock of {} is ", join.host);
        findings.extend(
            clocks(&all)
                .into_iter()
                .filter(|f| f.text.starts_with(&of_node)),
        );
        warn(&findings, actions);
        let Some(Finding { text, hint, .. }) = first_error(&findings) else {
            return true;
        };
        let host = &join.host;
        actions.push(record(
            "left_out",
            json!({"host": host, "agent": agent, "must": true, "why": text}),
        ));
        let said = format!("{host} is not taken: {text}\n  hint: {hint}; {ALL_THE_SAME}");
        actions.push(Action::Notice(said.clone()));
        let (code, message) = (exit::PREFLIGHT, Some(said));
        actions.push(send(id, ToAgent::Exit { code, message }));
        // It may come back with what it lacks.
        let left_out = LeftOut {
            host: host.clone(),
            agent: Some(agent),
            must: true,
            until: None,
            why: text.clone(),
        };
        actions.push(Action::LeftOut(Box::new(Excluded { left_out, now })));
        false
    }
}

fn warn(findings: &[Finding], actions: &mut Vec<Action>) {
    for Finding { text, hint, .. } in findings.iter().filter(|f| f.severity == Severity::Warning) {
        let text = format!("warning: {text}\n  hint: {hint}");
        actions.push(Action::Notice(text));
    }
}

fn first_error(findings: &[Finding]) -> Option<&Finding> {
    findings.iter().find(|f| f.severity == Severity::Error)
}

/// Clocks that are wrong, of nodes that looked at themselves.
fn clocks(joins: &[&Join]) -> Vec<Finding> {
    let looked = joins.iter().filter(|j| j.facts.clock_ms > 0);
    let clock = |join: &&Join| ClockSample {
        host: join.host.clone(),
        sent_ms: join.facts.clock_ms,
        received_ms: join.received_ms,
        rtt: Duration::ZERO,
    };
    doctor::clock_findings(&looked.map(clock).collect::<Vec<_>>())
}
