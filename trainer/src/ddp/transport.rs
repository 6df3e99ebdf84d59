//! What carries tensors between the ranks: c10d's groups (Gloo, NCCL), or MPI.

use std::time::Duration;
use tch::Tensor;
use tsm_torch_ext::dist::{ProcessGroup, ReduceOp};

/// A text, to which [`super::Peers`] adds the collective's name and the missing rank.
pub type Result<R, E = String> = std::result::Result<R, E>;

/// The rest of a collective that has been started; the tensor may be used when it returns `Ok`.
pub type Wait = Box<dyn FnOnce() -> Result<()> + Send>;

/// Every rank must call the same methods in the same order; a call that waits has a time limit.
pub trait Transport: Send + Sync {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// Starts to replace `t` (floating point) by its mean over the ranks.
    fn start_mean(&self, t: &Tensor) -> Result<Wait>;
    fn all_reduce(&self, t: &Tensor, op: ReduceOp) -> Result<()>;
    /// Overwrites `tensors` with those of rank `root`.
    fn broadcast(&self, tensors: &[Tensor], root: usize) -> Result<()>;
    /// `t` of every rank, by rank.
    fn all_gather(&self, t: &Tensor) -> Result<Vec<Tensor>>;
    fn barrier(&self, timeout: Duration) -> Result<()>;
    /// Closes the transport at the end of a run that went well; all ranks call it.
    fn shutdown(&self) -> Result<()>;
}

impl Transport for ProcessGroup {
    fn rank(&self) -> usize {
        self.rank()
    }

    fn world_size(&self) -> usize {
        self.world_size()
    }

    fn start_mean(&self, t: &Tensor) -> Result<Wait> {
        let op = if t.device().is_cuda() {
            ReduceOp::Avg
        } else {
            // gloo cannot average; dividing first also keeps half sums in range.
            let _ = t
                .shallow_clone()
                .f_div_scalar_(self.world_size() as f64)
                .map_err(|e| e.to_string())?;
            ReduceOp::Sum
        };
        let work = self.all_reduce_async(t, op).map_err(|e| e.to_string())?;
        Ok(Box::new(|| work.wait().map_err(|e| e.to_string())))
    }

    fn all_reduce(&self, t: &Tensor, op: ReduceOp) -> Result<()> {
        self.all_reduce(t, op).map_err(|e| e.to_string())
    }

    fn broadcast(&self, tensors: &[Tensor], root: usize) -> Result<()> {
        self.broadcast(tensors, root).map_err(|e| e.to_string())
    }

    fn all_gather(&self, t: &Tensor) -> Result<Vec<Tensor>> {
        self.all_gather(t).map_err(|e| e.to_string())
    }

    fn barrier(&self, timeout: Duration) -> Result<()> {
        self.barrier(timeout).map_err(|e| e.to_string())
    }

    fn shutdown(&self) -> Result<()> {
        self.shutdown().map_err(|e| e.to_string())
    }
}
