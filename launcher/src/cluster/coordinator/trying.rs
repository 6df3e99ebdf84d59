//! A node that waits to be taken in measures itself while the others run, so that none is stopped for one that is
//! broken. What it reaches together with them is measured in the pause.

use std::collections::BTreeMap;
use std::time::Duration;

use super::rounds::{Judgement, Measuring, Place};
use super::{Action, Phase, State};
use crate::cluster::message::FromAgent;
use crate::cluster::policy::LeftOut;
use crate::cluster::topology::NodeId;
use crate::doctor::preflight::OwnNode;

/// What is known of nodes that were measured alone.
#[derive(Clone, Debug, Default)]
pub(super) struct Trying {
    now: Option<(NodeId, Box<Measuring>)>,
    /// Nodes that are well by themselves.
    well: BTreeMap<NodeId, OwnNode>,
}

impl Trying {
    pub fn deadline(&self) -> Option<Duration> {
        self.now.as_ref().map(|(_, measuring)| measuring.deadline)
    }

    pub fn own(&self, id: NodeId) -> Option<&OwnNode> {
        self.well.get(&id)
    }

    pub fn forget(&mut self, id: NodeId) {
        self.well.remove(&id);
        self.now.take_if(|(of, _)| *of == id);
    }

    /// A start is prepared, which asks for what is not known yet.
    pub fn interrupt(&mut self) {
        self.now = None;
    }
}

impl State {
    /// Whether a checkpoint is an occasion to take in another node.
    pub(super) fn may_grow(&self) -> bool {
        self.cause.is_none()
            && self.phase == Phase::Run
            && self.settings.job.saves
            && (self.members.len() as u32) < self.settings.max_nodes
    }

    /// Whether nothing speaks against stopping the others for this node.
    pub(super) fn is_tried(&self, id: NodeId) -> bool {
        let asked = self.settings.measure.is_some();
        !asked || self.measured.contains_key(&id) || self.trying.well.contains_key(&id)
    }

    /// Has the next node that waits measure itself, unless one does.
    pub(super) fn try_next(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if !self.may_grow() || self.trying.now.is_some() {
            return;
        }
        let waiting = self.candidates(now).into_iter().map(|c| c.id);
        let mut untried = waiting.filter(|id| self.member(*id).is_none() && !self.is_tried(*id));
        let Some(id) = untried.next() else { return };
        let Some(scale) = self.scale_for(&[id]) else {
            return;
        };
        let host = self.host(id).to_string();
        actions.push(Action::Notice(format!(
            "preflight: {host} measures itself before it is taken in; the others go on"
        )));
        let place = Place {
            id,
            host,
            address: None,
            interface: String::new(),
            own: None,
        };
        let start = (self.generation, self.attempt);
        let measuring = Measuring::begin(scale, start, vec![place], now, actions);
        self.trying.now = Some((id, Box::new(measuring)));
    }

    /// Whether the message was about such a node.
    pub(super) fn tried(&mut self, id: NodeId, message: &FromAgent) -> bool {
        match (&mut self.trying.now, message) {
            (Some((of, measuring)), FromAgent::NodeMeasured { round, own }) if *of == id => {
                measuring.node_measured(id, *round, own.clone());
                true
            }
            _ => false,
        }
    }

    /// Takes in what a node measured of itself, or that it did not.
    pub(super) fn go_on_trying(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Some((id, measuring)) = &mut self.trying.now else {
            return;
        };
        if !measuring.advance(now, actions) {
            return;
        }
        let (id, judgement) = (*id, measuring.judge(now));
        let Judgement {
            mut report,
            good,
            bad,
            errors: _,
        } = judgement;
        self.trying.now = None;
        self.trying.well.extend(good);
        let out = bad.first().map(|(_, finding)| {
            let left_out = LeftOut {
                host: self.host(id).into(),
                agent: None,
                must: true,
                until: None,
                why: finding.text.clone(),
            };
            (left_out, finding.hint.clone())
        });
        report
            .left_out
            .extend(out.iter().map(|(left_out, _)| left_out.clone()));
        self.tell(report, actions);
        if let Some((left_out, hint)) = out {
            self.convict(left_out, &hint, now, actions);
        }
        self.try_next(now, actions);
    }
}
