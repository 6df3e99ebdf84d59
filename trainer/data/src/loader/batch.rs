//! What a loader hands out.

use crossbeam_channel::Sender;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::time::Duration;

/// A sample that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSample {
    /// Position in the list, from 0.
    pub index: u64,
    /// Its folder or video file.
    pub path: PathBuf,
    /// The list and its line, from 1.
    pub list: PathBuf,
    pub line: usize,
    pub reason: String,
}

impl fmt::Display for BadSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display().to_string();
        if !self.reason.contains(&path) {
            write!(f, "{path}: ")?;
        }
        write!(f, "{} ({}:{})", self.reason, self.list.display(), self.line)
    }
}

/// Clips that go through the network together.
pub struct Batch<B> {
    /// u8 `[n, num_clips * T, size, size, 3]` at the front. Dropping it (or the batch) gives it
    /// back to the loader, so keep it until a copy that runs beside the program has ended.
    pub buffer: Recycled<B>,
    /// Samples, not counting those left out.
    pub n: usize,
    /// Labels, after a flip's change.
    pub labels: Vec<i64>,
    /// Positions in the list.
    pub indices: Vec<u64>,
    /// Samples left out because they could not be read.
    pub skipped: Vec<BadSample>,
    /// Time that threads spent on this batch, added up.
    pub decode_time: Duration,
    /// Optimizer step, counted from the loader's first; in validation the number of the batch.
    pub step: u64,
    /// Position within the step, below `micro_steps`.
    pub micro_step: u32,
    /// Batches of each rank in the step.
    pub micro_steps: u32,
    /// Samples planned for the step over all ranks and micro steps; those left out count.
    pub step_samples: u64,
}

/// A buffer that returns to its loader when dropped.
pub struct Recycled<B> {
    buffer: Option<B>,
    home: Sender<B>,
}

const TAKEN: &str = "only drop takes the buffer";

impl<B> Recycled<B> {
    pub(super) fn new(buffer: B, home: Sender<B>) -> Self {
        Recycled {
            buffer: Some(buffer),
            home,
        }
    }
}

impl<B> Deref for Recycled<B> {
    type Target = B;
    fn deref(&self) -> &B {
        self.buffer.as_ref().expect(TAKEN)
    }
}

impl<B> DerefMut for Recycled<B> {
    fn deref_mut(&mut self) -> &mut B {
        self.buffer.as_mut().expect(TAKEN)
    }
}

impl<B> Drop for Recycled<B> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            // The loader may be gone; then the buffer goes too.
            let _ = self.home.send(buffer);
        }
    }
}
