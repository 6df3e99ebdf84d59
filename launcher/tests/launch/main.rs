//! The launcher with real processes: exit codes, reports, files, and that nothing survives.

mod ground;
mod harness;

mod cascade;
mod class;
mod contain;
mod hang;
mod output;
mod preflight;
mod pytorch;
mod refusals;
mod resume;
mod start;
mod stop;
mod trainer;
