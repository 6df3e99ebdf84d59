//! The thread that owns MPI.
//!
//! It alone calls MPI, from `MPI_Init` to `MPI_Finalize`, so that `MPI_THREAD_FUNNELED` is enough.
//! Every collective is a non-blocking one: the thread starts them in the order of the calls and
//! polls those in flight, which is what moves them on. So it never waits inside MPI for another rank,
//! and can abort at any time.

use ::mpi::collective::SystemOperation;
use ::mpi::datatype::Equivalence;
use ::mpi::environment::Universe;
use ::mpi::ffi;
use ::mpi::raw::AsRaw;
use ::mpi::{Threading, environment};
use std::collections::VecDeque;
use std::ffi::{c_char, c_int};
use std::fmt;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;
use tch::{Kind, Tensor};
use tsm_torch_ext::cuda::Event;
use tsm_torch_ext::dist::ReduceOp;

/// Between two looks at the collectives in flight: against looking all the time, a small reduction
/// is 0.1 ms later, and the core is backward's.
const PAUSE: Duration = Duration::from_micros(50);

pub(super) type Outcome = Result<(), String>;

/// A collective on contiguous tensors in host memory, which it keeps alive.
pub(super) enum Call {
    AllReduce {
        send: Tensor,
        recv: Tensor,
        op: ReduceOp,
    },
    Broadcast {
        data: Tensor,
        root: usize,
    },
    /// `recv` holds one `send` a rank.
    AllGather {
        send: Tensor,
        recv: Tensor,
    },
    Barrier,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Call::AllReduce { send, .. } => {
                write!(f, "MPI_Iallreduce of {} {:?}", send.numel(), send.kind())
            }
            Call::Broadcast { data, root } => {
                write!(f, "MPI_Ibcast of {} bytes from rank {root}", bytes(data))
            }
            Call::AllGather { send, .. } => {
                write!(f, "MPI_Iallgather of {} bytes a rank", bytes(send))
            }
            Call::Barrier => f.write_str("MPI_Ibarrier"),
        }
    }
}

pub(super) struct Job {
    pub call: Call,
    /// The copy to host memory that comes first.
    pub ready: Option<Event>,
    pub done: Sender<Outcome>,
}

pub(super) enum Order {
    Start(Job),
    /// Ends MPI on all ranks in order, then the thread.
    Finalize(Sender<Outcome>),
    /// Ends all ranks of the job; the exit code is asked of `mpirun`.
    Abort(i32),
}

/// What MPI says about this process.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub rank: usize,
    pub world_size: usize,
    /// `MPI_Get_processor_name`: equal on ranks of one host.
    pub host: String,
}

/// Starts the thread and initialises MPI, for the life of the process: dropping the sender leaves
/// both as they are, so that an error on its way up can still [`Order::Abort`].
pub(super) fn start(timeout: Duration) -> Result<(Sender<Order>, Facts), String> {
    let (orders, inbox) = mpsc::channel();
    let (hello, facts) = mpsc::channel();
    let keep = orders.clone();
    std::thread::Builder::new()
        .name("tsm-mpi".into())
        .spawn(move || {
            let _keep = keep;
            match Mpi::initialise() {
                Ok((mpi, facts)) => {
                    let _ = hello.send(Ok(facts));
                    mpi.serve(&inbox);
                }
                Err(e) => {
                    let _ = hello.send(Err(e));
                }
            }
        })
        .map_err(|e| format!("cannot start MPI's thread: {e}"))?;
    match facts.recv_timeout(timeout) {
        Ok(facts) => Ok((orders, facts?)),
        Err(_) => Err(format!("MPI_Init did not return within {timeout:?}")),
    }
}

/// MPI on its thread.
struct Mpi {
    comm: ffi::MPI_Comm,
    universe: Universe,
}

struct InFlight {
    request: ffi::MPI_Request,
    job: Job,
}

