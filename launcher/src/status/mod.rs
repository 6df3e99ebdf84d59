//! What is known of a running job, for people on a terminal and for programs over HTTP.

pub mod http;
pub mod metrics;
pub mod view;

use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A job at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Snapshot {
    pub run_id: String,
    pub run_dir: PathBuf,
    /// `gather`, `form`, `run`, `stop`, `backoff`, `finished`.
    pub phase: String,
    /// Counts the starts of the ranks, from 0.
    pub generation: u32,
    pub world_size: u32,
    /// Since the launcher started.
    pub elapsed_s: f64,
    /// Time in which ranks were stepping, over all time since the first rank started; what was lost to a restart
    /// does not count. 0 to 1; `None` while no step was reported.
    pub goodput: Option<f64>,
    pub nodes: Vec<NodeStatus>,
    /// In order of rank.
    pub ranks: Vec<RankStatus>,
    pub restarts: Vec<Restart>,
    /// The last value of every metric that rank 0 reported: `loss`, `clips_per_s`, `lr`, `top1`.
    pub metrics: BTreeMap<String, f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct NodeStatus {
    pub host: String,
    /// `running`, `spare`, `left out`, `lost`.
    pub state: String,
    /// Its first rank, where it has ranks.
    pub first_rank: Option<u32>,
    pub num_ranks: u32,
    /// One-minute load average.
    pub load: f32,
    pub mem_used_bytes: u64,
    pub mem_total_bytes: u64,
    /// Round trip to the coordinator.
    pub rtt_ms: f32,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RankStatus {
    pub rank: u32,
    pub host: String,
    pub device: String,
    pub pid: i32,
    /// `starting`, `running`, `slow`, `late`, `ended`. A program that does not talk to the launcher runs from its start.
    pub state: String,
    pub step: Option<u64>,
    /// The first is 1.
    pub epoch: Option<u32>,
    pub section: Option<String>,
    /// Since its last step, where it has made one.
    pub step_age_s: Option<f64>,
    /// Median over its last steps, without waiting for other ranks.
    pub work_ms: Option<f64>,
}

/// One start after the first, and why it was needed.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Restart {
    pub generation: u32,
    /// RFC 3339, UTC.
    pub time: String,
    pub cause: String,
    pub world_size: u32,
}
