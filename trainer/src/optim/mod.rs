//! SGD over the buckets of [`crate::ddp`]: groups, schedule, clipping, master weights.

pub mod groups;
pub mod schedule;

pub use schedule::lr_at;
