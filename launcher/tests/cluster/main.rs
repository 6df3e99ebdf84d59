//! The launcher on several nodes, which are network namespaces of this machine. Needs root and `ip`.

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
#[path = "../common/secret.rs"]
mod secret;

mod job;
mod nodes;

mod failures;
mod hang;
mod left_out;
mod losses;
mod membership;
mod preflight;
mod refusals;
mod secrecy;
mod signals;
mod success;
mod tls;
