use super::*;
use crate::blame::Culprit;

const GRACE: Duration = Duration::from_secs(30);

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn ended(rank: usize, end: End) -> Event {
    Event::Ended { rank, end }
}

/// Its death closed its agent socket.
fn left(rank: usize) -> Event {
    let is_exiting = true;
    Event::Left { rank, is_exiting }
}

fn record(cause: &str) -> FailureRecord {
    FailureRecord {
        rank: 0,
        step: None,
        code: 1,
        cause: cause.into(),
        message: "m".into(),
        backtrace: None,
    }
}

fn signals(actions: &[Action]) -> Vec<(usize, i32)> {
    let pick = |action: &Action| match action {
        Action::Signal { rank, signal } => Some((*rank, *signal)),
        Action::Kill { rank } => Some((*rank, libc::SIGKILL)),
        _ => None,
    };
    actions.iter().filter_map(pick).collect()
}

fn blamed(state: &State) -> Option<usize> {
    match crate::blame::tests::fault(&state.ranks, |_| String::new())?.culprit {
        Culprit::Rank(rank) => Some(rank),
        other => panic!("{other:?}"),
    }
}

fn stop(signal: i32) -> Event {
    let grace = GRACE;
    Event::Stop { signal, grace }
}

#[test]
fn success_is_when_all_ended_with_zero() {
    let mut state = State::new(2, GRACE, false, false);
    assert!(decide(&mut state, &[ended(1, End::Code(0))], at(1)).is_empty());
    assert_eq!(state.phase, Phase::Running);
    decide(&mut state, &[ended(0, End::Code(0))], at(2));
    assert_eq!((state.phase, blamed(&state)), (Phase::Finished, None));
}

#[test]
fn who_announces_a_failure_has_not_succeeded_whatever_its_code() {
    for code in [0, exit::REQUEUE] {
        let mut state = State::new(3, GRACE, true, false);
        let record = record("error");
        decide(&mut state, &[Event::Failing { rank: 1, record }], at(1));
        let end = End::Code(code);
        let actions = decide(&mut state, &[ended(1, end)], at(2));
        let (rank, end) = (1, Some(end));
        assert!(actions.contains(&Action::Failing { rank, end }), "{code}");
        assert_eq!(signals(&actions), [(0, libc::SIGTERM), (2, libc::SIGTERM)]);
        decide(
            &mut state,
            &[ended(0, End::Signal(15)), ended(2, End::Code(0))],
            at(3),
        );
        assert_eq!((state.phase, blamed(&state)), (Phase::Finished, Some(1)));
    }
}

/// While the others save, too.
#[test]
fn an_announced_failure_ends_the_save() {
    let mut state = State::new(2, GRACE, true, false);
    for rank in 0..2 {
        decide(&mut state, &[Event::Hello { rank }], at(0));
    }
    decide(&mut state, &[stop(libc::SIGUSR2)], at(1));
    let record = record("error");
    let events = [Event::Failing { rank: 0, record }, ended(0, End::Code(0))];
    let actions = decide(&mut state, &events, at(2));
    assert_eq!(signals(&actions), [(1, libc::SIGTERM)]);
    decide(&mut state, &[ended(1, End::Signal(15))], at(3));
    assert_eq!(blamed(&state), Some(0));
}

#[test]
fn a_failure_stops_the_living_and_gives_its_code() {
    let mut state = State::new(4, GRACE, false, false);
    decide(&mut state, &[ended(3, End::Code(0))], at(1));
    let actions = decide(&mut state, &[ended(1, End::Code(17))], at(5));
    assert_eq!(signals(&actions), [(0, libc::SIGTERM), (2, libc::SIGTERM)]);
    let (rank, end) = (1, Some(End::Code(17)));
    assert!(actions.contains(&Action::Failing { rank, end }));
    assert_eq!(state.deadline(), Some(at(5) + GRACE));
    decide(
        &mut state,
        &[ended(0, End::Signal(libc::SIGTERM)), ended(2, End::Code(1))],
        at(9),
    );
    assert_eq!((state.phase, blamed(&state)), (Phase::Finished, Some(1)));
}

