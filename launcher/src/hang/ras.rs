//! Asks the NCCL of a running job what it knows of itself (RAS, NCCL 2.24 and newer).
//!
//! Every process of a job listens on `NCCL_RAS_ADDR` and answers for the whole job: which processes do not answer,
//! and how many operations each rank has launched in each communicator. Lines of text go both ways; the answer
//! to `STATUS` ends with the connection. Its text varies from release to release, so what is not understood
//! is left out of [`Status`], and the text itself is kept.

mod ask;
mod json;
mod status;
mod text;

use ask::ask;
pub use status::{Behind, Communicator, Member, Status};

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Of an answer that is passed on.
const MAX_TEXT: usize = 64 << 10;
const MAX_MEMBERS: usize = 256;

/// An answer, read, and small enough to be passed on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub status: Status,
    /// In NCCL's words, at most 64 KiB; or why there is none.
    pub text: String,
}

impl Answer {
    pub fn new(text: &str) -> Answer {
        let mut status = parse(text);
        for communicator in &mut status.communicators {
            communicator.missing.truncate(MAX_MEMBERS);
            communicator.behind.truncate(MAX_MEMBERS);
        }
        status.silent.truncate(MAX_MEMBERS);
        status.communicators.truncate(MAX_MEMBERS);
        let text = &text.as_bytes()[..text.len().min(MAX_TEXT)];
        Answer {
            status,
            text: String::from_utf8_lossy(text).into_owned(),
        }
    }
}

/// As [`ask()`]; an error becomes the text.
pub fn answer(address: &str, patience: Duration) -> Answer {
    match ask(address, patience) {
        Ok(text) => Answer::new(&text),
        Err(e) => Answer {
            text: format!("{e:#}"),
            ..Answer::default()
        },
    }
}

/// Reads an answer, of either format.
pub fn parse(answer: &str) -> Status {
    match serde_json::from_str::<json::Answer>(answer.trim()) {
        Ok(answer) => answer.into_status(),
        Err(_) => text::parse(answer),
    }
}

#[cfg(test)]
mod tests;
