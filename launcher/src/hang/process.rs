//! What a process is doing, and how that is told.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fmt;

use crate::text::count;

/// A parent that waits for a child that waits for a child...: a shell, a wrapper, the program.
const MAX_WRAPPERS: usize = 4;

/// A process at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    pub command: Option<String>,
    pub rss_bytes: u64,
    /// The main thread first; empty: there is no such process.
    pub threads: Vec<Thread>,
    /// Processes it started.
    pub children: Vec<Process>,
    /// Of the process, or of the child that it waits for.
    pub stack: Option<Stack>,
    /// What could not be found out, and what would help.
    pub notes: Vec<String>,
}

/// A thread as the kernel sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Thread {
    pub tid: i32,
    pub name: String,
    /// As in `ps`: R runs, S waits, D waits and cannot be interrupted, T is stopped, t is traced, Z has ended.
    pub state: char,
    /// Function of the kernel in which it waits.
    pub wchan: Option<String>,
    /// `read of fd 5 (/data/clip.avi)`
    pub syscall: Option<String>,
    /// Functions of the kernel, innermost first; needs privileges.
    pub kernel_stack: Vec<String>,
}

/// Stacks of user space.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stack {
    pub pid: i32,
    /// `py-spy`, `gdb` or `eu-stack`.
    pub tool: String,
    pub text: String,
}

impl Process {
    /// It and its children.
    pub(super) fn members(&self) -> Box<dyn Iterator<Item = &Process> + '_> {
        Box::new(std::iter::once(self).chain(self.children.iter().flat_map(|c| c.members())))
    }

    pub(super) fn set_commands(&mut self, commands: &HashMap<i32, String>) {
        self.command = commands.get(&self.pid).cloned();
        self.children
            .iter_mut()
            .for_each(|c| c.set_commands(commands));
    }

    /// Itself, or where it is a wrapper that only waits for its child, that child.
    pub fn program(&self) -> &Process {
        let mut program = self;
        for _ in 0..MAX_WRAPPERS {
            let waits = (program.threads.first())
                .and_then(|t| t.syscall.as_deref())
                .is_some_and(|s| s.starts_with("wait4") || s.starts_with("waitid"));
            match program.children.as_slice() {
                [child] if waits && !child.threads.is_empty() => program = child,
                _ => break,
            }
        }
        program
    }

    /// Why a debugger must keep away.
    pub(super) fn cannot_be_stopped(&self) -> Option<String> {
        let of = |state: char| self.threads.iter().find(|t| t.state == state);
        if let Some(thread) = of('D') {
            return Some(format!("thread {} cannot be interrupted", thread.tid));
        }
        if of('T').is_some() {
            return Some("it is stopped; SIGCONT lets it go on".into());
        }
        if of('t').is_some() {
            return Some("another debugger holds it".into());
        }
        match self.threads.first().map(|t| t.state) {
            Some('Z' | 'X') => Some("it has ended".into()),
            _ => None,
        }
    }

    /// What it does, in a few words.
    pub fn summary(&self) -> String {
        let program = self.program();
        let blocked = program.threads.iter().skip(1).find(|t| t.state == 'D');
        match (program.threads.first(), blocked) {
            (None, _) => "gone".into(),
            (Some(main), Some(other)) if main.state != 'D' => {
                format!("{}; thread {}: {}", main.doing(), other.name, other.doing())
            }
            (Some(main), _) => main.doing(),
        }
    }

    /// What its main thread does, without numbers and names, for comparing ranks.
    pub fn kind(&self) -> (char, String) {
        let Some(main) = self.program().threads.first() else {
            return ('?', String::new());
        };
        let syscall = main.syscall.as_deref().unwrap_or_default();
        let name = syscall.split(" of fd ").next().unwrap_or_default();
        (main.state, name.into())
    }

    /// Stopped, or in a wait that cannot be interrupted: nothing that a rank in a collective does.
    pub fn is_stuck(&self) -> bool {
        let program = self.program();
        let main = program.threads.first().map(|t| t.state);
        matches!(main, Some('T' | 't' | 'Z' | 'X'))
            || program.threads.iter().any(|t| t.state == 'D')
    }
}

