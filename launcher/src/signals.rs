//! Signals to the launcher, as a stream.

use anyhow::Context;
use std::sync::atomic::{AtomicI32, Ordering};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::stat::Stat;

/// The signals that the launcher answers, for its workers.
pub const HEARD: [i32; 6] = [
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

pub struct Signals(Vec<Stream>);

struct Stream {
    number: i32,
    signal: Signal,
    sender: &'static AtomicI32,
}

/// A signal, and the process that sent it; 0: one that has no number here. `None`: the kernel, as for Ctrl-C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caught {
    pub signal: i32,
    pub sender: Option<i32>,
}

impl Caught {
    /// `process 4711 (timeout)`; without the name where that process is gone.
    pub fn by(self) -> Option<String> {
        let pid = self.sender?;
        if pid == 0 {
            return Some("outside of this container".into());
        }
        Some(match Stat::read(pid) {
            None => format!("process {pid}"),
            Some(stat) => format!("process {pid} ({})", stat.name),
        })
    }
}

/// The last senders, in order of [`HEARD`].
static SENDERS: [AtomicI32; HEARD.len()] = [const { AtomicI32::new(NOBODY) }; HEARD.len()];
const NOBODY: i32 = -1;

/// Notes the sender of a signal before tokio hears of it: handlers run in the order in which they were set.
#[expect(unsafe_code, reason = "tokio does not say who sent a signal")]
fn note_sender(number: i32, sender: &'static AtomicI32) -> std::io::Result<()> {
    let note = move |info: &libc::siginfo_t| {
        let by_process = matches!(
            info.si_code,
            libc::SI_USER | libc::SI_QUEUE | libc::SI_TKILL
        );
        // SAFETY: with these codes the kernel has set the field.
        let pid = by_process.then(|| unsafe { info.si_pid() });
        sender.store(pid.unwrap_or(NOBODY), Ordering::Release);
    };
    // SAFETY: the closure stores a number, which a signal handler may do.
    unsafe { signal_hook_registry::register_sigaction(number, note) }.map(drop)
}

impl Signals {
    /// Starts to catch signals, but for those that were ignored when the launcher was started
    /// (`nohup`, or SIGINT of a background job): they stay ignored.
    ///
    /// # Errors
    /// When a handler cannot be installed.
    pub fn catch() -> anyhow::Result<Signals> {
        let ignored = ignored(&fs_err::read_to_string("/proc/self/status").unwrap_or_default());
        let heard = HEARD.into_iter().zip(&SENDERS);
        let caught = heard.filter(|(number, _)| ignored & (1 << (number - 1)) == 0);
        let open = |(number, sender)| {
            note_sender(number, sender)?;
            let signal = signal(SignalKind::from_raw(number))?;
            Ok(Stream {
                number,
                signal,
                sender,
            })
        };
        let signals: std::io::Result<Vec<_>> = caught.map(open).collect();
        Ok(Signals(signals.context("cannot handle signals")?))
    }

    /// The next signal; never, when none is caught.
    pub async fn next(&mut self) -> Caught {
        std::future::poll_fn(|context| {
            for stream in &mut self.0 {
                if stream.signal.poll_recv(context).is_ready() {
                    let sender = stream.sender.load(Ordering::Acquire);
                    let sender = Some(sender).filter(|pid| *pid != NOBODY);
                    let signal = stream.number;
                    return std::task::Poll::Ready(Caught { signal, sender });
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}

/// From now on a write beyond the limit of file size (`ulimit -f`) fails, and does not end this process. What it
/// starts is ended as before: a handler, unlike a signal that is ignored, does not outlive an exec.
#[expect(unsafe_code, reason = "rustix sets no dispositions")]
pub fn outlive_file_limit() {
    extern "C" fn nothing(_: i32) {}
    let handler = nothing as extern "C" fn(i32) as libc::sighandler_t;
    // SAFETY: a handler that does nothing may run at any time, and SIG_IGN runs no code of ours.
    unsafe {
        if libc::signal(libc::SIGXFSZ, handler) == libc::SIG_IGN {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        }
    }
}

/// The mask of ignored signals in the text of `/proc/self/status`; bit 0 is signal 1.
fn ignored(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_sent_a_signal_is_known() {
        let mut signals = Signals::catch().unwrap();
        let mut child = std::process::Command::new("sh")
            .args(["-c", "kill -USR1 $PPID"])
            .spawn()
            .unwrap();
        let (signal, sender) = (libc::SIGUSR1, Some(child.id() as i32));
        let caught = signals.next().await;
        assert_eq!(caught, Caught { signal, sender });
        // A zombie until it is waited for.
        assert_eq!(caught.by(), Some(format!("process {} (sh)", child.id())));
        child.wait().unwrap();
    }

    #[test]
    fn ignored_signals_are_read() {
        assert_eq!(
            super::ignored("Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\t0\n"),
            0x1001
        );
        assert_eq!(super::ignored(""), 0);
    }
}
