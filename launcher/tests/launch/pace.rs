//! Ranks that no longer step, and ranks that step slowly, in a job.

use crate::harness::{FAKE, Scene, finish, until};
use crate::output::{read_err, start_writing};
use tsm_job::exit;

/// All ranks have made steps when rank 1 sleeps and the others wait for ever, one step further.
#[test]
fn the_rank_that_the_others_wait_for_is_named_with_its_stack_and_nothing_survives() {
    let scene = Scene::new();
    let path = |name| scene.path(name).display().to_string();
    let (ready, go) = (path("ready"), path("go"));
    let actions = format!(
        "--touch {ready}{{rank}} --step 1 --wait-for {go} --step 2 \
         --when RANK=1 --sleep-ms 600000 --end --step 3 --hang"
    );
    let running = scene.start("--cpus 3 --hang-timeout 5s --grace 5s", &actions);
    let pids = scene.wait_for_pids("ready", 3);
    fs_err::write(&go, "").unwrap();
    let outcome = finish(running);
    let err = &outcome.err;
    assert_eq!(outcome.code, exit::PEER, "{err}");
    for part in [
        "no rank made a step in ",
        "(limit 5s): rank 1 is ",
        "error: rank 1 hangs: no step for too long\n",
        "last finished step 2",
        "  stacks:\n",
    ] {
        assert!(err.contains(part), "{part}\n{err}");
    }
    let failure = scene.json("failure.json");
    assert_eq!(failure["class"], "hang", "{failure:#}");
    assert_eq!(failure["late"], serde_json::json!([1]), "{failure:#}");
    assert_eq!(
        (&failure["rank"], &failure["pid"]),
        (&1.into(), &pids[1].into())
    );
    assert_eq!(failure["exit_code"], exit::PEER);
    let stacks = failure["stacks"].as_str().expect("a text");
    assert!(stacks.contains("clock_nanosleep"), "of rank 1: {stacks}");
    assert!(stacks.contains("futex"), "of the others: {stacks}");
    assert_eq!(scene.json("manifest.json")["outcome"], "failed");
    scene.assert_nothing_survives();
}

/// Three ranks, of which rank 2 is slow, then none, then rank 1: each period ends when what is expected was said.
#[test]
fn a_straggler_is_named_while_the_job_runs_and_not_again_when_it_has_recovered() {
    let scene = Scene::new();
    let path = |name| scene.path(name).display().to_string();
    let (first, second, third) = (path("first"), path("second"), path("third"));
    let actions: String = (0..3)
        .map(|rank| {
            let ms = |slow| if rank == slow { 300 } else { 100 };
            format!(
                "--when RANK={rank} --work {first} {} --work {second} 100 --work {third} {} --end ",
                ms(2),
                ms(1)
            )
        })
        .collect();
    let mut words = vec!["--cpus=3", "--run-dir=run", "--", FAKE];
    words.extend(actions.split_whitespace());
    let running = start_writing(&scene, &words);
    let said = || read_err(&scene);
    let wait_for = |text: &str| until(text, || said().contains(text).then_some(()));
    wait_for(
        "rank 2 is slow, 3.00 times: 300 ms of own work a step, the median of the others is 100 ms",
    );
    fs_err::write(&first, "").unwrap();
    wait_for("rank 2 is no longer slow: ");
    fs_err::write(&second, "").unwrap();
    wait_for("rank 1 is slow, 3.00 times: ");
    fs_err::write(&third, "").unwrap();
    let outcome = finish(running);
    let err = said();
    assert_eq!(outcome.code, 0, "{err}");
    for rank in 0..3 {
        let times = usize::from(rank > 0);
        let named = format!("rank {rank} is slow, ");
        assert_eq!(err.matches(&named).count(), times, "{named}\n{err}");
    }
}
