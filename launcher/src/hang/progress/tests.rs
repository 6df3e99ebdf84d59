use super::*;

const S: fn(u64) -> Duration = Duration::from_secs;

/// Ten minutes, or thirty for the first step and the long sections.
fn tracker(world_size: u32) -> Tracker {
    Tracker::new(world_size, Limits::default(), S(0))
}

/// All ranks make `steps` steps, one a second, in section train; the time after.
fn train(tracker: &mut Tracker, steps: u64) -> Duration {
    for step in 1..=steps {
        for rank in 0..tracker.world_size() {
            tracker.feed(rank, Some(step), &[], Some("train"), S(step));
        }
        assert_eq!(tracker.check(S(step)), []);
    }
    S(steps)
}

fn hang(events: Vec<Event>) -> Hang {
    match events.as_slice() {
        [Event::Hang(hang)] => hang.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_rank_at_the_lowest_step_is_late() {
    let mut tracker = tracker(4);
    let now = train(&mut tracker, 41);
    for rank in [0, 1, 3] {
        tracker.feed(rank, Some(42), &[], None, now + S(1));
    }
    assert_eq!(tracker.check(now + S(600)), []);
    let hang = hang(tracker.check(now + S(601)));
    assert_eq!(hang.late, [2]);
    assert_eq!(hang.idle, S(600));
    assert_eq!(
        hang.to_string(),
        "no rank made a step in 10m (limit 10m): rank 2 is at step 41, 3 ranks at step 42 or further wait"
    );
    assert_eq!(tracker.check(now + S(700)), [], "told once");
}

#[test]
fn a_job_that_moves_again_says_so_and_can_hang_again() {
    let mut tracker = tracker(2);
    let now = train(&mut tracker, 3);
    hang(tracker.check(now + S(600)));
    assert!(tracker.hangs());
    tracker.feed(0, Some(4), &[], None, now + S(650));
    assert_eq!(
        tracker.check(now + S(651)),
        [Event::Resumed { idle: S(650) }]
    );
    assert!(!tracker.hangs());
    assert_eq!(hang(tracker.check(now + S(1250))).late, [1]);
    tracker.ended(1, now + S(1251));
    assert_eq!(tracker.check(now + S(1252)), [], "an end is no step");
}

#[test]
fn the_first_step_and_long_sections_may_take_longer() {
    let mut tracker = tracker(2);
    for rank in 0..2 {
        tracker.feed(rank, None, &[], Some("load"), S(5));
    }
    assert_eq!(tracker.check(S(1804)), []);
    tracker.feed(0, None, &[], Some("train"), S(1804));
    assert_eq!(tracker.check(S(1804 + 1799)), [], "a section was entered");
    let stuck = hang(tracker.check(S(1804 + 1800)));
    assert_eq!(stuck.late, [1]);
    assert_eq!(
        stuck.reason,
        "rank 1 is at no step yet in section load, rank 0 is already in section train"
    );

    for section in ["validate", "checkpoint"] {
        let mut tracker = super::tests::tracker(2);
        let now = train(&mut tracker, 10);
        tracker.feed(0, None, &[], Some(section), now);
        assert_eq!(tracker.check(now + S(1799)), [], "{section}");
        hang(tracker.check(now + S(1800)));
    }
}

#[test]
fn at_one_step_the_section_tells_who_is_late() {
    let late = |sections: &[(u32, &str)]| {
        let mut tracker = tracker(4);
        let now = train(&mut tracker, 10);
        for (rank, section) in sections {
            tracker.feed(*rank, None, &[], Some(section), now);
        }
        let hang = tracker.hang(now + S(9999));
        (hang.late, hang.reason)
    };
    // Not yet in the section in which the others are.
    assert_eq!(
        late(&[(0, "validate"), (1, "validate"), (3, "validate")]).0,
        [2]
    );
    // Still in the section that the others have left.
    let mut entered: Vec<(u32, &str)> = (0..4).map(|r| (r, "validate")).collect();
    entered.extend([(0, "train"), (2, "train"), (3, "train")]);
    assert_eq!(late(&entered).0, [1]);
    // The one that writes a checkpoint is waited for,
    assert_eq!(late(&[(0, "checkpoint")]).0, [0]);
    // and one that has written it is no further than the others.
    let back = late(&[(0, "checkpoint"), (0, "train")]);
    assert_eq!(back.0, [0u32; 0]);
    assert_eq!(
        back.1,
        "all ranks are at step 10 in section train: a collective that does not end, or the data"
    );
}

#[test]
fn a_checkpoint_between_two_sections_is_no_lead() {
    let mut tracker = tracker(2);
    let now = train(&mut tracker, 10);
    for (rank, section) in [
        (0, "validate"),
        (1, "validate"),
        (0, "checkpoint"),
        (0, "train"),
        (1, "train"),
    ] {
        tracker.feed(rank, None, &[], Some(section), now);
    }
    assert_eq!(tracker.hang(now).late, [0u32; 0]);
}

#[test]
fn programs_that_report_nothing_are_not_watched_and_that_is_said_once() {
    let mut tracker = tracker(2);
    assert_eq!(tracker.check(S(599)), []);
    assert_eq!(tracker.check(S(600)), [Event::Unwatched { after: S(600) }]);
    assert_eq!(tracker.check(S(100_000)), []);
    assert!(!tracker.hangs());
    // It may report its first step later.
    tracker.feed(0, Some(1), &[], None, S(100_001));
    assert_eq!(tracker.check(S(100_600)), []);
    hang(tracker.check(S(100_601)));
}

#[test]
fn off_means_off() {
    let limits = Limits {
        hang_timeout: None,
        ..Limits::default()
    };
    let mut tracker = Tracker::new(2, limits, S(0));
    assert_eq!(tracker.check(S(1_000_000)), []);
    tracker.feed(0, Some(1), &[], None, S(0));
    assert_eq!(tracker.check(S(1_000_000)), []);
}

#[test]
fn ranks_that_never_report_steps_are_not_late() {
    let mut tracker = tracker(3);
    tracker.feed(1, None, &[], None, S(0));
    for step in 1..=50 {
        tracker.feed(0, Some(step), &[], None, S(step));
    }
    let hang = hang(tracker.check(S(650)));
    assert_eq!((hang.late, hang.unwatched), (vec![], vec![1, 2]));
    assert!(hang.reason.starts_with("the only rank that reports steps"));

    // But one that talks and has not made the first step, while the others have just made it, is.
    let mut tracker = super::tests::tracker(3);
    for rank in 0..3 {
        tracker.feed(rank, None, &[], Some("train"), S(1));
    }
    tracker.feed(0, Some(4001), &[], None, S(2));
    tracker.feed(2, Some(4001), &[], None, S(2));
    assert_eq!(tracker.hang(S(3)).late, [1]);
}

#[test]
fn a_rank_that_ended_is_waited_for_by_nobody() {
    let mut tracker = tracker(3);
    let now = train(&mut tracker, 5);
    tracker.ended(1, now);
    for rank in [0, 2] {
        tracker.feed(rank, Some(6), &[], None, now);
    }
    let stuck = hang(tracker.check(now + S(600)));
    assert_eq!(stuck.late, [0u32; 0], "{stuck}");
    let mut tracker = super::tests::tracker(1);
    let now = train(&mut tracker, 5);
    tracker.ended(0, now);
    assert_eq!(tracker.check(now + S(100_000)), [], "the job is over");
}

#[test]
fn one_rank_that_falls_behind_is_named_without_a_hang() {
    let mut tracker = tracker(3);
    let start = train(&mut tracker, 5);
    let mut told = Vec::new();
    for i in 1..=700 {
        for rank in [0, 2] {
            tracker.feed(rank, Some(5 + i), &[], None, start + S(i));
        }
        told.extend(tracker.check(start + S(i)));
    }
    let behind = Event::Behind {
        rank: 1,
        step: 5,
        others_at: 605,
        idle: S(600),
    };
    assert_eq!(told, [behind]);
}

#[test]
fn a_step_that_is_heard_twice_or_late_is_no_progress() {
    let mut tracker = tracker(1);
    let now = train(&mut tracker, 5);
    tracker.feed(0, Some(5), &[], Some("train"), now + S(500));
    tracker.feed(0, Some(3), &[], None, now + S(500));
    hang(tracker.check(now + S(600)));
    tracker.feed(9, Some(3), &[], None, now);
}

#[test]
fn a_straggler_is_told_through_the_tracker() {
    let mut tracker = tracker(4);
    let mut told = Vec::new();
    for step in 1..=50 {
        for rank in 0..4 {
            let ms = if rank == 3 { 251.0 } else { 200.0 };
            tracker.feed(rank, Some(step), &[ms], None, S(step));
        }
        told.extend(tracker.check(S(step)));
    }
    let [slow] = told.as_slice() else {
        panic!("{told:?}")
    };
    assert_eq!(
        slow.describe(|rank| format!("rank {rank} (gpu-07)")),
        "rank 3 (gpu-07) is slow, 1.25 times: 251 ms of own work a step, the median of the others is 200 ms, over 32 steps"
    );
    assert!(tracker.is_slow(3) && !tracker.is_slow(0));
}

#[test]
fn times_are_short() {
    for (d, text) in [
        (Duration::from_millis(40), "40ms"),
        (Duration::from_millis(1999), "1s"),
        (S(59), "59s"),
        (S(600), "10m"),
        (S(603), "10m 3s"),
        (S(7200), "2h"),
    ] {
        assert_eq!(time(d), text);
    }
}
