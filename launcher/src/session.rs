//! The coordinator's side of a job: what it hears goes to [`coordinator::decide`], and what that decides is done.
//!
//! One loop on one thread owns all state, and does nothing that could wait: lines are shown on another
//! thread, the manifest is written on a third.

use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{oneshot, watch};
use tsm_job::exit;

use crate::clock::Utc;
use crate::cluster::coordinator::{
    self, Action, Ending, Event, Launched, Phase, Reason, Settings, State,
};
use crate::cluster::link::{Heard, Hub};
use crate::cluster::message::FromAgent;
use crate::cluster::topology::NodeId;
use crate::cluster::wire::Refusal;
use crate::console::lines::Batch;
use crate::console::queue::Feed;
use crate::folder::Folder;
use crate::limits;
use crate::logs::keep::remedy;
use crate::manifest::description::Description;
use crate::manifest::events::Events;
use crate::manifest::writer::Writer;
use crate::manifest::{Manifest, write_json};
use crate::report::Failure;
use crate::signals::{Caught, Signals};
use crate::start::children::{Children, News};
use crate::start::slurm::{StopCause, Turn, step};
use crate::status::Snapshot;
use crate::text::count;

/// Open files beside those of the nodes, generously.
const FILES: u64 = 512;
/// So many refused connections are told one by one.
const EACH: u64 = 5;
/// Between two looks of a status at the job.
const PUBLISH: Duration = Duration::from_millis(200);
/// The manifest is written so often though nothing but steps and checkpoints is new in it.
const REFRESH: Duration = Duration::from_secs(60);

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
    session: Session,
    state: State,
    events: Events,
    writer: Writer,
    /// The manifest says more than its file.
    changed: bool,
    /// When the manifest was last given to the writer.
    kept_at: Duration,
    described: bool,
    published: Option<Duration>,
    /// When the loop last had something to do.
    ran_at: Duration,
    /// A node had its turn: a signal, and whatever else waits, comes first, once.
    others_first: bool,
    /// SLURM is being asked why it stops the job.
    asking: Option<oneshot::Receiver<StopCause>>,
    stopped: Option<StopCause>,
    /// The last signal to this process that another one sent, and which.
    sender: Option<(i32, String)>,
    /// Connections that were refused.
    refused: u64,
    /// The user knows that files of the run folder cannot be written.
    unwritten: bool,
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
        let mut running = Running {
            state: State::new(self.settings.clone(), now),
            events: Events::open(&self.folder.dir, self.start),
            writer: Writer::start(self.folder.dir.clone()),
            changed: true,
            kept_at: now,
            described: false,
            published: None,
            ran_at: now,
            others_first: false,
            asking: None,
            stopped: None,
            sender: None,
            refused: 0,
            unwritten: false,
            session: self,
        };
        while running.state.finished().is_none() {
            running.once(&mut signals).await;
        }
        let code = running.state.finished().unwrap_or(exit::BUG);
        running.conclude(code);
        running.session.children.end().await;
        let Running {
            session, stopped, ..
        } = running;
        Ok(End {
            code,
            outcome: session.manifest.outcome,
            stopped,
            turn: session.turn,
            saves: session.settings.job.saves,
            folder: session.folder,
        })
    }
}

