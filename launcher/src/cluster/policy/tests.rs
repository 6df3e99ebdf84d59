use super::*;
use proptest::prelude::*;

const MINUTE: Duration = Duration::from_secs(60);

fn options(max_restarts: u32) -> Options {
    Options {
        max_restarts,
        ..Options::default()
    }
}

/// A rank killed from outside, on a host of its own, `n` minutes after the start.
fn killed(n: u32, step: u64, checkpoint: u64) -> Incident {
    Incident {
        at: MINUTE * n,
        ran: MINUTE,
        class: Class::Killed,
        again: Again::MayWork,
        signature: format!("killed: {n}"),
        evidence: format!("signal 9 (SIGKILL) of pid {n}"),
        host: Some(format!("gpu-{n:02}")),
        agent: 0,
        rank: Some(n),
        tells: true,
        step: Some(step),
        checkpoint_step: Some(checkpoint),
    }
}

fn program(n: u32, step: u64, checkpoint: u64) -> Incident {
    Incident {
        class: Class::Program,
        signature: format!("program: {n}"),
        evidence: format!("ValueError, at /tmp/job7/train.py:{n}"),
        ..killed(n, step, checkpoint)
    }
}

/// With nodes that may still join.
fn decide(options: &Options, earlier: &[Incident], incident: &Incident) -> Verdict {
    super::decide(options, None, earlier, incident)
}

fn restart(verdict: Verdict) -> (Duration, Vec<LeftOut>) {
    match verdict {
        Verdict::Restart {
            after, leave_out, ..
        } => (after, leave_out),
        Verdict::Stop { why, .. } => panic!("stopped: {why}"),
    }
}

fn stop(verdict: Verdict) -> (StopCode, String) {
    match verdict {
        Verdict::Stop { code, why } => (code, why),
        Verdict::Restart { why, .. } => panic!("restarted: {why}"),
    }
}

#[test]
fn without_leave_nothing_is_started_again() {
    let (code, why) = stop(decide(&options(0), &[], &killed(1, 66, 60)));
    assert_eq!(code.exit_code(137), 137);
    assert!(why.contains("--max-restarts 0"), "{why}");
}

#[test]
fn progress_means_at_once_and_none_means_a_pause_that_doubles() {
    let options = options(9);
    assert_eq!(
        restart(decide(&options, &[], &killed(1, 66, 60))).0,
        Duration::ZERO
    );
    // 60 was the checkpoint: dying there again is no progress.
    let earlier = [killed(1, 66, 60)];
    let (first, _) = restart(decide(&options, &earlier, &killed(2, 60, 60)));
    let earlier = [killed(1, 66, 60), killed(2, 60, 60)];
    let (second, _) = restart(decide(&options, &earlier, &killed(3, 59, 60)));
    assert_eq!(
        (first, second),
        (backoff(&options, 0), backoff(&options, 1))
    );
    assert!(
        first >= Duration::from_secs(1) && first <= Duration::from_millis(1250),
        "{first:?}"
    );
    assert!(second >= Duration::from_secs(2), "{second:?}");
    // One step beyond is.
    let earlier = [killed(1, 66, 60), killed(2, 60, 60), killed(3, 59, 60)];
    assert_eq!(
        restart(decide(&options, &earlier, &killed(4, 61, 60))).0,
        Duration::ZERO
    );
}

#[test]
fn three_starts_without_a_step_are_the_last() {
    let earlier = [killed(1, 60, 60), killed(2, 0, 60)];
    let resumed = Options {
        resumed_at: Some(60),
        ..options(9)
    };
    let (code, why) = stop(decide(&resumed, &earlier, &killed(3, 1, 60)));
    assert_eq!(
        (code, why.as_str()),
        (StopCode::DoNotRequeue, "3 starts in a row made no progress")
    );
    assert_eq!(code.exit_code(137), exit::DO_NOT_REQUEUE);
}

#[test]
fn what_fails_again_is_not_started_again() {
    let oom = Incident {
        class: Class::GpuOutOfMemory,
        again: Again::Fails,
        ..killed(1, 66, 60)
    };
    let (code, why) = stop(decide(&options(9), &[], &oom));
    assert_eq!(code, StopCode::KeepOwn);
    assert!(why.starts_with("out of GPU memory: "), "{why}");
}

