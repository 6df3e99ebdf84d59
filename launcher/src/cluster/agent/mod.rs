//! The agent of one node: does what the coordinator says, and tells what happens here.
//!
//! It owns all processes of the job on this node. Whatever becomes of the coordinator, none outlives the
//! agent's lease: without an acknowledged beat for that long it kills its ranks and leaves.

mod generation;
pub mod lease;
mod leftovers;
mod measure;
mod news;
mod prepared;
mod reach;
mod running;

use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tsm_job::exit;

use super::key::Key;
use super::link::{Link, Outbox};
use super::message::{Beat, FromAgent, Join, ToAgent};
use crate::console::queue::{LIMIT, queue};
use crate::contain::Ability;
use crate::logs::{Finished, Shown};
use crate::own::Executable;
use crate::plan::Devices;
use crate::say::say;
use crate::signals::{Caught, Signals};
use crate::start::slurm::step;
use crate::supervisor::{Event, Phase};
use generation::Generation;
use lease::Lease;
use measure::Measuring;
use reach::Reserved;

/// Bytes of output that may wait for the connection.
const OUTPUT: usize = 1 << 20;

/// What an agent is made of.
pub struct Setup {
    /// From which all its times count.
    pub start: Instant,
    pub shim: Executable,
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
    Found(FromAgent),
    Drained(Finished),
    StartMore,
    Time,
    /// Nobody but the workers has something to say.
    Nothing,
}

struct Agent {
    setup: Setup,
    link: Link,
    shown: Shown,
    generation: Option<Generation>,
    reserved: Option<Reserved>,
    measuring: Measuring,
    lease: Lease,
    /// The coordinator is gone, or said so: leave when nothing runs any more.
    leaving: Option<Leave>,
    draining: Option<oneshot::Receiver<Finished>>,
    /// Debuggers are at work.
    looking: bool,
    /// The workers had their turn: whatever else waits comes first, once.
    others_first: bool,
    /// What its threads and tasks have found out, to be said.
    found: (UnboundedSender<FromAgent>, UnboundedReceiver<FromAgent>),
    /// Whether generations can have control groups.
    ability: Ability,
    load: crate::machine::Load,
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
        others_first: false,
        found: unbounded_channel(),
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
        let starting = self.generation.as_ref().is_some_and(|g| {
            !g.is_started() && self.draining.is_none() && g.state.phase == Phase::Running
        });
        let connected = self.leaving.is_none();
        let is_draining = self.draining.is_some();
        let others_first = std::mem::take(&mut self.others_first);
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
            }, if !others_first => Wake::Workers(events),
            message = self.link.from.recv(), if connected => Wake::Message(message),
            Some(found) = self.found.1.recv() => Wake::Found(found),
            () = tokio::time::sleep_until(deadline.unwrap_or_else(tokio::time::Instant::now)), if deadline.is_some() => Wake::Time,
            output = async {
                match draining {
                    Some(task) => task.await.unwrap_or_default(),
                    None => std::future::pending().await,
                }
            } => Wake::Drained(output),
            () = std::future::ready(()), if starting => Wake::StartMore,
            () = std::future::ready(()), if others_first => Wake::Nothing,
        }
    }

    fn deadline(&self) -> Option<Duration> {
        let generation = self.generation.as_ref().filter(|_| self.draining.is_none());
        let decided = generation.and_then(|g| match g.state.phase {
            // Looks again for processes that were left behind.
            Phase::Finished => Some(g.next_look()),
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
                self.others_first = true;
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
            Wake::Found(message) => {
                self.looking &= !matches!(message, FromAgent::Inspected { .. });
                self.say(message);
            }
            Wake::Drained(output) => self.conclude(output),
            Wake::StartMore => self.start_more(),
            Wake::Time | Wake::Nothing => {}
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
        for word in running.news.take_words() {
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
            } => match Reserved::new(self.setup.key.as_ref(), generation) {
                Ok(reserved) => {
                    self.say(FromAgent::Reserved {
                        generation,
                        attempt,
                        master_port: reserved.master.number,
                        probe_port: reserved.probes.as_ref().map_or(0, |probes| probes.port),
                    });
                    self.reserved = Some(reserved);
                }
                Err(e) => self.cannot_start(generation, &e),
            },
            ToAgent::Probe {
                generation,
                attempt,
                addresses,
                port,
            } => {
                let (key, found) = (self.setup.key.clone(), self.found.0.clone());
                reach::probe(key, generation, attempt, addresses, port, found);
            }
            ToAgent::MeasureNode { round, scale } => self.measure_node(round, scale),
            ToAgent::OpenRing { round } => {
                let port = self.open_ring(round);
                self.say(FromAgent::RingOpen { round, port });
            }
            ToAgent::Measure { round, task } => self.measure_group(round, task),
            // It waited here while the agent was stopped: the coordinator may have given this node up since.
            ToAgent::Start(_) if !self.setup.local && self.lease.is_over(now) => {}
            ToAgent::Start(start) => self.start(*start),
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
            ToAgent::Tell { text } => say(text),
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
        self.finish();
    }

    fn beat(&mut self, now: Duration) {
        let seq = self.lease.beat(now);
        let (load, mem_used_bytes) = self.load.read(now);
        let (ranks, metrics) = self
            .generation
            .as_mut()
            .map(|generation| generation.news.take())
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
}
