//! The stop path: failure, signals, grace, orphans.

use crate::harness::{FAKE, Running, Scene, alive, finish, start, until};
use rustix::process::Signal;
use std::time::Duration;

#[test]
fn the_exit_code_is_that_of_the_rank_that_failed() {
    for (action, code, text) in [
        ("--exit 17", 17, "rank 1 failed first: exit code 17"),
        ("--exit 3", 3, "rank 1 failed first: exit code 3"),
        ("--kill 9", 137, "rank 1 failed first: signal 9 (SIGKILL)"),
        ("--kill 11", 139, "rank 1 failed first: signal 11 (SIGSEGV)"),
        ("--kill 15", 143, "rank 1 failed first: signal 15 (SIGTERM)"),
    ] {
        let scene = Scene::new();
        let outcome = scene.launch("--cpus 3", &format!("--on-rank 1 {action}"));
        assert_eq!(outcome.code, code, "{action}\n{}", outcome.err);
        assert!(outcome.err.contains(text), "{action}\n{}", outcome.err);
        assert_eq!(scene.json("failure.json")["rank"], 1);
        assert_eq!(scene.json("manifest.json")["exit_code"], code);
    }
}

#[test]
fn the_report_holds_the_record_the_step_and_the_end_of_stderr() {
    let scene = Scene::new();
    let outcome = scene.launch(
        "--cpus 2",
        "--on-rank 1 --step 41 --step 42 --spam 100 --record panic --exit 70",
    );
    assert_eq!(outcome.code, 70);
    let report = &outcome.err[outcome.err.find("error: rank 1").expect("a report")..];
    for part in [
        "last finished step 42",
        "panic: index 7 out of range",
        "| err 1 99 ",
        "last 50 lines of stderr",
    ] {
        assert!(report.contains(part), "{part}\n{report}");
    }
    assert!(
        !report.contains("| err 1 49 "),
        "50 lines are enough\n{report}"
    );
    let failure = scene.json("failure.json");
    assert_eq!(
        (&failure["cause"], &failure["step"]),
        (&"panic".into(), &42.into())
    );
    assert_eq!(failure["stderr"].as_array().unwrap().len(), 50);
    assert_eq!(failure["others"][0]["role"], "stopped");
    assert_eq!(failure["backtrace"], "0: main");
}

#[test]
fn a_rank_that_announces_a_failure_and_ends_with_0_has_failed() {
    for (options, actions) in [
        ("--cpus 1", "--record error --exit 0"),
        ("--cpus 3", "--on-rank 1 --record error --exit 0"),
    ] {
        let scene = Scene::new();
        let outcome = scene.launch(options, actions);
        // What the record says.
        assert_eq!(outcome.code, 1, "{}", outcome.err);
        let text = "failed first: it said so, and ended with exit code 0\n  class: program error\n";
        assert!(outcome.err.contains(text), "{}", outcome.err);
        let failure = scene.json("failure.json");
        let rank = i32::from(options == "--cpus 3");
        assert_eq!(
            (&failure["rank"], &failure["exit_code"]),
            (&rank.into(), &1.into())
        );
        let message = "index 7 out of range for a clip of 7 frames";
        assert_eq!(failure["message"], message);
        assert_eq!(scene.json("manifest.json")["outcome"], "failed");
    }
}

#[test]
fn torchs_error_file_is_in_the_report() {
    let scene = Scene::new();
    let outcome = scene.launch("--cpus 2", "--on-rank 0 --error-file ValueError:x --exit 1");
    assert!(
        outcome.err.contains("exception: ValueError:x"),
        "{}",
        outcome.err
    );
    assert_eq!(scene.json("failure.json")["message"], "ValueError:x");
}

#[test]
fn a_worker_that_ignores_sigterm_is_killed_after_the_grace() {
    let scene = Scene::new();
    let ready = scene.path("ready");
    let wait = format!(
        "--ignore-sigterm --touch {0}{{rank}} --wait-for {0}0 --wait-for {0}1 --wait-for {0}2",
        ready.display()
    );
    let outcome = scene.launch(
        "--cpus 3 --grace 300ms",
        &format!("{wait} --on-rank 0 --exit 5"),
    );
    assert_eq!(outcome.code, 5, "{}", outcome.err);
    assert!(
        outcome.took >= Duration::from_millis(300),
        "{:?}",
        outcome.took
    );
    for text in [
        "the grace is over: killing ranks 1-2\n",
        "ranks 1-2: stopped by the launcher: signal 9 (SIGKILL)",
    ] {
        assert!(outcome.err.contains(text), "{}", outcome.err);
    }
}

