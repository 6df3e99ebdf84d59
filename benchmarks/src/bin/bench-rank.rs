//! A rank of `tsm-bench launch`: says when it started and when it was signalled, and ends as it is told.
//!
//! ```text
//! bench-rank PIPE [--ignore-sigterm RANK] [--linger-ms N] [--lines N] [--culprit RANK --react-ms N]
//! ```
//! SIGTERM ends it with code 143, N ms after it has said so, SIGUSR1 with code 17, and so does the end of the bench, which holds
//! the other side of PIPE: whatever a launcher leaves behind, nothing outlives a measurement.

#[path = "../launch/stamp.rs"]
mod stamp;

use fs_err::os::unix::fs::OpenOptionsExt;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use stamp::{Kind, Stamp, log_line, now_ns};
use std::io::{BufWriter, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;
use tsm_job::message::{AgentLink, WorkerMessage};

/// What ends a rank that was told to fail.
const FAILS: i32 = 17;

struct Me {
    rank: u32,
    pipe: fs_err::File,
}

impl Me {
    fn say(&mut self, kind: Kind, ns: u64) {
        let stamp = Stamp {
            kind,
            rank: self.rank,
            pid: std::process::id() as i32,
            parent: rustix::process::getppid().map_or(0, |p| p.as_raw_nonzero().get()),
            ns,
        };
        // Nobody listens any more: the measurement is over.
        if self
            .pipe
            .write_all(format!("{stamp}\n").as_bytes())
            .is_err()
        {
            std::process::exit(0);
        }
    }
}

fn main() {
    let started = now_ns();
    let signals = signals();
    let mut args = std::env::args().skip(1);
    let pipe = args.next().expect("bench-rank PIPE");
    let (mut ignoring, mut lines, mut culprit) = (None, None, None);
    let (mut react, mut linger) = (Duration::ZERO, Duration::ZERO);
    while let Some(flag) = args.next() {
        let value = args
            .next()
            .unwrap_or_else(|| panic!("{flag} needs a value"));
        let number: u32 = value
            .parse()
            .unwrap_or_else(|_| panic!("{flag} {value}: not a number"));
        match flag.as_str() {
            "--ignore-sigterm" => ignoring = Some(number),
            "--linger-ms" => linger = Duration::from_millis(number.into()),
            "--lines" => lines = Some(number),
            "--culprit" => culprit = Some(number),
            "--react-ms" => react = Duration::from_millis(number.into()),
            other => panic!("unknown flag {other}"),
        }
    }
    let mut me = Me {
        rank: number_in(&["RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"]),
        // Without a reader it is refused instead of waiting for one.
        pipe: fs_err::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&pipe)
            .expect("the bench listens"),
    };
    me.say(Kind::Started, started);
    let fd = std::env::var("TSM_AGENT_FD")
        .ok()
        .and_then(|fd| fd.parse().ok());
    let link = AgentLink::open(fd);
    // Who made a step may be started again.
    link.send(&WorkerMessage::Step {
        step: 1,
        epoch: 1,
        work_ms: None,
    });
    if let Some(lines) = lines {
        return print(me.rank, lines);
    }
    let watched = culprit.and_then(|culprit| follow(&mut me, &pipe, culprit));
    loop {
        let mut fds = vec![
            PollFd::new(&signals, PollFlags::IN),
            // Only errors are wanted: the reader is gone.
            PollFd::new(&me.pipe, PollFlags::empty()),
        ];
        fds.extend(watched.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let happened: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if happened[0] {
            let at = now_ns();
            if next_signal(&signals) == libc::SIGUSR1 {
                std::process::exit(FAILS);
            }
            me.say(Kind::Signalled, at);
            if ignoring != Some(me.rank) {
                std::thread::sleep(linger);
                std::process::exit(128 + libc::SIGTERM);
            }
        } else if happened[1] {
            std::process::exit(0);
        } else if happened.get(2) == Some(&true) {
            std::thread::sleep(react);
            std::process::exit(1);
        }
    }
}

fn number_in(names: &[&str]) -> u32 {
    let value = names.iter().find_map(|name| std::env::var(name).ok());
    value.and_then(|v| v.parse().ok()).unwrap_or(0)
}

/// The culprit tells who it is; the others get hold of it, to see its death as a peer does: at once.
fn follow(me: &mut Me, pipe: &str, culprit: u32) -> Option<OwnedFd> {
    let path = format!("{pipe}.culprit");
    if me.rank == culprit {
        let whole = format!("{path}.tmp");
        fs_err::write(&whole, std::process::id().to_string()).expect("the folder exists");
        fs_err::rename(whole, path).expect("the folder exists");
        return None;
    }
    let pid = loop {
        match fs_err::read_to_string(&path) {
            Ok(text) => break text.parse().ok().and_then(Pid::from_raw).expect("a pid"),
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    };
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("it waits for this");
    me.say(Kind::Ready, now_ns());
    Some(pidfd)
}

/// As programs print into a pipe: in pieces that end within a line.
fn print(rank: u32, lines: u32) {
    let mut out = BufWriter::with_capacity(8 << 10, std::io::stdout().lock());
    for i in 0..lines {
        writeln!(out, "{}", log_line(rank, i)).expect("stdout is open");
    }
    out.flush().expect("stdout is open");
}

/// SIGTERM and SIGUSR1 as a descriptor, whatever was inherited about them.
#[expect(unsafe_code, reason = "libc has no safe interface to signals")]
fn signals() -> OwnedFd {
    // SAFETY: the set is made by sigemptyset; this process has one thread; the descriptor is new and ours.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGUSR1] {
            libc::signal(signal, libc::SIG_DFL);
            libc::sigaddset(&mut set, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC);
        assert!(fd >= 0, "no signalfd: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

fn next_signal(signals: &OwnedFd) -> i32 {
    let mut info = [0; size_of::<libc::signalfd_siginfo>()];
    rustix::io::read(signals, &mut info).expect("it is readable");
    // The number is the first field.
    i32::from_ne_bytes([info[0], info[1], info[2], info[3]])
}
