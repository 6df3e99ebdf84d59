//! Rendezvous and collectives: c10d's TCP store and process groups (Gloo, and NCCL where CUDA is).
//!
//! Every rank must start the same collectives in the same order. Timeouts are hard limits.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::time::Duration;

use tch::Tensor;

use crate::error::{Result, check};
use crate::ops::{Ptr, ptr, ptrs};

/// A borrowed string or byte slice on its way to C++.
#[repr(C)]
#[derive(Clone, Copy)]
struct Bytes {
    data: *const u8,
    size: usize,
}

impl Bytes {
    fn of(bytes: &[u8]) -> Bytes {
        Bytes {
            data: bytes.as_ptr(),
            size: bytes.len(),
        }
    }

    fn all(keys: &[&str]) -> Vec<Bytes> {
        keys.iter().map(|k| Bytes::of(k.as_bytes())).collect()
    }
}

type Sink = extern "C" fn(*mut c_void, *const u8, usize);

#[expect(unsafe_code, reason = "declarations of csrc/dist.cpp")]
unsafe extern "C" {
    fn tsm_ranks_as_threads() -> c_int;
    fn tsm_store_tcp(
        host: Bytes,
        port: u16,
        world: usize,
        is_master: c_int,
        timeout_ms: i64,
        out: *mut *mut c_void,
    ) -> c_int;
    fn tsm_store_prefix(s: *const c_void, prefix: Bytes, out: *mut *mut c_void) -> c_int;
    fn tsm_store_port(s: *const c_void) -> u16;
    fn tsm_store_set(s: *const c_void, key: Bytes, value: Bytes) -> c_int;
    fn tsm_store_get(s: *const c_void, key: Bytes, sink: *mut c_void, write: Sink) -> c_int;
    fn tsm_store_wait(s: *const c_void, keys: *const Bytes, count: usize, timeout_ms: i64)
    -> c_int;
    fn tsm_store_add(s: *const c_void, key: Bytes, amount: i64, out: *mut i64) -> c_int;
    fn tsm_store_check(
        s: *const c_void,
        keys: *const Bytes,
        count: usize,
        out: *mut c_int,
    ) -> c_int;
    fn tsm_store_free(s: *mut c_void);
    fn tsm_group_gloo(
        s: *const c_void,
        rank: c_int,
        world: c_int,
        iface: Bytes,
        timeout_ms: i64,
        threads: c_int,
        out: *mut *mut c_void,
    ) -> c_int;
    fn tsm_group_nccl(
        s: *const c_void,
        rank: c_int,
        world: c_int,
        device: c_int,
        timeout_ms: i64,
        out: *mut *mut c_void,
    ) -> c_int;
    fn tsm_group_all_reduce(g: *const c_void, t: Ptr, op: c_int, out: *mut *mut c_void) -> c_int;
    fn tsm_group_broadcast(g: *const c_void, list: *const Ptr, count: usize, root: c_int) -> c_int;
    fn tsm_group_all_gather(g: *const c_void, t: Ptr, out: *mut Ptr) -> c_int;
    fn tsm_group_barrier(g: *const c_void, timeout_ms: i64) -> c_int;
    fn tsm_group_abort(g: *const c_void) -> c_int;
    fn tsm_group_shutdown(g: *const c_void) -> c_int;
    fn tsm_group_free(g: *mut c_void);
    fn tsm_work_wait(w: *mut c_void) -> c_int;
    fn tsm_work_free(w: *mut c_void);
    fn tsm_reducer_new(
        g: *const c_void,
        list: *const Ptr,
        count: usize,
        bucket_bytes: i64,
        out: *mut *mut c_void,
    ) -> c_int;
    fn tsm_reducer_before_forward(r: *const c_void) -> c_int;
    fn tsm_reducer_before_backward(r: *const c_void) -> c_int;
    fn tsm_reducer_free(r: *mut c_void);
}

fn millis(d: Duration) -> i64 {
    i64::try_from(d.as_millis()).unwrap_or(i64::MAX)
}

/// Lets a C++ function write the object it makes into the place it is given.
fn made(f: impl FnOnce(*mut *mut c_void) -> c_int) -> Result<*mut c_void> {
    let mut out = std::ptr::null_mut();
    check(f(&mut out))?;
    Ok(out)
}

