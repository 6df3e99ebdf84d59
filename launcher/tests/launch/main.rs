//! The launcher with real processes: exit codes, reports, files, and that nothing survives.

mod harness;

mod cascade;
mod class;
mod hang;
mod manifest;
mod output;
mod preflight;
mod pytorch;
mod refusals;
mod resume;
mod start;
mod stop;
mod trainer;