#[test]
fn a_program_error_is_tried_again_only_after_progress_and_never_twice_at_one_step() {
    assert_eq!(
        stop(decide(&options(9), &[], &program(1, 0, 0))).0,
        StopCode::KeepOwn
    );
    assert_eq!(
        restart(decide(&options(9), &[], &program(1, 66, 60))).0,
        Duration::ZERO
    );
    let again = Incident {
        at: MINUTE * 2,
        ..program(1, 66, 60)
    };
    let (code, why) = stop(decide(&options(9), &[program(1, 66, 60)], &again));
    assert_eq!(
        (code, why.as_str()),
        (
            StopCode::DoNotRequeue,
            "the same failure at step 66 twice: program error: ValueError, at /tmp/job7/train.py:1"
        )
    );
    // Also when another failure came between.
    let earlier = [program(1, 66, 60), killed(2, 70, 60)];
    assert_eq!(
        stop(decide(&options(9), &earlier, &again)).0,
        StopCode::DoNotRequeue
    );
    // At another step it may be another clip.
    let further = program(1, 67, 60);
    restart(decide(&options(9), &[program(1, 66, 60)], &further));
}

#[test]
fn the_budget_is_refilled_by_a_checkpoint_and_not_by_steps() {
    let earlier = [killed(1, 5, 0), killed(2, 6, 0)];
    let (code, why) = stop(decide(&options(2), &earlier, &killed(3, 7, 0)));
    assert_eq!(code, StopCode::KeepOwn);
    assert!(why.starts_with("all 2 restarts"), "{why}");
    restart(decide(&options(2), &earlier, &killed(3, 7, 7)));
    let earlier = [
        killed(1, 5, 0),
        killed(2, 6, 0),
        killed(3, 7, 7),
        killed(4, 8, 7),
    ];
    stop(decide(&options(2), &earlier, &killed(5, 9, 7)));
    restart(decide(&options(3), &earlier, &killed(5, 9, 7)));
}

/// A program of somebody else, which ends as it has ended before.
fn silent(n: u32, minutes: u32, class: Class) -> Incident {
    Incident {
        ran: MINUTE * minutes,
        class,
        tells: false,
        step: None,
        checkpoint_step: None,
        signature: "exit code 7".into(),
        ..killed(n, 0, 0)
    }
}

#[test]
fn of_a_program_that_reports_no_steps_the_restarts_are_counted_and_nothing_else() {
    for class in [Class::Program, Class::Killed, Class::Unknown] {
        let starts: Vec<Incident> = (1..=6).map(|n| silent(n, 1, class)).collect();
        let pause = |n: usize| restart(decide(&options(5), &starts[..n], &starts[n])).0;
        for n in 0..5 {
            assert_eq!(pause(n), backoff(&options(5), n as u32), "{class}");
        }
        let (code, why) = stop(decide(&options(5), &starts[..5], &starts[5]));
        assert_eq!(code, StopCode::KeepOwn);
        assert!(
            why.starts_with("all 5 restarts are used (--max-restarts), which count alone"),
            "{why}"
        );
        let Verdict::Restart { why, .. } = decide(&options(5), &[], &starts[0]) else {
            panic!("stopped");
        };
        let expected =
            "; the program reports no steps, so --max-restarts counts alone, after a pause of 1.";
        assert!(why.contains(expected), "{why}");
        assert!(why.ends_with("; restarts left: 4"), "{why}");
    }
    // After a long start there is no pause, but it counts.
    let long: Vec<Incident> = (1..=3).map(|n| silent(n, 600, Class::Program)).collect();
    assert_eq!(
        restart(decide(&options(3), &long[..2], &long[2])).0,
        Duration::ZERO
    );
    stop(decide(&options(2), &long[..2], &long[2]));
}

#[test]
fn what_a_program_without_steps_needs_changed_ends_it_at_once() {
    let config = Incident {
        again: Again::Fails,
        ..silent(1, 1, Class::Config)
    };
    assert_eq!(stop(decide(&options(9), &[], &config)).0, StopCode::KeepOwn);
}

#[test]
fn a_program_that_once_told_of_a_step_is_known_to_make_none() {
    let greeted = Incident {
        tells: true,
        ..silent(1, 1, Class::Program)
    };
    let (_, why) = stop(decide(&options(9), &[], &greeted));
    assert!(
        why.contains("had made no progress since its start"),
        "{why}"
    );
    let earlier = [killed(1, 66, 60)];
    stop(decide(&options(9), &earlier, &silent(2, 1, Class::Program)));
    // The same failure before the first step twice.
    let greeted = |n| Incident {
        tells: true,
        ..silent(n, 1, Class::Killed)
    };
    let (code, why) = stop(decide(&options(9), &[greeted(1)], &greeted(2)));
    assert_eq!(code, StopCode::DoNotRequeue);
    assert!(
        why.starts_with("the same failure before the first step twice"),
        "{why}"
    );
}