/// Call first in a test whose ranks are threads of one process.
///
/// c10d's flight recorder keeps one map of all groups of a process and enters a new group before
/// it takes its lock (FlightRecorderDetail.hpp, libtorch 2.11): groups that start at the same
/// time crash now and then. This switches the recorder off. With one group a process, as
/// in a real job, there is nothing to race.
///
/// # Errors
/// If the environment cannot be changed.
pub fn ranks_as_threads() -> Result<()> {
    #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
    // SAFETY: no arguments; libtorch's own lock guards its use of the environment.
    check(unsafe { tsm_ranks_as_threads() })
}

/// A key-value store that all ranks share; rank 0 holds it.
///
/// Calls of one store wait for each other, across threads too: give a thread that waits long
/// its own connection.
pub struct Store(*mut c_void);

#[expect(unsafe_code, reason = "the C++ object locks itself")]
// SAFETY: c10d::TCPStore serialises its calls by a mutex and has no thread-local state.
unsafe impl Send for Store {}
#[expect(unsafe_code, reason = "the C++ object locks itself")]
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// Connects to `host:port`; with `is_master` this process also serves it.
    ///
    /// The master returns when all of `world` have connected, except at port 0, where the system
    /// chooses the [`port`](Store::port). `timeout` bounds the connection and is the default of
    /// [`get`](Store::get).
    ///
    /// # Errors
    /// If the port is taken, the host does not answer, or not all connect in time.
    pub fn tcp(
        host: &str,
        port: u16,
        world: usize,
        is_master: bool,
        timeout: Duration,
    ) -> Result<Store> {
        let host = Bytes::of(host.as_bytes());
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `host` is copied; `out` receives an object that we own.
        made(|out| unsafe {
            tsm_store_tcp(host, port, world, is_master.into(), millis(timeout), out)
        })
        .map(Store)
    }

    /// The same store, with `prefix` in front of every key: one for each process group.
    ///
    /// # Errors
    /// None but lack of memory.
    pub fn prefix(&self, prefix: &str) -> Result<Store> {
        let prefix = Bytes::of(prefix.as_bytes());
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` is alive, `prefix` is copied; the new object shares what it needs.
        made(|out| unsafe { tsm_store_prefix(self.0, prefix, out) }).map(Store)
    }

    /// The TCP port the store is served on.
    pub fn port(&self) -> u16 {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` is alive.
        unsafe {
            tsm_store_port(self.0)
        }
    }

    /// Stores `value` under `key`, over any older value.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` is alive; the slices are copied.
        check(unsafe { tsm_store_set(self.0, Bytes::of(key.as_bytes()), Bytes::of(value)) })
    }

    /// The value of `key`; waits for it up to the store's timeout.
    ///
    /// # Errors
    /// If the key does not appear in time or the connection is lost.
    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        extern "C" fn write(sink: *mut c_void, data: *const u8, size: usize) {
            if size == 0 {
                return;
            }
            #[expect(unsafe_code, reason = "called by tsm_store_get")]
            // SAFETY: `sink` is the vector below; `data` points to `size` bytes for this call.
            unsafe {
                let value = &mut *sink.cast::<Vec<u8>>();
                value.extend_from_slice(std::slice::from_raw_parts(data, size));
            }
        }
        let mut value = Vec::<u8>::new();
        let sink = (&raw mut value).cast();
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` is alive, the key is copied, `value` outlives the call.
        check(unsafe { tsm_store_get(self.0, Bytes::of(key.as_bytes()), sink, write) })?;
        Ok(value)
    }

    /// Waits until all `keys` exist.
    ///
    /// # Errors
    /// If they do not within `timeout`, or the connection is lost.
    pub fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        let keys = Bytes::all(keys);
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` is alive; the keys are copied.
        check(unsafe { tsm_store_wait(self.0, keys.as_ptr(), keys.len(), millis(timeout)) })
    }

    /// Adds `amount` to the counter `key` (0 if new) and returns the sum.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64> {
        let mut sum = 0;
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` is alive, the key is copied, `sum` outlives the call.
        check(unsafe { tsm_store_add(self.0, Bytes::of(key.as_bytes()), amount, &mut sum) })?;
        Ok(sum)
    }

    /// Whether all `keys` exist now.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn check(&self, keys: &[&str]) -> Result<bool> {
        let keys = Bytes::all(keys);
        let mut all = 0;
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` is alive, the keys are copied, `all` outlives the call.
        check(unsafe { tsm_store_check(self.0, keys.as_ptr(), keys.len(), &mut all) })?;
        Ok(all != 0)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: we own the object; groups made from it share what they need.
        unsafe {
            tsm_store_free(self.0);
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("port", &self.port()).finish()
    }
}

