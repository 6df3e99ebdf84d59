//! Every decision, with scripted agents. What happens in all orders is left to [`crate::cluster::simulation`].

mod gpus;
mod hostile;
mod measuring;
mod properties;

use std::collections::BTreeSet;

use super::*;
use crate::cluster::message::{BEATS_PER_LEASE, Beat, Facts, Join, LEASE, Progress};
use crate::end::End;
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
        job: super::Job {
            run_id: "run".into(),
            run_dir: "/run".into(),
            config: None,
            digest: "d".into(),
            command: vec!["train".into()],
            directory: "/".into(),
            base_env: None,
            env: Vec::new(),
            resume_from: None,
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
            oom_kills: 0,
            xids: Vec::new(),
            warnings: Vec::new(),
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

#[test]
fn one_node_succeeds() {
    let mut scene = Scene::new(settings(1, 1));
    let join = FromAgent::Join(Box::new(join_of("n1", WORKERS)));
    scene.event(Event::Said {
        node: 1,
        local: true,
        message: join,
    });
    assert!(matches!(scene.told(1)[..], [ToAgent::Start(_)]));
    scene.all_end(1, End::Code(0));
    assert_eq!(scene.exit_of(1), Some(0));
    // Nobody waits for an agent in the same process.
    assert_eq!(scene.state.finished(), Some(0));
}

#[test]
fn a_failed_job_has_the_code_of_the_rank_that_failed_first() {
    let killed = |signal| End::Signal(signal);
    let record = |code| Some(announced(code));
    let cases = [
        (End::Code(17), None, 17),
        (killed(libc::SIGSEGV), None, 139),
        (End::Code(1), record(92), 1),
        // It announced its failure, and did not end by itself.
        (killed(libc::SIGKILL), record(92), 92),
        // It announced its failure, and ended as if there were none.
        (End::Code(0), record(92), 92),
        (End::Code(0), record(0), 1),
        (End::Code(0), record(256), 1),
        (End::Code(0), record(i32::MIN), 1),
    ];
    for (end, record, code) in cases {
        let mut scene = Scene::running(settings(2, 2), 2);
        scene.pass(MS(10));
        scene.failing(2, 1, Some(end));
        assert_eq!(scene.was_stopped_by(1), Some(TERM));
        let sent = record.iter().map(|_| libc::SIGKILL).collect();
        let first = Rank {
            record,
            sent,
            ..rank(end, 10)
        };
        scene.clean(2, vec![stopped(TERM, 12), first]);
        scene.all_stopped(1);
        let failure = scene.endings()[0].failure.clone().unwrap();
        assert_eq!((failure.rank, failure.host.as_str()), (Some(3), "n2"));
        assert_eq!(scene.code(), Some(code), "{end}");
    }
}

#[test]
fn ctrl_c_stops_and_again_kills() {
    let mut scene = Scene::running(settings(2, 2), 2);
    scene.event(Event::Signal(libc::SIGINT));
    assert_eq!(scene.was_stopped_by(1), Some(libc::SIGINT));
    // The terminal of another node had the same key pressed.
    let signal = libc::SIGINT;
    scene.says(2, FromAgent::Signal { signal });
    assert!(scene.told(1).is_empty());
    scene.event(Event::Signal(libc::SIGINT));
    assert!(matches!(scene.told(1)[..], [ToAgent::Kill { .. }]));
    scene.all_end(1, End::Signal(9));
    scene.all_end(2, End::Signal(9));
    assert_eq!(scene.code(), Some(130));
}

#[test]
fn ctrl_c_ends_a_save_that_takes_too_long() {
    let mut scene = Scene::running(settings(1, 1), 1);
    scene.event(Event::Signal(libc::SIGUSR2));
    scene.event(Event::Signal(libc::SIGINT));
    assert!(matches!(
        scene.told(1)[..],
        [ToAgent::Stop { .. }, ToAgent::Kill { .. }]
    ));
    scene.clean(1, vec![stopped(libc::SIGKILL, 5); 2]);
    assert_eq!(scene.code(), Some(130));
}

#[test]
fn a_preempted_job_saves_and_asks_to_be_requeued() {
    let mut scene = Scene::running(restarting(2, 2), 2);
    scene.says(
        2,
        FromAgent::Signal {
            signal: libc::SIGUSR2,
        },
    );
    assert_eq!(scene.was_stopped_by(1), Some(libc::SIGUSR2));
    scene.all_end(1, End::Code(exit::REQUEUE));
    scene.clean(
        2,
        vec![rank(End::Code(exit::REQUEUE), 1), rank(End::Code(0), 2)],
    );
    assert_eq!(scene.code(), Some(exit::REQUEUE));
}

#[test]
fn a_save_that_fails_is_not_answered_by_a_restart() {
    let mut scene = Scene::running(restarting(1, 1), 1);
    scene.step(5, Some(5));
    scene.event(Event::Signal(libc::SIGUSR2));
    let failed = rank(End::Code(exit::CANNOT_WRITE), 5);
    scene.clean(1, vec![rank(End::Code(exit::REQUEUE), 6), failed]);
    assert_eq!(scene.code(), Some(exit::CANNOT_WRITE));
}

#[test]
fn sigusr1_is_passed_on_and_sigusr2_too_where_workers_do_not_save() {
    let mut settings = settings(1, 1);
    settings.job.saves = false;
    let mut scene = Scene::running(settings, 1);
    for signal in [libc::SIGUSR1, libc::SIGUSR2] {
        scene.event(Event::Signal(signal));
        let generation = 0;
        assert_eq!(scene.told(1), [ToAgent::Signal { generation, signal }]);
    }
    assert_eq!(scene.state.phase, Phase::Run);
}

#[test]
fn the_allocation_s_end_is_a_reason_to_save() {
    let mut settings = settings(1, 1);
    settings.save_at = Some(S(100));
    let mut scene = Scene::running(settings, 1);
    scene.pass(S(99));
    assert!(scene.told(1).is_empty());
    scene.pass(S(1));
    assert_eq!(scene.was_stopped_by(1), Some(libc::SIGUSR2));
    scene.all_end(1, End::Code(exit::REQUEUE));
    assert_eq!(scene.code(), Some(exit::REQUEUE));
}

#[test]
fn a_job_does_not_wait_for_nodes_for_ever() {
    let mut scene = Scene::new(settings(2, 2));
    scene.join(1);
    scene.pass(S(59));
    assert_eq!(scene.state.finished(), None);
    scene.pass(S(1));
    assert!(
        scene
            .notices()
            .contains("1 node (n1) joined within 1m, 2 are needed")
    );
    assert_eq!(scene.code(), Some(exit::PREFLIGHT));
}

#[test]
fn nodes_beyond_the_most_are_spares_and_fewer_start_after_a_last_call() {
    let mut scene = Scene::running(settings(2, 2), 2);
    scene.join(3);
    assert!(scene.told(3).is_empty() && scene.notices().contains("n3 joined: a spare"));

    let mut scene = Scene::new(settings(1, 3));
    scene.join(1);
    scene.pass(S(2));
    scene.join(2);
    scene.pass(MS(2900));
    assert!(matches!(scene.state.phase, Phase::Gather { .. }));
    scene.pass(MS(200));
    assert_eq!(
        (&scene.state.phase, scene.state.world_size()),
        (&Phase::Run, 4)
    );
}

#[test]
fn who_does_not_fit_is_sent_away_with_the_reason() {
    let version = Join {
        version: "0.0.0-other".into(),
        ..join_of("n1", 2)
    };
    let job = Join {
        job: Some("other".into()),
        ..join_of("n1", 2)
    };
    for (join, why) in [
        (version, "install the same version"),
        (job, "the same command"),
    ] {
        let mut scene = Scene::new(settings(1, 1));
        scene.says(1, FromAgent::Join(Box::new(join)));
        let told = scene.told(1);
        let [ToAgent::Exit { code, message }] = &told[..] else {
            panic!("{told:?}");
        };
        assert_eq!(*code, exit::PREFLIGHT);
        assert!(message.as_ref().unwrap().contains(why), "{message:?}");
        // It is no node of the job, whatever it says.
        scene.beat(1, Vec::new());
        assert!(matches!(
            scene.actions.last(),
            Some(Action::Drop { node: 1 })
        ));
        assert!(matches!(scene.state.phase, Phase::Gather { .. }));
    }
}

#[test]
fn a_host_whose_gpu_failed_gets_no_ranks_again() {
    let mut scene = Scene::running(restarting(1, 1), 2);
    scene.failing(1, 0, Some(End::Code(exit::PREFLIGHT)));
    let broken = rank(End::Code(exit::PREFLIGHT), 0);
    scene.clean(1, vec![broken, stopped(TERM, 1)]);
    scene.pass(S(3));
    assert_eq!(scene.places(), [(2, 0)]);
    let again = Box::new(join_of("n1", 2));
    scene.says(9, FromAgent::Join(again));
    let told = scene.told(9);
    assert!(
        matches!(&told[..], [ToAgent::Exit { message: Some(m), .. }] if m.contains("left out")),
        "{told:?}"
    );
}

#[test]
fn a_node_that_cannot_run_the_job_ends_one_that_needs_it() {
    let mut settings = settings(2, 2);
    settings.open = false;
    let mut scene = Scene::new(settings.clone());
    scene.join(1);
    let unfit = FromAgent::Unfit {
        host: "n2".into(),
        code: exit::PREFLIGHT,
        message: "4 GPUs, 8 are needed".into(),
    };
    scene.says(2, unfit.clone());
    assert!(scene.notices().contains("n2 cannot run the job: 4 GPUs"));
    assert_eq!(scene.code(), Some(exit::PREFLIGHT));
    // Where fewer nodes do, it is let go.
    settings.min_nodes = 1;
    let mut scene = Scene::new(settings);
    scene.join(1);
    scene.says(2, unfit);
    scene.pass(S(5));
    assert_eq!(scene.state.phase, Phase::Run);
}

/// Loses the node by a broken connection, or by its silence.
fn lose(scene: &mut Scene, id: NodeId, silently: bool) {
    if silently {
        scene.alive.remove(&id);
        scene.pass(LEASE + MS(1));
        let dropped = |a: &Action| matches!(a, Action::Drop { node } if *node == id);
        assert!(
            scene.actions.iter().any(dropped),
            "its silence was not noticed"
        );
    } else {
        scene.lose(id);
    }
}

#[test]
fn a_node_lost_while_others_are_waited_for_is_not_counted() {
    for silently in [false, true] {
        let mut scene = Scene::new(settings(2, 2));
        scene.join(1);
        lose(&mut scene, 1, silently);
        scene.join(2);
        assert!(matches!(scene.state.phase, Phase::Gather { .. }));
        scene.join(3);
        assert_eq!(scene.places(), [(2, 0), (3, 2)]);
    }
}

#[test]
fn a_node_lost_before_the_start_is_replaced() {
    for silently in [false, true] {
        let mut scene = Scene::new(settings(2, 2));
        scene.join(1);
        // Node 2 does not answer the probe.
        let join = || Box::new(join_of("n2", WORKERS));
        scene.says(2, FromAgent::Join(join()));
        assert!(matches!(scene.state.phase, Phase::Form { .. }));
        lose(&mut scene, 2, silently);
        assert!(matches!(scene.state.phase, Phase::Gather { .. }));
        scene.join(3);
        assert_eq!(scene.places(), [(1, 0), (3, 2)]);
        assert_eq!(scene.state.phase, Phase::Run);
    }
}

#[test]
fn answers_of_an_earlier_choice_of_nodes_are_dropped() {
    let mut scene = Scene::new(settings(3, 3));
    // None of them answers by itself.
    for id in 1..=4 {
        let host = format!("n{id}");
        scene.says(id, FromAgent::Join(Box::new(join_of(&host, 1))));
    }
    let reserved = |attempt, master_port| FromAgent::Reserved {
        generation: 0,
        attempt,
        master_port,
        probe_port: 1,
    };
    let by = |last| vec![([10, 0, 0, last].into(), "eth0".to_string())];
    let reached = |attempt, by| FromAgent::Reached {
        generation: 0,
        attempt,
        by,
    };
    scene.says(1, reserved(1, 500));
    scene.lose(1);
    // Node 4 takes its place; an answer about node 1's addresses is still on its way.
    scene.says(2, reached(1, by(9)));
    scene.says(4, reserved(1, 501));
    assert!(matches!(scene.state.phase, Phase::Form { ports: None, .. }));
    scene.says(4, reserved(2, 502));
    scene.says(2, reached(2, by(1)));
    scene.says(3, reached(2, by(1)));
    let told = scene.told(3);
    let start = told.iter().find_map(|m| match m {
        ToAgent::Start(start) => Some((start.master_addr, start.master_port)),
        _ => None,
    });
    assert_eq!(start, Some(([10, 0, 0, 1].into(), 502)));
}

#[test]
fn a_node_lost_while_the_job_runs_stops_it() {
    for silently in [false, true] {
        let mut scene = Scene::running(settings(2, 2), 2);
        scene.pass(S(3));
        lose(&mut scene, 2, silently);
        assert_eq!(scene.was_stopped_by(1), Some(TERM));
        scene.all_stopped(1);
        let ending = scene.endings()[0].clone();
        let failure = ending.failure.unwrap();
        assert_eq!((failure.rank, failure.host.as_str()), (None, "n2"));
        assert_eq!(ending.ends[2..], [None, None]);
        assert_eq!(scene.code(), Some(exit::PEER));
    }
}

#[test]
fn a_node_lost_while_the_job_stops_is_not_waited_for() {
    for silently in [false, true] {
        let mut scene = Scene::running(settings(2, 2), 2);
        scene.pass(S(1));
        scene.failing(1, 0, Some(End::Code(17)));
        scene.clean(1, vec![rank(End::Code(17), 1000), stopped(TERM, 1001)]);
        // What is heard of the other node after that failure shows that it came first.
        scene.pass(S(1));
        lose(&mut scene, 2, silently);
        assert_eq!(scene.code(), Some(17));
    }
}

#[test]
fn a_node_lost_between_two_starts_is_replaced_and_ranks_stay_where_they_were() {
    for silently in [false, true] {
        let mut scene = Scene::running(restarting(3, 3), 4);
        assert_eq!(scene.places(), [(1, 0), (2, 2), (3, 4)]);
        scene.failing(3, 0, Some(End::Signal(9)));
        scene.clean(3, vec![rank(End::Signal(9), 0), stopped(TERM, 1)]);
        scene.all_stopped(1);
        scene.all_stopped(2);
        assert!(matches!(scene.state.phase, Phase::Pause { .. }));
        lose(&mut scene, 1, silently);
        scene.pass(S(3));
        assert_eq!(scene.places(), [(4, 0), (2, 2), (3, 4)]);
        assert_eq!(
            (&scene.state.phase, scene.state.generation),
            (&Phase::Run, 1)
        );
    }
}

#[test]
fn a_node_lost_while_everybody_leaves_is_gone() {
    for silently in [false, true] {
        let mut scene = Scene::running(settings(2, 2), 2);
        scene.all_end(1, End::Code(0));
        scene.all_end(2, End::Code(0));
        assert!(matches!(scene.state.phase, Phase::Leave { .. }));
        scene.lose(1);
        lose(&mut scene, 2, silently);
        assert_eq!(scene.state.finished(), Some(0));
    }
    // One that beats on and does not leave is not waited for.
    let mut scene = Scene::running(settings(1, 1), 1);
    scene.all_end(1, End::Code(0));
    scene.pass(LEAVE);
    assert_eq!(scene.state.finished(), Some(0));
}

#[test]
fn nothing_starts_while_ranks_of_a_lost_node_may_run() {
    let mut scene = Scene::running(restarting(2, 2), 3);
    scene.step(7, Some(7));
    let heard = scene.now;
    scene.alive.remove(&2);
    scene.pass(LEASE + MS(1));
    scene.all_stopped(1);
    assert!(matches!(scene.state.phase, Phase::Gather { .. }));
    scene.pass(heard + LEASE + FENCE - MS(1) - scene.now);
    assert!(matches!(scene.state.phase, Phase::Gather { .. }));
    scene.pass(MS(1));
    assert_eq!(scene.state.phase, Phase::Run);
    assert_eq!(scene.places(), [(1, 0), (3, 2)]);
    // The lost node comes back: nothing of the old generation counts.
    scene.all_end(2, End::Code(0));
    assert!(matches!(
        scene.actions.last(),
        Some(Action::Drop { node: 2 })
    ));
}

#[test]
fn the_coordinator_does_not_finish_while_ranks_of_a_lost_node_may_run() {
    let failed = || {
        let mut scene = Scene::running(settings(2, 2), 2);
        scene.lose(2);
        let fence = scene.now + LEASE + FENCE;
        scene.all_stopped(1);
        scene.lose(1);
        assert!(matches!(scene.state.phase, Phase::Leave { .. }));
        let said = "waiting 2.0 s: until then ranks of n2 may still run; Ctrl-C leaves at once";
        assert!(scene.notices().contains(said), "{}", scene.notices());
        (scene, fence)
    };
    let (mut scene, fence) = failed();
    scene.pass(fence - MS(1) - scene.now);
    assert_eq!(scene.state.finished(), None);
    scene.pass(MS(1));
    assert_eq!(scene.state.finished(), Some(exit::PEER));
    // Not where somebody has no time.
    let (mut scene, _) = failed();
    scene.event(Event::Signal(TERM));
    assert_eq!(scene.state.finished(), None);
    scene.event(Event::Signal(libc::SIGINT));
    assert_eq!(scene.state.finished(), Some(exit::PEER));

    // Also where no start follows the one with the lost node, and its fence is short.
    let mut scene = Scene::running(restarting(2, 2), 2);
    scene.step(7, Some(7));
    let heard = scene.now;
    scene.alive.remove(&2);
    scene.pass(LEASE + MS(100));
    scene.all_stopped(1);
    scene.event(Event::Signal(TERM));
    scene.lose(1);
    assert!(!scene.notices().contains("may still run"));
    scene.pass(heard + LEASE + FENCE - MS(1) - scene.now);
    assert_eq!(scene.state.finished(), None);
    scene.pass(MS(1));
    assert_eq!(scene.state.finished(), Some(143));
}

#[test]
fn a_start_that_does_not_go_on_from_the_last_checkpoint_is_told() {
    let said = "warning: this start is at step 1, though step 7 was saved: ";
    for (first, lost) in [(8, false), (1, true)] {
        let mut scene = Scene::running(restarting(2, 2), 3);
        scene.step(7, Some(7));
        for generation in 1..3 {
            // The second time before any step.
            scene.lose(generation + 1);
            let mut others = scene.state.members.clone();
            others.retain(|m| scene.alive.contains(&m.id));
            others.iter().for_each(|m| scene.all_stopped(m.id));
            scene.join(generation + 10);
            scene.pass(S(30));
            assert_eq!(scene.state.phase, Phase::Run);
        }
        assert!(!scene.notices().contains("warning: this start"));
        scene.step(first, None);
        scene.step(first + 1, None);
        let told = scene.notices().matches(said).count();
        assert_eq!(told, usize::from(lost), "{}", scene.notices());
    }
}

#[test]
fn an_elastic_job_goes_on_with_fewer_nodes_and_grows_at_a_checkpoint() {
    let mut scene = Scene::running(restarting(1, 2), 2);
    scene.step(9, Some(9));
    scene.lose(1);
    scene.all_stopped(2);
    scene.pass(S(3));
    assert_eq!(scene.places(), [(2, 0)]);
    scene.told(2);
    scene.join(3);
    scene.step(10, None);
    assert!(scene.told(2).is_empty());
    scene.step(11, Some(11));
    assert_eq!(scene.was_stopped_by(2), Some(libc::SIGUSR2));
    scene.all_end(2, End::Code(exit::REQUEUE));
    assert_eq!(scene.endings().last().unwrap().outcome, "grown");
    assert_eq!(scene.places(), [(2, 0), (3, 2)]);
    assert_eq!(
        (&scene.state.phase, scene.state.generation),
        (&Phase::Run, 2)
    );
}

#[test]
fn workers_that_cannot_be_started_end_the_job_with_the_reason_s_code() {
    let cannot = |code| FromAgent::CannotStart {
        generation: 0,
        code,
        message: "no such directory".into(),
    };
    let mut scene = Scene::running(restarting(2, 2), 3);
    // A spare has no workers to start.
    scene.says(3, cannot(99));
    assert_eq!(scene.state.phase, Phase::Run);
    scene.says(2, cannot(exit::PREFLIGHT));
    assert_eq!(scene.was_stopped_by(1), Some(TERM));
    scene.all_stopped(1);
    assert!(
        scene
            .notices()
            .contains("the workers on n2 cannot be started")
    );
    // No worker failed, so none is named.
    assert!(scene.endings()[0].failure.is_none());
    assert_eq!(scene.code(), Some(exit::PREFLIGHT));

    // Before any was started there is nothing to stop.
    let mut scene = Scene::new(settings(2, 2));
    for id in [1, 2] {
        let join = join_of(&format!("n{id}"), WORKERS);
        scene.says(id, FromAgent::Join(Box::new(join)));
    }
    scene.says(1, cannot(exit::PREFLIGHT));
    assert_eq!(scene.exit_of(2), Some(exit::PREFLIGHT));
}

#[test]
fn messages_of_an_older_generation_are_dropped() {
    let mut scene = Scene::running(restarting(1, 1), 1);
    scene.step(3, Some(3));
    scene.failing(1, 0, Some(End::Signal(9)));
    scene.clean(1, vec![rank(End::Signal(9), 0), stopped(TERM, 1)]);
    scene.pass(S(3));
    assert_eq!(
        (&scene.state.phase, scene.state.generation),
        (&Phase::Run, 1)
    );
    let end = Some(End::Code(1));
    let failing = FromAgent::Failing {
        generation: 0,
        local_rank: 0,
        end,
        at: Duration::ZERO,
    };
    scene.says(1, failing);
    let report = NodeReport {
        ranks: Vec::new(),
        started_at: Duration::ZERO,
        oom_kills: 0,
        xids: Vec::new(),
        warnings: Vec::new(),
    };
    let report = Box::new(report);
    scene.says(
        1,
        FromAgent::Clean {
            generation: 0,
            report,
        },
    );
    assert_eq!(scene.state.phase, Phase::Run);
}

#[test]
fn an_agent_that_never_says_that_it_is_clean_is_cut_off() {
    let mut scene = Scene::running(settings(2, 2), 2);
    scene.event(Event::Signal(TERM));
    scene.all_stopped(1);
    scene.pass(2 * GRACE + REPORT - MS(1));
    assert!(matches!(scene.state.phase, Phase::Stop { .. }));
    scene.pass(MS(1));
    assert!(
        scene
            .actions
            .iter()
            .any(|a| matches!(a, Action::Drop { node: 2 }))
    );
    assert!(
        scene
            .notices()
            .contains("n2 is lost: its agent did not end the ranks in time")
    );
    assert_eq!(scene.code(), Some(143));
}

#[test]
fn a_report_of_failed_ranks_is_enough_to_stop_the_others() {
    let mut scene = Scene::running(settings(2, 2), 2);
    scene.clean(
        1,
        vec![rank(End::Code(exit::REQUEUE), 1), stopped(libc::SIGKILL, 9)],
    );
    assert_eq!(scene.was_stopped_by(2), Some(TERM));
}

#[test]
fn a_hang_is_looked_at_and_stopped() {
    let mut scene = Scene::running(settings(2, 2), 2);
    scene.step(4, None);
    let limit = scene.state.settings.hang.hang_timeout.unwrap();
    // Rank 3 is not where the others are.
    for id in [1, 2] {
        let progress = |local_rank| Progress {
            local_rank,
            step: Some(5),
            ..Progress::default()
        };
        let ranks = (0..WORKERS).filter(|r| (id, *r) != (2, 1)).map(progress);
        scene.beat(id, ranks.collect());
    }
    scene.pass(limit + S(2));
    let inspect = || ToAgent::Inspect { generation: 0 };
    assert_eq!(
        (scene.told(1), scene.told(2)),
        (vec![inspect()], vec![inspect()])
    );
    // Whoever does not answer is not waited for; `pass` counts the deadlines meanwhile.
    let mut silent = Scene {
        state: scene.state.clone(),
        now: scene.now,
        actions: Vec::new(),
        alive: scene.alive.clone(),
        next_beat: scene.next_beat,
    };
    silent.pass(INSPECT + S(1));
    assert_eq!(silent.was_stopped_by(1), Some(TERM));

    for id in [1, 2] {
        let ras = (id == 2).then(|| crate::hang::ras::Answer::new("what NCCL says"));
        let inspected = FromAgent::Inspected {
            generation: 0,
            looks: Vec::new(),
            ras,
            more: false,
        };
        scene.says(id, inspected);
    }
    scene.pass(S(1));
    assert_eq!(scene.was_stopped_by(1), Some(TERM));
    scene.all_stopped(1);
    scene.all_stopped(2);
    let failure = scene.endings()[0].failure.clone().unwrap();
    assert_eq!(failure.late, [3]);
    let stacks = failure.stacks.unwrap();
    for part in ["late: rank 3", "what NCCL says"] {
        assert!(stacks.contains(part), "{part}\n{stacks}");
    }
    assert_eq!(scene.code(), Some(exit::PEER));
}

#[test]
fn a_node_that_left_after_its_report_is_still_known_by_name_and_clock() {
    let mut scene = Scene::new(settings(2, 2));
    // The clock of node 1 is 50 s ahead.
    for id in [1, 2] {
        scene.join(id);
    }
    scene.now = MS(1000);
    let beat = Beat {
        at: S(51),
        rtt: Some(MS(2)),
        ..Beat::default()
    };
    scene.says(1, FromAgent::Beat(beat));
    scene.beat(2, Vec::new());
    scene.now = MS(2000);
    scene.failing(1, 0, Some(End::Code(3)));
    scene.clean(1, vec![rank(End::Code(3), 52_000), stopped(TERM, 52_001)]);
    scene.lose(1);
    // A rank of node 2 fails after that, before it hears of the stop.
    scene.clean(2, vec![rank(End::Code(4), 2500), stopped(TERM, 2501)]);
    let failure = scene.endings()[0].failure.clone().unwrap();
    assert_eq!((failure.rank, failure.host.as_str()), (Some(0), "n1"));
    assert_eq!(scene.code(), Some(3));
}

#[test]
fn a_sole_node_elsewhere_answers_before_it_gets_ranks() {
    let mut scene = Scene::new(settings(1, 1));
    scene.says(1, FromAgent::Join(Box::new(join_of("n1", WORKERS))));
    assert!(matches!(scene.state.phase, Phase::Form { .. }));
    assert!(scene.told(1).is_empty());
    scene.alive.insert(1);
    let attempt = 1;
    scene.answer(
        1,
        &ToAgent::Reserve {
            generation: 0,
            attempt,
        },
    );
    let told = scene.told(1);
    assert!(
        matches!(&told[..], [ToAgent::Start(s)] if s.master_port == 1001),
        "{told:?}"
    );
}

#[test]
fn two_agents_of_one_host_are_two_nodes() {
    let mut scene = Scene::new(settings(2, 2));
    for id in [1, 2] {
        scene.alive.insert(id);
        scene.says(id, FromAgent::Join(Box::new(join_of("vm", WORKERS))));
    }
    scene.pass(S(3));
    scene.lose(2);
    scene.all_stopped(1);
    let failure = scene.endings()[0].failure.clone().unwrap();
    assert_eq!((failure.rank, failure.node_rank), (None, 1));
    let text = failure.to_string();
    assert!(text.contains("where: host vm, ranks 2-3\n"), "{text}");
}

/// Rank 0 of node 3 is killed after this step, and the job starts again.
fn killed_on_node_3(scene: &mut Scene, step: u64) {
    scene.step(step, Some(step));
    scene.failing(3, 0, Some(End::Signal(9)));
    let ms = scene.now.as_millis() as u64;
    scene.clean(3, vec![rank(End::Signal(9), ms), stopped(TERM, ms + 1)]);
    scene.all_stopped(1);
    scene.all_stopped(2);
    scene.pass(S(3));
    assert_eq!(scene.state.phase, Phase::Run);
}

fn left_out(scene: &Scene) -> Vec<(String, Option<Duration>, bool)> {
    let of = |a: &Action| match a {
        Action::LeftOut(excluded) => {
            let l = &excluded.left_out;
            Some((l.host.clone(), l.until, l.must))
        }
        _ => None,
    };
    scene.actions.iter().filter_map(of).collect()
}

fn recorded(scene: &Scene, wanted: &str) -> Vec<Value> {
    let of = |a: &Action| match a {
        Action::Record { kind, fields } if *kind == wanted => Some(fields.clone()),
        _ => None,
    };
    scene.actions.iter().filter_map(of).collect()
}

#[test]
fn a_node_where_failures_begin_is_left_out_and_everybody_is_told() {
    let mut scene = Scene::running(restarting(2, 3), 3);
    killed_on_node_3(&mut scene, 5);
    assert_eq!(scene.places().len(), 3);
    assert_eq!(left_out(&scene), []);
    killed_on_node_3(&mut scene, 9);
    assert_eq!(scene.places(), [(1, 0), (2, 2)]);
    let why =
        "2 of the last 2 failures began there, the last: killed from outside: signal 9 (SIGKILL)";
    let text = format!("n3 gets no ranks as long as the others suffice: {why}");
    let notices = scene.notices();
    assert!(notices.contains(&text), "{notices}");
    assert_eq!(left_out(&scene), [("n3".to_string(), None, false)]);
    let record = &recorded(&scene, "left_out")[0];
    assert_eq!(
        (&record["host"], &record["why"]),
        (&"n3".into(), &why.into())
    );
    let text = format!("this node gets no ranks as long as the others suffice: {why}");
    assert!(
        scene
            .told(3)
            .contains(&ToAgent::Tell { text: text.clone() })
    );
    // It is said once, also where others fail after it.
    scene.actions.clear();
    scene.step(12, Some(12));
    scene.failing(2, 0, Some(End::Signal(9)));
    scene.clean(2, vec![rank(End::Signal(9), 0), stopped(TERM, 1)]);
    scene.all_stopped(1);
    assert_eq!(left_out(&scene), []);
    // Also to itself, when it comes back.
    scene.lose(3);
    scene.join(3);
    let text = "this node gets no ranks as long as the others suffice: 2 of the last 3";
    let told = scene.told(3);
    let told = told.iter().find_map(|m| match m {
        ToAgent::Tell { text } => Some(text.as_str()),
        _ => None,
    });
    assert!(told.is_some_and(|t| t.starts_with(text)), "{told:?}");
    assert!(
        scene
            .notices()
            .contains("n3 joined, and gets no ranks as long as")
    );
}

#[test]
fn a_node_that_comes_back_is_told_for_how_long_it_is_left_out() {
    let mut scene = Scene::running(restarting(2, 3), 3);
    scene.step(5, Some(5));
    scene.lose(3);
    scene.all_stopped(1);
    scene.all_stopped(2);
    let notices = scene.notices();
    let text = "n3 gets no ranks for 60 s, as long as the others suffice: node lost";
    assert!(notices.contains(text), "{notices}");
    assert_eq!(left_out(&scene).len(), 1);
    scene.pass(S(20));
    scene.join(3);
    let text = "n3 joined, and gets no ranks for 40 s, as long as the others suffice: node lost";
    assert!(scene.notices().contains(text), "{}", scene.notices());
    assert!(!scene.notices().contains("a spare until it is needed"));
    scene.step(6, Some(6));
    assert_eq!(scene.state.phase, Phase::Run, "it is not taken in");
    scene.pass(S(41));
    scene.step(7, Some(7));
    assert_eq!(scene.state.cause, Some(Cause::Grow));
}

#[test]
fn broken_hardware_is_told_at_once() {
    let mut scene = Scene::running(restarting(2, 3), 3);
    scene.step(5, Some(5));
    scene.failing(3, 0, Some(End::Code(1)));
    let broken = rank(End::Code(1), 0);
    scene.clean(3, vec![broken, stopped(TERM, 1)]);
    scene.all_stopped(1);
    scene.all_stopped(2);
    assert_eq!(left_out(&scene), [], "its stderr says nothing");
    let mut scene = Scene::running(restarting(2, 3), 3);
    scene.failing(3, 0, Some(End::Code(exit::PREFLIGHT)));
    scene.clean(
        3,
        vec![rank(End::Code(exit::PREFLIGHT), 0), stopped(TERM, 1)],
    );
    scene.all_stopped(1);
    scene.all_stopped(2);
    assert_eq!(left_out(&scene), [("n3".to_string(), None, true)]);
    let notices = scene.notices();
    assert!(
        notices.contains("n3 gets no ranks any more: hardware"),
        "{notices}"
    );
}

#[test]
fn of_two_agents_of_one_host_only_the_lost_one_is_left_out() {
    let mut scene = Scene::new(restarting(1, 3));
    for id in [1, 2, 3] {
        scene.alive.insert(id);
        scene.says(id, FromAgent::Join(Box::new(join_of("vm", WORKERS))));
    }
    scene.step(5, Some(5));
    scene.lose(2);
    scene.all_stopped(1);
    scene.all_stopped(3);
    scene.pass(S(5));
    let ids: Vec<NodeId> = scene.places().iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [1, 3]);
    // It comes back.
    scene.alive.insert(4);
    scene.says(4, FromAgent::Join(Box::new(join_of("vm", WORKERS))));
    assert_eq!(scene.state.nodes[&4].agent, 1);
    assert!(scene.notices().contains("vm joined, and gets no ranks for"));
}

