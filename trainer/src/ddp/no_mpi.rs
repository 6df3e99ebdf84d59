//! In the place of `mpi` where the program is built without it.

use super::Peers;
use anyhow::Result;
use std::time::Duration;
use tsm_job::WorkerEnv;
use tsm_job::exit::{self, Coded};

/// Refuses.
///
/// # Errors
/// Always, with exit code PREFLIGHT and the command that builds what is missing.
pub fn join(_env: &WorkerEnv, _timeout: Duration) -> Result<Peers> {
    let text = "launch.collectives is mpi, but this tsm-trainer was built without MPI\n  hint: cargo build --release -p tsm-trainer --features mpi (needs mpicc and libclang), or set launch.collectives=auto";
    Err(Coded::new(exit::PREFLIGHT, text).into())
}

/// There is no MPI to end.
pub fn abort(_code: i32) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusal_names_the_command_that_builds_mpi_in() {
        let env = WorkerEnv::from_lookup(|_| None).unwrap();
        let Err(error) = join(&env, Duration::from_secs(1)) else {
            panic!("joined without MPI");
        };
        assert_eq!(exit::code_of(&error), exit::PREFLIGHT);
        assert!(error.to_string().contains("--features mpi"), "{error}");
    }
}
