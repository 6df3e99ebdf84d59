//! The whole system: real launcher, real trainers, real files.

mod bad_input;
mod data_parallel;
mod job;
mod programs;
mod resume;
mod tensorboard;
mod video;
mod weizmann;
