//! An agent without processes and sockets: the decisions of [`crate::cluster::agent`] around the same lease and the
//! same supervisor.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::cluster::agent::lease::Lease;
use crate::cluster::coordinator::tests::{join_of, place_of};
use crate::cluster::message::{Beat, FromAgent, NodeReport, Progress, Start, ToAgent};
use crate::doctor::preflight::{Measured, OwnNode};
use crate::oom::OomKills;
use crate::report::Place;
use crate::supervisor::{self, Action, Event, Phase};
use tsm_job::exit;

/// What wakes an agent.
#[derive(Clone, Debug)]
pub enum Input {
    Message(ToAgent),
    /// The connection is gone.
    Closed,
    Ranks(Event),
    Stepped {
        local: usize,
        step: u64,
        saved: bool,
    },
    Words {
        local: usize,
        text: String,
    },
    Signal(i32),
    /// Output is read to its end.
    Drained,
    /// A measurement is over, with this to say.
    Measured(FromAgent),
    Time,
}

/// What the rim of an agent does.
#[derive(Clone, Debug)]
pub enum Effect {
    Say(FromAgent),
    /// Start the ranks of this generation.
    Spawn(Box<Start>),
    Signal {
        local: usize,
        signal: i32,
    },
    Kill {
        local: usize,
    },
    /// The guard kills all ranks unless it is told so again within this time.
    Guard(Duration),
    /// Nothing runs any more: the guard may go.
    Dismiss,
    Drain,
    /// To be woken up with this when the measurement is over.
    Measure(FromAgent),
    Exit(i32),
}

struct Generation {
    start: Start,
    state: supervisor::State,
    places: Vec<Place>,
    progress: BTreeMap<usize, Progress>,
    began_at: Duration,
    draining: bool,
}

pub struct Agent {
    pub host: String,
    local: bool,
    lease: Lease,
    generation: Option<Generation>,
    leaving: Option<i32>,
    /// Its disk is broken: ranks cannot be started.
    pub broken: bool,
    /// It never says that it is clean, nor what it has measured.
    pub mute: bool,
    /// Its place among all nodes, and which of them have a bad network.
    pub network: (u16, Vec<Network>),
}

/// How a node's network is. Worse is more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Network {
    Good,
    Slow,
    Dead,
}

impl Agent {
    /// Starts and greets.
    pub fn new(host: &str, local: bool, workers: u32, now: Duration) -> (Agent, Vec<Effect>) {
        let agent = Agent {
            host: host.into(),
            local,
            lease: Lease::new(now),
            generation: None,
            leaving: None,
            broken: false,
            mute: false,
            network: (0, Vec::new()),
        };
        let join = FromAgent::Join(Box::new(join_of(host, workers)));
        (agent, vec![Effect::Say(join)])
    }

    pub fn deadline(&self) -> Option<Duration> {
        let generation = self.generation.as_ref().filter(|g| !g.draining);
        let decided = generation.and_then(|g| g.state.deadline());
        let here = self.leaving.is_none();
        let lease = (!self.local && here).then_some(self.lease.until);
        let beat = here.then_some(self.lease.next_beat);
        [decided, lease, beat].into_iter().flatten().min()
    }

