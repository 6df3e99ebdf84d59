//! `--preflight full`, with agents that answer by what their network is like.

use proptest::prelude::*;

use super::*;
use crate::cluster::message::{Finding, Round, Severity};
use crate::doctor::preflight::{Measured, Task};

const WAIT: Duration = Duration::from_secs(2);

/// What a pair of nodes measures.
type Network = fn(&[NodeId]) -> Result<f64, &'static str>;

fn good(_: &[NodeId]) -> Result<f64, &'static str> {
    Ok(10.0)
}

fn slow_2(members: &[NodeId]) -> Result<f64, &'static str> {
    Ok(if members.contains(&2) { 1.0 } else { 10.0 })
}

fn dead_2(members: &[NodeId]) -> Result<f64, &'static str> {
    match members.contains(&2) {
        true => Err("no route"),
        false => Ok(10.0),
    }
}

/// Nodes 1 and 2 do not reach each other.
fn path_1_2(members: &[NodeId]) -> Result<f64, &'static str> {
    match members.contains(&1) && members.contains(&2) {
        true => Err("no route"),
        false => Ok(10.0),
    }
}

pub(super) fn measuring(min_nodes: u32, max_nodes: u32) -> Settings {
    let mut settings = restarting(min_nodes, max_nodes);
    settings.measure = Some(Scale {
        wait: WAIT,
        ..Scale::default()
    });
    settings
}

fn measured(result: Result<f64, &str>) -> Result<Measured, String> {
    let measured = |gbit_s| Measured {
        seconds: 1.0,
        gbit_s,
        round_trip: MS(1),
        wrong: None,
    };
    result.map(measured).map_err(String::from)
}

fn own(memory_gbyte_s: f64) -> OwnNode {
    OwnNode {
        memory_gbyte_s: Some(memory_gbyte_s),
        loopback_gbit_s: Some(20.0),
        all_reduce_gb_s: None,
        links: [("eth0".into(), 10_000)].into(),
        findings: Vec::new(),
    }
}

impl Scene {
    /// So many nodes have joined, and are asked to measure themselves.
    fn joined(settings: Settings, num_nodes: u64) -> Scene {
        let mut scene = Scene::new(settings);
        (1..=num_nodes).for_each(|id| scene.join(id));
        scene
    }

    /// What is asked of all who are alive.
    fn asked(&mut self) -> Vec<(NodeId, ToAgent)> {
        let alive = self.alive.clone();
        let told = |id| self.told(id).into_iter().map(move |m| (id, m));
        alive.into_iter().flat_map(told).collect()
    }

    /// Answers until nothing is asked any more. A node's port is its number. What is not about measuring is returned.
    fn measure(&mut self, network: Network) -> Vec<(NodeId, ToAgent)> {
        let mut others = Vec::new();
        loop {
            let asked = self.asked();
            if asked.is_empty() {
                return others;
            }
            for (id, message) in asked {
                match message {
                    ToAgent::MeasureNode { round, .. } => {
                        let own = own(10.0);
                        self.says(id, FromAgent::NodeMeasured { round, own });
                    }
                    ToAgent::OpenRing { round } => {
                        let port = Ok(id as u16);
                        self.says(id, FromAgent::RingOpen { round, port });
                    }
                    ToAgent::Measure { round, task } => {
                        let result = measured(network(&ids(&task)));
                        self.says(id, FromAgent::Measured { round, result });
                    }
                    other => others.push((id, other)),
                }
            }
        }
    }

    fn reports(&self) -> Vec<&Report> {
        let report = |a: &'_ Action| matches!(a, Action::Measured(_));
        let reports = self.actions.iter().filter(|a| report(a));
        reports
            .map(|a| match a {
                Action::Measured(report) => &**report,
                _ => unreachable!(),
            })
            .collect()
    }

    fn is_measuring(&self) -> bool {
        matches!(self.state.phase, Phase::Measure { .. })
    }

    fn hosts(&self) -> Vec<NodeId> {
        self.state.members.iter().map(|m| m.id).collect()
    }
}

fn ids(task: &Task) -> Vec<NodeId> {
    task.members.iter().map(|at| at.port().into()).collect()
}

