//! What is seen of real processes that do not move.

use crate::harness::{DEADLINE, FAKE, Scene, alive, send, survivors, until};
use crate::program::write_program;
use rustix::process::{Pid, Signal, kill_process};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tsm_launch::hang::look_into;
use tsm_launch::hang::probe::Probe;
use tsm_launch::hang::process::Process;
use tsm_launch::port::Port;

/// A process that is killed at the end of its test.
struct Victim(Child);

impl Victim {
    fn start(program: &str, args: &[&str]) -> Victim {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Victim(command.spawn().expect("the program starts"))
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid()).expect("a pid");
        kill_process(pid, signal).expect("it runs");
    }

    fn state(&self) -> char {
        let stat = fs_err::read_to_string(format!("/proc/{}/stat", self.pid())).expect("it runs");
        let (_, rest) = stat.rsplit_once(") ").expect("the form of stat");
        rest.chars().next().expect("a state")
    }

    /// Looks until it is doing what it was started for.
    fn seen(&self, what: &str, probe: &Probe, wanted: impl Fn(&Process) -> bool) -> Process {
        until(what, || {
            let process = probe.inspect(self.pid());
            wanted(&process).then_some(process)
        })
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// No debugger at all.
fn no_tools() -> Probe {
    Probe {
        path: Vec::new(),
        ..Probe::default()
    }
}

/// A debugger of one's own: a shell script, in a folder that is the whole search path.
fn tools(scene: &Scene, name: &str, script: &str) -> Probe {
    let folder = scene.path("tools");
    fs_err::create_dir_all(&folder).expect("the folder exists");
    let path = folder.join(name);
    write_program(&path, format!("#!/bin/sh\n{script}\n"));
    Probe {
        path: vec![folder],
        tool_timeout: Duration::from_secs(60),
        timeout: DEADLINE,
    }
}

#[test]
fn a_sleep_and_a_futex_are_named() {
    let sleeper = Victim::start(FAKE, &["--sleep-ms", "600000"]);
    let seen = sleeper.seen("sleep", &no_tools(), |p| {
        p.summary() == "waiting in clock_nanosleep"
    });
    assert!(seen.rss_bytes > 0);
    assert_eq!(
        seen.command.as_deref(),
        Some(format!("{FAKE} --sleep-ms 600000").as_str())
    );
    let text = seen.to_string();
    assert!(
        text.contains("neither gdb nor eu-stack is here; install gdb"),
        "{text}"
    );

    let hung = Victim::start(FAKE, &["--hang"]);
    let seen = hung.seen("futex", &no_tools(), |p| p.summary() == "waiting in futex");
    assert!(!seen.is_stuck());
}

#[test]
fn the_file_behind_a_read_is_named() {
    let scene = Scene::new();
    let fifo = scene.path("fifo").display().to_string();
    let script = format!("mkfifo {fifo}; exec cat <>{fifo}");
    let reader = Victim::start("sh", &["-c", &script]);
    let summary = format!("waiting in read of fd 0 ({fifo})");
    reader.seen("read", &no_tools(), |p| p.summary() == summary);
}

#[test]
fn the_other_end_of_a_socket_is_named() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let script = format!(
        "exec 5<>/dev/tcp/127.0.0.1/{}; read -u 5 line",
        address.port()
    );
    let reader = Victim::start("bash", &["-c", &script]);
    listener.set_nonblocking(true).unwrap();
    let (_open, peer) = until("the connection", || listener.accept().ok());
    let wanted = format!("read of fd 5 (TCP {peer} to {address})");
    reader.seen("read of the socket", &no_tools(), |p| {
        p.summary() == format!("waiting in {wanted}")
    });
}

#[test]
fn a_stopped_process_is_named_and_left_stopped() {
    let scene = Scene::new();
    let touched = scene.path("touched");
    let probe = tools(&scene, "gdb", &format!("touch {}", touched.display()));
    let hung = Victim::start(FAKE, &["--hang"]);
    hung.seen("futex", &no_tools(), |p| p.summary() == "waiting in futex");
    hung.signal(Signal::STOP);
    let seen = hung.seen("the stop", &no_tools(), |p| {
        p.summary().starts_with("stopped by a signal")
    });
    assert!(seen.is_stuck());
    let text = probe.inspect(hung.pid()).to_string();
    assert!(
        text.contains("it is stopped; SIGCONT lets it go on"),
        "{text}"
    );
    assert!(!touched.exists(), "no debugger may be run on it");
    assert_eq!(hung.state(), 'T');
}

