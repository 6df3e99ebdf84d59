//! What a node does when something happens to one of its workers, or the coordinator says so. Pure: no clock, no
//! process. Ranks are local here.
//!
//! ```text
//! Running --failure or order--> Stopping --grace over or order--> Killing --> Finished
//!    \-- all ended --> Finished     \-- all ended --> Finished      (all ended, or stuck)
//! ```

use serde::{Deserialize, Serialize};
use std::time::Duration;
use tsm_job::exit;
use tsm_job::message::FailureRecord;

use crate::blame::{self, Role};
use crate::end::End;

/// How long the kernel may take to end a process after SIGKILL before it is named as stuck.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// Something that happened. Events given together happened in that order before any of them was acted on.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Ended {
        rank: usize,
        end: End,
    },
    /// Its agent socket is closed, by its death if it was ending when that was seen: its end shows later, for closing a
    /// GPU takes a driver seconds. One that closed it and lives on has only no socket any more.
    Left {
        rank: usize,
        is_exiting: bool,
    },
    Failing {
        rank: usize,
        record: FailureRecord,
    },
    Step {
        rank: usize,
        step: u64,
    },
    Section {
        rank: usize,
        name: String,
    },
    /// It talks to us, so it hears us too.
    Hello {
        rank: usize,
    },
    /// The coordinator wants all ranks to end.
    Stop {
        signal: i32,
        grace: Duration,
    },
    /// The coordinator passes a signal on.
    Pass {
        signal: i32,
    },
    /// The ranks have got a signal that somebody sent to all processes.
    Got {
        signal: i32,
    },
    /// The coordinator wants all ranks dead, or is itself lost.
    KillAll,
    /// [`State::deadline`] has come.
    Deadline,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Signal {
        rank: usize,
        signal: i32,
    },
    Kill {
        rank: usize,
    },
    /// Tell the coordinator that this rank fails; `end`: how it ended, where it has.
    Failing {
        rank: usize,
        end: Option<End>,
    },
    /// Tell the coordinator that this rank saved and ended, or has no handler for a SIGUSR2 that was passed on, and that
    /// the others go on.
    Answered {
        rank: usize,
        end: End,
    },
    /// Tell the user that these ranks are killed since they did not end within the grace.
    GraceOver {
        ranks: Vec<usize>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Phase {
    Running,
    Stopping { deadline: Duration },
    Killing { deadline: Duration },
    Finished,
}

/// What is known of one rank.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rank {
    pub end: Option<End>,
    /// When its end was seen, since the launcher started.
    pub ended_at: Duration,
    /// Position among all such events of the first sign of its end: a failure record, the loss of its agent
    /// socket by its death, or the end itself.
    pub order: usize,
    /// When that sign came.
    pub first_at: Duration,
    /// It ended after the launcher had begun to stop the job.
    pub after_stop: bool,
    /// When its death closed its agent socket: position, time, and whether the job was being stopped.
    pub left: Option<(usize, Duration, bool)>,
    /// Signals the launcher sent it, or a scheduler to all, each once.
    pub sent: Vec<i32>,
    pub record: Option<FailureRecord>,
    /// It has said something: before, a worker has not got ready to save on a signal.
    #[serde(default)]
    pub talks: bool,
    pub step: Option<u64>,
    pub section: Option<String>,
}

impl Rank {
    /// It came to the end of its work, or saved and ended; one that announced a failure did not, whatever its code.
    pub fn is_well(&self) -> bool {
        let ended = self
            .end
            .is_some_and(|end| end.is_success() || end == End::Code(exit::REQUEUE));
        ended && self.record.is_none()
    }

    /// It saved, asked to or not, or it has no handler for a SIGUSR2 that it was passed. Neither is a failure.
    fn has_answered(&self) -> bool {
        let was_asked = self.sent.contains(&libc::SIGUSR2);
        let answers =
            |end: End| end == End::Code(exit::REQUEUE) || (was_asked && end.is_by(libc::SIGUSR2));
        self.record.is_none() && self.end.is_some_and(answers)
    }

    /// It saved and ended before anybody had told it to.
    pub fn saved_by_itself(&self) -> bool {
        let saved = self.end == Some(End::Code(exit::REQUEUE)) && self.record.is_none();
        saved && !self.after_stop && !self.sent.contains(&libc::SIGUSR2)
    }

