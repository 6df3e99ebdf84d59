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
    /// Tells what is wrong with the members, and what differs between them; false when the job would fail of it.
    pub(super) fn compare_nodes(&mut self, now: Duration, actions: &mut Vec<Action>) -> bool {
        let joins = self.members.iter().filter_map(|m| self.nodes.get(&m.id));
        let joins: Vec<&Join> = joins.map(|n| &n.join).collect();
        let mut findings = doctor::of_nodes(&joins);
        findings.extend(doctor::across(&joins));
        findings.extend(clocks(&joins));
        let Some(error) = self.warn_of(&findings, actions) else {
            return true;
        };
        self.give_up(format!("{error}; {ALL_THE_SAME}"), now, actions);
        false
    }

    /// Tells how a node that joins differs from those that got ranks before it; false when the job would fail with it, and
    /// it was sent away.
    pub(super) fn fits(
        &mut self,
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
        let host = &join.host;
        let named = |f: &Finding| Finding {
            text: format!("{host}: {}", f.text),
            ..f.clone()
        };
        let mut findings: Vec<Finding> = join.facts.findings.iter().map(named).collect();
        findings.extend(doctor::late(&running, join));
        let all: Vec<&Join> = running.into_iter().chain([join]).collect();
        let of_node = format!("the clock of {host} is ");
        let clocks = clocks(&all).into_iter();
        findings.extend(clocks.filter(|f| f.text.starts_with(&of_node)));
        let Some(Finding { text, hint, .. }) = self.warn_of(&findings, actions) else {
            return true;
        };
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

    /// Says the warnings; the first error.
    fn warn_of(&mut self, findings: &[Finding], actions: &mut Vec<Action>) -> Option<Finding> {
        let of = |severity| findings.iter().filter(move |f| f.severity == severity);
        for finding in of(Severity::Warning) {
            self.warn(finding, actions);
        }
        of(Severity::Error).next().cloned()
    }
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
