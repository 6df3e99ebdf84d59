//! Nothing that a worker starts survives the job, also what has left the session and its parent: in a control group,
//! and where there is none.

use crate::ground::{Bystander, Ground, grounds};
use crate::harness::{FAKE, Outcome, Running, Scene, alive, finish, start, until};
use rustix::fs::FlockOperation;
use rustix::process::Signal;
use std::time::Duration;
use tsm_launch::contain::Kind;

/// What workers do first: each starts a daemon, and waits until all have.
fn daemons(scene: &Scene) -> String {
    let path = scene.path("daemon").display().to_string();
    format!("--daemon {path}{{rank}} --wait-for {path}0 --wait-for {path}1")
}

fn run(ground: &Ground, scene: &Scene, options: &str, actions: &str) -> Running {
    let options = format!("--run-dir run --cpus 2 {options} -- {FAKE} {actions}");
    let words: Vec<&str> = options.split_whitespace().collect();
    let mut command = scene.command(&words);
    ground.enter(&mut command);
    start(&mut command)
}

/// The pids of both daemons, which live.
fn wait_for_daemons(scene: &Scene) -> Vec<i32> {
    let pids = scene.wait_for_pids("daemon", 2);
    assert!(pids.iter().all(|&pid| alive(pid)));
    pids
}

fn assert_dead(ground: &Ground, scene: &Scene) {
    for pid in scene.wait_for_pids("daemon", 2) {
        assert!(!alive(pid), "{:?}: a daemon survives", ground.kind);
    }
    ground.wait_until_empty();
}

fn assert_named(outcome: &Outcome, scene: &Scene, ground: &Ground) {
    let err = &outcome.err;
    let text = "processes that the workers left behind: ending 2 (";
    assert!(err.contains(text) && err.contains(", grace 300ms"), "{err}");
    for pid in scene.wait_for_pids("daemon", 2) {
        assert!(err.contains(&format!("{pid} fake-worker")), "{err}");
    }
    // But of a machine with one core.
    let mut lines = err.lines().filter(|line| !line.contains(" 1 core for "));
    assert!(!lines.any(|line| line.contains("warning")), "{err}");
    let kind = match ground.kind {
        Kind::Cgroup => r#""containment":"cgroup""#,
        Kind::Environment => r#""containment":"environment""#,
    };
    assert_eq!(scene.read("events.jsonl").matches(kind).count(), 2);
}

#[test]
fn daemons_end_with_a_job_that_succeeds_and_are_named() {
    for ground in grounds() {
        let scene = Scene::new();
        let outcome = finish(run(&ground, &scene, "--grace 300ms", &daemons(&scene)));
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        assert_dead(&ground, &scene);
        assert_named(&outcome, &scene, &ground);
    }
}

#[test]
fn daemons_end_with_a_job_that_fails() {
    for ground in grounds() {
        let scene = Scene::new();
        let actions = daemons(&scene) + " --on-rank 1 --exit 3";
        let outcome = finish(run(&ground, &scene, "--grace 300ms", &actions));
        assert_eq!(outcome.code, 3, "{}", outcome.err);
        assert_dead(&ground, &scene);
        assert_named(&outcome, &scene, &ground);
    }
}

#[test]
fn daemons_end_with_a_job_that_is_stopped() {
    for ground in grounds() {
        let scene = Scene::new();
        let ready = scene.path("ready").display().to_string();
        let actions = format!("{} --touch {ready}{{rank}} --hang", daemons(&scene));
        let running = run(&ground, &scene, "--grace 300ms", &actions);
        scene.wait_for_pids("ready", 2);
        wait_for_daemons(&scene);
        running.signal(Signal::INT);
        let outcome = finish(running);
        assert_eq!(outcome.code, 130, "{}", outcome.err);
        assert_dead(&ground, &scene);
    }
}

#[test]
fn daemons_end_with_a_launcher_that_is_killed() {
    for ground in grounds() {
        let scene = Scene::new();
        let running = run(&ground, &scene, "", &(daemons(&scene) + " --hang"));
        let pids = wait_for_daemons(&scene);
        running.signal(Signal::KILL);
        assert_eq!(finish(running).code, 137);
        until("the daemons to die", || {
            pids.iter().all(|&pid| !alive(pid)).then_some(())
        });
        assert_dead(&ground, &scene);
    }
}

#[test]
fn daemons_are_gone_before_the_ranks_start_again() {
    for ground in grounds() {
        let scene = Scene::new();
        let (ready, go) = (scene.path("ready"), scene.path("go"));
        let actions = format!(
            "--when TSM_RESTART_COUNT=0 {} --step 1 --on-rank 1 --kill 9 --end --touch {}{{rank}} --wait-for {}",
            daemons(&scene),
            ready.display(),
            go.display()
        );
        let running = run(&ground, &scene, "--grace 300ms --max-restarts 1", &actions);
        scene.wait_for_pids("ready", 2);
        for pid in scene.wait_for_pids("daemon", 2) {
            assert!(!alive(pid), "{:?}: a daemon survives", ground.kind);
        }
        assert!(ground.groups().len() <= 2, "those of two generations");
        fs_err::write(&go, "").unwrap();
        let outcome = finish(running);
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        assert_dead(&ground, &scene);
    }
}