    fn note_sent(&mut self, signal: i32) {
        if !self.sent.contains(&signal) {
            self.sent.push(signal);
        }
    }

    pub fn has_succeeded(&self) -> bool {
        self.end.is_some_and(End::is_success) && self.record.is_none()
    }
}

/// Everything the supervisor knows.
#[derive(Clone, Debug)]
pub struct State {
    grace: Duration,
    /// The workers end with code 75 once they have saved.
    saves: bool,
    /// Ends a worker. SIGTERM, unless the workers are shielded from it.
    stop_signal: i32,
    pub phase: Phase,
    pub ranks: Vec<Rank>,
    order: usize,
    /// A rank that announced its failure must end by then.
    record_deadline: Option<Duration>,
    /// The stop lets the ranks save and end by themselves: one that fails meanwhile is a failure.
    saving: bool,
}

impl State {
    /// `shielded`: the workers ignore SIGTERM, which a scheduler sends to all processes before it is time to end.
    pub fn new(num_ranks: usize, grace: Duration, saves: bool, shielded: bool) -> State {
        let ranks = vec![Rank::default(); num_ranks];
        State {
            grace,
            saves,
            stop_signal: if shielded {
                libc::SIGINT
            } else {
                libc::SIGTERM
            },
            phase: Phase::Running,
            ranks,
            order: 0,
            record_deadline: None,
            saving: false,
        }
    }

    /// When to call [`decide`] with [`Event::Deadline`], since the launcher started.
    pub fn deadline(&self) -> Option<Duration> {
        match self.phase {
            Phase::Running => self.record_deadline,
            Phase::Stopping { deadline } | Phase::Killing { deadline } => Some(deadline),
            Phase::Finished => None,
        }
    }

    fn alive(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.ranks.len()).filter(|&rank| self.ranks[rank].end.is_none())
    }

    fn stop(&mut self, signal: i32, grace: Duration, now: Duration, actions: &mut Vec<Action>) {
        self.phase = Phase::Stopping {
            deadline: now + grace,
        };
        let save = self.saves && signal == libc::SIGUSR2;
        self.saving = save && self.alive().all(|rank| self.ranks[rank].talks);
        // Who is not ready would be killed by it, and the others would wait for them: there is nothing to save yet.
        let signal = match signal {
            libc::SIGTERM => self.stop_signal,
            _ if save && !self.saving => self.stop_signal,
            signal => signal,
        };
        self.send(signal, actions);
    }

    /// Of the ranks that are known to have failed the one that the report will most likely call the first, though
    /// `rank` was seen to end before: that it was dying had shown later.
    fn first_failed(&self, rank: usize) -> usize {
        let failed = (0..self.ranks.len()).filter(|&rank| !self.ranks[rank].is_well());
        // What they have written is not read to its end yet.
        let place = |rank: usize| (blame::role(&self.ranks[rank], String::new), rank);
        let failed = failed.map(place).filter(|(role, _)| *role < Role::Stopped);
        let first = failed.min_by_key(|(role, rank)| (*role, self.ranks[*rank].order));
        first.map_or(rank, |(_, rank)| rank)
    }

    /// Stops all ranks since `rank` has failed.
    fn fail(&mut self, rank: usize, now: Duration, actions: &mut Vec<Action>) {
        let rank = self.first_failed(rank);
        let end = self.ranks[rank].end;
        self.stop(libc::SIGTERM, self.grace, now, actions);
        actions.push(Action::Failing { rank, end });
    }

    fn kill(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.phase = Phase::Killing {
            deadline: now + KILL_WAIT,
        };
        for rank in self.alive().collect::<Vec<_>>() {
            self.ranks[rank].note_sent(libc::SIGKILL);
            actions.push(Action::Kill { rank });
        }
    }

    fn send(&mut self, signal: i32, actions: &mut Vec<Action>) {
        for rank in self.alive().collect::<Vec<_>>() {
            self.ranks[rank].note_sent(signal);
            actions.push(Action::Signal { rank, signal });
        }
    }

    fn note(&mut self, event: &Event, now: Duration, after_stop: bool) {
        if let Event::Hello { rank } | Event::Step { rank, .. } | Event::Section { rank, .. } =
            event
        {
            self.ranks[*rank].talks = true;
        }
        match event {
            Event::Ended { rank, end } => {
                let order = self.next_order();
                let rank = &mut self.ranks[*rank];
                if rank.record.is_none() {
                    (rank.order, rank.first_at, rank.after_stop) =
                        rank.left.unwrap_or((order, now, after_stop));
                }
                (rank.end, rank.ended_at) = (Some(*end), now);
            }
            Event::Left { rank, is_exiting } if *is_exiting => {
                self.ranks[*rank].left = Some((self.next_order(), now, after_stop));
            }
            Event::Failing { rank, record } if self.ranks[*rank].record.is_none() => {
                let order = self.next_order();
                let rank = &mut self.ranks[*rank];
                (rank.order, rank.first_at, rank.after_stop) = (order, now, after_stop);
                rank.record = Some(record.clone());
            }
            Event::Step { rank, step } => self.ranks[*rank].step = Some(*step),
            Event::Section { rank, name } => self.ranks[*rank].section = Some(name.clone()),
            Event::Left { .. }
            | Event::Failing { .. }
            | Event::Hello { .. }
            | Event::Stop { .. }
            | Event::Pass { .. }
            | Event::Got { .. }
            | Event::KillAll
            | Event::Deadline => {}
        }
    }

    fn next_order(&mut self) -> usize {
        self.order += 1;
        self.order
    }
}

