//! The coordinator's side of a job: what it hears goes to [`coordinator::decide`], and what that decides is done.
//!
//! One loop on one thread owns all state, and does nothing that could wait: lines are shown on another
//! thread, the manifest is written on a third.

mod record;
mod senders;

use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tsm_job::exit;

use crate::clock::Utc;
use crate::cluster::coordinator::{self, Action, Ending, Event, Launched, Phase, Settings, State};
use crate::cluster::link::{Heard, Hub};
use crate::cluster::message::FromAgent;
use crate::cluster::topology::NodeId;
use crate::cluster::wire::Refusal;
use crate::console::lines::Batch;
use crate::console::queue::Feed;
use crate::folder::Folder;
use crate::limits;
use crate::manifest::Manifest;
use crate::signals::Signals;
use crate::start::children::{Children, News};
use crate::start::slurm::{StopCause, Turn};
use crate::status::Snapshot;
use crate::text::count;
use record::Record;
use senders::{Senders, meaning};

/// Open files beside those of the nodes, generously.
const FILES: u64 = 512;
/// So many refused connections are told one by one.
const EACH: u64 = 5;
/// Between two looks of a status at the job.
const PUBLISH: Duration = Duration::from_millis(200);

/// The launcher's own words, in order with the lines of the workers.
#[derive(Clone)]
pub struct Voice {
    pub feed: Feed,
    pub host: String,
}

impl Voice {
    /// Never waits.
    pub fn say(&self, text: &str) {
        self.feed.offer(Batch::own(&self.host, text));
    }

    pub fn notice(&self, text: &str) {
        self.say(&format!("tsm-launch: {text}"));
    }
}

/// Everything that is decided before the job starts.
pub struct Session {
    pub start: Instant,
    pub settings: Settings,
    pub hub: Hub,
    pub folder: Folder,
    pub manifest: Manifest,
    pub voice: Voice,
    /// ssh or srun, which hold the agents of other nodes.
    pub children: Children,
    /// The job of SLURM in which this runs.
    pub turn: Option<Turn>,
    pub snapshots: watch::Sender<Arc<Snapshot>>,
}

struct Running {
    start: Instant,
    state: State,
    hub: Hub,
    children: Children,
    turn: Option<Turn>,
    folder: Folder,
    record: Record,
    voice: Voice,
    senders: Senders,
    snapshots: watch::Sender<Arc<Snapshot>>,
    published: Option<Duration>,
    /// When the loop last had something to do.
    ran_at: Duration,
    /// A node had its turn: a signal, and whatever else waits, comes first, once.
    others_first: bool,
    /// Connections that were refused.
    refused: u64,
}

/// How a job ended.
pub struct End {
    pub code: i32,
    /// As in the manifest.
    pub outcome: &'static str,
    /// Why SLURM stopped it, where it did.
    pub stopped: Option<StopCause>,
    pub turn: Option<Turn>,
    /// Still locked: the caller has files in it.
    pub folder: Folder,
    /// The workers are ours.
    pub saves: bool,
}

impl Session {
    /// Runs the job to its end.
    ///
    /// # Errors
    /// When signals cannot be handled.
    pub async fn run(self) -> anyhow::Result<End> {
        let mut signals = Signals::catch()?;
        // Every node is a connection. One that finds no room is refused by the kernel, and says so itself.
        let _ = limits::allow_open_files(FILES + u64::from(self.settings.max_nodes));
        let now = self.start.elapsed();
        let dir = &self.folder.dir;
        let mut running = Running {
            start: self.start,
            record: Record::begin(dir, self.manifest, self.voice.clone(), self.start, now),
            state: State::new(self.settings, now),
            hub: self.hub,
            children: self.children,
            turn: self.turn,
            folder: self.folder,
            voice: self.voice,
            senders: Senders::default(),
            snapshots: self.snapshots,
            published: None,
            ran_at: now,
            others_first: false,
            refused: 0,
        };
        while running.state.finished().is_none() {
            running.once(&mut signals).await;
        }
        let code = running.state.finished().unwrap_or(exit::BUG);
        let outcome = running.record.end(code, running.start.elapsed());
        running.children.end().await;
        Ok(End {
            code,
            outcome,
            stopped: running.senders.stopped(),
            turn: running.turn,
            saves: running.state.settings.job.saves,
            folder: running.folder,
        })
    }
}