#[test]
fn state_d_is_named_and_left_alone() {
    let scene = Scene::new();
    let touched = scene.path("touched");
    let probe = tools(&scene, "gdb", &format!("touch {}", touched.display()));
    let victim = Victim::start(FAKE, &["--wait-in-d"]);
    let seen = victim.seen("state D", &probe, |p| p.summary().contains("state D"));
    assert!(seen.is_stuck());
    let text = seen.to_string();
    assert!(text.contains("cannot be interrupted"), "{text}");
    assert!(
        text.contains("kernel stack") || !rustix::process::geteuid().is_root(),
        "{text}"
    );
    // It may have been run before the process had come to its wait.
    let _ = fs_err::remove_file(&touched);
    probe.inspect(victim.pid());
    assert!(!touched.exists(), "no debugger may be run on it");
}

#[test]
fn a_process_that_is_gone_is_said_to_be() {
    let mut victim = Victim::start(FAKE, &[]);
    victim.0.wait().unwrap();
    let text = Probe::default().inspect(victim.pid()).to_string();
    assert!(text.contains("there is no such process"), "{text}");
    let zombie = Victim::start(FAKE, &["--exit", "3"]);
    let seen = zombie.seen("the end", &no_tools(), |p| p.kind().0 == 'Z');
    assert!(seen.to_string().contains("it has ended"), "{seen}");
}

#[test]
fn the_program_below_a_shell_is_looked_into() {
    let script = format!("{FAKE} --hang; true");
    let scene = Scene::new();
    let pids = scene.path("pid");
    let probe = tools(
        &scene,
        "gdb",
        &format!("echo \"Thread 1 $*\"; touch {}", pids.display()),
    );
    let shell = Victim::start("sh", &["-c", &script]);
    let seen = shell.seen("the shell to wait", &probe, |p| {
        p.program().pid != p.pid && p.summary() == "waiting in futex" && p.stack.is_some()
    });
    let program = seen.program().pid;
    let stack = seen.stack.unwrap();
    assert_eq!(stack.pid, program);
    assert!(
        stack.text.ends_with(&format!("-p {program}\n")),
        "{stack:?}"
    );
    send(program, Signal::KILL);
}

#[test]
fn a_debugger_that_hangs_is_ended_and_the_process_goes_on() {
    let scene = Scene::new();
    // As a debugger that is ended between its attach and its detach.
    let script = format!(
        "for pid; do :; done; kill -STOP $pid; echo 'Thread 1 (partly)'; trap '' TERM; sleep 1000 & : {}; wait; wait; wait",
        scene.path("marker").display()
    );
    let mut probe = tools(&scene, "gdb", &script);
    let hung = Victim::start(FAKE, &["--hang"]);
    hung.seen("futex", &no_tools(), |p| p.summary() == "waiting in futex");
    probe.tool_timeout = Duration::from_millis(400);
    let before = Instant::now();
    let seen = probe.inspect(hung.pid());
    assert!(before.elapsed() < DEADLINE, "not the time for everything");
    let text = seen.to_string();
    assert!(text.contains("gdb: was ended after 400ms"), "{text}");
    until("the process to go on", || {
        (hung.state() == 'S').then_some(())
    });
    assert_eq!(survivors(&scene.path("tools")), [""; 0]);
}

#[test]
fn a_debugger_that_floods_is_cut() {
    let scene = Scene::new();
    let script = "echo 'Thread 1'; i=0; while [ $i -lt 20000 ]; do echo \"#$i in main ()\"; i=$((i+1)); done";
    let probe = tools(&scene, "gdb", script);
    let hung = Victim::start(FAKE, &["--hang"]);
    let seen = probe.inspect(hung.pid());
    let stack = seen.stack.expect("stacks");
    assert!(stack.text.len() < 70_000, "{}", stack.text.len());
    assert!(stack.text.ends_with("[cut after 64 KiB]\n"));
}

#[test]
fn a_debugger_that_is_refused_is_followed_by_the_next() {
    let scene = Scene::new();
    tools(&scene, "gdb", "echo 'ptrace: Operation not permitted.' >&2");
    let probe = tools(
        &scene,
        "eu-stack",
        "echo PID; echo 'TID 7:'; echo '#0 futex'",
    );
    let hung = Victim::start(FAKE, &["--hang"]);
    let seen = probe.inspect(hung.pid());
    let stack = seen.stack.as_ref().expect("stacks");
    assert_eq!(
        (stack.tool.as_str(), stack.text.as_str()),
        ("eu-stack", "TID 7:\n#0 futex\n")
    );
    assert!(
        seen.to_string().contains("kernel.yama.ptrace_scope"),
        "{seen}"
    );
}

