//! What kind of failure it was, from all that is known about it. Pure.

use serde::{Deserialize, Serialize};

/// Kinds of failure that are answered differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// The program's own error: a Python exception, a Rust panic, an exit code of its own.
    Program,
    Config,
    /// An input file is missing or broken.
    Data,
    /// The loss is not finite.
    Diverged,
    /// An output cannot be written.
    DiskFull,
    /// The kernel's out-of-memory killer.
    OutOfMemory,
    /// CUDA's.
    GpuOutOfMemory,
    /// A GPU or its driver failed: Xid, ECC, "fell off the bus".
    Hardware,
    /// A connection between ranks broke, and no rank is known to have failed first.
    Network,
    /// The connection to a node's agent is gone, or the node is silent.
    NodeLost,
    /// No step for too long.
    Hang,
    /// A signal from outside that nobody of ours sent.
    Killed,
    Unknown,
}
