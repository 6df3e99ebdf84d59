//! From the start to the end of a job.

use super::*;

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
fn who_does_not_talk_runs_from_its_start_and_who_does_from_its_first_step() {
    let mut settings = settings(1, 1);
    settings.job.saves = false;
    let mut scene = Scene::running(settings, 1);
    let states = |scene: &Scene| {
        let ranks = scene.state.snapshot(scene.now).ranks;
        ranks.into_iter().map(|r| r.state).collect::<Vec<_>>()
    };
    assert_eq!(states(&scene), ["starting", "starting"]);
    let started = FromAgent::Started {
        generation: scene.state.generation,
        pids: vec![10, 11],
        at: scene.now,
        environment: Vec::new(),
        containment: Default::default(),
        cores: Vec::new(),
    };
    scene.says(1, started);
    assert_eq!(states(&scene), ["running", "running"]);
    let local_rank = 1;
    let hello = Progress {
        local_rank,
        ..Progress::default()
    };
    scene.beat(1, vec![hello.clone()]);
    assert_eq!(states(&scene), ["running", "starting"]);
    scene.beat(
        1,
        vec![Progress {
            step: Some(1),
            ..hello
        }],
    );
    assert_eq!(states(&scene), ["running", "running"]);
    scene.state.settings.job.saves = true;
    assert_eq!(states(&scene), ["starting", "running"], "our trainer talks");
}

/// Of a program error only progress makes another start worth it.
#[test]
fn what_a_resumed_job_had_before_is_no_progress() {
    for (resumed, step, restarts) in [(None, 60, 1), (Some(60), 60, 0), (Some(60), 61, 1)] {
        let mut scene = Scene::running(restarting(1, 1), 1);
        if let Some(step) = resumed {
            let path = "checkpoints/step-60.safetensors".into();
            let word = About::Resumed { path, step };
            let generation = scene.state.generation;
            scene.says(1, FromAgent::About { generation, word });
        }
        scene.step(step, None);
        scene.all_end(1, End::Code(1));
        assert_eq!(scene.state.restarts.len(), restarts, "{resumed:?} {step}");
    }
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
        oom_kills: OomKills::default(),
        xids: Vec::new(),
        warnings: Vec::new(),
        missing: None,
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
