//! What a process is doing, as the kernel and a debugger see it.
//!
//! The kernel is asked first: it answers at once, and what it says (a wait that nothing interrupts, a file, a socket)
//! is often enough. A debugger stops the process for as long as it looks, so it is used only where that is harmless:
//! a process in state D would not stop, and would be left with a pending SIGSTOP.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::tool;
use crate::supervisor::count;

/// Threads and children that are looked at; a process may have thousands.
const MAX_THREADS: usize = 512;
const MAX_CHILDREN: usize = 16;
/// Functions of the kernel that are shown.
const MAX_KERNEL_FRAMES: usize = 8;
/// A parent that waits for a child that waits for a child...: a shell, a wrapper, the program.
const MAX_WRAPPERS: usize = 4;

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

/// What `pid` is doing, for people. Waits up to 15 s, so call it on a thread of its own.
pub fn describe(pid: i32) -> String {
    Probe::default().inspect(pid).to_string()
}

impl Probe {
    /// Looks into a process that this one may look into: its own descendants. Waits up to [`Probe::timeout`].
    ///
    /// A new worker must not be started meanwhile: a debugger would inherit its agent socket.
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
        let all = family();
        let process = from_kernel(pid, &all);
        let seen = process.clone();
        tell(Box::new(move |p| *p = seen));
        let Some(pidfd) = pidfd.filter(|_| !process.threads.is_empty()) else {
            return tell(note("there is no such process".into()));
        };
        // The kernel needs the memory map of a process for its command line, and a process may hang holding it.
        let commands: HashMap<i32, String> = (process.members())
            .filter_map(|p| Some((p.pid, command_line(p.pid)?)))
            .collect();
        let known = commands.clone();
        tell(Box::new(move |p| p.name(&known)));

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
        let python = is_python(pid);
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
            let left_stopped = state(pid).is_some_and(|s| s == 'T');
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

impl Process {
    /// It and its children.
    fn members(&self) -> Box<dyn Iterator<Item = &Process> + '_> {
        Box::new(std::iter::once(self).chain(self.children.iter().flat_map(|c| c.members())))
    }

