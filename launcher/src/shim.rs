//! What this executable does when the launcher starts it again: become a worker, or guard.

mod exec;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::process::{Signal, getppid, set_parent_process_death_signal, setsid};
use rustix::stdio::dup2_stdin;
use rustix::thread::sched_setaffinity;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use tsm_job::exit;
use tsm_job::message::{AgentLink, FailureRecord, WorkerMessage};

use crate::class::unstarted::{UNEXECUTED, UNPREPARED};
use crate::contain::{self, Containment};
use crate::cores;
use crate::say::tell;

/// First argument of a shim: `__worker PARENT_PID CORES SHIELD GROUP AGENT PROGRAM ARGS...`.
pub const WORKER: &str = "__worker";
/// First argument of the guard: `__guard`, then [`Containment::words`].
pub const GUARD: &str = "__guard";
/// First argument of a process that tries whether it can be moved to a control group: `__enter GROUP`.
pub const ENTER: &str = "__enter";
/// Last line to a guard whose launcher ends in order.
pub const DISMISS: &str = "done";

/// Before the milliseconds within which the next such line must come.
pub const LEASE: &str = "lease";

/// Third argument of a worker that is to ignore SIGTERM.
const SHIELD: &str = "shield";

/// Fifth argument of a worker whose stdin is its agent socket.
const AGENT: &str = "agent";

/// Lowest number of a worker's agent socket, above the files and sockets that it opens itself. A dying process
/// closes its descriptors from the highest down (Linux 4.4 and newer, `task_work_run`), so the launcher hears of
/// a death before the peers do, however long the driver then takes to close the GPU.
const AGENT_FD: i32 = 1000;

/// How long the guard tries to end processes: in state D they may take a while.
const PATIENCE: Duration = Duration::from_secs(10);

/// The codes of a shell for a program that cannot be executed, and for one that is not there.
const CANNOT_EXECUTE: i32 = 126;
const NOT_FOUND: i32 = 127;

/// The first arguments of a shim that only binds a process to the life of this one: it gets no cores, shield,
/// control group or agent socket of its own. The program and its arguments follow.
pub fn plain() -> [OsString; 6] {
    arguments("", "", Path::new(""), "")
}

/// The same for a worker, with what it gets of its own. Its stdin is its agent socket.
pub fn bound(cores: &[usize], shielded: bool, group: Option<&Path>) -> [OsString; 6] {
    let shield = if shielded { SHIELD } else { "" };
    let group = group.unwrap_or(Path::new(""));
    arguments(&cores::to_list(cores), shield, group, AGENT)
}

fn arguments(cores: &str, shield: &str, group: &Path, agent: &str) -> [OsString; 6] {
    let parent = std::process::id().to_string();
    [
        WORKER.into(),
        parent.into(),
        cores.into(),
        shield.into(),
        group.into(),
        agent.into(),
    ]
}

/// Makes this process a worker: a session of its own, dead as soon as the launcher is, in its control group,
/// bound to its cores; then exec. Returns only when that failed.
pub fn worker(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    let parent = args.next().and_then(|a| a.to_str()?.parse::<i32>().ok());
    let cores = args.next().unwrap_or_default();
    let shield = args.next().unwrap_or_default();
    let group = args.next().unwrap_or_default();
    let agent = args.next().unwrap_or_default();
    let (Some(parent), Some(program)) = (parent, args.next()) else {
        tell(format_args!("error: {WORKER} is for tsm-launch itself"));
        return ExitCode::from(exit::USAGE as u8);
    };
    let agent = (agent == AGENT).then(take_agent).transpose();
    let socket = match &agent {
        Ok(Some((socket, _))) => Some(*socket),
        _ => None,
    };
    let end = |cause: &str, code: i32, what: &str, error: std::io::Error| {
        let message = format!("cannot start {}: {what}: {error}", program.display());
        tell(format_args!("error: {message}"));
        explain(socket, cause, code, message);
        ExitCode::from(code as u8)
    };
    let fail = |what: &str, error: std::io::Error| end(UNPREPARED, exit::PREFLIGHT, what, error);
    let agent = match agent {
        Ok(agent) => agent,
        Err(e) => return fail("no agent socket", e),
    };
    if let Err(e) = setsid() {
        return fail("no session of its own", e.into());
    }
    if let Err(e) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return fail("no parent-death signal", e.into());
    }
    // The launcher may have died before the line above; its death signal then never comes.
    if getppid().map(|p| p.as_raw_nonzero().get()) != Some(parent) {
        return ExitCode::from(exit::PREFLIGHT as u8);
    }
    if !group.is_empty()
        && let Err(e) = contain::enter(Path::new(&group))
    {
        return fail("cannot enter its control group", e);
    }
    if let Some(set) = cores.to_str().and_then(cores::from_list)
        && let Err(e) = sched_setaffinity(None, &set)
    {
        return fail("its cores are not available", e.into());
    }
    if shield == SHIELD {
        ignore_sigterm();
    }
    if let Some((_, agent)) = agent
        && !is_watched(&agent)
    {
        return ExitCode::from(exit::PREFLIGHT as u8);
    }
    let error = exec::exec(&program, args.collect());
    let code = match error.kind() {
        ErrorKind::NotFound => NOT_FOUND,
        _ => CANNOT_EXECUTE,
    };
    end(UNEXECUTED, code, "exec", error)
}

