//! What tch lacks: a thin safe seam over libtorch's own C++.
//!
//! - [`ops`]: temporal shift, fused SGD, loss scaling, autocast, gradient hooks, memory formats.
//! - [`dist`]: TCP store, process groups over Gloo and NCCL.
//! - [`cuda`]: CUDA loaded at run time, events, streams, graphs, memory.

pub mod cuda;
pub mod dist;
pub mod error;
pub mod ops;

pub use error::{Result, TorchError};
