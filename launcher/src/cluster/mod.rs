//! One job over several nodes: one coordinator, one agent per node, one authenticated connection each.

pub mod agent;
pub mod coordinator;
pub mod fit;
pub mod key;
pub mod link;
pub mod message;
pub mod policy;
#[cfg(test)]
mod simulation;
pub mod tls;
pub mod topology;
pub mod wire;
