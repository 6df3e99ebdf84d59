//! Debuggers that print the stacks of a process, run with a limit of time and of size.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, set_parent_process_death_signal,
};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// More of an answer is read, but not kept.
pub const MAX_BYTES: usize = 64 << 10;
/// Of the errors.
const MAX_ERROR: usize = 4 << 10;
const MAX_LINE: usize = 240;
/// How long a debugger has after SIGTERM to let go of the process.
const GRACE: Duration = Duration::from_millis(500);

/// A debugger.
pub struct Tool {
    pub name: &'static str,
    pub python_only: bool,
    args: &'static [&'static str],
    /// The process to look into follows.
    pid_flag: &'static str,
    /// What the first useful line begins with.
    begins: &'static str,
}

/// In the order in which they are tried.
pub const TOOLS: [Tool; 3] = [
    Tool {
        name: "py-spy",
        python_only: true,
        args: &["dump"],
        pid_flag: "--pid",
        begins: "Thread ",
    },
    Tool {
        name: "gdb",
        python_only: false,
        // The main thread first, since the end may be cut.
        args: &[
            "-nx",
            "-batch",
            "-iex",
            "set auto-load no",
            "-ex",
            "set width 0",
            "-ex",
            "set print frame-arguments none",
            "-ex",
            "thread apply all -ascending bt 40",
        ],
        pid_flag: "-p",
        begins: "Thread ",
    },
    Tool {
        name: "eu-stack",
        python_only: false,
        args: &["-n", "40"],
        pid_flag: "-p",
        begins: "TID ",
    },
];

/// What a debugger said.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome {
    /// The stacks, in lines; empty: none.
    pub text: String,
    /// It was ended before it was done.
    pub killed: bool,
    /// Why there are none, or not all.
    pub problem: Option<String>,
}

impl Tool {
    /// The first program of this name in `path` that may be executed.
    pub fn find(&self, path: &[PathBuf]) -> Option<PathBuf> {
        let executable = |program: &PathBuf| {
            fs_err::metadata(program)
                .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        };
        (path.iter().map(|folder| folder.join(self.name))).find(executable)
    }

    /// Waits up to `timeout` and a little. The debugger dies with the calling thread.
    pub fn run(&self, program: &Path, pid: i32, timeout: Duration) -> Outcome {
        let mut command = Command::new(program);
        command
            .args(self.args)
            .arg(self.pid_flag)
            .arg(pid.to_string());
        // gdb would ask a server on the network for the symbols of every library.
        command.env_remove("DEBUGINFOD_URLS").env("LC_ALL", "C");
        match read_all(command, timeout) {
            Ok(raw) => self.outcome(&raw, timeout),
            Err(e) => Outcome {
                problem: Some(format!("cannot be run: {e}")),
                ..Outcome::default()
            },
        }
    }

    fn outcome(&self, raw: &Raw, timeout: Duration) -> Outcome {
        let out = String::from_utf8_lossy(&raw.out);
        let lines = out.lines().skip_while(|l| !l.starts_with(self.begins));
        let lines = lines.filter(|l| !l.starts_with("[Inferior ") && !l.trim().is_empty());
        let lines = lines.map(|l| l.chars().take(MAX_LINE).collect());
        let mut text = share(lines.collect(), self.begins);
        if raw.cut && !text.is_empty() {
            text += &format!("[cut after {} KiB]\n", MAX_BYTES >> 10);
        }
        let problem = if raw.killed {
            let limit = super::progress::time(timeout);
            Some(format!("was ended after {limit}, before it was done"))
        } else if text.is_empty() {
            Some(complaint(&raw.err, &out))
        } else {
            None
        };
        Outcome {
            text,
            killed: raw.killed,
            problem,
        }
    }
}