/// Says to the agent why the worker ends. What became of the program is then no guess from its exit code.
fn explain(socket: Option<i32>, cause: &str, code: i32, message: String) {
    let rank = std::env::var("RANK")
        .ok()
        .and_then(|rank| rank.parse().ok());
    let record = FailureRecord {
        rank: rank.unwrap_or(0),
        step: None,
        code,
        cause: cause.into(),
        message,
        backtrace: None,
    };
    AgentLink::open(socket).send(&WorkerMessage::Failure(record));
}

/// Waits until the launcher watches this worker, see [`crate::watch`]; `false` when it never will.
fn is_watched(agent: &OwnedFd) -> bool {
    let read = rustix::io::retry_on_intr(|| rustix::io::read(agent, &mut [0u8; 1]));
    read.is_ok_and(|n| n == 1)
}

/// Moves the agent socket from stdin to the number that it has in the worker, and notes that for the worker. The same
/// socket until the exec, too.
#[expect(unsafe_code, reason = "the environment is changed before the exec")]
fn take_agent() -> std::io::Result<(i32, OwnedFd)> {
    let stdin = rustix::stdio::stdin();
    let own = fcntl_dupfd_cloexec(stdin, 3)?;
    // Where the limit of open files is lower, it gets the next that is free.
    let agent = fcntl_dupfd_cloexec(stdin, AGENT_FD).or_else(|_| fcntl_dupfd_cloexec(stdin, 3))?;
    dup2_stdin(fs_err::File::open("/dev/null")?)?;
    fcntl_setfd(&agent, FdFlags::empty())?;
    let number = agent.into_raw_fd();
    // SAFETY: a shim has one thread.
    unsafe { std::env::set_var("TSM_AGENT_FD", number.to_string()) };
    Ok((number, own))
}

/// Both dispositions outlive the exec. SIGINT may have been ignored by a shell that started us in the background.
#[expect(unsafe_code, reason = "rustix sets no dispositions")]
fn ignore_sigterm() {
    // SAFETY: neither SIG_IGN nor SIG_DFL runs code of ours.
    unsafe {
        libc::signal(libc::SIGTERM, libc::SIG_IGN);
        libc::signal(libc::SIGINT, libc::SIG_DFL);
    }
}

/// Whether a process can enter a control group, see [`Containment::open`].
pub fn enter(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    match args.next().map(|group| contain::enter(Path::new(&group))) {
        Some(Ok(())) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// Waits for the launcher to end. Workers die with it by themselves; what they started does
/// not, so if the launcher ended without saying [`DISMISS`], every process of the generation is killed.
///
/// The same happens when a lease runs out (a line [`LEASE`] and milliseconds renews it): the launcher is
/// then stopped or cut off, and its ranks would run on beside those that replace them.
pub fn guard(args: impl Iterator<Item = OsString>) -> ExitCode {
    let words = args.filter_map(|word| word.into_string().ok());
    let Some(mut containment) = Containment::join(words) else {
        tell(format_args!("error: {GUARD} is for tsm-launch itself"));
        return ExitCode::from(exit::USAGE as u8);
    };
    // A signal to the launcher's process group or terminal must not end the guard first.
    if setsid().is_err() {
        return ExitCode::FAILURE;
    }
    let mut lease: Option<Instant> = None;
    let (mut pending, mut buffer) = (Vec::new(), [0u8; 4096]);
    let stdin = std::io::stdin();
    loop {
        let left = lease.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left.map(|d| Timespec::try_from(d).unwrap_or_default());
        let mut polled = [PollFd::new(&stdin, PollFlags::IN)];
        match poll(&mut polled, left.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            // The lease has run out, or nothing can be known any more.
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        match rustix::io::read(&stdin, &mut buffer) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(0) | Err(_) => break,
            Ok(n) => pending.extend_from_slice(&buffer[..n]),
        }
        while let Some(end) = pending.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let mut words = line.split_ascii_whitespace().peekable();
            match words.peek() {
                Some(&DISMISS) => {
                    remove(&containment, |_| {});
                    return ExitCode::SUCCESS;
                }
                Some(&LEASE) => {
                    let ms = words.nth(1).and_then(|ms| ms.parse().ok());
                    lease = ms.map(|ms| Instant::now() + Duration::from_millis(ms));
                }
                _ => words
                    .filter_map(|pid| pid.parse().ok())
                    .for_each(|session| containment.add(session)),
            }
        }
    }
    containment.end(PATIENCE);
    // A worker that was being started may still have come.
    remove(&containment, |containment| containment.end(Duration::ZERO));
    ExitCode::SUCCESS
}

/// Removes the control group; a process that has died takes the kernel a moment.
fn remove(containment: &Containment, meanwhile: impl Fn(&Containment)) {
    let start = Instant::now();
    while !containment.remove() && start.elapsed() < PATIENCE {
        meanwhile(containment);
        std::thread::sleep(Duration::from_millis(2));
    }
}
