//! What tch lacks: a thin safe seam over libtorch's own C++.
//!
//! - [`ops`]: temporal shift, fused SGD, autocast, gradient hooks, memory formats.

pub mod dist;
pub mod error;
pub mod ops;

pub use error::{Result, TorchError};
