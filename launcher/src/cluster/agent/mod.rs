//! The agent of one node: does what the coordinator says, and tells what happens here.
//!
//! It owns all processes of the job on this node. Whatever becomes of the coordinator, none outlives the
//! agent's lease: without an acknowledged beat for that long it kills its ranks and leaves.

mod generation;
pub mod lease;
mod measure;

use anyhow::Context;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tsm_job::exit;

use super::key::Key;
use super::link::{Link, Outbox};
use super::message::{Beat, FromAgent, Join, NodeReport, Round, ToAgent};
use crate::addresses::{self, ProbeListener};
use crate::console::queue::{LIMIT, queue};
use crate::contain::Ability;
use crate::doctor::preflight::{Measured, OwnNode};
use crate::hang::report::Inspection;
use crate::hang::{self, ras};
use crate::logs::{Finished, Shown};
use crate::plan::Devices;
use crate::port::Port;
use crate::signals::{Caught, Signals};
use crate::start::slurm::step;
use crate::supervisor::{Action, Event, Phase};
use generation::Generation;
use lease::Lease;
use measure::Measuring;

/// Bytes of output that may wait for the connection.
const OUTPUT: usize = 1 << 20;
/// How long a probe waits for the first answer, and after it for others.
const PROBE: Duration = Duration::from_secs(5);
const LINGER: Duration = Duration::from_millis(300);

/// What an agent is made of.
pub struct Setup {
    /// From which all its times count.
    pub start: Instant,
    /// This executable.
    pub shim: PathBuf,
    pub host: String,
    pub devices: Devices,
    pub join: Join,
    /// For the answers to probes; `None` where there is one node only.
    pub key: Option<Key>,
    /// The coordinator lives in the same process.
    pub local: bool,
    /// Where lines go; `None`: to the coordinator's screen.
    pub shown: Option<Shown>,
}

/// How an agent ended.
#[derive(Debug, PartialEq)]
pub struct Leave {
    pub code: i32,
    pub message: Option<String>,
}

/// What the loop waits for beside messages.
enum Wake {
    Message(Option<ToAgent>),
    Workers(anyhow::Result<Vec<Event>>),
    Signal(Caught),
    Found(Found),
    Drained(Finished),
    StartMore,
    Time,
}

struct Agent {
    setup: Setup,
    link: Link,
    shown: Shown,
    generation: Option<Generation>,
    /// Ports held for rank 0, and answers to probes, by generation.
    reserved: Option<(Port, Option<ProbeListener>)>,
    measuring: Measuring,
    lease: Lease,
    /// The coordinator is gone, or said so: leave when nothing runs any more.
    leaving: Option<Leave>,
    draining: Option<tokio::task::JoinHandle<Finished>>,
    /// Debuggers are at work.
    looking: bool,
    reach: (UnboundedSender<Found>, UnboundedReceiver<Found>),
    /// Whether generations can have control groups.
    ability: Ability,
    load: crate::machine::Load,
}

enum Found {
    Reached(u32, u32, Vec<(std::net::IpAddr, String)>),
    Inspected(u32, Vec<Inspection>, Option<ras::Answer>),
    NodeMeasured(Round, OwnNode),
    Measured(Round, Result<Measured, String>),
}

/// Runs an agent to its end. Call on the main thread, see [`crate::process::spawn`]; inside a `LocalSet`.
///
/// # Errors
/// When signals cannot be handled.
pub async fn run(setup: Setup, link: Link) -> anyhow::Result<Leave> {
    let ability = Ability::find_out(&setup.shim);
    // The coordinator in the same process hears them itself.
    let mut signals = if setup.local {
        None
    } else {
        Some(Signals::catch()?)
    };
    link.to.send(FromAgent::Join(Box::new(setup.join.clone())));
    let now = setup.start.elapsed();
    let shown = match &setup.shown {
        Some(shown) => shown.clone(),
        None => ship(setup.host.clone(), link.to.clone()),
    };
    let mut agent = Agent {
        link,
        shown,
        generation: None,
        reserved: None,
        measuring: Measuring::default(),
        lease: Lease::new(now),
        leaving: None,
        draining: None,
        looking: false,
        reach: unbounded_channel(),
        ability,
        load: crate::machine::Load::new(),
        setup,
    };
    loop {
        if agent.generation.is_none()
            && let Some(leave) = agent.leaving.take()
        {
            return Ok(leave);
        }
        let wake = agent.wait(signals.as_mut()).await;
        agent.handle(wake);
        agent.tick();
    }
}

