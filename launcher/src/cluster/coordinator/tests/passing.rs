//! Signals that are passed on to programs that are not ours.

use super::*;

/// A program that is not ours, and may be restarted, was passed a signal at 1 s.
fn passed_on(signal: i32, num_nodes: u32) -> Scene {
    let mut settings = settings(num_nodes, num_nodes);
    settings.job.saves = false;
    settings.policy.max_restarts = 2;
    let mut scene = Scene::running(settings, num_nodes.into());
    scene.pass(S(1));
    scene.event(Event::Signal(signal));
    let generation = 0;
    assert_eq!(scene.told(1), [ToAgent::Signal { generation, signal }]);
    scene
}

/// A rank that was passed this signal, and ended so.
fn asked(signal: i32, end: End, ms: u64) -> Rank {
    Rank {
        sent: vec![signal],
        ..rank(end, ms)
    }
}

fn answered(scene: &mut Scene, node: NodeId, end: End) {
    let (generation, local_rank) = (0, 0);
    let answered = FromAgent::Answered {
        generation,
        local_rank,
        end,
    };
    scene.says(node, answered);
}

const USR2: i32 = libc::SIGUSR2;
const SAVED: End = End::Code(exit::REQUEUE);

#[test]
fn who_saves_on_a_passed_sigusr2_has_the_grace_of_the_signal() {
    let saved = |ms| vec![asked(USR2, SAVED, ms), asked(USR2, End::Code(0), ms)];
    let mut scene = passed_on(USR2, 2);
    scene.pass(S(2));
    answered(&mut scene, 1, SAVED);
    scene.clean(1, saved(3000));
    assert!(
        scene
            .notices()
            .contains("rank 0 on n1 has saved and ended: waiting up to 3.0 s for 3 others")
    );
    scene.pass(MS(2999));
    assert_eq!(scene.was_stopped_by(2), None);
    scene.clean(2, saved(5900));
    assert_eq!(scene.code(), Some(exit::REQUEUE));

    let mut scene = passed_on(USR2, 2);
    scene.pass(S(2));
    answered(&mut scene, 1, SAVED);
    scene.clean(1, saved(3000));
    scene.pass(S(3));
    assert_eq!(scene.was_stopped_by(2), Some(TERM), "it had the grace");
    let late = Rank {
        sent: vec![USR2, TERM],
        ..stopped(TERM, 6001)
    };
    scene.clean(2, vec![asked(USR2, SAVED, 5000), late]);
    assert_eq!(scene.code(), Some(exit::SIGNAL_BASE + USR2));
    let ending = scene.ending();
    assert_eq!((ending.outcome, ending.again), ("stopped", false));
    assert!(ending.failure.is_none(), "nobody failed");
    let why = "rank 3 did not save and end within 5s after SIGUSR2";
    assert!(ending.verdict.unwrap().contains(why));
}

/// A program that is not ours ends by its own clock: no signal was passed on.
fn by_itself(num_nodes: u32) -> Scene {
    let mut settings = settings(num_nodes, num_nodes);
    settings.job.saves = false;
    settings.policy.max_restarts = 2;
    let mut scene = Scene::running(settings, num_nodes.into());
    scene.pass(S(1));
    answered(&mut scene, 1, SAVED);
    scene
}

#[test]
fn who_saves_by_itself_gives_the_others_the_grace_and_is_not_started_again() {
    let well = |ms| vec![rank(SAVED, ms), rank(End::Code(0), ms)];
    let mut scene = by_itself(2);
    scene.clean(1, well(1000));
    let notice = "rank 0 on n1 has saved and ended: waiting up to 5.0 s for 3 others";
    assert!(scene.notices().contains(notice), "{}", scene.notices());
    scene.pass(MS(4999));
    assert_eq!(scene.was_stopped_by(2), None);
    scene.clean(2, well(5999));
    assert_eq!(scene.code(), Some(exit::REQUEUE));
    let ending = scene.ending();
    assert_eq!((ending.outcome, ending.again), ("saved", false));
    assert!(ending.failure.is_none() && ending.verdict.is_none());

    let mut scene = by_itself(2);
    scene.pass(S(5));
    assert_eq!(scene.was_stopped_by(2), Some(TERM), "it had the grace");
    assert!(
        scene
            .notices()
            .contains("the grace after rank 0 on n1 had saved is over")
    );
    scene.clean(1, well(1000));
    let surprised = Rank {
        end: Some(End::Code(1)),
        ..stopped(TERM, 6001)
    };
    scene.clean(2, vec![rank(SAVED, 5000), surprised]);
    assert_eq!(scene.code(), Some(exit::REQUEUE));
    let ending = scene.ending();
    assert_eq!((ending.outcome, ending.again), ("stopped", false));
    assert!(ending.failure.is_none(), "nobody failed");
    let why = "ranks 0,2 saved and ended with code 75, rank 3 did not: what they had not saved is lost\n  \
               hint: let all ranks save, and end within 5s of each other";
    assert_eq!(ending.verdict.unwrap().find(why), Some(0));
}

#[test]
fn who_only_loses_a_rank_that_saved_did_not_fail_and_who_fails_by_itself_did() {
    for (end, code) in [(End::Code(exit::PEER), exit::REQUEUE), (End::Code(17), 17)] {
        // Whichever the coordinator hears of first.
        for late in [false, true] {
            let mut scene = match late {
                false => by_itself(2),
                true => {
                    let mut settings = settings(2, 2);
                    settings.job.saves = false;
                    Scene::running(settings, 2)
                }
            };
            scene.failing(2, 0, Some(end));
            if late {
                answered(&mut scene, 1, SAVED);
            }
            scene.clean(1, vec![rank(SAVED, 1000), stopped(TERM, 1100)]);
            scene.clean(2, vec![rank(end, 1050), stopped(TERM, 1100)]);
            assert_eq!(scene.code(), Some(code), "{end} {late}");
            let ending = scene.ending();
            assert!(!ending.again);
            let blamed = ending.failure.and_then(|failure| failure.rank);
            assert_eq!(blamed, (code == 17).then_some(2));
        }
    }
}

