//! What holds after any sequence of events, from agents that follow the rules or not.

use proptest::prelude::*;

use super::*;
use crate::cluster::message::Round;
use crate::doctor::preflight::Measured;

/// Longer than all waits of one start together: gathering, forming, two graces, a report, leaving.
const START: Duration = Duration::from_secs(60 + 10 + 2 * 5 + 15 + 3 + 20);

#[derive(Clone, Debug)]
enum Step {
    Join(NodeId, bool),
    Unfit(NodeId),
    Lose(NodeId),
    Signal(i32),
    NodeSignal(NodeId, i32),
    Beat(NodeId, u32, Option<u64>, bool),
    Reserved(NodeId),
    Reached(NodeId, bool),
    Started(NodeId),
    CannotStart(NodeId),
    Failing(NodeId, u32, Option<End>),
    Answered(NodeId, u32, End),
    Clean(NodeId, Vec<Option<End>>),
    Inspected(NodeId),
    /// In the round with this number: itself, a port, or with others.
    NodeMeasured(NodeId, bool),
    RingOpen(NodeId, u32, bool),
    Measured(NodeId, u32, Option<u8>),
    /// A word of another generation.
    Stale(NodeId),
    /// So many milliseconds, with or without the beats of everybody.
    Pass(u64, bool),
    /// All agents do what they are asked next.
    Answer,
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        3 => Just(End::Code(0)),
        2 => Just(End::Code(exit::REQUEUE)),
        1 => (1i32..256).prop_map(End::Code),
        1 => (1i32..32).prop_map(End::Signal),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let node = || 1u64..6;
    // Mostly a rank that the node has.
    let local = || prop_oneof![9 => 0u32..2, 1 => any::<u32>()];
    let signal = || prop::sample::select(vec![2, 15, 1, 10, 12]);
    prop_oneof![
        6 => (node(), prop::bool::weighted(0.2)).prop_map(|(n, l)| Step::Join(n, l)),
        1 => node().prop_map(Step::Unfit),
        3 => node().prop_map(Step::Lose),
        1 => signal().prop_map(Step::Signal),
        1 => (node(), signal()).prop_map(|(n, s)| Step::NodeSignal(n, s)),
        3 => (node(), local(), prop::option::of(0u64..9), any::<bool>())
            .prop_map(|(n, l, s, c)| Step::Beat(n, l, s, c)),
        2 => node().prop_map(Step::Reserved),
        2 => (node(), any::<bool>()).prop_map(|(n, b)| Step::Reached(n, b)),
        1 => node().prop_map(Step::Started),
        1 => node().prop_map(Step::CannotStart),
        2 => (node(), local(), prop::option::of(end())).prop_map(|(n, l, e)| Step::Failing(n, l, e)),
        1 => (node(), local(), end()).prop_map(|(n, l, e)| Step::Answered(n, l, e)),
        4 => (node(), prop::collection::vec(prop::option::weighted(0.9, end()), 0..4))
            .prop_map(|(n, e)| Step::Clean(n, e)),
        1 => node().prop_map(Step::Inspected),
        2 => (node(), any::<bool>()).prop_map(|(n, b)| Step::NodeMeasured(n, b)),
        2 => (node(), 0u32..4, any::<bool>()).prop_map(|(n, r, b)| Step::RingOpen(n, r, b)),
        2 => (node(), 0u32..4, prop::option::of(1u8..30)).prop_map(|(n, r, g)| Step::Measured(n, r, g)),
        1 => node().prop_map(Step::Stale),
        6 => (prop_oneof![0u64..3000, 0u64..900_000], prop::bool::weighted(0.8))
            .prop_map(|(ms, beats)| Step::Pass(ms, beats)),
        8 => Just(Step::Answer),
    ]
}

fn any_settings() -> impl Strategy<Value = Settings> {
    let parts = (
        1u32..4,
        0u32..3,
        0u32..4,
        any::<[bool; 4]>(),
        prop::option::of(0u64..600),
    );
    parts.prop_map(
        |(min, more, restarts, [open, saves, hangs, full], save_at)| {
            let mut settings = match full {
                true => measuring::measuring(min, min + more),
                false => settings(min, min + more),
            };
            settings.policy.max_restarts = restarts;
            (settings.open, settings.job.saves) = (open, saves);
            settings.hang.hang_timeout = hangs.then(|| S(30));
            settings.save_at = save_at.map(S);
            settings
        },
    )
}

impl Scene {
    fn check(&self) -> Result<(), TestCaseError> {
        let (state, now) = (&self.state, self.now);
        let deadline = state.deadline();
        prop_assert_eq!(deadline.is_none(), state.finished().is_some());
        // One that is past is dealt with by `pass`, which counts.
        let ranks: Vec<u32> = state.members.iter().flat_map(|m| m.ranks.clone()).collect();
        prop_assert_eq!(ranks, (0..state.world_size()).collect::<Vec<_>>());
        if let Phase::Run = state.phase {
            prop_assert!(state.members.len() as u32 <= state.settings.max_nodes);
        }
        let _ = state.snapshot(now);
        Ok(())
    }

    fn round(&self, number: u32) -> Round {
        Round {
            generation: self.state.generation,
            attempt: self.state.attempt,
            number,
        }
    }

