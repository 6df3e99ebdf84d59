//! From an annotation list to batches of u8 frames. Nothing here links libtorch.
//!
//! [`list`] says which videos there are, [`order`] which rank reads which of them when, [`sample`]
//! which frames make a clip, [`decode`] reads them, [`augment`] draws them into the network's
//! square, and [`loader`] does it all on threads and delivers batches in order. [`demo`] makes the
//! synthetic set of the demo.

pub mod augment;
pub mod cli;
pub mod clip;
pub mod decode;
pub mod demo;
pub mod list;
pub mod loader;
pub mod order;
pub mod sample;
mod slab;
#[cfg(test)]
mod testing;
