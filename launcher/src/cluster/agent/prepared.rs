//! What a node has to have before its workers can be started: their plans, a folder, a port, enough open files.

use anyhow::Context;
use std::ffi::OsString;
use std::path::PathBuf;
use tsm_job::RunDir;

use super::Setup;
use crate::cluster::message::Start;
use crate::cores;
use crate::limits;
use crate::logs::keep;
use crate::plan::{self, Devices, REMOVED_VARIABLES, Seat, Shape, WorkerPlan};
use crate::port::Port;
use crate::replace::replace;
use crate::start::adopt::mpi;
use crate::text::count;

/// Open files of the launcher itself, generously, and those that it has for each rank: two pipes, two logs,
/// a pidfd, and a socket twice.
const FILES: u64 = 64;
const FILES_PER_RANK: u64 = 7;

/// What [`prepare`] makes ready.
pub struct Prepared {
    /// In order of local rank.
    pub plans: Vec<WorkerPlan>,
    /// Variables that no worker inherits.
    pub remove: Vec<String>,
    pub dir: RunDir,
    /// Where the workers run; `None`: here.
    pub directory: Option<PathBuf>,
    /// Held for rank 0 where this node is alone.
    pub port: Option<Port>,
}

/// # Errors
/// What keeps this node from running the job.
pub fn prepare(setup: &Setup, start: &Start) -> anyhow::Result<Prepared> {
    let here = std::env::current_dir().unwrap_or_default();
    let directory = (start.directory != here).then(|| start.directory.clone());
    if let Some(directory) = &directory {
        fs_err::metadata(directory).context("the working directory of the job is not here")?;
    }
    let dir = RunDir::new(&start.run_dir);
    fs_err::create_dir_all(dir.logs()).map_err(|e| keep::refuse(&e))?;
    if let Some((name, text)) = &start.config {
        let path = dir.path().join(name);
        // Written by the coordinator where the file system is shared. A node that does not see it yet must not
        // empty it for a moment, in which ranks of other nodes read it.
        if fs_err::read_to_string(&path).map_or(true, |old| old != *text) {
            replace(&path, text, 0o666).map_err(|e| keep::refuse(&e))?;
        }
    }
    let port = match start.master_port {
        0 => Some(Port::reserve()?),
        _ => None,
    };
    let master_port = port.as_ref().map_or(start.master_port, |port| port.number);
    let plans = plans(setup, start, master_port)?;
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let removed = REMOVED_VARIABLES.map(String::from).into_iter();
    let remove = removed.chain(mpi::identity(names)).collect();
    let num_ranks = start.num_ranks;
    let files = FILES + FILES_PER_RANK * u64::from(num_ranks);
    limits::need_open_files(files, &count(num_ranks, "rank"))?;
    Ok(Prepared {
        plans,
        remove,
        dir,
        directory,
        port,
    })
}

/// The value of a variable in the environment that workers start from.
pub fn inherited(start: &Start, name: &str) -> Option<OsString> {
    let mut base = start.base_env.iter().flatten();
    let own = base
        .find(|(n, _)| n == name)
        .map(|(_, value)| value.clone());
    own.or_else(|| std::env::var_os(name))
}

fn plans(setup: &Setup, start: &Start, master_port: u16) -> anyhow::Result<Vec<WorkerPlan>> {
    let devices = setup.devices.first(start.num_ranks as usize);
    // NCCL may not share the port, so it is only kept apart from MASTER_PORT.
    let ras = matches!(devices, Devices::Gpus(_))
        .then(Port::reserve)
        .transpose()?;
    let allowed = if start.affinity {
        cores::allowed()
    } else {
        Vec::new()
    };
    let seat = Seat {
        node_rank: start.node_rank,
        num_nodes: start.num_nodes,
        first_rank: start.first_rank,
        world_size: start.world_size,
        master_addr: start.master_addr,
        interface: start.interface.clone().unwrap_or("lo".into()),
        restart_count: start.restart_count,
        max_restarts: start.max_restarts,
    };
    let shape = Shape {
        devices: &devices,
        seat,
        run_id: &start.run_id,
        run_dir: &start.run_dir,
        host: &setup.host,
        master_port: Some(master_port),
        ras_port: ras.as_ref().map(|port| port.number),
        resume_from: start.resume_from.as_deref(),
        start_from: start.start_from.as_deref(),
        cores: &allowed,
        parallelism: std::thread::available_parallelism().map_or(1, usize::from),
    };
    let is_set =
        |name: &str| inherited(start, name).is_some() || start.env.iter().any(|(n, _)| n == name);
    let mut plans = plan::workers(&shape, is_set);
    for plan in &mut plans {
        plan.env.splice(0..0, start.env.iter().cloned());
    }
    Ok(plans)
}
