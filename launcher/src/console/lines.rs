//! From the bytes of a stream to whole lines, and batches of them that can travel.

use serde::{Deserialize, Serialize, Serializer};
use std::borrow::Cow;
use std::time::Duration;

/// A line longer than this is shown in pieces. Files are never cut.
const MAX_LINE: usize = 64 << 10;
/// Where no terminal can draw it, the state of a progress bar is shown as a line so long after it changed.
pub const BAR_PERIOD: Duration = Duration::from_secs(10);

/// Lines to show, of one node, in the order in which they were read.
///
/// As JSON, bytes that are no UTF-8 are replaced: files alone keep every byte.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(from = "Wire<'static>")]
pub struct Batch {
    pub host: String,
    /// When they were read, by the clock of their node: RFC 3339, UTC.
    pub time: String,
    /// Lines that did not find room before these.
    pub missed: Vec<Missed>,
    /// The latest progress line of the stream that has one; empty when its line was completed.
    pub bar: Option<(u32, Vec<u8>)>,
    heads: Vec<Head>,
    /// All lines, one after the other, without newlines.
    text: Vec<u8>,
}

/// Lines of one stream that are only in its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missed {
    pub host: String,
    pub rank: u32,
    pub stderr: bool,
    pub lines: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Head {
    rank: Option<u32>,
    stderr: bool,
    end: usize,
}

/// One line of a [`Batch`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line<'a> {
    /// `None`: the launcher's own words.
    pub rank: Option<u32>,
    pub stderr: bool,
    /// Without label and newline.
    pub text: &'a [u8],
}

/// Borrows all text of the batch that it is made of.
#[derive(Serialize, Deserialize)]
struct Wire<'a> {
    host: Cow<'a, str>,
    time: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "<[Missed]>::is_empty")]
    missed: Cow<'a, [Missed]>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bar: Option<(u32, Cow<'a, str>)>,
    /// Rank, whether it is stderr, and the text.
    lines: Vec<(Option<u32>, bool, Cow<'a, str>)>,
}

impl Serialize for Batch {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let lines = self.lines();
        let bar = self.bar.as_ref();
        let wire = Wire {
            host: Cow::Borrowed(&self.host),
            time: Cow::Borrowed(&self.time),
            missed: Cow::Borrowed(&self.missed),
            bar: bar.map(|(rank, bar)| (*rank, String::from_utf8_lossy(bar))),
            lines: lines
                .map(|line| {
                    let text = String::from_utf8_lossy(line.text);
                    (line.rank, line.stderr, text)
                })
                .collect(),
        };
        wire.serialize(to)
    }
}

impl From<Wire<'_>> for Batch {
    fn from(wire: Wire) -> Batch {
        let bar = wire.bar.map(|(rank, bar)| (rank, bar.into_owned()));
        let mut batch = Batch {
            host: wire.host.into_owned(),
            time: wire.time.into_owned(),
            missed: wire.missed.into_owned(),
            bar: bar.map(|(rank, bar)| (rank, bar.into_bytes())),
            ..Batch::default()
        };
        for (rank, stderr, text) in &wire.lines {
            // A newline inside would be a line without a label.
            for text in text.split('\n') {
                batch.push(*rank, *stderr, text.as_bytes());
            }
        }
        batch
    }
}

impl Batch {
    pub fn new(host: &str) -> Batch {
        Batch {
            host: host.into(),
            time: crate::clock::Utc::now().rfc3339(),
            ..Batch::default()
        }
    }

    /// The launcher's own words, on stderr.
    pub fn own(host: &str, text: &str) -> Batch {
        let mut batch = Batch::new(host);
        for line in text.strip_suffix('\n').unwrap_or(text).split('\n') {
            batch.push(None, true, line.as_bytes());
        }
        batch
    }

    /// Adds a line; `text` has no newline in it.
    pub fn push(&mut self, rank: Option<u32>, stderr: bool, text: &[u8]) {
        self.text.extend_from_slice(text);
        let end = self.text.len();
        self.heads.push(Head { rank, stderr, end });
    }

