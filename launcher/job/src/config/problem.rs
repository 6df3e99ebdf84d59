//! What is wrong with a configuration, and how it is shown.

use super::tree::{KeyPath, Place};
use std::fmt;
use std::path::{Path, PathBuf};

/// Characters of a line that are shown.
const FRAME: usize = 160;
/// Characters of a message.
const MESSAGE: usize = 2000;

/// One thing wrong with a configuration, with its place where it has one.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Dotted path of the key, e.g. `optim.lr`; empty for the whole file.
    pub path: String,
    /// 1-based line and column in the file; `None` for an override.
    pub place: Option<(usize, usize)>,
    /// The override that brought it in, as it was given, e.g. `optim.lr=abc`.
    pub override_text: Option<String>,
    pub message: String,
    pub hint: Option<String>,
}

impl Problem {
    pub(super) fn new(path: &KeyPath, message: impl Into<String>) -> Problem {
        Problem {
            path: path.to_string(),
            place: None,
            override_text: None,
            message: cut(message.into()),
            hint: None,
        }
    }
    pub(super) fn at(self, place: Option<Place>) -> Problem {
        Problem { place, ..self }
    }
    pub(super) fn hint(self, hint: impl Into<String>) -> Problem {
        Problem {
            hint: Some(hint.into()),
            ..self
        }
    }
}

/// A message may quote a value, and that may be the whole file.
fn cut(mut message: String) -> String {
    if let Some((at, _)) = message.char_indices().nth(MESSAGE) {
        message.truncate(at);
        message.push_str("...");
    }
    message
}

/// The message and its hint, without a place.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

/// Everything wrong with a configuration; its `Display` shows file, line, column and line of each.
#[derive(Debug)]
pub struct ConfigError {
    pub file: PathBuf,
    /// By line; those without one first, those of overrides last and in their order.
    pub problems: Vec<Problem>,
    text: String,
}

impl ConfigError {
    pub(super) fn new(file: &Path, text: &str, problems: Vec<Problem>) -> ConfigError {
        ConfigError {
            file: file.into(),
            problems,
            text: text.into(),
        }
    }
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        match self.problems.len() {
            1 => write!(f, "1 problem in the configuration {file}")?,
            n => write!(f, "{n} problems in the configuration {file}")?,
        }
        for problem in &self.problems {
            f.write_str("\n\n")?;
            match (&problem.override_text, problem.place) {
                (Some(text), _) => write!(f, "override {text}: {}", problem.message)?,
                (None, Some((line, column))) => {
                    write!(f, "{file}:{line}:{column}: {}", problem.message)?;
                    self.frame(f, line, column)?;
                }
                (None, None) => write!(f, "{file}: {}", problem.message)?,
            }
            if let Some(hint) = &problem.hint {
                write!(f, "\n  hint: {hint}")?;
            }
        }
        Ok(())
    }
}

impl ConfigError {
    /// The line itself, or what stands around the column in a very long one, and a caret below the column.
    fn frame(&self, f: &mut fmt::Formatter<'_>, line: usize, column: usize) -> fmt::Result {
        let Some(whole) = self.text.lines().nth(line.saturating_sub(1)) else {
            return Ok(());
        };
        let column = column.saturating_sub(1);
        let left_out = column.saturating_sub(FRAME / 2);
        let rest = || whole.chars().skip(left_out);
        let shown: String = rest().take(FRAME).collect();
        let before = if left_out > 0 { "..." } else { "" };
        let after = if rest().nth(FRAME).is_some() {
            "..."
        } else {
            ""
        };
        // Tabs stay tabs, so that the caret stands below its character in any terminal.
        let to_caret = before.chars().chain(rest().take(column - left_out));
        let indent: String = to_caret.map(|c| if c == '\t' { c } else { ' ' }).collect();
        write!(f, "\n{line:5} | {before}{shown}{after}\n      | {indent}^")
    }
}
