//! One job over several nodes: one coordinator, one agent per node, one authenticated connection each.

pub mod key;
pub mod message;
pub mod policy;
pub mod tls;
pub mod wire;
