//! The thread that writes to the launcher's stdout and stderr: a stopped terminal stops nothing else.

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::Console;
use super::painter::{Format, Painter, Style};
use super::queue::{Feed, LIMIT, Taken, Tap, queue};
use crate::limits;
use crate::status::view::View;

/// How long lines may wait so that the bottom of the terminal is not written anew for each.
const PACE: Duration = Duration::from_millis(20);
/// The bottom of the terminal is drawn anew no more often.
const REDRAW: Duration = Duration::from_millis(200);

/// Where lines are shown.
pub struct Outputs {
    out: Console,
    err: Console,
    /// Stdout and stderr are one terminal, so what comes first has to be written first.
    together: bool,
    /// Something may stand at the bottom, below the lines.
    bottom: bool,
    /// Cells and rows of the terminal behind stderr, where it is one.
    size: Box<dyn Fn() -> Option<(usize, usize)> + Send>,
}

impl Outputs {
    /// The launcher's own stdout and stderr.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn standard() -> std::io::Result<Outputs> {
        // Descriptors of our own: the locks of std's would be held while a terminal is stopped.
        let out = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
        let err = File::from(std::io::stderr().as_fd().try_clone_to_owned()?);
        let terminal = err.try_clone()?;
        let size = move || {
            let size = rustix::termios::tcgetwinsize(&terminal).ok()?;
            // A terminal that does not know its size says 0.
            let or = |n: u16, default| if n == 0 { default } else { usize::from(n) };
            Some((or(size.ws_col, 80), or(size.ws_row, 24)))
        };
        // What reads a pipe may write to the same terminal, as `| tee log` does, and not know of the bottom.
        let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&out)?.st_mode);
        let is_pipe = kind.is_fifo() || kind.is_socket();
        Ok(Outputs {
            bottom: err.is_terminal() && !is_pipe,
            together: out.is_terminal() && err.is_terminal(),
            out: Console::new(out),
            err: Console::new(err),
            size: Box::new(size),
        })
    }

    /// Two writers that are no terminals.
    #[cfg(test)]
    pub fn plain(out: Console, err: Console) -> Outputs {
        Outputs {
            out,
            err,
            together: false,
            bottom: false,
            size: Box::new(|| None),
        }
    }

    /// How long a rank may be held up while nothing is taken out of the queue: a program that reads the
    /// launcher's output is given time; nobody can read a flood on a terminal.
    pub fn patience(&self) -> Duration {
        match (self.size)() {
            Some(_) => Duration::ZERO,
            None => Duration::from_secs(2),
        }
    }
}

/// The thread that shows lines.
pub struct Screen {
    feed: Feed,
    patience: Duration,
    finished: Receiver<()>,
}

impl Screen {
    /// Starts the thread; `view` stands at the bottom where stderr is a terminal, and stdout is no pipe.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(outputs: Outputs, style: Style, view: Option<View>) -> anyhow::Result<Screen> {
        let (feed, tap) = queue(LIMIT);
        let patience = outputs.patience();
        let (done, finished) = channel();
        let mut view = view.filter(|_| style.format == Format::Text);
        let mut painter = Painter::new(style);
        limits::thread("screen", "shows the workers' output", move || {
            show(tap, outputs, &mut painter, &mut view);
            let _ = done.send(());
        })?;
        Ok(Screen {
            feed,
            patience,
            finished,
        })
    }

    /// Where lines to show go in.
    pub fn feed(&self) -> Feed {
        self.feed.clone()
    }

    /// See [`Outputs::patience`].
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Waits until all is shown, but not longer than `wait` for a reader that takes nothing. Returns whether
    /// all is shown.
    pub fn finish(self, wait: Duration) -> bool {
        self.feed.close();
        let mut taken = self.feed.taken();
        loop {
            match self.finished.recv_timeout(wait) {
                Ok(()) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
                Err(RecvTimeoutError::Timeout) => {
                    let before = std::mem::replace(&mut taken, self.feed.taken());
                    if before == taken {
                        return false;
                    }
                }
            }
        }
    }
}