/// Sends lines to the coordinator's screen, no faster than they get through: what finds no room meanwhile is left to
/// the files, and counted.
fn ship(host: String, to: Outbox) -> Shown {
    let (feed, mut tap) = queue(LIMIT);
    tokio::spawn(async move {
        while let Some(batch) = tap.next().await {
            while to.waiting() > OUTPUT {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            to.send(FromAgent::Output { batch });
        }
    });
    let patience = Duration::from_secs(2);
    Shown {
        host,
        feed,
        patience,
    }
}

impl Agent {
    fn now(&self) -> Duration {
        self.setup.start.elapsed()
    }

    fn say(&self, message: FromAgent) {
        self.link.to.send(message);
    }

    async fn wait(&mut self, signals: Option<&mut Signals>) -> Wake {
        let deadline = self
            .deadline()
            .map(|at| tokio::time::Instant::from_std(self.setup.start + at));
        let starting = !self.looking
            && self.generation.as_ref().is_some_and(|g| {
                !g.is_started() && self.draining.is_none() && g.state.phase == Phase::Running
            });
        let connected = self.leaving.is_none();
        let is_draining = self.draining.is_some();
        let (generation, draining) = (&mut self.generation, &mut self.draining);
        tokio::select! {
            biased;
            // Before the ends of ranks that may have got it too.
            caught = async {
                match signals {
                    Some(signals) => signals.next().await,
                    None => std::future::pending().await,
                }
            } => Wake::Signal(caught),
            events = async {
                match generation {
                    Some(generation) if !is_draining => generation.next().await,
                    _ => std::future::pending().await,
                }
            } => Wake::Workers(events),
            message = self.link.from.recv(), if connected => Wake::Message(message),
            Some(found) = self.reach.1.recv() => Wake::Found(found),
            () = tokio::time::sleep_until(deadline.unwrap_or_else(tokio::time::Instant::now)), if deadline.is_some() => Wake::Time,
            output = async {
                match draining {
                    Some(task) => task.await.unwrap_or_default(),
                    None => std::future::pending().await,
                }
            } => Wake::Drained(output),
            () = std::future::ready(()), if starting => Wake::StartMore,
        }
    }

    fn deadline(&self) -> Option<Duration> {
        let generation = self.generation.as_ref().filter(|_| self.draining.is_none());
        let decided = generation.and_then(|g| match g.state.phase {
            // Looks again for processes that were left behind.
            Phase::Finished => Some(g.next_look),
            _ => g.state.deadline(),
        });
        let lease = (!self.setup.local && self.leaving.is_none()).then_some(self.lease.until);
        let beat = self.leaving.is_none().then_some(self.lease.next_beat);
        [decided, lease, beat].into_iter().flatten().min()
    }

    fn handle(&mut self, wake: Wake) {
        match wake {
            Wake::Message(Some(message)) => self.told(message),
            Wake::Message(None) => self.cut_off("the connection to the coordinator is gone"),
            Wake::Workers(Ok(events)) => {
                self.pass_words_on();
                self.decide(&events);
            }
            Wake::Workers(Err(e)) => self.cut_off(&format!("{e:#}")),
            // The coordinator decides; if it does not answer, the lease runs out.
            Wake::Signal(Caught { signal, sender }) if step::is_sent_to_all(sender) => {
                self.see_to_ranks(signal);
                self.say(FromAgent::StepSignal { signal });
            }
            Wake::Signal(Caught { signal, .. }) => self.say(FromAgent::Signal { signal }),
            Wake::Found(Found::Reached(generation, attempt, by)) => self.say(FromAgent::Reached {
                generation,
                attempt,
                by,
            }),
            Wake::Found(Found::Inspected(generation, looks, ras)) => {
                self.looking = false;
                self.say(FromAgent::Inspected {
                    generation,
                    looks,
                    ras,
                    more: false,
                });
            }
            Wake::Found(Found::NodeMeasured(round, own)) => {
                self.say(FromAgent::NodeMeasured { round, own });
            }
            Wake::Found(Found::Measured(round, result)) => {
                self.say(FromAgent::Measured { round, result });
            }
            Wake::Drained(output) => self.conclude(output),
            Wake::StartMore => self.start_more(),
            Wake::Time => {}
        }
    }

    /// A scheduler has signalled every process that it knows as one of the job: the ranks too, unless they are in
    /// a group of their own that it does not know.
    fn see_to_ranks(&mut self, signal: i32) {
        let Some(generation) = &self.generation else {
            return;
        };
        let saves = generation.start.saves && signal == libc::SIGUSR2;
        if !matches!(signal, libc::SIGUSR1 | libc::SIGUSR2) || saves {
            // The coordinator says what is to be done.
            return;
        }
        let event = match step::reaches(generation.containment()) {
            true => Event::Got { signal },
            false => Event::Pass { signal },
        };
        self.decide(&[event]);
    }

    fn pass_words_on(&mut self) {
        let Some(running) = &mut self.generation else {
            return;
        };
        let generation = running.start.generation;
        for word in running.take_words() {
            self.say(FromAgent::About { generation, word });
        }
    }

    fn told(&mut self, message: ToAgent) {
        let now = self.now();
        let number = self.generation.as_ref().map(|g| g.start.generation);
        match message {
            ToAgent::Welcome { lease } => self.lease.begin(lease, now),
            ToAgent::Ack { seq } => {
                self.lease.answered(seq, now);
                if !self.setup.local
                    && let Some(generation) = &mut self.generation
                {
                    generation.lease(self.lease.guard(now));
                }
            }
            ToAgent::Reserve {
                generation,
                attempt,
            } => match self.reserve(generation) {
                Ok((master_port, probe_port)) => self.say(FromAgent::Reserved {
                    generation,
                    attempt,
                    master_port,
                    probe_port,
                }),
                Err(e) => self.cannot_start(generation, &e),
            },
            ToAgent::Probe {
                generation,
                attempt,
                addresses,
                port,
            } => self.probe(generation, attempt, addresses, port),
            ToAgent::MeasureNode { round, scale } => self.measure_node(round, scale),
            ToAgent::OpenRing { round } => {
                let port = self.open_ring(round);
                self.say(FromAgent::RingOpen { round, port });
            }
            ToAgent::Measure { round, task } => self.measure_group(round, task),
            // It waited here while the agent was stopped: the coordinator may have given this node up since.
            ToAgent::Start(_) if !self.setup.local && self.lease.is_over(now) => {}
            ToAgent::Start(start) => {
                let generation = start.generation;
                self.measuring = Measuring::default();
                if number.is_some() {
                    let e = anyhow::anyhow!(
                        "the ranks of generation {} still run",
                        number.unwrap_or(0)
                    );
                    return self.cannot_start(generation, &e);
                }
                match Generation::prepare(&self.setup, &mut self.ability, *start, now) {
                    Ok(mut generation) => {
                        if !self.setup.local {
                            generation.lease(self.lease.guard(now));
                        }
                        self.generation = Some(generation);
                        self.start_more();
                    }
                    Err(e) => self.cannot_start(generation, &e),
                }
            }
            ToAgent::Stop {
                generation,
                signal,
                grace,
            } if number == Some(generation) => {
                self.decide(&[Event::Stop { signal, grace }]);
            }
            ToAgent::Signal { generation, signal } if number == Some(generation) => {
                self.decide(&[Event::Pass { signal }])
            }
            ToAgent::StepSignal { generation, signal } if number == Some(generation) => {
                self.see_to_ranks(signal);
            }
            ToAgent::Kill { generation } if number == Some(generation) => {
                self.decide(&[Event::KillAll])
            }
            ToAgent::Inspect { generation } if number == Some(generation) => {
                self.inspect(generation)
            }
            ToAgent::Tell { text } => eprintln!("tsm-launch: {text}"),
            ToAgent::Exit { code, message } => {
                self.decide(&[Event::KillAll]);
                self.leaving = Some(Leave { code, message });
            }
            // Of a generation that is over.
            ToAgent::Stop { .. }
            | ToAgent::Signal { .. }
            | ToAgent::StepSignal { .. }
            | ToAgent::Kill { .. }
            | ToAgent::Inspect { .. } => {}
        }
    }

    fn reserve(&mut self, generation: u32) -> anyhow::Result<(u16, u16)> {
        let port = Port::reserve(true)?;
        let probes = match &self.setup.key {
            Some(key) => {
                let key = key.clone();
                let prove = move |nonce| super::wire::prove(&key, nonce, u64::from(generation));
                Some(
                    ProbeListener::start(prove)
                        .context("cannot listen for the other nodes' probes")?,
                )
            }
            None => None,
        };
        let numbers = (port.number, probes.as_ref().map_or(0, |p| p.port));
        self.reserved = Some((port, probes));
        Ok(numbers)
    }

    fn probe(
        &mut self,
        generation: u32,
        attempt: u32,
        addresses: Vec<std::net::IpAddr>,
        port: u16,
    ) {
        let (found, key) = (self.reach.0.clone(), self.setup.key.clone());
        tokio::task::spawn_local(async move {
            let check = |nonce: [u8; 16], answer: [u8; 32]| {
                let of = u64::from(generation);
                key.as_ref()
                    .is_some_and(|key| super::wire::is_proof(key, nonce, of, &answer))
            };
            let by = addresses::reach(&addresses, port, check, PROBE, LINGER).await;
            let _ = found.send(Found::Reached(generation, attempt, by));
        });
    }

    /// Looks into the ranks with debuggers and the like, which takes its time. No worker is started meanwhile: a
    /// debugger would inherit its socket.
    fn inspect(&mut self, generation: u32) {
        let Some(current) = self.generation.as_ref().filter(|_| !self.looking) else {
            return;
        };
        self.looking = true;
        let (pids, ras) = (current.pids(), current.ras_address());
        let places: Vec<(u32, String)> = current.places();
        let host = self.setup.host.clone();
        let found = self.reach.0.clone();
        let looked = hang::look_into(hang::probe::Probe::default(), pids, ras);
        tokio::task::spawn_local(async move {
            let findings = looked.await;
            let (processes, ras) = findings.map_or((Vec::new(), None), |f| (f.processes, f.ras));
            let look = |((rank, device), process): ((u32, String), _)| Inspection {
                rank,
                host: host.clone(),
                device,
                process,
            };
            let looks = places.into_iter().zip(processes).map(look);
            let looks = looks.map(super::fit::look).collect();
            let _ = found.send(Found::Inspected(generation, looks, ras));
        });
    }

    fn start_more(&mut self) {
        let Some(generation) = &mut self.generation else {
            return;
        };
        let result = generation.start_some(&self.shown);
        let (number, pids, done, containment) = (
            generation.start.generation,
            generation.pids(),
            generation.is_started(),
            generation.containment(),
        );
        match result {
            Ok(()) if done => {
                let at = self.now();
                let environment = self
                    .generation
                    .as_ref()
                    .map(Generation::environment)
                    .unwrap_or_default();
                self.say(FromAgent::Started {
                    generation: number,
                    pids,
                    at,
                    environment,
                    containment,
                });
            }
            Ok(()) => {}
            Err(e) => {
                // Its workers are killed; they go with it.
                if let Some(generation) = self.generation.take() {
                    generation.kill();
                    drop(generation.conclude(Finished::default()));
                }
                self.cannot_start(number, &e);
            }
        }
    }

    fn cannot_start(&self, generation: u32, e: &anyhow::Error) {
        let code = match exit::code_of(e) {
            1 => exit::PREFLIGHT,
            code => code,
        };
        self.say(FromAgent::CannotStart {
            generation,
            code,
            message: format!("{e:#}"),
        });
    }

    fn decide(&mut self, events: &[Event]) {
        let now = self.now();
        let Some(generation) = &mut self.generation else {
            return;
        };
        let (number, first) = (generation.start.generation, generation.start.first_rank);
        let actions = generation.decide(events, now);
        if !generation.is_started()
            && generation.state.phase != Phase::Running
            && self.draining.is_none()
        {
            let _ = generation.give_up_starting(&self.shown);
            // Those that were to be waited for may never have been started.
            generation.decide(&[], now);
        }
        for action in actions {
            match action {
                Action::Failing { rank, end } => self.say(FromAgent::Failing {
                    generation: number,
                    local_rank: rank as u32,
                    end,
                    at: now,
                }),
                Action::Answered { rank, end } => self.say(FromAgent::Answered {
                    generation: number,
                    local_rank: rank as u32,
                    end,
                }),
                Action::GraceOver { ranks } => {
                    let ranks: Vec<String> = ranks
                        .iter()
                        .map(|&r| (first + r as u32).to_string())
                        .collect();
                    let text = format!("the grace is over: killing rank {}", ranks.join(", "));
                    self.say(FromAgent::Notice { text });
                }
                Action::Signal { .. } | Action::Kill { .. } => {}
            }
        }
    }

    /// What is due by the clock alone.
    fn tick(&mut self) {
        let now = self.now();
        if !self.setup.local && self.leaving.is_none() && self.lease.is_over(now) {
            let lease = tsm_job::config::duration::format(self.lease.length());
            self.cut_off(&format!("no answer from the coordinator for {lease}"));
        }
        if self.leaving.is_none() && now >= self.lease.next_beat {
            self.beat(now);
        }
        if let Some(generation) = &self.generation
            && generation.state.deadline().is_some_and(|at| now >= at)
        {
            self.decide(&[Event::Deadline]);
        }
        self.finish(now);
    }

    fn beat(&mut self, now: Duration) {
        let seq = self.lease.beat(now);
        let (load, mem_used_bytes) = self.load.read(now);
        let (ranks, metrics) = self
            .generation
            .as_mut()
            .map(Generation::news)
            .unwrap_or_default();
        let beat = Beat {
            seq,
            generation: self.generation.as_ref().map_or(0, |g| g.start.generation),
            at: now,
            rtt: self.lease.rtt,
            ranks,
            metrics,
            load,
            mem_used_bytes,
        };
        self.say(FromAgent::Beat(beat));
    }

    /// The coordinator can no longer say anything: nothing may run on.
    fn cut_off(&mut self, why: &str) {
        if self.leaving.is_none() {
            // Where only one direction is broken, the user learns what happened here.
            let text = format!("{} leaves: {why}", self.setup.host);
            self.say(FromAgent::Notice { text });
            self.leaving = Some(Leave {
                code: exit::PEER,
                message: Some(why.into()),
            });
            self.decide(&[Event::KillAll]);
        }
    }

    /// Brings a generation whose workers have all ended to its end.
    fn finish(&mut self, now: Duration) {
        let to = self.link.to.clone();
        let at_once = self.leaving.is_some();
        let Some(generation) = &mut self.generation else {
            return;
        };
        if generation.state.phase != Phase::Finished || self.draining.is_some() {
            return;
        }
        if generation.end_descendants(now, at_once, |text| to.send(FromAgent::Notice { text }))
            && let Some(logs) = generation.take_logs()
        {
            self.draining = Some(tokio::task::spawn_blocking(move || generation::drain(logs)));
        }
    }

    fn conclude(&mut self, output: Finished) {
        self.draining = None;
        // What ranks said last is for the status.
        let now = self.now();
        self.beat(now);
        if let Some(generation) = self.generation.take() {
            let number = generation.start.generation;
            let report: NodeReport = generation.conclude(output);
            self.reserved = None;
            // Ranks that were killed since this node was cut off did not fail: the node is lost.
            if self.leaving.is_none() {
                self.say(FromAgent::Clean {
                    generation: number,
                    report: Box::new(report),
                });
            }
        }
    }
}
