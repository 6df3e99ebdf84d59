//! SIGUSR1 and SIGUSR2 for programs that are not ours: they are passed on, and what a program makes of them is its own
//! affair. Only its end tells.
//!
//! - A rank that ends with 75 after a SIGUSR2 has saved. The others have the grace to do so too, counted from the signal;
//!   then they are stopped as always. With 75 from some and 75 or 0 from the rest the job was saved, and ends with 75.
//! - What a scheduler has sent to all processes, the ranks have: it is noted, and not sent again.
//! - A rank that ends with 75 without a signal has saved by its own clock. The others have the grace from then on. The
//!   job ends with 75 also where they do not follow, or only lose the one that has ended: nobody failed, and what is
//!   saved is to be continued, by whoever started the job and not by this launcher.
//! - A rank that dies of a signal that was passed on has no handler for it. It did not fail: whoever sent the signal
//!   ended the job. It is not started again, and ends with 128 + the signal, which asks for no requeue.

use serde_json::json;
use std::time::Duration;
use tsm_job::config::duration::format;
use tsm_job::exit;

use super::running::rank_of;
use super::{Action, Cause, Phase, Reason, State, record, send};
use crate::blame::{Role, role};
use crate::cluster::message::ToAgent;
use crate::cluster::topology::NodeId;
use crate::end::{End, signal_name};
use crate::report::{Place, own_words};
use crate::supervisor::Rank;
use crate::text::{count, ranks_named};

/// What was passed on in this generation, and what came of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Passing {
    signals: Vec<Signal>,
    /// A rank has saved: until then the others may.
    pub deadline: Option<Duration>,
    /// The name of that rank, where nobody had told it to.
    first: Option<String>,
}

#[derive(Clone, Copy, Debug)]
struct Signal {
    number: i32,
    /// When it was heard first, and last.
    first: Duration,
    last: Duration,
}

impl Passing {
    pub fn heard(&mut self, number: i32, now: Duration) {
        match self.signals.iter_mut().find(|s| s.number == number) {
            Some(signal) => signal.last = now,
            None => self.signals.push(Signal {
                number,
                first: now,
                last: now,
            }),
        }
    }

    fn find(&self, number: i32) -> Option<Signal> {
        self.signals.iter().copied().find(|s| s.number == number)
    }

    /// The signal that is the reason of such an end.
    pub fn ended(&self, end: End) -> Option<i32> {
        let mut numbers = self.signals.iter().map(|s| s.number);
        numbers.find(|number| end.is_by(*number))
    }

    /// The signal that ended a rank before anything was stopped.
    pub fn killed(&self, rank: &Rank) -> Option<i32> {
        let alone = !rank.after_stop && rank.record.is_none();
        rank.end.filter(|_| alone).and_then(|end| self.ended(end))
    }

    /// The signal that ended the job: of a rank that died of it the others may not have taken the loss well, but none of
    /// them had failed when the signal came.
    pub fn blamed(&self, ranks: &[Rank]) -> Option<i32> {
        let signal = ranks.iter().find_map(|rank| self.killed(rank))?;
        let since = self.find(signal)?.first;
        let had_failed = |rank: &Rank| {
            let failed = !rank.is_well() && !rank.after_stop && self.killed(rank).is_none();
            failed && rank.first_at < since
        };
        (!ranks.iter().any(had_failed)).then_some(signal)
    }

    /// Why a job that was ended by `signal` did not save; `None` where it was not passed on.
    pub fn explain(&self, signal: i32, ranks: &[Rank], grace: Duration) -> Option<String> {
        self.find(signal)?;
        let name = signal_name(signal);
        let those = |of: &dyn Fn(&Rank) -> bool| -> Vec<usize> {
            (0..ranks.len()).filter(|&i| of(&ranks[i])).collect()
        };
        let killed = those(&|rank| self.killed(rank) == Some(signal));
        let late = those(&|rank| !rank.is_well() && self.killed(rank).is_none());
        let no_handler = format!(
            "{name} was passed on and ended {}: the program has no handler for it, or had none yet",
            ranks_named(&killed)
        );
        match (killed.is_empty(), signal) {
            (false, libc::SIGUSR2) => Some(format!(
                "{no_handler}; it is not saved, and so asks for no requeue\n  \
                 hint: let every rank save on {name} and end with code {}, or do not send it",
                exit::REQUEUE
            )),
            (false, _) => Some(format!(
                "{no_handler}\n  hint: let every rank handle {name}, or do not send it"
            )),
            (true, libc::SIGUSR2) if !late.is_empty() => Some(format!(
                "{} did not save and end within {} after {name}: the job asks for no requeue",
                ranks_named(&late),
                format(grace)
            )),
            (true, _) => None,
        }
    }
}

