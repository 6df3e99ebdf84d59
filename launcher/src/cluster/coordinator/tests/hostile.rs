//! Nodes that have the key and say what they like: nothing of it ends the coordinator, or makes it grow.

use proptest::prelude::*;

use super::*;
use crate::hang::ras;
use crate::hang::report::Inspection as Look;
use crate::manifest::environment::Change;

const NODES: std::ops::Range<u64> = 1..5;
/// Far beyond the longest that a node is waited for after it was heard.
const LONG: Duration = Duration::from_secs(1000);

fn time() -> impl Strategy<Value = Duration> {
    prop_oneof![
        Just(Duration::ZERO),
        Just(Duration::MAX),
        (0u64..10_000).prop_map(MS),
        any::<u64>().prop_map(Duration::from_secs),
    ]
}

/// Mostly the generation that runs.
fn generation() -> impl Strategy<Value = u32> {
    prop_oneof![8 => Just(0u32), 2 => Just(1), 1 => Just(u32::MAX), 1 => any::<u32>()]
}

fn local_rank() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0u32..3, 1 => Just(1_000_000_000), 1 => Just(u32::MAX)]
}

fn code() -> impl Strategy<Value = i32> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(75),
        Just(i32::MAX),
        Just(i32::MIN),
        any::<i32>()
    ]
}

fn any_end() -> impl Strategy<Value = End> {
    prop_oneof![code().prop_map(End::Code), code().prop_map(End::Signal)]
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        Just("\u{1b}[2J\n%s".into()),
        "[a-z]{300}",
        any::<String>()
    ]
}

fn any_rank() -> impl Strategy<Value = (Rank, Place)> {
    let record = prop::option::weighted(0.3, (text(), text(), code()));
    let order = prop_oneof![0usize..9, Just(usize::MAX)];
    let times = (time(), time(), prop::option::of(time()));
    (
        prop::option::of(any_end()),
        record,
        order,
        times,
        any::<bool>(),
    )
        .prop_map(
            |(end, record, order, (ended_at, first_at, left), after_stop)| {
                let record = record.map(|(cause, message, code)| FailureRecord {
                    rank: u32::MAX,
                    step: Some(u64::MAX),
                    cause,
                    message,
                    ..announced(code)
                });
                let rank = Rank {
                    end,
                    ended_at,
                    first_at,
                    order,
                    after_stop,
                    record,
                    left: left.map(|at| (order, at, after_stop)),
                    sent: vec![i32::MAX, 0, 15],
                    step: Some(u64::MAX),
                    ..Rank::default()
                };
                (rank, place_of("elsewhere"))
            },
        )
}

fn any_join() -> impl Strategy<Value = FromAgent> {
    let devices = prop_oneof![Just(2usize), Just(0), Just(1), Just(5), Just(5000)];
    let order = prop::option::of(any::<u32>());
    let host = prop_oneof![4 => Just("n".to_string()), 1 => text()];
    (devices, order, host, any::<u64>()).prop_map(|(devices, order, host, clock)| {
        let mut join = join_of(&host, devices as u32);
        (join.order, join.facts.clock_ms, join.received_ms) = (order, clock, clock);
        FromAgent::Join(Box::new(join))
    })
}

fn any_beat() -> impl Strategy<Value = FromAgent> {
    let step = prop_oneof![Just(None), (0u64..9).prop_map(Some), Just(Some(u64::MAX))];
    let work = prop::sample::select(vec![f32::NAN, f32::INFINITY, -1.0, 0.0, 1.0, f32::MAX]);
    let work = prop::collection::vec(work, 0..50);
    let steps = (step.clone(), step);
    let progress = (local_rank(), steps, work, text(), any::<bool>());
    let progress = progress.prop_map(|(local_rank, steps, work_ms, section, saved)| Progress {
        local_rank,
        step: steps.0,
        first_step: steps.1,
        section: Some(section),
        checkpoint: steps.0.filter(|_| saved),
        epoch: Some(u32::MAX),
        work_ms,
    });
    let values = prop::sample::select(vec![f64::NAN, f64::NEG_INFINITY, f64::MAX, 1.0]);
    let metrics = prop::collection::vec((text(), values), 0..40);
    let ranks = prop::collection::vec(progress, 0..4);
    (
        any::<u64>(),
        generation(),
        time(),
        prop::option::of(time()),
        ranks,
        metrics,
    )
        .prop_map(|(seq, generation, at, rtt, ranks, metrics)| {
            FromAgent::Beat(Beat {
                seq,
                generation,
                at,
                rtt,
                ranks,
                metrics,
                load: f32::NAN,
                mem_used_bytes: u64::MAX,
            })
        })
}

