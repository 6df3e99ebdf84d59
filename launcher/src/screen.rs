//! The launcher's own stdout and stderr, written by a thread of its own: a terminal that stands still holds up
//! neither the workers nor the supervision.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// Bytes that may wait to be shown; what does not fit is left to the log files.
const WAITING: usize = 8 << 20;
/// How long the end of the program waits for a terminal.
const FLUSH: Duration = Duration::from_secs(2);

/// A handle; all handles write in one order.
#[derive(Clone)]
pub struct Screen {
    to: Sender<(bool, Vec<u8>)>,
    waiting: Arc<AtomicUsize>,
}

/// Waits for the thread that writes.
pub struct Shown(Receiver<()>);

impl Screen {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start() -> std::io::Result<(Screen, Shown)> {
        let (to, from) = channel::<(bool, Vec<u8>)>();
        let (done, shown) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let left = waiting.clone();
        std::thread::Builder::new().name("screen".into()).spawn(move || {
            for (stderr, text) in from {
                // Nobody may read any more; then text goes nowhere.
                let _ = if stderr {
                    std::io::stderr().write_all(&text)
                } else {
                    std::io::stdout().write_all(&text).and_then(|()| std::io::stdout().flush())
                };
                left.fetch_sub(text.len(), Ordering::Relaxed);
            }
            let _ = done.send(());
        })?;
        Ok((Screen { to, waiting }, Shown(shown)))
    }

    /// Whole lines.
    pub fn show(&self, stderr: bool, text: Vec<u8>) {
        self.waiting.fetch_add(text.len(), Ordering::Relaxed);
        let _ = self.to.send((stderr, text));
    }

    /// A line of the launcher's own.
    pub fn notice(&self, text: &str) {
        self.show(true, format!("tsm-launch: {text}\n").into_bytes());
    }

    /// For the lines of workers.
    pub fn writer(&self, stderr: bool) -> Writer {
        Writer {
            screen: self.clone(),
            stderr,
            left_out: 0,
        }
    }
}

impl Shown {
    /// Call when all handles are dropped.
    pub fn finish(self) {
        let _ = self.0.recv_timeout(FLUSH);
    }
}

/// Leaves lines out when too many wait, and tells how many.
pub struct Writer {
    screen: Screen,
    stderr: bool,
    left_out: usize,
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.screen.waiting.load(Ordering::Relaxed) + bytes.len() > WAITING {
            self.left_out += bytes.iter().filter(|&&b| b == b'\n').count();
            return Ok(bytes.len());
        }
        let mut text = Vec::new();
        if self.left_out > 0 {
            let lines = std::mem::take(&mut self.left_out);
            text = format!("tsm-launch: {lines} lines are not shown, they are in the log files\n").into_bytes();
        }
        text.extend_from_slice(bytes);
        self.screen.show(self.stderr, text);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
