//! The started workers: what they do becomes events, what is decided becomes signals and words.

use rustix::process::Signal;
use serde_json::json;
use std::io::{PipeWriter, Write};
use std::time::Duration;
use tsm_job::message::WorkerMessage;

use crate::logs::{Logs, Tail};
use crate::manifest::Events;
use crate::process::{self, Guard, Worker};
use crate::signals::Signals;
use crate::supervisor::{Action, Event, State};
use crate::watch::{Happening, Watch};

/// The workers of a run, and what hears and sees them.
pub struct Crew {
    pub workers: Vec<Worker>,
    pub tails: Vec<Tail>,
    pub watch: Watch,
    pub guard: Guard,
    pub logs: Logs,
    pub notices: PipeWriter,
    pub events: Events,
}

impl Crew {
    /// Tells the user, after whatever the workers have said so far. Left out when nobody reads.
    pub fn notice(&mut self, text: &str) {
        let _ = self
            .notices
            .write_all(format!("tsm-launch: {text}\n").as_bytes());
    }

    /// Turns what was seen into events, and writes down what is worth it.
    pub fn take(&mut self, happenings: Vec<(usize, Happening)>) -> Vec<Event> {
        let mut events = Vec::new();
        for (rank, happening) in happenings {
            events.push(match happening {
                Happening::Ended(end) => Event::Ended { rank, end },
                Happening::Left => Event::Left { rank },
                Happening::Said(WorkerMessage::Step { step, .. }) => Event::Step { rank, step },
                Happening::Said(WorkerMessage::Section { name }) => Event::Section { rank, name },
                Happening::Said(WorkerMessage::Metric { .. }) => continue,
                Happening::Said(WorkerMessage::Failure(record)) => Event::Failing { rank, record },
                Happening::Said(WorkerMessage::Hello { version, .. }) => {
                    self.events
                        .write("hello", json!({"rank": rank, "version": version}));
                    continue;
                }
            });
        }
        events
    }

    /// Signals first; then, when nothing is urgent any more, the words.
    pub fn act(&mut self, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Signal { rank, signal } => self.workers[*rank].signal(*signal),
                Action::Kill { rank } => self.workers[*rank].kill(),
                Action::Notice(_) => {}
            }
        }
        for action in actions {
            match action {
                Action::Signal { rank, signal } => {
                    self.events.write(
                        "send",
                        json!({"rank": rank, "signal": crate::end::signal_name(*signal)}),
                    );
                }
                Action::Kill { rank } => self
                    .events
                    .write("send", json!({"rank": rank, "signal": "SIGKILL"})),
                Action::Notice(text) => self.notice(text),
            }
        }
    }

    /// Writes down which ranks have ended, after all that was urgent.
    pub fn write_ends(&mut self, events: &[Event], state: &State) {
        for event in events {
            if let Event::Ended { rank, end } = event {
                let order = state.ranks[*rank].order;
                self.events
                    .write("exit", json!({"rank": rank, "end": end, "order": order}));
            }
        }
    }

    /// Ends what the workers started and left behind: SIGTERM, the grace, SIGKILL.
    pub async fn end_descendants(&mut self, state: &State, signals: &mut Signals, grace: Duration) {
        let sessions: Vec<i32> = self
            .workers
            .iter()
            .map(|w| w.pid.as_raw_nonzero().get())
            .collect();
        let left = process::session_members(&sessions);
        if left.is_empty() {
            return;
        }
        self.events.write("descendants", json!({"pids": left}));
        let killed = state
            .ranks
            .iter()
            .any(|rank| rank.sent.contains(&libc::SIGKILL));
        if !killed {
            let format = tsm_job::config::duration::format;
            let number = left.len();
            self.notice(&format!(
                "processes that the workers left behind: ending {number}, grace {}",
                format(grace)
            ));
            for &pid in &left {
                process::signal_member(pid, &sessions, Signal::TERM);
            }
            let deadline = tokio::time::Instant::now() + grace;
            while !process::session_members(&sessions).is_empty() {
                tokio::select! {
                    () = tokio::time::sleep_until(deadline) => break,
                    signal = signals.next() => if signal == libc::SIGINT { break },
                    () = tokio::time::sleep(Duration::from_millis(10)) => {}
                }
            }
        }
        process::kill_sessions(&sessions, 50);
    }
}
