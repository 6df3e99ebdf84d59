//! Nodes that Open MPI's mpirun started, two processes of this machine in place of two nodes; and nodes that find
//! each other by what Kubernetes puts into their environment.

#[path = "../common/demo.rs"]
mod demo;
#[path = "../common/harness.rs"]
#[allow(dead_code, reason = "what only the other test programs use")]
mod harness;
mod kubernetes;
#[path = "../common/program.rs"]
mod program;
#[path = "../common/secret.rs"]
#[allow(dead_code, reason = "as above")]
mod secret;

use harness::{FAKE, Running, Scene, alive, finish, parent, send, start, survivors};
use rustix::process::{Pid, Signal, kill_process};
use std::process::Command;

/// `mpirun` with `options` for itself, tsm-launch with `words` for it and fake workers that do `actions`; `None`,
/// said on stderr, where there is no mpirun.
fn mpirun(scene: &Scene, options: &str, words: &str, actions: &str) -> Option<Command> {
    let mut command = mpirun_of(scene, options)?;
    command.arg(scene.own_launcher());
    command.args(words.split_whitespace()).arg("--").arg(FAKE);
    command.args(actions.split_whitespace());
    Some(command)
}

/// `mpirun` alone. tsm-launch is a copy in the scene, for [`harness::survivors`].
fn mpirun_of(scene: &Scene, options: &str) -> Option<Command> {
    let version = Command::new("/usr/bin/mpirun").arg("--version").output();
    let is_open = |text: &[u8]| String::from_utf8_lossy(text).contains("Open MPI");
    if !version.is_ok_and(|version| is_open(&version.stdout)) {
        eprintln!("skipped: there is no /usr/bin/mpirun of Open MPI");
        return None;
    }
    let mut command = scene.command_of("/usr/bin/mpirun");
    command.args(["--oversubscribe", "--bind-to", "none"]);
    // Two that make their folder in the same place at the same time fail, and a killed one leaves it there.
    let own = scene.path("mpi");
    fs_err::create_dir(&own).unwrap();
    command.env("TMPDIR", own);
    if rustix::process::geteuid().is_root() {
        command.arg("--allow-run-as-root");
    }
    command.args(options.split_whitespace());
    Some(command)
}

