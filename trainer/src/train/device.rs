//! Which device this rank computes on, with how many threads, and in which process group.

use anyhow::{Context, Result};
use std::time::Duration;
use tch::Device;
use tsm_job::config::{Config, DeviceKind};
use tsm_job::exit::{self, Coded};
use tsm_job::WorkerEnv;
use tsm_torch_ext::{ProcessGroup, Store};

/// This rank's place in the job.
pub struct Place {
    pub device: Device,
    /// CPU cores this rank may use; libtorch's threads within an operation.
    pub threads: usize,
    pub rank: u32,
    pub world_size: u32,
    /// `None` for a rank alone.
    pub group: Option<(Store, ProcessGroup)>,
}

impl Place {
    /// Chooses the device and meets the other ranks.
    ///
    /// # Errors
    /// No GPU where the configuration asks for one, or a peer that does not come in time.
    pub fn new(config: &Config, env: &WorkerEnv) -> Result<Place> {
        let device = device(config, env)?;
        let threads = threads();
        tch::set_num_threads(threads as i32);
        let timeout = config.launch.collective_timeout;
        let group = if env.world_size > 1 { Some(meet(env, device, timeout)?) } else { None };
        Ok(Place { device, threads, rank: env.rank, world_size: env.world_size, group })
    }

    pub fn group(&self) -> Option<&ProcessGroup> {
        self.group.as_ref().map(|(_, group)| group)
    }
}

fn device(config: &Config, env: &WorkerEnv) -> Result<Device> {
    if config.launch.device == DeviceKind::Cpu {
        return Ok(Device::Cpu);
    }
    let unusable = |why: String| {
        Coded::new(
            exit::PREFLIGHT,
            format!("launch.device is gpu, but no GPU can be used: {why}\n  hint: --cpus N (or launch.device=cpu) trains on the CPU"),
        )
    };
    tsm_torch_ext::load_cuda().map_err(unusable)?;
    let visible = tch::Cuda::device_count();
    if i64::from(env.local_rank) >= visible {
        let list = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_else(|_| "not set".into());
        return Err(unusable(format!("local rank {} has no device, {visible} are visible (CUDA_VISIBLE_DEVICES: {list})", env.local_rank)).into());
    }
    Ok(Device::Cuda(env.local_rank as usize))
}

/// OMP_NUM_THREADS, which the launcher sets to the rank's share of the cores, else all cores.
fn threads() -> usize {
    std::env::var("OMP_NUM_THREADS")
        .ok()
        .and_then(|t| t.parse().ok())
        .filter(|&t| t > 0)
        .or_else(|| std::thread::available_parallelism().ok().map(|n| n.get()))
        .unwrap_or(1)
}

fn meet(env: &WorkerEnv, device: Device, timeout: Duration) -> Result<(Store, ProcessGroup)> {
    let (rank, world) = (env.rank as i64, env.world_size as i64);
    let address = env.master_addr.to_string();
    let place = || format!("rank {rank} could not meet the other {} ranks at {address}:{}", world - 1, env.master_port);
    let peer = |e: tsm_torch_ext::TorchError| Coded::new(exit::PEER, format!("{}: {e}", place()));
    let store = Store::tcp(&address, env.master_port, env.world_size, env.rank == 0, timeout).map_err(peer)?;
    let group = match device {
        Device::Cuda(index) => ProcessGroup::nccl(&store, env.rank, env.world_size, index, timeout),
        _ => {
            let interface = std::env::var("GLOO_SOCKET_IFNAME").unwrap_or_default();
            ProcessGroup::gloo(&store, env.rank, env.world_size, &interface, timeout, 2)
        }
    }
    .map_err(peer)
    .context("process group")?;
    Ok((store, group))
}
