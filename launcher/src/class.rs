//! What kind of failure it was, from all that is known about it. Pure.
//!
//! What is certain comes first: a lost node, a documented exit code, a GPU error in the kernel's log. Then what the
//! program said in its own last words, then other lines of its stderr, and last how it ended. Within one text, causes
//! come before consequences: a rank that ran out of memory also loses its peers.

mod signature;
mod texts;
pub mod unstarted;
pub mod words;
pub mod xid;

pub use signature::signature;

use serde::{Deserialize, Serialize};
use std::fmt;
use tsm_job::exit;
use tsm_job::message::FailureRecord;

use crate::cluster::coordinator::NOT_RUNNING;
use crate::end::End;
use crate::oom::OomKills;
use crate::start::children::HELD;

/// Kinds of failure that are answered differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// The program's own error: a Python exception, a Rust panic, an exit code of its own.
    Program,
    Config,
    /// An input file is missing or broken.
    Data,
    /// The loss is not finite.
    Diverged,
    /// An output cannot be written.
    DiskFull,
    /// The kernel's out-of-memory killer, or host memory that could not be had.
    OutOfMemory,
    /// CUDA's.
    GpuOutOfMemory,
    /// A GPU or its driver failed: Xid, ECC, "fell off the bus".
    Hardware,
    /// The launcher could not prepare a worker there: its program was never executed.
    Machine,
    /// A connection between ranks broke, and no rank is known to have failed first.
    Network,
    /// The connection to a node's agent is gone, or the node is silent.
    NodeLost,
    /// No step for too long.
    Hang,
    /// A signal from outside that nobody of ours sent.
    Killed,
    Unknown,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Class::Program => "program error",
            Class::Config => "configuration",
            Class::Data => "input data",
            Class::Diverged => "diverged",
            Class::DiskFull => "output not writable",
            Class::OutOfMemory => "out of memory",
            Class::GpuOutOfMemory => "out of GPU memory",
            Class::Hardware => "hardware",
            Class::Machine => "machine",
            Class::Network => "network",
            Class::NodeLost => "node lost",
            Class::Hang => "hang",
            Class::Killed => "killed from outside",
            Class::Unknown => "unknown",
        })
    }
}

/// What to expect of starting the same ranks once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Again {
    /// It fails again until somebody changes something.
    Fails,
    /// It fails again on this host, and may go well without it.
    Elsewhere,
    MayWork,
}

/// All that is known of the rank, or the node, that failed first.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts<'a> {
    /// `None` when it could not be ended, or its end is not known.
    pub end: Option<End>,
    pub record: Option<&'a FailureRecord>,
    /// The message in torch's error file.
    pub exception: Option<&'a str>,
    /// The last lines.
    pub stderr: &'a [String],
    /// The line of the kernel's log about its end by the out-of-memory killer.
    pub oom_kill: Option<&'a str>,
    /// On its node meanwhile.
    pub oom_kills: OomKills,
    /// Lines of the kernel's log about GPUs of its node.
    pub xids: &'a [String],
    /// How the node was lost.
    pub node_lost: Option<&'a str>,
    /// The job was stopped because it made no step.
    pub hung: bool,
    /// Signals the launcher sent it.
    pub sent: &'a [i32],
}

/// What kind of failure it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub class: Class,
    /// The line that tells, or how it ended where no line does.
    pub evidence: String,
    /// What to do next; empty where nothing can be said beyond the evidence.
    pub hint: String,
    pub again: Again,
}

impl Verdict {
    fn new(class: Class, again: Again, evidence: &str, hint: impl Into<String>) -> Verdict {
        Verdict {
            class,
            evidence: shorten(evidence),
            hint: hint.into(),
            again,
        }
    }
}

/// Characters of evidence.
const WIDTH: usize = 400;

fn shorten(line: &str) -> String {
    let line = line.trim();
    match line.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.into(),
    }
}

/// What kind of failure it was. Always answers; [`Class::Unknown`] where nothing tells.
pub fn classify(facts: &Facts) -> Verdict {
    let looks = [
        lost_node,
        unstarted::verdict,
        documented_code,
        gpu_log,
        hang,
        loader_worker,
        announced,
        signal_from_outside,
        last_words,
        other_lines,
    ];
    let found = looks.iter().find_map(|look| look(facts));
    found.unwrap_or_else(|| by_end(facts))
}

fn lost_node(facts: &Facts) -> Option<Verdict> {
    let how = facts.node_lost?;
    if how.contains(NOT_RUNNING) {
        let hint = "the node itself may be well: see whether the launcher there was stopped (Ctrl-Z, SIGSTOP), or its \
                    machine suspended or overloaded";
        return Some(Verdict::new(Class::NodeLost, Again::MayWork, how, hint));
    }
    let hint = match how.contains(HELD) {
        true => "see who kills processes of this user on the machine where tsm-launch was started",
        false => "see whether the machine is up, was taken by its scheduler, or lost its network",
    };
    Some(Verdict::new(Class::NodeLost, Again::Elsewhere, how, hint))
}