    fn name(&mut self, commands: &HashMap<i32, String>) {
        self.command = commands.get(&self.pid).cloned();
        self.children.iter_mut().for_each(|c| c.name(commands));
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
    fn cannot_be_stopped(&self) -> Option<String> {
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

/// Children of every process.
fn family() -> HashMap<i32, Vec<i32>> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    let entries = fs_err::read_dir("/proc").into_iter().flatten().flatten();
    for entry in entries {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        if let Some(stat) = read(format!("/proc/{pid}/stat"))
            .as_deref()
            .and_then(parse_stat)
        {
            children.entry(stat.parent).or_default().push(pid);
        }
    }
    children
}

/// What can be read without waiting.
fn from_kernel(pid: i32, family: &HashMap<i32, Vec<i32>>) -> Process {
    let tids = fs_err::read_dir(format!("/proc/{pid}/task"));
    let mut tids: Vec<i32> = (tids.into_iter().flatten().flatten())
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect();
    // The main thread has the number of the process; others have higher ones, until numbers start again.
    tids.sort_unstable_by_key(|&tid| (tid != pid, tid));
    let status = read(format!("/proc/{pid}/status")).unwrap_or_default();
    let rss_kib = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let rss_kib = rss_kib.and_then(|l| l.split_ascii_whitespace().next()?.parse().ok());
    let mut children = family.get(&pid).cloned().unwrap_or_default();
    children.sort_unstable();
    let mut process = Process {
        pid,
        rss_bytes: rss_kib.unwrap_or(0u64) << 10,
        threads: (tids.iter().take(MAX_THREADS))
            .filter_map(|&tid| thread(pid, tid))
            .collect(),
        children: (children.iter().take(MAX_CHILDREN))
            .map(|&child| from_kernel(child, family))
            .collect(),
        ..Process::default()
    };
    for (all, most, what) in [
        (tids.len(), MAX_THREADS, "threads"),
        (children.len(), MAX_CHILDREN, "children"),
    ] {
        if all > most {
            process.notes.push(format!(
                "{most} of {all} {what} of process {pid} were looked at"
            ));
        }
    }
    process
}

fn thread(pid: i32, tid: i32) -> Option<Thread> {
    let of = |name: &str| read(format!("/proc/{pid}/task/{tid}/{name}"));
    let stat = parse_stat(&of("stat")?)?;
    let wchan = of("wchan").filter(|w| !w.is_empty() && w != "0");
    let syscall = of("syscall").and_then(|line| parse_syscall(&line));
    // A running thread has no stack in the kernel that would mean anything.
    let kernel_stack = if stat.state == 'D' {
        of("stack").map(|s| parse_kernel_stack(&s))
    } else {
        None
    };
    Some(Thread {
        tid,
        name: stat.name,
        state: stat.state,
        wchan,
        syscall: syscall.map(|call| call.text(|fd| target(pid, fd))),
        kernel_stack: kernel_stack.unwrap_or_default(),
    })
}

fn read(path: String) -> Option<String> {
    let bytes = fs_err::read(path).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim_end().to_string())
}

/// Its arguments, in at most 300 characters.
fn command_line(pid: i32) -> Option<String> {
    let text = read(format!("/proc/{pid}/cmdline"))?;
    let words = text.trim_matches('\0').replace('\0', " ");
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let short: String = words.chars().map(printable).take(300).collect();
    (!short.is_empty()).then_some(short)
}

fn state(pid: i32) -> Option<char> {
    parse_stat(&read(format!("/proc/{pid}/stat"))?).map(|s| s.state)
}

/// What a descriptor is: a path, a pipe, a socket and its ends.
fn target(pid: i32, fd: u64) -> Option<String> {
    let link = fs_err::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
    let link = link.to_string_lossy().into_owned();
    let inode = link
        .strip_prefix("socket:[")
        .map(|i| i.trim_end_matches(']'));
    let Some(inode) = inode else {
        return Some(link);
    };
    let ends = ["tcp", "tcp6"].iter().find_map(|table| {
        let table = read(format!("/proc/{pid}/net/{table}"))?;
        table.lines().find_map(|row| parse_tcp(row, inode))
    });
    Some(ends.unwrap_or_else(|| "a socket".into()))
}

fn is_python(pid: i32) -> bool {
    let exe = fs_err::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let named = |name: &str| name.starts_with("python") || name.starts_with("pypy");
    let embedded = || read(format!("/proc/{pid}/maps")).is_some_and(|m| m.contains("/libpython"));
    exe.file_name().is_some_and(|n| named(&n.to_string_lossy())) || embedded()
}

struct Stat {
    name: String,
    state: char,
    parent: i32,
}

/// The name may hold spaces and brackets.
fn parse_stat(text: &str) -> Option<Stat> {
    let (head, tail) = text.rsplit_once(')')?;
    let mut fields = tail.split_ascii_whitespace();
    Some(Stat {
        name: head.split_once('(')?.1.to_string(),
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
    })
}

#[derive(Debug, PartialEq)]
struct Syscall {
    number: i64,
    first: u64,
}

/// A line of `/proc/<pid>/syscall`: `running`, `-1 sp pc`, or the number, six arguments, sp and pc.
fn parse_syscall(line: &str) -> Option<Syscall> {
    let mut words = line.split_ascii_whitespace();
    let number = words.next()?.parse().ok().filter(|n| *n >= 0)?;
    let first = words.next()?.strip_prefix("0x")?;
    Some(Syscall {
        number,
        first: u64::from_str_radix(first, 16).ok()?,
    })
}

impl Syscall {
    /// `futex`, or `read of fd 5 (/data/clip.avi)`.
    fn text(&self, target: impl Fn(u64) -> Option<String>) -> String {
        let Some((name, has_fd)) = super::syscalls::name(self.number) else {
            return format!("system call {}", self.number);
        };
        if !has_fd {
            return name.into();
        }
        match target(self.first) {
            Some(what) => format!("{name} of fd {} ({what})", self.first),
            None => format!("{name} of fd {}", self.first),
        }
    }
}

/// Names of functions from lines such as `[<0>] nfs_wait_bit_killable+0x1e/0x90`.
fn parse_kernel_stack(text: &str) -> Vec<String> {
    let name = |line: &str| {
        let function = line.split_ascii_whitespace().nth(1)?;
        Some(function.split('+').next()?.to_string())
    };
    text.lines()
        .filter_map(name)
        .take(MAX_KERNEL_FRAMES)
        .collect()
}

/// `TCP 10.0.0.1:4242 to 10.0.0.2:5353` from a row of `/proc/net/tcp` or `tcp6` with this inode.
fn parse_tcp(row: &str, inode: &str) -> Option<String> {
    let fields: Vec<&str> = row.split_ascii_whitespace().collect();
    if fields.get(9) != Some(&inode) {
        return None;
    }
    let address = |text: &str| {
        let (address, port) = text.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        // Words of four bytes in the order of this machine.
        let words = (0..address.len() / 8)
            .map(|i| u32::from_str_radix(&address[i * 8..i * 8 + 8], 16).map(u32::to_ne_bytes));
        let bytes: Vec<u8> = words.collect::<Result<Vec<_>, _>>().ok()?.concat();
        let address: std::net::IpAddr = match <[u8; 16]>::try_from(bytes.as_slice()) {
            Ok(bytes) => std::net::Ipv6Addr::from(bytes).to_canonical(),
            Err(_) => <[u8; 4]>::try_from(bytes.as_slice()).ok()?.into(),
        };
        Some(std::net::SocketAddr::from((address, port)).to_string())
    };
    let (local, peer) = (address(fields[1])?, address(fields[2])?);
    Some(match fields[3] {
        "0A" => format!("TCP, listens on {local}"),
        "01" => format!("TCP {local} to {peer}"),
        "02" => format!("TCP {local} to {peer}, which has not accepted"),
        "08" => format!("TCP {local} to {peer}, which has closed it"),
        _ => format!("TCP {local} to {peer}, being closed"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_read() {
        let stat = parse_stat("42 (a) b (c)) D 7 40 39 0").unwrap();
        assert_eq!(
            (stat.name.as_str(), stat.state, stat.parent),
            ("a) b (c)", 'D', 7)
        );
        assert!(parse_stat("42 (a").is_none());
        assert_eq!(parse_syscall("running"), None);
        assert_eq!(parse_syscall("-1 0x7ffc 0x7f3a"), None);
        let line = format!(
            "{} 0x5 0x7f 0x20000 0x0 0x0 0x0 0x7ffe 0x7fbe",
            libc::SYS_read
        );
        let read = parse_syscall(&line).unwrap();
        let file = |_| Some("/data/clip.avi".to_string());
        assert_eq!(read.text(file), "read of fd 5 (/data/clip.avi)");
        assert_eq!(read.text(|_| None), "read of fd 5");
        let futex = Syscall {
            number: libc::SYS_futex,
            first: 5,
        };
        assert_eq!(futex.text(file), "futex");
        let unknown = Syscall {
            number: 9999,
            first: 5,
        };
        assert_eq!(unknown.text(file), "system call 9999");
        let stack = "[<0>] nfs_wait_bit_killable+0x1e/0x90\n[<0>] nfs_read+0x1/0x2\n";
        assert_eq!(
            parse_kernel_stack(stack),
            ["nfs_wait_bit_killable", "nfs_read"]
        );
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_socket_is_its_two_ends() {
        let v4 = "  12: 0100007F:1092 0200000A:14E9 01 00000000:00000000 00:00000000 00000000  0 0 4711 1 0";
        let text = parse_tcp(v4, "4711").unwrap();
        assert_eq!(text, "TCP 127.0.0.1:4242 to 10.0.0.2:5353");
        assert_eq!(parse_tcp(v4, "4712"), None);
        let v6 = "   0: 00000000000000000000000001000000:6D7C 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 9 1";
        assert_eq!(parse_tcp(v6, "9").unwrap(), "TCP, listens on [::1]:28028");
        assert_eq!(parse_tcp("  sl  local_address", "9"), None);
    }

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