/// The stacks, those that are the same only once: a program with a GPU has dozens of threads that wait alike.
fn share(lines: Vec<String>, begins: &str) -> String {
    let mut stacks: Vec<(Vec<String>, Vec<&String>, usize)> = Vec::new();
    for stack in lines.chunk_by(|_, next| !next.starts_with(begins)) {
        // Addresses differ from thread to thread.
        let words = |line: &String| {
            let words = line.split_ascii_whitespace();
            let same: Vec<&str> = words.filter(|w| !w.starts_with("0x")).collect();
            same.join(" ")
        };
        let frames: Vec<String> = stack[1..].iter().map(words).collect();
        match stacks.iter_mut().find(|(known, ..)| *known == frames) {
            Some((_, _, more)) => *more += 1,
            None => stacks.push((frames, stack.iter().collect(), 0)),
        }
    }
    let mut text = String::new();
    for (_, lines, more) in stacks {
        for line in lines {
            text += line;
            text += "\n";
        }
        if more > 0 {
            let threads = crate::text::count(more, "more thread");
            text += &format!("[{threads} with this stack]\n");
        }
    }
    text
}

/// Why a debugger that is done has shown nothing.
fn complaint(err: &[u8], out: &str) -> String {
    let err = String::from_utf8_lossy(err);
    let said: Vec<&str> = (err.lines().chain(out.lines()))
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with("warning:"))
        .collect();
    let refused = (said.iter()).find(|l| {
        let l = l.to_lowercase();
        l.contains("not permitted") || l.contains("permission denied")
    });
    match (refused, said.last()) {
        (Some(line), _) => format!(
            "{line} (it needs CAP_SYS_PTRACE, in a container --cap-add SYS_PTRACE, or kernel.yama.ptrace_scope = 0)"
        ),
        (None, Some(line)) => format!("shows no stack: {line}"),
        (None, None) => "shows no stack".into(),
    }
}

/// All that a program wrote.
#[derive(Debug, Default)]
struct Raw {
    out: Vec<u8>,
    err: Vec<u8>,
    cut: bool,
    killed: bool,
}

#[expect(unsafe_code, reason = "a system call between fork and exec")]
fn read_all(mut command: Command, timeout: Duration) -> std::io::Result<Raw> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    // Otherwise a debugger that hangs outlives a launcher that is killed.
    let die_with_parent = || Ok(set_parent_process_death_signal(Some(Signal::KILL))?);
    // SAFETY: the closure makes one system call, and allocates nothing.
    unsafe { command.pre_exec(die_with_parent) };
    let deadline = Instant::now() + timeout;
    let mut child = command.spawn()?;
    let mut raw = Raw::default();
    let read = raw.follow(&mut child, deadline);
    if read.is_err() || !raw.killed && !ends(&child, deadline) {
        raw.killed = true;
    }
    if raw.killed {
        let group = Pid::from_child(&child);
        let _ = kill_process_group(group, Signal::TERM);
        ends(&child, Instant::now() + GRACE);
        // Its own children too, and also where it has ended: it is not yet reaped, so the number is still its own.
        let _ = kill_process_group(group, Signal::KILL);
    }
    child.wait()?;
    read.map(|()| raw)
}

impl Raw {
    /// Reads both streams to their ends, or until the deadline: then `killed` is set.
    fn follow(&mut self, child: &mut Child, deadline: Instant) -> std::io::Result<()> {
        let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) else {
            unreachable!("both streams were asked for")
        };
        let mut streams = [
            (File::from(OwnedFd::from(out)), &mut self.out, MAX_BYTES),
            (File::from(OwnedFd::from(err)), &mut self.err, MAX_ERROR),
        ]
        .map(Some);
        let mut buffer = [0u8; 16 << 10];
        while streams.iter().any(Option::is_some) {
            let Some(left) = left(deadline) else {
                self.killed = true;
                break;
            };
            let open = streams.iter().flatten();
            let mut fds: Vec<PollFd> = open.map(|s| PollFd::new(&s.0, PollFlags::IN)).collect();
            rustix::io::retry_on_intr(|| poll(&mut fds, Some(&left)))?;
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            let open = streams.iter_mut().filter(|s| s.is_some());
            for (stream, _) in open.zip(ready).filter(|(_, ready)| *ready) {
                let Some((file, kept, most)) = stream else {
                    continue;
                };
                let n = file.read(&mut buffer)?;
                let room = *most - kept.len();
                self.cut |= n > room && *most == MAX_BYTES;
                kept.extend_from_slice(&buffer[..n.min(room)]);
                if n == 0 {
                    *stream = None;
                }
            }
        }
        Ok(())
    }
}

