//! From the bytes of the workers to what stands on the launcher's own stdout and stderr.
//!
//! ```text
//! bytes -> Lines -> Batch -> queue -> (the network -> queue ->) Screen: Painter: Fold, labels -> Console
//! ```

pub mod fold;
pub mod lines;
pub mod painter;
pub mod queue;
pub mod screen;

use std::io::Write;

/// Stdout or stderr. Once its reader is gone, text goes nowhere.
pub struct Console {
    to: Option<Box<dyn Write + Send>>,
    /// Cells of each line that stands at the bottom of the terminal.
    bottom: Vec<usize>,
}

impl Console {
    pub fn new(to: impl Write + Send + 'static) -> Console {
        Console {
            to: Some(Box::new(to)),
            bottom: Vec::new(),
        }
    }

    /// Writes whole lines where `bottom` stands, and `bottom` below them. The terminal is `width` cells wide.
    pub fn write(&mut self, lines: &[u8], bottom: &[String], width: usize) {
        let mut text = erase(&self.bottom, width).into_bytes();
        text.extend_from_slice(lines);
        for (i, line) in bottom.iter().enumerate() {
            text.extend_from_slice(if i > 0 { b"\n" } else { b"" });
            text.extend_from_slice(line.as_bytes());
        }
        self.bottom = bottom.iter().map(|line| cells(line)).collect();
        if let Some(to) = &mut self.to
            && !text.is_empty()
            && to.write_all(&text).and_then(|()| to.flush()).is_err()
        {
            self.to = None;
        }
    }

    /// Takes the bottom off the terminal.
    pub fn clear(&mut self, width: usize) {
        self.write(b"", &[], width);
    }
}

/// Takes lines of so many cells off a terminal whose cursor stands behind the last. Lines longer than
/// `width` take several rows: the terminal has become narrower since.
fn erase(lines: &[usize], width: usize) -> String {
    let rows: usize = lines
        .iter()
        .map(|cells| cells.div_ceil(width.max(1)).max(1))
        .sum();
    match rows {
        0 => String::new(),
        1 => "\r\x1b[J".into(),
        _ => format!("\r\x1b[{}A\x1b[J", rows - 1),
    }
}

/// Cells that `line` takes on a terminal, at most: what is not ASCII may be two wide. Colours take none.
pub fn cells(line: &str) -> usize {
    let mut chars = line.chars();
    let mut cells = 0;
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => while chars.next().is_some_and(|c| !c.is_ascii_alphabetic()) {},
            c => cells += cell(c),
        }
    }
    cells
}

fn cell(c: char) -> usize {
    1 + usize::from(!c.is_ascii())
}

/// The beginning of `text` that fits into `width` cells, without control characters.
pub fn fit(text: &str, width: usize) -> String {
    let mut left = width;
    text.chars()
        .filter(|c| !c.is_control())
        .take_while(|&c| {
            let fits = cell(c) <= left;
            left = left.saturating_sub(cell(c));
            fits
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bottom_is_taken_off_before_the_next_line() {
        let (mut ours, theirs) = std::io::pipe().unwrap();
        let mut console = Console::new(theirs);
        let bottom = ["step 1".to_string(), "gpu-01".to_string()];
        console.write(b"a\n", &bottom, 80);
        console.write(b"b\n", &bottom[..1], 80);
        console.write(b"", &[], 3);
        drop(console);
        let mut text = String::new();
        std::io::Read::read_to_string(&mut ours, &mut text).unwrap();
        assert_eq!(
            text,
            "a\nstep 1\ngpu-01\r\x1b[1A\x1b[Jb\nstep 1\r\x1b[1A\x1b[J"
        );
    }

    #[test]
    fn cells_are_counted_without_colours_and_never_too_few() {
        assert_eq!(cells("\x1b[1;31mab\x1b[0m c"), 4);
        assert_eq!(cells("\u{4e16}\u{754c}"), 4);
        assert_eq!(fit("ab\u{4e16}\x07c", 4), "ab\u{4e16}");
        assert_eq!(fit("ab\u{4e16}c", 3), "ab");
        assert_eq!(fit("abc", 0), "");
    }
}
