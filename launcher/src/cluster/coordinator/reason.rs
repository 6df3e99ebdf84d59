//! Why a job ends before its work is done.

use std::fmt;

use super::{Cause, Phase, State};
use crate::end::signal_name;

#[derive(Clone, Debug, PartialEq)]
pub enum Reason {
    /// `place`: empty for one to the coordinator itself, else ` on gpu-02`.
    Signal {
        signal: i32,
        place: String,
    },
    Text(String),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Signal { signal, place } => write!(f, "{}{place}", signal_name(*signal)),
            Reason::Text(text) => f.write_str(text),
        }
    }
}

impl From<&str> for Reason {
    fn from(text: &str) -> Reason {
        Reason::Text(text.into())
    }
}

impl State {
    /// Somebody, or something, asks for an end. Once one is under way, what comes later is not its reason.
    pub(super) fn asked(&mut self, by: Reason) {
        match self.phase {
            Phase::Leave { .. } | Phase::Finished { .. } => {}
            Phase::Stop { .. } => {
                self.asked.get_or_insert(by);
            }
            _ => self.asked = Some(by),
        }
    }

    /// Who wanted the end of a generation that ends for this cause.
    pub(super) fn who_asked(&self, cause: Option<Cause>) -> Option<Reason> {
        let asked = self.asked.clone();
        let Some(Cause::Signal(signal)) = cause else {
            return asked;
        };
        // Another one may have come before it.
        let is_it = |r: &Reason| matches!(r, Reason::Signal { signal: s, .. } if *s == signal);
        let place = String::new();
        asked
            .filter(is_it)
            .or(Some(Reason::Signal { signal, place }))
    }
}