fn documented_code(facts: &Facts) -> Option<Verdict> {
    let code = match (facts.record, facts.end) {
        (Some(record), _) => record.code,
        (None, Some(End::Code(code))) => code,
        _ => return None,
    };
    let until_changed = "starting again fails again until this is changed";
    let (class, again, hint) = match code {
        exit::USAGE | exit::CONFIG => (Class::Config, Again::Fails, until_changed),
        exit::DATA => (Class::Data, Again::Fails, until_changed),
        exit::PREFLIGHT => (
            Class::Hardware,
            Again::Elsewhere,
            "this machine cannot run the job: change what it asks for, or use another one",
        ),
        exit::CANNOT_WRITE => (
            Class::DiskFull,
            Again::MayWork,
            "free some space, or write to another disk",
        ),
        exit::PEER => (Class::Network, Again::MayWork, texts::LOST_PEER_HINT),
        exit::DIVERGED => (
            Class::Diverged,
            Again::Fails,
            "a lower optim.lr, a longer warmup or optim.max_grad_norm may help",
        ),
        exit::DO_NOT_REQUEUE => (Class::Program, Again::Fails, until_changed),
        _ => return None,
    };
    let evidence = match (facts.record, words::of_stderr(facts.stderr).last()) {
        (Some(record), _) => first_line(&record.message).to_owned(),
        (None, Some(words)) => words.to_string(),
        (None, None) => End::Code(code).to_string(),
    };
    // A file that cannot be read today may be there tomorrow: the file server was away, not the file.
    let again = match texts::find([evidence.as_str()], texts::Place::Words) {
        Some((rule, _)) if class == Class::Data && rule.class == Class::Data => rule.again,
        _ => again,
    };
    Some(Verdict::new(class, again, &evidence, hint))
}

fn gpu_log(facts: &Facts) -> Option<Verdict> {
    let (line, xid) = xid::worst(facts.xids)?;
    let (again, what_to_do) = match xid.fault {
        xid::Fault::Node => (Again::Elsewhere, "leave this node out until"),
        xid::Fault::Repaired => (Again::MayWork, "at the next chance"),
        xid::Fault::Program | xid::Fault::Consequence => return None,
    };
    let hint = format!("{}; {what_to_do} {}", xid.meaning, xid.remedy);
    Some(Verdict::new(Class::Hardware, again, line, hint))
}

fn hang(facts: &Facts) -> Option<Verdict> {
    facts.hung.then(|| {
        let last = facts.stderr.iter().rev().find(|l| !l.trim().is_empty());
        let evidence = last.map_or("no step for too long, and nothing on stderr", |l| l);
        let hint = "the stacks say where the late ranks wait; ranks that skip a collective, a data loader without \
                    workers left, and a file server that does not answer are the usual reasons";
        Verdict::new(Class::Hang, Again::MayWork, evidence, hint)
    })
}

/// A failure record without one of the documented codes: a panic, or an error of the program.
fn announced(facts: &Facts) -> Option<Verdict> {
    let record = facts.record?;
    let lines = record.message.lines();
    if let Some((rule, line)) = texts::find(lines, texts::Place::Words) {
        return Some(rule.verdict(line));
    }
    if record.cause == "peer" {
        let (class, hint) = (Class::Network, texts::LOST_PEER_HINT);
        let line = first_line(&record.message);
        return Some(Verdict::new(class, Again::MayWork, line, hint));
    }
    let line = first_line(&record.message);
    Some(Verdict::new(Class::Program, Again::MayWork, line, ""))
}

fn signal_from_outside(facts: &Facts) -> Option<Verdict> {
    let killed_child = facts.end == Some(End::Code(exit::SIGNAL_BASE + libc::SIGKILL));
    let signal = match facts.end? {
        End::Signal(signal) if !facts.sent.contains(&signal) => signal,
        End::Code(_) if killed_child && !facts.sent.contains(&libc::SIGKILL) => libc::SIGKILL,
        _ => return None,
    };
    let end = facts.end?.to_string();
    if let Some(evidence) = out_of_memory(facts).filter(|_| signal == libc::SIGKILL) {
        let evidence = format!("{end}, and {evidence}");
        let (class, hint) = (Class::OutOfMemory, texts::MEMORY_HINT);
        return Some(Verdict::new(class, Again::MayWork, &evidence, hint));
    }
    let hint = match signal {
        libc::SIGKILL => {
            "see who did: `dmesg`, the scheduler's log, or another user of this machine"
        }
        libc::SIGTERM | libc::SIGHUP | libc::SIGINT | libc::SIGUSR1 | libc::SIGUSR2 => {
            "see who did: the scheduler at the end of its time, or another program"
        }
        libc::SIGXCPU | libc::SIGXFSZ => "raise the limit (`ulimit -a`)",
        _ => return None,
    };
    Some(Verdict::new(Class::Killed, Again::MayWork, &end, hint))
}