impl Thread {
    /// `waiting in read of fd 5 (/data/clip.avi)`
    pub fn doing(&self) -> String {
        let state = match self.state {
            'R' => "running",
            'S' | 'I' => "waiting",
            'D' => "in state D (the kernel waits, and no signal ends that)",
            'T' => "stopped by a signal",
            't' => "held by a debugger",
            'Z' | 'X' => "ended",
            other => return format!("in state {other}"),
        };
        match (&self.syscall, &self.wchan) {
            (Some(syscall), Some(wchan)) if self.state == 'D' => {
                format!("{state}, {syscall}, in the kernel's {wchan}")
            }
            (Some(syscall), _) => format!("{state} in {syscall}"),
            (None, Some(wchan)) => format!("{state} in the kernel's {wchan}"),
            (None, None) => state.into(),
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, 0)?;
        if let Some(stack) = &self.stack {
            writeln!(f, "stacks of process {} by {}:", stack.pid, stack.tool)?;
            for line in stack.text.lines() {
                writeln!(f, "  {line}")?;
            }
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}

impl Process {
    fn write(&self, f: &mut fmt::Formatter<'_>, depth: usize) -> fmt::Result {
        let indent = "  ".repeat(depth);
        let command = self.command.as_deref().unwrap_or("[no command line]");
        let mib = self.rss_bytes >> 20;
        writeln!(f, "{indent}process {}, {mib} MiB: {command}", self.pid)?;
        let Some((main, others)) = self.threads.split_first() else {
            return Ok(());
        };
        writeln!(f, "{indent}  main thread: {}", main.doing())?;
        let mut alike: BTreeMap<String, (usize, Vec<&str>)> = BTreeMap::new();
        for thread in others {
            let (number, names) = alike.entry(thread.doing()).or_default();
            *number += 1;
            if !names.contains(&thread.name.as_str()) && names.len() < 4 {
                names.push(&thread.name);
            }
        }
        for (doing, (number, names)) in alike {
            let threads = count(number, "more thread");
            writeln!(f, "{indent}  {threads} ({}): {doing}", names.join(", "))?;
        }
        for thread in &self.threads {
            if thread.state == 'D' && !thread.kernel_stack.is_empty() {
                let frames = thread.kernel_stack.join(" < ");
                writeln!(
                    f,
                    "{indent}  kernel stack of thread {}: {frames}",
                    thread.tid
                )?;
            }
        }
        self.children.iter().try_for_each(|c| c.write(f, depth + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(state: char, syscall: &str) -> Thread {
        Thread {
            tid: 7,
            name: "python".into(),
            state,
            syscall: (!syscall.is_empty()).then(|| syscall.into()),
            wchan: Some("nfs_wait".into()),
            ..Thread::default()
        }
    }

    fn process(pid: i32, threads: &[Thread]) -> Process {
        Process {
            pid,
            threads: threads.to_vec(),
            ..Process::default()
        }
    }

    #[test]
    fn a_wrapper_stands_for_the_program_it_waits_for() {
        let program = process(3, &[thread('S', "futex")]);
        let mut shell = process(1, &[thread('S', "wait4")]);
        let mut inner = process(2, &[thread('S', "wait4")]);
        inner.children = vec![program.clone()];
        shell.children = vec![inner];
        assert_eq!(shell.program().pid, 3);
        assert_eq!(shell.summary(), "waiting in futex");
        // One that does something itself does not.
        shell.threads[0].syscall = Some("futex".into());
        assert_eq!(shell.program().pid, 1);
        // Nor does one with several children.
        let mut pool = process(1, &[thread('S', "wait4")]);
        pool.children = vec![program.clone(), program];
        assert_eq!(pool.program().pid, 1);
    }

    #[test]
    fn what_a_debugger_must_not_touch() {
        let why = |states: &[char]| {
            let threads: Vec<Thread> = states.iter().map(|s| thread(*s, "")).collect();
            process(1, &threads).cannot_be_stopped()
        };
        assert_eq!(why(&['S', 'R', 'S']), None);
        assert!(why(&['S', 'D']).unwrap().contains("thread 7"));
        assert!(why(&['T']).unwrap().contains("SIGCONT"));
        assert!(why(&['t']).is_some() && why(&['Z']).is_some());
    }

    #[test]
    fn threads_that_do_the_same_share_a_line() {
        let mut threads = vec![thread('S', "futex"); 5];
        threads[3].name = "pt_nccl".into();
        threads[4] = thread('D', "read of fd 5 (/nfs/a)");
        threads[4].kernel_stack = vec!["nfs_wait".into(), "nfs_read".into()];
        let process = process(42, &threads);
        assert_eq!(
            process.to_string(),
            "process 42, 0 MiB: [no command line]
  main thread: waiting in futex
  1 more thread (python): in state D (the kernel waits, and no signal ends that), read of fd 5 (/nfs/a), in the kernel's nfs_wait
  3 more threads (python, pt_nccl): waiting in futex
  kernel stack of thread 7: nfs_wait < nfs_read
"
        );
        assert!(process.is_stuck());
        assert_eq!(
            process.summary(),
            "waiting in futex; thread python: in state D (the kernel waits, and no signal ends that), read of fd 5 (/nfs/a), in the kernel's nfs_wait"
        );
    }
}
