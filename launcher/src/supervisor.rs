//! What to do when something happens to a worker or to the launcher. Pure: no clock, no process.
//!
//! ```text
//! Running --failure or signal--> Stopping --grace over or second Ctrl-C--> Killing --> Finished
//!    \-- all ended --> Finished      \-- all ended --> Finished               (all ended, or stuck)
//! ```

use serde::{Deserialize, Serialize};
use std::time::Duration;
use tsm_job::exit;
use tsm_job::message::FailureRecord;

use crate::blame::{self, Blame};
use crate::end::End;

/// How long the kernel may take to end a process after SIGKILL before it is named as stuck.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// A rank that ends within this time after it closed its agent socket was dying since then. Closing a GPU
/// takes a driver seconds; a program that closes descriptors it does not know does so when it starts.
const DYING: Duration = Duration::from_secs(10);

/// Something that happened. Events given together happened in that order before any of them was acted on.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Ended {
        rank: usize,
        end: End,
    },
    /// It closed its agent socket, which a dying process does before its end can be seen.
    Left {
        rank: usize,
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
    /// A signal to the launcher.
    Signal(i32),
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
    /// Tell the user.
    Notice(String),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Phase {
    Running,
    Stopping { deadline: Duration },
    Killing { deadline: Duration },
    Finished,
}

/// Why the job is being stopped before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopCause {
    Failure,
    Signal(i32),
}

/// What is known of one rank.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rank {
    pub end: Option<End>,
    /// When its end was seen, since the launcher started.
    pub ended_at: Duration,
    /// Position among all such events of the first sign of its end: a failure record, the loss of its agent
    /// socket shortly before, or the end itself.
    pub order: usize,
    /// It ended after the launcher had begun to stop the job.
    pub after_stop: bool,
    /// When it closed its agent socket: position, time, and whether the job was being stopped.
    pub left: Option<(usize, Duration, bool)>,
    /// Signals the launcher sent it.
    pub sent: Vec<i32>,
    pub record: Option<FailureRecord>,
    pub step: Option<u64>,
    pub section: Option<String>,
}

/// Everything the supervisor knows.
#[derive(Clone, Debug)]
pub struct State {
    grace: Duration,
    pub phase: Phase,
    pub cause: Option<StopCause>,
    pub ranks: Vec<Rank>,
    order: usize,
    /// A rank that announced its failure must end by then.
    record_deadline: Option<Duration>,
}

