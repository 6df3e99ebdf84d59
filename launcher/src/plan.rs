//! Which ranks there are, on what they run, and what they find in their environment. Pure, but for
//! the list of visible GPUs, which is asked for only where it is needed.

mod workers;

use std::ffi::OsString;
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use tsm_job::config::Launch;
use tsm_job::exit::{self, Coded};

use crate::cli::Gpus;
use crate::cores;
use crate::gpus::Gpu;

pub use workers::Workers;

/// Variables by which a program notices that it is a rank of something. Inherited ones are from another job.
pub const RANK_VARIABLES: [&str; 10] = [
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TSM_RUN_ID",
];

/// Variables of another launcher that change how torch starts, and none of ours sets.
pub const REMOVED_VARIABLES: [&str; 5] = [
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_ERROR_FILE",
    "TSM_AGENT_FD",
    "TSM_RESUME_FROM",
    "TSM_START_FROM",
];

const RANKS: &str = "it gives every rank its own; say how many with --gpus, --cpus and --nodes";
const MEETING: &str = "it finds an address and a port that all ranks reach";
const STARTS: &str = "it counts the starts; --max-restarts says how many there may be";
const ROLE: &str = "it gives all ranks one role, as torchrun does by itself";
const RUN: &str = "it calls a run after its folder, which --run-dir names";

/// Variables that every worker gets from the launcher, whatever else is set, and how to choose their value.
pub const SET_VARIABLES: [(&str, &str); 24] = [
    ("RANK", RANKS),
    ("LOCAL_RANK", RANKS),
    ("WORLD_SIZE", RANKS),
    ("LOCAL_WORLD_SIZE", RANKS),
    ("GROUP_RANK", RANKS),
    ("GROUP_WORLD_SIZE", RANKS),
    ("NODE_RANK", RANKS),
    ("ROLE_NAME", ROLE),
    ("ROLE_RANK", ROLE),
    ("ROLE_WORLD_SIZE", ROLE),
    ("MASTER_ADDR", MEETING),
    ("MASTER_PORT", MEETING),
    ("CUDA_VISIBLE_DEVICES", "choose GPUs with --gpus 0,1,3"),
    ("TORCHELASTIC_RUN_ID", RUN),
    ("TORCHELASTIC_RESTART_COUNT", STARTS),
    ("TORCHELASTIC_MAX_RESTARTS", STARTS),
    (
        "TORCHELASTIC_ERROR_FILE",
        "it reads the file after a failure",
    ),
    ("TSM_RUN_DIR", RUN),
    ("TSM_RUN_ID", RUN),
    ("TSM_GENERATION", STARTS),
    ("TSM_RESTART_COUNT", STARTS),
    ("TSM_RESUME_FROM", "give --resume PATH"),
    ("TSM_START_FROM", "give --resume PATH"),
    ("TSM_AGENT_FD", "it opens a socket for every rank"),
];

/// How else to choose the value of `name`, where it is one of [`SET_VARIABLES`].
pub fn set_by_launcher(name: &str) -> Option<&'static str> {
    let mut all = SET_VARIABLES.iter();
    all.find(|(own, _)| *own == name)
        .map(|(_, instead)| *instead)
}

/// What the workers of this node run on.
#[derive(Clone, Debug, PartialEq)]
pub enum Devices {
    Gpus(Vec<Gpu>),
    /// So many workers on the CPU.
    Cpu(u32),
}

