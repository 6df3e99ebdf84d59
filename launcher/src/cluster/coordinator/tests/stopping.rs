//! Signals, saves, and the way to the end of a generation.

use super::*;

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
fn ctrl_c_at_a_node_without_ranks_is_about_that_node() {
    let signal = libc::SIGINT;
    let mut scene = Scene::running(settings(2, 2), 2);
    scene.join(3);
    scene.says(
        3,
        FromAgent::Signal {
            signal: libc::SIGUSR2,
        },
    );
    assert!(scene.told(3).is_empty());
    scene.says(3, FromAgent::Signal { signal });
    let told = scene.told(3);
    assert!(
        matches!(told[..], [ToAgent::Exit { code: 130, .. }]),
        "{told:?}"
    );
    scene.lose(3);
    assert_eq!(scene.state.phase, Phase::Run);
    assert!(scene.told(1).is_empty());
    scene.all_end(1, End::Code(0));
    scene.all_end(2, End::Code(0));
    assert_eq!(scene.code(), Some(0));

    // Where nobody has any yet, all wait for the same.
    let mut scene = Scene::new(settings(3, 3));
    scene.join(1);
    scene.join(2);
    scene.says(2, FromAgent::Signal { signal });
    assert_eq!(scene.code(), Some(130));

    // Of a job whose nodes were started together.
    let mut closed = settings(2, 2);
    closed.open = false;
    let mut scene = Scene::running(closed, 2);
    scene.join(3);
    scene.says(3, FromAgent::Signal { signal });
    assert_eq!(scene.was_stopped_by(1), Some(signal));
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
    assert_eq!(scene.reason().as_deref(), Some("SIGINT"));
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
    assert_eq!(scene.reason().as_deref(), Some("SIGUSR2 on n2"));
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
    assert_eq!(scene.reason().as_deref(), Some("the allocation ends soon"));
    assert_eq!(scene.code(), Some(exit::REQUEUE));
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

fn usr2(scene: &mut Scene) {
    scene.event(Event::Signal(libc::SIGUSR2));
}

/// Two nodes whose ranks are told to save, by whatever asks for it.
fn saving() -> [Scene; 3] {
    let mut asked = Scene::running(restarting(2, 2), 2);
    usr2(&mut asked);
    let mut limited = restarting(2, 2);
    limited.save_at = Some(S(1));
    let mut limited = Scene::running(limited, 2);
    limited.pass(S(1));
    let mut growing = Scene::new(restarting(2, 3));
    (1..=2).for_each(|node| growing.join(node));
    growing.pass(S(5));
    growing.join(3);
    growing.told(1);
    growing.step(3, Some(2));
    let mut all = [asked, limited, growing];
    for scene in &mut all {
        for node in [1, 2] {
            assert_eq!(scene.was_stopped_by(node), Some(libc::SIGUSR2));
        }
        scene.pass(S(1));
    }
    all
}

#[test]
fn a_rank_that_fails_while_all_save_stops_the_others_at_once() {
    let [asked, limited, growing] = saving();
    for (mut scene, again) in [(asked, false), (limited, false), (growing, true)] {
        let ms = scene.now.as_millis() as u64;
        scene.failing(1, 0, Some(End::Code(12)));
        assert_eq!(scene.was_stopped_by(2), Some(TERM));
        let said = "rank 0 on n1 ended with exit code 12 while the workers save: stopping the others, grace 5s";
        assert!(scene.notices().contains(said), "{}", scene.notices());
        // What comes of it is said and stopped once.
        scene.failing(2, 1, Some(End::Code(1)));
        assert_eq!(scene.was_stopped_by(2), None);
        scene.clean(1, vec![rank(End::Code(12), ms), stopped(TERM, ms + 1)]);
        assert_eq!(scene.was_stopped_by(2), None);
        assert_eq!(scene.notices().matches("stopping").count(), 1);
        let lost_peer = Rank {
            after_stop: true,
            ..rank(End::Code(1), ms + 1)
        };
        scene.clean(2, vec![stopped(TERM, ms + 1), lost_peer]);
        let ending = scene.ending();
        let failure = ending.failure.expect("a failure");
        assert_eq!((failure.rank, failure.host.as_str()), (Some(0), "n1"));
        assert_eq!((ending.code, ending.again), (12, again));
    }
}

#[test]
fn a_node_lost_while_all_save_stops_the_others_at_once() {
    let [asked, limited, growing] = saving();
    for (mut scene, again) in [(asked, false), (limited, false), (growing, true)] {
        scene.lose(2);
        assert_eq!(scene.was_stopped_by(1), Some(TERM));
        scene.all_stopped(1);
        let ending = scene.ending();
        let failure = ending.failure.expect("a failure");
        assert_eq!((failure.rank, failure.host.as_str()), (None, "n2"));
        assert_eq!((ending.code, ending.again), (exit::PEER, again));
    }
}

/// Its node told it to end, and not to save: another rank there had not begun to hear signals.
#[test]
fn ranks_that_end_without_having_saved_stop_those_that_still_save() {
    let [mut scene, ..] = saving();
    scene.all_stopped(1);
    assert_eq!(scene.was_stopped_by(2), Some(TERM));
    let said =
        "rank 0 on n1 ended with signal 15 (SIGTERM) while the workers save: stopping the others";
    assert!(scene.notices().contains(said), "{}", scene.notices());
    scene.all_stopped(2);
    assert!(scene.ending().failure.is_none());
    assert_eq!(
        scene.code(),
        Some(exit::REQUEUE),
        "there was nothing to save"
    );

    // Nobody has more than one grace for a save, and who is well waits for nobody.
    for end in [End::Code(exit::REQUEUE), End::Signal(libc::SIGKILL)] {
        let [mut scene, ..] = saving();
        let ended = Rank {
            sent: vec![libc::SIGUSR2, libc::SIGKILL],
            ..rank(end, 6000)
        };
        scene.clean(1, vec![ended; 2]);
        assert_eq!(scene.was_stopped_by(2), None, "{end}");
    }
}

#[test]
fn workers_that_cannot_be_started_stop_those_that_save_already() {
    let [mut scene, ..] = saving();
    let (generation, code, message) = (0, 69, "no such directory".into());
    let cannot = FromAgent::CannotStart {
        generation,
        code,
        message,
    };
    scene.says(2, cannot);
    assert_eq!(scene.was_stopped_by(1), Some(TERM));
}