impl Running {
    async fn once(&mut self, signals: &mut Signals) {
        let start = self.start;
        // Not now: it may have been stopped in the middle of the last round too.
        let asked = self.ran_at;
        // It wakes up often enough to notice when it is not run.
        let wake = asked + self.state.settings.lease / 4;
        let wake = self.state.deadline().unwrap_or(wake).min(wake);
        let others_first = std::mem::take(&mut self.others_first);
        let event = tokio::select! {
            biased;
            heard = self.hub.next(), if !others_first => match heard {
                Heard::Said { node, local, message } => {
                    self.others_first = true;
                    Some(Event::Said { node, local, message })
                }
                Heard::Lost { node, how } => Some(Event::Lost { node, how }),
                Heard::Refused(refusal) => {
                    self.refused(refusal);
                    None
                }
            },
            caught = signals.next() => Some(self.senders.caught(caught)),
            news = self.children.next() => match news {
                News::Said { host, line } => Some(Event::Starter { host, line }),
                News::Ended(ended) => {
                    self.record.event("starter", json!({"host": ended.host, "code": ended.code}));
                    if matches!(self.state.phase, Phase::Gather { .. } | Phase::Form { .. } | Phase::Measure { .. }) {
                        let code = ended.exit_code();
                        let message = FromAgent::Unfit { host: ended.host, code, message: ended.message };
                        Some(Event::Said { node: NodeId::MAX, local: false, message })
                    } else {
                        // Else its agent's connection tells.
                        ended.killed.map(|killed| Event::StarterKilled { host: ended.host, killed })
                    }
                }
            },
            cause = self.senders.answer() => {
                self.record.event("slurm", json!({"cause": format!("{cause:?}")}));
                Some(meaning(cause))
            }
            // There is more to write, perhaps; else it is as if it woke up too early.
            () = self.record.written() => Some(Event::Deadline),
            () = tokio::time::sleep_until((start + wake).into()) => Some(Event::Deadline),
            () = std::future::ready(()), if others_first => return,
        };
        let now = start.elapsed();
        self.ran_at = now;
        let Some(event) = event.map(received) else {
            return;
        };
        let saves = self.state.settings.job.saves && self.state.phase == Phase::Run;
        let turn = self.turn.as_ref().filter(|_| saves);
        if turn.is_some_and(|turn| self.senders.ask_about(&event, turn)) {
            return;
        }
        let mut actions = Vec::new();
        let stalled = now.saturating_sub(wake.max(asked));
        if stalled > self.state.settings.lease / 2 {
            let host = self.voice.host.clone();
            let event = Event::Stalled {
                host,
                time: stalled,
            };
            actions = coordinator::decide(&mut self.state, event, now);
        }
        actions.extend(coordinator::decide(&mut self.state, event, now));
        // What the nodes have to do comes first, then the words.
        let is_for_nodes = |a: &Action| matches!(a, Action::Send { .. } | Action::Drop { .. });
        let (for_nodes, others): (Vec<_>, Vec<_>) = actions.into_iter().partition(is_for_nodes);
        for action in for_nodes.into_iter().chain(others) {
            self.act(action, now);
        }
        self.publish(now);
        self.record.keep(now);
    }

