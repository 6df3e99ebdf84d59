//! The launcher with real processes: exit codes, reports, files, and that nothing survives.

#[path = "../common/demo.rs"]
#[allow(dead_code, reason = "what only the other test programs use")]
mod demo;
#[path = "../common/ground.rs"]
#[allow(dead_code, reason = "as above")]
mod ground;
#[path = "../common/harness.rs"]
#[allow(dead_code, reason = "as above")]
mod harness;
#[path = "../common/program.rs"]
mod program;

mod again;
mod all_reduce;
mod cascade;
mod class;
mod contain;
mod frozen;
mod hang;
mod json;
mod key;
mod manifest;
mod memory;
mod needed;
mod output;
mod own;
mod pace;
mod preflight;
mod pytorch;
mod races;
mod refusals;
mod resume;
mod start;
mod status;
mod stop;
mod terminal;
mod trainer;