fn starts(told: &[(NodeId, ToAgent)]) -> Vec<NodeId> {
    let start = |(_, message): &&(NodeId, ToAgent)| matches!(message, ToAgent::Start(_));
    told.iter().filter(start).map(|(id, _)| *id).collect()
}

#[test]
fn good_nodes_are_measured_once_and_a_new_one_with_them() {
    let mut scene = Scene::joined(measuring(2, 2), 3);
    assert!(scene.is_measuring());
    assert_eq!(starts(&scene.measure(good)), [1, 2]);
    let report = scene.reports()[0];
    assert_eq!(report.nodes.len(), 2);
    assert_eq!(report.groups[0][0].hosts, ["n1", "n2"]);
    let well = |f: &Finding| f.severity == Severity::Ok;
    assert!(report.findings.iter().all(well), "{report:?}");
    let line = "preflight: memory copies 10.00 GB/s on 2 nodes; loopback 20.00 Gbit/s; \
        2 nodes in 1 group: 10.00 Gbit/s, every sum is right (0.0 s)";
    assert!(scene.notices().contains(line), "{}", scene.notices());

    // The same nodes again: known.
    scene.step(3, Some(3));
    scene.failing(1, 0, Some(End::Signal(9)));
    scene.clean(1, vec![rank(End::Signal(9), 0), stopped(TERM, 1)]);
    scene.all_stopped(2);
    assert_eq!(scene.state.phase, Phase::Run);
    assert_eq!(scene.reports().len(), 1);
    scene.asked();

    // The spare has not been measured; nobody measures itself twice.
    scene.step(4, Some(4));
    scene.lose(1);
    scene.all_stopped(2);
    scene.pass(S(3));
    assert!(scene.is_measuring());
    let asked = scene.asked();
    let own = |(_, m): &&(NodeId, ToAgent)| matches!(m, ToAgent::MeasureNode { .. });
    let own: Vec<NodeId> = asked.iter().filter(own).map(|(id, _)| *id).collect();
    assert_eq!(own, [3]);
}

#[test]
fn a_bad_node_gets_no_ranks_where_others_suffice() {
    for (network, why) in [
        (
            slow_2 as Network,
            "n2 is slow with every partner: 1.00 Gbit/s, others 10.00",
        ),
        (dead_2, "n2 fails with every partner: no route"),
    ] {
        // A spare, or fewer nodes.
        for (min, spare, members) in [(3, true, [1, 4, 3].as_slice()), (2, false, &[1, 3])] {
            let mut scene = Scene::joined(measuring(min, 3), 3 + u64::from(spare));
            let mut started = starts(&scene.measure(network));
            started.sort_unstable();
            let mut expected = members.to_vec();
            expected.sort_unstable();
            assert_eq!((scene.hosts(), started), (members.to_vec(), expected));
            let left_out = &scene.reports()[0].left_out;
            assert_eq!(
                (left_out[0].host.as_str(), left_out[0].why.as_str()),
                ("n2", why)
            );
            assert!(
                scene
                    .notices()
                    .contains(&format!("gets no ranks any more: {why}"))
            );
            // Not even when it comes again.
            scene.lose(2);
            scene.alive.insert(9);
            scene.says(9, FromAgent::Join(Box::new(join_of("n2", WORKERS))));
            assert_eq!(scene.exit_of(9), Some(exit::PREFLIGHT));
        }
    }
}

#[test]
fn without_enough_good_nodes_the_job_ends_and_says_why() {
    let mut scene = Scene::joined(measuring(3, 3), 3);
    let told = scene.measure(slow_2);
    assert!(starts(&told).is_empty());
    let exits = told.iter().filter_map(|(id, m)| match m {
        ToAgent::Exit { code, message } => Some((*id, *code, message.clone().unwrap())),
        _ => None,
    });
    for (_, code, message) in exits.collect::<Vec<_>>() {
        assert_eq!(code, exit::PREFLIGHT);
        let text = "n2 is slow with every partner: 1.00 Gbit/s, others 10.00; \
            2 nodes left, 3 are needed\n  hint: all ranks wait for it";
        assert!(message.starts_with(text), "{message}");
    }
    assert_eq!(scene.reports().len(), 1);
    assert!(matches!(
        scene.state.phase,
        Phase::Leave {
            code: exit::PREFLIGHT,
            ..
        }
    ));
}