#[test]
fn after_the_grace_comes_sigkill_and_then_the_name_of_the_stuck() {
    let mut state = State::new(2, GRACE, false, false);
    decide(&mut state, &[ended(0, End::Code(3))], at(0));
    assert!(decide(&mut state, &[Event::Deadline], at(29_999)).is_empty());
    assert_eq!(
        signals(&decide(&mut state, &[Event::Deadline], at(30_000))),
        [(1, libc::SIGKILL)]
    );
    decide(&mut state, &[Event::Deadline], at(35_000));
    assert_eq!(state.phase, Phase::Finished);
    assert_eq!((state.ranks[1].end, blamed(&state)), (None, Some(0)));
}

#[test]
fn a_stop_is_a_signal_and_what_follows_is_no_failure() {
    let mut state = State::new(2, GRACE, false, false);
    let actions = decide(&mut state, &[stop(libc::SIGINT)], at(1));
    assert_eq!(signals(&actions), [(0, libc::SIGINT), (1, libc::SIGINT)]);
    assert!(decide(&mut state, &[stop(libc::SIGTERM)], at(2)).is_empty());
    assert!(decide(&mut state, &[ended(0, End::Code(1))], at(3)).is_empty());
    let actions = decide(&mut state, &[Event::KillAll], at(4));
    assert_eq!(signals(&actions), [(1, libc::SIGKILL)]);
    decide(&mut state, &[ended(1, End::Signal(9))], at(5));
    assert_eq!(state.phase, Phase::Finished);
}

#[test]
fn a_signal_is_passed_on_and_stops_nothing() {
    let mut state = State::new(1, GRACE, true, false);
    let signal = libc::SIGUSR1;
    assert_eq!(
        signals(&decide(&mut state, &[Event::Pass { signal }], at(1))),
        [(0, signal)]
    );
    assert_eq!(state.phase, Phase::Running);
}

#[test]
fn workers_that_save_are_waited_for() {
    let saved = |rank| ended(rank, End::Code(exit::REQUEUE));
    let mut state = State::new(2, GRACE, true, false);
    decide(
        &mut state,
        &[Event::Hello { rank: 0 }, Event::Hello { rank: 1 }],
        at(0),
    );
    decide(&mut state, &[stop(libc::SIGUSR2)], at(1));
    assert!(decide(&mut state, &[saved(0)], at(9)).is_empty());
    assert!(decide(&mut state, &[saved(1)], at(10)).is_empty());
    assert_eq!((state.phase, blamed(&state)), (Phase::Finished, None));
}

#[test]
fn the_first_sign_of_an_end_is_kept_with_its_time() {
    let mut state = State::new(2, GRACE, false, false);
    decide(&mut state, &[left(1)], at(3));
    decide(&mut state, &[ended(0, End::Code(1))], at(7));
    decide(&mut state, &[ended(1, End::Code(17))], at(9));
    let times = |rank: &Rank| (rank.first_at, rank.ended_at);
    assert_eq!(times(&state.ranks[0]), (at(7), at(7)));
    assert_eq!(times(&state.ranks[1]), (at(3), at(9)));
    assert_eq!(blamed(&state), Some(1));

    let mut state = State::new(1, GRACE, false, false);
    let (rank, record) = (0, record("error"));
    decide(&mut state, &[Event::Failing { rank, record }], at(2));
    decide(&mut state, &[ended(0, End::Code(1))], at(8));
    assert_eq!(times(&state.ranks[0]), (at(2), at(8)));
}

#[test]
fn a_rank_that_fails_while_the_others_save_is_a_failure() {
    let mut state = State::new(3, GRACE, true, false);
    let hello = |rank| Event::Hello { rank };
    decide(&mut state, &[hello(0), hello(1), hello(2)], at(0));
    decide(&mut state, &[stop(libc::SIGUSR2)], at(1));
    decide(&mut state, &[ended(0, End::Code(exit::REQUEUE))], at(2));
    let actions = decide(&mut state, &[ended(1, End::Signal(11))], at(3));
    assert_eq!(signals(&actions), [(2, libc::SIGTERM)]);
    assert!(matches!(
        actions.last(),
        Some(Action::Failing { rank: 1, .. })
    ));
    assert!(
        !state.ranks[1].after_stop,
        "it was not asked to end like this"
    );
}

