//! The run folder, and the machine for the report.

use super::Place;
use anyhow::Result;
use std::collections::BTreeMap;
use std::time::SystemTime;
use tsm_job::exit::{self, Coded};
use tsm_job::{Config, RunDir, WorkerEnv};

/// The run folder of the launcher, or one of our own for a trainer started alone.
pub fn run_dir(config: &Config, env: &WorkerEnv) -> Result<RunDir> {
    let path = match &env.run_dir {
        Some(path) => path.clone(),
        None => {
            let seconds = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |d| d.as_secs());
            config
                .run
                .dir
                .join(format!("{}-{seconds}", config.run.name))
        }
    };
    let run = RunDir::new(path);
    if env.rank == 0 {
        let cannot = |e: std::io::Error| {
            Coded::new(
                exit::CANNOT_WRITE,
                format!("cannot write the run folder: {e}"),
            )
        };
        for folder in [run.tb(), run.checkpoints()] {
            fs_err::create_dir_all(folder).map_err(cannot)?;
        }
        if env.run_dir.is_none() {
            fs_err::write(run.config(), config.to_yaml()).map_err(cannot)?;
            println!("run folder {}", run.path().display());
        }
    }
    Ok(run)
}

/// Hardware and versions, by name.
pub fn environment(place: &Place) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::from([
        ("tsm-trainer".into(), env!("CARGO_PKG_VERSION").into()),
        ("libtorch".into(), tsm_torch_ext::ops::libtorch_version()),
        ("device".into(), format!("{:?}", place.device)),
        ("threads per rank".into(), place.threads.to_string()),
    ]);
    if let Ok(text) = fs_err::read_to_string("/proc/cpuinfo")
        && let Some(model) = text.lines().find_map(|l| l.strip_prefix("model name"))
    {
        facts.insert(
            "cpu".into(),
            model.trim_start_matches([' ', '\t', ':']).into(),
        );
    }
    if let Ok(cores) = std::thread::available_parallelism() {
        facts.insert("cores".into(), cores.to_string());
    }
    facts
}
