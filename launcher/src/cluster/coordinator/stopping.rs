//! Somebody or something wants an end: what a signal means in each phase, and how a generation is stopped.

use serde_json::json;
use std::time::Duration;
use tsm_job::config::duration::format;
use tsm_job::exit;

use super::{Action, Phase, REPORT, Reason, State, dismiss, record};
use crate::cluster::message::ToAgent;
use crate::cluster::topology::NodeId;
use crate::end::signal_name;
use crate::text::count;

/// Why a generation is being stopped before its end.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Cause {
    /// A rank failed.
    Failure,
    /// The connection to a node is gone.
    NodeLost,
    /// Somebody asked for it.
    Signal(i32),
    /// The scheduler wants the nodes back: save and end.
    Preempt,
    /// A rank has saved and ended by itself, and the others have not followed in time.
    Saved,
    /// Ranks that no longer step.
    Hang {
        late: Vec<u32>,
        text: String,
        /// When it was found.
        at: Duration,
    },
    /// A node has joined that the job waits for.
    Grow,
}

impl State {
    /// A signal to the coordinator, or to the agent `place` (` on gpu-02`).
    pub(super) fn signal(
        &mut self,
        signal: i32,
        place: &str,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let name = signal_name(signal);
        actions.push(record(
            "signal",
            json!({"signal": name, "place": place.trim_start_matches(" on ")}),
        ));
        let by = Reason::Signal {
            signal,
            place: place.into(),
        };
        self.asked(by.clone());
        match self.phase {
            Phase::Run if signal == libc::SIGUSR2 && self.settings.job.saves => {
                self.preempt(by, now, actions);
            }
            Phase::Run if matches!(signal, libc::SIGUSR1 | libc::SIGUSR2) => {
                self.pass_on(signal, now, actions);
            }
            Phase::Stop { .. } if matches!(signal, libc::SIGUSR1 | libc::SIGUSR2) => {
                self.passing.heard(signal, now);
            }
            Phase::Run => {
                let ranks = count(self.world_size(), "worker");
                let again = if signal == libc::SIGINT {
                    "; Ctrl-C again kills them"
                } else {
                    ""
                };
                actions.push(Action::Notice(format!(
                    "{name}{place}: stopping {ranks}{again}"
                )));
                self.interrupted = vec![place.into()];
                // Workers that save when they are asked to end seldom know of a terminal that is closed or of Ctrl-\,
                // which would also dump their memory.
                let told = match signal {
                    libc::SIGHUP | libc::SIGQUIT => libc::SIGTERM,
                    signal => signal,
                };
                self.stop(Cause::Signal(signal), told, now, actions);
            }
            // The same key, pressed once, reaches an agent with a terminal of its own as well.
            Phase::Stop { .. }
                if signal == libc::SIGINT
                    && self.cause == Some(Cause::Signal(signal))
                    && !self.interrupted.iter().any(|p| p == place) =>
            {
                self.interrupted.push(place.into());
                self.end_by(Cause::Signal(signal));
            }
            Phase::Stop { .. } if signal == libc::SIGINT => {
                actions.push(Action::Notice("killing the workers".into()));
                self.end_by(Cause::Signal(signal));
                self.to_members(|generation| ToAgent::Kill { generation }, actions);
            }
            // What was begun goes on, but nothing is started after it.
            Phase::Stop { .. } => self.end_by(Cause::Signal(signal)),
            Phase::Gather { .. }
            | Phase::Form { .. }
            | Phase::Measure { .. }
            | Phase::Pause { .. } => {
                let code = match signal {
                    libc::SIGUSR1 => return,
                    // Nothing runs, so nothing is lost: it asks to be started again.
                    libc::SIGUSR2 if self.settings.job.saves && self.generation > 0 => {
                        exit::REQUEUE
                    }
                    _ => exit::SIGNAL_BASE + signal,
                };
                actions.push(Action::Notice(format!(
                    "{name}{place}: leaving, no worker runs"
                )));
                let reason = self.asked.clone();
                self.leave(code, reason, None, now, actions);
            }
            // Somebody who waits for the launcher knows better whether it is worth it.
            Phase::Leave { .. } if signal == libc::SIGINT && place.is_empty() => {
                self.fence = self.fence.min(now);
            }
            Phase::Leave { .. } | Phase::Finished { .. } => {}
        }
    }

