//! The coordinator's side of a job: what it hears goes to [`coordinator::decide`], and what that decides is done.
//!
//! One loop on one thread owns all state, and does nothing that could wait: lines are shown on another
//! thread, the machine is described on a third.

use serde_json::json;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use tsm_job::exit;

use crate::clock::Utc;
use crate::cluster::coordinator::{self, Action, Ending, Event, Launched, Phase, Settings, State};
use crate::cluster::link::{Heard, Hub};
use crate::cluster::message::FromAgent;
use crate::cluster::topology::NodeId;
use crate::folder::Folder;
use crate::manifest::{Events, Manifest, RankEntry, write_json};
use crate::report::Failure;
use crate::screen::Screen;
use crate::signals::Signals;
use crate::start::children::Children;
use crate::supervisor::count;

/// How long to wait for the description of the machine at the end of a short run.
const DESCRIBE: Duration = Duration::from_secs(2);

/// Everything that is decided before the job starts.
pub struct Session {
    pub start: Instant,
    pub settings: Settings,
    pub hub: Hub,
    pub folder: Folder,
    pub manifest: Manifest,
    pub screen: Screen,
    /// ssh or srun, which hold the agents of other nodes.
    pub children: Children,
}

struct Running {
    session: Session,
    state: State,
    events: Events,
    described: Option<Receiver<Manifest>>,
    code: Option<i32>,
}

impl Session {
    /// Runs the job to its end and returns the exit code.
    ///
    /// # Errors
    /// When signals cannot be handled.
    pub async fn run(self) -> anyhow::Result<i32> {
        let mut signals = Signals::catch()?;
        let now = self.start.elapsed();
        let mut running = Running {
            state: State::new(self.settings.clone(), now),
            events: Events::open(&self.folder.dir, self.start),
            described: None,
            code: None,
            session: self,
        };
        while running.state.finished().is_none() {
            running.once(&mut signals).await;
        }
        let code = running.state.finished().unwrap_or(exit::BUG);
        running.conclude(code);
        running.session.children.end().await;
        Ok(code)
    }
}

impl Running {
    async fn once(&mut self, signals: &mut Signals) {
        let start = self.session.start;
        let deadline = self.state.deadline().map(|d| tokio::time::Instant::from_std(start + d));
        let event = tokio::select! {
            biased;
            heard = self.session.hub.next() => match heard {
                Heard::Said { node, local, message } => Event::Said { node, local, message },
                Heard::Lost { node, how } => Event::Lost { node, how },
                Heard::Refused(refusal) => {
                    self.events.write("refused", json!({"peer": refusal.peer, "why": refusal.why.to_string()}));
                    self.session.screen.notice(&format!("refused a connection: {refusal}"));
                    return;
                }
            },
            signal = signals.next() => Event::Signal(signal),
            ended = self.session.children.next() => {
                self.events.write("starter", json!({"host": ended.host, "code": ended.code}));
                // Later its agent's connection tells.
                if !matches!(self.state.phase, Phase::Gather { .. } | Phase::Form { .. }) {
                    return;
                }
                let (host, code) = (ended.host, if ended.code == 0 { exit::PREFLIGHT } else { ended.code });
                let message = FromAgent::Unfit { host, code, message: ended.message };
                Event::Said { node: NodeId::MAX, local: false, message }
            }
            () = tokio::time::sleep_until(deadline.unwrap_or_else(tokio::time::Instant::now)), if deadline.is_some() => Event::Deadline,
        };
        let actions = coordinator::decide(&mut self.state, event, start.elapsed());
        // What the nodes have to do comes first, then the words.
        for action in &actions {
            match action {
                Action::Send { node, message } => self.session.hub.send(*node, message.clone()),
                Action::Drop { node } => self.session.hub.drop(*node),
                _ => {}
            }
        }
        for action in actions {
            match action {
                Action::Send { .. } | Action::Drop { .. } => {}
                Action::Notice(text) => self.session.screen.notice(&text),
                Action::Record { kind, fields } => self.events.write(kind, fields),
                Action::Show { stderr, text } => self.session.screen.show(stderr, text.into_bytes()),
                Action::Started(launched) => self.started(&launched),
                Action::Ended(ending) => self.ended(*ending),
            }
        }
    }

