//! A program's own last words in its stderr: Python exceptions, Rust panics, C++ exceptions, failed assertions.

use std::fmt;

/// One error, and where in the program it came up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words {
    /// `ValueError: broken clip`.
    pub text: String,
    /// More lines of the message, where it has several.
    pub more: Vec<String>,
    /// `/home/me/train.py:17 in load`.
    pub place: Option<String>,
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.with_place(&self.text))
    }
}

/// `line` without the prefix `[rank3]: ` that torch puts before it.
pub fn bare(line: &str) -> &str {
    let mut line = line;
    while let Some(rest) = line.strip_prefix("[rank") {
        let Some((number, rest)) = rest.split_once("]:") else {
            break;
        };
        if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
            break;
        }
        line = rest.strip_prefix(' ').unwrap_or(rest);
    }
    line
}

/// Every error the program told of, in the order it did.
pub fn of_stderr(stderr: &[String]) -> Vec<Words> {
    let lines: Vec<&str> = stderr.iter().map(|line| bare(line)).collect();
    let mut found = Vec::new();
    let mut i = 0;
    while i < lines.len() {
        let (words, next) = python(&lines, i)
            .or_else(|| fatal_python(&lines, i))
            .or_else(|| panic(&lines, i))
            .or_else(|| terminate(&lines, i))
            .or_else(|| single(&lines, i))
            .unwrap_or((None, i + 1));
        found.extend(words);
        i = next;
    }
    found
}

/// The words of torch's error file, which has the exception without its traceback.
pub fn of_exception(message: &str) -> Option<Words> {
    let lines: Vec<&str> = message.trim().lines().collect();
    let first = lines.first()?;
    Some(Words::new(first.trim().into(), None, &lines, 1))
}

/// Lines of a message that are looked at.
const MORE: usize = 12;

impl Words {
    /// The message goes on in `lines` from `next`.
    fn new(text: String, place: Option<String>, lines: &[&str], next: usize) -> Words {
        let rest = lines.get(next..).unwrap_or_default().iter();
        let goes_on = |line: &&&str| {
            let ended = line.trim().is_empty() || line.trim_end().ends_with(HEADER);
            // A `[` starts a line of a log.
            let other = line.starts_with('[') || line.starts_with("Exception ignored in");
            !ended && !other && frame(line).is_none()
        };
        let more = rest
            .take_while(goes_on)
            .take(MORE)
            .map(|line| line.trim().to_owned());
        Words {
            text,
            more: more.collect(),
            place,
        }
    }

    /// `line` of the message, with the place of the error.
    pub fn with_place(&self, line: &str) -> String {
        match &self.place {
            Some(place) => format!("{line}, at {place}"),
            None => line.into(),
        }
    }
}

type Found = Option<(Option<Words>, usize)>;

const HEADER: &str = "Traceback (most recent call last):";

/// The traceback that starts at `start`; its header may be cut off.
fn python(lines: &[&str], start: usize) -> Found {
    let header = lines[start].trim_end().ends_with(HEADER);
    if !header && frame(lines[start]).is_none() {
        return None;
    }
    let first = start + usize::from(header);
    let frames = lines[first..]
        .iter()
        .take_while(|line| line.starts_with(' '))
        .count();
    let end = first + frames;
    let exception = lines.get(end).filter(|line| is_exception(line));
    // What fails while Python tears itself down is no reason to end.
    let ignored = start > 0 && lines[start - 1].starts_with("Exception ignored in");
    let words = exception.filter(|_| !ignored).map(|line| {
        let place = innermost(lines[first..end].iter().rev().copied());
        Words::new(line.trim().into(), place, lines, end + 1)
    });
    // A message of several lines may itself hold the traceback of a worker process.
    let next = if exception.is_some() { end + 1 } else { end };
    Some((words, next.max(start + 1)))
}