fn show(mut tap: Tap, mut to: Outputs, painter: &mut Painter, view: &mut Option<View>) {
    let start = Instant::now();
    let mut view = view.as_mut().filter(|_| to.bottom);
    let (mut view_lines, mut shown) = (Vec::new(), (Vec::new(), 0));
    let (mut next_redraw, mut next_write) = (Duration::ZERO, Duration::ZERO);
    loop {
        let changes = view.is_some() || (to.bottom && painter.bar_changed);
        let waits = painter.ready() > 0;
        let wake = painter.deadline().into_iter();
        let wake = wake.chain(changes.then_some(next_redraw));
        let wake = wake.chain(waits.then_some(next_write)).min();
        let taken = tap.wait(wake.map(|at| at.saturating_sub(start.elapsed())));
        let now = start.elapsed();
        let closed = taken == Taken::Closed;
        if let Taken::Batch(batch) = &taken {
            painter.take(batch, now);
        }
        painter.due(if closed { Duration::MAX } else { now });
        if now < next_write && !closed && painter.ready() < LIMIT {
            continue;
        }
        let (width, rows) = (to.size)().unwrap_or((80, 24));
        let redraw = to.bottom && now >= next_redraw;
        if redraw {
            view_lines = view.as_mut().map_or(Vec::new(), |view| view.lines(width));
            painter.bar_changed = false;
            next_redraw = now + REDRAW;
        }
        let mut bottom: Vec<String> = Vec::new();
        if to.bottom && !closed {
            bottom.extend(painter.bar(width));
            bottom.extend(view_lines.iter().cloned());
            bottom.truncate((rows / 2).max(1));
        }
        let bottom = (bottom, width);
        if closed || painter.ready() > 0 || (redraw && shown != bottom) {
            write(painter, &mut to, &bottom.0, width);
            let pace = if bottom.0.is_empty() {
                Duration::ZERO
            } else {
                PACE
            };
            (shown, next_write) = (bottom, now + pace);
        }
        if closed {
            return;
        }
    }
}

