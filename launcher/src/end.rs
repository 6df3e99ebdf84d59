//! How a process ended, and what its signal usually means.

use serde::{Deserialize, Serialize};
use std::fmt;
use tsm_job::exit;

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// It returned this exit code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl End {
    /// The code a shell would report: its own, or 128 + the signal.
    pub fn exit_code(self) -> i32 {
        match self {
            End::Code(code) => code,
            End::Signal(signal) => exit::SIGNAL_BASE.saturating_add(signal),
        }
    }

    /// Whether this signal ended it, or a shell reports that of what it ran.
    pub fn is_by(self, signal: i32) -> bool {
        self.exit_code() == exit::SIGNAL_BASE + signal
    }

    pub fn is_success(self) -> bool {
        self == End::Code(0)
    }

    /// What usually stands behind this end, where there is a usual reason. `keeps_codes`: of a program that gives the
    /// exit codes of [`tsm_job::exit`]; to another the same numbers mean what it likes.
    pub fn meaning(self, keeps_codes: bool) -> Option<&'static str> {
        match self {
            End::Code(exit::USAGE..=exit::DO_NOT_REQUEUE) if !keeps_codes => None,
            End::Code(exit::DATA) => Some("an input file is missing or broken"),
            End::Code(exit::PREFLIGHT) => Some("the machine cannot run the job"),
            End::Code(exit::BUG) => Some("a bug of tsm-trainer"),
            End::Code(exit::CANNOT_WRITE) => Some("an output could not be written"),
            End::Code(exit::REQUEUE) => Some("it saved and asks to be started again"),
            End::Code(exit::PEER) => Some("it lost another rank"),
            End::Code(exit::CONFIG) => Some("the configuration is wrong"),
            End::Code(exit::DIVERGED) => Some("the loss was not finite"),
            End::Code(exit::DO_NOT_REQUEUE) => Some("starting again would fail again"),
            End::Code(126) => Some("the program could not be executed"),
            End::Code(127) => Some("the program was not found"),
            End::Signal(libc::SIGKILL) => {
                Some("killed from outside, often by the out-of-memory killer")
            }
            End::Signal(libc::SIGSEGV) => Some("it touched memory it does not own"),
            End::Signal(libc::SIGBUS) => Some("a memory-mapped file shrank, or /dev/shm is full"),
            End::Signal(libc::SIGABRT) => {
                Some("it aborted itself: a failed assertion, or a watchdog")
            }
            End::Signal(libc::SIGILL) => {
                Some("this CPU lacks an instruction the program was built with")
            }
            End::Signal(libc::SIGXCPU) => Some("its limit of CPU time was reached"),
            End::Signal(libc::SIGXFSZ) => Some("its limit of file size was reached"),
            _ => None,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Code(code) => write!(f, "exit code {code}"),
            End::Signal(signal) => write!(f, "signal {signal} ({})", signal_name(*signal)),
        }
    }
}

/// `SIGTERM` for 15, and so on.
pub fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGUSR1 => "SIGUSR1",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGUSR2 => "SIGUSR2",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGALRM => "SIGALRM",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGXFSZ => "SIGXFSZ",
        libc::SIGSYS => "SIGSYS",
        other => return format!("signal {other}"),
    };
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_becomes_128_plus_its_number() {
        assert_eq!(End::Signal(libc::SIGKILL).exit_code(), 137);
        assert_eq!(End::Signal(libc::SIGSEGV).exit_code(), 139);
        assert_eq!(End::Code(17).exit_code(), 17);
        assert_eq!(End::Signal(9).to_string(), "signal 9 (SIGKILL)");
        assert_eq!(End::Signal(64).to_string(), "signal 64 (signal 64)");
    }
}