    /// Nothing but the news that lines are missing.
    pub fn missing(missed: Vec<Missed>) -> Batch {
        Batch {
            missed,
            ..Batch::new("")
        }
    }

    /// A batch of nothing but the launcher's own words, where there are any.
    pub fn own_words(&self) -> Option<Batch> {
        let mut own = Batch {
            host: self.host.clone(),
            time: self.time.clone(),
            ..Batch::default()
        };
        for line in self.lines().filter(|line| line.rank.is_none()) {
            own.push(None, line.stderr, line.text);
        }
        (!own.is_empty()).then_some(own)
    }

    pub fn lines(&self) -> impl Iterator<Item = Line<'_>> {
        let mut start = 0;
        self.heads.iter().map(move |head| {
            let text = &self.text[start..head.end];
            start = head.end;
            Line {
                rank: head.rank,
                stderr: head.stderr,
                text,
            }
        })
    }

    /// The same in two, where it has more than one line.
    pub fn halves(mut self) -> (Batch, Option<Batch>) {
        let half = self.heads.len() / 2;
        if half == 0 {
            return (self, None);
        }
        let mut rest = Batch {
            host: self.host.clone(),
            time: self.time.clone(),
            bar: self.bar.take(),
            ..Batch::default()
        };
        for line in self.lines().skip(half) {
            rest.push(line.rank, line.stderr, line.text);
        }
        self.heads.truncate(half);
        self.text.truncate(self.heads[half - 1].end);
        (self, Some(rest))
    }

    pub fn is_empty(&self) -> bool {
        self.heads.is_empty() && self.missed.is_empty() && self.bar.is_none()
    }

    /// Memory it takes, about.
    pub fn bytes(&self) -> usize {
        let bar = self.bar.as_ref().map_or(0, |(_, bar)| bar.len());
        size_of::<Batch>() + self.text.len() + size_of::<Head>() * self.heads.len() + bar
    }
}

/// What is shown of a progress bar (text after a carriage return) while its line is not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bars {
    Hidden,
    /// Each state, at the bottom of a terminal.
    Drawn,
    /// Its last state as a line, so long after it changed.
    Lines(Duration),
}

/// Cuts one stream into lines.
pub struct Lines {
    rank: Option<u32>,
    stderr: bool,
    pending: Vec<u8>,
    bars: Bars,
    /// A bar was drawn since the last complete line.
    in_progress: bool,
    /// When to show the state of a bar as a line, and which one was shown last.
    due: Option<Duration>,
    state: Vec<u8>,
}

impl Lines {
    pub fn new(rank: u32, stderr: bool, bars: Bars) -> Lines {
        Lines {
            rank: Some(rank),
            stderr,
            pending: Vec::new(),
            bars,
            in_progress: false,
            due: None,
            state: Vec::new(),
        }
    }

