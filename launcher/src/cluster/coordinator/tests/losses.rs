//! Nodes that are lost, in every phase.

use super::*;

#[test]
fn who_held_the_agents_is_named_where_it_was_killed() {
    let killed = || Event::StarterKilled {
        host: "srun".into(),
        killed: "srun, which held it, ended with signal 9 (SIGKILL)".into(),
    };
    for is_first in [true, false] {
        let mut settings = settings(2, 2);
        settings.hosts = ["n1", "n2"].map(String::from).into();
        let mut scene = Scene::running(settings, 2);
        if is_first {
            scene.event(killed());
        }
        scene.lose(2);
        if !is_first {
            scene.event(killed());
        }
        scene.all_stopped(1);
        let failure = scene.ending().failure.expect("a failure");
        let text = "node n2 was lost first: its agent broke off the connection, and srun, which held it, ended with signal 9 (SIGKILL)";
        assert_eq!(failure.headline(), text);
        assert!(
            failure.hint.contains("who kills processes"),
            "{}",
            failure.hint
        );
    }
    // That of another host has nothing to do with it.
    let mut settings = settings(2, 2);
    settings.hosts = ["n1", "n2"].map(String::from).into();
    let mut scene = Scene::running(settings, 2);
    let (host, killed) = ("n1".into(), "ssh, which held it, ended".into());
    scene.event(Event::StarterKilled { host, killed });
    scene.lose(2);
    scene.all_stopped(1);
    let failure = scene.ending().failure.expect("a failure");
    assert!(failure.headline().ends_with("broke off the connection"));
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

/// Wherever between two beats it falls silent.
#[test]
fn the_others_are_told_in_time_that_a_node_is_silent() {
    // The rest is for the wire, the agents, and their signals.
    let (told, lived) = (SILENCE - MS(50), LEASE - LEASE / BEATS_PER_LEASE);
    for after in [3000, 3001, 3100, 3199] {
        let mut scene = Scene::running(settings(2, 2), 2);
        scene.pass(MS(after));
        scene.alive.remove(&2);
        scene.pass(lived - MS(1));
        assert_eq!(scene.was_stopped_by(1), None, "a blip is no loss");
        scene.pass(told - lived + MS(1));
        assert_eq!(scene.was_stopped_by(1), Some(TERM), "silent at {after} ms");
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
        let said = format!(
            "waiting {:.1} s: until then ranks of n2 may still run; Ctrl-C leaves at once",
            (LEASE + FENCE).as_secs_f64()
        );
        assert!(scene.notices().contains(&said), "{}", scene.notices());
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

/// A scheduler suspends all processes of a job, and lets them go on: the nodes have given the coordinator up then.
#[test]
fn a_job_that_was_suspended_goes_on_where_it_is_queued_again() {
    let end = |settings: Settings, saved: Option<u64>| {
        let mut scene = Scene::running(settings, 2);
        scene.step(9, saved);
        scene.now += S(4);
        let (host, time) = ("n1".into(), MS(3940));
        scene.event(Event::Stalled { host, time });
        // It lost its peers before it was seen that their node is lost.
        scene.failing(1, 0, Some(End::Code(1)));
        scene.lose(2);
        let ms = scene.now.as_millis() as u64;
        scene.clean(1, vec![rank(End::Code(1), ms), stopped(TERM, ms + 1)]);
        scene
    };
    let queued = |max_restarts| {
        let mut settings = settings(2, 2);
        settings.requeues = true;
        settings.policy.max_restarts = max_restarts;
        settings
    };
    for (max_restarts, saved, from) in [(0, Some(8), "step 8"), (3, None, "its last checkpoint")] {
        let mut scene = end(queued(max_restarts), saved);
        let ending = scene.ending();
        assert_eq!((ending.outcome, ending.again), ("stopped", false));
        assert!(ending.failure.is_none(), "nobody failed");
        let cause = "the job did not run for 3.9 s: suspended?";
        let verdict = ending.verdict.expect("a verdict");
        assert!(verdict.starts_with(cause), "{verdict}");
        assert!(
            verdict.ends_with(&format!("it goes on from {from}")),
            "{verdict}"
        );
        assert_eq!(scene.reason().as_deref(), Some(cause));
        assert_eq!(scene.code(), Some(exit::REQUEUE));
    }

    // Nobody else starts it again.
    let mut scene = end(settings(2, 2), Some(8));
    assert_eq!(scene.ending().failure.map(|f| f.host), Some("n2".into()));
    assert_eq!(scene.code(), Some(exit::PEER));
    // A node that is lost by itself has failed.
    let mut scene = Scene::running(queued(0), 2);
    scene.lose(2);
    scene.all_stopped(1);
    assert_eq!(scene.code(), Some(exit::PEER));
}