fn with_nccl(host: &str, nccl: Option<&str>) -> Join {
    let mut join = join_of(host, WORKERS);
    join.facts.nccl = nccl.map(String::from);
    join.gpus = vec![crate::gpus::Gpu {
        id: "0".into(),
        name: "H200".into(),
        uuid: "GPU-0".into(),
    }];
    join
}

#[test]
fn a_late_node_with_another_nccl_is_not_taken_and_learns_why() {
    let come = |scene: &mut Scene, id: NodeId, nccl| {
        scene.alive.insert(id);
        let join = Box::new(with_nccl(&format!("n{id}"), nccl));
        scene.says(id, FromAgent::Join(join));
    };
    let mut scene = Scene::new(restarting(2, 2));
    come(&mut scene, 1, Some("2.27.3"));
    come(&mut scene, 2, Some("2.27.3"));
    come(&mut scene, 3, Some("2.28.9"));
    let why = "n3 is not taken: NCCL differs: 2.27.3 on n1, n2; 2.28.9 on n3\n  hint: ";
    assert!(scene.notices().contains(why), "{}", scene.notices());
    assert_eq!(left_out(&scene), [("n3".to_string(), None, true)]);
    let told = scene.told(3);
    let [ToAgent::Exit { code, message }] = &told[..] else {
        panic!("{told:?}");
    };
    assert_eq!(*code, exit::PREFLIGHT);
    assert!(message.as_ref().unwrap().starts_with(why), "{message:?}");
    // It is no spare.
    scene.step(3, Some(3));
    scene.lose(2);
    scene.all_stopped(1);
    scene.pass(S(3));
    assert!(matches!(scene.state.phase, Phase::Gather { .. }));
    // It comes back with the right one.
    let join = Box::new(with_nccl("n3", Some("2.27.3")));
    scene.alive.insert(4);
    scene.says(4, FromAgent::Join(join));
    assert_eq!(scene.places(), [(1, 0), (4, 2)]);
}

