//! Looks into processes: the kernel first, then a debugger.
//!
//! The kernel is asked first: it answers at once, and what it says (a wait that nothing interrupts, a file, a socket)
//! is often enough. A debugger stops the process for as long as it looks, so it is used only where that is harmless:
//! a process in state D would not stop, and would be left with a pending SIGSTOP.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::process::{Process, Stack};
use super::{procfs, tool};
use crate::stat::Stat;

/// How processes are looked into.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Folders in which debuggers are looked for.
    pub path: Vec<PathBuf>,
    /// For one debugger.
    pub tool_timeout: Duration,
    /// For everything. Reading `/proc` can block as well, where the kernel holds a lock of the process.
    pub timeout: Duration,
}

impl Default for Probe {
    fn default() -> Probe {
        let path = std::env::var_os("PATH").unwrap_or_default();
        Probe {
            path: std::env::split_paths(&path).collect(),
            tool_timeout: Duration::from_secs(5),
            timeout: Duration::from_secs(15),
        }
    }
}

impl Probe {
    /// Looks into a process that this one may look into: its own descendants. Waits up to [`Probe::timeout`].
    pub fn inspect(&self, pid: i32) -> Process {
        self.inspect_all(&[pid]).remove(0)
    }

    /// As [`Self::inspect`], all at the same time; the answers are in the order of `pids`.
    pub fn inspect_all(&self, pids: &[i32]) -> Vec<Process> {
        let deadline = Instant::now() + self.timeout;
        let looks: Vec<_> = (pids.iter())
            .map(|&pid| {
                let (parts, found) = channel();
                let probe = self.clone();
                // It outlives this call only while the kernel blocks it, which no timeout can prevent.
                let name = format!("inspect-{pid}");
                let thread = std::thread::Builder::new().name(name);
                let started = thread.spawn(move || probe.look(pid, &parts));
                (pid, found, started.is_ok())
            })
            .collect();
        let mut processes = Vec::new();
        for (pid, found, started) in looks {
            let mut process = Process {
                pid,
                ..Process::default()
            };
            if !started {
                process.notes.push("no thread could be started".into());
            }
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                match found.recv_timeout(left) {
                    Ok(part) => part(&mut process),
                    Err(RecvTimeoutError::Disconnected) => break,
                    Err(RecvTimeoutError::Timeout) => {
                        let waited = super::progress::time(self.timeout);
                        let note = format!("the rest could not be read in {waited}");
                        process.notes.push(note);
                        break;
                    }
                }
            }
            processes.push(process);
        }
        processes
    }

    /// Finds out what there is to find, what can block last.
    fn look(&self, pid: i32, parts: &Sender<Part>) {
        let tell = |part: Part| {
            let _ = parts.send(part);
        };
        let pidfd = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let process = procfs::from_kernel(pid, &mut procfs::family());
        let seen = process.clone();
        tell(Box::new(move |p| *p = seen));
        let Some(pidfd) = pidfd.filter(|_| !process.threads.is_empty()) else {
            return tell(note("there is no such process".into()));
        };
        // The kernel needs the memory map of a process for its command line, and a process may hang holding it.
        let commands: HashMap<i32, String> = (process.members())
            .filter_map(|p| Some((p.pid, procfs::command_line(p.pid)?)))
            .collect();
        let known = commands.clone();
        tell(Box::new(move |p| p.set_commands(&known)));

        let target = process.program();
        if let Some(reason) = target.cannot_be_stopped() {
            let what = format!("no debugger was used on process {}: {reason}", target.pid);
            return tell(note(what));
        }
        let target_fd = if target.pid == pid {
            Some(pidfd)
        } else {
            Pid::from_raw(target.pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
        };
        let command = commands.get(&target.pid).cloned().unwrap_or_default();
        self.debug(target.pid, &command, target_fd.as_ref(), &tell);
    }

    /// The first debugger that there is, and that says something.
    fn debug(&self, pid: i32, command: &str, pidfd: Option<&OwnedFd>, tell: &dyn Fn(Part)) {
        let python = procfs::is_python(pid);
        let mut path = self.path.clone();
        // A virtual environment that was not activated.
        let folder = Path::new(command.split(' ').next().unwrap_or_default()).parent();
        path.extend(folder.filter(|f| f.is_absolute()).map(Path::to_path_buf));
        let tools = tool::TOOLS.iter().filter(|t| python || !t.python_only);
        let (found, missing): (Vec<_>, Vec<_>) = tools
            .map(|t| (t, t.find(&path)))
            .partition(|(_, program)| program.is_some());
        let missing: Vec<&str> = missing.iter().map(|(t, _)| t.name).collect();
        if missing.contains(&"py-spy") {
            let text = "install py-spy for the stacks of Python (pip install py-spy)";
            tell(note(text.into()));
        }
        if found.is_empty() {
            let text = format!(
                "no user-space stack: neither {} is here; install {}",
                missing.join(" nor "),
                if python { "py-spy or gdb" } else { "gdb" }
            );
            return tell(note(text));
        }
        for (tool, program) in found {
            let Some(program) = program else { continue };
            let outcome = tool.run(&program, pid, self.tool_timeout);
            // A debugger that was killed, or that failed, may leave the process stopped. That is not what it was.
            let left_stopped = Stat::read(pid).is_some_and(|stat| stat.state == 'T');
            if (outcome.killed || left_stopped)
                && let Some(pidfd) = pidfd
            {
                let _ = pidfd_send_signal(pidfd, Signal::CONT);
            }
            if let Some(problem) = outcome.problem {
                tell(note(format!("{}: {problem}", tool.name)));
            }
            if !outcome.text.is_empty() {
                let stack = Stack {
                    pid,
                    tool: tool.name.into(),
                    text: outcome.text,
                };
                return tell(Box::new(move |p| p.stack = Some(stack)));
            }
            if outcome.killed {
                return;
            }
        }
    }
}

/// Something that was found out, put in its place.
type Part = Box<dyn FnOnce(&mut Process) + Send>;

fn note(text: String) -> Part {
    Box::new(move |process| process.notes.push(text))
}
