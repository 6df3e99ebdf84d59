//! Every byte a worker writes goes into its files; of chosen ranks, whole lines are also handed on to be
//! shown, see [`crate::console`].
//!
//! One thread reads all pipes of a node, so that a slow disk does not delay the supervision, and lines of
//! different ranks never mix.

pub mod keep;
#[cfg(test)]
mod throughput;

use anyhow::Context;
use fs_err::File;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::time::Timespec;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::console::lines::{Batch, Lines, visible};
use crate::console::queue::Feed;
use crate::limits;
use keep::Keep;

/// Bytes of a stream's end that are kept for the report.
const TAIL: usize = 32 << 10;
/// Lines of stderr in a report.
pub const TAIL_LINES: usize = 50;
/// Characters of a line in a report.
const TAIL_WIDTH: usize = 2000;
/// A larger pipe lets a worker write on while the launcher waits for a CPU.
const PIPE: usize = 256 << 10;
/// Of text to show that is handed on at once, about: a batch has to fit into a message.
const BATCH: usize = 64 << 10;

const SLOW: &str = "the disk took too long for the end of the output";
const UNREAD: &str = "the thread that reads the output ended";

/// One stream to read.
pub struct Source {
    pub pipe: OwnedFd,
    pub to: Sink,
}

/// Where the bytes of a stream go.
pub struct Sink {
    pub file: File,
    pub stderr: bool,
    /// `None`: only into the file.
    pub shown: Option<Lines>,
    /// Of stderr.
    pub tail: Tail,
}

/// Where lines to show go.
#[derive(Clone)]
pub struct Shown {
    /// This node's name.
    pub host: String,
    pub feed: Feed,
    /// How long the ranks may be held up by a reader that takes nothing, see [`Feed::send`].
    pub patience: Duration,
}

/// The end of a stream, shared with the thread that reads it.
#[derive(Clone, Default)]
pub struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    fn push(&self, bytes: &[u8]) {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes.len() >= TAIL {
            tail.clear();
        } else if tail.len() + bytes.len() > 2 * TAIL {
            let excess = tail.len() + bytes.len() - TAIL;
            tail.drain(..excess);
        }
        tail.extend_from_slice(&bytes[bytes.len().saturating_sub(TAIL)..]);
    }

    /// The last [`TAIL_LINES`] lines as a terminal would show them.
    pub fn lines(&self) -> Vec<String> {
        let tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = tail.strip_suffix(b"\n").unwrap_or(&tail);
        if text.is_empty() {
            return Vec::new();
        }
        let shorten = |line: &[u8]| {
            let line = String::from_utf8_lossy(visible(line));
            // Control characters could rewrite the report on a terminal.
            line.chars()
                .filter(|c| !c.is_control() || *c == '\t')
                .take(TAIL_WIDTH)
                .collect()
        };
        let mut lines: Vec<String> = text
            .rsplit(|&b| b == b'\n')
            .take(TAIL_LINES)
            .map(shorten)
            .collect();
        lines.reverse();
        lines
    }
}

/// The thread that reads.
pub struct Logs {
    finished: Receiver<Option<String>>,
    /// It waits for the workers, and for nothing else.
    is_idle: Arc<AtomicBool>,
}

/// What became of the output.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Finished {
    /// Nothing comes any more, but somebody holds a stream open.
    pub held_open: bool,
    /// Why some of it is not in the files.
    pub missing: Option<String>,
}

impl Logs {
    /// Starts reading `sources`.
    ///
    /// # Errors
    /// When a descriptor cannot be watched.
    pub fn start(sources: Vec<Source>, shown: Shown) -> anyhow::Result<Logs> {
        let epoll =
            epoll::create(CreateFlags::CLOEXEC).context("cannot read the workers' output")?;
        for (i, source) in sources.iter().enumerate() {
            fcntl_setfl(&source.pipe, OFlags::NONBLOCK)
                .context("cannot read the workers' output")?;
            // The size is limited per user; a smaller pipe works as well.
            let _ = rustix::pipe::fcntl_setpipe_size(&source.pipe, PIPE);
            epoll::add(
                &epoll,
                &source.pipe,
                EventData::new_u64(i as u64),
                EventFlags::IN,
            )
            .context("cannot read the workers' output")?;
        }
        let (done, finished) = channel();
        let is_idle = Arc::new(AtomicBool::new(false));
        let mut reader = Reader {
            epoll,
            is_idle: Arc::clone(&is_idle),
            sources: sources.into_iter().map(Some).collect(),
            keep: Keep::new(&shown.host),
            shown,
            start: Instant::now(),
        };
        limits::thread("logs", "reads the workers' output", move || {
            reader.run();
            let _ = done.send(reader.keep.missing());
        })?;
        Ok(Logs { finished, is_idle })
    }

