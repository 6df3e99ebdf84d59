//! `--preflight full`: a start's nodes are measured when all of them are known, and the bad ones are left out.

use serde_json::to_value;
use std::net::IpAddr;
use std::time::Duration;

use super::rounds::{Judgement, Measuring, Place, Report};
use super::{Action, Phase, State, nodes, record};
use crate::cluster::message::{FromAgent, Severity};
use crate::cluster::policy::LeftOut;
use crate::cluster::topology::{Candidate, NodeId};
use crate::doctor::preflight::Scale;

/// Bad nodes that are named where the job ends for them.
const SHOWN: usize = 8;

impl State {
    /// Whether a member was never measured, or not found to be well.
    pub(super) fn must_measure(&self) -> bool {
        let unknown = |id: NodeId| !self.measured.contains_key(&id);
        self.settings.measure.is_some() && self.members.iter().any(|m| unknown(m.id))
    }

    /// `master` and the members' `interfaces` to it, as for a start with this port of the first node.
    pub(super) fn measure(
        &mut self,
        (master, master_port): (IpAddr, u16),
        interfaces: &[String],
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let members: Vec<NodeId> = self.members.iter().map(|m| m.id).collect();
        let Some(scale) = self.scale_for(&members) else {
            return;
        };
        self.trying.interrupt();
        let place = |(i, interface): (usize, &String)| {
            let id = self.members[i].id;
            let node = self.nodes.get(&id)?;
            let address = match i {
                0 => Some(master),
                _ => address_on(&node.join.addresses, interface, master),
            };
            let own = self.measured.get(&id).or(self.trying.own(id));
            let (host, own) = (node.join.host.clone(), own.cloned());
            Some(Place {
                id,
                host,
                address,
                interface: interface.clone(),
                own,
            })
        };
        let places: Vec<Place> = interfaces.iter().enumerate().filter_map(place).collect();
        if places.len() > 1 {
            let what = nodes(places.len());
            actions.push(Action::Notice(format!("preflight: measuring {what}")));
        }
        let start = (self.generation, self.attempt);
        let measuring = Measuring::begin(scale, start, places, now, actions);
        self.phase = Phase::Measure {
            master_port,
            measuring: Box::new(measuring),
        };
        self.advance(now, actions);
    }

    /// How these nodes are measured; `None`: not at all.
    pub(super) fn scale_for(&self, nodes: &[NodeId]) -> Option<Scale> {
        let mut scale = self.settings.measure.clone()?;
        // Figures of GPUs and of the network alone do not compare.
        let has_gpus = |id| self.nodes.get(id).is_some_and(|n| !n.join.gpus.is_empty());
        if !scale.on_cpus && !nodes.iter().all(has_gpus) {
            scale.trainer = None;
        }
        Some(scale)
    }

    pub(super) fn measurement(
        &mut self,
        id: NodeId,
        message: FromAgent,
        actions: &mut Vec<Action>,
    ) {
        if self.tried(id, &message) {
            return;
        }
        let Phase::Measure { measuring, .. } = &mut self.phase else {
            return;
        };
        match message {
            FromAgent::NodeMeasured { round, own } => measuring.node_measured(id, round, own),
            FromAgent::RingOpen { round, port } => measuring.ring_open(id, round, port, actions),
            FromAgent::Measured { round, result } => measuring.measured(id, round, result),
            _ => {}
        }
    }

    /// Asks for the next measurement, or judges by them all.
    pub(super) fn go_on_measuring(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Phase::Measure {
            measuring,
            master_port,
        } = &mut self.phase
        else {
            return;
        };
        if !measuring.advance(now, actions) {
            return;
        }
        let (judgement, master_port) = (measuring.judge(now), *master_port);
        let Judgement {
            mut report,
            good,
            bad,
            errors,
        } = judgement;
        self.measured.extend(good);
        for (id, finding) in &bad {
            self.measured.remove(id);
            report.left_out.push(LeftOut {
                host: self.host(*id).into(),
                agent: None,
                must: true,
                until: None,
                why: finding.text.clone(),
            });
        }
        let out = report.left_out.clone();
        let is_bad = |c: &Candidate| out.iter().any(|l| l.host == self.host(c.id));
        let candidates = self.candidates(now);
        let left = candidates.iter().filter(|c| !is_bad(c)).count();
        let needed = self.settings.min_nodes as usize;
        let go_on = left >= needed;
        self.tell(report, actions);
        // Where the job cannot go on without it, that is said instead.
        if go_on {
            for (left_out, (_, finding)) in out.into_iter().zip(&bad) {
                self.convict(left_out, &finding.hint, now, actions);
            }
        }
        let is_wide = std::mem::take(&mut self.is_wide);
        if let Some((_, finding)) = bad.first() {
            if !go_on {
                let mut all: Vec<&str> = bad.iter().map(|(_, f)| f.text.as_str()).collect();
                let more = format!("{} more", all.len().saturating_sub(SHOWN));
                if all.len() > SHOWN {
                    all.splice(SHOWN.., [more.as_str()]);
                }
                let (all, left) = (all.join("; "), nodes(left));
                let text = format!("{all}; {left} left, {needed} are needed");
                return self.refuse(&text, &finding.hint, now, actions);
            }
        } else if let Some(finding) = errors.first() {
            // With the spares there may be one that tells which node it is.
            if std::mem::replace(&mut self.was_wide, true) || left <= self.members.len() {
                return self.refuse(&finding.text, &finding.hint, now, actions);
            }
            let text = format!("{}: measuring with the spares", finding.text);
            actions.push(Action::Notice(text));
            self.is_wide = true;
        } else if !is_wide {
            return self.start(master_port, now, actions);
        }
        self.gather(now);
        self.phase = Phase::Gather {
            deadline: now + self.settings.join,
            last_call: Some(now),
        };
        self.try_to_form(now, actions);
    }

    /// Shows and writes down what was found.
    pub(super) fn tell(&mut self, report: Report, actions: &mut Vec<Action>) {
        let of = |severity| {
            report
                .findings
                .iter()
                .filter(move |f| f.severity == severity)
        };
        let fine: Vec<&str> = of(Severity::Ok).map(|f| f.text.as_str()).collect();
        if !fine.is_empty() {
            let (fine, seconds) = (fine.join("; "), report.seconds);
            actions.push(Action::Notice(format!(
                "preflight: {fine} ({seconds:.1} s)"
            )));
        }
        for finding in of(Severity::Warning) {
            self.warn(finding, actions);
        }
        actions.push(record("preflight", to_value(&report).unwrap_or_default()));
        actions.push(Action::Measured(Box::new(report)));
    }

    fn refuse(&mut self, text: &str, hint: &str, now: Duration, actions: &mut Vec<Action>) {
        let text = format!("{text}\n  hint: {hint}; --preflight quick starts all the same");
        self.give_up(text, now, actions);
    }
}

/// A node's address on `interface`, of the family of `master` and as near to it as there is. An interface that only
/// loopback addresses are on is not listed: then any address will do.
pub(super) fn address_on(
    addresses: &[(IpAddr, String)],
    interface: &str,
    master: IpAddr,
) -> Option<IpAddr> {
    if master.is_loopback() {
        return Some(master);
    }
    let near = |address: &IpAddr| match (address, master) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        _ => 0,
    };
    let alike = addresses
        .iter()
        .filter(|(a, _)| a.is_ipv4() == master.is_ipv4());
    let best = alike.max_by_key(|(address, name)| (name == interface, near(address)));
    best.map(|(address, _)| *address)
}
