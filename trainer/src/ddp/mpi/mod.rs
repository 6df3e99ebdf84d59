//! MPI as the transport, for clusters on which it is the native one.
//!
//! The ranks are those of `mpirun` or `srun`. Tensors pass through host memory: the non-blocking
//! reductions of Open MPI take no device memory, not even where it is CUDA-aware. Half types travel
//! as float32, because MPI knows neither, which also sums them in float32.

mod engine;

use super::transport::{Result, Transport, Wait};
use super::{Link, Peers};
use engine::{Call, Facts, Job, Order, Outcome};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use tch::{Device, Kind, Tensor};
use tsm_job::WorkerEnv;
use tsm_job::exit::{self, Coded};
use tsm_torch_ext::cuda::{self, Event, Stream};
use tsm_torch_ext::dist::{ReduceOp, Store};

/// The orders of this process's MPI thread.
static ORDERS: OnceLock<Sender<Order>> = OnceLock::new();

/// How long an abort may take until the process ends without it.
const ABORT_WAIT: Duration = Duration::from_secs(2);

/// What tells a process that MPI's starter made it: Open MPI, PMIx (also Slurm), PMI (MPICH, Intel MPI).
const STARTED_BY_MPI: [&str; 4] = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PMI_FD"];

/// Meets the other ranks through MPI; at the first call only, and for the life of the process.
/// `timeout` bounds the meeting and every collective.
///
/// # Errors
/// A process that MPI did not start, or numbers that differ from MPI's (exit code USAGE); a peer
/// that does not come in time (exit code PEER).
pub fn join(env: &WorkerEnv, timeout: Duration) -> anyhow::Result<Peers> {
    if env.world_size == 1 {
        return Ok(Peers::alone());
    }
    check_starter(env, |name| std::env::var(name).ok())?;
    let apart = |e: String| {
        Coded::new(
            exit::PEER,
            format!(
                "rank {} could not meet the other ranks through MPI: {e}",
                env.rank
            ),
        )
    };
    let (orders, facts) = engine::start(timeout).map_err(apart)?;
    let _ = ORDERS.set(orders.clone());
    agree(env, facts.rank, facts.world_size)?;
    let group = Arc::new(Group {
        orders,
        timeout,
        scratch: Arc::default(),
        stream: Mutex::new(None),
        facts,
    });
    let store = meet_at_store(&group, env).map_err(apart)?;
    Peers::join(Link {
        store: Arc::new(store),
        group,
    })
}

/// Ends all ranks through MPI, with `code` for `mpirun`, and this process with them; returns where
/// MPI is not in use, or does not answer within 2 seconds.
pub fn abort(code: i32) {
    let Some(orders) = ORDERS.get() else { return };
    if orders.send(Order::Abort(code)).is_ok() {
        std::thread::sleep(ABORT_WAIT);
    }
}

/// Before `MPI_Init`, which without a starter makes a world of one rank, and where several
/// processes share one MPI rank may hang.
fn check_starter(env: &WorkerEnv, get: impl Fn(&str) -> Option<String>) -> Result<(), Coded> {
    if !STARTED_BY_MPI.iter().any(|name| get(name).is_some()) {
        return Err(Coded::new(
            exit::USAGE,
            format!(
                "launch.collectives is mpi, but MPI did not start this process (none of {} is set)\n  hint: mpirun -n {} tsm-trainer --config FILE, or srun --mpi=pmix; under tsm-launch set launch.collectives=auto",
                STARTED_BY_MPI.join(", "),
                env.world_size
            ),
        ));
    }
    let number = |name: &str| get(name).and_then(|text| text.parse().ok());
    match (
        number("OMPI_COMM_WORLD_RANK"),
        number("OMPI_COMM_WORLD_SIZE"),
    ) {
        (Some(rank), Some(size)) => agree(env, rank, size),
        _ => Ok(()),
    }
}

fn agree(env: &WorkerEnv, rank: usize, world_size: usize) -> Result<(), Coded> {
    if (env.rank as usize, env.world_size as usize) == (rank, world_size) {
        return Ok(());
    }
    Err(Coded::new(
        exit::USAGE,
        format!(
            "launch.collectives is mpi, but this process is rank {} of {} by its environment and rank {rank} of {world_size} by MPI\n  hint: unset RANK and WORLD_SIZE and let mpirun or srun number the ranks; under tsm-launch set launch.collectives=auto",
            env.rank, env.world_size
        ),
    ))
}