/// `Fatal Python error: Segmentation fault`, and the stack of the thread that caused it, innermost frame first.
fn fatal_python(lines: &[&str], start: usize) -> Found {
    let text = lines[start].strip_prefix("Fatal Python error: ")?;
    let current = lines[start..]
        .iter()
        .position(|line| line.starts_with("Current thread"))
        .map(|i| start + i + 1);
    let frames = |from: usize| {
        lines[from..]
            .iter()
            .copied()
            .take_while(|line| line.starts_with(' '))
    };
    let text = format!("Fatal Python error: {text}");
    let words = Words::new(
        text,
        current.and_then(|from| innermost(frames(from))),
        &[],
        0,
    );
    let next = current.map_or(start + 1, |from| from + frames(from).count());
    Some((Some(words), next))
}

/// `thread 'main' panicked at src/main.rs:4:5:`, and the message in the next line; before Rust 1.73 in the same.
fn panic(lines: &[&str], start: usize) -> Found {
    let rest = lines[start].strip_prefix("thread '")?;
    let (_, at) = rest.split_once(" panicked at ")?;
    let (text, place) = match at.strip_prefix('\'') {
        Some(old) => old.rsplit_once("', ")?,
        None => {
            let message = lines.get(start + 1).copied().unwrap_or_default();
            (message, at.trim_end().trim_end_matches(':'))
        }
    };
    let text = format!("panic: {}", text.trim());
    let words = Words::new(text, Some(place.into()), &[], 0);
    Some((Some(words), start + 1))
}

/// `terminate called after throwing an instance of 'c10::Error'`, and `  what():  ...`.
fn terminate(lines: &[&str], start: usize) -> Found {
    let (_, thrown) =
        lines[start].split_once("terminate called after throwing an instance of '")?;
    let kind = thrown.trim_end().trim_end_matches('\'');
    let what = lines.get(start + 1)?.trim_start().strip_prefix("what():");
    let text = match what {
        Some(what) => format!("{kind}: {}", what.trim()),
        None => format!("{kind} was not caught"),
    };
    Some((Some(Words::new(text, None, lines, start + 2)), start + 1))
}

/// A line that is an error by itself.
fn single(lines: &[&str], start: usize) -> Found {
    let line = lines[start];
    let assertion = line.contains("Assertion `") && line.trim_end().ends_with("failed.");
    // Of glibc.
    let heap = [
        "free(): ",
        "malloc(): ",
        "double free",
        "corrupted size vs. prev_size",
        "*** stack smashing",
    ];
    let starts = ["error: ", "Error: ", "fatal: ", "fatal error: "];
    let told = assertion
        || heap.iter().any(|start| line.starts_with(start))
        || starts.iter().any(|start| line.starts_with(start));
    told.then(|| {
        let words = Words::new(line.trim().into(), None, lines, start + 1);
        (Some(words), start + 1)
    })
}

/// `/home/me/train.py`, `17` and `load` of `  File "/home/me/train.py", line 17, in load`.
fn frame(line: &str) -> Option<(&str, &str, &str)> {
    let (path, rest) = line
        .trim_start()
        .strip_prefix("File \"")?
        .split_once("\", line ")?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (number, rest) = rest.split_at(digits);
    let function = rest.trim_start_matches(',').trim();
    (digits > 0).then_some((path, number, function.strip_prefix("in ").unwrap_or("")))
}

/// Of frames, the innermost first, the first that is the user's own; else the first.
fn innermost<'a>(lines: impl Iterator<Item = &'a str>) -> Option<String> {
    let frames: Vec<_> = lines.filter_map(frame).collect();
    let library = |path: &str| {
        [
            "site-packages/",
            "dist-packages/",
            "/lib/python",
            "<frozen ",
        ]
        .iter()
        .any(|part| path.contains(part))
    };
    let own = frames.iter().find(|(path, ..)| !library(path));
    let (path, line, function) = own.or(frames.first())?;
    Some(match *function {
        "" => format!("{path}:{line}"),
        function => format!("{path}:{line} in {function}"),
    })
}

/// Whether a line is how Python ends a traceback: `package.Error: message`, or the name alone.
fn is_exception(line: &str) -> bool {
    let name = line.split(':').next().unwrap_or_default().trim_end();
    let part = |part: &str| {
        let mut chars = part.chars();
        chars.next().is_some_and(|c| c.is_alphabetic() || c == '_')
            && chars.all(|c| c.is_alphanumeric() || c == '_')
    };
    !name.is_empty() && name.split('.').all(part)
}