    /// Whether a signal to a node concerns that node alone: it was started by itself, and has no ranks while others do.
    pub(in crate::cluster) fn can_spare(&self, id: NodeId, local: bool) -> bool {
        let others_have = !matches!(
            self.phase,
            Phase::Gather { .. } | Phase::Leave { .. } | Phase::Finished { .. }
        );
        self.settings.open && !local && others_have && self.member(id).is_none()
    }

    /// Such a node is asked to leave.
    pub(super) fn spared(&self, id: NodeId, signal: i32, actions: &mut Vec<Action>) {
        let (name, host) = (signal_name(signal), self.host(id));
        actions.push(record("signal", json!({"signal": name, "place": host})));
        if matches!(signal, libc::SIGUSR1 | libc::SIGUSR2) {
            let text = format!("{name} on {host}: nothing to do, it has no ranks");
            return actions.push(Action::Notice(text));
        }
        let text = format!("{name} on {host}: it leaves, which has no ranks; the job goes on");
        actions.push(Action::Notice(text));
        actions.push(dismiss(id, exit::SIGNAL_BASE + signal, None));
    }

    /// Keeps a stop that was begun for another reason from being followed by a new start.
    fn end_by(&mut self, cause: Cause) {
        let killed = cause == Cause::Signal(libc::SIGINT);
        if matches!(self.cause, Some(Cause::Grow | Cause::Hang { .. }))
            || (killed && matches!(self.cause, Some(Cause::Preempt | Cause::Saved)))
        {
            self.cause = Some(cause);
        }
        self.last = true;
    }

    pub(super) fn preempt(&mut self, why: Reason, now: Duration, actions: &mut Vec<Action>) {
        let grace = format(self.settings.job.grace);
        actions.push(Action::Notice(format!(
            "{why}: the workers save and end, grace {grace}"
        )));
        self.asked(why);
        // Whatever comes of it, the nodes are wanted back.
        self.last = true;
        self.stop(Cause::Preempt, libc::SIGUSR2, now, actions);
    }

    pub(super) fn is_saving(&self) -> bool {
        matches!(self.phase, Phase::Stop { saving: true, .. })
    }

    /// Where a save is under way that not all take part in any longer, it ends: the others would wait to the end of the
    /// grace. The node of a rank that fails does the same by itself. What was asked for stays the cause of the stop.
    /// `who`: whom to name, and how it ended.
    pub(super) fn end_save(&mut self, who: Option<&str>, now: Duration, actions: &mut Vec<Action>) {
        let Some(cause) = self.cause.clone().filter(|_| self.is_saving()) else {
            return;
        };
        if self.awaited().next().is_some()
            && let Some(who) = who
        {
            let grace = format(self.settings.job.grace);
            actions.push(Action::Notice(format!(
                "{who} while the workers save: stopping the others, grace {grace}"
            )));
        }
        self.stop(cause, libc::SIGTERM, now, actions);
    }

    /// Stops all ranks that still run.
    pub(super) fn stop(
        &mut self,
        cause: Cause,
        signal: i32,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        self.cause = Some(cause);
        self.inspection = None;
        let grace = self.settings.job.grace;
        self.phase = Phase::Stop {
            deadline: now + 2 * grace + REPORT,
            saving: signal == libc::SIGUSR2,
        };
        self.to_members(
            |generation| ToAgent::Stop {
                generation,
                signal,
                grace,
            },
            actions,
        );
    }
}