    fn take(&mut self, step: Step) {
        let (generation, attempt) = (self.state.generation, self.state.attempt);
        match step {
            Step::Join(id, local) => {
                self.alive.insert(id);
                let join = Box::new(join_of(&format!("n{id}"), WORKERS));
                let message = FromAgent::Join(join);
                self.event(Event::Said {
                    node: id,
                    local,
                    message,
                });
            }
            Step::Unfit(id) => self.says(
                id,
                FromAgent::Unfit {
                    host: format!("n{id}"),
                    code: exit::PREFLIGHT,
                    message: "m".into(),
                },
            ),
            Step::Lose(id) => self.lose(id),
            Step::Signal(signal) => self.event(Event::Signal(signal)),
            Step::NodeSignal(id, signal) => self.says(id, FromAgent::Signal { signal }),
            Step::Beat(id, local_rank, step, saved) => {
                let progress = Progress {
                    local_rank,
                    step,
                    checkpoint: step.filter(|_| saved),
                    ..Progress::default()
                };
                self.beat(id, vec![progress]);
            }
            Step::Reserved(id) => self.says(
                id,
                FromAgent::Reserved {
                    generation,
                    attempt,
                    master_port: 1,
                    probe_port: 2,
                },
            ),
            Step::Reached(id, found) => {
                let address = ([10, 0, 0, 1].into(), "eth0".to_string());
                let by = found.then_some(address).into_iter().collect();
                let reached = FromAgent::Reached {
                    generation,
                    attempt,
                    by,
                };
                self.says(id, reached);
            }
            Step::Started(id) => self.says(
                id,
                FromAgent::Started {
                    generation,
                    pids: vec![1, 2, 3],
                    cores: Vec::new(),
                    at: Duration::MAX,
                    environment: Vec::new(),
                    containment: Default::default(),
                },
            ),
            Step::CannotStart(id) => self.says(
                id,
                FromAgent::CannotStart {
                    generation,
                    code: exit::PREFLIGHT,
                    message: "m".into(),
                },
            ),
            Step::Failing(id, local_rank, end) => self.failing(id, local_rank, end),
            Step::Answered(id, local_rank, end) => self.says(
                id,
                FromAgent::Answered {
                    generation,
                    local_rank,
                    end,
                },
            ),
            Step::Clean(id, ends) => {
                let ranks = ends.into_iter().map(|end| Rank {
                    end,
                    ended_at: self.now,
                    ..Rank::default()
                });
                let ranks = ranks.collect();
                self.clean(id, ranks);
            }
            Step::Inspected(id) => {
                let (looks, ras) = (Vec::new(), None);
                self.says(
                    id,
                    FromAgent::Inspected {
                        generation,
                        looks,
                        ras,
                        more: false,
                    },
                );
            }
            Step::NodeMeasured(id, well) => {
                let own = match well {
                    true => OwnNode::default(),
                    false => OwnNode::failed("broken"),
                };
                let round = self.round(0);
                self.says(id, FromAgent::NodeMeasured { round, own });
            }
            Step::RingOpen(id, number, well) => {
                let port = well.then_some(id as u16).ok_or("none".to_string());
                let round = self.round(number);
                self.says(id, FromAgent::RingOpen { round, port });
            }
            Step::Measured(id, number, gbit_s) => {
                let measured = |gbit_s: u8| Measured {
                    seconds: 1.0,
                    gbit_s: gbit_s.into(),
                    round_trip: MS(1),
                    wrong: (gbit_s == 13).then(|| "wrong".into()),
                };
                let result = gbit_s.map(measured).ok_or("no route".to_string());
                let round = self.round(number);
                self.says(id, FromAgent::Measured { round, result });
            }
            Step::Stale(id) => {
                let (generation, at) = (generation.wrapping_sub(1), self.now);
                let (local_rank, end) = (0, None);
                let failing = FromAgent::Failing {
                    generation,
                    local_rank,
                    end,
                    at,
                };
                self.says(id, failing);
            }
            Step::Pass(ms, beats) => {
                let alive = self.alive.clone();
                if !beats {
                    self.alive.clear();
                }
                self.pass(MS(ms));
                self.alive = alive;
            }
            Step::Answer => {
                for id in self.alive.clone() {
                    for message in self.told(id) {
                        match message {
                            ToAgent::Stop { .. } => self.all_stopped(id),
                            ToAgent::Exit { .. } => self.lose(id),
                            _ => {}
                        }
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn there_is_always_a_deadline_and_a_job_without_agents_ends(
        settings in any_settings(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let mut scene = Scene::new(settings);
        for step in steps {
            scene.take(step);
            scene.check()?;
        }
        // All agents are gone. One that lives in this process cannot be without it.
        for id in 1..6 {
            scene.lose(id);
        }
        scene.pass(START);
        scene.check()?;
        prop_assert!(scene.state.finished().is_some(), "{:?}", scene.state.phase);
    }

    #[test]
    fn a_job_whose_agents_do_as_they_are_told_ends_after_a_signal(
        settings in any_settings(),
        steps in prop::collection::vec(step(), 1..40),
        signal in prop::sample::select(vec![2, 15, 1]),
    ) {
        let mut scene = Scene::new(settings);
        for step in steps {
            scene.take(step);
        }
        scene.event(Event::Signal(signal));
        for _ in 0..4 {
            scene.take(Step::Answer);
            scene.pass(MS(10));
        }
        // Those that said nonsense before may be waited for in vain, but not longer.
        scene.pass(START);
        scene.check()?;
        prop_assert!(scene.state.finished().is_some(), "{:?}", scene.state.phase);
    }
}