/// Takes in `events`, all from before `now`, and says what to do about them.
pub fn decide(state: &mut State, events: &[Event], now: Duration) -> Vec<Action> {
    let mut actions = Vec::new();
    // All ends that were read together came before the stop that the first of them causes.
    let after_stop = state.phase != Phase::Running && !state.saving;
    for event in events {
        state.note(event, now, after_stop);
    }
    for event in events {
        react(state, event, now, &mut actions);
    }
    if state.phase != Phase::Finished && state.alive().next().is_none() {
        state.phase = Phase::Finished;
    }
    actions
}

fn react(state: &mut State, event: &Event, now: Duration, actions: &mut Vec<Action>) {
    match (event, state.phase) {
        (_, Phase::Finished) => {}
        // Some of the others may be in the middle of a save: the coordinator says how long they have.
        (Event::Ended { rank, end }, Phase::Running) if state.ranks[*rank].has_answered() => {
            let (rank, end) = (*rank, *end);
            actions.push(Action::Answered { rank, end });
        }
        (Event::Ended { rank, .. }, Phase::Stopping { .. })
            if state.saving && state.ranks[*rank].is_well() => {}
        (Event::Ended { rank, .. }, Phase::Running) if !state.ranks[*rank].has_succeeded() => {
            state.fail(*rank, now, actions);
        }
        (Event::Ended { rank, .. }, Phase::Stopping { .. }) if state.saving => {
            state.fail(*rank, now, actions);
        }
        (Event::Failing { .. }, Phase::Running) => {
            state.record_deadline.get_or_insert(now + state.grace);
        }
        (Event::Deadline, Phase::Running) if state.record_deadline.is_some_and(|d| now >= d) => {
            let announced = |rank: &usize| state.ranks[*rank].record.is_some();
            let rank = state.alive().find(announced).unwrap_or(0);
            state.fail(rank, now, actions);
        }
        (Event::Deadline, Phase::Stopping { deadline }) if now >= deadline => {
            let ranks = state.alive().collect();
            actions.push(Action::GraceOver { ranks });
            state.kill(now, actions);
        }
        (Event::Deadline, Phase::Killing { deadline }) if now >= deadline => {
            state.phase = Phase::Finished;
        }
        (Event::Stop { signal, grace }, Phase::Running) => {
            state.stop(*signal, *grace, now, actions);
        }
        (Event::Stop { signal, grace }, Phase::Stopping { .. })
            if state.saving && *signal != libc::SIGUSR2 =>
        {
            state.stop(*signal, *grace, now, actions);
        }
        (Event::Pass { signal }, _) => state.send(*signal, actions),
        (Event::Got { signal }, _) => {
            for rank in state.alive().collect::<Vec<_>>() {
                state.ranks[rank].note_sent(*signal);
            }
        }
        (Event::KillAll, Phase::Running | Phase::Stopping { .. }) => state.kill(now, actions),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
