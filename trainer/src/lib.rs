//! One worker of a job: one process, one device.
//!
//! [`train`] is the loop and the only module that knows the others.

pub mod all_reduce;
pub mod checkpoint;
pub mod cli;
pub mod ddp;
pub mod eval;
mod failure;
pub mod meter;
pub mod model;
pub mod optim;
pub mod precision;
pub mod preempt;
pub mod report;
pub mod train;
pub mod weights;

pub use cli::main;
