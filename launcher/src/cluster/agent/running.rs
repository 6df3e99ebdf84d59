//! A generation on its way from its start to its end, and what the coordinator hears of it.

use super::Agent;
use super::generation::{Generation, drain};
use super::measure::Measuring;
use crate::cluster::fit;
use crate::cluster::message::{FromAgent, Start};
use crate::hang;
use crate::hang::report::Inspection;
use crate::limits;
use crate::logs::Finished;
use crate::supervisor::{Action, Event, Phase};
use crate::text::ranks_named;
use tokio::sync::oneshot;
use tsm_job::exit;

impl Agent {
    pub(super) fn start(&mut self, start: Start) {
        let number = start.generation;
        self.measuring = Measuring::default();
        if let Some(current) = &self.generation {
            let current = current.start.generation;
            let e = anyhow::anyhow!("the ranks of generation {current} still run");
            return self.cannot_start(number, &e);
        }
        let now = self.now();
        match Generation::prepare(&self.setup, &mut self.ability, start, now) {
            Ok(mut generation) => {
                if !self.setup.local {
                    generation.lease(self.lease.guard(now));
                }
                self.generation = Some(generation);
                self.start_more();
            }
            Err(e) => self.cannot_start(number, &e),
        }
    }

    /// Starts the next few workers.
    pub(super) fn start_more(&mut self) {
        let Some(generation) = &mut self.generation else {
            return;
        };
        let number = generation.start.generation;
        match generation.start_some(&self.shown) {
            Ok(()) if generation.is_started() => {
                let started = FromAgent::Started {
                    generation: number,
                    pids: generation.pids(),
                    cores: generation.cores(),
                    at: self.setup.start.elapsed(),
                    environment: generation.environment(),
                    containment: generation.containment(),
                };
                self.say(started);
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

    pub(super) fn cannot_start(&self, generation: u32, e: &anyhow::Error) {
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

    /// Does what the supervisor decides about `events`, and tells the rest.
    pub(super) fn decide(&mut self, events: &[Event]) {
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
                    let ranks: Vec<u32> = ranks.iter().map(|&r| first + r as u32).collect();
                    let text = format!("the grace is over: killing {}", ranks_named(&ranks));
                    self.say(FromAgent::Notice { text });
                }
                Action::Signal { .. } | Action::Kill { .. } => {}
            }
        }
    }

    /// Looks into the ranks with debuggers and the like, which takes its time.
    pub(super) fn inspect(&mut self, generation: u32) {
        let Some(current) = self.generation.as_ref().filter(|_| !self.looking) else {
            return;
        };
        self.looking = true;
        let (pids, ras) = (current.pids(), current.ras_address());
        let places: Vec<(u32, String)> = current.places();
        let host = self.setup.host.clone();
        let found = self.found.0.clone();
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
            let looks = looks.map(fit::look).collect();
            let _ = found.send(FromAgent::Inspected {
                generation,
                looks,
                ras,
                more: false,
            });
        });
    }

    /// Where all workers have ended, ends what they left behind; then their output is read to its end.
    pub(super) fn finish(&mut self) {
        let (now, to) = (self.now(), self.link.to.clone());
        let at_once = self.leaving.is_some();
        let Some(generation) = &mut self.generation else {
            return;
        };
        if generation.state.phase != Phase::Finished || self.draining.is_some() {
            return;
        }
        if generation.end_leftovers(now, at_once, |text| to.send(FromAgent::Notice { text }))
            && let Some(logs) = generation.take_logs()
        {
            let (done, draining) = oneshot::channel();
            limits::beside("drain", move || drop(done.send(drain(logs))));
            self.draining = Some(draining);
        }
    }

    /// Nothing of it runs, and all its output is read.
    pub(super) fn conclude(&mut self, output: Finished) {
        self.draining = None;
        // What ranks said last is for the status.
        self.beat(self.now());
        if let Some(generation) = self.generation.take() {
            let number = generation.start.generation;
            let report = generation.conclude(output);
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