    /// `now` is by the agent's own clock.
    pub fn wake(&mut self, input: Input, now: Duration) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.handle(input, now, &mut effects);
        self.tick(now, &mut effects);
        if self.generation.is_none()
            && let Some(code) = self.leaving
        {
            effects.push(Effect::Exit(code));
        }
        effects
    }

    fn handle(&mut self, input: Input, now: Duration, effects: &mut Vec<Effect>) {
        match input {
            // Who leaves does not listen.
            Input::Message(message) if self.leaving.is_none() => self.told(message, now, effects),
            Input::Message(_) => {}
            Input::Closed => self.cut_off(now, effects),
            Input::Ranks(event) => self.decide(event, now, effects),
            Input::Stepped { local, step, saved } => {
                if let Some(generation) = &mut self.generation {
                    let progress = generation.progress.entry(local).or_default();
                    progress.local_rank = local as u32;
                    progress.step = Some(step);
                    progress.checkpoint = saved.then_some(step).or(progress.checkpoint);
                }
                self.decide(Event::Step { rank: local, step }, now, effects);
            }
            Input::Words { local, text } => {
                if let Some(generation) = &mut self.generation {
                    generation.places[local].stderr.push(text);
                }
            }
            Input::Signal(signal) => effects.push(Effect::Say(FromAgent::Signal { signal })),
            Input::Drained => self.conclude(now, effects),
            Input::Measured(message) if self.leaving.is_none() && !self.mute => {
                effects.push(Effect::Say(message));
            }
            Input::Measured(_) => {}
            Input::Time => {}
        }
    }

    fn told(&mut self, message: ToAgent, now: Duration, effects: &mut Vec<Effect>) {
        let number = self.generation.as_ref().map(|g| g.start.generation);
        let say = |message, effects: &mut Vec<Effect>| effects.push(Effect::Say(message));
        match message {
            ToAgent::Welcome { lease } => self.lease.begin(lease, now),
            ToAgent::Ack { seq } => {
                self.lease.answered(seq, now);
                if !self.local && self.generation.is_some() {
                    effects.push(Effect::Guard(self.lease.guard(now)));
                }
            }
            ToAgent::Reserve {
                generation,
                attempt,
            } => {
                let reserved = FromAgent::Reserved {
                    generation,
                    attempt,
                    master_port: 1,
                    probe_port: 2,
                };
                say(reserved, effects);
            }
            ToAgent::Probe {
                generation,
                attempt,
                addresses,
                ..
            } => {
                let by = vec![(addresses[0], "eth0".into())];
                let reached = FromAgent::Reached {
                    generation,
                    attempt,
                    by,
                };
                say(reached, effects);
            }
            ToAgent::MeasureNode { round, .. } => {
                let own = OwnNode {
                    memory_gbyte_s: Some(10.0),
                    ..OwnNode::default()
                };
                effects.push(Effect::Measure(FromAgent::NodeMeasured { round, own }));
            }
            // The port says who it is.
            ToAgent::OpenRing { round } => {
                let port = Ok(self.network.0);
                say(FromAgent::RingOpen { round, port }, effects);
            }
            ToAgent::Measure { round, task } => {
                let of = |port: u16| {
                    let all = &self.network.1;
                    all.get(usize::from(port)).copied().unwrap_or(Network::Good)
                };
                let worst = task.members.iter().map(|at| of(at.port())).max();
                let measured = |gbit_s| Measured {
                    seconds: 1.0,
                    gbit_s,
                    round_trip: Duration::ZERO,
                    wrong: None,
                };
                let result = match worst.unwrap_or(Network::Good) {
                    Network::Good => Ok(measured(10.0)),
                    Network::Slow => Ok(measured(1.0)),
                    Network::Dead => Err("no route".into()),
                };
                effects.push(Effect::Measure(FromAgent::Measured { round, result }));
            }
            ToAgent::Start(_) if !self.local && self.lease.is_over(now) => {}
            ToAgent::Start(start) if self.broken || number.is_some() => say(
                FromAgent::CannotStart {
                    generation: start.generation,
                    code: exit::PREFLIGHT,
                    message: "the disk is read-only".into(),
                },
                effects,
            ),
            ToAgent::Start(start) => {
                if !self.local {
                    effects.push(Effect::Guard(self.lease.guard(now)));
                }
                let num_ranks = start.num_ranks as usize;
                let state =
                    supervisor::State::new(num_ranks, start.grace, start.saves, start.shielded);
                effects.push(Effect::Spawn(start.clone()));
                let started = FromAgent::Started {
                    generation: start.generation,
                    pids: vec![1; num_ranks],
                    cores: Vec::new(),
                    at: now,
                    environment: Vec::new(),
                    containment: Default::default(),
                };
                say(started, effects);
                self.generation = Some(Generation {
                    start: *start,
                    state,
                    places: vec![place_of(&self.host); num_ranks],
                    progress: BTreeMap::new(),
                    began_at: now,
                    draining: false,
                });
            }
            ToAgent::Stop {
                generation,
                signal,
                grace,
            } if number == Some(generation) => {
                self.decide(Event::Stop { signal, grace }, now, effects);
            }
            ToAgent::Signal { generation, signal } if number == Some(generation) => {
                self.decide(Event::Pass { signal }, now, effects);
            }
            ToAgent::Kill { generation } if number == Some(generation) => {
                self.decide(Event::KillAll, now, effects);
            }
            ToAgent::Inspect { generation } if number == Some(generation) => {
                let (looks, ras) = (Vec::new(), None);
                let inspected = FromAgent::Inspected {
                    generation,
                    looks,
                    ras,
                    more: false,
                };
                say(inspected, effects);
            }
            ToAgent::Exit { code, .. } => {
                self.decide(Event::KillAll, now, effects);
                self.leaving = Some(code);
            }
            ToAgent::Stop { .. }
            | ToAgent::Signal { .. }
            | ToAgent::StepSignal { .. }
            | ToAgent::Kill { .. }
            | ToAgent::Inspect { .. }
            | ToAgent::Tell { .. } => {}
        }
    }

    fn decide(&mut self, event: Event, now: Duration, effects: &mut Vec<Effect>) {
        let Some(generation) = &mut self.generation else {
            return;
        };
        for action in supervisor::decide(&mut generation.state, &[event], now) {
            effects.push(match action {
                Action::Signal { rank, signal } => Effect::Signal {
                    local: rank,
                    signal,
                },
                Action::Kill { rank } => Effect::Kill { local: rank },
                Action::Failing { rank, end } => Effect::Say(FromAgent::Failing {
                    generation: generation.start.generation,
                    local_rank: rank as u32,
                    end,
                    at: now,
                }),
                Action::Answered { rank, end } => Effect::Say(FromAgent::Answered {
                    generation: generation.start.generation,
                    local_rank: rank as u32,
                    end,
                }),
                Action::GraceOver { .. } => Effect::Say(FromAgent::Notice {
                    text: "the grace is over".into(),
                }),
            });
        }
    }

    fn tick(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        if !self.local && self.leaving.is_none() && self.lease.is_over(now) {
            self.cut_off(now, effects);
        }
        if self.leaving.is_none() && now >= self.lease.next_beat {
            self.beat(now, effects);
        }
        if let Some(generation) = &self.generation
            && generation.state.deadline().is_some_and(|at| now >= at)
        {
            self.decide(Event::Deadline, now, effects);
        }
        if let Some(generation) = &mut self.generation
            && generation.state.phase == Phase::Finished
            && !std::mem::replace(&mut generation.draining, true)
        {
            effects.push(Effect::Drain);
        }
    }

    fn beat(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let seq = self.lease.beat(now);
        let news = |g: &mut Generation| {
            let ranks = std::mem::take(&mut g.progress).into_values().collect();
            (g.start.generation, ranks)
        };
        let (generation, ranks) = self.generation.as_mut().map(news).unwrap_or_default();
        effects.push(Effect::Say(FromAgent::Beat(Beat {
            seq,
            generation,
            at: now,
            rtt: self.lease.rtt,
            ranks,
            ..Beat::default()
        })));
    }

    fn cut_off(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        if self.leaving.is_none() {
            self.leaving = Some(exit::PEER);
            self.decide(Event::KillAll, now, effects);
        }
    }

    fn conclude(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        self.beat(now, effects);
        let Some(generation) = self.generation.take() else {
            return;
        };
        effects.push(Effect::Dismiss);
        let report = NodeReport {
            ranks: generation
                .state
                .ranks
                .into_iter()
                .zip(generation.places)
                .collect(),
            started_at: generation.began_at,
            oom_kills: OomKills::default(),
            xids: Vec::new(),
            warnings: Vec::new(),
            missing: None,
        };
        if !self.mute && self.leaving.is_none() {
            effects.push(Effect::Say(FromAgent::Clean {
                generation: generation.start.generation,
                report: Box::new(report),
            }));
        }
    }
}