#[test]
fn what_a_late_node_differs_in_is_said_when_it_comes() {
    let mut scene = Scene::running(settings(2, 2), 2);
    let mut join = join_of("n3", WORKERS);
    (join.facts.clock_ms, join.received_ms) = (90_000, 1_000);
    for node in scene.state.compared.iter_mut() {
        (node.facts.clock_ms, node.received_ms) = (1_000, 1_000);
    }
    scene.says(3, FromAgent::Join(Box::new(join)));
    let notices = scene.notices();
    assert!(
        notices.contains("warning: the clock of n3 is 89.0 s ahead of"),
        "{notices}"
    );
    assert!(notices.contains("n3 joined: a spare"), "{notices}");
}

#[test]
fn a_program_that_never_spoke_is_started_again_as_often_as_is_allowed() {
    let mut settings = settings(1, 1);
    settings.job.saves = false;
    settings.policy.max_restarts = 3;
    let mut scene = Scene::running(settings, 1);
    for restarts in 0..=3 {
        assert_eq!(
            (&scene.state.phase, scene.state.generation),
            (&Phase::Run, restarts)
        );
        scene.failing(1, 1, Some(End::Code(7)));
        scene.clean(1, vec![stopped(TERM, 1), rank(End::Code(7), 0)]);
        scene.pass(S(10));
    }
    assert_eq!(scene.code(), Some(7));

    // One that has greeted is known to have made no step.
    let mut settings = super::tests::settings(1, 1);
    settings.job.saves = false;
    settings.policy.max_restarts = 3;
    let mut scene = Scene::running(settings, 1);
    scene.failing(1, 1, Some(End::Code(7)));
    let talked = Rank {
        talks: true,
        ..rank(End::Code(7), 0)
    };
    scene.clean(1, vec![stopped(TERM, 1), talked]);
    assert_eq!(scene.code(), Some(7));
}
