//! CUDA where there is one: loading it at run time, events, streams, graphs and memory.
//!
//! A program links libtorch_cpu only. [`load_cuda`] adds libtorch_cuda and then our plugin, which is
//! part of the program, so that one file serves machines with and without CUDA.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::marker::PhantomData;

use tch::{Device, Tensor};

use crate::error::{Result, check};
use crate::ops::Ptr;

mod load;

pub use load::load_cuda;

#[repr(C)]
struct RawInfo {
    device_count: i32,
    runtime_version: i32,
    nccl_version: i32,
    why: [c_char; 256],
}

#[repr(C)]
struct RawDevice {
    compute_capability: i32,
    name: [c_char; 256],
}

#[expect(unsafe_code, reason = "declarations of csrc/cuda_calls.cpp")]
unsafe extern "C" {
    fn tsm_cuda_info(out: *mut RawInfo) -> c_int;
    fn tsm_cuda_device(device: c_int, out: *mut RawDevice) -> c_int;
    fn tsm_cuda_shift_cubin_bytes(capability: c_int, out: *mut usize) -> c_int;
    fn tsm_cuda_set_device(device: c_int) -> c_int;
    fn tsm_cuda_synchronize(device: c_int) -> c_int;
    fn tsm_cuda_memory(
        device: c_int,
        allocated: *mut i64,
        peak: *mut i64,
        reserved: *mut i64,
    ) -> c_int;
    fn tsm_cuda_reset_peak(device: c_int) -> c_int;
    fn tsm_empty_bytes(bytes: i64, pinned: c_int, out: *mut Ptr) -> c_int;
    fn tsm_event_new(device: c_int, out: *mut *mut c_void) -> c_int;
    fn tsm_event_free(e: *mut c_void);
    fn tsm_event_record(e: *mut c_void) -> c_int;
    fn tsm_event_done(e: *mut c_void, out: *mut c_int) -> c_int;
    fn tsm_event_synchronize(e: *mut c_void) -> c_int;
    fn tsm_event_block(e: *mut c_void) -> c_int;
    fn tsm_event_elapsed_ms(start: *mut c_void, end: *mut c_void, out: *mut f32) -> c_int;
    fn tsm_stream_new(device: c_int, high_priority: c_int, out: *mut i64) -> c_int;
    fn tsm_stream_set(device: c_int, stream: i64, previous: *mut i64) -> c_int;
    fn tsm_graph_new(out: *mut *mut c_void) -> c_int;
    fn tsm_graph_free(g: *mut c_void);
    fn tsm_graph_begin(g: *mut c_void) -> c_int;
    fn tsm_graph_end(g: *mut c_void) -> c_int;
    fn tsm_graph_replay(g: *mut c_void) -> c_int;
}

/// Calls a C function of the plugin.
macro_rules! call {
    ($f:ident($($arg:expr),* $(,)?)) => {{
        #[expect(unsafe_code, reason = "call into csrc/cuda_calls.cpp")]
        // SAFETY: handles are alive and ours, out-pointers outlive the call; without the plugin
        // the function fails before it uses them.
        check(unsafe { $f($($arg),*) })
    }};
}

/// What [`load_cuda`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaInfo {
    /// Visible devices. It can be 0: the libraries load on a machine without a driver.
    pub device_count: usize,
    /// CUDA's reason when there is no device.
    pub no_device: Option<String>,
    /// The CUDA runtime, as 13000 for 13.0; 0 where there is no driver to ask.
    pub runtime_version: i32,
    /// libnccl, as 22809 for 2.28.9.
    pub nccl_version: i32,
}

impl CudaInfo {
    fn read() -> Result<CudaInfo> {
        let mut raw = RawInfo {
            device_count: 0,
            runtime_version: 0,
            nccl_version: 0,
            why: [0; 256],
        };
        call!(tsm_cuda_info(&mut raw))?;
        let why = text(&raw.why);
        Ok(CudaInfo {
            device_count: usize::try_from(raw.device_count).unwrap_or(0),
            no_device: (!why.is_empty()).then_some(why),
            runtime_version: raw.runtime_version,
            nccl_version: raw.nccl_version,
        })
    }
}

fn text(buffer: &[c_char; 256]) -> String {
    #[expect(unsafe_code, reason = "a C string")]
    // SAFETY: the buffer was zeroed, and C wrote at most 255 bytes into it.
    let s = unsafe { CStr::from_ptr(buffer.as_ptr()) };
    s.to_string_lossy().into_owned()
}

