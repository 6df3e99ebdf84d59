//! What a run says about itself: rates, `metrics.jsonl`, TensorBoard, progress, load.
//!
//! Writing never stops a training: an output that fails is named once on standard error and tried
//! again with the next write.

mod load;
mod metrics;
mod nvml;
mod progress;
mod rate;
mod record;
mod tensorboard;
mod warn;

pub use load::{Load, LoadMeter};
pub use metrics::{History, Metrics};
pub use progress::{Best, Progress, StepLine, ValidationLine};
pub(crate) use progress::{coarse, short};
pub use rate::{Rate, StepMeter, TooFewSteps, Window};
pub use record::{EpochRecord, Record, StartRecord, StepRecord, ValidationRecord, unix_s};
pub use tensorboard::EventWriter;
