//! A worker that misbehaves on demand: the double for a trainer in the launcher's tests.
//!
//! Actions are done in the order given; after the last one it ends with code 0. `--on-rank K` makes every
//! other rank hang instead.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FallocateFlags, FlockOperation, MemfdFlags, fallocate, flock, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, kill_process, pidfd_open};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Duration;
use tsm_job::message::{AgentLink, FailureRecord, WorkerMessage};

const HELP: &str = "actions:
  --on-rank K        only rank K does what follows; others hang
  --when NAME=VALUE  what follows up to `--end` is done only where the variable has this value
  --exit N           end with this code
  --kill N           send this signal to itself
  --sleep-ms N       wait
  --hang             wait for ever
  --wait-in-d        wait for ever in state D, where only SIGKILL is heard
  --ignore-sigterm   from now on
  --exit-on N CODE   from now on, end with CODE on signal N
  --say TEXT         a line on stderr
  --spam N           N numbered lines on stdout and on stderr each
  --raw HEX          these bytes on stderr
  --print-env        every variable on stdout, as NAME=value
  --print-cores      the cores it may use
  --fork             start a child that hangs, and print its pid
  --daemon PATH      start a process that leaves the session and its parent, ignores SIGTERM and hangs; `--touch PATH`
  --step N           report a finished step
  --work PATH MS     report steps of MS milliseconds of its own work each, until such a file exists
  --section NAME     report what it does from now on
  --close-agent      close the agent socket
  --in-thread        end the first thread; another one does the rest
  --hello            greet
  --version N V      report the version V of N
  --resumed N PATH   report the checkpoint of N steps from which it goes on
  --record CAUSE     report a failure
  --error-file TEXT  write torch's error file
  --touch PATH       make a file, its pid and rank in it; `{rank}` in PATH is the rank
  --wait-for PATH    until such a file exists
  --fill MIB         hold a file of so much memory, which the kernel takes a moment to close
  --lock PATH        lock a file, and keep it until the end
  --wait-death PATH  until the process named in the file has died
  --meet             connect all ranks to rank 0 at MASTER_ADDR and MASTER_PORT, and wait until all are there
  --wait-lost        until one of these connections is closed";

fn main() {
    let rank: u32 = std::env::var("RANK")
        .ok()
        .and_then(|r| r.parse().ok())
        .unwrap_or(0);
    let fd = std::env::var("TSM_AGENT_FD")
        .ok()
        .and_then(|fd| fd.parse().ok());
    let args: Vec<String> = std::env::args().skip(1).collect();
    act(rank, AgentLink::open(fd), args.into_iter());
}