/// How [`ProcessGroup::all_reduce`] combines the ranks' values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    Sum = 0,
    /// The sum divided by the world size; floating point only.
    Avg = 1,
    Max = 2,
}

/// The ranks of a job and the transport between them.
pub struct ProcessGroup {
    handle: *mut c_void,
    rank: usize,
    world_size: usize,
}

#[expect(unsafe_code, reason = "the C++ object locks itself")]
// SAFETY: c10d's process groups queue work under their own locks; Python calls them from many
// threads without the interpreter lock.
unsafe impl Send for ProcessGroup {}
#[expect(unsafe_code, reason = "the C++ object locks itself")]
// SAFETY: as above.
unsafe impl Sync for ProcessGroup {}

impl ProcessGroup {
    /// Joins `world` ranks by Gloo, for CPU tensors, over the network interface `iface` (e.g. `eth0`;
    /// empty: the one this host's name resolves to).
    ///
    /// `timeout` bounds the connection of all pairs and every collective. `threads` collectives can
    /// run at the same time.
    ///
    /// # Errors
    /// If the interface does not exist or a rank does not come in time.
    pub fn gloo(
        store: &Store,
        rank: usize,
        world: usize,
        iface: &str,
        timeout: Duration,
        threads: usize,
    ) -> Result<ProcessGroup> {
        let iface = Bytes::of(iface.as_bytes());
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `store` is alive and shared by the group; `iface` is copied.
        let handle = made(|out| unsafe {
            tsm_group_gloo(
                store.0,
                rank as c_int,
                world as c_int,
                iface,
                millis(timeout),
                threads as c_int,
                out,
            )
        })?;
        Ok(ProcessGroup {
            handle,
            rank,
            world_size: world,
        })
    }

    /// Joins `world` ranks by NCCL, for tensors on CUDA device `device` (an index among the visible
    /// ones). Communicators are made by the first collective; its watchdog ends the process when
    /// one takes longer than `timeout`.
    ///
    /// # Errors
    /// If [`load_cuda`](crate::cuda::load_cuda) was not called or failed, or there is no GPU.
    pub fn nccl(
        store: &Store,
        rank: usize,
        world: usize,
        device: usize,
        timeout: Duration,
    ) -> Result<ProcessGroup> {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `store` is alive and shared by the group.
        let handle = made(|out| unsafe {
            tsm_group_nccl(
                store.0,
                rank as c_int,
                world as c_int,
                device as c_int,
                millis(timeout),
                out,
            )
        })?;
        Ok(ProcessGroup {
            handle,
            rank,
            world_size: world,
        })
    }

    /// This process's number in the group, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Combines `t` of all ranks in place. On CUDA the current stream waits, not the host.
    ///
    /// # Errors
    /// If shapes or dtypes differ, a rank fails or the timeout passes.
    pub fn all_reduce(&self, t: &Tensor, op: ReduceOp) -> Result<()> {
        self.all_reduce_async(t, op)?.wait()
    }

    /// Starts [`all_reduce`](ProcessGroup::all_reduce); `t` must not be touched until the work is
    /// waited for.
    ///
    /// # Errors
    /// If the collective cannot be started; what fails later is [`Work::wait`]'s error.
    pub fn all_reduce_async(&self, t: &Tensor, op: ReduceOp) -> Result<Work> {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` and `t` are alive; the work keeps the tensor.
        let handle =
            made(|out| unsafe { tsm_group_all_reduce(self.handle, ptr(t), op as c_int, out) })?;
        Ok(Work {
            handle,
            _tensor: t.shallow_clone(),
        })
    }

    /// Overwrites `tensors` with those of rank `root`, many in one message.
    ///
    /// # Errors
    /// If shapes or dtypes differ, a rank fails or the timeout passes.
    pub fn broadcast(&self, tensors: &[Tensor], root: usize) -> Result<()> {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` and the tensors are alive.
        check(unsafe {
            tsm_group_broadcast(
                self.handle,
                ptrs(tensors).as_ptr(),
                tensors.len(),
                root as c_int,
            )
        })
    }