#[test]
fn a_failure_without_a_culprit_ends_the_job_and_a_slow_one_does_not() {
    let mut scene = Scene::joined(measuring(2, 2), 2);
    scene.measure(dead_2);
    let text = "n1 and n2 did badly together: no route\n  hint: no other node is well";
    assert!(scene.notices().contains(text), "{}", scene.notices());
    assert!(matches!(
        scene.state.phase,
        Phase::Leave {
            code: exit::PREFLIGHT,
            ..
        }
    ));

    let mut scene = Scene::joined(measuring(4, 4), 4);
    scene.measure(path_1_2);
    let text = "n1 and n2 did badly together, and each well with another node: no route";
    assert!(scene.notices().contains(text), "{}", scene.notices());
    assert!(matches!(
        scene.state.phase,
        Phase::Leave {
            code: exit::PREFLIGHT,
            ..
        }
    ));

    let mut scene = Scene::joined(measuring(4, 4), 4);
    let slow = |m: &[NodeId]| Ok(path_1_2(m).unwrap_or(1.0));
    assert_eq!(starts(&scene.measure(slow)), [1, 2, 3, 4]);
    let text =
        "warning: n1 and n2 did badly together, and each well with another node: 1.00 Gbit/s";
    assert!(scene.notices().contains(text), "{}", scene.notices());
}

/// Each is the other's only yardstick, but for what the kernel says of their links.
#[test]
fn two_nodes_that_are_both_slow_are_told_and_start_all_the_same() {
    for (gbit_s, told) in [(2.6, false), (0.94, true)] {
        let mut scene = Scene::joined(measuring(2, 2), 2);
        let others = match told {
            true => scene.measure(|_| Ok(0.94)),
            false => scene.measure(|_| Ok(2.6)),
        };
        assert_eq!(starts(&others), [1, 2]);
        let text =
            "warning: n1 and n2 reach 0.94 Gbit/s together, and eth0 on n1 is a link of 10 Gbit/s";
        assert_eq!(
            scene.notices().contains(text),
            told,
            "{gbit_s}: {}",
            scene.notices()
        );
    }
}

#[test]
fn spares_tell_who_of_two_nodes_is_to_blame() {
    let mut scene = Scene::joined(measuring(2, 2), 3);
    assert_eq!(starts(&scene.measure(dead_2)), [1, 3]);
    assert!(scene.notices().contains("measuring with the spares"));
    assert_eq!(scene.hosts(), [1, 3]);
    // Where only the path is bad, no spare can help: both are well. It is said once, and not tried for ever.
    let mut scene = Scene::joined(measuring(2, 2), 3);
    scene.measure(path_1_2);
    assert!(matches!(
        scene.state.phase,
        Phase::Leave {
            code: exit::PREFLIGHT,
            ..
        }
    ));
    assert_eq!(scene.reports().len(), 2);
}

#[test]
fn who_does_not_answer_has_failed() {
    let mut scene = Scene::joined(measuring(3, 3), 4);
    // Round 0: node 2 does not measure itself.
    for (id, message) in scene.asked() {
        if let ToAgent::MeasureNode { round, .. } = message
            && id != 2
        {
            let own = own(10.0);
            scene.says(id, FromAgent::NodeMeasured { round, own });
        }
    }
    scene.pass(WAIT + S(9));
    assert!(scene.asked().is_empty());
    scene.pass(S(2));
    let told = scene.measure(good);
    assert_eq!(scene.hosts(), [1, 4, 3]);
    assert_eq!(starts(&told).len(), 3);
    assert!(
        scene
            .notices()
            .contains("n2: it did not measure itself within 12s")
    );

    // In a group: it opens, and that is all.
    let mut scene = Scene::joined(measuring(2, 2), 2);
    for (id, message) in scene.asked() {
        if let ToAgent::MeasureNode { round, .. } = message {
            let own = own(10.0);
            scene.says(id, FromAgent::NodeMeasured { round, own });
        }
    }
    for (id, message) in scene.asked() {
        if let ToAgent::OpenRing { round } = message {
            let port = Ok(id as u16);
            scene.says(id, FromAgent::RingOpen { round, port });
        }
    }
    for (id, message) in scene.asked() {
        if let ToAgent::Measure { round, .. } = message
            && id == 1
        {
            let result = Err("a neighbour left: eof".into());
            scene.says(id, FromAgent::Measured { round, result });
        }
    }
    scene.pass(WAIT + S(11));
    assert!(
        scene.notices().contains("n2 did not answer within 12s"),
        "{}",
        scene.notices()
    );
}

