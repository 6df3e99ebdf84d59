//! The launcher on several nodes, which are network namespaces of this machine. Needs root and `ip`.

#[path = "../common/harness.rs"]
#[allow(dead_code, reason = "what only the other test programs use")]
mod harness;

#[path = "../launch/ground.rs"]
#[allow(dead_code, reason = "as above")]
mod ground;

mod job;
mod nodes;

mod failures;
mod losses;
mod membership;
mod preflight;
mod refusals;
mod signals;
mod success;
mod tls;
