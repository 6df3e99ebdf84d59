//! Which nodes take part, and what keeps them from starting.

use super::*;

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
fn hosts_that_do_not_come_are_named_before_long_and_in_the_end() {
    let mut settings = settings(3, 3);
    settings.hosts = ["n1", "n2", "n3"].map(String::from).into();
    let mut scene = Scene::new(settings);
    scene.join(1);
    let says = |scene: &mut Scene, host: &str, line: &str| {
        let (host, line) = (host.into(), line.into());
        scene.event(Event::Starter { host, line });
    };
    says(&mut scene, "n1", "Welcome");
    says(&mut scene, "n2", "Welcome");
    says(&mut scene, "n2", "quota: \x1b[1mno answer");
    scene.pass(S(5) - MS(1));
    assert!(!scene.notices().contains("waiting"), "{}", scene.notices());
    scene.pass(MS(1));
    let names = "missing: n2, n3\n  heard from n2 so far: quota: [1mno answer";
    let waiting = format!("waiting up to 1m for 2 nodes to join; {names}");
    assert_eq!(scene.notices().matches(&waiting).count(), 1);
    scene.join(2);
    scene.pass(S(54));
    assert_eq!(scene.notices().matches("waiting up to").count(), 1);
    scene.actions.clear();
    scene.pass(S(1));
    let text = "2 nodes (n1, n2) joined within 1m, 3 are needed; missing: n3\n  hint: ";
    assert!(scene.notices().contains(text), "{}", scene.notices());
    assert!(scene.reason().expect("a reason").contains(text));
    assert_eq!(scene.code(), Some(exit::PREFLIGHT));
}

#[test]
fn who_has_started_another_node_by_hand_hears_what_became_of_it() {
    let mut settings = settings(2, 2);
    settings.is_read = true;
    let mut scene = Scene::new(settings);
    let (local, join) = (true, Box::new(join_of("n1", WORKERS)));
    scene.event(Event::Said {
        node: 1,
        local,
        message: FromAgent::Join(join),
    });
    scene.alive.insert(1);
    scene.join(2);
    scene.join(3);
    let told = |scene: &mut Scene, id| -> Vec<String> {
        let told = scene.told(id).into_iter();
        told.filter_map(|message| match message {
            ToAgent::Tell { text } => Some(text),
            _ => None,
        })
        .collect()
    };
    assert!(told(&mut scene, 1).is_empty(), "the first has the notices");
    assert_eq!(
        told(&mut scene, 2),
        [
            "joined job run of n1; its output is there, in /run",
            "this is node 1 of 2, with ranks 2-3"
        ]
    );
    let spare = "joined job run of n1 as a spare, until it is needed; its output is there, in /run";
    assert_eq!(told(&mut scene, 3), [spare]);
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
fn ranks_to_show_that_this_start_does_not_have_are_named_once() {
    let mut settings = restarting(2, 2);
    settings.job.show = Some(vec![3, 4, 5]);
    let mut scene = Scene::new(settings);
    scene.join(1);
    scene.join(2);
    let text = "warning: --show-ranks names ranks 4-5, this start has 4";
    assert!(scene.notices().contains(text));
    scene.step(5, Some(5));
    scene.failing(1, 0, Some(End::Code(17)));
    scene.clean(1, vec![rank(End::Code(17), 0), stopped(TERM, 1)]);
    scene.all_stopped(2);
    scene.pass(S(2));
    assert_eq!(scene.state.generation, 1);
    assert_eq!(scene.notices().matches(text).count(), 1);
}

#[test]
fn what_a_node_was_started_with_and_does_not_count_is_told_on_both() {
    let options = |all: &[(&str, &str)]| -> Vec<(String, String)> {
        let pair = |&(flag, value): &(&str, &str)| (flag.into(), value.into());
        all.iter().map(pair).collect()
    };
    let mut settings = settings(3, 3);
    settings.is_read = true;
    settings.job.options = options(&[("--nodes", "3"), ("--max-restarts", "0")]);
    let mut scene = Scene::new(settings);
    let own: [&[_]; 3] = [
        &[],
        &[("--nodes", "3"), ("--max-restarts", "0")],
        &[
            ("--nodes", "4"),
            ("--max-restarts", "0"),
            ("--grace", "5s"),
            ("--env", "TOKEN=secret"),
        ],
    ];
    for (id, own) in (1..).zip(own) {
        scene.alive.insert(id);
        let mut join = join_of(&format!("n{id}"), WORKERS);
        join.options = options(own);
        scene.says(id, FromAgent::Join(Box::new(join)));
    }
    let text = "was started with --nodes 4, --grace 5s, another --env: what the first node has counts, --nodes 3, no --grace";
    let notices = scene.notices();
    assert!(
        notices.contains(&format!("warning: n3 {text}\n")),
        "{notices}"
    );
    assert_eq!(notices.matches("was started with").count(), 1);
    assert!(!notices.contains("secret"), "{notices}");
    let text = format!("warning: this node {text}");
    assert!(scene.told(3).contains(&ToAgent::Tell { text }));
    // It takes part all the same.
    assert_eq!(scene.places().len(), 3);
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
    let text = "n2 cannot run the job: 4 GPUs, 8 are needed";
    assert!(scene.notices().contains(text));
    assert_eq!(scene.reason().as_deref(), Some(text));
    assert_eq!(scene.code(), Some(exit::PREFLIGHT));
    // Where fewer nodes do, it is let go.
    settings.min_nodes = 1;
    let mut scene = Scene::new(settings);
    scene.join(1);
    scene.says(2, unfit);
    scene.pass(S(5));
    assert_eq!(scene.state.phase, Phase::Run);
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
    let reason = "the workers on n2 cannot be started: no such directory";
    assert_eq!(scene.reason().as_deref(), Some(reason));
    assert_eq!(
        scene.endings()[0].reason,
        Some(Reason::Text(reason.to_string()))
    );
    assert_eq!(scene.code(), Some(exit::PREFLIGHT));

    // Before any was started there is nothing to stop.
    let mut scene = Scene::new(settings(2, 2));
    for id in [1, 2] {
        let join = join_of(&format!("n{id}"), WORKERS);
        scene.says(id, FromAgent::Join(Box::new(join)));
    }
    scene.says(1, cannot(exit::PREFLIGHT));
    assert_eq!(scene.exit_of(2), Some(exit::PREFLIGHT));
    assert!(
        scene
            .reason()
            .expect("a reason")
            .starts_with("the workers on n1")
    );
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