    /// Takes in `bytes`; complete lines, and a progress line in the making, go to `batch`. `now` counts from any start.
    pub fn push(&mut self, bytes: &[u8], now: Duration, batch: &mut Batch) {
        let mut rest = bytes;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            if self.pending.is_empty() && end <= MAX_LINE {
                self.show(&rest[..end], batch);
            } else {
                self.pending.extend_from_slice(&rest[..end]);
                self.complete(batch);
            }
            rest = &rest[end + 1..];
        }
        self.pending.extend_from_slice(rest);
        // Of a bar that redraws itself without ever ending the line, only the last state matters.
        if let Some(start) = last_return(&self.pending) {
            self.pending.drain(..start);
            let state = visible(&self.pending);
            match (self.bars, self.rank) {
                (Bars::Drawn, Some(rank)) => {
                    self.in_progress = true;
                    batch.bar = Some((rank, state.to_vec()));
                }
                (Bars::Lines(period), _) if state != self.state && !is_blank(state) => {
                    self.due.get_or_insert(now + period);
                }
                _ => {}
            }
        }
        if self.pending.len() > MAX_LINE {
            self.complete(batch);
        }
    }

    /// When to call [`Lines::show_bar`].
    pub fn deadline(&self) -> Option<Duration> {
        self.due
    }

    /// Shows the state of a bar whose time has come.
    pub fn show_bar(&mut self, now: Duration, batch: &mut Batch) {
        if self.due.is_none_or(|at| now < at) {
            return;
        }
        self.due = None;
        let state = visible(&self.pending);
        if state != self.state && !is_blank(state) {
            self.state = state.to_vec();
            batch.push(self.rank, self.stderr, state);
        }
    }

    /// Shows what is left when the stream ends without a newline.
    pub fn finish(&mut self, batch: &mut Batch) {
        if !self.pending.is_empty() {
            self.complete(batch);
        }
    }

    fn complete(&mut self, batch: &mut Batch) {
        let line = std::mem::take(&mut self.pending);
        let mut pieces = visible(&line).chunks(MAX_LINE);
        self.show(pieces.next().unwrap_or_default(), batch);
        pieces.for_each(|piece| self.show(piece, batch));
    }

    fn show(&mut self, line: &[u8], batch: &mut Batch) {
        if let (true, Some(rank)) = (std::mem::take(&mut self.in_progress), self.rank) {
            batch.bar = Some((rank, Vec::new()));
        }
        self.due = None;
        let state = std::mem::take(&mut self.state);
        let line = visible(line);
        // The last state of a bar may be shown already.
        if state.is_empty() || state != line {
            batch.push(self.rank, self.stderr, line);
        }
    }
}

/// Where the last thing that a terminal would still show begins: the last carriage return that is followed
/// by text, or, if none is, the one before.
fn last_return(line: &[u8]) -> Option<usize> {
    let body = line.strip_suffix(b"\r").unwrap_or(line);
    memchr::memrchr(b'\r', body).or((body.len() < line.len()).then_some(0))
}

fn is_blank(text: &[u8]) -> bool {
    text.trim_ascii().is_empty()
}

