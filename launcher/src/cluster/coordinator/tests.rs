//! Every decision, with scripted agents. What happens in all orders is left to [`crate::cluster::simulation`].

mod forming;
mod gpus;
mod hostile;
mod left_out;
mod losses;
mod measuring;
mod passing;
mod properties;
mod running;
mod stopping;

use serde_json::Value;
use std::collections::BTreeSet;

use super::*;
use crate::cluster::message::{
    About, BEATS_PER_LEASE, Beat, Facts, FromAgent, Join, LEASE, NodeReport, Progress, SILENCE,
    ToAgent,
};
use crate::doctor::preflight::Scale;
use crate::end::End;
use crate::hang::progress::Limits;
use crate::oom::OomKills;
use crate::report::Place;
use crate::supervisor::Rank;
use tsm_job::exit;
use tsm_job::message::FailureRecord;

const MS: fn(u64) -> Duration = Duration::from_millis;
const S: fn(u64) -> Duration = Duration::from_secs;
const GRACE: Duration = Duration::from_secs(5);
/// Workers of each node.
const WORKERS: u32 = 2;
const TERM: i32 = libc::SIGTERM;

pub(in crate::cluster) fn settings(min_nodes: u32, max_nodes: u32) -> Settings {
    Settings {
        min_nodes,
        max_nodes,
        join: S(60),
        last_call: S(5),
        lease: LEASE,
        open: true,
        is_read: false,
        hosts: Vec::new(),
        job: super::Job {
            run_id: "run".into(),
            run_dir: "/run".into(),
            config: None,
            digest: "d".into(),
            options: Vec::new(),
            command: vec!["train".into()],
            directory: "/".into(),
            base_env: None,
            env: Vec::new(),
            resume_from: None,
            start_from: None,
            grace: GRACE,
            show: None,
            affinity: false,
            resume: None,
            shielded: false,
            saves: true,
        },
        policy: policy::Options::default(),
        hang: Limits::default(),
        measure: None,
        save_at: None,
        requeues: false,
    }
}

pub(crate) fn join_of(host: &str, workers: u32) -> Join {
    Join {
        version: env!("CARGO_PKG_VERSION").into(),
        host: host.into(),
        order: None,
        pid: 1,
        devices: (0..workers).map(|i| format!("cpu{i}")).collect(),
        gpus: Vec::new(),
        addresses: vec![([10, 0, 0, 1].into(), "eth0".into())],
        job: None,
        options: Vec::new(),
        facts: Facts::default(),
        received_ms: 0,
    }
}

pub(in crate::cluster) fn place_of(host: &str) -> Place {
    Place {
        host: host.into(),
        device: "cpu".into(),
        pid: 7,
        stderr_file: "err".into(),
        error_file: "error".into(),
        exception: None,
        stderr: Vec::new(),
        oom_kill: None,
        stuck_in: None,
    }
}

/// A rank that ended so, at this time.
fn rank(end: End, ms: u64) -> Rank {
    Rank {
        end: Some(end),
        ended_at: MS(ms),
        first_at: MS(ms),
        order: ms as usize,
        ..Rank::default()
    }
}

/// A rank that was told to end, and did.
fn stopped(signal: i32, ms: u64) -> Rank {
    Rank {
        sent: vec![signal],
        after_stop: true,
        ..rank(End::Signal(signal), ms)
    }
}

fn announced(code: i32) -> FailureRecord {
    FailureRecord {
        rank: 0,
        step: None,
        code,
        cause: "error".into(),
        message: "m".into(),
        backtrace: None,
    }
}

/// A coordinator with agents that answer what is asked before a start, and beat as long as they are `alive`.
struct Scene {
    state: State,
    now: Duration,
    actions: Vec<Action>,
    alive: BTreeSet<NodeId>,
    next_beat: Duration,
}

impl Scene {
    fn new(settings: Settings) -> Scene {
        Scene {
            state: State::new(settings, Duration::ZERO),
            now: Duration::ZERO,
            actions: Vec::new(),
            alive: BTreeSet::new(),
            next_beat: LEASE / BEATS_PER_LEASE,
        }
    }

    /// So many nodes, of which `max` get ranks.
    fn running(settings: Settings, num_nodes: u64) -> Scene {
        let mut scene = Scene::new(settings);
        (1..=num_nodes).for_each(|id| scene.join(id));
        assert_eq!(scene.state.phase, Phase::Run);
        scene.actions.clear();
        scene
    }

    fn event(&mut self, event: Event) {
        for action in decide(&mut self.state, event, self.now) {
            self.actions.push(action.clone());
            if let Action::Send { node, message } = action
                && self.alive.contains(&node)
            {
                self.answer(node, &message);
            }
        }
    }

    fn answer(&mut self, node: NodeId, message: &ToAgent) {
        match *message {
            ToAgent::Reserve {
                generation,
                attempt,
            } => self.says(
                node,
                FromAgent::Reserved {
                    generation,
                    attempt,
                    master_port: 1000 + attempt as u16,
                    probe_port: 2,
                },
            ),
            ToAgent::Probe {
                generation,
                attempt,
                ref addresses,
                ..
            } => {
                let by = vec![(addresses[0], "eth0".into())];
                let reached = FromAgent::Reached {
                    generation,
                    attempt,
                    by,
                };
                self.says(node, reached);
            }
            _ => {}
        }
    }

    fn says(&mut self, node: NodeId, message: FromAgent) {
        self.event(Event::Said {
            node,
            local: false,
            message,
        });
    }

    fn join(&mut self, id: NodeId) {
        self.alive.insert(id);
        let join = join_of(&format!("n{id}"), WORKERS);
        self.says(id, FromAgent::Join(Box::new(join)));
    }