    /// Waits until every stream has ended, but not longer than `wait` while nothing comes: a process that left its
    /// session may hold a pipe open for ever. A disk that takes its time has up to `patience`.
    pub fn finish(self, wait: Duration, patience: Duration) -> Finished {
        let start = Instant::now();
        let (held_open, missing) = loop {
            match self.finished.recv_timeout(wait) {
                Ok(missing) => break (false, missing),
                Err(RecvTimeoutError::Timeout) if self.is_idle.load(Ordering::Relaxed) => {
                    break (true, None);
                }
                Err(RecvTimeoutError::Timeout) if start.elapsed() < patience => {}
                Err(RecvTimeoutError::Timeout) => break (false, Some(SLOW.into())),
                Err(RecvTimeoutError::Disconnected) => break (false, Some(UNREAD.into())),
            }
        };
        Finished { held_open, missing }
    }
}

struct Reader {
    epoll: OwnedFd,
    is_idle: Arc<AtomicBool>,
    sources: Vec<Option<Source>>,
    shown: Shown,
    /// From which the time of progress bars counts.
    start: Instant,
    keep: Keep,
}

impl Reader {
    fn run(&mut self) {
        let mut buffer = vec![0u8; 64 << 10];
        let mut events = Vec::with_capacity(64);
        while self.sources.iter().any(Option::is_some) {
            events.clear();
            let deadline = self.lines().filter_map(|lines| lines.deadline()).min();
            let wake = deadline.into_iter().chain(self.keep.next_look()).min();
            let wait = wake.map(|at| at.saturating_sub(self.start.elapsed()));
            let wait = wait.map(|wait| Timespec::try_from(wait).unwrap_or_default());
            let (epoll, none) = (&self.epoll, Timespec::default());
            let mut look = |wait| {
                rustix::io::retry_on_intr(|| epoll::wait(epoll, spare_capacity(&mut events), wait))
            };
            let mut found = look(Some(&none));
            if found == Ok(0) {
                self.is_idle.store(true, Ordering::Relaxed);
                found = look(wait.as_ref());
                self.is_idle.store(false, Ordering::Relaxed);
            }
            if found.is_err() {
                return;
            }
            let mut batch = Batch::new(&self.shown.host);
            for event in &events {
                self.read(event.data.u64() as usize, &mut buffer, &mut batch);
                if batch.bytes() > BATCH {
                    let full = std::mem::replace(&mut batch, Batch::new(&self.shown.host));
                    self.shown.feed.send(full, self.shown.patience);
                }
            }
            let now = self.start.elapsed();
            if deadline.is_some_and(|at| now >= at) {
                self.lines()
                    .for_each(|lines| lines.show_bar(now, &mut batch));
            }
            let files = self.sources.iter().flatten().map(|source| &source.to.file);
            if let Some(text) = self.keep.look(now, files) {
                own_words(&mut batch, &text);
            }
            if !batch.is_empty() {
                self.shown.feed.send(batch, self.shown.patience);
            }
        }
    }

    /// Of the streams that are shown.
    fn lines(&mut self) -> impl Iterator<Item = &mut Lines> {
        let sources = self.sources.iter_mut().flatten();
        sources.filter_map(|source| source.to.shown.as_mut())
    }