#[test]
fn ctrl_c_while_the_others_may_save_ends_the_job_by_it() {
    let mut scene = by_itself(1);
    scene.event(Event::Signal(libc::SIGINT));
    assert_eq!(scene.was_stopped_by(1), Some(libc::SIGINT));
    scene.clean(1, vec![rank(SAVED, 1000), stopped(libc::SIGINT, 1100)]);
    assert_eq!(scene.code(), Some(exit::SIGNAL_BASE + libc::SIGINT));
}

#[test]
fn a_first_save_that_took_longer_than_the_grace_gives_the_others_one() {
    let mut scene = passed_on(USR2, 1);
    scene.pass(S(60));
    assert_eq!(
        scene.was_stopped_by(1),
        None,
        "a signal alone stops nothing"
    );
    answered(&mut scene, 1, SAVED);
    scene.pass(S(4));
    assert_eq!(scene.was_stopped_by(1), None);
    scene.pass(S(1));
    assert_eq!(scene.was_stopped_by(1), Some(TERM));
}

#[test]
fn who_dies_of_a_passed_signal_did_not_fail_and_is_not_started_again() {
    for (signal, hint) in [
        (USR2, "save on SIGUSR2 and end with code 75"),
        (libc::SIGUSR1, "handle SIGUSR1"),
    ] {
        let mut scene = passed_on(signal, 2);
        let killed = asked(signal, End::Signal(signal), 1010);
        if signal == USR2 {
            answered(&mut scene, 1, End::Signal(signal));
        } else {
            scene.failing(1, 0, Some(End::Signal(signal)));
            assert_eq!(scene.was_stopped_by(2), Some(TERM));
        }
        // Another does not take the loss well, as far as the clocks tell even before.
        let lost = asked(signal, End::Code(1), 1005);
        scene.failing(2, 0, Some(End::Code(1)));
        scene.clean(1, vec![killed.clone(), killed.clone()]);
        scene.clean(2, vec![lost, stopped(TERM, 1020)]);
        assert_eq!(scene.code(), Some(exit::SIGNAL_BASE + signal));
        let ending = scene.ending();
        assert_eq!((ending.outcome, ending.again), ("stopped", false));
        assert!(ending.failure.is_none());
        let verdict = ending.verdict.unwrap();
        assert!(
            verdict.contains("ranks 0-1: the program has no handler"),
            "{verdict}"
        );
        assert!(verdict.contains(hint), "{verdict}");
    }
}

#[test]
fn who_had_failed_before_a_signal_was_passed_on_is_the_first() {
    let mut scene = passed_on(USR2, 2);
    answered(&mut scene, 1, End::Signal(USR2));
    let killed = asked(USR2, End::Signal(USR2), 1010);
    scene.clean(1, vec![killed.clone(), killed]);
    scene.clean(2, vec![rank(End::Code(17), 900), stopped(TERM, 910)]);
    let failure = scene.ending().failure.expect("a failure");
    assert_eq!((failure.rank, failure.exit_code), (Some(2), 17));
}

/// SLURM may have sent it to the ranks too, which are quicker than the agents that tell of it.
#[test]
fn a_signal_that_is_heard_after_its_victims_explains_them() {
    let mut settings = settings(1, 1);
    settings.job.saves = false;
    settings.policy.max_restarts = 2;
    let mut scene = Scene::running(settings, 1);
    scene.failing(1, 0, Some(End::Signal(USR2)));
    scene.says(1, FromAgent::Signal { signal: USR2 });
    let ranks = vec![rank(End::Signal(USR2), 0), stopped(TERM, 1)];
    scene.clean(1, ranks);
    assert_eq!(scene.code(), Some(exit::SIGNAL_BASE + USR2));
}

/// Each agent sees to its own ranks, and tells of it: with as many nodes as there are, nobody is told more.
#[test]
fn what_a_scheduler_sent_to_all_is_not_passed_on() {
    let mut settings = settings(2, 2);
    settings.job.saves = false;
    let mut scene = Scene::running(settings, 2);
    let (signal, generation) = (USR2, 0);
    for node in [1, 2] {
        scene.says(node, FromAgent::StepSignal { signal });
    }
    assert_eq!((scene.told(1), scene.told(2)), (vec![], vec![]));
    // As if it had been passed on.
    answered(&mut scene, 1, SAVED);
    scene.clean(1, vec![asked(USR2, SAVED, 10), asked(USR2, SAVED, 10)]);
    scene.clean(2, vec![asked(USR2, SAVED, 10), asked(USR2, SAVED, 10)]);
    assert_eq!(scene.code(), Some(exit::REQUEUE));

    // The coordinator is one of the processes, and its own agent hears of it.
    let mut alone = super::settings(1, 1);
    alone.job.saves = false;
    let mut scene = Scene::new(alone);
    let join = FromAgent::Join(Box::new(join_of("n1", WORKERS)));
    scene.event(Event::Said {
        node: 1,
        local: true,
        message: join,
    });
    scene.actions.clear();
    scene.event(Event::StepSignal(signal));
    assert_eq!(scene.told(1), [ToAgent::StepSignal { generation, signal }]);
    // What stops the job does so wherever it comes from.
    scene.event(Event::StepSignal(TERM));
    assert_eq!(scene.was_stopped_by(1), Some(TERM));
}