impl Devices {
    pub fn len(&self) -> usize {
        match self {
            Devices::Gpus(gpus) => gpus.len(),
            Devices::Cpu(n) => *n as usize,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// None where the workers run on the CPU.
    pub fn gpus(&self) -> &[Gpu] {
        match self {
            Devices::Gpus(gpus) => gpus,
            Devices::Cpu(_) => &[],
        }
    }

    /// The first `n` of them.
    pub fn first(&self, n: usize) -> Devices {
        match self {
            Devices::Gpus(gpus) => Devices::Gpus(gpus.iter().take(n).cloned().collect()),
            Devices::Cpu(all) => Devices::Cpu((*all).min(n as u32)),
        }
    }

    /// `GPU 3 (NVIDIA H200)` or `cpu`.
    pub fn name(&self, local_rank: usize) -> String {
        match self {
            Devices::Gpus(gpus) => {
                format!("GPU {} ({})", gpus[local_rank].id, gpus[local_rank].name)
            }
            Devices::Cpu(_) => "cpu".into(),
        }
    }

    fn cuda_visible(&self) -> String {
        let ids: Vec<&str> = self.gpus().iter().map(|gpu| gpu.id.as_str()).collect();
        ids.join(",")
    }
}

/// Chooses devices by the command line, or else by the config's `launch`.
///
/// # Errors
/// [`exit::PREFLIGHT`] when there are fewer GPUs than asked for, [`exit::USAGE`] when nothing says what to use.
pub fn devices(
    gpus: Option<&Gpus>,
    cpus: Option<u32>,
    launch: Option<&Launch>,
    visible: impl FnOnce() -> Vec<Gpu>,
) -> Result<Devices, Coded> {
    let wanted = match Workers::asked_for(gpus, cpus, launch) {
        Some(Workers::Cpus(n)) => return Ok(Devices::Cpu(n)),
        Some(Workers::Gpus(wanted)) => wanted,
        None => {
            return Err(Coded::new(
                exit::USAGE,
                "nothing says how many workers to start\n  hint: give --gpus auto, --gpus N or --cpus N",
            ));
        }
    };
    let said = match (gpus, &wanted) {
        (Some(gpus), _) => format!("--gpus is {gpus}"),
        (None, Gpus::Count(n)) => format!("launch.nproc_per_node is {n}"),
        (None, _) => "launch.device is gpu".into(),
    };
    let visible = visible();
    let have = match visible.len() {
        1 => "1 GPU is visible".into(),
        n => format!("{n} GPUs are visible"),
    };
    let refuse = |workers: String, hint: &str| {
        let environment =
            std::env::var("CUDA_VISIBLE_DEVICES").map_or("not set".into(), |v| format!("{v:?}"));
        let text = format!(
            "cannot start {workers}: {said}, {have}\n  hint: {hint}; CUDA_VISIBLE_DEVICES is {environment}"
        );
        Err(Coded::new(exit::PREFLIGHT, text))
    };
    match wanted {
        Gpus::Auto if visible.is_empty() => refuse(
            "workers".into(),
            "give --cpus N to run on the CPU, or check the driver with nvidia-smi",
        ),
        Gpus::Auto => Ok(Devices::Gpus(visible)),
        Gpus::Count(n) if n as usize > visible.len() => {
            let hint = match visible.len() {
                0 => "give --cpus N to run on the CPU, or check the driver with nvidia-smi".into(),
                n => format!("give --gpus {n}"),
            };
            refuse(format!("{n} workers"), &hint)
        }
        Gpus::Count(n) => Ok(Devices::Gpus(
            visible.into_iter().take(n as usize).collect(),
        )),
        Gpus::List(list) => {
            if let Some(missing) = list.iter().find(|&&i| i as usize >= visible.len()) {
                let hint =
                    format!("there is no GPU {missing}; count from 0 among the visible ones");
                return refuse(format!("{} workers", list.len()), &hint);
            }
            Ok(Devices::Gpus(
                list.iter().map(|&i| visible[i as usize].clone()).collect(),
            ))
        }
    }
}

/// The first variable of another job in the environment, if there is one.
pub fn stale_variable(get: impl Fn(&str) -> Option<String>) -> Option<(&'static str, String)> {
    RANK_VARIABLES
        .iter()
        .find_map(|&name| get(name).map(|value| (name, value)))
}

/// The place of a node's ranks among all ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Seat {
    pub node_rank: u32,
    pub num_nodes: u32,
    pub first_rank: u32,
    pub world_size: u32,
    pub master_addr: IpAddr,
    /// Through which the other nodes are reached.
    pub interface: String,
    pub restart_count: u32,
    pub max_restarts: u32,
}

impl Seat {
    /// A node alone.
    pub fn alone(world_size: usize) -> Seat {
        Seat {
            node_rank: 0,
            num_nodes: 1,
            first_rank: 0,
            world_size: world_size as u32,
            master_addr: IpAddr::V4(Ipv4Addr::LOCALHOST),
            interface: "lo".into(),
            restart_count: 0,
            max_restarts: 0,
        }
    }
}

/// What all workers of a node have in common.
pub struct Shape<'a> {
    pub devices: &'a Devices,
    pub seat: Seat,
    pub run_id: &'a str,
    pub run_dir: &'a Path,
    pub host: &'a str,
    /// `None` while nothing is reserved: a dry run.
    pub master_port: Option<u16>,
    /// A port for NCCL's status service, where there are GPUs.
    pub ras_port: Option<u16>,
    pub resume_from: Option<&'a Path>,
    /// See [`tsm_job::WorkerEnv::start_from`].
    pub start_from: Option<&'a Path>,
    /// Allowed cores; empty: no binding.
    pub cores: &'a [usize],
    /// Cores' worth of CPU time, which a container's quota may make fewer than `cores`.
    pub parallelism: usize,
}

/// One rank to start.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerPlan {
    pub rank: u32,
    pub device: String,
    /// Cores to bind to; empty: no binding.
    pub cores: Vec<usize>,
    /// Set on top of the inherited environment.
    pub env: Vec<(String, String)>,
}

/// The ranks of one node. `inherited` tells which variables the user has set.
pub fn workers(shape: &Shape, inherited: impl Fn(&str) -> bool) -> Vec<WorkerPlan> {
    let here = shape.devices.len();
    (0..here)
        .map(|local_rank| WorkerPlan {
            rank: shape.seat.first_rank + local_rank as u32,
            device: shape.devices.name(local_rank),
            cores: cores::share(shape.cores, local_rank, here).to_vec(),
            env: environment(shape, local_rank, &inherited),
        })
        .collect()
}