/// Where ranks saved and ended by themselves, and none of the others failed by itself: who did not save too, in words.
/// `were_late`: they were stopped for that alone, and end as they can.
pub(super) fn left_behind(
    ranks: &[Rank],
    places: &[Place],
    were_late: bool,
    grace: Duration,
) -> Option<String> {
    let those =
        |of: &dyn Fn(usize) -> bool| (0..ranks.len()).filter(|&i| of(i)).collect::<Vec<_>>();
    let saved = those(&|i| ranks[i].saved_by_itself());
    let others = those(&|i| !ranks[i].is_well());
    let failed = |i: &usize| {
        let obeyed = were_late && ranks[*i].after_stop;
        !obeyed && role(&ranks[*i], || own_words(&places[*i])) < Role::LostPeer
    };
    if saved.is_empty() || others.is_empty() || others.iter().any(failed) {
        return None;
    }
    let (saved, others) = (ranks_named(&saved), ranks_named(&others));
    let (code, grace) = (exit::REQUEUE, format(grace));
    Some(format!(
        "{saved} saved and ended with code {code}, {others} did not: what they had not saved is lost\n  \
         hint: let all ranks save, and end within {grace} of each other (--grace)"
    ))
}

impl State {
    pub(super) fn pass_on(&mut self, signal: i32, now: Duration, actions: &mut Vec<Action>) {
        self.passing.heard(signal, now);
        self.to_members(|generation| ToAgent::Signal { generation, signal }, actions);
    }

    /// A signal that the scheduler sent to all processes at once, of which `place` tells, as others will: what is passed
    /// on otherwise is not, since every agent sees to its own ranks.
    pub(super) fn step_signal(
        &mut self,
        signal: i32,
        place: &str,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let saves = self.settings.job.saves && signal == libc::SIGUSR2;
        let is_passed = matches!(signal, libc::SIGUSR1 | libc::SIGUSR2) && !saves;
        if self.phase != Phase::Run || !is_passed {
            return self.signal(signal, place, now, actions);
        }
        let fields = json!({"signal": signal_name(signal), "place": place.trim_start_matches(" on "),
            "to": "the step"});
        actions.push(record("signal", fields));
        self.asked(Reason::Signal {
            signal,
            place: place.into(),
        });
        self.passing.heard(signal, now);
        let generation = self.generation;
        if place.is_empty() {
            let here = self.members.iter().map(|m| m.id);
            let here = here.filter(|id| self.nodes.get(id).is_some_and(|n| n.local));
            actions.extend(here.map(|id| send(id, ToAgent::StepSignal { generation, signal })));
        }
    }

    /// A rank saved and ended, or ended in answer to a SIGUSR2.
    pub(super) fn answered(
        &mut self,
        id: NodeId,
        local_rank: u32,
        end: End,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let of = self.member(id).and_then(|m| rank_of(m, local_rank));
        let Some(rank) = of.filter(|_| self.phase == Phase::Run) else {
            return;
        };
        let fields = json!({"generation": self.generation, "rank": rank, "end": end});
        actions.push(record("answered", fields));
        // Whoever told it to save wants the nodes back; one that saved by itself asks for a later start.
        self.last = true;
        if self.passing.deadline.is_some() {
            return;
        }
        let grace = self.settings.job.grace;
        let heard = self.passing.find(libc::SIGUSR2);
        // Where the first rank took longer than the grace, the others may too.
        let asked = heard.map(|heard| heard.last).filter(|&at| now < at + grace);
        let deadline = grace + asked.unwrap_or(now);
        self.passing.deadline = Some(deadline);
        self.passing.first = heard.is_none().then(|| self.name(rank));
        let others = self.world_size().saturating_sub(1) as usize;
        if end == End::Code(exit::REQUEUE) && others > 0 {
            let (name, others) = (self.name(rank), count(others, "other"));
            let left = (deadline - now).as_secs_f64();
            actions.push(Action::Notice(format!(
                "{name} has saved and ended: waiting up to {left:.1} s for {others}"
            )));
        }
    }

    /// The grace of those that were to save is over.
    pub(super) fn end_saving(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let (after, cause) = match &self.passing.first {
            Some(rank) => (format!("{rank} had saved"), Cause::Saved),
            None => {
                let signal = libc::SIGUSR2;
                (signal_name(signal), Cause::Signal(signal))
            }
        };
        let grace = format(self.settings.job.grace);
        actions.push(Action::Notice(format!(
            "the grace after {after} is over: stopping those that still run, grace {grace}"
        )));
        self.stop(cause, libc::SIGTERM, now, actions);
    }
}