/// Where the ranks find rank 0's store: a literal address that the environment gives, else this
/// host where all are on it, else the name of rank 0's host.
fn store_host(env: &WorkerEnv, hosts: &[String]) -> String {
    if !env.master_addr.is_loopback() {
        return env.master_addr.to_string();
    }
    match hosts.iter().all(|h| *h == hosts[0]) {
        true => "127.0.0.1".into(),
        false => hosts[0].clone(),
    }
}

/// Rank 0 opens the store that names missing ranks, at a port of the system's choice, and tells the
/// port through MPI.
fn meet_at_store(group: &Group, env: &WorkerEnv) -> Result<Store> {
    let text = |e: tch::TchError| e.to_string();
    const WIDTH: usize = 256;
    let mut own = group.facts.host.clone().into_bytes();
    own.resize(WIDTH, 0);
    let hosts: Vec<String> = group
        .all_gather(&Tensor::from_slice(&own))?
        .iter()
        .map(|t| {
            let bytes = Vec::<u8>::try_from(t).map_err(text)?;
            Ok(String::from_utf8_lossy(&bytes)
                .trim_end_matches('\0')
                .to_owned())
        })
        .collect::<Result<_>>()?;
    let host = store_host(env, &hosts);
    let connect = |port: u16, master: bool| {
        Store::tcp(&host, port, group.world_size(), master, group.timeout).map_err(|e| {
            format!(
                "the store at {host}:{port}: {e}\n  hint: MASTER_ADDR gives rank 0 another address"
            )
        })
    };
    let port = |port: u16| Tensor::from(i64::from(port));
    if env.rank == 0 {
        let store = connect(0, true)?;
        group.broadcast(&[port(store.port())], 0)?;
        return Ok(store);
    }
    let told = [port(0)];
    group.broadcast(&told, 0)?;
    let told = i64::try_from(&told[0]).map_err(text)?;
    connect(u16::try_from(told).map_err(|e| e.to_string())?, false)
}

/// The ranks of `MPI_COMM_WORLD`.
struct Group {
    orders: Sender<Order>,
    facts: Facts,
    timeout: Duration,
    scratch: Arc<Scratch>,
    /// For copies from the device, beside backward.
    stream: Mutex<Option<Stream>>,
}

/// Host tensors used again: buckets come back every step, and new memory costs page faults.
#[derive(Default)]
struct Scratch(Mutex<Vec<Tensor>>);

impl Scratch {
    fn take(&self, like: &Tensor, kind: Kind) -> Result<Tensor> {
        let mut free = self.0.lock().unwrap_or_else(|p| p.into_inner());
        let fits = |t: &Tensor| t.kind() == kind && t.size() == like.size();
        match free.iter().position(fits) {
            Some(i) => Ok(free.swap_remove(i)),
            None => Tensor::f_empty(like.size(), (kind, Device::Cpu)).map_err(|e| e.to_string()),
        }
    }

    fn give(&self, tensors: Vec<Tensor>) {
        self.0
            .lock()
            .unwrap_or_else(|p| p.into_inner())
            .extend(tensors);
    }
}

/// A collective on its way; dropped, it goes on without us.
struct Pending {
    name: String,
    done: Receiver<Outcome>,
}

impl Pending {
    fn wait(self, timeout: Duration) -> Result<()> {
        match self.done.recv_timeout(timeout) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => {
                Err(format!("{} did not end within {timeout:?}", self.name))
            }
            Err(RecvTimeoutError::Disconnected) => Err(format!("{}: MPI has ended", self.name)),
        }
    }
}

/// A tensor on its way through a reduction.
struct Staged {
    send: Tensor,
    recv: Tensor,
    ready: Option<Event>,
}

impl Group {
    fn start(&self, call: Call, ready: Option<Event>) -> Result<Pending> {
        let (done, outcome) = mpsc::channel();
        let pending = Pending {
            name: call.to_string(),
            done: outcome,
        };
        self.orders
            .send(Order::Start(Job { call, ready, done }))
            .map_err(|_| format!("{}: MPI has ended", pending.name))?;
        Ok(pending)
    }

