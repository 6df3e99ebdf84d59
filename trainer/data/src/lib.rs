//! Annotation lists to clips of u8 frames.

pub mod decode;