fn message() -> impl Strategy<Value = FromAgent> {
    let ranks = || prop::collection::vec(any_rank(), 0..5);
    let attempt = || prop_oneof![4 => 0u32..3, 1 => Just(u32::MAX)];
    prop_oneof![
        6 => any_join(),
        1 => (text(), code(), text())
            .prop_map(|(host, code, message)| FromAgent::Unfit { host, code, message }),
        4 => any_beat(),
        4 => (generation(), attempt(), any::<[u16; 2]>()).prop_map(|(generation, attempt, [master_port, probe_port])| {
            FromAgent::Reserved { generation, attempt, master_port, probe_port }
        }),
        4 => (generation(), attempt(), 0usize..3).prop_map(|(generation, attempt, n)| {
            let by = vec![([10, 0, 0, 1].into(), "eth0".to_string()); n];
            FromAgent::Reached { generation, attempt, by }
        }),
        2 => (generation(), prop_oneof![Just(0usize), Just(2), Just(100_000)], time()).prop_map(|(generation, n, at)| {
            let environment = vec![Change { name: "N".into(), before: None, after: None }];
            FromAgent::Started { generation, pids: vec![-1; n], cores: vec!["0-".into(); n / 2], at, environment, containment: Default::default() }
        }),
        1 => (generation(), code(), text())
            .prop_map(|(generation, code, message)| FromAgent::CannotStart { generation, code, message }),
        3 => (generation(), local_rank(), prop::option::of(any_end()), time())
            .prop_map(|(generation, local_rank, end, at)| FromAgent::Failing { generation, local_rank, end, at }),
        2 => (generation(), ranks()).prop_map(|(generation, ranks)| FromAgent::Ranks { generation, ranks }),
        4 => (generation(), ranks(), time(), text()).prop_map(|(generation, ranks, started_at, warning)| {
            let report = NodeReport {
                ranks,
                started_at,
                oom_kills: OomKills { all: u64::MAX, unnamed: 1 },
                xids: vec![warning.clone()],
                missing: Some(warning.clone()),
                warnings: vec![warning],
            };
            FromAgent::Clean { generation, report: Box::new(report) }
        }),
        2 => (generation(), local_rank(), any::<bool>(), 0usize..9).prop_map(|(generation, rank, more, n)| {
            let look = Look { rank, host: "h".into(), device: "d".into(), process: Default::default() };
            FromAgent::Inspected { generation, looks: vec![look; n], ras: Some(ras::Answer::default()), more }
        }),
        1 => code().prop_map(|signal| FromAgent::Signal { signal }),
        1 => code().prop_map(|signal| FromAgent::StepSignal { signal }),
        1 => text().prop_map(|text| FromAgent::Notice { text }),
    ]
}

