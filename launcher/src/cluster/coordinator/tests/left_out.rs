//! Nodes that get no ranks, nodes that come late, and programs that report no steps.

use super::*;

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
fn a_node_without_others_is_not_left_out_and_its_failure_is_the_reason() {
    let mut settings = restarting(1, 1);
    settings.open = false;
    let mut scene = Scene::running(settings, 1);
    scene.failing(1, 1, Some(End::Code(exit::PREFLIGHT)));
    let broken = rank(End::Code(exit::PREFLIGHT), 0);
    scene.clean(1, vec![stopped(TERM, 1), broken]);
    assert_eq!(scene.code(), Some(exit::PREFLIGHT));
    assert_eq!(left_out(&scene), []);
    let ending = &scene.endings()[0];
    assert!(!ending.again);
    let reason = ending.reason.clone().map(|r| r.to_string());
    let headline = "rank 1 failed first: exit code 69";
    assert_eq!(reason.as_deref(), Some(headline));
    let verdict = "hardware: there is no other node to start it on";
    assert_eq!(ending.verdict.as_deref(), Some(verdict));
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
    let mut settings = super::settings(1, 1);
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