#[test]
fn two_agents_of_one_machine_are_not_blamed_for_each_other() {
    let of = |agent, class, n| Incident {
        agent,
        ..at("vm", class, n)
    };
    let left_out =
        |earlier: &[Incident], now: &Incident| restart(decide(&options(9), earlier, now)).1;
    // One failure of each.
    assert_eq!(
        left_out(&[of(0, Class::Killed, 1)], &of(1, Class::Killed, 2)),
        []
    );
    let lost = left_out(&[], &of(1, Class::NodeLost, 1));
    assert!(lost[0].covers("vm", 1) && !lost[0].covers("vm", 0));
    // Broken hardware is the machine's.
    let broken = left_out(&[of(0, Class::Killed, 1)], &of(1, Class::Hardware, 2));
    assert_eq!(broken.len(), 1);
    assert!(broken[0].must && broken[0].covers("vm", 0));
}

fn at(host: &str, class: Class, n: u32) -> Incident {
    Incident {
        host: Some(host.into()),
        class,
        again: match class {
            Class::Hardware | Class::NodeLost => Again::Elsewhere,
            _ => Again::MayWork,
        },
        ..killed(n, 10 * u64::from(n) + 1, 10 * u64::from(n))
    }
}

#[test]
fn a_host_is_left_out_for_its_hardware_at_once_and_else_after_two_failures() {
    let left_out = |earlier: &[Incident], now: &Incident| -> Vec<(String, bool, bool)> {
        let (_, hosts) = restart(decide(&options(9), earlier, now));
        hosts
            .into_iter()
            .map(|h| (h.host, h.must, h.until.is_some()))
            .collect()
    };
    let (a, b) = ("gpu-01", "gpu-02");
    assert_eq!(
        left_out(&[], &at(a, Class::Hardware, 1)),
        [(a.into(), true, false)]
    );
    assert_eq!(
        left_out(&[], &at(a, Class::NodeLost, 1)),
        [(a.into(), false, true)]
    );
    assert_eq!(left_out(&[], &at(a, Class::Network, 1)), []);
    // It was lost because the coordinator did not run, however often.
    let innocent = |n| Incident {
        again: Again::MayWork,
        ..at(a, Class::NodeLost, n)
    };
    let earlier = [innocent(1), innocent(2)];
    assert_eq!(left_out(&earlier, &innocent(3)), []);
    assert_eq!(left_out(&earlier, &at(a, Class::Network, 3)), []);
    let both = [at(a, Class::Network, 1), at(b, Class::Killed, 2)];
    assert_eq!(
        left_out(&both, &at(a, Class::Hang, 3)),
        [(a.into(), false, false)]
    );
    // The program's own errors say nothing about the host.
    assert_eq!(
        left_out(&[at(a, Class::Program, 1)], &at(a, Class::OutOfMemory, 2)),
        []
    );
    // It stays left out, and a lost node may come back.
    let earlier = [at(b, Class::Hardware, 1), at(a, Class::NodeLost, 2)];
    assert_eq!(
        left_out(&earlier, &at("gpu-03", Class::Killed, 9)),
        [(b.into(), true, false)]
    );
    // What is long ago is forgotten.
    let mut earlier = vec![at(a, Class::Killed, 1)];
    earlier.extend((2..12).map(|n| at(&format!("gpu-{n}"), Class::Killed, n)));
    assert_eq!(left_out(&earlier, &at(a, Class::Killed, 12)), []);
}

#[test]
fn without_enough_other_nodes_the_failure_is_the_end() {
    let broken = at("a", Class::Hardware, 1);
    let with = |nodes: &[&str], needed, incident: &Incident| {
        let nodes = nodes.iter().map(|host| (host.to_string(), 0)).collect();
        let stock = Stock { nodes, needed };
        super::decide(&options(9), Some(&stock), &[], incident)
    };
    assert_eq!(
        stop(with(&["a"], 1, &broken)),
        (
            StopCode::KeepOwn,
            "hardware: there is no other node to start it on".into()
        )
    );
    let (_, why) = stop(with(&["a", "b"], 2, &broken));
    let expected = "hardware: a start needs 2 nodes, and has 1 without the one that failed";
    assert_eq!(why, expected);
    restart(with(&["a", "b"], 1, &broken));
    restart(with(&["a"], 1, &at("a", Class::Killed, 1)));
    // It is no longer there; where it is, it is needed.
    let lost = at("a", Class::NodeLost, 1);
    stop(with(&["b"], 2, &lost));
    restart(with(&["a", "b"], 2, &lost));
}