#[test]
fn a_node_that_cannot_listen_or_has_no_address_fails_its_group_at_once() {
    let mut scene = Scene::joined(measuring(2, 2), 2);
    for (id, message) in scene.asked() {
        if let ToAgent::MeasureNode { round, .. } = message {
            let own = own(10.0);
            scene.says(id, FromAgent::NodeMeasured { round, own });
        }
    }
    for (id, message) in scene.asked() {
        if let ToAgent::OpenRing { round } = message {
            let port = match id {
                1 => Ok(1),
                _ => Err("no port is free".into()),
            };
            scene.says(id, FromAgent::RingOpen { round, port });
        }
    }
    assert!(
        scene
            .notices()
            .contains("n2: cannot listen: no port is free")
    );

    let mut scene = Scene::new(measuring(2, 2));
    scene.join(1);
    scene.alive.insert(2);
    let mut join = join_of("n2", WORKERS);
    join.addresses = vec![("fd00::2".parse().unwrap(), "eth0".into())];
    scene.says(2, FromAgent::Join(Box::new(join)));
    scene.measure(good);
    let text = "n2: it has no address of the kind that the first node has";
    assert!(scene.notices().contains(text), "{}", scene.notices());
}

#[test]
fn a_node_that_finds_itself_broken_gets_no_ranks_also_alone() {
    let broken = |round| FromAgent::NodeMeasured {
        round,
        own: OwnNode {
            findings: vec![Finding::error(
                "memory",
                "1 of 8 words differ",
                "run memtest",
            )],
            ..OwnNode::default()
        },
    };
    let mut scene = Scene::joined(measuring(1, 1), 1);
    let (_, message) = scene.asked().pop().unwrap();
    let ToAgent::MeasureNode { round, .. } = message else {
        panic!("{message:?}");
    };
    scene.says(1, broken(round));
    let text = "n1: 1 of 8 words differ; 0 nodes left, 1 are needed\n  hint: run memtest";
    assert!(scene.notices().contains(text), "{}", scene.notices());
    assert_eq!(scene.exit_of(1), Some(exit::PREFLIGHT));
}

#[test]
fn a_node_lost_in_the_middle_is_replaced_and_old_answers_are_dropped() {
    let mut scene = Scene::joined(measuring(2, 2), 3);
    let asked = scene.asked();
    scene.lose(2);
    assert!(scene.notices().contains("n2 is lost"));
    assert!(scene.is_measuring());
    assert_eq!(scene.hosts(), [1, 3]);
    // An answer to the first attempt, with something that would be an error.
    let Some((1, ToAgent::MeasureNode { round, .. })) = asked.first() else {
        panic!("{asked:?}");
    };
    let own = OwnNode::failed("broken");
    scene.says(1, FromAgent::NodeMeasured { round: *round, own });
    assert_eq!(starts(&scene.measure(good)), [1, 3]);
}

#[test]
fn a_signal_ends_a_measurement_at_once() {
    let mut scene = Scene::joined(measuring(2, 2), 2);
    scene.asked();
    scene.event(Event::Signal(libc::SIGINT));
    assert_eq!(scene.exit_of(1), Some(130));
    scene.lose(1);
    // What comes late changes nothing.
    let round = Round {
        generation: 0,
        attempt: 1,
        number: 0,
    };
    let own = own(1.0);
    scene.says(2, FromAgent::NodeMeasured { round, own });
    assert_eq!(scene.code(), Some(130));
}