#[test]
fn a_launcher_below_a_launcher_loses_nothing_either() {
    for ground in grounds() {
        let scene = Scene::new();
        let inner = format!(
            "--run-dir inner --ignore-env --cpus 2 -- {FAKE} {} --hang",
            daemons(&scene)
        );
        let mut command = scene.command(&["--run-dir", "run", "--cpus", "1", "--"]);
        command.arg(env!("CARGO_BIN_EXE_tsm-launch"));
        command.args(inner.split_whitespace());
        ground.enter(&mut command);
        let running = start(&mut command);
        wait_for_daemons(&scene);
        running.signal(Signal::KILL);
        assert_eq!(finish(running).code, 137);
        until("the daemons to die", || {
            let daemons = scene.wait_for_pids("daemon", 2);
            daemons.iter().all(|&pid| !alive(pid)).then_some(())
        });
        assert_dead(&ground, &scene);
    }
}

#[test]
fn groups_that_are_left_over_are_removed_and_others_are_not() {
    let Some(ground) = Ground::new(Kind::Cgroup) else {
        return;
    };
    let scene = Scene::new();
    // What a launcher leaves behind when it is killed together with its guard.
    let (empty, below, used) = (
        ground.make("tsm-launch.a.0.1"),
        ground.make("tsm-launch.a.0.1/below"),
        ground.make("tsm-launch.b.0.2"),
    );
    let foreign = ground.make("mine");
    let lock = fs_err::File::open(&used).unwrap();
    rustix::fs::flock(&lock, FlockOperation::LockShared).unwrap();
    let outcome = finish(run(&ground, &scene, "", ""));
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert!(!below.exists() && !empty.exists() && used.exists() && foreign.exists());
    drop(lock);
    fs_err::remove_dir(&foreign).unwrap();
    let again = Scene::new();
    let outcome = finish(run(&ground, &again, "", ""));
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    ground.wait_until_empty();
}

#[test]
fn other_jobs_and_other_processes_are_left_alone() {
    for ground in grounds() {
        let (one, two, other) = (Scene::new(), Scene::new(), Scene::new());
        let bystander = other.path("bystander0");
        let mut command = other.command_of(FAKE);
        command.args(["--leave", bystander.to_str().unwrap()]);
        assert!(command.status().unwrap().success());
        let bystander = Bystander(other.wait_for_pids("bystander", 1)[0]);

        let ready = other.path("ready").display().to_string();
        let hang = format!("{} --touch {ready}{{rank}} --hang", daemons(&other));
        let stays = run(&ground, &other, "--grace 300ms", &hang);
        let mut others = other.wait_for_pids("ready", 2);
        others.extend(wait_for_daemons(&other));

        let outcome = finish(run(&ground, &one, "--grace 300ms", &daemons(&one)));
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        let killed = run(&ground, &two, "", &(daemons(&two) + " --hang"));
        let pids = wait_for_daemons(&two);
        killed.signal(Signal::KILL);
        finish(killed);
        until("the daemons to die", || {
            pids.iter().all(|&pid| !alive(pid)).then_some(())
        });
        assert!(others.iter().all(|&pid| alive(pid)), "{:?}", ground.kind);

        stays.signal(Signal::INT);
        assert_eq!(finish(stays).code, 130);
        assert_dead(&ground, &other);
        assert!(alive(bystander.0));
    }
}

#[test]
fn a_process_that_leaves_the_session_is_asked_to_end() {
    for ground in grounds() {
        let scene = Scene::new();
        let marker = scene.path("marker");
        let script = format!(
            "setsid sh -c 'touch {0}; sleep 1000; : {0}' & while [ ! -e {0} ]; do sleep 0.01; done",
            marker.display()
        );
        let grace = ["--cpus", "1", "--grace", "300s"];
        let mut command = scene.command(&grace);
        command.args(["--", "sh", "-c", &script]);
        ground.enter(&mut command);
        let outcome = finish(start(&mut command));
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        let took = outcome.took;
        assert!(took < Duration::from_secs(200), "not the grace: {took:?}");
        assert!(!outcome.err.contains("warning"), "{}", outcome.err);
        ground.wait_until_empty();
    }
}

/// What no mark can find is left alone, and said where it shows.
#[test]
fn a_process_without_session_environment_and_parent_does_not_hold_up_the_end() {
    for ground in grounds() {
        let scene = Scene::new();
        let pid = scene.path("escaped0").display().to_string();
        let script = format!(
            "(env -i setsid sh -c 'echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 1000' &) ; \
             while [ ! -e {pid} ]; do sleep 0.01; done"
        );
        let mut command = scene.command(&["--cpus", "1", "--", "sh", "-c", &script]);
        ground.enter(&mut command);
        let outcome = finish(start(&mut command));
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        let escaped = fs_err::read_to_string(scene.path("escaped0")).unwrap();
        let escaped = Bystander(escaped.trim().parse().unwrap());
        match ground.kind {
            Kind::Cgroup => assert!(!alive(escaped.0)),
            Kind::Environment => {
                let text = "warning: a process that is not known as one of this job's";
                assert!(outcome.err.contains(text), "{}", outcome.err);
                assert!(alive(escaped.0));
            }
        }
    }
}