impl Scene {
    fn is_bounded(&self) -> Result<(), TestCaseError> {
        let state = &self.state;
        let ranks = state.world_size() as usize;
        prop_assert!(state.metrics.len() <= 1000);
        prop_assert!(state.progress.len() <= 3 * 4096);
        prop_assert!(state.parts.values().all(|part| part.len() <= 4096));
        prop_assert!(state.nodes.values().all(|node| node.pids.len() <= 4096));
        let looks = state.inspection.as_ref().map_or(0, |i| i.looks.len());
        prop_assert!(looks <= ranks);
        for (id, report) in &state.reports {
            // Between two starts there are no members.
            let most = state.member(*id).map_or(4096, |m| m.ranks.len());
            prop_assert!(report.ranks.len() <= most, "{}", report.ranks.len());
        }
        let _ = state.snapshot(self.now);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn no_message_in_any_order_ends_the_coordinator_and_it_ends_when_all_leave(
        open in any::<bool>(),
        restarts in 0u32..3,
        hangs in any::<bool>(),
        events in prop::collection::vec((NODES, any::<bool>(), message(), 0u64..4000), 1..60),
    ) {
        let mut settings = settings(1, 3);
        settings.open = open;
        settings.policy.max_restarts = restarts;
        settings.hang.hang_timeout = hangs.then(|| S(2));
        let mut scene = Scene::new(settings);
        for (node, is_alive, message, ms) in events {
            if is_alive {
                // It answers what is asked before a start, as one that means well.
                scene.alive.insert(node);
            }
            scene.says(node, message);
            scene.pass(MS(ms));
            scene.is_bounded()?;
        }
        for node in NODES {
            scene.lose(node);
        }
        scene.pass(LONG);
        prop_assert!(scene.state.finished().is_some(), "{:?}", scene.state.phase);
        let code = scene.state.finished().unwrap_or(0);
        prop_assert!((0..=255).contains(&code), "{code}");
    }
}

/// What it says of a node that is not there any more, or not yet, counts for nothing.
#[test]
fn a_report_before_the_start_does_not_count() {
    let mut scene = Scene::new(settings(2, 2));
    scene.alive.insert(1);
    scene.says(1, FromAgent::Join(Box::new(join_of("n1", WORKERS))));
    scene.says(2, FromAgent::Join(Box::new(join_of("n2", WORKERS))));
    assert!(matches!(scene.state.phase, Phase::Form { .. }));
    scene.all_end(1, End::Code(0));
    scene.failing(1, 0, None);
    let (generation, attempt) = (0, scene.state.attempt);
    let by = vec![([10, 0, 0, 1].into(), "eth0".into())];
    let reached = FromAgent::Reached {
        generation,
        attempt,
        by,
    };
    scene.says(2, reached);
    scene.alive.insert(2);
    assert_eq!(scene.state.phase, Phase::Run);
    scene.all_end(2, End::Code(0));
    assert_eq!(scene.state.phase, Phase::Run, "node 1 still runs");
    scene.all_end(1, End::Code(0));
    assert_eq!(scene.code(), Some(0));
}

#[test]
fn a_report_in_parts_is_one_and_a_second_one_is_none() {
    let mut scene = Scene::running(settings(1, 1), 1);
    let generation = 0;
    let ranks = vec![(rank(End::Code(17), 5), place_of("n1"))];
    scene.says(1, FromAgent::Ranks { generation, ranks });
    scene.clean(
        1,
        vec![
            stopped(TERM, 7),
            rank(End::Code(0), 8),
            rank(End::Code(0), 9),
        ],
    );
    let ending = scene.endings()[0].clone();
    assert_eq!(ending.ends, [Some(End::Code(17)), Some(End::Signal(TERM))]);
    assert_eq!(scene.code(), Some(17));
}

#[test]
fn a_node_is_never_unfit_with_success() {
    for code in [0, -1, 256, i32::MIN] {
        let mut settings = settings(1, 1);
        settings.open = false;
        let mut scene = Scene::new(settings);
        let (host, message) = ("n1".into(), "m".into());
        scene.says(
            1,
            FromAgent::Unfit {
                host,
                code,
                message,
            },
        );
        scene.pass(LONG);
        assert_eq!(scene.state.finished(), Some(exit::PREFLIGHT), "{code}");
    }
}

#[test]
fn a_host_is_known_by_its_addresses() {
    let mut scene = Scene::new(settings(2, 2));
    scene.join(1);
    let host = |peer: &str| scene.state.host_at(peer).map(str::to_owned);
    assert_eq!(host("10.0.0.1:4711").as_deref(), Some("n1"));
    assert_eq!(host("[::ffff:10.0.0.1]:4711").as_deref(), Some("n1"));
    assert_eq!(host("10.0.0.1").as_deref(), Some("n1"));
    assert_eq!((host("10.0.0.2:4711"), host("gpu-01")), (None, None));
}
