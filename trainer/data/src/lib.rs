//! Annotation lists to clips of u8 frames.

pub mod cli;
pub mod decode;
pub mod demo;
