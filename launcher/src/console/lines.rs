//! From the bytes of a stream to whole lines, and batches of them that can travel.

use serde::{Deserialize, Serialize};

/// A line longer than this is shown in pieces. Files are never cut.
const MAX_LINE: usize = 64 << 10;

/// Lines to show, of one node, in the order in which they were read.
///
/// As JSON, bytes that are no UTF-8 are replaced: files alone keep every byte.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "Wire", into = "Wire")]
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

#[derive(Serialize, Deserialize)]
struct Wire {
    host: String,
    time: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    missed: Vec<Missed>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bar: Option<(u32, String)>,
    /// Rank, whether it is stderr, and the text.
    lines: Vec<(Option<u32>, bool, String)>,
}

impl From<Batch> for Wire {
    fn from(batch: Batch) -> Wire {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Wire {
            lines: batch
                .lines()
                .map(|line| (line.rank, line.stderr, text(line.text)))
                .collect(),
            bar: batch.bar.map(|(rank, bar)| (rank, text(&bar))),
            host: batch.host,
            time: batch.time,
            missed: batch.missed,
        }
    }
}

impl From<Wire> for Batch {
    fn from(wire: Wire) -> Batch {
        let mut batch = Batch {
            host: wire.host,
            time: wire.time,
            missed: wire.missed,
            bar: wire.bar.map(|(rank, bar)| (rank, bar.into_bytes())),
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

/// Cuts one stream into lines.
pub struct Lines {
    rank: Option<u32>,
    stderr: bool,
    pending: Vec<u8>,
    /// Show a progress bar (text after a carriage return) while its line is not complete.
    progress: bool,
    /// A bar was shown since the last complete line.
    in_progress: bool,
}

impl Lines {
    pub fn new(rank: u32, stderr: bool, progress: bool) -> Lines {
        Lines {
            rank: Some(rank),
            stderr,
            pending: Vec::new(),
            progress,
            in_progress: false,
        }
    }

    /// Takes in `bytes`; complete lines, and a progress line in the making, go to `batch`.
    pub fn push(&mut self, bytes: &[u8], batch: &mut Batch) {
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
            if let (true, Some(rank)) = (self.progress, self.rank) {
                self.in_progress = true;
                batch.bar = Some((rank, visible(&self.pending).to_vec()));
            }
        }
        if self.pending.len() > MAX_LINE {
            self.complete(batch);
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
        batch.push(self.rank, self.stderr, visible(line));
    }
}

/// Where the last thing that a terminal would still show begins: the last carriage return that is followed
/// by text, or, if none is, the one before.
fn last_return(line: &[u8]) -> Option<usize> {
    let body = line.strip_suffix(b"\r").unwrap_or(line);
    memchr::memrchr(b'\r', body).or((body.len() < line.len()).then_some(0))
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

    fn show(chunks: &[&[u8]], progress: bool) -> (Vec<String>, Option<String>) {
        let (mut lines, mut batch) = (Lines::new(3, true, progress), Batch::default());
        for chunk in chunks {
            lines.push(chunk, &mut batch);
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
            show(&[b"ab", b"c\nd", b"\n\ne"], false).0,
            ["abc", "d", "", "e"]
        );
        assert_eq!(show(&[b"\xff\xfe\n"], false).0, ["\u{fffd}\u{fffd}"]);
        assert_eq!(show(&[b"dos\r\nline\r\n"], false).0, ["dos", "line"]);
    }

    #[test]
    fn of_a_progress_bar_the_last_state_is_shown() {
        let chunks: [&[u8]; 4] = [b"\r 10%", b"\r 50%", b"\r100%\n", b"next\n"];
        let (lines, none) = show(&chunks, false);
        assert_eq!((lines, none), (vec!["100%".into(), "next".into()], None));
        assert_eq!(show(&chunks, true).1.as_deref(), Some(""));
        let mut batch = Batch::default();
        Lines::new(3, true, true).push(b" 10%\r 20%\r", &mut batch);
        assert_eq!(batch.bar, Some((3, b" 20%".to_vec())));
    }

    #[test]
    fn an_endless_bar_or_line_takes_no_memory() {
        let (mut lines, mut batch) = (Lines::new(0, true, false), Batch::default());
        for _ in 0..100_000 {
            lines.push(b"\r 10% of it", &mut batch);
        }
        assert!(lines.pending.len() < 64 && batch.is_empty());
        lines.push(&vec![b'x'; 3 * MAX_LINE], &mut batch);
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
            prop_assert_eq!(show(&chunks, false).0, show(&[text.as_bytes()], false).0);
        }
    }
}