#[test]
fn people_are_told_the_line_and_not_what_it_is_compared_by() {
    let broken = Incident {
        signature: "hardware: Xid 79".into(),
        evidence: "NVRM: Xid (PCI:0000:3b:00): 79, pid=4711".into(),
        ..at("gpu-01", Class::Hardware, 1)
    };
    let line = "hardware: NVRM: Xid (PCI:0000:3b:00): 79, pid=4711";
    assert_eq!(
        broken.to_string(),
        format!("rank 1 on gpu-01 at step 11: {line}")
    );
    let (_, left_out) = restart(decide(&options(9), &[], &broken));
    assert_eq!(left_out[0].why, line);
    let twice = [at("gpu-01", Class::Killed, 1), at("gpu-01", Class::Hang, 2)];
    let why = |last| {
        restart(decide(&options(9), &twice[..1], last)).1[0]
            .why
            .clone()
    };
    let last = at("gpu-01", Class::Killed, 3);
    assert!(
        why(&last).ends_with("the last: killed from outside: signal 9 (SIGKILL) of pid 3"),
        "{}",
        why(&last)
    );
    assert!(why(&twice[1]).ends_with("the last: hang"));
}

fn any_incident() -> impl Strategy<Value = Incident> {
    let class = prop_oneof![
        Just(Class::Program),
        Just(Class::OutOfMemory),
        Just(Class::Network),
        Just(Class::NodeLost),
        Just(Class::Hardware),
        Just(Class::Machine),
        Just(Class::Hang),
        Just(Class::Killed),
        Just(Class::Unknown),
    ];
    let again = prop_oneof![1 => Just(Again::Fails), 4 => Just(Again::Elsewhere), 15 => Just(Again::MayWork)];
    let steps = (
        proptest::option::of(0u64..50),
        proptest::option::of(0u64..50),
    );
    (class, again, 0u32..4, 0u64..2000, steps).prop_map(
        |(class, again, n, ran, (step, checkpoint_step))| Incident {
            class,
            again,
            ran: Duration::from_secs(ran),
            step,
            checkpoint_step,
            ..killed(n, 0, 0)
        },
    )
}

/// Feeds the incidents one after the other until the job is stopped; how many restarts there were.
fn restarts(options: &Options, incidents: &[Incident]) -> usize {
    let stopped = |i: &usize| {
        matches!(
            decide(options, &incidents[..*i], &incidents[*i]),
            Verdict::Stop { .. }
        )
    };
    (0..incidents.len())
        .find(stopped)
        .unwrap_or(incidents.len())
}

proptest! {
    #[test]
    fn a_fault_that_repeats_without_progress_ends(incident in any_incident(), max_restarts in 0u32..1000) {
        let stuck = Incident { step: incident.step.map(|_| 7), tells: true, checkpoint_step: Some(7), ran: MINUTE, ..incident };
        let options = Options { resumed_at: Some(7), ..options(max_restarts) };
        prop_assert!(restarts(&options, &vec![stuck; 10]) < MAX_FRUITLESS);
    }

    #[test]
    fn without_a_new_checkpoint_the_budget_is_kept(
        incidents in proptest::collection::vec(any_incident(), 1..30),
        max_restarts in 0u32..8,
    ) {
        let options = Options { resumed_at: Some(3), ..options(max_restarts) };
        let stale: Vec<_> = incidents.into_iter().map(|i| Incident { checkpoint_step: Some(3), ..i }).collect();
        prop_assert!(restarts(&options, &stale) <= max_restarts as usize);
    }

    #[test]
    fn what_is_hopeless_is_never_started_again(
        earlier in proptest::collection::vec(any_incident(), 0..9),
        incident in any_incident(),
        max_restarts: u32,
    ) {
        let hopeless = Incident { again: Again::Fails, ..incident };
        let verdict = decide(&options(max_restarts), &earlier, &hopeless);
        let kept = matches!(verdict, Verdict::Stop { code: StopCode::KeepOwn, .. });
        prop_assert!(kept);
    }

    #[test]
    fn the_pause_never_shrinks_and_never_passes_the_longest(seed: u64) {
        let options = Options { seed, ..options(1) };
        let pauses: Vec<Duration> = (0..70).map(|attempt| backoff(&options, attempt)).collect();
        prop_assert!(pauses.is_sorted());
        prop_assert!(pauses[0] >= options.first_backoff && pauses[0] <= options.first_backoff * 5 / 4);
        prop_assert_eq!(pauses[69], options.longest_backoff);
    }

    #[test]
    fn broken_hardware_is_left_out_whatever_else_happened(
        earlier in proptest::collection::vec(any_incident(), 0..9),
        incident in any_incident(),
    ) {
        let broken = Incident { class: Class::Hardware, again: Again::Elsewhere, host: Some("bad".into()), ..incident };
        if let Verdict::Restart { leave_out, .. } = decide(&options(100), &earlier, &broken) {
            prop_assert!(leave_out.iter().any(|h| h.host == "bad" && h.must));
        }
    }
}