/// Two processes of mpirun, directly or by a shell each, that run this as the program.
fn mpirun_program(scene: &Scene, in_shell: bool, program: &[&str]) -> Option<Command> {
    let words: &[&str] = if in_shell {
        // Not by exec: the shell stays between.
        &["sh", "-c", r#""$0" "$@"; exit $?"#]
    } else {
        &[]
    };
    let mut command = mpirun_of(scene, "-n 2")?;
    command.args(words).arg(scene.own_launcher());
    command.args(TWO.split_whitespace()).arg("--").args(program);
    Some(command)
}

/// As long as [`harness::NODE_TIMEOUT`].
const TWO: &str = "--share-host --cpus 1 --run-dir runs/run --node-timeout 5s";

fn read(scene: &Scene, name: &str) -> String {
    fs_err::read_to_string(scene.path("runs/run").join(name)).unwrap_or_else(|e| panic!("{e}"))
}

fn assert_nothing_is_left(scene: &Scene) {
    scene.assert_nothing_survives();
    let left = fs_err::read_dir(scene.path("runs")).unwrap().flatten();
    let left: Vec<_> = left.map(|e| e.file_name()).filter(|n| n != "run").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn two_processes_of_mpirun_are_two_nodes() {
    let scene = Scene::new();
    let Some(mut command) = mpirun(&scene, "-n 2", TWO, "--print-env") else {
        return;
    };
    let outcome = finish(start(&mut command));
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let host = tsm_launch::manifest::host();
    for rank in 0..2 {
        let log = read(&scene, &format!("logs/{host}-{rank}.out"));
        let has = |line: &str| log.lines().any(|l| l == line);
        for line in [
            "WORLD_SIZE=2".into(),
            format!("NODE_RANK={rank}"),
            format!("RANK={rank}"),
        ] {
            assert!(has(&line), "{line}\n{log}");
        }
        let stranger = |line: &&str| ["OMPI_", "PMIX_"].iter().any(|p| line.starts_with(p));
        assert_eq!(
            log.lines().find(stranger),
            None,
            "a worker is no rank of mpirun's"
        );
    }
    // Who runs these tests may have bound them to a core.
    let mut lines = outcome.err.lines();
    let is_warning = |line: &str| line.contains("warning") && !line.contains("has bound this node");
    assert!(!lines.any(is_warning), "{}", outcome.err);
    assert_nothing_is_left(&scene);
}

#[test]
fn the_exit_code_of_a_rank_is_that_of_mpirun() {
    for rank in 0..2 {
        let scene = Scene::new();
        let actions = format!("--on-rank {rank} --exit 17");
        let Some(mut command) = mpirun(&scene, "-n 2", TWO, &actions) else {
            return;
        };
        let outcome = finish(start(&mut command));
        assert_eq!(outcome.code, 17, "{}", outcome.err);
        let failed_first = format!("rank {rank} failed first: exit code 17");
        assert!(outcome.err.contains(&failed_first), "{}", outcome.err);
        let manifest: serde_json::Value =
            serde_json::from_str(&read(&scene, "manifest.json")).unwrap();
        assert_eq!(
            (&manifest["outcome"], &manifest["exit_code"]),
            (&"failed".into(), &17.into())
        );
        assert_nothing_is_left(&scene);
    }
}

/// Two nodes at work; mpirun, and the pids of the workers.
fn at_work(scene: &Scene) -> Option<(Running, Vec<i32>)> {
    let pids = scene.path("pid-{rank}").display().to_string();
    let actions = format!("--touch {pids} --fork --hang");
    let running = start(&mut mpirun(scene, "-n 2", TWO, &actions)?);
    let pids = scene.wait_for_pids("pid-", 2);
    Some((running, pids))
}

#[test]
fn a_killed_node_ends_the_job() {
    for rank in 0..2 {
        let scene = Scene::new();
        let Some((running, pids)) = at_work(&scene) else {
            return;
        };
        send(parent(pids[rank]).unwrap(), Signal::KILL);
        let outcome = finish(running);
        assert_ne!(outcome.code, 0, "{}", outcome.err);
        scene.assert_nothing_survives();
        assert!(pids.iter().all(|&pid| !alive(pid)));
    }
}

#[test]
fn ctrl_c_ends_the_job() {
    let scene = Scene::new();
    let Some((running, pids)) = at_work(&scene) else {
        return;
    };
    running.signal(Signal::INT);
    let outcome = finish(running);
    assert_ne!(outcome.code, 0, "{}", outcome.err);
    assert!(
        outcome.err.contains("stopping 2 workers"),
        "{}",
        outcome.err
    );
    scene.assert_nothing_survives();
    assert!(pids.iter().all(|&pid| !alive(pid)));
}

/// Kills what a failing test leaves behind.
struct Sweep<'a>(&'a Scene);

impl Drop for Sweep<'_> {
    fn drop(&mut self) {
        for process in survivors(&self.0.path("")) {
            let pid = process.split(':').next().and_then(|pid| pid.parse().ok());
            if let Some(pid) = pid.and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Nobody is in charge any more: each node stops its ranks in order. mpirun starts it directly, or a shell.
#[test]
fn the_sigkill_of_mpirun_ends_the_job() {
    for in_shell in [false, true] {
        let scene = Scene::new();
        let _sweep = Sweep(&scene);
        let pids = scene.path("pid-{rank}").display().to_string();
        // Only a worker that is asked to end makes the file.
        let ended = scene.path("ended-").display().to_string();
        let trap = format!(
            "trap 'touch {ended}$RANK; exit' TERM; echo -n $$ > {pids}.new; mv {pids}.new {pids}; while :; do sleep 0.02; done"
        );
        let trap = trap.replace("{rank}", "$RANK");
        let Some(mut command) = mpirun_program(&scene, in_shell, &["bash", "-c", &trap]) else {
            return;
        };
        let running = start(&mut command);
        let workers = scene.wait_for_pids("pid-", 2);
        running.signal(Signal::KILL);
        finish(running);
        scene.assert_nothing_survives();
        assert!(workers.iter().all(|&pid| !alive(pid)));
        for rank in 0..2 {
            assert!(
                scene.path(&format!("ended-{rank}")).exists(),
                "rank {rank} was killed at once"
            );
        }
        let manifest: serde_json::Value =
            serde_json::from_str(&read(&scene, "manifest.json")).unwrap();
        assert_eq!(
            (&manifest["outcome"], &manifest["exit_code"]),
            (&"stopped".into(), &143.into())
        );
    }
}

#[test]
fn what_mpirun_cannot_mean_is_refused() {
    for (words, why) in [
        (
            "--cpus 1",
            "mpirun starts tsm-launch 2 times on this node\n  hint: start it once on each node with mpirun -N 1",
        ),
        (
            "--cpus 1 --share-host --nodes 3",
            "--nodes asks for 3, mpirun has started 2",
        ),
    ] {
        let scene = Scene::new();
        let Some(mut command) = mpirun(&scene, "-n 2", words, "") else {
            return;
        };
        let outcome = finish(start(&mut command));
        assert_eq!(outcome.code, 64, "{}", outcome.err);
        assert!(outcome.err.contains(why), "{}", outcome.err);
        assert!(!scene.path("runs").exists());
    }
}

#[test]
fn one_process_of_mpirun_is_alone_and_so_is_each_that_ignores_it() {
    for (options, words, runs) in [("-n 1", "", 1), ("-n 2", "--ignore-env", 2)] {
        let scene = Scene::new();
        let words = format!("--cpus 1 {words}");
        let Some(mut command) = mpirun(&scene, options, &words, "") else {
            return;
        };
        let outcome = finish(start(&mut command));
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        assert_eq!(fs_err::read_dir(scene.path("runs")).unwrap().count(), runs);
    }
}

#[test]
fn a_folder_that_is_not_shared_is_named() {
    let scene = Scene::new();
    // The first must not give up before the second, since mpirun then ends that.
    let words =
        |join: &str, dir: &str| format!("{TWO} --join-timeout {join} --rendezvous-dir {dir}");
    let Some(mut command) = mpirun(&scene, "-n 1", &words("120s", "a"), "") else {
        return;
    };
    // The second process looks into another folder.
    command.args([":", "-n", "1"]).arg(scene.path("tsm-launch"));
    command.args(words("500ms", "b").split_whitespace());
    command.args(["--", FAKE]);
    let outcome = finish(start(&mut command));
    assert_eq!(outcome.code, 69, "{}", outcome.err);
    for part in [
        "cannot join the job within 500ms",
        "is b on a file system that all nodes share?",
    ] {
        assert!(outcome.err.contains(part), "{}", outcome.err);
    }
}

#[test]
fn no_process_shows_the_key() {
    let scene = Scene::new();
    let path = |name| scene.path(name).display().to_string();
    let (pids, end) = (path("pid-"), path("end"));
    let actions = format!("--touch {pids}{{rank}} --wait-for {end}");
    let Some(mut command) = mpirun(&scene, "-n 2", TWO, &actions) else {
        return;
    };
    let running = start(&mut command);
    scene.wait_for_pids("pid-", 2);
    assert_eq!(secret::exposed(&scene.path("")), [""; 0]);
    fs_err::write(&end, "").unwrap();
    let outcome = finish(running);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert_nothing_is_left(&scene);
}
