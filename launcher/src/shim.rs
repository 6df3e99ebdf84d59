//! What this executable does when the launcher starts it again: become a worker, or guard.

use rustix::process::{Signal, getppid, set_parent_process_death_signal, setsid};
use rustix::thread::sched_setaffinity;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use crate::{cores, process};

/// First argument of a shim: `__worker PARENT_PID CORES PROGRAM ARGS...`.
pub const WORKER: &str = "__worker";
/// First argument of the guard: `__guard`.
pub const GUARD: &str = "__guard";
/// Last line to a guard whose launcher ends in order.
pub const DISMISS: &str = "done";

/// The code of a shell for a program that cannot be executed.
const CANNOT_EXECUTE: u8 = 126;

/// Makes this process a worker: a session of its own, dead as soon as the launcher is,
/// bound to its cores; then exec. Returns only when that failed.
pub fn worker(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    let parent = args.next().and_then(|a| a.to_str()?.parse::<i32>().ok());
    let cores = args.next().unwrap_or_default();
    let (Some(parent), Some(program)) = (parent, args.next()) else {
        eprintln!("error: {WORKER} is for tsm-launch itself");
        return ExitCode::from(tsm_job::exit::USAGE as u8);
    };
    let fail = |what: &str, error: &dyn std::fmt::Display| {
        eprintln!("error: cannot start {}: {what}: {error}", program.display());
        ExitCode::from(CANNOT_EXECUTE)
    };
    if let Err(e) = setsid() {
        return fail("no session of its own", &e);
    }
    if let Err(e) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return fail("no parent-death signal", &e);
    }
    // The launcher may have died before the line above; its death signal then never comes.
    if getppid().map(|p| p.as_raw_nonzero().get()) != Some(parent) {
        return ExitCode::from(CANNOT_EXECUTE);
    }
    if let Some(set) = cores.to_str().and_then(cores::from_list)
        && let Err(e) = sched_setaffinity(None, &set)
    {
        return fail("its cores are not available", &e);
    }
    let error = Command::new(&program).args(args).exec();
    fail("exec", &error)
}

/// Waits for the launcher to end. Workers die with it by themselves; what they started does
/// not, so if the launcher ended without saying [`DISMISS`], every member of the workers' sessions is killed.
pub fn guard() -> ExitCode {
    // A signal to the launcher's process group or terminal must not end the guard first.
    if setsid().is_err() {
        return ExitCode::FAILURE;
    }
    let mut sessions: Vec<i32> = Vec::new();
    for line in BufReader::new(std::io::stdin())
        .lines()
        .map_while(Result::ok)
    {
        if line == DISMISS {
            return ExitCode::SUCCESS;
        }
        sessions.extend(
            line.split_ascii_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
    }
    process::kill_sessions(&sessions, 50);
    ExitCode::SUCCESS
}