#[test]
fn gdb_shows_the_stacks_of_a_program() {
    let probe = Probe {
        tool_timeout: Duration::from_secs(30),
        timeout: Duration::from_secs(40),
        ..Probe::default()
    };
    if !probe.path.iter().any(|folder| folder.join("gdb").exists()) {
        eprintln!("skipped: no gdb");
        return;
    }
    let hung = Victim::start(FAKE, &["--hang"]);
    hung.seen("futex", &no_tools(), |p| p.summary() == "waiting in futex");
    let seen = probe.inspect(hung.pid());
    // In a container gdb may be refused; then that is said.
    match &seen.stack {
        Some(stack) => {
            assert!(stack.text.starts_with("Thread 1"), "{seen}");
            assert!(stack.text.contains("#0 "), "{seen}");
        }
        None => assert!(seen.to_string().contains("ptrace_scope"), "{seen}"),
    }
    until("the process to go on", || {
        (hung.state() == 'S').then_some(())
    });
}

/// A Python that is no script which looks for one.
fn python() -> Option<String> {
    let mut command = Command::new("python3");
    let output = command
        .args(["-c", "import sys; print(sys.executable)"])
        .output();
    let found = output.ok().filter(|o| o.status.success());
    if found.is_none() {
        eprintln!("skipped: no python3");
    }
    Some(String::from_utf8_lossy(&found?.stdout).trim().to_string())
}

#[test]
fn python_is_recognised_and_py_spy_asked_for() {
    let Some(python) = python() else { return };
    let victim = Victim::start(&python, &["-c", "import time; time.sleep(600)"]);
    let seen = victim.seen("sleep", &no_tools(), |p| {
        p.summary().contains("sleep") || p.summary().contains("select")
    });
    let text = seen.to_string();
    // Beside a virtual environment's Python there may be one.
    if seen.stack.is_none() {
        assert!(text.contains("pip install py-spy"), "{text}");
        assert!(
            text.contains("neither py-spy nor gdb nor eu-stack is here"),
            "{text}"
        );
    }
    let scene = Scene::new();
    let probe = tools(
        &scene,
        "py-spy",
        "echo 'Process 1: python'; echo; echo 'Thread 1 (idle): \"MainThread\"'; echo '    <module> (<string>:1)'",
    );
    let seen = probe.inspect(victim.pid());
    let stack = seen.stack.expect("stacks");
    assert_eq!(stack.tool, "py-spy");
    assert_eq!(
        stack.text,
        "Thread 1 (idle): \"MainThread\"\n    <module> (<string>:1)\n"
    );
}

#[test]
fn an_event_loop_gets_the_answers_in_order() {
    let victims: Vec<Victim> = (0..3).map(|_| Victim::start(FAKE, &["--hang"])).collect();
    let pids: Vec<i32> = victims.iter().map(Victim::pid).collect();
    // Nobody listens there, nor can.
    let held = Port::reserve().unwrap();
    let address = format!("127.0.0.1:{}", held.number);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let findings = runtime
        .block_on(look_into(no_tools(), pids.clone(), Some(address)))
        .unwrap();
    let seen: Vec<i32> = findings.processes.iter().map(|p| p.pid).collect();
    assert_eq!(seen, pids);
    assert!(findings.processes.iter().all(|p| !p.threads.is_empty()));
    assert!(pids.iter().all(|&pid| alive(pid)));
    let ras = findings.ras.expect("NCCL was to be asked");
    assert!(ras.text.contains("cannot ask NCCL at"), "{ras:?}");
}

#[test]
fn the_caller_does_not_wait_for_what_cannot_be_read() {
    let scene = Scene::new();
    let mut probe = tools(&scene, "gdb", "while :; do sleep 0.1; done");
    // Long enough to read what can be read.
    probe.timeout = Duration::from_secs(2);
    probe.tool_timeout = Duration::from_secs(20);
    let hung = Victim::start(FAKE, &["--hang"]);
    let before = Instant::now();
    let text = probe.inspect(hung.pid()).to_string();
    assert!(before.elapsed() < probe.tool_timeout, "{text}");
    assert!(text.contains("the rest could not be read in 2s"), "{text}");
    assert!(text.contains("main thread: "), "{text}");
    // What was begun ends by itself.
    until("the debugger to be ended", || {
        survivors(&scene.path("tools")).is_empty().then_some(())
    });
}
