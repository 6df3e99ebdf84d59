//! One warning for an output that fails, however often it fails.

use std::fmt::Display;

/// Remembers whether it has warned.
#[derive(Debug, Default)]
pub(crate) struct WarnOnce {
    pub warned: bool,
}

impl WarnOnce {
    /// Says on standard error, the first time only, that `what` failed and what follows from it.
    pub fn failed(&mut self, what: &str, error: &dyn Display) {
        if !self.warned {
            self.warned = true;
            eprintln!(
                "warning: {what}: {error}; the training goes on and later writes are tried without another warning"
            );
        }
    }
}
