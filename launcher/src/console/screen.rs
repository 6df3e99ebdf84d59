//! The thread that writes to the launcher's stdout and stderr: a stopped terminal stops nothing else.

use anyhow::Context;
use serde::Serialize;
use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::str::FromStr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use tsm_job::RunDir;

use super::fold::{Fold, Group};
use super::lines::{Batch, Missed};
use super::queue::{Feed, LIMIT, Taken, Tap, queue};
use super::{Console, fit};
use crate::status::view::View;

/// How long a line may wait for equal ones of other ranks.
const WINDOW: Duration = Duration::from_millis(80);
/// How long lines may wait so that the bottom of the terminal is not written anew for each.
const PACE: Duration = Duration::from_millis(20);
/// The bottom of the terminal is drawn anew no more often.
const REDRAW: Duration = Duration::from_millis(200);

/// `--log-format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Labelled lines, equal ones of many ranks folded, stdout and stderr apart.
    #[default]
    Text,
    /// One JSON object a line, all on stdout.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Format, String> {
        match text {
            "text" => Ok(Format::Text),
            "json" => Ok(Format::Json),
            other => Err(format!("`{other}` is no format; write `text` or `json`")),
        }
    }
}

/// How lines are shown.
#[derive(Clone, Debug)]
pub struct Style {
    pub format: Format,
    /// Labels name the host too: there are several nodes.
    pub hosts: bool,
    /// Of how many ranks there will ever be.
    pub world_size: u32,
    /// Of how many ranks lines are shown: those of one are not folded.
    pub shown: usize,
    /// Where the files are that have all lines.
    pub run_dir: RunDir,
}

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
    host: String,
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
        let mut painter = Painter::new(style);
        let mut view = view.filter(|_| painter.style.format == Format::Text);
        std::thread::Builder::new()
            .name("screen".into())
            .spawn(move || {
                show(tap, outputs, &mut painter, &mut view);
                let _ = done.send(());
            })
            .context("cannot start the thread that shows the workers' output")?;
        Ok(Screen {
            feed,
            host: crate::manifest::host(),
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

    /// Shows the launcher's own words, behind everything that was given to the feed. Never waits.
    pub fn say(&self, text: &str) {
        self.feed.offer(Batch::own(&self.host, text));
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
        let waits = !painter.frame.is_empty();
        let wake = painter.fold.deadline().into_iter();
        let wake = wake.chain(changes.then_some(next_redraw));
        let wake = wake.chain(waits.then_some(next_write)).min();
        let taken = tap.wait(wake.map(|at| at.saturating_sub(start.elapsed())));
        let now = start.elapsed();
        let closed = taken == Taken::Closed;
        if let Taken::Batch(batch) = &taken {
            painter.take(batch, now);
        }
        painter.due(if closed { Duration::MAX } else { now });
        if now < next_write && !closed && painter.frame.bytes() < LIMIT {
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
        if closed || !painter.frame.is_empty() || (redraw && shown != bottom) {
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
    let frame = std::mem::take(&mut painter.frame);
    let mut segments = frame.pieces(to.together).peekable();
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

/// Lines on their way out, in order, each run of one stream together.
#[derive(Default)]
struct Frame(Vec<(bool, Vec<u8>)>);

impl Frame {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn bytes(&self) -> usize {
        self.0.iter().map(|(_, text)| text.len()).sum()
    }

    fn to(&mut self, stderr: bool) -> &mut Vec<u8> {
        if self.0.last().is_none_or(|(last, _)| *last != stderr) {
            self.0.push((stderr, Vec::new()));
        }
        let last = self.0.len() - 1;
        &mut self.0[last].1
    }

    /// In order, or, where nobody can see the order, with as few pieces as possible.
    fn pieces(self, in_order: bool) -> impl Iterator<Item = (bool, Vec<u8>)> {
        if in_order || self.0.len() < 3 {
            return self.0.into_iter();
        }
        let mut merged = vec![(false, Vec::new()), (true, Vec::new())];
        for (stderr, text) in self.0 {
            merged[usize::from(stderr)].1.extend_from_slice(&text);
        }
        merged.into_iter()
    }
}

/// What turns batches into text. Without effects.
struct Painter {
    style: Style,
    fold: Fold,
    /// Of each rank, where labels name it.
    hosts: std::collections::HashMap<u32, String>,
    host_width: usize,
    digits: usize,
    bar: Option<(u32, Vec<u8>)>,
    bar_changed: bool,
    frame: Frame,
}

#[derive(Serialize)]
struct Record<'a> {
    time: &'a str,
    host: &'a str,
    /// `null`: the launcher.
    rank: Option<u32>,
    stream: &'a str,
    line: &'a str,
}

impl Painter {
    fn new(style: Style) -> Painter {
        Painter {
            fold: Fold::new(WINDOW, style.shown),
            hosts: std::collections::HashMap::new(),
            host_width: 0,
            digits: style.world_size.max(1).ilog10() as usize + 1,
            bar: None,
            bar_changed: false,
            frame: Frame::default(),
            style,
        }
    }

    fn take(&mut self, batch: &Batch, now: Duration) {
        for missed in &batch.missed {
            let text = self.missed(missed);
            self.own(batch, &text, now);
        }
        for line in batch.lines() {
            match (line.rank, self.style.format) {
                (None, _) => self.own(batch, &String::from_utf8_lossy(line.text), now),
                (Some(_), Format::Json) => {
                    let stream = if line.stderr { "stderr" } else { "stdout" };
                    let text = String::from_utf8_lossy(line.text);
                    self.record(batch, line.rank, stream, &text);
                }
                (Some(rank), Format::Text) => {
                    self.know(rank, &batch.host);
                    if self.style.shown > 1 {
                        self.fold.push(now, rank, &line);
                        self.due(now);
                    } else {
                        self.show(&[rank], line.stderr, line.text);
                    }
                }
            }
        }
        if let (Some((rank, bar)), Format::Text) = (&batch.bar, self.style.format) {
            self.know(*rank, &batch.host);
            self.bar = (!bar.is_empty()).then(|| (*rank, bar.clone()));
            self.bar_changed = true;
        }
    }

    /// Shows what was held back long enough.
    fn due(&mut self, now: Duration) {
        while let Some(group) = self.fold.due(now) {
            self.group(group);
        }
    }

    fn group(&mut self, group: Group) {
        self.show(&group.ranks, group.stderr, &group.text);
    }

    fn show(&mut self, ranks: &[u32], stderr: bool, text: &[u8]) {
        let label = self.label(ranks);
        let to = self.frame.to(stderr);
        to.extend_from_slice(label.as_bytes());
        to.extend_from_slice(text);
        to.push(b'\n');
    }

    fn own(&mut self, batch: &Batch, text: &str, now: Duration) {
        match self.style.format {
            Format::Json => self.record(batch, None, "launcher", text),
            Format::Text => {
                self.fold.own(now, text);
                self.due(now);
            }
        }
    }

    fn record(&mut self, batch: &Batch, rank: Option<u32>, stream: &str, line: &str) {
        let record = Record {
            time: &batch.time,
            host: &batch.host,
            rank,
            stream,
            line,
        };
        let to = self.frame.to(false);
        // Writing text into memory cannot fail.
        let _ = serde_json::to_writer(&mut *to, &record);
        to.push(b'\n');
    }

    /// `12 | `, `gpu-02 12 | ` or `[0-7,12] | `; nothing for the launcher's own words.
    fn label(&self, ranks: &[u32]) -> String {
        let digits = self.digits;
        match ranks {
            [] => String::new(),
            [rank] => match self.hosts.get(rank) {
                Some(host) => {
                    let width = self.host_width;
                    format!("{host:<width$} {rank:>digits$} | ")
                }
                None => format!("{rank:>digits$} | "),
            },
            _ => format!("[{}] | ", ranges(ranks)),
        }
    }

    fn know(&mut self, rank: u32, host: &str) {
        if self.style.hosts && self.hosts.get(&rank).is_none_or(|known| known != host) {
            self.host_width = self.host_width.max(host.chars().count());
            self.hosts.insert(rank, host.into());
        }
    }

    fn missed(&self, missed: &Missed) -> String {
        let Missed {
            host,
            rank,
            stderr,
            lines,
        } = missed;
        let file = self.style.run_dir.log(host, *rank, *stderr);
        let lines = crate::supervisor::count(*lines as usize, "line");
        let file = file.display();
        format!("tsm-launch: {lines} of rank {rank} not shown: see {file}")
    }

    /// The worker's progress line.
    fn bar(&self, width: usize) -> Option<String> {
        let (rank, bar) = self.bar.as_ref()?;
        let text = self.label(&[*rank]) + &String::from_utf8_lossy(bar);
        Some(fit(&text, width.saturating_sub(1)))
    }
}

/// `0-3,8` for `[8, 0, 1, 2, 3]`.
pub fn ranges(ranks: &[u32]) -> String {
    let ranks: Vec<usize> = ranks.iter().map(|&rank| rank as usize).collect();
    crate::cores::to_list(&ranks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Snapshot;
    use std::io::{Read, Write};
    use std::sync::{Arc, Mutex};
    use tokio::sync::watch;

    fn style(format: Format, hosts: bool) -> Style {
        Style {
            format,
            hosts,
            world_size: 16,
            shown: 16,
            run_dir: RunDir::new("runs/a"),
        }
    }

    fn batch(host: &str, lines: &[(u32, &str)]) -> Batch {
        let mut batch = Batch::new(host);
        batch.time = "2026-01-31T23:59:59.250Z".into();
        for (rank, text) in lines {
            batch.push(Some(*rank), *rank == 3, text.as_bytes());
        }
        batch
    }

    /// All that was written to stdout and stderr.
    fn painted(style: Style, batches: &[Batch]) -> [String; 2] {
        let mut painter = Painter::new(style);
        for batch in batches {
            painter.take(batch, Duration::ZERO);
        }
        painter.due(Duration::MAX);
        let mut text = [String::new(), String::new()];
        for (stderr, piece) in std::mem::take(&mut painter.frame).pieces(false) {
            text[usize::from(stderr)] += &String::from_utf8(piece).unwrap();
        }
        text
    }

    #[test]
    fn labels_name_ranks_and_where_there_are_several_their_nodes() {
        let batches = [
            batch("gpu-1", &[(0, "a"), (1, "a"), (12, "b")]),
            batch("gpu-22", &[(9, "a"), (8, "c"), (3, "d")]),
        ];
        let [out, err] = painted(style(Format::Text, false), &batches);
        assert_eq!(out, "[0-1,9] | a\n12 | b\n 8 | c\n");
        assert_eq!(err, " 3 | d\n");
        let [out, _] = painted(style(Format::Text, true), &batches);
        assert_eq!(out, "[0-1,9] | a\ngpu-1  12 | b\ngpu-22  8 | c\n");
    }

    #[test]
    fn json_is_one_object_a_line_on_stdout() {
        let mut lines = batch("gpu-1", &[(0, "a \"b\""), (3, "\x1b[1m\u{fffd}")]);
        lines.push(None, true, b"tsm-launch: stopping");
        let [out, err] = painted(style(Format::Json, true), &[lines]);
        assert_eq!(err, "");
        let expected = [
            r#"{"time":"2026-01-31T23:59:59.250Z","host":"gpu-1","rank":0,"stream":"stdout","line":"a \"b\""}"#,
            r#"{"time":"2026-01-31T23:59:59.250Z","host":"gpu-1","rank":3,"stream":"stderr","line":"\u001b[1m�"}"#,
            r#"{"time":"2026-01-31T23:59:59.250Z","host":"gpu-1","rank":null,"stream":"launcher","line":"tsm-launch: stopping"}"#,
        ];
        assert_eq!(out.lines().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn missing_lines_are_said_with_their_file_before_the_next() {
        let mut next = batch("gpu-1", &[(1, "next")]);
        let (host, rank) = ("gpu-1".to_string(), 1);
        next.missed = vec![Missed {
            host,
            rank,
            stderr: true,
            lines: 12,
        }];
        let [out, err] = painted(style(Format::Text, false), &[next]);
        assert_eq!(out, " 1 | next\n");
        let file = "runs/a/logs/gpu-1-1.err";
        assert_eq!(
            err,
            format!("tsm-launch: 12 lines of rank 1 not shown: see {file}\n")
        );
    }

    #[test]
    fn own_words_come_after_what_was_said_before_them() {
        let mut both = batch("a", &[(3, "before")]);
        both.push(None, true, b"tsm-launch: now");
        assert_eq!(
            painted(style(Format::Text, false), &[both])[1],
            " 3 | before\ntsm-launch: now\n"
        );
    }

    #[test]
    fn the_order_of_the_streams_is_kept_where_it_can_be_seen() {
        let mut painter = Painter::new(Style {
            shown: 1,
            ..style(Format::Text, false)
        });
        painter.take(&batch("a", &[(0, "a"), (3, "b"), (0, "c")]), Duration::ZERO);
        let frame = std::mem::take(&mut painter.frame);
        let streams: Vec<bool> = frame.pieces(true).map(|(stderr, _)| stderr).collect();
        assert_eq!(streams, [false, true, false]);
    }

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
        while !so_far().contains(" 199%\ndemo  0 s\nstep 199  ") {
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
        screen.say("tsm-launch: the end");
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