fn index(device: usize) -> c_int {
    c_int::try_from(device).unwrap_or(c_int::MAX)
}

/// The name of CUDA device `device` and its compute capability (90 for 9.0).
///
/// # Errors
/// If there is no such device or CUDA is not loaded.
pub fn device(device: usize) -> Result<(String, i32)> {
    let mut raw = RawDevice {
        compute_capability: 0,
        name: [0; 256],
    };
    call!(tsm_cuda_device(index(device), &mut raw))?;
    Ok((text(&raw.name), raw.compute_capability))
}

/// Compiles the temporal shift for a compute capability and returns the size of its machine code.
/// A device is not needed: for checks before a run. The operation itself compiles on first use.
///
/// # Errors
/// If NVRTC is missing or does not know the capability.
pub fn compile_shift(capability: i32) -> Result<usize> {
    let mut bytes = 0;
    call!(tsm_cuda_shift_cubin_bytes(capability, &mut bytes))?;
    Ok(bytes)
}

/// Makes `device` this thread's current device, where libraries put what no tensor places: page-locked
/// memory, handles, a context. A process that keeps to one GPU of several calls it first, or it
/// takes memory on GPU 0 too.
///
/// # Errors
/// If there is no such device or CUDA is not loaded.
pub fn set_device(device: usize) -> Result<()> {
    call!(tsm_cuda_set_device(index(device)))
}

/// Waits until all work queued on `device` is done; nothing to do on the CPU.
///
/// # Errors
/// An asynchronous error of that work, or CUDA is not loaded.
pub fn synchronize(device: Device) -> Result<()> {
    match device {
        Device::Cuda(i) => call!(tsm_cuda_synchronize(index(i))),
        _ => Ok(()),
    }
}

/// Memory of libtorch's caching allocator on one device, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// In tensors now.
    pub allocated_bytes: u64,
    /// The most that was in tensors since the start or [`reset_peak_memory`].
    pub peak_bytes: u64,
    /// Taken from the driver now, free blocks included.
    pub reserved_bytes: u64,
}

/// The allocator's state on CUDA device `device`.
///
/// # Errors
/// If there is no such device or CUDA is not loaded.
pub fn memory_stats(device: usize) -> Result<MemoryStats> {
    let (mut allocated, mut peak, mut reserved) = (0, 0, 0);
    call!(tsm_cuda_memory(
        index(device),
        &mut allocated,
        &mut peak,
        &mut reserved
    ))?;
    let bytes = |n: i64| u64::try_from(n).unwrap_or(0);
    Ok(MemoryStats {
        allocated_bytes: bytes(allocated),
        peak_bytes: bytes(peak),
        reserved_bytes: bytes(reserved),
    })
}

/// Starts a new measurement of the peak.
///
/// # Errors
/// If there is no such device or CUDA is not loaded.
pub fn reset_peak_memory(device: usize) -> Result<()> {
    call!(tsm_cuda_reset_peak(index(device)))
}

