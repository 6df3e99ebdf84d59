//! What happens in the same moment, or in an unusual order.

use crate::ground::Bystander;
use crate::harness::{DEADLINE, Killed, Scene, alive, finish, send, start, survivors, until};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use tsm_launch::contain::{Ability, Containment};
use tsm_launch::own::Executable;
use tsm_launch::process::{Guard, Spec, spawn};

/// As git and scontrol, which the launcher runs on other threads: they must not hold the sockets of workers open.
#[test]
fn the_death_of_a_worker_is_heard_whatever_other_threads_start() {
    let shim = &Executable::at(Path::new(env!("CARGO_BIN_EXE_tsm-launch")));
    let containment = Containment::open(&mut Ability::find_out(shim), "races", 0);
    let command = ["true".into()];
    let spec = Spec {
        shim,
        command: &command,
        base_env: &[],
        directory: None,
        env: &[],
        remove: &[],
        cores: &[],
        shielded: false,
        containment: &containment,
    };
    let done = AtomicBool::new(false);
    let unheard = std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            let mut others = Vec::new();
            while !done.load(Ordering::Relaxed) && others.len() < 1000 {
                // There may be a limit of processes.
                let Ok(child) = Command::new("sleep").arg("1000").spawn() else {
                    break;
                };
                others.push(Killed(child));
            }
            others
        });
        let mut agents = Vec::new();
        for _ in 0..30 {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (worker, _streams) = spawn(&spec, theirs).unwrap();
            // It is watched.
            (&ours).write_all(b"!").unwrap();
            agents.push((ours, worker));
        }
        done.store(true, Ordering::Relaxed);
        let _others = others.join().unwrap();
        let is_heard = |mut agent: &UnixStream| {
            agent.set_read_timeout(Some(DEADLINE)).unwrap();
            matches!(agent.read(&mut [0]), Ok(0))
        };
        // Every one that is not takes all of the deadline.
        let unheard = agents.iter().find(|(agent, _)| !is_heard(agent));
        let unheard = unheard.map(|(_, worker)| worker.pid);
        agents.iter().for_each(|(_, worker)| {
            worker.kill();
            until("a worker to end", || worker.end());
            worker.reap();
        });
        unheard
    });
    assert_eq!(unheard, None, "somebody holds its socket");
}

/// The end of a process that dies under a debugger can be waited for only after the debugger has heard of it.
#[test]
fn the_death_of_a_rank_under_a_debugger_is_seen_when_the_debugger_lets_go() {
    let scene = Scene::new();
    let ready = scene.path("ready").display().to_string();
    let actions = format!("--touch {ready}{{rank}} --hang");
    let running = scene.start("--cpus 3 --grace 30s", &actions);
    let pids = scene.wait_for_pids("ready", 3);
    if let Err(e) = trace(pids[0]) {
        return eprintln!("skipped: ptrace is not allowed here: {e}");
    }
    let traced = WaitId::Pid(Pid::from_raw(pids[0]).unwrap());
    send(pids[0], Signal::KILL);
    let dead = WaitIdOptions::EXITED;
    waitid(traced.clone(), dead | WaitIdOptions::NOWAIT).unwrap();
    // Its launcher has looked at it in vain when it has seen what happens later.
    send(pids[1], Signal::KILL);
    until("the third to be stopped for it", || {
        (!alive(pids[2])).then_some(())
    });
    waitid(traced, dead).unwrap();
    let outcome = finish(running);
    assert_eq!(outcome.code, 137, "{}", outcome.err);
    let end = &scene.json("manifest.json")["ranks"][0]["end"];
    assert_eq!(end["signal"], 9, "{}", outcome.err);
    let text = "rank 0 failed first";
    assert!(outcome.err.contains(text), "{}", outcome.err);
}

/// They write faster than anybody could read it.
#[test]
fn a_signal_is_heard_over_ranks_that_talk_without_end() {
    let scene = Scene::new();
    let ready = scene.path("ready").display().to_string();
    let talk = format!(
        r#"echo -n $$ > {ready}$RANK.new; mv {ready}$RANK.new {ready}$RANK
        exec yes '{{"kind":"step","step":1,"epoch":1}}' >&$TSM_AGENT_FD"#
    );
    let words = ["--cpus", "4", "--run-dir", "run", "--", "bash", "-c", &talk];
    let running = start(&mut scene.command(&words));
    scene.wait_for_pids("ready", 4);
    running.signal(Signal::INT);
    until("the launcher to end", || {
        (!alive(running.pid())).then_some(())
    });
    let outcome = finish(running);
    assert_eq!(outcome.code, 130, "{}", outcome.err);
}

/// As debuggers and schedulers stop whole sessions.
#[test]
fn a_guard_that_is_stopped_does_not_stop_its_launcher() {
    let shim = &Executable::at(Path::new(env!("CARGO_BIN_EXE_tsm-launch")));
    let containment = Containment::open(&mut Ability::find_out(shim), "races", 0);
    let mut guard = Guard::start(shim, &containment).unwrap();
    let [mark, ..] = containment.words();
    let pid = until("the guard", || {
        let found = survivors(Path::new(&mark));
        found.first()?.split(':').next()?.parse().ok()
    });
    send(pid, Signal::STOP);
    let _killed = Bystander(pid);
    let (done, is_done) = channel();
    std::thread::spawn(move || {
        // Far more than a pipe holds.
        for _ in 0..20_000 {
            guard.lease(DEADLINE);
        }
        let _ = done.send(());
    });
    assert_eq!(is_done.recv_timeout(DEADLINE), Ok(()));
}

#[expect(unsafe_code, reason = "rustix has no ptrace")]
fn trace(pid: i32) -> std::io::Result<()> {
    // SAFETY: the two arguments that could be pointers are none for this request.
    match unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) } {
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}