impl Running {
    async fn once(&mut self, signals: &mut Signals) {
        let start = self.session.start;
        // Not now: it may have been stopped in the middle of the last round too.
        let asked = self.ran_at;
        // It wakes up often enough to notice when it is not run.
        let wake = asked + self.session.settings.lease / 4;
        let wake = self.state.deadline().unwrap_or(wake).min(wake);
        let others_first = std::mem::take(&mut self.others_first);
        let event = tokio::select! {
            biased;
            heard = self.session.hub.next(), if !others_first => match heard {
                Heard::Said { node, local, message } => {
                    self.others_first = true;
                    Event::Said { node, local, message }
                }
                Heard::Lost { node, how } => Event::Lost { node, how },
                Heard::Refused(refusal) => {
                    self.refused(refusal);
                    self.ran_at = start.elapsed();
                    return;
                }
            },
            caught = signals.next() => {
                let Caught { signal, sender } = caught;
                self.sender = caught.by().map(|by| (signal, by));
                match step::is_sent_to_all(sender) {
                    true => Event::StepSignal(signal),
                    false => Event::Signal(signal),
                }
            }
            news = self.session.children.next() => match news {
                News::Said { host, line } => Event::Starter { host, line },
                News::Ended(ended) => {
                    self.event("starter", json!({"host": ended.host, "code": ended.code}));
                    if matches!(self.state.phase, Phase::Gather { .. } | Phase::Form { .. } | Phase::Measure { .. }) {
                        let code = ended.exit_code();
                        let message = FromAgent::Unfit { host: ended.host, code, message: ended.message };
                        Event::Said { node: NodeId::MAX, local: false, message }
                    } else if let Some(killed) = ended.killed {
                        Event::StarterKilled { host: ended.host, killed }
                    } else {
                        // Its agent's connection tells.
                        self.ran_at = start.elapsed();
                        return;
                    }
                }
            },
            cause = async {
                match &mut self.asking {
                    Some(asking) => asking.await.unwrap_or(StopCause::Other),
                    None => std::future::pending().await,
                }
            } => {
                self.asking = None;
                self.stopped = Some(cause);
                let why = json!({"cause": format!("{cause:?}")});
                self.event("slurm", why);
                match cause {
                    // The job is to go on later.
                    StopCause::Preempted { .. } | StopCause::TimeLimit | StopCause::Requeued => Event::Signal(libc::SIGUSR2),
                    StopCause::Cancelled | StopCause::Other => Event::Signal(libc::SIGTERM),
                }
            }
            written = self.writer.written() => {
                self.noted(written);
                // There is more to write, perhaps; else it is as if it woke up too early.
                Event::Deadline
            }
            () = tokio::time::sleep_until((start + wake).into()) => Event::Deadline,
            () = std::future::ready(()), if others_first => return,
        };
        let now = start.elapsed();
        self.ran_at = now;
        let Some(event) = self.understand(event) else {
            return;
        };
        let mut actions = Vec::new();
        let stalled = now.saturating_sub(wake.max(asked));
        if stalled > self.session.settings.lease / 2 {
            let host = self.session.voice.host.clone();
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
            match action {
                Action::Send { node, message } => self.session.hub.send(node, message),
                Action::Drop { node } => self.session.hub.drop(node),
                Action::Notice(text) => self.session.voice.notice(&text),
                Action::Record { kind, fields } => self.event(kind, fields),
                Action::LeftOut(excluded) => self.manifest().left_out(*excluded, Utc::now()),
                Action::Measured(report) => self.manifest().preflight.push(*report),
                Action::Show(batch) => self.session.voice.feed.offer(batch),
                Action::Started(launched) => self.started(&launched, now),
                Action::Told(word) => self.manifest().told(word),
                Action::Spawned(spawned) => self.manifest().spawned(*spawned),
                Action::Ended(ending) => self.ended(*ending),
                Action::Left(reason) => self.left(&reason),
            }
        }
        self.publish(now);
        self.keep(now);
    }

    /// To be changed.
    fn manifest(&mut self) -> &mut Manifest {
        self.changed = true;
        &mut self.session.manifest
    }

