//! What libraries print when something fails, causes before consequences.

mod rules;

pub use rules::{LOST_PEER_HINT, MEMORY_HINT};

use super::{Again, Class, Verdict};

use Weight::{Anywhere, AtEnd, InWords};
use rules::RULES;

/// Where a text may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The error with which the program ended. Here a text tells most.
    Words,
    /// Any line of stderr.
    Stderr,
}

/// How much a phrase proves outside a program's last words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weight {
    /// Nothing: programs log it and go on.
    InWords,
    /// Something in the last lines.
    AtEnd,
    /// It is never printed unless it matters.
    Anywhere,
}

/// Lines of stderr that count as its end.
const END: usize = 5;

/// One kind of text.
#[derive(Debug)]
pub struct Rule {
    /// Any of them; `*` stands for any characters in between.
    phrases: &'static [&'static str],
    weight: Weight,
    pub class: Class,
    pub again: Again,
    hint: &'static str,
}

impl Rule {
    /// What a line of stderr tells that is not among the program's last words. A guess must not end a job for good.
    pub fn guess(&self, evidence: &str) -> Verdict {
        let again = match self.weight {
            Weight::AtEnd => Again::MayWork,
            Weight::InWords | Weight::Anywhere => self.again,
        };
        Verdict::new(self.class, again, evidence, self.hint)
    }

    pub fn verdict(&self, evidence: &str) -> Verdict {
        Verdict::new(self.class, self.again, evidence, self.hint)
    }
}

/// The first rule that applies to any of `lines`, with the last line it applies to.
pub fn find<'a>(
    lines: impl IntoIterator<Item = &'a str>,
    place: Place,
) -> Option<(&'static Rule, &'a str)> {
    let lines: Vec<&str> = lines.into_iter().filter(|line| !is_warning(line)).collect();
    let end = &lines[lines.len().saturating_sub(END)..];
    RULES.iter().find_map(|rule| {
        let lines = match (place, rule.weight) {
            (Place::Words, _) | (Place::Stderr, Anywhere) => &lines[..],
            (Place::Stderr, AtEnd) => end,
            (Place::Stderr, InWords) => return None,
        };
        let line = lines
            .iter()
            .rev()
            .find(|line| rule.phrases.iter().any(|phrase| matches(line, phrase)))?;
        Some((rule, *line))
    })
}

/// What a program prints and then goes on. NCCL's warnings are followed by its failure.
fn is_warning(line: &str) -> bool {
    let marks = ["Warning: ", "WARNING", "[W", "warning: "];
    !line.contains("NCCL WARN") && marks.iter().any(|mark| line.contains(mark))
}

/// Whether `line` contains the parts of `phrase` between its `*`, one after the other.
fn matches(line: &str, phrase: &str) -> bool {
    let mut rest = Some(line);
    for part in phrase.split('*') {
        rest = rest
            .and_then(|rest| rest.split_once(part))
            .map(|(_, after)| after);
    }
    rest.is_some()
}