/// PyTorch does not know how its loader's worker ended; the kernel counts whom it killed.
fn loader_worker(facts: &Facts) -> Option<Verdict> {
    let killer = facts.oom_kills.words()?;
    let record = facts.record.map(|record| record.message.as_str());
    let stderr = facts.stderr.iter().map(String::as_str);
    let mut texts = facts.exception.into_iter().chain(record).chain(stderr);
    let line = texts.find_map(|text| {
        let mut lines = text.lines();
        lines.find(|l| l.contains("DataLoader worker") && l.contains("exited unexpectedly"))
    })?;
    let evidence = format!("{line}, and {killer}");
    let (class, hint) = (Class::OutOfMemory, texts::MEMORY_HINT);
    Some(Verdict::new(class, Again::MayWork, &evidence, hint))
}

/// What says that the out-of-memory killer ended it, or, of one that ended with the code of a shell, its child.
fn out_of_memory(facts: &Facts) -> Option<String> {
    let suspects = match facts.end? {
        End::Signal(_) => facts.oom_kills.unnamed,
        End::Code(_) => facts.oom_kills.all,
    };
    match facts.oom_kill {
        Some(line) => Some(format!("the kernel logged: {line}")),
        None if suspects == 0 => None,
        None => facts.oom_kills.words(),
    }
}

/// The exception, panic or error with which the program ended.
fn last_words(facts: &Facts) -> Option<Verdict> {
    let mut words = words::of_stderr(facts.stderr);
    let exception = facts.exception.and_then(words::of_exception);
    // Where stderr has it too, it comes with its place.
    words.extend(exception.filter(|e| !words.iter().any(|w| w.text == e.text)));
    let lines = || {
        words
            .iter()
            .flat_map(|w| std::iter::once((w, &w.text)).chain(w.more.iter().map(move |m| (w, m))))
    };
    if let Some((rule, line)) =
        texts::find(lines().map(|(_, line)| line.as_str()), texts::Place::Words)
    {
        let told = lines().find(|(_, have)| *have == line);
        return Some(rule.verdict(&told.map_or(line.into(), |(words, _)| words.with_place(line))));
    }
    let told = words.last()?;
    let (class, again) = (Class::Program, Again::MayWork);
    Some(Verdict::new(class, again, &told.to_string(), ""))
}

/// Any other line of stderr that tells. A crash is told by its signal, not by what was logged before.
fn other_lines(facts: &Facts) -> Option<Verdict> {
    if let Some(End::Signal(libc::SIGSEGV | libc::SIGILL | libc::SIGFPE)) = facts.end {
        return None;
    }
    let lines = facts.stderr.iter().map(|line| words::bare(line));
    let (rule, line) = texts::find(lines, texts::Place::Stderr)?;
    // Of a program that was not found, the shell says so too.
    let not_found = matches!(facts.end, Some(End::Code(126 | 127)));
    (!not_found || rule.class == Class::Program).then(|| rule.guess(line))
}

fn by_end(facts: &Facts) -> Verdict {
    let Some(end) = facts.end else {
        let evidence = "how it ended is not known";
        return Verdict::new(Class::Unknown, Again::MayWork, evidence, "");
    };
    let evidence = end.to_string();
    match end {
        End::Code(126 | 127) => {
            let hint = "see whether the program is installed, executable, and in PATH on this node";
            Verdict::new(Class::Config, Again::Fails, &evidence, hint)
        }
        End::Signal(signal) if facts.sent.contains(&signal) => {
            Verdict::new(Class::Unknown, Again::MayWork, &evidence, "")
        }
        End::Signal(libc::SIGBUS) => {
            let hint = "look at the size of /dev/shm, and whether a data file was replaced";
            Verdict::new(Class::Unknown, Again::MayWork, &evidence, hint)
        }
        End::Signal(libc::SIGSEGV | libc::SIGILL | libc::SIGFPE | libc::SIGABRT) => {
            match xid::worst(facts.xids) {
                Some((line, xid)) if xid.fault == xid::Fault::Program => {
                    let hint = format!("{}; {}", xid.meaning, xid.remedy);
                    Verdict::new(Class::Program, Again::MayWork, line, hint)
                }
                _ => {
                    let hint = "PYTHONFAULTHANDLER=1 or a core dump (`ulimit -c unlimited`) shows where it crashed";
                    Verdict::new(Class::Program, Again::MayWork, &evidence, hint)
                }
            }
        }
        End::Signal(_) => Verdict::new(Class::Killed, Again::MayWork, &evidence, ""),
        End::Code(_) => Verdict::new(Class::Program, Again::MayWork, &evidence, ""),
    }
}

fn first_line(text: &str) -> &str {
    let text = text.trim();
    text.lines().next().unwrap_or(text)
}

#[cfg(test)]
mod tests;
