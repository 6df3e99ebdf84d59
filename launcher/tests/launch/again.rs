//! When a job is started again, and when that would be of no use.

use crate::harness::Scene;
use tsm_job::exit;

/// One rank that makes steps 1 to 3 and fails, then does `second` in its second start, and nothing in its third.
fn outcomes(second: &str) -> (i32, String, usize) {
    let scene = Scene::new();
    let first = "--step 1 --step 2 --step 3 --exit 7";
    let actions = format!(
        "--when TSM_GENERATION=0 {first} --end --when TSM_GENERATION=1 --step 1 {second} --end --step 9"
    );
    let outcome = scene.launch("--cpus 1 --preflight off --max-restarts 5", &actions);
    let generations = &scene.json("manifest.json")["generations"];
    let starts = generations.as_array().expect("a list").len();
    (outcome.code, outcome.err, starts)
}

#[test]
fn the_same_failure_at_the_same_step_twice_ends_the_job_with_93() {
    let (code, err, starts) = outcomes("--step 2 --step 3 --exit 7");
    assert_eq!((code, starts), (exit::DO_NOT_REQUEUE, 2), "{err}");
    let said = "the same failure at step 3 twice: program error: exit code 7";
    assert!(err.contains(said), "{err}");
}

#[test]
fn another_step_or_another_failure_does_not() {
    for second in [
        "--step 2 --step 3 --step 4 --exit 7",
        "--step 2 --exit 7",
        "--step 2 --step 3 --exit 8",
        "--step 2 --step 3 --kill 11",
    ] {
        let (code, err, starts) = outcomes(second);
        assert_eq!((code, starts), (0, 3), "{second}\n{err}");
    }
}