#[test]
fn workers_that_are_not_ready_to_save_are_ended() {
    let mut state = State::new(2, GRACE, true, false);
    decide(&mut state, &[Event::Hello { rank: 0 }], at(0));
    let actions = decide(&mut state, &[stop(libc::SIGUSR2)], at(1));
    assert_eq!(signals(&actions), [(0, libc::SIGTERM), (1, libc::SIGTERM)]);
}

#[test]
fn shielded_workers_are_stopped_by_another_signal() {
    let mut state = State::new(2, GRACE, true, true);
    let actions = decide(&mut state, &[ended(0, End::Code(3))], at(1));
    assert_eq!(signals(&actions), [(1, libc::SIGINT)]);
    decide(&mut state, &[ended(1, End::Signal(libc::SIGINT))], at(2));
    assert_eq!(blamed(&state), Some(0));
}

/// By its own clock, or since one rank alone was signalled and told the others itself. It is the coordinator that says
/// how long the others may take.
#[test]
fn who_saves_without_being_asked_stops_nobody_and_is_not_blamed() {
    let end = End::Code(exit::REQUEUE);
    for saves in [false, true] {
        let of_two = || State::new(2, GRACE, saves, false);
        let mut state = of_two();
        let actions = decide(&mut state, &[ended(0, end)], at(1));
        assert_eq!(actions, [Action::Answered { rank: 0, end }]);
        assert_eq!((state.phase, state.deadline()), (Phase::Running, None));
        // A real failure is one as always.
        let mut failing = state.clone();
        decide(&mut failing, &[ended(1, End::Code(17))], at(2));
        assert_eq!(blamed(&failing), Some(1));
        decide(&mut state, &[ended(1, End::Code(0))], at(2));
        assert_eq!((state.phase, blamed(&state)), (Phase::Finished, None));
        // One that was being stopped answered the stop.
        let mut state = of_two();
        decide(&mut state, &[ended(1, End::Code(17))], at(1));
        decide(&mut state, &[ended(0, end)], at(2));
        assert!(!state.ranks[0].saved_by_itself());
        assert_eq!(blamed(&state), Some(1));
    }
}

#[test]
fn after_a_sigusr2_75_is_an_answer_and_so_is_a_death_by_it() {
    let signal = libc::SIGUSR2;
    let pass = Event::Pass { signal };
    // The scheduler has sent it: not again.
    let got = Event::Got { signal };
    let ends = [
        End::Code(exit::REQUEUE),
        End::Signal(signal),
        End::Code(exit::SIGNAL_BASE + signal),
    ];
    for (end, event, sent) in ends.iter().flat_map(|&e| [(e, &pass, 3), (e, &got, 0)]) {
        let mut state = State::new(3, GRACE, false, false);
        let actions = decide(&mut state, std::slice::from_ref(event), at(1));
        assert_eq!(signals(&actions).len(), sent);
        let actions = decide(&mut state, &[ended(0, end)], at(2));
        assert_eq!(actions, [Action::Answered { rank: 0, end }]);
        assert_eq!(state.phase, Phase::Running);
        // Any other end is a failure as always.
        let actions = decide(&mut state, &[ended(1, End::Code(1))], at(3));
        assert_eq!(signals(&actions), [(2, libc::SIGTERM)]);
    }
    let mut state = State::new(2, GRACE, false, false);
    let (rank, record) = (0, record("error"));
    decide(&mut state, &[pass, Event::Failing { rank, record }], at(1));
    let actions = decide(&mut state, &[ended(0, End::Code(exit::REQUEUE))], at(2));
    assert_eq!(signals(&actions), [(1, libc::SIGTERM)]);
}