/// A host buffer of `bytes` u8, page-locked where there is a CUDA device, so that copies to it can
/// overlap with computation; an ordinary tensor elsewhere. Not initialised.
///
/// # Errors
/// If the memory cannot be had.
pub fn pinned(bytes: usize) -> Result<Tensor> {
    let has_device = matches!(load::loaded(), Some(info) if info.device_count > 0);
    let mut out = std::ptr::null_mut();
    call!(tsm_empty_bytes(
        i64::try_from(bytes).unwrap_or(i64::MAX),
        has_device.into(),
        &mut out
    ))?;
    #[expect(unsafe_code, reason = "a tensor of csrc/cuda_calls.cpp")]
    // SAFETY: a new tensor that we own.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// A point in the work of a device's current stream.
pub struct Event(*mut c_void);

#[expect(unsafe_code, reason = "a handle of the CUDA runtime")]
// SAFETY: CUDA's events may be used from any thread.
unsafe impl Send for Event {}
#[expect(unsafe_code, reason = "a handle of the CUDA runtime")]
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event of CUDA device `device`, not recorded yet: done, as CUDA sees it.
    ///
    /// # Errors
    /// If there is no such device or CUDA is not loaded.
    pub fn new(device: usize) -> Result<Event> {
        let mut out = std::ptr::null_mut();
        call!(tsm_event_new(index(device), &mut out))?;
        Ok(Event(out))
    }

    /// Moves the event behind all work queued so far on this thread's current stream.
    ///
    /// # Errors
    /// If CUDA refuses.
    pub fn record(&self) -> Result<()> {
        call!(tsm_event_record(self.0))
    }

    /// Whether the work before it is done; does not wait.
    ///
    /// # Errors
    /// An asynchronous error of that work.
    pub fn query(&self) -> Result<bool> {
        let mut done = 0;
        call!(tsm_event_done(self.0, &mut done))?;
        Ok(done != 0)
    }

    /// Waits on the host until the work before it is done.
    ///
    /// # Errors
    /// An asynchronous error of that work.
    pub fn synchronize(&self) -> Result<()> {
        call!(tsm_event_synchronize(self.0))
    }

    /// Makes this thread's current stream wait for it; the host goes on.
    ///
    /// # Errors
    /// If CUDA refuses.
    pub fn block_stream(&self) -> Result<()> {
        call!(tsm_event_block(self.0))
    }

    /// Milliseconds from `start` to this event; both must be done.
    ///
    /// # Errors
    /// If one is not recorded or not done.
    pub fn elapsed_ms(&self, start: &Event) -> Result<f32> {
        let mut ms = 0.0;
        call!(tsm_event_elapsed_ms(start.0, self.0, &mut ms))?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "call into csrc/cuda_calls.cpp")]
        // SAFETY: we own the event, and the plugin that made it is never unloaded.
        unsafe {
            tsm_event_free(self.0);
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Event")
    }
}

/// A queue of device work beside the default one, out of libtorch's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    device: usize,
    id: i64,
}

impl Stream {
    /// A stream of CUDA device `device`.
    ///
    /// # Errors
    /// If there is no such device or CUDA is not loaded.
    pub fn new(device: usize, high_priority: bool) -> Result<Stream> {
        let mut id = 0;
        call!(tsm_stream_new(index(device), high_priority.into(), &mut id))?;
        Ok(Stream { device, id })
    }

    /// Queues this thread's work here until the guard is dropped.
    ///
    /// Order against other streams is the caller's, by events; memory that crosses over must live
    /// until both are done.
    ///
    /// # Errors
    /// If CUDA refuses.
    pub fn enter(&self) -> Result<StreamGuard> {
        let mut previous = 0;
        call!(tsm_stream_set(index(self.device), self.id, &mut previous))?;
        Ok(StreamGuard {
            device: self.device,
            previous,
            _this_thread: PhantomData,
        })
    }
}

/// Puts the former stream of this thread back.
#[derive(Debug)]
#[must_use = "the stream is left when the guard is dropped"]
pub struct StreamGuard {
    device: usize,
    previous: i64,
    _this_thread: PhantomData<*const ()>,
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        let mut ours = 0;
        // It was current a moment ago, so that making it current again cannot fail.
        let _ = call!(tsm_stream_set(index(self.device), self.previous, &mut ours));
    }
}

/// Device work recorded once and replayed as one launch, on the same memory.
pub struct Graph(*mut c_void);

impl Graph {
    /// Runs `f` and records what it queues on CUDA device `device`, without executing it.
    ///
    /// `f` must not wait for the device. Run it a few times before, outside, so that what
    /// compiles or allocates on first use is done.
    ///
    /// # Errors
    /// `f`'s, or CUDA's if `f` did what cannot be recorded.
    pub fn capture(device: usize, f: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let mut out = std::ptr::null_mut();
        call!(tsm_graph_new(&mut out))?;
        let graph = Graph(out);
        let stream = Stream::new(device, false)?;
        synchronize(Device::Cuda(device))?;
        let guard = stream.enter()?;
        call!(tsm_graph_begin(graph.0))?;
        let result = f();
        // Also after an error: the stream stays in capture otherwise.
        let ended = call!(tsm_graph_end(graph.0));
        drop(guard);
        result.and(ended).map(|()| graph)
    }

    /// Queues the recorded work on the current stream.
    ///
    /// # Errors
    /// If CUDA refuses.
    pub fn replay(&self) -> Result<()> {
        call!(tsm_graph_replay(self.0))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "call into csrc/cuda_calls.cpp")]
        // SAFETY: we own the graph, and the plugin that made it is never unloaded.
        unsafe {
            tsm_graph_free(self.0);
        }
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Graph")
    }
}

#[cfg(test)]
mod tests;
