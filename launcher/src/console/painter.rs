//! From batches of lines to labelled text. Without effects.

use serde::Serialize;
use std::collections::HashMap;
use std::str::FromStr;
use std::time::Duration;
use tsm_job::RunDir;

use super::fit;
use super::fold::{Fold, Group};
use super::lines::{Batch, Missed};

/// How long a line may wait for equal ones of other ranks.
const WINDOW: Duration = Duration::from_millis(80);
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

/// Lines on their way out, in order, each run of one stream together.
#[derive(Default)]
struct Frame(Vec<(bool, Vec<u8>)>);

impl Frame {
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

    /// See [`Painter::pieces`].
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

/// What turns batches into text.
pub(super) struct Painter {
    style: Style,
    fold: Fold,
    /// Of each rank, where labels name it.
    hosts: HashMap<u32, String>,
    host_width: usize,
    digits: usize,
    bar: Option<(u32, Vec<u8>)>,
    /// Whether it differs from what the screen has drawn; the screen resets it.
    pub bar_changed: bool,
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
    pub fn new(style: Style) -> Painter {
        Painter {
            fold: Fold::new(WINDOW, style.shown),
            hosts: HashMap::new(),
            host_width: 0,
            digits: style.world_size.max(1).ilog10() as usize + 1,
            bar: None,
            bar_changed: false,
            frame: Frame::default(),
            style,
        }
    }

    pub fn take(&mut self, batch: &Batch, now: Duration) {
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

    /// When [`Self::due`] has something to do next.
    pub fn deadline(&self) -> Option<Duration> {
        self.fold.deadline()
    }

    /// Bytes that are ready to be written.
    pub fn ready(&self) -> usize {
        self.frame.bytes()
    }

    /// Hands over what is ready: whether it goes to stderr, and whole lines. In order, or, where nobody can
    /// see the order, in as few pieces as possible.
    pub fn pieces(&mut self, in_order: bool) -> impl Iterator<Item = (bool, Vec<u8>)> + use<> {
        std::mem::take(&mut self.frame).pieces(in_order)
    }

    /// Shows what was held back long enough.
    pub fn due(&mut self, now: Duration) {
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
        let lines = crate::text::count(*lines, "line");
        let file = file.display();
        format!("tsm-launch: {lines} of rank {rank} not shown: see {file}")
    }

    /// The worker's progress line.
    pub fn bar(&self, width: usize) -> Option<String> {
        let (rank, bar) = self.bar.as_ref()?;
        let text = self.label(&[*rank]) + &String::from_utf8_lossy(bar);
        Some(fit(&text, width.saturating_sub(1)))
    }
}

/// `0-3,8` for `[8, 0, 1, 2, 3]`.
fn ranges(ranks: &[u32]) -> String {
    let ranks: Vec<usize> = ranks.iter().map(|&rank| rank as usize).collect();
    crate::cores::to_list(&ranks)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn style(format: Format, hosts: bool) -> Style {
        Style {
            format,
            hosts,
            world_size: 16,
            shown: 16,
            run_dir: RunDir::new("runs/a"),
        }
    }

    pub fn batch(host: &str, lines: &[(u32, &str)]) -> Batch {
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
        for (stderr, piece) in painter.pieces(false) {
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
        let streams: Vec<bool> = painter.pieces(true).map(|(stderr, _)| stderr).collect();
        assert_eq!(streams, [false, true, false]);
    }
}
