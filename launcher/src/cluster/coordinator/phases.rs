//! From phase to phase.

use serde_json::json;
use std::time::Duration;
use tsm_job::config::duration::format;
use tsm_job::exit;

use super::rounds::Measuring;
use super::{Action, FORM, LEAVE, MOMENT, Reason, State, dismiss, record, send};
use crate::cluster::message::ToAgent;
use crate::cluster::topology::NodeId;

#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// Waiting for nodes.
    Gather {
        deadline: Duration,
        last_call: Option<Duration>,
    },
    /// Waiting for a port, and for the addresses that everybody reaches.
    Form {
        deadline: Duration,
        ports: Option<(u16, u16)>,
    },
    /// Measuring the nodes, for a start with this port.
    Measure {
        master_port: u16,
        measuring: Box<Measuring>,
    },
    Run,
    Stop {
        deadline: Duration,
        /// The ranks are to save first, which those that live cannot finish when one of them fails.
        saving: bool,
    },
    /// Between two starts.
    Pause {
        until: Duration,
    },
    /// Everybody was told to leave.
    Leave {
        code: i32,
        deadline: Duration,
    },
    Finished {
        code: i32,
    },
}

impl State {
    pub fn finished(&self) -> Option<i32> {
        match self.phase {
            Phase::Finished { code } => Some(code),
            _ => None,
        }
    }

    /// When to call [`super::decide`] with [`super::Event::Deadline`].
    pub fn deadline(&self) -> Option<Duration> {
        let phase = match &self.phase {
            &Phase::Gather {
                deadline,
                last_call,
            } => {
                let ready = last_call.map(|call| call.max(self.fence));
                let ready = ready.unwrap_or(deadline).min(deadline.max(self.fence));
                Some(self.waiting.tell_at().map_or(ready, |at| ready.min(at)))
            }
            Phase::Form { deadline, .. } | Phase::Stop { deadline, .. } => Some(*deadline),
            Phase::Leave { deadline, .. } => Some(self.left(*deadline)),
            Phase::Measure { measuring, .. } => Some(measuring.deadline),
            Phase::Pause { until } => Some(*until),
            Phase::Run => {
                // While it waits for answers, nobody looks for other hangs.
                let inspection = self.inspection.as_ref().map(|i| i.deadline);
                let look = inspection.unwrap_or(self.next_look);
                let saves = [self.settings.save_at, self.passing.deadline];
                let others = [self.trying.deadline(), Some(look)];
                saves.into_iter().chain(others).flatten().min()
            }
            Phase::Finished { .. } => return None,
        };
        phase.into_iter().chain(self.next_lease).min()
    }

    pub(super) fn expired(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.next_lease.is_some_and(|at| now >= at) {
            self.look_for_silence(now, actions);
        }
        match self.phase {
            Phase::Run => {
                if self.passing.deadline.is_some_and(|at| now >= at) {
                    self.end_saving(now, actions);
                } else if self.settings.save_at.is_some_and(|at| now >= at) {
                    self.settings.save_at = None;
                    if self.settings.job.saves {
                        self.preempt("the allocation ends soon".into(), now, actions);
                    }
                } else {
                    self.look_for_hangs(now, actions);
                }
            }
            Phase::Form { deadline, .. } if now >= deadline => {
                let late = self
                    .members
                    .iter()
                    .filter(|m| !self.has_formed(m.id))
                    .map(|m| self.host(m.id).to_string());
                let late = late.collect::<Vec<_>>().join(", ");
                let text = format!(
                    "no address of the first node was found within {}: no answer from {late}",
                    format(FORM)
                );
                self.give_up(text, now, actions);
            }
            Phase::Stop { deadline, .. } if now >= deadline => {
                // An agent that lives but does not get its ranks to an end is cut off; its lease does the rest.
                let late: Vec<NodeId> = self.awaited().collect();
                for id in late {
                    let how = "its agent did not end the ranks in time";
                    self.cut_off(id, how, now, actions);
                }
            }
            Phase::Gather { .. } if self.waiting.tell_at().is_some_and(|at| now >= at) => {
                self.tell_waiting(now, actions);
            }
            _ => {}
        }
    }

    /// All that follows from the state alone.
    pub(super) fn advance(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if matches!(
            self.phase,
            Phase::Run | Phase::Stop { .. } | Phase::Pause { .. }
        ) {
            self.go_on_trying(now, actions);
        }
        match self.phase {
            Phase::Gather { .. } => self.try_to_form(now, actions),
            Phase::Pause { until } if now >= until => {
                self.gather(now);
                if self.settings.open {
                    self.tell_waiting(now, actions);
                }
                self.try_to_form(now, actions);
            }
            Phase::Form { .. } => self.try_to_start(now, actions),
            Phase::Measure { .. } => self.go_on_measuring(now, actions),
            Phase::Run | Phase::Stop { .. } if self.awaited().next().is_none() => {
                self.settle(now, actions)
            }
            Phase::Leave { code, deadline } if now >= self.left(deadline) => {
                self.phase = Phase::Finished { code }
            }
            _ => {}
        }
    }

    /// When the coordinator may go: its agents have left, or are not waited for any longer, and no rank of a
    /// lost node can run on beside what is started next in the run folder.
    fn left(&self, deadline: Duration) -> Duration {
        let alone = self.nodes.values().all(|n| n.local);
        let agents = if alone { Duration::ZERO } else { deadline };
        agents.max(self.fence)
    }

    /// Nodes without a word from which the generation cannot end.
    pub(super) fn awaited(&self) -> impl Iterator<Item = NodeId> {
        let ids = self.members.iter().map(|m| m.id);
        ids.filter(|id| self.nodes.contains_key(id) && !self.reports.contains_key(id))
    }

    pub(super) fn gather(&mut self, now: Duration) {
        self.members.clear();
        self.waiting.again(now);
        self.phase = Phase::Gather {
            deadline: now + self.settings.join,
            last_call: None,
        };
    }

    pub(super) fn to_members(&self, message: impl Fn(u32) -> ToAgent, actions: &mut Vec<Action>) {
        for id in self.awaited() {
            actions.push(send(id, message(self.generation)));
        }
    }

    /// The job cannot be started, and why.
    pub(super) fn give_up(&mut self, why: String, now: Duration, actions: &mut Vec<Action>) {
        actions.push(Action::Notice(why.clone()));
        let reason = Some(why.as_str().into());
        self.leave(exit::PREFLIGHT, reason, Some(&why), now, actions);
    }

    /// Tells everybody to go, and writes the reason down. `why` is for nodes where somebody has started the launcher by
    /// hand, and sees no report.
    pub(super) fn leave(
        &mut self,
        code: i32,
        reason: Option<Reason>,
        why: Option<&str>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        for (id, node) in &self.nodes {
            let message = why.filter(|_| self.settings.open && !node.local);
            let message = message.map(str::to_owned);
            actions.push(dismiss(*id, code, message));
        }
        let text = reason.as_ref().map(Reason::to_string);
        actions.push(record("leave", json!({"exit_code": code, "reason": text})));
        actions.extend(reason.map(Action::Left));
        self.phase = Phase::Leave {
            code,
            deadline: now + LEAVE,
        };
        let wait = self.fence.saturating_sub(now);
        if wait > MOMENT {
            let seconds = wait.as_secs_f64();
            let of = match self.lost.as_slice() {
                [one] => one.host.clone(),
                more => format!("{} lost nodes", more.len()),
            };
            actions.push(Action::Notice(format!(
                "waiting {seconds:.1} s: until then ranks of {of} may still run; Ctrl-C leaves at once"
            )));
        }
        self.advance(now, actions);
    }
}