#[test]
fn the_address_is_on_the_interface_that_was_found_and_of_the_master_s_family() {
    let own: Vec<(IpAddr, String)> = [
        ("10.0.2.7", "eth0"),
        ("fd00::7", "eth1"),
        ("10.0.9.7", "eth1"),
        ("10.0.1.7", "eth1"),
    ]
    .map(|(a, name)| (a.parse().unwrap(), name.into()))
    .to_vec();
    let of = |name: &str, master: &str| {
        let found = super::super::measuring::address_on(&own, name, master.parse().unwrap());
        found.map(|a| a.to_string())
    };
    assert_eq!(of("eth1", "10.0.1.1").as_deref(), Some("10.0.1.7"));
    assert_eq!(of("eth1", "fd00::1").as_deref(), Some("fd00::7"));
    // Its address is on loopback, which is not listed.
    assert_eq!(of("lo", "10.0.2.1").as_deref(), Some("10.0.2.7"));
    assert_eq!(of("lo", "127.0.0.1").as_deref(), Some("127.0.0.1"));
    let v4 = &own[..1];
    let none = super::super::measuring::address_on(v4, "eth0", "fd00::1".parse().unwrap());
    assert_eq!(none, None);
}

proptest! {
    /// However many nodes, and whichever of them are bad: it ends, and no bad one has ranks beside others.
    #[test]
    fn bad_nodes_never_get_ranks(min in 1u32..5, more in 0u32..3, spares in 0u64..3, bad in prop::collection::btree_set(1u64..10, 0..3)) {
        thread_local!(static BAD: std::cell::RefCell<BTreeSet<NodeId>> = const { std::cell::RefCell::new(BTreeSet::new()) });
        BAD.set(bad.clone());
        let network: Network = |members| match members.iter().any(|m| BAD.with_borrow(|bad| bad.contains(m))) {
            true => Err("no route"),
            false => Ok(10.0),
        };
        let num_nodes = u64::from(min + more) + spares;
        let mut scene = Scene::joined(measuring(min, min + more), num_nodes);
        let started = starts(&scene.measure(network));
        let leaves = matches!(scene.state.phase, Phase::Leave { code: exit::PREFLIGHT, .. });
        prop_assert!(leaves || scene.state.phase == Phase::Run, "{:?}", scene.state.phase);
        prop_assert_eq!(leaves, started.is_empty());
        prop_assert!(started.len() == 1 || started.iter().all(|id| !bad.contains(id)), "{:?}", started);
        let well = (1..=u64::from(min + more)).filter(|id| !bad.contains(id)).count();
        // Where most are well, nothing keeps the job from running.
        prop_assert!(!leaves || well < min as usize || well < 2 || spares > 0 || bad.len() * 3 > num_nodes as usize, "{:?}", scene.notices());
    }
}

#[test]
fn what_was_seen_without_measuring_is_told_once_and_an_error_keeps_a_node_out() {
    let seen = |id: u64, findings: Vec<Finding>| {
        let mut join = join_of(&format!("n{id}"), WORKERS);
        join.facts.findings = findings;
        FromAgent::Join(Box::new(join))
    };
    let full = Finding::error("disk", "0 bytes are free", "remove old runs");
    let small = Finding::warning("shm", "/dev/shm has 64 MiB", "make it larger");
    let mut scene = Scene::new(settings(2, 2));
    scene.alive.extend([1, 2, 3]);
    scene.says(
        1,
        seen(1, vec![small.clone(), Finding::ok("cpu", "8 cores")]),
    );
    scene.says(2, seen(2, vec![full.clone()]));
    assert!(
        scene
            .notices()
            .contains("n2 cannot take part: 0 bytes are free\n  hint: remove old runs")
    );
    let told = scene.told(2);
    let [
        ToAgent::Exit {
            code: exit::PREFLIGHT,
            message: Some(text),
        },
        ..,
    ] = told.as_slice()
    else {
        panic!("{told:?}");
    };
    assert!(
        text.starts_with("n2 cannot run the job: 0 bytes are free"),
        "{text}"
    );
    scene.says(3, seen(3, vec![small.clone()]));
    assert_eq!(scene.state.phase, Phase::Run);
    let text = "warning: n1, n3: /dev/shm has 64 MiB\n  hint: make it larger";
    assert!(scene.notices().contains(text), "{}", scene.notices());
    assert!(!scene.notices().contains("8 cores"));

    let mut scene = Scene::new(settings(1, 1));
    scene.alive.insert(1);
    scene.says(1, seen(1, vec![full]));
    assert!(
        scene
            .notices()
            .contains("n1 cannot run the job: 0 bytes are free")
    );
    assert_eq!(scene.code(), Some(exit::PREFLIGHT));
}

