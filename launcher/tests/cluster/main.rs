//! The launcher on several nodes, which are network namespaces of this machine. Needs root and `ip`.

#[path = "../launch/harness.rs"]
#[allow(
    dead_code,
    reason = "this harness is the one of tests/launch, and not all of it is needed here"
)]
mod harness;

mod job;
mod nodes;

mod failures;
mod left_out;
mod losses;
mod membership;
mod refusals;
mod signals;
mod success;
