//! From the bytes of a worker to whole, labelled lines on the launcher's own stdout and stderr.

use std::io::Write;

/// A line longer than this is shown in pieces. Files are never cut.
const MAX_LINE: usize = 64 << 10;

/// Cuts one stream into labelled lines.
pub struct Lines {
    /// `12 | `
    label: String,
    pending: Vec<u8>,
    /// Show a progress bar (text after a carriage return) while its line is not complete.
    progress: bool,
}

impl Lines {
    /// `width` is the number of digits of the largest rank.
    pub fn new(rank: u32, width: usize, progress: bool) -> Lines {
        Lines {
            label: format!("{rank:>width$} | "),
            pending: Vec::new(),
            progress,
        }
    }

    /// Takes in `bytes`; complete lines go to `out`, a progress line in the making to `bar`.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>, bar: &mut Vec<u8>) {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&b| b == b'\n') {
            self.pending.extend_from_slice(&rest[..end]);
            self.complete(out);
            rest = &rest[end + 1..];
        }
        self.pending.extend_from_slice(rest);
        // Of a bar that redraws itself without ever ending the line, only the last state matters.
        if let Some(start) = last_return(&self.pending) {
            self.pending.drain(..start);
            if self.progress {
                bar.clear();
                bar.extend_from_slice(self.label.as_bytes());
                bar.extend_from_slice(visible(&self.pending));
            }
        }
        if self.pending.len() > MAX_LINE {
            self.complete(out);
        }
    }

    /// Shows what is left when the stream ends without a newline.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            self.complete(out);
        }
    }

    fn complete(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.label.as_bytes());
        out.extend_from_slice(visible(&self.pending));
        out.push(b'\n');
        self.pending.clear();
    }
}

/// Where the last thing that a terminal would still show begins: the last carriage return that is followed
/// by text, or, if none is, the one before.
fn last_return(line: &[u8]) -> Option<usize> {
    let body = line.strip_suffix(b"\r").unwrap_or(line);
    body.iter()
        .rposition(|&b| b == b'\r')
        .or((body.len() < line.len()).then_some(0))
}

/// What a terminal would show of `line` in the end.
pub fn visible(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    line.iter()
        .rposition(|&b| b == b'\r')
        .map_or(line, |start| &line[start + 1..])
}

/// The launcher's own stdout or stderr. Once its reader is gone, text goes nowhere.
pub struct Console {
    to: Option<Box<dyn Write + Send>>,
    /// A progress bar stands on the current line of the terminal.
    bar_shown: bool,
}

impl Console {
    pub fn new(to: impl Write + Send + 'static) -> Console {
        Console {
            to: Some(Box::new(to)),
            bar_shown: false,
        }
    }

    /// Writes whole lines, and then `bar` without a newline where there is one.
    pub fn write(&mut self, lines: &mut Vec<u8>, bar: &mut Vec<u8>) {
        if lines.is_empty() && bar.is_empty() {
            return;
        }
        self.clear_bar();
        self.bar_shown = !bar.is_empty();
        lines.append(bar);
        self.put(lines);
        lines.clear();
    }

    /// Takes the progress bar off the terminal.
    pub fn clear_bar(&mut self) {
        if std::mem::take(&mut self.bar_shown) {
            self.put(b"\r\x1b[K");
        }
    }

    fn put(&mut self, text: &[u8]) {
        if let Some(to) = &mut self.to
            && to.write_all(text).and_then(|()| to.flush()).is_err()
        {
            self.to = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn show(chunks: &[&[u8]], progress: bool) -> (String, String) {
        let (mut lines, mut out, mut bar) = (Lines::new(3, 2, progress), Vec::new(), Vec::new());
        for chunk in chunks {
            lines.push(chunk, &mut out, &mut bar);
        }
        lines.finish(&mut out);
        (
            String::from_utf8_lossy(&out).into(),
            String::from_utf8_lossy(&bar).into(),
        )
    }

    #[test]
    fn lines_are_labelled_and_whole() {
        assert_eq!(
            show(&[b"ab", b"c\nd", b"\n\ne"], false).0,
            " 3 | abc\n 3 | d\n 3 | \n 3 | e\n"
        );
        assert_eq!(show(&[b"\xff\xfe\n"], false).0, " 3 | \u{fffd}\u{fffd}\n");
        assert_eq!(
            show(&[b"dos\r\nline\r\n"], false).0,
            " 3 | dos\n 3 | line\n"
        );
    }

    #[test]
    fn of_a_progress_bar_the_last_state_is_shown() {
        let chunks: [&[u8]; 4] = [b"\r 10%", b"\r 50%", b"\r100%\n", b"next\n"];
        assert_eq!(
            show(&chunks, false),
            (" 3 | 100%\n 3 | next\n".into(), String::new())
        );
        assert_eq!(show(&chunks[..2], true).1, " 3 |  50%");
        assert_eq!(show(&[b" 10%\r", b" 20%\r"], true).1, " 3 |  20%");
    }

    #[test]
    fn an_endless_bar_or_line_takes_no_memory() {
        let (mut lines, mut out, mut bar) = (Lines::new(0, 1, false), Vec::new(), Vec::new());
        for _ in 0..100_000 {
            lines.push(b"\r 10% of it", &mut out, &mut bar);
        }
        assert!(lines.pending.len() < 64 && out.is_empty());
        lines.push(&vec![b'x'; MAX_LINE + 1], &mut out, &mut bar);
        assert!(lines.pending.is_empty() && out.len() > MAX_LINE);
    }

    #[test]
    fn a_bar_is_cleared_before_the_next_line() {
        let (mut ours, theirs) = std::io::pipe().unwrap();
        let mut console = Console::new(theirs);
        console.write(&mut b"a\n".to_vec(), &mut b"50%".to_vec());
        console.write(&mut b"b\n".to_vec(), &mut Vec::new());
        drop(console);
        let mut text = String::new();
        std::io::Read::read_to_string(&mut ours, &mut text).unwrap();
        assert_eq!(text, "a\n50%\r\x1b[Kb\n");
    }

    proptest! {
        #[test]
        fn how_the_bytes_are_cut_does_not_matter(text in "[ab\n]{0,60}", cut in 0usize..60) {
            let cut = cut.min(text.len());
            let (a, b) = text.as_bytes().split_at(cut);
            prop_assert_eq!(show(&[a, b], false), show(&[text.as_bytes()], false));
        }
    }
}
