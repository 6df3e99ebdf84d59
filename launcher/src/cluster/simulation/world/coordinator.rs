//! The process of the coordinator.

use super::*;
use crate::cluster::coordinator::decide;

impl World {
    pub(super) fn arm_coordinator(&mut self) {
        if let Some(at) = self.state.deadline().filter(|_| self.coordinator_up) {
            self.at(at, What::CoordinatorTimer);
        }
    }

    pub(super) fn coordinator(&mut self, event: Event) {
        if !self.coordinator_up {
            return;
        }
        if self.now < self.coordinator_stopped_until {
            self.inbox.push_back(event);
            return;
        }
        match &event {
            Event::Deadline if self.spins.0 == self.now => {
                self.spins.1 += 1;
                if self.spins.1 > SPINS {
                    self.fault(format!("the coordinator spins in {:?}", self.state.phase));
                }
            }
            Event::Deadline => self.spins = (self.now, 0),
            Event::Said {
                message: FromAgent::Beat(_),
                ..
            } => {}
            Event::Said { node, message, .. } => self.tell(format!("{node} says {message:?}")),
            other => self.tell(format!("coordinator: {other:?}")),
        }
        let preempts = self.plan.saves && self.state.phase == Phase::Run;
        let ends = |s: i32| {
            matches!(s, libc::SIGINT | libc::SIGTERM | libc::SIGHUP)
                || (preempts && s == libc::SIGUSR2)
        };
        match event {
            Event::Signal(signal)
            | Event::Said {
                message: FromAgent::Signal { signal },
                ..
            } if ends(signal) => {
                // Of a node that it does not know, it hears nothing; one without ranks may leave alone.
                self.told_to_end |= match event {
                    Event::Said { node, local, .. } => {
                        self.state.is_connected(node) && !self.state.can_spare(node, local)
                    }
                    _ => true,
                };
            }
            _ => {}
        }
        self.hurried |= matches!(
            (&event, &self.state.phase),
            (Event::Signal(libc::SIGINT), Phase::Leave { .. })
        );
        let phase = name(&self.state.phase);
        let lost = match event {
            Event::Lost { node, .. } if self.state.is_connected(node) => Some("cut"),
            _ => None,
        };
        let actions = decide(&mut self.state, event, self.now);
        let dropped = actions.iter().any(|a| matches!(a, Action::Drop { .. }));
        if let Some(how) = lost.or(dropped.then_some("silent")) {
            self.saw(&format!("{how} in {phase}"));
        }
        for action in actions {
            self.act(action);
        }
        if let Some(code) = self.state.finished() {
            self.saw(&format!("code {code}"));
            self.tell(format!("the coordinator ends with {code}"));
            self.code = Some(code);
            self.stop_coordinator();
        }
        self.arm_coordinator();
    }

    pub(super) fn stop_coordinator(&mut self) {
        self.coordinator_up = false;
        let left = |r: &&Rank| match self.nodes[r.node].local {
            true => r.alive,
            false => r.alive && !r.dying && !self.hurried,
        };
        if let (Some(code), Some(rank)) = (self.code, self.ranks.iter().find(left)) {
            let (number, generation, n) = (rank.number, rank.generation, rank.node);
            self.fault(format!(
                "the launcher ends with {code} before rank {number} of generation {generation} on node {n}"
            ));
        }
        for n in 0..self.nodes.len() {
            if self.nodes[n].local {
                self.nodes[n].agent = None;
                self.kill_all(n);
            } else {
                self.send_down(n, Packet::Closed);
            }
        }
    }

    pub(super) fn act(&mut self, action: Action) {
        match action {
            Action::Send { node, message } => {
                if !matches!(message, ToAgent::Ack { .. }) {
                    self.tell(format!("to {node}: {}", short(&format!("{message:?}"))));
                }
                if let Some(n) = self.index(node) {
                    self.send_down(n, Packet::Message(Box::new(message)));
                }
            }
            Action::Drop { node } => {
                if let Some(n) = self.index(node) {
                    self.send_down(n, Packet::Closed);
                    self.nodes[n].down.closed = true;
                }
            }
            Action::Started(launched) => {
                self.starts += 1;
                self.tell(format!("generation {} starts", launched.generation));
                self.check_start(&launched);
                if self.told_to_end {
                    self.fault("started again after it was told to end".into());
                }
            }
            Action::Ended(ending) => {
                self.tell(format!(
                    "generation {} ended: {} {} {:?}",
                    ending.generation,
                    ending.outcome,
                    ending.code,
                    ending.failure.as_ref().map(|f| f.headline())
                ));
                self.saw(ending.outcome);
                if ending.again {
                    self.saw("again");
                }
                self.endings.push(*ending);
            }
            Action::Notice(text) => self.tell(format!("notice: {text}")),
            Action::Measured(report) => self.judged(&report),
            Action::Record { .. }
            | Action::Show(_)
            | Action::Spawned(_)
            | Action::LeftOut(_)
            | Action::Told(_)
            | Action::Left(_) => {}
        }
    }

    pub(super) fn index(&self, node: u64) -> Option<usize> {
        let n = node.checked_sub(1)? as usize;
        (n < self.nodes.len()).then_some(n)
    }
}

fn name(phase: &Phase) -> &'static str {
    match phase {
        Phase::Gather { .. } => "Gather",
        Phase::Form { .. } => "Form",
        Phase::Measure { .. } => "Measure",
        Phase::Run => "Run",
        Phase::Stop { .. } => "Stop",
        Phase::Pause { .. } => "Pause",
        Phase::Leave { .. } => "Leave",
        Phase::Finished { .. } => "Finished",
    }
}

fn short(text: &str) -> String {
    text.chars().take(160).collect()
}