    /// Starts the reduction of `t`, divided by `divisor` on every rank, in place.
    fn start_reduce(&self, t: &Tensor, op: ReduceOp, divisor: Option<f64>) -> Result<Wait> {
        let _guard = tch::no_grad_guard();
        let staged = match t.device() {
            Device::Cuda(index) => self.stage_device(t, divisor, index),
            _ => self.stage_host(t, divisor),
        };
        let Staged { send, recv, ready } = staged?;
        let call = Call::AllReduce {
            send: send.shallow_clone(),
            recv: recv.shallow_clone(),
            op,
        };
        let pending = self.start(call, ready)?;
        let (timeout, scratch) = (self.timeout, self.scratch.clone());
        let mut t = t.shallow_clone();
        Ok(Box::new(move || {
            pending.wait(timeout)?;
            let _guard = tch::no_grad_guard();
            let in_place = recv.data_ptr() == t.data_ptr();
            if !in_place {
                t.f_copy_(&recv).map_err(|e| e.to_string())?;
            }
            // Page-locked memory goes back to libtorch's own pool.
            if !t.device().is_cuda() {
                let mut free = vec![send];
                if !in_place {
                    free.push(recv);
                }
                scratch.give(free);
            }
            Ok(())
        }))
    }

    /// The division and the copy that MPI's separate send buffer needs are one pass over memory.
    fn stage_host(&self, t: &Tensor, divisor: Option<f64>) -> Result<Staged> {
        let staged = || -> std::result::Result<Staged, String> {
            let text = |e: tch::TchError| e.to_string();
            let kind = wire_kind(t.kind());
            let mut send = self.scratch.take(t, kind)?;
            match divisor {
                Some(d) if kind == t.kind() => {
                    let d = Tensor::from(d).f_to_kind(kind).map_err(text)?;
                    let _ = t.f_div_out(&send, &d).map_err(text)?;
                }
                Some(d) => {
                    send.f_copy_(t).map_err(text)?;
                    let _ = send.f_div_scalar_(d).map_err(text)?;
                }
                None => send.f_copy_(t).map_err(text)?,
            }
            let recv = if kind == t.kind() && t.is_contiguous() {
                t.shallow_clone()
            } else {
                self.scratch.take(t, kind)?
            };
            Ok(Staged {
                send,
                recv,
                ready: None,
            })
        };
        staged()
    }

    /// Copies to page-locked memory on a stream of its own, behind the work queued so far; the host
    /// does not wait.
    fn stage_device(&self, t: &Tensor, divisor: Option<f64>, index: usize) -> Result<Staged> {
        let staged = || -> anyhow::Result<Staged> {
            let computed = Event::new(index)?;
            computed.record()?;
            let stream = {
                let mut stream = self.stream.lock().unwrap_or_else(|p| p.into_inner());
                match *stream {
                    Some(stream) => stream,
                    None => *stream.insert(Stream::new(index, true)?),
                }
            };
            let _aside = stream.enter()?;
            computed.block_stream()?;
            let kind = wire_kind(t.kind());
            let mut wire = t.f_to_kind(kind)?.f_contiguous()?;
            if let Some(d) = divisor {
                wire = wire.f_div_scalar(d)?;
            }
            // Non-blocking copies to the host land in page-locked memory.
            let send = wire.f_to_device_(Device::Cpu, kind, true, false)?;
            let recv = cuda::pinned(send.numel() * kind.elt_size_in_bytes())?
                .f_view_dtype(kind)?
                .f_view(&send.size()[..])?;
            let ready = Event::new(index)?;
            ready.record()?;
            Ok(Staged {
                send,
                recv,
                ready: Some(ready),
            })
        };
        staged().map_err(|e| format!("{e:#}"))
    }
}

impl Transport for Group {
    fn rank(&self) -> usize {
        self.facts.rank
    }

    fn world_size(&self) -> usize {
        self.facts.world_size
    }

    fn start_mean(&self, t: &Tensor) -> Result<Wait> {
        self.start_reduce(t, ReduceOp::Sum, Some(self.world_size() as f64))
    }