    fn started(&mut self, launched: &Launched) {
        let workers = count(launched.world_size as usize, "worker");
        let hosts: Vec<&str> = launched.members.iter().map(|(_, node)| node.join.host.as_str()).collect();
        let at = match hosts.as_slice() {
            [one] => (*one).to_string(),
            many if many.len() <= 8 => format!("{} ({})", count(many.len(), "node"), many.join(", ")),
            many => count(many.len(), "node"),
        };
        let dir = self.session.folder.dir.path().display().to_string();
        let again = if launched.generation > 0 { format!(", start {}", launched.generation + 1) } else { String::new() };
        self.session.screen.notice(&format!("{workers} on {at}{again}; run folder {dir}"));
        let manifest = &mut self.session.manifest;
        manifest.world_size = launched.world_size as usize;
        manifest.ranks = launched
            .members
            .iter()
            .flat_map(|(member, node)| {
                member.ranks.clone().zip(&node.join.devices).map(|(rank, device)| RankEntry {
                    rank,
                    pid: 0,
                    device: device.clone(),
                    cores: Vec::new(),
                    end: None,
                })
            })
            .collect();
        if self.described.is_none() {
            self.described = Some(describe(manifest.clone(), &self.session.folder));
        }
    }

    fn ended(&mut self, ending: Ending) {
        for (i, entry) in self.session.manifest.ranks.iter_mut().enumerate() {
            entry.end = ending.ends.get(i).copied().flatten();
            entry.pid = ending.pids.get(i).copied().unwrap_or(0);
        }
        if !ending.again {
            self.session.manifest.outcome = if ending.outcome == "saved" { "stopped" } else { ending.outcome };
        }
        if let Some(failure) = &ending.failure {
            self.report(failure);
        }
        if let Some(verdict) = &ending.verdict {
            self.session.screen.notice(verdict);
        }
        if !ending.again && ending.failure.is_none() {
            let seconds = self.session.start.elapsed().as_secs_f64();
            let (outcome, code) = (ending.outcome, ending.code);
            self.session.screen.notice(&format!("{outcome} after {seconds:.1} s, exit code {code}"));
        }
        self.code = Some(ending.code);
    }

    fn report(&mut self, failure: &Failure) {
        self.session.screen.show(true, format!("{failure}\n").into_bytes());
        if let Err(e) = write_json(&self.session.folder.dir.failure(), failure) {
            self.session.screen.notice(&format!("warning: failure.json is not written: {e}"));
        }
    }

    /// Writes everything down.
    fn conclude(&mut self, code: i32) {
        self.events.write("end", json!({"outcome": self.session.manifest.outcome, "exit_code": code}));
        let manifest = &mut self.session.manifest;
        if let Some(described) = self.described.take()
            && let Ok(machine) = described.recv_timeout(DESCRIBE)
        {
            (manifest.machine, manifest.commit) = (machine.machine, machine.commit);
        }
        if manifest.outcome == "running" {
            manifest.outcome = "failed";
        }
        (manifest.ended, manifest.exit_code) = (Some(Utc::now().rfc3339()), Some(code));
        manifest.write(&self.session.folder.dir);
    }
}

/// Completes the manifest on a thread of its own, and writes it.
fn describe(manifest: Manifest, folder: &Folder) -> Receiver<Manifest> {
    let (send, receive) = channel();
    let dir = folder.dir.clone();
    let unfinished = manifest.clone();
    let sender = send.clone();
    let thread = std::thread::Builder::new().name("manifest".into());
    if thread.spawn(move || drop(sender.send(manifest.complete(&dir)))).is_err() {
        let _ = send.send(unfinished);
    }
    receive
}