fn act(rank: u32, mut link: AgentLink, mut args: std::vec::IntoIter<String>) {
    let (mut peers, mut made) = (Vec::new(), 0);
    while let Some(action) = args.next() {
        let mut next = || {
            args.next()
                .unwrap_or_else(|| panic!("{action} needs a value\n{HELP}"))
        };
        let number = |text: String| {
            text.parse::<i64>()
                .unwrap_or_else(|_| panic!("not a number: {text}\n{HELP}"))
        };
        match action.as_str() {
            "--on-rank" => {
                if number(next()) != i64::from(rank) {
                    hang();
                }
            }
            "--when" => {
                let condition = next();
                let (name, value) = condition.split_once('=').expect("NAME=VALUE");
                if std::env::var(name).as_deref() != Ok(value) {
                    args.by_ref().find(|word| word == "--end");
                }
            }
            "--end" => {}
            "--exit" => std::process::exit(number(next()) as i32),
            "--kill" => {
                let signal = Signal::from_named_raw(number(next()) as i32).expect("a signal");
                if signal != Signal::KILL {
                    // Rust's own handler of SIGSEGV would take a signal without a fault for nothing.
                    on_signal(signal.as_raw(), libc::SIG_DFL);
                }
                kill_process(getpid(), signal).expect("a process may signal itself");
                hang();
            }
            "--sleep-ms" => std::thread::sleep(Duration::from_millis(number(next()) as u64)),
            "--hang" => hang(),
            "--wait-in-d" => wait_in_d(),
            "--ignore-sigterm" => on_signal(libc::SIGTERM, libc::SIG_IGN),
            "--exit-on" => {
                let signal = number(next()) as i32;
                CODE.store(number(next()) as i32, std::sync::atomic::Ordering::Relaxed);
                on_signal(signal, leave as *const () as libc::sighandler_t);
            }
            "--say" => eprintln!("{}", next()),
            "--spam" => spam(rank, number(next())),
            "--raw" => {
                let hex = next();
                let byte =
                    |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).expect("hexadecimal digits");
                let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
                std::io::stderr().write_all(&bytes).expect("stderr is open");
            }
            "--print-env" => {
                for (name, value) in std::env::vars_os() {
                    println!("{}={}", name.to_string_lossy(), value.to_string_lossy());
                }
            }
            "--print-cores" => println!(
                "cores {}",
                tsm_launch::cores::to_list(&tsm_launch::cores::allowed())
            ),
            "--fork" => {
                let me = std::env::current_exe().expect("this program exists");
                // Left alone on purpose: the launcher has to end it.
                #[expect(clippy::zombie_processes, reason = "it outlives this process")]
                let child = std::process::Command::new(me)
                    .arg("--hang")
                    .spawn()
                    .expect("a child");
                println!("child {}", child.id());
            }
            "--daemon" => {
                let me = std::env::current_exe().expect("this program exists");
                let path = next().replace("{rank}", &rank.to_string());
                let mut between = std::process::Command::new(me);
                let done = between.args(["--leave", &path]).status();
                assert!(done.expect("a child").success());
                wait_for(&PathBuf::from(path));
            }
            "--leave" => {
                rustix::process::setsid().expect("a child leads no group");
                let me = std::env::current_exe().expect("this program exists");
                #[expect(clippy::zombie_processes, reason = "it outlives this process")]
                let _daemon = std::process::Command::new(me)
                    .args(["--ignore-sigterm", "--touch", &next(), "--hang"])
                    .spawn()
                    .expect("a child");
            }
            "--step" => link.send(&WorkerMessage::Step {
                step: number(next()) as u64,
                epoch: 1,
                work_ms: None,
            }),
            "--work" => {
                let (path, ms) = (PathBuf::from(next()), number(next()));
                while !path.exists() {
                    made += 1;
                    link.send(&WorkerMessage::Step {
                        step: made,
                        epoch: 0,
                        work_ms: Some(ms as f64),
                    });
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            "--section" => link.send(&WorkerMessage::Section { name: next() }),
            "--close-agent" => link = AgentLink::open(None),
            "--in-thread" => {
                std::thread::spawn(move || {
                    act(rank, link, args);
                    std::process::exit(0);
                });
                end_thread();
            }
            "--hello" => link.send(&WorkerMessage::Hello {
                rank,
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").into(),
            }),
            "--version" => {
                let versions = [(next(), next())].into();
                link.send(&WorkerMessage::Versions { versions });
            }
            "--resumed" => {
                let step = number(next()) as u64;
                let path = next().into();
                link.send(&WorkerMessage::Resumed { path, step });
            }
            "--record" => link.send(&WorkerMessage::Failure(FailureRecord {
                rank,
                step: Some(3),
                code: 1,
                cause: next(),
                message: "index 7 out of range for a clip of 7 frames".into(),
                backtrace: Some("0: main".into()),
            })),
            "--error-file" => {
                let path = std::env::var("TORCHELASTIC_ERROR_FILE").expect("the launcher sets it");
                let text = serde_json::json!({"message": {"message": next(), "extraInfo": {}}});
                fs_err::write(path, text.to_string()).expect("the folder exists");
            }
            "--touch" => {
                let path = next().replace("{rank}", &rank.to_string());
                fs_err::write(format!("{path}.tmp"), std::process::id().to_string())
                    .expect("the folder exists");
                fs_err::rename(format!("{path}.tmp"), path).expect("the folder exists");
            }
            "--wait-for" => {
                wait_for(&PathBuf::from(next()));
            }
            "--fill" => {
                let file = memfd_create("fill", MemfdFlags::CLOEXEC).expect("a file");
                let bytes = (number(next()) as u64) << 20;
                fallocate(&file, FallocateFlags::empty(), 0, bytes).expect("memory");
                std::mem::forget(file);
            }
            "--lock" => {
                let file = fs_err::File::options()
                    .create(true)
                    .append(true)
                    .open(next())
                    .expect("the folder exists");
                flock(&file, FlockOperation::LockExclusive).expect("a lock");
                std::mem::forget(file);
            }
            "--wait-death" => {
                let pid = wait_for(&PathBuf::from(next()))
                    .parse()
                    .ok()
                    .and_then(Pid::from_raw)
                    .expect("a pid");
                // Gone already is as good as dying now.
                if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) {
                    poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).expect("poll");
                }
            }
            "--meet" => peers = meet(rank),
            "--wait-lost" => {
                // Nobody says anything after the meeting.
                let mut polled: Vec<_> = peers
                    .iter()
                    .map(|peer| PollFd::new(peer, PollFlags::IN))
                    .collect();
                poll(&mut polled, None).expect("poll");
            }
            other => panic!("unknown action {other}\n{HELP}"),
        }
    }
}