impl State {
    pub fn new(world_size: usize, grace: Duration) -> State {
        let ranks = vec![Rank::default(); world_size];
        State {
            grace,
            phase: Phase::Running,
            cause: None,
            ranks,
            order: 0,
            record_deadline: None,
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

    /// The rank to blame, where the job failed by itself.
    pub fn first_failure(&self, stderr_of: impl Fn(usize) -> String) -> Option<Blame> {
        match self.cause {
            Some(StopCause::Failure) => blame::first_failure(&self.ranks, stderr_of),
            _ => None,
        }
    }

    /// The launcher's exit code.
    pub fn exit_code(&self, blame: Option<&Blame>) -> i32 {
        let saved = |rank: &Rank| rank.end == Some(End::Code(exit::REQUEUE));
        let blamed = blame.map(|b| &self.ranks[b.rank]);
        // A rank that announced its failure, hung, and was stopped: what it announced counts.
        let announced = blamed.and_then(|rank| match (&rank.record, rank.end) {
            (Some(record), None) => Some(record.code),
            (Some(record), Some(End::Signal(signal))) if rank.sent.contains(&signal) => {
                Some(record.code)
            }
            _ => None,
        });
        match (
            self.cause,
            announced
                .map(End::Code)
                .or(blamed.and_then(|rank| rank.end)),
        ) {
            (None, _) => exit::OK,
            (Some(StopCause::Signal(_)), _) if self.ranks.iter().all(saved) => exit::REQUEUE,
            (Some(StopCause::Signal(signal)), _) => exit::SIGNAL_BASE + signal,
            (Some(StopCause::Failure), Some(end)) => end.exit_code(),
            // Every failure has a rank that ended or announced it.
            (Some(StopCause::Failure), None) => exit::BUG,
        }
    }

    fn alive(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.ranks.len()).filter(|&rank| self.ranks[rank].end.is_none())
    }

    fn stop(&mut self, cause: StopCause, signal: i32, now: Duration, actions: &mut Vec<Action>) {
        self.cause = Some(cause);
        self.phase = Phase::Stopping {
            deadline: now + self.grace,
        };
        self.send(signal, actions);
    }

    fn kill(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.phase = Phase::Killing {
            deadline: now + KILL_WAIT,
        };
        for rank in self.alive().collect::<Vec<_>>() {
            self.ranks[rank].sent.push(libc::SIGKILL);
            actions.push(Action::Kill { rank });
        }
    }

    fn send(&mut self, signal: i32, actions: &mut Vec<Action>) {
        for rank in self.alive().collect::<Vec<_>>() {
            self.ranks[rank].sent.push(signal);
            actions.push(Action::Signal { rank, signal });
        }
    }

    fn note(&mut self, event: &Event, now: Duration, after_stop: bool) {
        match event {
            Event::Ended { rank, end } => {
                let order = self.next_order();
                let rank = &mut self.ranks[*rank];
                if rank.record.is_none() {
                    let dying = rank.left.filter(|(_, at, _)| now - *at <= DYING);
                    let since = dying.map(|(order, _, after_stop)| (order, after_stop));
                    (rank.order, rank.after_stop) = since.unwrap_or((order, after_stop));
                }
                (rank.end, rank.ended_at) = (Some(*end), now);
            }
            Event::Left { rank } => {
                self.ranks[*rank].left = Some((self.next_order(), now, after_stop));
            }
            Event::Failing { rank, record } if self.ranks[*rank].record.is_none() => {
                let order = self.next_order();
                let rank = &mut self.ranks[*rank];
                (rank.order, rank.after_stop, rank.record) =
                    (order, after_stop, Some(record.clone()));
            }
            Event::Step { rank, step } => self.ranks[*rank].step = Some(*step),
            Event::Section { rank, name } => self.ranks[*rank].section = Some(name.clone()),
            Event::Failing { .. } | Event::Signal(_) | Event::Deadline => {}
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
    let after_stop = state.cause.is_some();
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
        (Event::Ended { rank, end }, Phase::Running) if !end.is_success() => {
            let others = state.alive().count();
            if others > 0 {
                let grace = tsm_job::config::duration::format(state.grace);
                let others = count(others, "other");
                actions.push(Action::Notice(format!(
                    "rank {rank} ended with {end}: stopping {others}, grace {grace}"
                )));
            }
            state.stop(StopCause::Failure, libc::SIGTERM, now, actions);
        }
        (Event::Failing { .. }, Phase::Running) => {
            state.record_deadline.get_or_insert(now + state.grace);
        }
        (Event::Deadline, Phase::Running) if state.record_deadline.is_some_and(|d| now >= d) => {
            state.stop(StopCause::Failure, libc::SIGTERM, now, actions);
        }
        (Event::Deadline, Phase::Stopping { deadline }) if now >= deadline => {
            let ranks: Vec<String> = state.alive().map(|r| r.to_string()).collect();
            actions.push(Action::Notice(format!(
                "the grace is over: killing rank {}",
                ranks.join(", ")
            )));
            state.kill(now, actions);
        }
        (Event::Deadline, Phase::Killing { deadline }) if now >= deadline => {
            state.phase = Phase::Finished
        }
        (Event::Signal(signal @ (libc::SIGUSR1 | libc::SIGUSR2)), _) => {
            state.send(*signal, actions)
        }
        (Event::Signal(signal), Phase::Running) => {
            let name = crate::end::signal_name(*signal);
            let workers = count(state.alive().count(), "worker");
            actions.push(Action::Notice(format!(
                "{name}: stopping {workers}; Ctrl-C again kills them"
            )));
            state.stop(StopCause::Signal(*signal), *signal, now, actions);
        }
        (Event::Signal(libc::SIGINT), Phase::Stopping { .. }) => {
            actions.push(Action::Notice("killing the workers".into()));
            state.kill(now, actions);
        }
        _ => {}
    }
}

/// `1 worker`, `2 workers`.
pub fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests;