    /// Has the manifest written where it is time.
    fn keep(&mut self, now: Duration) {
        let is_due = self.changed || now >= self.kept_at + REFRESH;
        if is_due && self.writer.is_ready() {
            (self.changed, self.kept_at) = (false, now);
            let manifest = &mut self.session.manifest;
            manifest.goodput = manifest.generations.goodput(now);
            self.writer.write(manifest.clone());
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
        self.event("refused", fields);
        if let Some(host) = host {
            refusal.peer = format!("{host} ({})", refusal.peer);
        }
        let number = match self.refused {
            ..=EACH => "a connection".into(),
            n => format!("{n} connections until now, the last one"),
        };
        let text = format!("refused {number}: {refusal}");
        self.session.voice.notice(&text);
    }

    /// Under SLURM a SIGTERM has many meanings, and SLURM has to be asked which.
    fn understand(&mut self, event: Event) -> Option<Event> {
        let is_term = match &event {
            Event::Signal(signal) | Event::StepSignal(signal) => *signal == libc::SIGTERM,
            Event::Said {
                message: FromAgent::Signal { signal } | FromAgent::StepSignal { signal },
                ..
            } => *signal == libc::SIGTERM,
            Event::Said {
                message: FromAgent::Join(_),
                ..
            } => {
                return Some(received(event));
            }
            _ => false,
        };
        let saves = self.session.settings.job.saves && self.state.phase == Phase::Run;
        let turn = self
            .session
            .turn
            .as_ref()
            .filter(|_| is_term && saves && self.stopped.is_none());
        let Some(turn) = turn else { return Some(event) };
        if self.asking.is_none() {
            let (answer, asking) = oneshot::channel();
            let ask = turn.asker();
            limits::beside("ask", move || {
                let _ = answer.send(ask());
            });
            self.asking = Some(asking);
        }
        None
    }

    fn publish(&mut self, now: Duration) {
        if self.published.is_some_and(|at| now < at + PUBLISH) {
            return;
        }
        self.published = Some(now);
        if let Some(steps) = self.state.steps() {
            self.session.manifest.generations.step(now, steps);
        }
        let mut snapshot = self.state.snapshot(now);
        snapshot.goodput = self.session.manifest.generations.goodput(now);
        // Nobody may look.
        let _ = self.session.snapshots.send(Arc::new(snapshot));
    }

    fn started(&mut self, launched: &Launched, now: Duration) {
        // From now on a node that is lost is worth waiting for; one that never came was not.
        self.state.settings.open |= self.session.children.come_back;
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
        let dir = self.session.folder.dir.path().display().to_string();
        let again = if launched.generation > 0 {
            format!(", start {}", launched.generation + 1)
        } else {
            String::new()
        };
        self.session
            .voice
            .notice(&format!("{workers} on {at}{again}; run folder {dir}"));
        self.manifest().started(launched, now, Utc::now());
        if !std::mem::replace(&mut self.described, true) {
            let command = self.session.manifest.command.clone();
            self.writer.describe(move || Description::find(&command));
        }
    }

    fn ended(&mut self, ending: Ending) {
        self.manifest().ended(&ending, Utc::now());
        if let Some(failure) = &ending.failure {
            self.report(failure);
        }
        if let Some(verdict) = &ending.verdict {
            self.session.voice.notice(verdict);
        }
        if !ending.again && ending.failure.is_none() {
            let seconds = self.session.start.elapsed().as_secs_f64();
            let (outcome, code) = (ending.outcome, ending.code);
            self.session
                .voice
                .notice(&format!("{outcome} after {seconds:.1} s, exit code {code}"));
        }
    }

    /// Adds what the coordinator cannot know: who has sent a signal.
    fn left(&mut self, reason: &Reason) {
        let by = match (reason, &self.sender, self.stopped) {
            (Reason::Signal { .. }, _, Some(cause)) => cause.describe().map(String::from),
            (Reason::Signal { signal, place }, Some((sent, by)), _)
                if signal == sent && place.is_empty() =>
            {
                Some(by.clone())
            }
            _ => None,
        };
        let by = by.map_or(String::new(), |by| format!(" from {by}"));
        self.manifest().reason = Some(format!("{reason}{by}"));
    }

    fn report(&mut self, failure: &Failure) {
        self.session.voice.say(&failure.to_string());
        let written = write_json(&self.session.folder.dir.failure(), failure);
        self.noted(written);
    }

    fn event(&mut self, kind: &str, fields: Value) {
        let written = self.events.write(kind, fields);
        self.noted(written);
    }

    /// Says it once where something cannot be written into the run folder.
    fn noted(&mut self, written: std::io::Result<()>) {
        if let Err(e) = written
            && !std::mem::replace(&mut self.unwritten, true)
        {
            let hint = remedy(e.kind());
            self.session.voice.notice(&format!(
                "warning: events.jsonl, failure.json or manifest.json is not complete: {e}\n  hint: {hint}"
            ));
        }
    }

    /// Writes everything down.
    fn conclude(&mut self, code: i32) {
        let manifest = &mut self.session.manifest;
        if manifest.outcome == "running" {
            manifest.outcome = "failed";
        }
        let fields = json!({"outcome": manifest.outcome, "exit_code": code});
        self.event("end", fields);
        let now = self.session.start.elapsed();
        let manifest = self.manifest();
        manifest.goodput = manifest.generations.goodput(now);
        (manifest.ended, manifest.exit_code) = (Some(Utc::now().rfc3339()), Some(code));
        let written = self.writer.end(self.session.manifest.clone());
        self.noted(written);
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
