//! What a rank says of an all-reduce that it measured (`tsm-trainer all-reduce --json`): one JSON object on stdout.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A folder of this host into which every rank also writes its line, for whoever started only some of the ranks.
pub const DIR_VARIABLE: &str = "TSM_ALL_REDUCE_DIR";

/// One rank's measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllReduce {
    pub rank: u32,
    pub world_size: u32,
    pub host: String,
    /// `NVIDIA H200` or `cpu`.
    pub device: String,
    /// Of the tensor on each rank.
    pub bytes: u64,
    /// Rounds measured, without the warm-up.
    pub rounds: u32,
    /// Of the median round.
    pub seconds: f64,
    /// [`Rates::algorithm`]
    pub algbw_gb_s: Option<f64>,
    /// [`Rates::bus`]
    pub busbw_gb_s: Option<f64>,
    /// How a sum differed from what it must be.
    pub wrong: Option<String>,
}

/// In GB/s, as nccl-tests defines them:
/// <https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md>.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Bytes of the tensor by the time for its sum.
    pub algorithm: f64,
    /// What each rank must at least send in it, by the time: comparable between numbers of ranks.
    pub bus: f64,
}

impl Rates {
    /// `None` for one rank, which has nothing to send.
    pub fn of(bytes: u64, seconds: f64, world_size: u32) -> Option<Rates> {
        let n = f64::from(world_size);
        let algorithm = bytes as f64 * 1e-9 / seconds;
        (world_size > 1).then_some(Rates {
            algorithm,
            bus: algorithm * 2.0 * (n - 1.0) / n,
        })
    }
}

/// A rank's file in the folder of [`DIR_VARIABLE`].
pub fn file(dir: &Path, rank: u32) -> PathBuf {
    dir.join(format!("rank-{rank}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bus_carries_almost_everything_twice() {
        assert_eq!(Rates::of(1 << 20, 0.0, 1), None);
        let two = Rates::of(2_000_000_000, 0.5, 2).unwrap();
        assert_eq!((two.algorithm, two.bus), (4.0, 4.0));
        assert_eq!(Rates::of(2_000_000_000, 0.5, 8).unwrap().bus, 7.0);
    }
}
