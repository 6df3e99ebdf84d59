//! The whole system: real launcher, real trainers, real files.

mod bad_input;
mod job;
mod resume;
mod weizmann;
