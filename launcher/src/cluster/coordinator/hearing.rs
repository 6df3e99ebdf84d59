//! What an agent says goes to where it is dealt with, as long as it is about what happens now.

use std::time::Duration;

use super::{Action, Phase, Spawned, State, send};
use crate::cluster::message::{FromAgent, ToAgent};
use crate::cluster::topology::NodeId;
use crate::signals::HEARD;

impl State {
    pub(super) fn said(
        &mut self,
        id: NodeId,
        local: bool,
        message: FromAgent,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.heard = now;
        }
        match message {
            FromAgent::Join(join) if !self.nodes.contains_key(&id) => {
                self.join(id, local, *join, now, actions)
            }
            FromAgent::Unfit {
                host,
                code,
                message,
            } => self.unfit(id, &host, code, &message, now, actions),
            // Nobody else may speak before it has joined.
            _ if !self.nodes.contains_key(&id) => actions.push(Action::Drop { node: id }),
            FromAgent::Beat(beat) => {
                actions.push(send(id, ToAgent::Ack { seq: beat.seq }));
                self.beat(id, beat, now, actions);
            }
            FromAgent::Signal { signal }
                if HEARD.contains(&signal) && self.can_spare(id, local) =>
            {
                self.spared(id, signal, actions);
            }
            FromAgent::Signal { signal } if HEARD.contains(&signal) => {
                let place = format!(" on {}", self.host(id));
                self.signal(signal, &place, now, actions);
            }
            FromAgent::StepSignal { signal } if HEARD.contains(&signal) => {
                let place = format!(" on {}", self.host(id));
                self.step_signal(signal, &place, now, actions);
            }
            FromAgent::Notice { text } => actions.push(Action::Notice(text)),
            FromAgent::Output { batch } => actions.push(Action::Show(batch)),
            FromAgent::Reserved {
                generation,
                attempt,
                master_port,
                probe_port,
            } if self.forms(generation) && attempt == self.attempt => {
                self.reserved(id, master_port, probe_port, actions);
            }
            FromAgent::Reached {
                generation,
                attempt,
                by,
            } if self.forms(generation) && attempt == self.attempt => self.reached(id, by),
            FromAgent::NodeMeasured { .. }
            | FromAgent::RingOpen { .. }
            | FromAgent::Measured { .. } => self.measurement(id, message, actions),
            FromAgent::Started {
                generation,
                pids,
                cores,
                at,
                environment,
                containment,
            } if self.runs(generation) => {
                let spawned = Spawned {
                    first_rank: 0,
                    pids,
                    cores,
                    environment,
                };
                self.started(id, spawned, at, containment, actions);
            }
            FromAgent::About { generation, word }
                if self.runs(generation) && self.members.first().is_some_and(|m| m.id == id) =>
            {
                self.hear_where_it_goes_on(&word);
                actions.push(Action::Told(word));
            }
            FromAgent::CannotStart {
                generation,
                code,
                message,
            } if self.forms(generation) || self.runs(generation) => {
                self.cannot_start(id, code, &message, now, actions);
            }
            FromAgent::Failing {
                generation,
                local_rank,
                end,
                at: _,
            } if self.runs(generation) => {
                self.failing(id, local_rank, end, now, actions);
            }
            FromAgent::Answered {
                generation,
                local_rank,
                end,
            } if self.runs(generation) => self.answered(id, local_rank, end, now, actions),
            FromAgent::Inspected {
                generation,
                looks,
                ras,
                more,
            } if self.runs(generation) => self.inspected(id, looks, ras, more),
            FromAgent::Ranks { generation, ranks } if self.runs(generation) => {
                self.ranks(id, ranks);
            }
            FromAgent::Clean { generation, report } if self.runs(generation) => {
                self.clean(id, *report, now, actions);
            }
            // Of an older generation, or a second greeting.
            _ => {}
        }
    }

    /// Whether a message belongs to the generation that is being formed.
    fn forms(&self, generation: u32) -> bool {
        generation == self.generation && matches!(self.phase, Phase::Form { .. })
    }

    /// Whether a message belongs to the generation that runs, or is being stopped.
    fn runs(&self, generation: u32) -> bool {
        generation == self.generation && matches!(self.phase, Phase::Run | Phase::Stop { .. })
    }
}
