//! Which device this rank computes on, with how many threads, and with which peers.

use super::rendezvous;
use crate::ddp::{Link, Peers, mpi};
use anyhow::Result;
use std::path::Path;
use std::sync::Arc;
use tch::Device;
use tsm_job::WorkerEnv;
use tsm_job::config::{Collectives, Config, DeviceKind, Launch};
use tsm_job::env::Starter;
use tsm_job::exit::{self, Coded};
use tsm_torch_ext::cuda;
use tsm_torch_ext::dist::{ProcessGroup, Store};
use tsm_torch_ext::ops::{Flags, set_flags};

/// This rank's place in the job.
pub struct Place {
    pub device: Device,
    /// CPU threads libtorch may use within an operation.
    pub threads: usize,
    pub peers: Arc<Peers>,
}

impl Place {
    /// Chooses the device and meets the other ranks.
    ///
    /// # Errors
    /// No GPU where the configuration asks for one (exit code PREFLIGHT), or a peer that does not
    /// come in time (exit code PEER).
    pub fn new(config: &Config, env: &WorkerEnv) -> Result<Place> {
        let place = Self::meet(&config.launch, &config.run.dir, env)?;
        set_flags(Flags {
            cudnn_benchmark: !config.train.deterministic,
            deterministic: config.train.deterministic,
            allow_tf32: true,
        })?;
        Ok(place)
    }

    /// As [`Place::new`], for a job without a configuration. `folder` is one that all ranks share, through
    /// which those meet whom nobody told where rank 0 is.
    ///
    /// # Errors
    /// As [`Place::new`].
    pub fn meet(launch: &Launch, folder: &Path, env: &WorkerEnv) -> Result<Place> {
        let device = device(launch.device, env)?;
        check_collectives(launch.collectives, device)?;
        let threads = threads(env);
        tch::set_num_threads(threads as i32);
        let peers = match launch.collectives {
            Collectives::Mpi => mpi::join(env, launch.collective_timeout)?,
            _ if env.world_size == 1 => Peers::alone(),
            _ => meet(launch, folder, env, device)?,
        };
        Ok(Place {
            device,
            threads,
            peers: Arc::new(peers),
        })
    }

    /// The device's index in this process, `None` on the CPU.
    pub fn cuda_index(&self) -> Option<u32> {
        match self.device {
            Device::Cuda(index) => Some(index as u32),
            _ => None,
        }
    }
}

fn device(wanted: DeviceKind, env: &WorkerEnv) -> Result<Device> {
    if wanted == DeviceKind::Cpu {
        return Ok(Device::Cpu);
    }
    let unusable = |why: String| {
        Coded::new(
            exit::PREFLIGHT,
            format!(
                "no GPU can be used: {why}\n  hint: tsm-launch --cpus N (or launch.device=cpu) computes on the CPU; where a library is missing, TSM_CUDA=1 scripts/setup.sh brings libtorch's CUDA libraries"
            ),
        )
    };
    cuda::load_cuda().map_err(unusable)?;
    let visible = tch::Cuda::device_count();
    if i64::from(env.local_rank) >= visible {
        let list =
            std::env::var("CUDA_VISIBLE_DEVICES").map_or("not set".into(), |v| format!("{v:?}"));
        let why = format!(
            "local rank {} has no device, {visible} are visible (CUDA_VISIBLE_DEVICES is {list})",
            env.local_rank
        );
        return Err(unusable(why).into());
    }
    let index = env.local_rank as usize;
    cuda::set_device(index).map_err(|e| unusable(format!("device {index}: {e}")))?;
    Ok(Device::Cuda(index))
}

/// Gloo's tensors lie on the CPU, NCCL's on GPUs.
fn check_collectives(collectives: Collectives, device: Device) -> Result<(), Coded> {
    let (given, device) = match (collectives, device.is_cuda()) {
        (Collectives::Gloo, true) => ("gloo", "gpu"),
        (Collectives::Nccl, false) => ("nccl", "cpu"),
        _ => return Ok(()),
    };
    Err(Coded::new(
        exit::CONFIG,
        format!(
            "launch.collectives is {given}, but launch.device is {device}\n  hint: set launch.collectives=auto, which takes NCCL on GPUs and Gloo on the CPU"
        ),
    ))
}

/// `OMP_NUM_THREADS`, which the launcher sets to the rank's share of the cores; without a launcher
/// the same share of the cores this process may use.
fn threads(env: &WorkerEnv) -> usize {
    let share = |cores: usize| match env.started_by {
        Starter::Nobody | Starter::Launcher => cores,
        _ => (cores / env.local_world_size as usize).max(1),
    };
    std::env::var("OMP_NUM_THREADS")
        .ok()
        .and_then(|t| t.parse().ok())
        .filter(|&t| t > 0)
        .or_else(|| {
            std::thread::available_parallelism()
                .ok()
                .map(|n| share(n.get()))
        })
        .unwrap_or(1)
}

fn meet(launch: &Launch, folder: &Path, env: &WorkerEnv, device: Device) -> Result<Peers> {
    let timeout = launch.collective_timeout;
    let (rank, world_size) = (env.rank as usize, env.world_size as usize);
    let at = match env.master_port {
        0 => format!("through {}", folder.display()),
        port => format!("at {}:{port}", env.master_addr),
    };
    let apart = |e: tsm_torch_ext::TorchError| {
        let others = world_size - 1;
        let text = format!("rank {rank} could not meet the other {others} ranks {at}: {e}");
        Coded::new(exit::PEER, text)
    };
    let named = std::env::var("GLOO_SOCKET_IFNAME").ok();
    let (store, interface) = if env.master_port == 0 {
        let met = rendezvous::meet(env, folder, timeout)?;
        (met.store, named.unwrap_or(met.interface))
    } else {
        let address = env.master_addr.to_string();
        let store = Store::tcp(&address, env.master_port, world_size, rank == 0, timeout);
        (store.map_err(apart)?, named.unwrap_or_default())
    };
    let group = match device {
        Device::Cuda(index) => ProcessGroup::nccl(&store, rank, world_size, index, timeout),
        _ => ProcessGroup::gloo(&store, rank, world_size, &interface, timeout, 2),
    }
    .map_err(apart)?;
    Peers::join(Link {
        store: Arc::new(store),
        group: Arc::new(group),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transport_of_another_device_is_refused() {
        let (cpu, gpu) = (Device::Cpu, Device::Cuda(0));
        for (collectives, device, refused) in [
            (Collectives::Auto, cpu, false),
            (Collectives::Auto, gpu, false),
            (Collectives::Gloo, cpu, false),
            (Collectives::Gloo, gpu, true),
            (Collectives::Nccl, cpu, true),
            (Collectives::Nccl, gpu, false),
            (Collectives::Mpi, cpu, false),
            (Collectives::Mpi, gpu, false),
        ] {
            let outcome = check_collectives(collectives, device);
            assert_eq!(outcome.is_err(), refused, "{collectives:?} {device:?}");
            if let Err(e) = outcome {
                assert_eq!(e.code, exit::CONFIG);
            }
        }
    }
}
