//! The run folder, and the machine for the report.

use super::Place;
use anyhow::Result;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::SystemTime;
use tsm_job::exit::{self, Coded};
use tsm_job::{Config, RunDir, WorkerEnv};

/// The run folder of the launcher, or a new one of our own for a trainer started without it. For
/// rank 0, the only one that writes.
///
/// # Errors
/// It cannot be made (exit code CANNOT_WRITE).
pub fn run_dir(config: &Config, env: &WorkerEnv) -> Result<RunDir> {
    let cannot = |e: std::io::Error| {
        Coded::new(
            exit::CANNOT_WRITE,
            format!("cannot write the run folder: {e}"),
        )
    };
    let run = match &env.run_dir {
        Some(path) => RunDir::new(path),
        None => RunDir::new(new_folder(config).map_err(cannot)?),
    };
    for folder in [run.tb(), run.checkpoints()] {
        fs_err::create_dir_all(folder).map_err(cannot)?;
    }
    if env.run_dir.is_none() {
        fs_err::write(run.config(), config.to_yaml()).map_err(cannot)?;
        println!("run folder {}", run.path().display());
    }
    Ok(run)
}

/// `<name>-<seconds>`, with a number behind it for a second run of one second.
fn new_folder(config: &Config) -> std::io::Result<PathBuf> {
    let seconds = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let name = format!("{}-{seconds}", config.run.name.replace('/', "-"));
    fs_err::create_dir_all(&config.run.dir)?;
    let mut path = config.run.dir.join(&name);
    let mut attempt = 1;
    while let Err(e) = fs_err::create_dir(&path) {
        if e.kind() != ErrorKind::AlreadyExists {
            return Err(e);
        }
        attempt += 1;
        path = config.run.dir.join(format!("{name}-{attempt}"));
    }
    Ok(path)
}

/// Of this program and its libtorch, by name.
pub fn versions() -> BTreeMap<String, String> {
    BTreeMap::from([
        ("tsm-trainer".into(), env!("CARGO_PKG_VERSION").into()),
        ("libtorch".into(), tsm_torch_ext::ops::libtorch_version()),
    ])
}

/// Of the libraries for GPUs that are loaded.
pub fn cuda_versions() -> BTreeMap<String, String> {
    let Ok(info) = tsm_torch_ext::cuda::load_cuda() else {
        return BTreeMap::new();
    };
    let (cuda, nccl) = (info.runtime_version, info.nccl_version);
    let cuda = (cuda > 0).then(|| ("cuda".into(), dotted(&[cuda / 1000, cuda % 1000 / 10])));
    // Since 2.9; the older ones had one digit less.
    let parts = [nccl / 10_000, nccl / 100 % 100, nccl % 100];
    let nccl = (nccl >= 20_000).then(|| ("nccl".into(), dotted(&parts)));
    cuda.into_iter().chain(nccl).collect()
}

fn dotted(parts: &[i32]) -> String {
    let parts: Vec<String> = parts.iter().map(i32::to_string).collect();
    parts.join(".")
}

/// Hardware and versions, by name.
pub fn environment(place: &Place) -> BTreeMap<String, String> {
    let mut facts = versions();
    if place.device.is_cuda() {
        facts.extend(cuda_versions());
    }
    facts.insert("device".into(), format!("{:?}", place.device));
    facts.insert("threads per rank".into(), place.threads.to_string());
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