#[test]
fn a_rank_that_announced_its_failure_but_hangs_is_stopped() {
    let mut state = State::new(2, GRACE, false, false);
    decide(
        &mut state,
        &[Event::Failing {
            rank: 1,
            record: record("panic"),
        }],
        at(10),
    );
    assert_eq!(state.phase, Phase::Running);
    assert_eq!(state.deadline(), Some(at(10) + GRACE));
    let actions = decide(&mut state, &[Event::Deadline], at(10) + GRACE);
    assert_eq!(signals(&actions).len(), 2);
    let ends = [
        ended(0, End::Signal(libc::SIGTERM)),
        ended(1, End::Signal(libc::SIGTERM)),
    ];
    decide(&mut state, &ends, at(40_500));
    assert!(actions.contains(&Action::Failing { rank: 1, end: None }));
    assert_eq!(blamed(&state), Some(1));
}

#[test]
fn ends_read_together_all_count_as_before_the_stop() {
    let mut state = State::new(3, GRACE, false, false);
    decide(
        &mut state,
        &[ended(2, End::Code(1)), ended(0, End::Code(1))],
        at(1),
    );
    assert!(!state.ranks[0].after_stop && !state.ranks[2].after_stop);
    assert!(state.ranks[2].order < state.ranks[0].order);
    decide(&mut state, &[ended(1, End::Code(1))], at(2));
    assert!(state.ranks[1].after_stop);
}

#[test]
fn a_rank_was_dying_since_it_closed_its_agent_socket() {
    let mut state = State::new(3, GRACE, false, false);
    decide(&mut state, &[left(2)], at(1));
    decide(&mut state, &[ended(0, End::Code(1))], at(2));
    decide(
        &mut state,
        &[ended(2, End::Code(17)), ended(1, End::Signal(15))],
        at(900),
    );
    assert_eq!(blamed(&state), Some(2));
}

#[test]
fn of_ends_that_are_seen_together_the_one_is_told_that_the_report_calls_the_first() {
    let failed = |rank| ended(rank, End::Code(1 + rank as i32));
    let lost_peer = ended(0, End::Code(exit::PEER));
    for (seen, first) in [
        (vec![left(2), left(1), failed(1), failed(2)], 2),
        (vec![failed(1), failed(2)], 1),
        (vec![lost_peer, failed(1)], 1),
        (vec![ended(0, End::Code(0)), failed(1)], 1),
    ] {
        let mut state = State::new(3, GRACE, false, false);
        let actions = decide(&mut state, &seen, at(1));
        let told = actions.iter().filter_map(|action| match action {
            Action::Failing { rank, .. } => Some(*rank),
            _ => None,
        });
        assert_eq!(told.collect::<Vec<_>>(), [first], "{seen:?}");
        assert_eq!(blamed(&state), Some(first), "{seen:?}");
    }
}

#[test]
fn a_program_that_closed_the_socket_and_lived_on_was_not_dying() {
    for rank in 0..2 {
        let mut state = State::new(2, GRACE, false, false);
        let is_exiting = false;
        decide(&mut state, &[Event::Left { rank, is_exiting }], at(1));
        let actions = decide(&mut state, &[ended(1, End::Code(4))], at(1000));
        let (first, end) = (1, Some(End::Code(4)));
        assert!(actions.contains(&Action::Failing { rank: first, end }));
        decide(&mut state, &[ended(0, End::Code(1))], at(1003));
        assert_eq!(blamed(&state), Some(1));
        let times = |rank: &Rank| (rank.first_at, rank.after_stop);
        assert_eq!(times(&state.ranks[0]), (at(1003), true));
        assert_eq!(times(&state.ranks[1]), (at(1000), false));
    }
}

/// The memory of a large process, and a GPU, take their time.
#[test]
fn a_death_may_take_long() {
    let mut state = State::new(2, GRACE, false, false);
    decide(&mut state, &[left(1)], at(1));
    decide(&mut state, &[ended(0, End::Code(1))], at(20_000));
    decide(&mut state, &[ended(1, End::Code(17))], at(40_000));
    assert_eq!(blamed(&state), Some(1));
    assert_eq!(state.ranks[1].first_at, at(1));
}