    fn all_reduce(&self, t: &Tensor, op: ReduceOp) -> Result<()> {
        match op {
            ReduceOp::Avg => self.start_mean(t)?(),
            op => self.start_reduce(t, op, None)?(),
        }
    }

    fn broadcast(&self, tensors: &[Tensor], root: usize) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let text = |e: tch::TchError| e.to_string();
        let mut started = Vec::with_capacity(tensors.len());
        for t in tensors {
            let data = t
                .f_detach()
                .and_then(|t| t.f_to_device(Device::Cpu)?.f_contiguous())
                .map_err(text)?;
            let call = Call::Broadcast {
                data: data.shallow_clone(),
                root,
            };
            started.push((t, data, self.start(call, None)?));
        }
        for (t, data, pending) in started {
            pending.wait(self.timeout)?;
            if data.data_ptr() != t.data_ptr() {
                t.shallow_clone().f_copy_(&data).map_err(text)?;
            }
        }
        Ok(())
    }

    fn all_gather(&self, t: &Tensor) -> Result<Vec<Tensor>> {
        let text = |e: tch::TchError| e.to_string();
        let send = t
            .f_detach()
            .and_then(|t| t.f_to_device(Device::Cpu)?.f_contiguous())
            .map_err(text)?;
        let mut shape = vec![self.world_size() as i64];
        shape.extend(send.size());
        let recv = Tensor::f_empty(shape, (send.kind(), Device::Cpu)).map_err(text)?;
        let call = Call::AllGather {
            send,
            recv: recv.shallow_clone(),
        };
        self.start(call, None)?.wait(self.timeout)?;
        (0..self.world_size() as i64)
            .map(|rank| recv.f_get(rank).and_then(|r| r.f_to_device(t.device())))
            .collect::<std::result::Result<_, _>>()
            .map_err(text)
    }

    fn barrier(&self, timeout: Duration) -> Result<()> {
        self.start(Call::Barrier, None)?.wait(timeout)
    }

    fn shutdown(&self) -> Result<()> {
        let (done, outcome) = mpsc::channel();
        self.orders
            .send(Order::Finalize(done))
            .map_err(|_| "MPI has ended".to_owned())?;
        let pending = Pending {
            name: "MPI_Finalize".into(),
            done: outcome,
        };
        pending.wait(self.timeout)
    }
}

/// What a tensor is reduced as.
fn wire_kind(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(master_addr: &str) -> WorkerEnv {
        let get = |name: &str| {
            let value = match name {
                "RANK" | "LOCAL_RANK" => "1",
                "WORLD_SIZE" => "4",
                "MASTER_ADDR" => master_addr,
                "MASTER_PORT" => "0",
                _ => return None,
            };
            Some(value.to_owned())
        };
        WorkerEnv::from_lookup(get).unwrap()
    }

    #[test]
    fn the_store_is_where_all_ranks_can_reach_it() {
        let hosts = |list: [&str; 2]| list.map(String::from);
        let (one, two) = (hosts(["n1", "n1"]), hosts(["n1", "n2"]));
        assert_eq!(store_host(&env("127.0.0.1"), &one), "127.0.0.1");
        assert_eq!(store_host(&env("127.0.0.1"), &two), "n1");
        assert_eq!(store_host(&env("10.0.0.7"), &two), "10.0.0.7");
    }

    #[test]
    fn mpi_s_numbers_must_be_the_environment_s() {
        let check = |vars: &[(&str, &str)]| {
            let find = |name: &str| vars.iter().find(|(n, _)| *n == name);
            check_starter(&env("127.0.0.1"), |name| {
                find(name).map(|(_, v)| v.to_string())
            })
        };
        let open_mpi = |rank, size| {
            check(&[
                ("OMPI_COMM_WORLD_RANK", rank),
                ("OMPI_COMM_WORLD_SIZE", size),
            ])
        };
        assert!(open_mpi("1", "4").is_ok());
        // Of others, MPI itself is asked later.
        assert!(check(&[("PMI_RANK", "7")]).is_ok());
        for refused in [open_mpi("1", "2"), open_mpi("0", "4"), check(&[])] {
            assert_eq!(refused.unwrap_err().code, exit::USAGE);
        }
    }
}
