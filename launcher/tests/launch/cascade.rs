//! The rank that failed first is named even when the others follow at once.

use crate::harness::Scene;

/// Rank `k` of `world` ends with 17; the others see its death through the kernel, wait `after_us`, and end with 1.
fn culprit(k: u32, world: u32, after_ms: u32) -> (u64, i32, String) {
    let scene = Scene::new();
    let at = |name: &str| scene.path(name).display().to_string();
    let ready = (0..world)
        .filter(|&r| r != k)
        .map(|r| format!("--wait-for {}{r}", at("ready")))
        .collect::<Vec<_>>();
    let script = format!(
        "if [ $RANK = {k} ]; then exec $0 --touch {pid} {ready} --say culprit --exit 17; \
         else exec $0 --wait-for {pid} --touch {r}{{rank}} --wait-death {pid} --sleep-ms {after_ms} --say lost --exit 1; fi",
        pid = at("pid"),
        ready = ready.join(" "),
        r = at("ready"),
    );
    let outcome = scene.shell(&format!("--cpus {world}"), &script);
    (
        scene.json("failure.json")["rank"].as_u64().unwrap(),
        outcome.code,
        outcome.err,
    )
}

#[test]
fn the_culprit_is_right_when_the_others_follow_after_a_millisecond() {
    for repetition in 0..24 {
        let k = repetition % 8;
        let (rank, code, err) = culprit(k, 8, 1);
        assert_eq!(
            (rank, code),
            (u64::from(k), 17),
            "repetition {repetition}\n{err}"
        );
        assert!(err.contains("    | culprit\n"), "{err}");
    }
}

#[test]
fn the_culprit_is_right_when_the_others_follow_at_once() {
    for repetition in 0..8 {
        let k = 7 - repetition;
        let (rank, code, err) = culprit(k, 8, 0);
        assert_eq!(
            (rank, code),
            (u64::from(k), 17),
            "repetition {repetition}\n{err}"
        );
    }
}

/// Peers notice a death by a closed connection, which the kernel closes before the death itself is visible. A lock
/// that the dying rank held stands for the connection, and a large file for the GPU that is closed after it.
#[test]
fn the_culprit_is_right_when_the_others_notice_before_its_death_is_visible() {
    for repetition in 0..16 {
        let k = repetition % 4;
        let scene = Scene::new();
        let at = |name: &str| scene.path(name).display().to_string();
        let others = (0..4)
            .filter(|&r| r != k)
            .map(|r| format!("--wait-for {}{r}", at("ready")));
        // All of its threads die, not only the first.
        let threads = if repetition % 2 == 1 {
            "--in-thread"
        } else {
            ""
        };
        let script = format!(
            "if [ $RANK = {k} ]; then exec $0 {threads} --fill 128 --lock {lock} --touch {held} {others} --sleep-ms 20 --exit 17; \
             else exec $0 --wait-for {held} --touch {ready}{{rank}} --lock {lock} --exit 1; fi",
            lock = at("lock"),
            held = at("held"),
            ready = at("ready"),
            others = others.collect::<Vec<_>>().join(" "),
        );
        let outcome = scene.shell("--cpus 4", &script);
        let rank = scene.json("failure.json")["rank"].as_u64();
        assert_eq!(
            (rank, outcome.code),
            (Some(k), 17),
            "repetition {repetition}\n{}",
            outcome.err
        );
    }
}

/// As `sudo` and programs do that close descriptors which they do not know.
#[test]
fn a_rank_that_only_closed_its_agent_socket_was_not_dying() {
    let scene = Scene::new();
    let at = |name: &str| scene.path(name).display().to_string();
    let (child, gone) = (at("child"), at("gone"));
    let by_itself = "exec $0 --close-agent".to_string();
    let without_its_first_thread = "exec $0 --in-thread --close-agent".into();
    // The last to hold it is a child, which ends.
    let after_a_child = format!(
        "$0 --touch {child} --wait-for {gone} & exec $0 --close-agent --wait-for {child} --touch {gone} --wait-death {child}"
    );
    for closes in [by_itself, without_its_first_thread, after_a_child] {
        let scene = Scene::new();
        let closed = scene.path("closed").display().to_string();
        let script = format!(
            "if [ $RANK = 1 ]; then exec $0 --wait-for {closed} --exit 4; fi
             {closes} --exit-on 15 1 --touch {closed} --hang"
        );
        let outcome = scene.shell("--cpus 2", &script);
        let failure = scene.json("failure.json");
        assert_eq!(
            (failure["rank"].as_u64(), outcome.code),
            (Some(1), 4),
            "{closes}\n{}",
            outcome.err
        );
        assert_eq!(failure["others"][0]["role"], "own_code", "{closes}");
    }
}

#[test]
fn a_failure_that_was_announced_counts_before_a_silent_end() {
    let scene = Scene::new();
    let said = scene.path("said").display().to_string();
    let script = format!(
        "if [ $RANK = 1 ]; then exec $0 --record panic --touch {said} --hang; else exec $0 --wait-for {said} --exit 1; fi"
    );
    let outcome = scene.shell("--cpus 2 --grace 20s", &script);
    assert_eq!(scene.json("failure.json")["rank"], 1, "{}", outcome.err);
    assert_eq!(outcome.code, 1);
    // Not that the launcher has stopped it then.
    let text = "error: rank 1 failed first: index 7 out of range for a clip of 7 frames\n";
    assert!(outcome.err.contains(text), "{}", outcome.err);
}

#[test]
fn a_rank_that_lost_its_peer_is_not_blamed() {
    let scene = Scene::new();
    let gone = scene.path("gone").display().to_string();
    // Rank 0 ends first, but says that it lost a peer; rank 1 dies of a signal nobody here sent.
    let script = format!(
        "if [ $RANK = 1 ]; then exec $0 --wait-for {gone} --wait-death {gone} --kill 11; \
         else exec $0 --touch {gone} --record peer --exit 76; fi"
    );
    let outcome = scene.shell("--cpus 2", &script);
    // The stop signal may be faster than rank 1's own; then there is only the lost peer to name.
    let failure = scene.json("failure.json");
    let expected = if failure["others"][0]["role"] == "stopped" {
        (0, 76)
    } else {
        (1, 139)
    };
    assert_eq!(
        (failure["rank"].as_i64().unwrap(), outcome.code),
        expected,
        "{}",
        outcome.err
    );
}

/// Between an exception and the end of its process Python may take seconds, and a peer ends in the meantime.
#[test]
fn an_exception_is_named_also_when_its_process_is_still_ending() {
    let scene = Scene::new();
    let said = scene.path("said").display().to_string();
    let traceback = "Traceback (most recent call last):\\n  File \"a.py\", line 23, in train\\nValueError: broken clip\\n";
    let peer = "RuntimeError: [pair.cc:598] Connection closed by peer [127.0.0.1]:2473\\n";
    let script = format!(
        "if [ $RANK = 1 ]; then printf '{traceback}' >&2; exec $0 --touch {said} --hang; \
         else $0 --wait-for {said}; printf '{peer}' >&2; exit 1; fi"
    );
    let outcome = scene.shell("--cpus 2", &script);
    let failure = scene.json("failure.json");
    assert_eq!(failure["rank"], 1, "{}", outcome.err);
    assert_eq!(failure["others"][0]["role"], "lost_peer");
    assert_eq!(outcome.code, 1, "{}", outcome.err);
    let told = "error: rank 1 failed first: ValueError: broken clip, at a.py:23 in train\n";
    assert!(outcome.err.contains(told), "{}", outcome.err);
}
