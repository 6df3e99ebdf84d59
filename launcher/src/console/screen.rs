//! The thread that writes to the launcher's stdout and stderr: a stopped terminal stops nothing else.

use anyhow::Context;
use serde::Serialize;
use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::str::FromStr;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use tsm_job::RunDir;

use super::fold::{Fold, Group};
use super::lines::{Batch, Missed};
use super::queue::{Feed, LIMIT, Taken, Tap, queue};
use super::{Console, fit};
use crate::status::view::View;

/// How long a line may wait for equal ones of other ranks.
const WINDOW: Duration = Duration::from_millis(100);
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
        Ok(Outputs {
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
    /// Starts the thread; `view` stands at the bottom where stderr is a terminal.
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

    /// Waits until all is shown, but not longer than `wait`. Returns whether it is.
    pub fn finish(self, wait: Duration) -> bool {
        self.feed.close();
        self.finished.recv_timeout(wait).is_ok()
    }
}

fn show(mut tap: Tap, mut to: Outputs, painter: &mut Painter, view: &mut Option<View>) {
    let start = Instant::now();
    let is_terminal = (to.size)().is_some();
    let mut view = view.as_mut().filter(|_| is_terminal);
    let mut drawn: Option<Duration> = None;
    let (mut view_lines, mut shown) = (Vec::new(), (Vec::new(), 0));
    loop {
        let redraw = drawn.map_or(Duration::ZERO, |at| at + REDRAW);
        let changes = view.is_some() || (is_terminal && painter.bar_changed);
        let wake = match (painter.fold.deadline(), changes) {
            (Some(fold), true) => Some(fold.min(redraw)),
            (None, true) => Some(redraw),
            (fold, false) => fold,
        };
        let taken = tap.wait(wake.map(|at| at.saturating_sub(start.elapsed())));
        let now = start.elapsed();
        let closed = taken == Taken::Closed;
        if let Taken::Batch(batch) = &taken {
            painter.take(batch, now);
        }
        painter.due(closed.then_some(Duration::MAX).unwrap_or(now));
        let (width, rows) = (to.size)().unwrap_or((80, 24));
        let redraw = now >= redraw && is_terminal && !closed;
        if redraw {
            if let Some(view) = &mut view {
                view_lines = view.lines(width);
            }
            painter.bar_changed = false;
            drawn = Some(now);
        }
        let mut bottom: Vec<String> = Vec::new();
        if is_terminal && !closed {
            bottom.extend(painter.bar(width));
            bottom.extend(view_lines.iter().cloned());
            bottom.truncate((rows / 2).max(1));
        }
        let redraw = redraw && shown != (bottom.clone(), width);
        if redraw || closed || !painter.frame.is_empty() {
            write(painter, &mut to, &bottom, width);
            shown = (bottom, width);
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
            self.flush();
            let text = self.missed(missed);
            self.own(batch, &text);
        }
        for line in batch.lines() {
            match (line.rank, self.style.format) {
                (None, _) => {
                    self.flush();
                    self.own(batch, &String::from_utf8_lossy(line.text));
                }
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

    fn flush(&mut self) {
        while let Some(group) = self.fold.pop() {
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

    fn own(&mut self, batch: &Batch, text: &str) {
        if self.style.format == Format::Json {
            return self.record(batch, None, "launcher", text);
        }
        let to = self.frame.to(true);
        to.extend_from_slice(text.as_bytes());
        to.push(b'\n');
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

    /// `12 | `, `gpu-02 12 | ` or `[0-7,12] | `.
    fn label(&self, ranks: &[u32]) -> String {
        let digits = self.digits;
        match ranks {
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