/// Writes what is ready; the bottom is always on stderr.
fn write(painter: &mut Painter, to: &mut Outputs, bottom: &[String], width: usize) {
    let mut segments = painter.pieces(to.together).peekable();
    if segments.peek().is_none() {
        to.err.write(b"", bottom, width);
    }
    while let Some((stderr, text)) = segments.next() {
        let last = segments.peek().is_none();
        match (stderr, last) {
            (true, true) => to.err.write(&text, bottom, width),
            (true, false) => to.err.write(&text, &[], width),
            (false, _) => {
                // Stdout may be the terminal on which the bottom stands.
                to.err.clear(width);
                to.out.write(&text, &[], width);
                if last {
                    to.err.write(b"", bottom, width);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lines::Batch;
    use super::super::painter::tests::{batch, style};
    use super::*;
    use crate::status::Snapshot;
    use std::io::{Read, Write};
    use std::sync::{Arc, Mutex};
    use tokio::sync::watch;

    /// A terminal as bytes: what stands on it in the end, line by line.
    fn on_terminal(bytes: &str) -> Vec<String> {
        let (mut rows, mut row) = (vec![String::new()], 0);
        let mut rest = bytes;
        while let Some(c) = rest.chars().next() {
            rest = &rest[c.len_utf8()..];
            match c {
                '\n' => {
                    row += 1;
                    rows.resize(rows.len().max(row + 1), String::new());
                }
                // Always followed by an erasure here.
                '\r' => {}
                '\x1b' => {
                    let end = rest.find(|c: char| c.is_ascii_alphabetic()).unwrap();
                    match &rest[..=end] {
                        "[J" => {
                            rows.truncate(row + 1);
                            rows[row].clear();
                        }
                        up if up.ends_with('A') => {
                            row -= up[1..end].parse::<usize>().unwrap();
                        }
                        other => panic!("{other}"),
                    }
                    rest = &rest[end + 1..];
                }
                c => rows[row].push(c),
            }
        }
        rows
    }

    #[test]
    fn the_view_stays_below_whole_lines() {
        let written = Arc::new(Mutex::new(Vec::new()));
        struct Writer(Arc<Mutex<Vec<u8>>>);
        impl Write for Writer {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let outputs = Outputs {
            out: Console::new(Writer(Arc::clone(&written))),
            err: Console::new(Writer(Arc::clone(&written))),
            together: true,
            bottom: true,
            size: Box::new(|| Some((80, 24))),
        };
        let snapshot = |step| {
            let rank = crate::status::RankStatus {
                step: Some(step),
                ..Default::default()
            };
            Arc::new(Snapshot {
                run_id: "demo".into(),
                ranks: vec![rank],
                ..Snapshot::default()
            })
        };
        let (sender, snapshots) = watch::channel(snapshot(0));
        let view = View::new(snapshots, false);
        let screen = Screen::start(outputs, style(Format::Text, false), Some(view)).unwrap();
        for step in 1..200 {
            sender.send_replace(snapshot(step));
            let mut lines = batch("a", &[(0, "out"), (3, "err")]);
            lines.bar = Some((3, format!(" {step}%").into_bytes()));
            screen.feed().offer(lines);
        }
        let so_far = || String::from_utf8(written.lock().unwrap().clone()).unwrap();
        // The bar and the view below it are drawn at the latest when nothing else happens.
        let start = Instant::now();
        while !so_far().contains(" 199%\ndemo  0 s\nstep 199") {
            assert!(start.elapsed() < Duration::from_secs(60), "{}", so_far());
            std::thread::yield_now();
        }
        assert!(screen.finish(Duration::from_secs(60)));
        let text = so_far();
        let mut rows = on_terminal(&text);
        assert_eq!(rows.pop().unwrap(), "");
        let expected = [" 0 | out", " 3 | err"].repeat(199);
        assert_eq!(rows, expected);
    }

    /// Two agents, each with a queue of its own, and the screen of the coordinator.
    #[test]
    fn the_lines_of_two_nodes_come_over_the_network_in_order() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let outputs = Outputs::plain(Console::new(writer), Console::new(std::io::sink()));
        let screen = Screen::start(outputs, style(Format::Text, true), None).unwrap();
        let read = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).map(|_| text).unwrap()
        });
        let node = |host: &'static str, ranks: [u32; 2]| {
            let (feed, mut tap) = queue(LIMIT);
            let (screen, patience) = (screen.feed(), screen.patience());
            let agent = std::thread::spawn(move || {
                for i in 0..500 {
                    let own = format!("{host} {i}");
                    let lines = [(ranks[0], "same"), (ranks[1], "same"), (ranks[0], &own)];
                    feed.send(batch(host, &lines), Duration::from_secs(60));
                }
            });
            let wire = std::thread::spawn(move || {
                while let Taken::Batch(batch) = tap.wait(None) {
                    let message = serde_json::to_vec(&batch).unwrap();
                    screen.send(serde_json::from_slice(&message).unwrap(), patience);
                }
            });
            [agent, wire]
        };
        let threads = [node("gpu-01", [0, 1]), node("gpu-02", [8, 9])];
        for thread in threads.into_iter().flatten() {
            thread.join().unwrap();
        }
        assert!(screen.finish(Duration::from_secs(60)));
        let text = read.join().unwrap();
        for (host, rank) in [("gpu-01", 0), ("gpu-02", 8)] {
            let label = format!("{host} {rank:>2} | ");
            let own = text.lines().filter_map(|line| line.strip_prefix(&label));
            let own: Vec<&str> = own.filter(|line| *line != "same").collect();
            let expected: Vec<String> = (0..500).map(|i| format!("{host} {i}")).collect();
            assert_eq!(own, expected);
        }
        let same: usize = text
            .lines()
            .filter_map(|line| line.strip_suffix(" | same"))
            .map(|label| match label.strip_prefix('[') {
                Some(list) => list.matches([',', '-']).count() + 1,
                None => 1,
            })
            .sum();
        assert_eq!(same, 4 * 500);
    }

    /// As a terminal stopped with Ctrl-S: nobody reads, so the thread hangs in its write.
    #[test]
    fn a_stopped_terminal_holds_up_neither_the_lines_nor_the_end() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let outputs = Outputs {
            size: Box::new(|| Some((80, 24))),
            ..Outputs::plain(Console::new(std::io::sink()), Console::new(writer))
        };
        assert_eq!(outputs.patience(), Duration::ZERO);
        let screen = Screen::start(outputs, style(Format::Text, false), None).unwrap();
        let line = "x".repeat(100);
        for _ in 0..200_000 {
            screen
                .feed()
                .send(batch("a", &[(3, &line)]), screen.patience());
        }
        screen.feed().offer(Batch::own("a", "tsm-launch: the end"));
        assert!(!screen.finish(Duration::from_millis(1)));
        // Whoever reads again gets whole lines, and learns how many are missing.
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let shown = text.matches(&format!(" 3 | {line}\n")).count();
        let missed = text.lines().filter_map(|line| {
            let (number, rest) = line.strip_prefix("tsm-launch: ")?.split_once(" line")?;
            let file = " of rank 3 not shown: see runs/a/logs/a-3.err";
            assert_eq!(rest.trim_start_matches('s'), file);
            number.parse::<usize>().ok()
        });
        assert_eq!(shown + missed.sum::<usize>(), 200_000);
        assert!(shown < 100_000, "{shown} lines were held in memory");
        assert!(text.contains("tsm-launch: the end\n"));
    }
}