/// What a terminal would show of `line` in the end.
pub fn visible(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    memchr::memrchr(b'\r', line).map_or(line, |start| &line[start + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: Duration = Duration::ZERO;

    fn show(chunks: &[&[u8]], bars: Bars) -> (Vec<String>, Option<String>) {
        let (mut lines, mut batch) = (Lines::new(3, true, bars), Batch::default());
        for chunk in chunks {
            lines.push(chunk, START, &mut batch);
        }
        lines.finish(&mut batch);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            batch
                .lines()
                .all(|line| line.rank == Some(3) && line.stderr)
        );
        let shown = batch.lines().map(|line| text(line.text)).collect();
        (shown, batch.bar.map(|(_, bar)| text(&bar)))
    }

    #[test]
    fn lines_are_whole() {
        assert_eq!(
            show(&[b"ab", b"c\nd", b"\n\ne"], Bars::Hidden).0,
            ["abc", "d", "", "e"]
        );
        assert_eq!(show(&[b"\xff\xfe\n"], Bars::Hidden).0, ["\u{fffd}\u{fffd}"]);
        assert_eq!(show(&[b"dos\r\nline\r\n"], Bars::Hidden).0, ["dos", "line"]);
    }

    #[test]
    fn of_a_progress_bar_the_last_state_is_shown() {
        let chunks: [&[u8]; 4] = [b"\r 10%", b"\r 50%", b"\r100%\n", b"next\n"];
        let (lines, none) = show(&chunks, Bars::Hidden);
        assert_eq!((lines, none), (vec!["100%".into(), "next".into()], None));
        assert_eq!(show(&chunks, Bars::Drawn).1.as_deref(), Some(""));
        let mut batch = Batch::default();
        Lines::new(3, true, Bars::Drawn).push(b" 10%\r 20%\r", START, &mut batch);
        assert_eq!(batch.bar, Some((3, b" 20%".to_vec())));
    }

    /// As a job's output file has it.
    #[test]
    fn without_a_terminal_a_bar_is_a_line_now_and_then() {
        let s = Duration::from_secs;
        let (mut lines, mut batch) = (Lines::new(3, true, Bars::Lines(s(10))), Batch::default());
        let mut shown = Vec::new();
        // A state each second, and then nothing.
        for i in 0..40 {
            if i <= 24 {
                lines.push(format!("\r {i:2}%").as_bytes(), s(i), &mut batch);
            }
            assert!(lines.deadline().is_none_or(|at| at >= s(i)));
            lines.show_bar(s(i), &mut batch);
            let batch = std::mem::take(&mut batch);
            let text = |line: Line| String::from_utf8_lossy(line.text).into_owned();
            shown.extend(batch.lines().map(|line| (i, text(line))));
            assert_eq!(batch.bar, None);
        }
        let expected = [(10, " 10%"), (21, " 21%"), (32, " 24%")];
        assert_eq!(shown, expected.map(|(i, text)| (i, text.to_string())));
        assert_eq!(lines.deadline(), None, "it stands still");
        // Its end is shown once, and what follows as always.
        lines.push(b"\n 24%\n\r    \r", s(41), &mut batch);
        assert_eq!(lines.deadline(), None, "a bar that was wiped away");
        let text: Vec<_> = batch.lines().map(|line| line.text).collect();
        assert_eq!(text, [b" 24%"]);
        // A short bar has only an end.
        let mut batch = Batch::default();
        lines.push(b"\r 1%", s(50), &mut batch);
        lines.push(b"\r100%\n", s(59), &mut batch);
        assert_eq!(lines.deadline(), None);
        assert_eq!(batch.lines().count(), 1);
    }

    #[test]
    fn an_endless_bar_or_line_takes_no_memory() {
        let (mut lines, mut batch) = (Lines::new(0, true, Bars::Hidden), Batch::default());
        for _ in 0..100_000 {
            lines.push(b"\r 10% of it", START, &mut batch);
        }
        assert!(lines.pending.len() < 64 && batch.is_empty());
        lines.push(&vec![b'x'; 3 * MAX_LINE], START, &mut batch);
        assert!(lines.pending.is_empty());
        assert!(batch.lines().all(|line| line.text.len() <= MAX_LINE));
        assert!(batch.bytes() > 3 * MAX_LINE);
    }

    #[test]
    fn a_batch_travels_as_json() {
        let mut batch = Batch::own("gpu-01", "two\nlines\n");
        batch.push(Some(7), false, b"caf\xc3\xa9 \x1b[1m");
        batch.bar = Some((0, b" 5%".to_vec()));
        let (host, rank) = ("gpu-01".to_string(), 3);
        batch.missed = vec![Missed {
            host,
            rank,
            stderr: true,
            lines: 12,
        }];
        let text = serde_json::to_string(&batch).unwrap();
        assert_eq!(serde_json::from_str::<Batch>(&text).unwrap(), batch);
        let torn = text.replace("lines\",", "li\\nnes\",");
        let lines = serde_json::from_str::<Batch>(&torn).map(|b| b.lines().count());
        assert!(lines.is_ok(), "{torn}");
    }

    proptest! {
        #[test]
        fn how_the_bytes_are_cut_does_not_matter(text in "[ab\r\n]{0,60}", cuts in proptest::collection::vec(0usize..60, 0..4)) {
            let mut chunks = Vec::new();
            let mut rest = text.as_bytes();
            for cut in cuts {
                let (chunk, after) = rest.split_at(cut.min(rest.len()));
                chunks.push(chunk);
                rest = after;
            }
            chunks.push(rest);
            prop_assert_eq!(show(&chunks, Bars::Hidden).0, show(&[text.as_bytes()], Bars::Hidden).0);
        }
    }
}