    /// Reads once from source `index`: epoll reports the rest again, and other ranks have their turn.
    fn read(&mut self, index: usize, buffer: &mut [u8], batch: &mut Batch) {
        let Some(source) = &mut self.sources[index] else {
            return;
        };
        let bytes = match rustix::io::read(&source.pipe, &mut *buffer) {
            Ok(0) => {
                if let Some(lines) = &mut source.to.shown {
                    lines.finish(batch);
                }
                self.sources[index] = None;
                return;
            }
            Ok(n) => &buffer[..n],
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => return,
            Err(e) => {
                let text = format!("warning: a worker's output could not be read: {e}");
                own_words(batch, &text);
                self.sources[index] = None;
                return;
            }
        };
        let to = &mut source.to;
        // The worker must not stop because its log cannot be written: say it once and read on.
        if let Err(e) = to.file.write_all(bytes)
            && let Some(text) = self.keep.failed(&e)
        {
            own_words(batch, &text);
        }
        if to.stderr {
            to.tail.push(bytes);
        }
        if let Some(lines) = &mut to.shown {
            lines.push(bytes, self.start.elapsed(), batch);
        }
    }
}

/// What the launcher itself has to say, in order with the lines of the workers.
fn own_words(batch: &mut Batch, text: &str) {
    let text = format!("tsm-launch: {text}");
    for line in text.split('\n') {
        batch.push(None, true, line.as_bytes());
    }
}