    /// Its connection ends.
    fn lose(&mut self, node: NodeId) {
        self.alive.remove(&node);
        let how = "its agent broke off the connection".into();
        self.event(Event::Lost { node, how });
    }

    fn beat(&mut self, id: NodeId, ranks: Vec<Progress>) {
        let beat = Beat {
            generation: self.state.generation,
            at: self.now,
            rtt: Some(MS(2)),
            ranks,
            ..Beat::default()
        };
        self.says(id, FromAgent::Beat(beat));
    }

    /// Every rank finishes this step.
    fn step(&mut self, step: u64, checkpoint: Option<u64>) {
        for member in self.state.members.clone() {
            let progress = |local_rank| Progress {
                local_rank,
                step: Some(step),
                checkpoint: checkpoint.filter(|_| local_rank == 0),
                ..Progress::default()
            };
            self.beat(member.id, (0..WORKERS).map(progress).collect());
        }
    }

    fn clean(&mut self, id: NodeId, ranks: Vec<Rank>) {
        let host = format!("n{id}");
        let report = NodeReport {
            ranks: ranks.into_iter().map(|r| (r, place_of(&host))).collect(),
            started_at: Duration::ZERO,
            oom_kills: OomKills::default(),
            xids: Vec::new(),
            warnings: Vec::new(),
            missing: None,
        };
        let generation = self.state.generation;
        let report = Box::new(report);
        self.says(id, FromAgent::Clean { generation, report });
    }

    /// All its ranks ended so.
    fn all_end(&mut self, id: NodeId, end: End) {
        let ms = self.now.as_millis() as u64;
        self.clean(id, vec![rank(end, ms); WORKERS as usize]);
    }

    fn all_stopped(&mut self, id: NodeId) {
        let ms = self.now.as_millis() as u64;
        self.clean(id, vec![stopped(TERM, ms); WORKERS as usize]);
    }

    fn failing(&mut self, id: NodeId, local_rank: u32, end: Option<End>) {
        let (generation, at) = (self.state.generation, self.now);
        let failing = FromAgent::Failing {
            generation,
            local_rank,
            end,
            at,
        };
        self.says(id, failing);
    }

    /// Time goes by; who is alive beats.
    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        let mut at_once = 0;
        loop {
            let deadline = self.state.deadline().unwrap_or(Duration::MAX);
            let next = deadline.min(self.next_beat);
            if next > until || self.state.finished().is_some() {
                break;
            }
            if next > self.now {
                (self.now, at_once) = (next, 0);
            }
            if next == self.next_beat {
                self.next_beat += LEASE / BEATS_PER_LEASE;
                for id in self.alive.clone() {
                    self.beat(id, Vec::new());
                }
            } else {
                at_once += 1;
                assert!(at_once < 100, "a deadline that does not go away");
                self.event(Event::Deadline);
            }
        }
        self.now = until;
    }

    /// What was said to a node since this was asked last, without greetings and answers to beats.
    fn told(&mut self, id: NodeId) -> Vec<ToAgent> {
        let (mut told, mut rest) = (Vec::new(), Vec::new());
        for action in self.actions.drain(..) {
            match action {
                Action::Send { node, message } if node == id => told.push(message),
                other => rest.push(other),
            }
        }
        self.actions = rest;
        told.retain(|m| {
            !matches!(
                m,
                ToAgent::Ack { .. }
                    | ToAgent::Welcome { .. }
                    | ToAgent::Reserve { .. }
                    | ToAgent::Probe { .. }
            )
        });
        told
    }

    fn was_stopped_by(&mut self, id: NodeId) -> Option<i32> {
        self.told(id).iter().find_map(|m| match m {
            ToAgent::Stop { signal, .. } => Some(*signal),
            _ => None,
        })
    }

    fn exit_of(&mut self, id: NodeId) -> Option<i32> {
        self.told(id).iter().find_map(|m| match m {
            ToAgent::Exit { code, .. } => Some(*code),
            _ => None,
        })
    }

    fn notices(&self) -> String {
        let text = |a: &Action| match a {
            Action::Notice(text) => Some(text.clone()),
            _ => None,
        };
        self.actions
            .iter()
            .filter_map(text)
            .collect::<Vec<_>>()
            .join("\n")
    }

    fn endings(&self) -> Vec<&Ending> {
        let ending = |a: &'_ Action| matches!(a, Action::Ended(_));
        let endings = self.actions.iter().filter(|a| ending(a));
        endings
            .map(|a| match a {
                Action::Ended(ending) => &**ending,
                _ => unreachable!(),
            })
            .collect()
    }

    /// Why everybody left.
    fn reason(&self) -> Option<String> {
        self.actions.iter().find_map(|action| match action {
            Action::Left(reason) => Some(reason.to_string()),
            _ => None,
        })
    }

    /// The last.
    fn ending(&self) -> Ending {
        let last = self.endings().last().copied();
        last.expect("a generation has ended").clone()
    }

    /// The agents do as they are told and leave, and ranks of lost nodes have their time.
    fn code(&mut self) -> Option<i32> {
        for id in self.alive.clone() {
            if self.exit_of(id).is_some() {
                self.lose(id);
            }
        }
        self.pass(self.state.fence.saturating_sub(self.now));
        self.state.finished()
    }

    fn places(&self) -> Vec<(NodeId, u32)> {
        let place = |m: &Member| (m.id, m.ranks.start);
        self.state.members.iter().map(place).collect()
    }
}

fn restarting(min_nodes: u32, max_nodes: u32) -> Settings {
    let mut settings = settings(min_nodes, max_nodes);
    settings.policy.max_restarts = 5;
    settings
}