#[test]
fn ctrl_c_is_forwarded_and_workers_may_end_in_order() {
    let scene = Scene::new();
    let ready = scene.path("ready").display().to_string();
    let running = scene.start(
        "--cpus 2",
        &format!("--exit-on 2 0 --touch {ready}{{rank}} --hang"),
    );
    scene.wait_for_pids("ready", 2);
    running.signal(Signal::INT);
    let outcome = finish(running);
    assert_eq!(outcome.code, 130, "{}", outcome.err);
    let manifest = scene.json("manifest.json");
    assert_eq!(
        (&manifest["outcome"], &manifest["ranks"][0]["end"]["code"]),
        (&"stopped".into(), &0.into())
    );
    assert!(!scene.run_dir().join("failure.json").exists());
}

#[test]
fn sigterm_sighup_and_sigquit_stop_the_job_too() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::HUP, 129), (Signal::QUIT, 131)] {
        let scene = Scene::new();
        let ready = scene.path("ready").display().to_string();
        let running = scene.start("--cpus 1", &format!("--touch {ready}{{rank}} --hang"));
        scene.wait_for_pids("ready", 1);
        running.signal(signal);
        let outcome = finish(running);
        assert_eq!(outcome.code, code, "{}", outcome.err);
        assert_eq!(scene.json("manifest.json")["outcome"], "stopped");
    }
}

/// A worker saves as at a SIGTERM, and does not die by a signal that it does not know.
#[test]
fn sighup_and_sigquit_are_a_sigterm_to_the_workers() {
    for (signal, name, code) in [(Signal::HUP, "SIGHUP", 129), (Signal::QUIT, "SIGQUIT", 131)] {
        let scene = Scene::new();
        let ready = scene.path("ready").display().to_string();
        let actions = format!("--exit-on 15 0 --touch {ready}{{rank}} --hang");
        let running = scene.start("--cpus 2", &actions);
        scene.wait_for_pids("ready", 2);
        running.signal(signal);
        let outcome = finish(running);
        assert_eq!(outcome.code, code, "{}", outcome.err);
        let notice = format!("{name}: stopping 2 workers");
        assert!(outcome.err.contains(&notice), "{}", outcome.err);
        assert_eq!(scene.json("manifest.json")["ranks"][1]["end"]["code"], 0);
    }
}