/// Reads a whole small file as text, whatever its bytes; `None` if it is missing or larger than 1 MiB.
pub fn read_small(path: &std::path::Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path)
        .ok()?
        .take(1 << 20)
        .read_to_end(&mut bytes)
        .ok()?;
    (bytes.len() < 1 << 20).then(|| String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::lines::Bars;
    use crate::console::queue::{LIMIT, Taken, queue};

    const LONG: Duration = Duration::from_secs(60);
    const ALL: Finished = Finished {
        held_open: false,
        missing: None,
    };

    #[test]
    fn a_tail_keeps_the_last_lines() {
        let tail = Tail::default();
        assert!(tail.lines().is_empty());
        for i in 0..10_000 {
            tail.push(format!("line {i}\n").as_bytes());
        }
        let lines = tail.lines();
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!(
            (lines[0].as_str(), lines[49].as_str()),
            ("line 9950", "line 9999")
        );
        tail.push(b"\x1b[2Jred\xff\r 1%\r 2%\n");
        assert_eq!(tail.lines()[49], " 2%");
        tail.push(&vec![b'y'; 3 * TAIL]);
        assert_eq!(tail.lines(), ["y".repeat(TAIL_WIDTH)]);
    }

    #[test]
    fn all_bytes_reach_the_file_and_whole_lines_are_handed_on() {
        let dir = tempfile::tempdir().unwrap();
        let (read, mut write) = std::io::pipe().unwrap();
        let path = dir.path().join("0.err");
        let tail = Tail::default();
        let to = Sink {
            file: File::create(&path).unwrap(),
            stderr: true,
            shown: Some(Lines::new(0, true, Bars::Hidden)),
            tail: tail.clone(),
        };
        let pipe = read.into();
        let (feed, mut tap) = queue(LIMIT);
        let logs = Logs::start(vec![Source { pipe, to }], shown(feed)).unwrap();
        write.write_all(b"a\nb\r\n\xff").unwrap();
        drop(write);
        assert_eq!(logs.finish(LONG, LONG), ALL);
        let mut lines = Vec::new();
        while let Taken::Batch(batch) = tap.wait(None) {
            assert_eq!(batch.host, "gpu-01");
            lines.extend(batch.lines().map(|line| line.text.to_vec()));
        }
        assert_eq!(lines, [&b"a"[..], b"b", b"\xff"]);
        assert_eq!(fs_err::read(&path).unwrap(), b"a\nb\r\n\xff");
        assert_eq!(tail.lines(), ["a", "b", "\u{fffd}"]);
    }

    /// It is shown though nothing follows, and the file has it as it came.
    #[test]
    fn a_bar_that_stands_still_is_shown_when_its_time_has_come() {
        let dir = tempfile::tempdir().unwrap();
        let (read, mut write) = std::io::pipe().unwrap();
        let path = dir.path().join("0.out");
        let bars = Bars::Lines(Duration::from_millis(20));
        let to = Sink {
            file: File::create(&path).unwrap(),
            stderr: false,
            shown: Some(Lines::new(0, false, bars)),
            tail: Tail::default(),
        };
        let pipe = read.into();
        let (feed, mut tap) = queue(LIMIT);
        let logs = Logs::start(vec![Source { pipe, to }], shown(feed)).unwrap();
        write.write_all(b"\r 10%\r 20%").unwrap();
        // The writer stays open, so only the clock can bring the line.
        let Taken::Batch(batch) = tap.wait(Some(Duration::from_secs(60))) else {
            panic!("no line came")
        };
        let lines: Vec<_> = batch.lines().map(|line| line.text).collect();
        assert_eq!(lines, [b" 20%"]);
        write.write_all(b"\r100%\n").unwrap();
        drop(write);
        assert_eq!(logs.finish(LONG, LONG), ALL);
        assert_eq!(fs_err::read(&path).unwrap(), b"\r 10%\r 20%\r100%\n");
    }

    #[test]
    fn a_pipe_that_stays_open_does_not_hold_up_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (read, _write) = std::io::pipe().unwrap();
        let to = Sink {
            file: File::create(dir.path().join("3.err")).unwrap(),
            stderr: true,
            shown: None,
            tail: Tail::default(),
        };
        let pipe = read.into();
        let logs = Logs::start(vec![Source { pipe, to }], shown(queue(LIMIT).0)).unwrap();
        assert!(logs.finish(Duration::from_millis(1), LONG).held_open);
    }

    /// A pipe in its place, which takes no more than a page for a while.
    #[test]
    fn a_disk_that_takes_its_time_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slow");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        for patience in [Duration::from_millis(100), LONG] {
            // Both ends, so that neither opening waits for the other.
            let mut slow = File::options().read(true).write(true).open(&path).unwrap();
            let page = rustix::pipe::fcntl_setpipe_size(slow.file(), 1).unwrap();
            let (read, mut write) = std::io::pipe().unwrap();
            let to = Sink {
                file: slow.try_clone().unwrap(),
                stderr: false,
                shown: None,
                tail: Tail::default(),
            };
            let pipe = read.into();
            let logs = Logs::start(vec![Source { pipe, to }], shown(queue(LIMIT).0)).unwrap();
            // The smallest pipe that the kernel makes, for a user who has many, takes the other.
            let text = vec![b'x'; 2 * page];
            write.write_all(&text).unwrap();
            drop(write);
            std::thread::scope(|scope| {
                let finished = scope.spawn(|| logs.finish(Duration::from_millis(1), patience));
                if patience < LONG {
                    let missing = finished.join().unwrap().missing;
                    assert_eq!(missing.as_deref(), Some(SLOW));
                    slow.read_exact(&mut vec![0; text.len()]).unwrap();
                } else {
                    // Nothing comes of it where this is too short.
                    std::thread::sleep(Duration::from_millis(200));
                    slow.read_exact(&mut vec![0; text.len()]).unwrap();
                    assert_eq!(finished.join().unwrap(), ALL);
                }
            });
        }
    }

    /// Nobody takes a line out, as behind a terminal stopped with Ctrl-S.
    #[test]
    fn a_reader_that_stopped_holds_up_no_worker() {
        let dir = tempfile::tempdir().unwrap();
        let (read, mut write) = std::io::pipe().unwrap();
        let path = dir.path().join("3.out");
        let to = Sink {
            file: File::create(&path).unwrap(),
            stderr: false,
            shown: Some(Lines::new(3, false, Bars::Hidden)),
            tail: Tail::default(),
        };
        let pipe = read.into();
        let (feed, mut tap) = queue(16 << 10);
        let logs = Logs::start(vec![Source { pipe, to }], shown(feed)).unwrap();
        let text = "a line of the worker\n".repeat(200_000);
        write.write_all(text.as_bytes()).unwrap();
        drop(write);
        assert_eq!(logs.finish(LONG, LONG), ALL);
        assert_eq!(fs_err::read_to_string(&path).unwrap(), text);
        let (mut shown, mut missed) = (0, 0);
        while let Taken::Batch(batch) = tap.wait(None) {
            shown += batch.lines().count() as u64;
            missed += batch.missed.iter().map(|missed| missed.lines).sum::<u64>();
        }
        assert!(missed > 100_000 && shown > 0, "{shown} {missed}");
        assert_eq!(shown + missed, 200_000);
    }

    fn shown(feed: Feed) -> Shown {
        Shown {
            host: "gpu-01".into(),
            feed,
            patience: Duration::ZERO,
        }
    }
}
