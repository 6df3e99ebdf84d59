//! The launcher with real processes: exit codes, reports, files, and that nothing survives.

mod harness;

mod cascade;
mod hang;
mod output;
mod pytorch;
mod refusals;
mod resume;
mod start;
mod stop;
mod trainer;