    /// `t` of every rank, in the order of the ranks; the shape is the same on all.
    ///
    /// # Errors
    /// If shapes or dtypes differ, a rank fails or the timeout passes.
    pub fn all_gather(&self, t: &Tensor) -> Result<Vec<Tensor>> {
        let mut out: Vec<Ptr> = vec![std::ptr::null_mut(); self.world_size];
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` and `t` are alive; on success `out` holds one new tensor of ours a rank.
        unsafe {
            check(tsm_group_all_gather(self.handle, ptr(t), out.as_mut_ptr()))?;
            Ok(out.into_iter().map(|p| Tensor::from_ptr(p)).collect())
        }
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// On Gloo after `timeout`: on rank 0 the message names the ranks that did not come.
    pub fn barrier(&self, timeout: Duration) -> Result<()> {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` is alive.
        check(unsafe { tsm_group_barrier(self.handle, millis(timeout)) })
    }

    /// Ends NCCL's collectives in flight with an error on this rank; no effect on Gloo.
    ///
    /// # Errors
    /// If the backend refuses.
    pub fn abort(&self) -> Result<()> {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` is alive.
        check(unsafe { tsm_group_abort(self.handle) })
    }

    /// Closes the group in order at the end of a run: waits for what is in flight. All ranks call it.
    ///
    /// # Errors
    /// If work in flight failed.
    pub fn shutdown(&self) -> Result<()> {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` is alive.
        check(unsafe { tsm_group_shutdown(self.handle) })
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: we own the object.
        unsafe {
            tsm_group_free(self.handle);
        }
    }
}

impl fmt::Debug for ProcessGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProcessGroup({}/{})", self.rank, self.world_size)
    }
}

/// A collective in flight.
#[must_use = "a collective is done only when it has been waited for"]
pub struct Work {
    handle: *mut c_void,
    _tensor: Tensor,
}

#[expect(unsafe_code, reason = "the C++ object locks itself")]
// SAFETY: c10d::Work may be waited for on another thread than the one that started it.
unsafe impl Send for Work {}

impl Work {
    /// Waits for the result. For NCCL this makes the current stream wait and returns at once.
    ///
    /// # Errors
    /// If the collective failed or timed out.
    pub fn wait(mut self) -> Result<()> {
        let handle = std::mem::replace(&mut self.handle, std::ptr::null_mut());
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: we own the object, which this call frees.
        check(unsafe { tsm_work_wait(handle) })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: we own the object, or it is null after `wait`.
        unsafe {
            tsm_work_free(self.handle);
        }
    }
}

/// DistributedDataParallel's own reducer, the oracle that our bucket engine is tested against.
///
/// Only for tests and comparisons: fixed options, no unused parameters, no gradient views. Per step
/// call [`before_forward`](ReducerOracle::before_forward), then
/// [`before_backward`](ReducerOracle::before_backward); the backward pass leaves the mean of all
/// ranks' gradients in each `grad`.
pub struct ReducerOracle(*mut c_void);

impl ReducerOracle {
    /// Hooks itself onto `params`, the same on every rank; buckets of about `bucket_bytes`.
    ///
    /// # Errors
    /// If the parameters differ between ranks.
    pub fn new(
        group: &ProcessGroup,
        params: &[Tensor],
        bucket_bytes: usize,
    ) -> Result<ReducerOracle> {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: the group and the tensors are alive and shared by the new object.
        made(|out| unsafe {
            tsm_reducer_new(
                group.handle,
                ptrs(params).as_ptr(),
                params.len(),
                bucket_bytes as i64,
                out,
            )
        })
        .map(ReducerOracle)
    }

    /// Call before the forward pass of a step.
    ///
    /// # Errors
    /// If the last backward pass left gradients unreduced.
    pub fn before_forward(&self) -> Result<()> {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` is alive.
        check(unsafe { tsm_reducer_before_forward(self.0) })
    }

    /// Call after the forward and before the backward pass of a step.
    ///
    /// # Errors
    /// If the last backward pass left gradients unreduced.
    pub fn before_backward(&self) -> Result<()> {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: `self` is alive.
        check(unsafe { tsm_reducer_before_backward(self.0) })
    }
}

impl Drop for ReducerOracle {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "call into csrc/dist.cpp")]
        // SAFETY: we own the object.
        unsafe {
            tsm_reducer_free(self.0);
        }
    }
}

#[cfg(test)]
mod tests;