#[test]
fn the_second_ctrl_c_kills() {
    let scene = Scene::new();
    let ready = scene.path("ready").display().to_string();
    let actions = format!("--touch {ready}{{rank}} --hang");
    let ignoring = [
        "--cpus",
        "2",
        "--grace",
        "300s",
        "--run-dir",
        "run",
        "--",
        "sh",
        "-c",
        r#"trap "" INT; exec "$0" "$@""#,
        FAKE,
    ];
    let words: Vec<&str> = ignoring.into_iter().chain(actions.split(' ')).collect();
    let running = start(&mut scene.command(&words));
    let pids = scene.wait_for_pids("ready", 2);
    running.signal(Signal::INT);
    until("the first SIGINT to be seen", || {
        scene
            .read("events.jsonl")
            .contains(r#""event":"signal","signal":"SIGINT""#)
            .then_some(())
    });
    assert!(
        pids.iter().all(|&pid| alive(pid)),
        "the workers ignore the first"
    );
    running.signal(Signal::INT);
    let outcome = finish(running);
    assert_eq!(outcome.code, 130, "{}", outcome.err);
    assert!(
        outcome.took < Duration::from_secs(200),
        "not the grace: {:?}",
        outcome.took
    );
    assert_eq!(scene.json("manifest.json")["ranks"][1]["end"]["signal"], 9);
}

#[test]
fn user_signals_are_passed_on_and_stop_nothing() {
    let scene = Scene::new();
    let ready = scene.path("ready").display().to_string();
    let running = scene.start(
        "--cpus 2",
        &format!("--exit-on 10 0 --touch {ready}{{rank}} --hang"),
    );
    scene.wait_for_pids("ready", 2);
    running.signal(Signal::USR1);
    assert_eq!(
        finish(running).code,
        0,
        "each worker ended with 0 on SIGUSR1"
    );
}

/// Workers that do this in bash, with rank and pid in the file `ready<rank>` once they listen.
fn start_bash(scene: &Scene, options: &str, script: &str) -> Running {
    let ready = scene.path("ready").display().to_string();
    let script = format!(
        "{script}\necho -n $$ > {ready}$RANK.new; mv {ready}$RANK.new {ready}$RANK\n\
         while :; do sleep 0.02; done"
    );
    let mut words = vec!["--run-dir", "run"];
    words.extend(options.split_whitespace());
    words.extend(["--", "bash", "-c", &script]);
    let running = start(&mut scene.command(&words));
    scene.wait_for_pids("ready", 2);
    running
}

/// The last rank is in the middle of its save when the first ends.
#[test]
fn a_program_that_saves_on_sigusr2_is_waited_for() {
    for (last, code) in [(75, 75), (0, 75), (17, 17)] {
        let scene = Scene::new();
        let save = format!(
            r#"save() {{
                [ $RANK = 0 ] && exit 75
                until grep -q answered "$TSM_RUN_DIR/events.jsonl"; do sleep 0.01; done
                echo saved; exit {last}
            }}
            trap save USR2"#
        );
        let running = start_bash(&scene, "--cpus 2 --max-restarts 2", &save);
        running.signal(Signal::USR2);
        let outcome = finish(running);
        assert_eq!(outcome.code, code, "{}", outcome.err);
        assert_eq!(scene.log(1, "out"), b"saved\n");
        let failed = scene.run_dir().join("failure.json").exists();
        assert_eq!(failed, code == 17, "{}", outcome.err);
        let text = if failed {
            "rank 1 failed first: exit code 17"
        } else {
            "tsm-launch: saved after "
        };
        assert!(outcome.err.contains(text), "{}", outcome.err);
    }
}

#[test]
fn who_does_not_save_within_the_grace_is_stopped_and_nobody_is_blamed() {
    let scene = Scene::new();
    let script = "[ $RANK = 0 ] && trap 'exit 75' USR2 || trap '' USR2";
    let running = start_bash(&scene, "--cpus 2 --grace 400ms", script);
    running.signal(Signal::USR2);
    let outcome = finish(running);
    assert_eq!(outcome.code, 140, "{}", outcome.err);
    let why = "rank 1 did not save and end within 400ms after SIGUSR2";
    assert!(outcome.err.contains(why), "{}", outcome.err);
    let ends = &scene.json("manifest.json")["ranks"];
    assert_eq!(
        (&ends[0]["end"]["code"], &ends[1]["end"]["signal"]),
        (&75.into(), &15.into())
    );
    assert!(!scene.run_dir().join("failure.json").exists());
}

/// The second rank is in the middle of its save when the first ends; nobody sent a signal.
#[test]
fn a_program_that_saves_by_its_own_clock_is_waited_for_and_not_started_again() {
    for (last, code) in [(75, 75), (0, 75), (17, 17)] {
        let scene = Scene::new();
        let script = format!(
            r#"[ $RANK = 0 ] && exit 75
            until grep -q answered "$TSM_RUN_DIR/events.jsonl"; do sleep 0.01; done
            echo saved; exit {last}"#
        );
        let words = "--cpus=2 --max-restarts=2 --run-dir=run -- bash -c";
        let mut words: Vec<&str> = words.split(' ').collect();
        words.push(&script);
        let outcome = finish(start(&mut scene.command(&words)));
        assert_eq!(outcome.code, code, "{}", outcome.err);
        assert_eq!(scene.log(1, "out"), b"saved\n");
        assert!(!outcome.err.contains("rank 0 failed"), "{}", outcome.err);
        let failed = scene.run_dir().join("failure.json").exists();
        assert_eq!(failed, code == 17, "{}", outcome.err);
        let generations = &scene.json("manifest.json")["generations"];
        assert_eq!(generations.as_array().unwrap().len(), 1);
    }
}

