//! Pretrained weights: names of other code bases to ours, and a loader that fails loudly.

mod names;

pub use names::original_name;