    fn act(&mut self, action: Action, now: Duration) {
        match action {
            Action::Send { node, message } => self.hub.send(node, message),
            Action::Drop { node } => self.hub.drop(node),
            Action::Notice(text) => self.voice.notice(&text),
            Action::Record { kind, fields } => self.record.event(kind, fields),
            Action::LeftOut(excluded) => self.record.manifest().left_out(*excluded, Utc::now()),
            Action::Measured(report) => self.record.manifest().preflight.push(*report),
            Action::Show(batch) => self.voice.feed.offer(batch),
            Action::Started(launched) => self.started(&launched, now),
            Action::Told(word) => self.record.manifest().told(word),
            Action::Spawned(spawned) => self.record.manifest().spawned(*spawned),
            Action::Ended(ending) => self.ended(&ending),
            Action::Left(reason) => {
                // What the coordinator cannot know: who has sent a signal.
                let by = self.senders.behind(&reason);
                let by = by.map_or(String::new(), |by| format!(" from {by}"));
                self.record.manifest().reason = Some(format!("{reason}{by}"));
            }
        }
    }

    fn refused(&mut self, mut refusal: Refusal) {
        self.refused += 1;
        if !is_told(self.refused) {
            return;
        }
        let host = self.state.host_at(&refusal.peer).map(str::to_owned);
        let (peer, why) = (&refusal.peer, refusal.why.to_string());
        let fields = json!({"peer": peer, "host": host, "why": why, "number": self.refused});
        self.record.event("refused", fields);
        if let Some(host) = host {
            refusal.peer = format!("{host} ({})", refusal.peer);
        }
        let number = match self.refused {
            ..=EACH => "a connection".into(),
            n => format!("{n} connections until now, the last one"),
        };
        let text = format!("refused {number}: {refusal}");
        self.voice.notice(&text);
    }

    fn publish(&mut self, now: Duration) {
        if self.published.is_some_and(|at| now < at + PUBLISH) {
            return;
        }
        self.published = Some(now);
        let mut snapshot = self.state.snapshot(now);
        snapshot.goodput = self.record.progress(self.state.steps(), now);
        // Nobody may look.
        let _ = self.snapshots.send(Arc::new(snapshot));
    }

    fn started(&mut self, launched: &Launched, now: Duration) {
        // From now on a node that is lost is worth waiting for; one that never came was not.
        self.state.settings.open |= self.children.come_back;
        let workers = count(launched.world_size, "worker");
        let hosts: Vec<String> = launched
            .members
            .iter()
            .map(|(_, node)| node.join.host.clone())
            .collect();
        let at = match hosts.as_slice() {
            [one] => one.clone(),
            many if many.len() <= 8 => {
                format!("{} ({})", count(many.len(), "node"), many.join(", "))
            }
            many => count(many.len(), "node"),
        };
        let dir = self.folder.dir.path().display().to_string();
        let again = if launched.generation > 0 {
            format!(", start {}", launched.generation + 1)
        } else {
            String::new()
        };
        self.voice
            .notice(&format!("{workers} on {at}{again}; run folder {dir}"));
        self.record.started(launched, now);
    }

    fn ended(&mut self, ending: &Ending) {
        self.record.manifest().ended(ending, Utc::now());
        if let Some(failure) = &ending.failure {
            self.voice.say(&failure.to_string());
            self.record.failure(failure);
        }
        if let Some(verdict) = &ending.verdict {
            self.voice.notice(verdict);
        }
        if !ending.again && ending.failure.is_none() {
            let seconds = self.start.elapsed().as_secs_f64();
            let (outcome, code) = (ending.outcome, ending.code);
            self.voice
                .notice(&format!("{outcome} after {seconds:.1} s, exit code {code}"));
        }
    }
}

/// Whether the user hears of the `number`-th refused connection: a port scanner must not fill the output.
fn is_told(number: u64) -> bool {
    number <= EACH || 10u64.pow(number.ilog10()) == number
}

/// Notes when a greeting came in, by our clock.
fn received(mut event: Event) -> Event {
    if let Event::Said {
        message: FromAgent::Join(join),
        ..
    } = &mut event
    {
        join.received_ms = crate::doctor::now_ms();
    }
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_refused_connections_are_told_in_few_lines() {
        let told: Vec<u64> = (1..=2500).filter(|&n| is_told(n)).collect();
        assert_eq!(told, [1, 2, 3, 4, 5, 10, 100, 1000]);
    }
}