/// Whether it ends in time. It is not reaped.
fn ends(child: &Child, deadline: Instant) -> bool {
    let Ok(pidfd) = pidfd_open(Pid::from_child(child), PidfdFlags::empty()) else {
        return false;
    };
    let left = left(deadline).unwrap_or(Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    });
    let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut fds, Some(&left))).is_ok_and(|n| n > 0)
}

fn left(deadline: Instant) -> Option<Timespec> {
    let left = deadline.saturating_duration_since(Instant::now());
    (!left.is_zero()).then(|| Timespec {
        tv_sec: left.as_secs() as i64,
        tv_nsec: left.subsec_nanos().into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(out: &str, err: &str) -> Raw {
        Raw {
            out: out.into(),
            err: err.into(),
            ..Raw::default()
        }
    }

    const GDB: &Tool = &TOOLS[1];
    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn only_the_stacks_are_kept() {
        let out = "\
[Thread debugging using libthread_db enabled]
0x00007fe2 in clock_nanosleep () from /lib/libc.so.6

Thread 1 (Thread 0x7fe2dec27740 (LWP 22533) \"sleep\"):
#0  0x00007fe2 in clock_nanosleep () from /lib/libc.so.6

[Inferior 1 (process 22533) detached]
";
        let outcome = GDB.outcome(&raw(out, "warning: no symbols"), LIMIT);
        assert_eq!(outcome.problem, None);
        assert_eq!(outcome.text.lines().count(), 2, "{}", outcome.text);
        assert!(outcome.text.starts_with("Thread 1"));
        assert!(outcome.text.ends_with("libc.so.6\n"));
    }

    #[test]
    fn stacks_that_are_the_same_are_shown_once() {
        let out = "\
Thread 1 (LWP 1 \"a\"):
#0  0x0001 in futex () from /lib/libc.so.6
Thread 2 (LWP 2 \"b\"):
#0  0x0002 in poll () from /lib/libc.so.6
#1  0x0003 in watch (x=...)
Thread 3 (LWP 3 \"b\"):
#0  0x0002 in poll () from /lib/libc.so.6
#1  0x0003 in other (x=...)
Thread 4 (LWP 4 \"b\"):
#0  0x0012 in poll () from /lib/libc.so.6
#1  0x0013 in watch (x=...)
";
        let text = GDB.outcome(&raw(out, ""), LIMIT).text;
        let without = out[..out.find("Thread 4").unwrap()].to_string();
        let shared = "watch (x=...)\n[1 more thread with this stack]\n";
        assert_eq!(text, without.replace("watch (x=...)\n", shared));
    }

    #[test]
    fn a_refusal_comes_with_its_remedy() {
        let err = "warning: x\nptrace: Operation not permitted.\nNo threads.\n";
        let problem = GDB.outcome(&raw("", err), LIMIT).problem.unwrap();
        assert!(
            problem.contains("Operation not permitted") && problem.contains("SYS_PTRACE"),
            "{problem}"
        );
        let problem = GDB.outcome(&raw("", "no such process\n"), LIMIT).problem;
        assert_eq!(problem.unwrap(), "shows no stack: no such process");
    }

    #[test]
    fn a_cut_or_ended_answer_says_so() {
        let cut = Raw {
            cut: true,
            killed: true,
            ..raw("Thread 1\n#0 main\n", "")
        };
        let outcome = GDB.outcome(&cut, LIMIT);
        assert_eq!(outcome.text, "Thread 1\n#0 main\n[cut after 64 KiB]\n");
        assert_eq!(
            outcome.problem.unwrap(),
            "was ended after 5s, before it was done"
        );
    }
}
