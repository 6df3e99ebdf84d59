//! Ranks that no longer step, and ranks that step slowly: found, named, and looked into.
//!
//! ```text
//! beats -> progress::Tracker -> Event::Hang -> stacks (on each node)  \
//!              \-> slow -> Event::Slow         ras (one node asks NCCL) --> report
//! ```

pub mod progress;
pub mod ras;
pub mod report;
pub mod slow;
pub mod stacks;
mod syscalls;
mod tool;