fn environment(
    shape: &Shape,
    local_rank: usize,
    inherited: &impl Fn(&str) -> bool,
) -> Vec<(String, String)> {
    let seat = &shape.seat;
    let rank = seat.first_rank + local_rank as u32;
    let port = |port: Option<u16>| port.map_or("(a free port)".into(), |p| p.to_string());
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut env: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: &str| env.push((name.into(), value.into()));
    set("RANK", &rank.to_string());
    set("LOCAL_RANK", &local_rank.to_string());
    set("WORLD_SIZE", &seat.world_size.to_string());
    set("LOCAL_WORLD_SIZE", &shape.devices.len().to_string());
    set("GROUP_RANK", &seat.node_rank.to_string());
    set("GROUP_WORLD_SIZE", &seat.num_nodes.to_string());
    set("NODE_RANK", &seat.node_rank.to_string());
    set("ROLE_NAME", "default");
    set("ROLE_RANK", &rank.to_string());
    set("ROLE_WORLD_SIZE", &seat.world_size.to_string());
    set("MASTER_ADDR", &seat.master_addr.to_string());
    set("MASTER_PORT", &port(shape.master_port));
    set("CUDA_VISIBLE_DEVICES", &shape.devices.cuda_visible());
    set("TORCHELASTIC_RUN_ID", shape.run_id);
    set(
        "TORCHELASTIC_RESTART_COUNT",
        &seat.restart_count.to_string(),
    );
    set("TORCHELASTIC_MAX_RESTARTS", &seat.max_restarts.to_string());
    set(
        "TORCHELASTIC_ERROR_FILE",
        &text(&error_file(shape.run_dir, shape.host, rank)),
    );
    set("TSM_RUN_DIR", &text(shape.run_dir));
    set("TSM_RUN_ID", shape.run_id);
    set("TSM_GENERATION", &seat.restart_count.to_string());
    set("TSM_RESTART_COUNT", &seat.restart_count.to_string());
    if let Some(from) = shape.resume_from {
        set("TSM_RESUME_FROM", &text(from));
    }
    if let Some(from) = shape.start_from {
        set("TSM_START_FROM", &text(from));
    }
    let mut default = |name: &str, value: &str| {
        if !inherited(name) {
            set(name, value);
        }
    };
    let threads = (shape.parallelism / shape.devices.len().max(1)).max(1);
    default("OMP_NUM_THREADS", &threads.to_string());
    default("GLOO_SOCKET_IFNAME", &seat.interface);
    // NCCL takes a name as the beginning of one; `=` asks for exactly this interface.
    let exact = if seat.interface == "lo" { "" } else { "=" };
    default("NCCL_SOCKET_IFNAME", &format!("{exact}{}", seat.interface));
    if matches!(shape.devices, Devices::Gpus(_)) {
        default(
            "NCCL_RAS_ADDR",
            &format!("localhost:{}", port(shape.ras_port)),
        );
    }
    env
}

/// Where torch's `@record` writes the exception that ends a rank.
pub fn error_file(run_dir: &Path, host: &str, rank: u32) -> PathBuf {
    run_dir
        .join("logs")
        .join(format!("{host}-{rank}.error.json"))
}

/// The plan as text: what `--dry-run` prints.
pub fn describe(shape: &Shape, workers: &[WorkerPlan], command: &[OsString]) -> String {
    let mut text = format!(
        "run folder  {}\nhost        {}\nworld size  {}\ncommand     {}\n",
        shape.run_dir.display(),
        shape.host,
        shape.seat.world_size,
        shell(command)
    );
    let (common, own): (Vec<_>, Vec<_>) = match workers {
        [] => return text,
        [first, rest @ ..] => first
            .env
            .iter()
            .partition(|pair| rest.iter().all(|w| w.env.contains(pair))),
    };
    let _ = writeln!(text, "every rank");
    for (name, value) in common {
        let _ = writeln!(text, "  {name}={value}");
    }
    for worker in workers {
        let cores = if worker.cores.is_empty() {
            "all".into()
        } else {
            cores::to_list(&worker.cores)
        };
        let _ = writeln!(
            text,
            "rank {}: {}, cores {cores}",
            worker.rank, worker.device
        );
        for (name, value) in worker
            .env
            .iter()
            .filter(|(name, _)| own.iter().any(|(o, _)| o == name))
        {
            let _ = writeln!(text, "  {name}={value}");
        }
    }
    text
}

/// A command line that a shell reads back.
pub fn shell(command: &[OsString]) -> String {
    let plain = |c: char| c.is_alphanumeric() || "_-./=:,@%+".contains(c);
    let quote = |word: &OsString| {
        let word = word.to_string_lossy();
        if !word.is_empty() && word.chars().all(plain) {
            word.into_owned()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    command.iter().map(quote).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
