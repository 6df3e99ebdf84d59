//! What a run says about itself: rates, `metrics.jsonl`, TensorBoard, progress, load.
//!
//! Writing never stops a training: an output that fails is named once on standard error and tried
//! again with the next write.

mod load;
mod metrics;
mod nvml;
mod progress;
mod rate;
mod tensorboard;
mod warn;

pub use load::{Load, LoadMeter};
pub use metrics::{
    EpochRecord, History, Metrics, Record, StartRecord, StepRecord, ValidationRecord,
};
pub use progress::{Best, Progress, StepLine, ValidationLine};
pub use rate::{Rate, StepMeter, TooFewSteps, Window};
pub use tensorboard::EventWriter;