static CODE: std::sync::atomic::AtomicI32 = std::sync::atomic::AtomicI32::new(0);

#[expect(unsafe_code, reason = "signal handlers have no safe interface in libc")]
fn on_signal(signal: i32, handler: libc::sighandler_t) {
    // SAFETY: the handler is SIG_IGN, SIG_DFL, or `leave`, which calls only functions that are safe in a handler.
    unsafe { libc::signal(signal, handler) };
}

#[expect(unsafe_code, reason = "a signal handler may only call _exit")]
extern "C" fn leave(_signal: i32) {
    // SAFETY: _exit is async-signal-safe.
    unsafe { libc::_exit(CODE.load(std::sync::atomic::Ordering::Relaxed)) }
}

/// The process lives as long as one of its threads.
#[expect(unsafe_code, reason = "std ends the process with its first thread")]
fn end_thread() -> ! {
    // SAFETY: no other thread has anything that is on the stack of this one.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("a thread does not come back from its end")
}

fn hang() -> ! {
    loop {
        std::thread::park();
    }
}

/// A parent of a vfork waits in state D until its child ends or executes.
#[expect(
    unsafe_code,
    reason = "no safe interface makes a child that does not end its vfork"
)]
fn wait_in_d() -> ! {
    let flags = libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: without CLONE_VM the child has a copy of the memory, as after fork, and this process has one thread;
    // the child makes system calls only.
    unsafe {
        let no = std::ptr::null_mut::<libc::c_void>();
        let parent = libc::getpid();
        if libc::syscall(libc::SYS_clone, flags, no, no, no, no) == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // The parent may have died before the line above.
            while libc::getppid() == parent {
                libc::pause();
            }
            libc::_exit(0);
        }
    }
    hang()
}

fn wait_for(path: &std::path::Path) -> String {
    loop {
        match fs_err::read_to_string(path) {
            Ok(text) => return text,
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    }
}

/// Rank 0's connections to all others, or another rank's connection to rank 0.
fn meet(rank: u32) -> Vec<TcpStream> {
    let var = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let number = |name: &str| var(name).parse::<u16>().expect("a number");
    let at = (var("MASTER_ADDR"), number("MASTER_PORT"));
    let at = (at.0.as_str(), at.1);
    if rank == 0 {
        let listener = TcpListener::bind(at).expect("MASTER_PORT is held for rank 0");
        let accept = |_| listener.accept().expect("a peer").0;
        let peers: Vec<TcpStream> = (1..number("WORLD_SIZE")).map(accept).collect();
        for mut peer in &peers {
            peer.write_all(b"!").expect("a peer");
        }
        return peers;
    }
    let mut peer = loop {
        match TcpStream::connect(at) {
            Ok(peer) => break peer,
            // Rank 0 does not listen yet.
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    peer.read_exact(&mut [0]).expect("rank 0 answers");
    vec![peer]
}

fn spam(rank: u32, lines: i64) {
    let (mut out, mut err) = (std::io::stdout().lock(), Vec::new());
    for i in 0..lines {
        writeln!(out, "out {rank} {i} {}", "o".repeat((i % 90) as usize)).expect("stdout is open");
        writeln!(err, "err {rank} {i} {}", "e".repeat((i % 70) as usize)).expect("memory");
        // Pieces that end in the middle of a line.
        if err.len() > 3001 {
            let rest = err.split_off(3001);
            std::io::stderr().write_all(&err).expect("stderr is open");
            err = rest;
        }
    }
    std::io::stderr().write_all(&err).expect("stderr is open");
}