impl Mpi {
    fn initialise() -> Result<(Mpi, Facts), String> {
        let (universe, provided) = environment::initialize_with_threading(Threading::Funneled)
            .ok_or("MPI is initialised already")?;
        if provided < Threading::Funneled {
            return Err(format!(
                "MPI supports {provided:?}, a program with threads needs MPI_THREAD_FUNNELED"
            ));
        }
        let world = universe.world().as_raw();
        let (mut comm, mut rank, mut size) = (world, 0, 0);
        #[expect(unsafe_code, reason = "MPI")]
        // SAFETY: MPI is initialised, this is its thread, and the out-pointers outlive the calls.
        // Errors of a call that names no communicator go to that of the world.
        unsafe {
            check(ffi::MPI_Comm_set_errhandler(
                world,
                ffi::RSMPI_ERRORS_RETURN,
            ))?;
            check(ffi::MPI_Comm_dup(world, &mut comm))?;
            check(ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN))?;
            check(ffi::MPI_Comm_rank(comm, &mut rank))?;
            check(ffi::MPI_Comm_size(comm, &mut size))?;
        }
        let facts = Facts {
            rank: rank as usize,
            world_size: size as usize,
            host: environment::processor_name().map_err(|e| e.to_string())?,
        };
        Ok((Mpi { comm, universe }, facts))
    }

    fn serve(self, inbox: &Receiver<Order>) {
        let mut queue: VecDeque<Job> = VecDeque::new();
        let mut in_flight: Vec<InFlight> = Vec::new();
        loop {
            let order = if queue.is_empty() && in_flight.is_empty() {
                inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                inbox.recv_timeout(PAUSE)
            };
            match order {
                Ok(Order::Start(job)) => queue.push_back(job),
                Ok(Order::Finalize(done)) => {
                    // rsmpi finalises when its universe is dropped.
                    drop(self.universe);
                    let _ = done.send(Ok(()));
                    return;
                }
                Ok(Order::Abort(code)) => self.abort(code),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while let Some(next) = queue.front() {
                let started = match next.ready.as_ref().map_or(Ok(true), Event::query) {
                    Ok(false) => break,
                    Ok(true) => self.begin(&next.call),
                    Err(e) => Err(e.to_string()),
                };
                let Some(job) = queue.pop_front() else { break };
                match started {
                    Ok(request) => in_flight.push(InFlight { request, job }),
                    Err(e) => answer(&job, Err(e)),
                }
            }
            in_flight.retain_mut(|f| match test(&mut f.request) {
                Ok(false) => true,
                Ok(true) => {
                    answer(&f.job, Ok(()));
                    false
                }
                Err(e) => {
                    answer(&f.job, Err(e));
                    false
                }
            });
        }
    }

    fn begin(&self, call: &Call) -> Result<ffi::MPI_Request, String> {
        let mut request = null_request();
        #[expect(unsafe_code, reason = "MPI")]
        // SAFETY: this is MPI's thread. The tensors lie in host memory, are contiguous and as
        // long as their counts say (`Call`), and are kept until the request is done or the
        // process ends; nobody touches them before that.
        let code = unsafe {
            match call {
                Call::AllReduce { send, recv, op } => ffi::MPI_Iallreduce(
                    send.data_ptr(),
                    recv.data_ptr(),
                    count(send.numel())?,
                    datatype(send.kind())?,
                    operation(*op)?,
                    self.comm,
                    &mut request,
                ),
                Call::Broadcast { data, root } => ffi::MPI_Ibcast(
                    data.data_ptr(),
                    count(bytes(data))?,
                    u8::equivalent_datatype().as_raw(),
                    *root as c_int,
                    self.comm,
                    &mut request,
                ),
                Call::AllGather { send, recv } => ffi::MPI_Iallgather(
                    send.data_ptr(),
                    count(bytes(send))?,
                    u8::equivalent_datatype().as_raw(),
                    recv.data_ptr(),
                    count(bytes(send))?,
                    u8::equivalent_datatype().as_raw(),
                    self.comm,
                    &mut request,
                ),
                Call::Barrier => ffi::MPI_Ibarrier(self.comm, &mut request),
            }
        };
        check(code)?;
        Ok(request)
    }

    fn abort(&self, code: i32) {
        #[expect(unsafe_code, reason = "MPI")]
        // SAFETY: this is MPI's thread; the call ends the process.
        unsafe {
            ffi::MPI_Abort(self.comm, code);
        }
    }
}

/// Whoever gave up waiting has left.
fn answer(job: &Job, outcome: Outcome) {
    let _ = job
        .done
        .send(outcome.map_err(|e| format!("{}: {e}", job.call)));
}

/// Moves MPI on; whether the request is done.
fn test(request: &mut ffi::MPI_Request) -> Result<bool, String> {
    let mut done: c_int = 0;
    #[expect(unsafe_code, reason = "MPI")]
    // SAFETY: this is MPI's thread, and the request is one that it started.
    check(unsafe { ffi::MPI_Test(request, &mut done, ffi::RSMPI_STATUS_IGNORE) })?;
    Ok(done != 0)
}

fn null_request() -> ffi::MPI_Request {
    #[expect(unsafe_code, reason = "MPI")]
    // SAFETY: a constant that the C shim sets.
    unsafe {
        ffi::RSMPI_REQUEST_NULL
    }
}

fn bytes(t: &Tensor) -> usize {
    t.numel() * t.kind().elt_size_in_bytes()
}

/// MPI 3 counts in `int`.
fn count(n: usize) -> Result<c_int, String> {
    c_int::try_from(n).map_err(|_| {
        format!(
            "{n} elements are more than one MPI message carries ({})",
            c_int::MAX
        )
    })
}

fn datatype(kind: Kind) -> Result<ffi::MPI_Datatype, String> {
    Ok(match kind {
        Kind::Float => f32::equivalent_datatype().as_raw(),
        Kind::Double => f64::equivalent_datatype().as_raw(),
        Kind::Int64 => i64::equivalent_datatype().as_raw(),
        Kind::Int => i32::equivalent_datatype().as_raw(),
        Kind::Uint8 => u8::equivalent_datatype().as_raw(),
        other => return Err(format!("MPI has no type for {other:?}")),
    })
}

fn operation(op: ReduceOp) -> Result<ffi::MPI_Op, String> {
    match op {
        ReduceOp::Sum => Ok(SystemOperation::sum().as_raw()),
        ReduceOp::Max => Ok(SystemOperation::max().as_raw()),
        ReduceOp::Avg => Err("MPI has no mean".into()),
    }
}

fn check(code: c_int) -> Result<(), String> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = vec![0u8; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut length = 0;
    #[expect(unsafe_code, reason = "MPI")]
    // SAFETY: the buffer is as long as MPI's longest text.
    let known =
        unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut length) };
    if known != ffi::MPI_SUCCESS as c_int {
        return Err(format!("MPI error {code}"));
    }
    text.truncate(length as usize);
    Err(String::from_utf8_lossy(&text).into_owned())
}
