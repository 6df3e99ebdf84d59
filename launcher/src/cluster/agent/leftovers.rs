//! Ends what the workers started and left behind: SIGTERM, the grace, SIGKILL.

use rustix::process::Signal;
use std::collections::BTreeSet;
use std::time::Duration;
use tsm_job::config::duration;

use crate::contain::{self, Containment, Left, Process};
use crate::process;
use crate::text::few;

/// How long the kernel may take to end them after SIGKILL, before they are named as stuck.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// The same where a worker was stuck for long enough already.
const KILL_WAIT_MORE: Duration = Duration::from_millis(100);
/// Between two looks for them, at first and later.
const LOOK: Duration = Duration::from_millis(5);
const LOOK_LATER: Duration = Duration::from_millis(50);

/// How far they have been ended.
pub struct Leftovers {
    phase: Phase,
    /// Those that were asked to end.
    asked: BTreeSet<i32>,
    /// When to look for them again.
    pub next_look: Duration,
    /// Those that SIGKILL did not end, each with what it waits for.
    pub stuck: Vec<String>,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    NotLooked,
    /// They were asked to end, and are killed when the grace is over.
    Asked {
        since: Duration,
    },
    Killed {
        since: Duration,
    },
    Gone,
}

impl Leftovers {
    pub fn new(now: Duration) -> Leftovers {
        Leftovers {
            phase: Phase::NotLooked,
            asked: BTreeSet::new(),
            next_look: now,
            stuck: Vec::new(),
        }
    }

    /// Call when the workers have ended, and again at [`Self::next_look`] until it says true. Without a `grace` they are
    /// killed at once; where a worker `is_stuck`, they are not waited for.
    pub fn end(
        &mut self,
        containment: &Containment,
        grace: Option<Duration>,
        is_stuck: bool,
        now: Duration,
        notice: impl FnOnce(String),
    ) -> bool {
        let since = match (self.phase, grace) {
            (Phase::Gone, _) => return true,
            (Phase::NotLooked, Some(grace)) => {
                let left = containment.processes();
                if !left.is_empty() {
                    let (number, names) = (left.len(), few(&left));
                    let grace = duration::format(grace);
                    notice(format!(
                        "processes that the workers left behind: ending {number} ({names}), grace {grace}"
                    ));
                    containment.signal(&left, Signal::TERM);
                    self.asked = left.iter().map(|process| process.pid).collect();
                    self.phase = Phase::Asked { since: now };
                    self.look_again(now, now);
                    return false;
                }
                now
            }
            (Phase::Asked { since }, Some(grace)) if now < since + grace => {
                if now < self.next_look {
                    return false;
                }
                let mut left = containment.processes();
                if !left.is_empty() {
                    // One that was started while the others were asked.
                    left.retain(|process| self.asked.insert(process.pid));
                    containment.signal(&left, Signal::TERM);
                    self.look_again(since, now);
                    return false;
                }
                now
            }
            (Phase::NotLooked | Phase::Asked { .. }, _) => now,
            (Phase::Killed { .. }, _) if now < self.next_look => return false,
            (Phase::Killed { since }, _) => since,
        };
        let limit = match containment.kill() {
            Left::Nothing => Duration::ZERO,
            Left::Perhaps => contain::DOUBT,
            Left::Some if is_stuck => KILL_WAIT_MORE,
            Left::Some => KILL_WAIT,
        };
        if now < since + limit {
            self.phase = Phase::Killed { since };
            self.look_again(since, now);
            return false;
        }
        self.phase = Phase::Gone;
        let left = if limit.is_zero() {
            Vec::new()
        } else {
            containment.processes()
        };
        let describe = |process: &Process| format!("{process}, {}", process::stuck_in(process.pid));
        self.stuck = left.iter().map(describe).collect();
        true
    }

    /// Looks cost more where many processes run, so they become rarer.
    fn look_again(&mut self, since: Duration, now: Duration) {
        if self.next_look <= now {
            let pause = now.saturating_sub(since) / 8;
            self.next_look = now + pause.clamp(LOOK, LOOK_LATER);
        }
    }
}