#[test]
fn who_does_not_follow_one_that_saved_by_itself_is_stopped_and_the_job_is_to_be_continued() {
    let scene = Scene::new();
    let script = "[ $RANK = 0 ] && exit 75; exec sleep 1000";
    let words = "--cpus=2 --max-restarts=2 --grace=300ms --run-dir=run -- bash -c";
    let mut words: Vec<&str> = words.split(' ').collect();
    words.push(script);
    let outcome = finish(start(&mut scene.command(&words)));
    assert_eq!(outcome.code, 75, "{}", outcome.err);
    for part in [
        "rank 0 has saved and ended: waiting up to 0.3 s for 1 other",
        "the grace after rank 0 had saved is over",
        "rank 0 saved and ended with code 75, rank 1 did not",
        "stopped after ",
    ] {
        assert!(outcome.err.contains(part), "{part}\n{}", outcome.err);
    }
    let manifest = scene.json("manifest.json");
    assert_eq!(
        (&manifest["outcome"], &manifest["exit_code"]),
        (&"stopped".into(), &75.into())
    );
    assert!(!scene.run_dir().join("failure.json").exists());
}

#[test]
fn a_program_without_a_handler_is_ended_by_a_user_signal_and_not_started_again() {
    for (signal, code, name) in [
        (Signal::USR2, 140, "SIGUSR2"),
        (Signal::USR1, 138, "SIGUSR1"),
    ] {
        let scene = Scene::new();
        let running = start_bash(&scene, "--cpus 2 --max-restarts 2", "");
        running.signal(signal);
        let outcome = finish(running);
        assert_eq!(outcome.code, code, "{}", outcome.err);
        let why = format!("{name} was passed on and ended rank");
        assert!(outcome.err.contains(&why), "{}", outcome.err);
        assert!(!outcome.err.contains("start 2"), "{}", outcome.err);
        assert_eq!(scene.json("manifest.json")["outcome"], "stopped");
        assert!(!scene.run_dir().join("failure.json").exists());
    }
}

#[test]
fn nothing_survives_the_sigkill_of_the_launcher() {
    let scene = Scene::new();
    let ready = scene.path("ready").display().to_string();
    let running = scene.start(
        "--cpus 4",
        &format!("--ignore-sigterm --fork --touch {ready}{{rank}} --hang"),
    );
    let workers = scene.wait_for_pids("ready", 4);
    let children: Vec<i32> = (0..4)
        .map(|rank| {
            until("the children's pids", || {
                String::from_utf8(scene.log(rank, "out"))
                    .ok()?
                    .trim()
                    .strip_prefix("child ")?
                    .parse()
                    .ok()
            })
        })
        .collect();
    assert!(workers.iter().chain(&children).all(|&pid| alive(pid)));
    running.signal(Signal::KILL);
    assert_eq!(finish(running).code, 137);
    let dead = |pids: &[i32]| pids.iter().all(|&pid| !alive(pid)).then_some(());
    until("the workers to die", || dead(&workers));
    until("their children to die", || dead(&children));
}

#[test]
fn what_a_worker_started_ends_with_the_job() {
    for (end, code) in [("--exit 0", 0), ("--on-rank 0 --exit 4", 4)] {
        let scene = Scene::new();
        let ready = scene.path("ready").display().to_string();
        let actions =
            format!("--fork --touch {ready}{{rank}} --wait-for {ready}0 --wait-for {ready}1 {end}");
        let outcome = scene.launch("--cpus 2 --grace 300s", &actions);
        assert_eq!(outcome.code, code, "{}", outcome.err);
        for rank in 0..2 {
            let out = String::from_utf8(scene.log(rank, "out")).unwrap();
            let child: i32 = out.trim().strip_prefix("child ").unwrap().parse().unwrap();
            assert!(!alive(child));
        }
        assert!(
            outcome.took < Duration::from_secs(200),
            "SIGTERM ends them, not the grace: {:?}",
            outcome.took
        );
    }
}