/// An elastic job on node 1, and node 2, which joins while it runs and is asked to measure itself.
fn newcomer() -> (Scene, Round) {
    let mut scene = Scene::joined(measuring(1, 2), 1);
    scene.pass(S(6));
    assert_eq!(starts(&scene.measure(good)), [1]);
    scene.join(2);
    let asked = scene.asked();
    let [(2, ToAgent::MeasureNode { round, .. })] = asked[..] else {
        panic!("{asked:?}");
    };
    (scene, round)
}

#[test]
fn a_newcomer_measures_itself_before_anybody_is_stopped_for_it() {
    let (mut scene, round) = newcomer();
    scene.step(3, Some(3));
    assert_eq!(scene.was_stopped_by(1), None, "nothing is known of it yet");
    let own = own(10.0);
    scene.says(2, FromAgent::NodeMeasured { round, own });
    assert_eq!(scene.asked(), [], "one that is well waits for a checkpoint");
    scene.step(4, Some(4));
    assert_eq!(scene.was_stopped_by(1), Some(libc::SIGUSR2));
    scene.all_end(1, End::Code(exit::REQUEUE));
    // In the pause only what they reach together is measured.
    let asked = scene.asked();
    let opens = |(_, m): &(NodeId, ToAgent)| matches!(m, ToAgent::OpenRing { .. });
    assert!(asked.len() == 2 && asked.iter().all(opens), "{asked:?}");
    for (id, message) in asked {
        if let ToAgent::OpenRing { round } = message {
            let port = Ok(id as u16);
            scene.says(id, FromAgent::RingOpen { round, port });
        }
    }
    assert_eq!(starts(&scene.measure(good)), [1, 2]);
    assert_eq!(scene.state.generation, 1);
}

#[test]
fn a_faulty_newcomer_disturbs_nobody() {
    let broken = || OwnNode::failed("the copy differs");
    let answers = [Some(broken()), None];
    for answer in answers {
        let (mut scene, round) = newcomer();
        let why = match answer {
            Some(own) => {
                scene.says(2, FromAgent::NodeMeasured { round, own });
                "n2: the copy differs"
            }
            None => {
                scene.pass(WAIT + rounds::MARGIN);
                "n2: it did not measure itself within"
            }
        };
        let said = format!("n2 gets no ranks any more: {why}");
        assert!(scene.notices().contains(&said), "{}", scene.notices());
        let report = scene.reports().last().unwrap().left_out[0].clone();
        assert!(report.must && report.why.starts_with(why), "{report:?}");
        scene.step(4, Some(4));
        assert_eq!(scene.was_stopped_by(1), None);
        assert_eq!(scene.state.phase, Phase::Run);
        // The next one has its chance.
        scene.join(3);
        let asked = scene.asked();
        assert!(
            asked
                .iter()
                .any(|(id, m)| *id == 3 && matches!(m, ToAgent::MeasureNode { .. })),
            "{asked:?}"
        );
    }
}

#[test]
fn a_newcomer_that_leaves_in_the_middle_is_forgotten() {
    let (mut scene, _) = newcomer();
    scene.lose(2);
    scene.pass(WAIT + rounds::MARGIN + S(1));
    assert!(
        !scene.notices().contains("gets no ranks"),
        "{}",
        scene.notices()
    );
    scene.join(3);
    let asked = scene.asked();
    assert!(
        matches!(asked[..], [(3, ToAgent::MeasureNode { .. })]),
        "{asked:?}"
    );
}
