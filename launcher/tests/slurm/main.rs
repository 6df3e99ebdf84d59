//! SLURM itself: what this crate reads of it, asks of it, and takes for granted about it.
//!
//! Needs root, slurmctld, slurmd and munged; says so and passes where they are missing, unless
//! TSM_REQUIRE_SLURM is set.

#[path = "../../../tests/slurm-cluster/cluster.rs"]
mod cluster;
mod contract;
#[path = "../common/demo.rs"]
mod demo;
mod launcher;
#[path = "../common/program.rs"]
mod program;
mod step;
mod submit;

use cluster::Cluster;
use std::sync::Arc;
use tsm_launch::start::slurm::JobId;

/// The cluster, or `None` where the test cannot run.
fn cluster() -> Option<Arc<Cluster>> {
    let cluster = Cluster::shared();
    let required = std::env::var_os("TSM_REQUIRE_SLURM").is_some();
    assert!(
        cluster.is_some() || !required,
        "TSM_REQUIRE_SLURM is set, and SLURM cannot run here"
    );
    cluster
}
