//! The other ranks: collectives whose failures name the rank that is missing.

use super::blame::{Watcher, sentence};
use super::transport::{self, Transport};
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use tsm_job::config::BnBuffers;
use tsm_job::exit::{self, Coded};
use tsm_torch_ext::cuda;
use tsm_torch_ext::dist::{ReduceOp, Store};

/// What connects the ranks of a job.
pub struct Link {
    pub store: Arc<Store>,
    pub group: Arc<dyn Transport>,
}

/// This rank among the others. With one rank every collective does nothing.
pub struct Peers {
    rank: u32,
    world_size: u32,
    link: Option<Link>,
    watcher: Option<Watcher>,
    /// Nanoseconds since [`Peers::take_waited`].
    waited: AtomicU64,
}

impl Peers {
    /// A job of one rank.
    pub fn alone() -> Peers {
        Peers {
            rank: 0,
            world_size: 1,
            link: None,
            watcher: None,
            waited: AtomicU64::new(0),
        }
    }

    /// Joins the ranks of `link`. Starts the thread that answers when a collective fails
    /// somewhere; drop the `Peers` before the process ends.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn join(link: Link) -> Result<Peers> {
        let (rank, world_size) = (link.group.rank() as u32, link.group.world_size() as u32);
        let watcher = Watcher::start(link.store.clone(), rank, world_size)
            .context("cannot start the watcher thread")?;
        Ok(Peers {
            rank,
            world_size,
            link: Some(link),
            watcher: Some(watcher),
            waited: AtomicU64::new(0),
        })
    }

    /// Ends a run that went well, after the last collective: rank 0, which holds the store, stays
    /// until the others have left it. Without it they would report a lost connection.
    pub fn leave(&self) {
        let (Some(link), Some(watcher)) = (&self.link, &self.watcher) else {
            return;
        };
        watcher.stop();
        // NCCL's threads end while every rank and the store are still there, and MPI would call an
        // end without it an accident; gloo has nothing to close. What fails now cannot harm a run
        // that is over.
        let _ = link.group.shutdown();
        let key = |rank: u32| format!("tsm/left/{rank}");
        if self.rank > 0 {
            // A store that is gone already is what this waits for anyway.
            let _ = link.store.set(&key(self.rank), b"1");
            return;
        }
        let keys: Vec<String> = (1..self.world_size).map(key).collect();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let _ = link.store.wait(&keys, super::blame::WINDOW);
    }

    pub fn rank(&self) -> u32 {
        self.rank
    }

    pub fn world_size(&self) -> u32 {
        self.world_size
    }

    pub(super) fn transport(&self) -> transport::Result<&dyn Transport> {
        match &self.link {
            Some(link) => Ok(&*link.group),
            None => Err("a rank alone has no transport".into()),
        }
    }

    /// Runs one collective; `what` names it in the error.
    pub(super) fn waiting<R>(
        &self,
        what: &str,
        started: Instant,
        run: impl FnOnce() -> std::result::Result<R, String>,
    ) -> Result<R> {
        if let Some(w) = &self.watcher {
            w.set_in_collective(true);
        }
        let since = Instant::now();
        let result = run();
        let waited = since.elapsed().as_nanos() as u64;
        self.waited.fetch_add(waited, Ordering::Relaxed);
        if let Some(w) = &self.watcher {
            w.set_in_collective(false);
        }
        result.map_err(|text| self.blame(what, started.elapsed(), &text))
    }

    fn blame(&self, what: &str, after: Duration, text: &str) -> anyhow::Error {
        let failure = format!(
            "{what} failed on rank {} after {:.1}s: {}",
            self.rank,
            after.as_secs_f64(),
            text.trim()
        );
        let message = match &self.watcher {
            Some(w) => sentence(&w.blame(), &failure),
            None => failure,
        };
        Coded::new(exit::PEER, message).into()
    }

    fn collective<R>(
        &self,
        what: &str,
        run: impl FnOnce(&dyn Transport) -> transport::Result<R>,
    ) -> Result<R> {
        self.waiting(what, Instant::now(), || run(self.transport()?))
    }

    /// Host time spent in collectives since the last call. With NCCL the host does not wait for
    /// them, and this is only the time to queue them.
    pub fn take_waited(&self) -> Duration {
        Duration::from_nanos(self.waited.swap(0, Ordering::Relaxed))
    }

    /// Replaces `tensor` by its reduction over all ranks; `what` names it in an error, e.g.
    /// "all-reduce of the validation counts".
    ///
    /// # Errors
    /// Exit code PEER, naming the rank that is gone or stuck.
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp, what: &str) -> Result<()> {
        if self.world_size == 1 {
            return Ok(());
        }
        self.collective(what, |group| group.all_reduce(tensor, op))
    }

    /// As [`Peers::all_reduce`] with a sum, but returns when the device has it.
    ///
    /// # Errors
    /// Exit code PEER, naming the rank that is gone or stuck.
    pub fn sum_and_wait(&self, tensor: &Tensor, what: &str) -> Result<()> {
        if self.world_size == 1 {
            return Ok(());
        }
        self.collective(what, |group| {
            group.all_reduce(tensor, ReduceOp::Sum)?;
            cuda::synchronize(tensor.device()).map_err(|e| e.to_string())
        })
    }

    /// Overwrites `tensors` with those of rank `root`.
    ///
    /// # Errors
    /// Exit code PEER, naming the rank that is gone or stuck.
    pub fn broadcast(&self, tensors: &[Tensor], root: u32, what: &str) -> Result<()> {
        if self.world_size == 1 || tensors.is_empty() {
            return Ok(());
        }
        self.collective(what, |group| group.broadcast(tensors, root as _))
    }

    /// `tensor` of every rank, by rank; all of the same shape.
    ///
    /// # Errors
    /// Exit code PEER, naming the rank that is gone or stuck.
    pub fn all_gather(&self, tensor: &Tensor, what: &str) -> Result<Vec<Tensor>> {
        if self.world_size == 1 {
            return Ok(vec![tensor.copy()]);
        }
        self.collective(what, |group| group.all_gather(tensor))
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    /// Exit code PEER, naming the rank that is gone or stuck.
    pub fn barrier(&self, timeout: Duration, what: &str) -> Result<()> {
        if self.world_size == 1 {
            return Ok(());
        }
        self.collective(what, |group| group.barrier(timeout))
    }

    /// Checks that all ranks have the same tensors (names, shapes, kinds) in the same order,
    /// before the first collective that would hang or mix them up. `device` is where
    /// collectives run.
    ///
    /// # Errors
    /// The ranks that differ from rank 0, with the first difference of the lowest.
    pub fn verify_same_shapes<'a>(
        &self,
        named: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
        device: Device,
    ) -> Result<()> {
        let Some(link) = &self.link else {
            return Ok(());
        };
        let lines: Vec<String> = named
            .into_iter()
            .map(|(name, t)| format!("{name} {:?} {:?}", t.size(), t.kind()))
            .collect();
        let text = lines.join("\n");
        let digest: Vec<u8> = Sha256::digest(text.as_bytes()).to_vec();
        let what = "comparison of the networks";
        let own = Tensor::from_slice(&digest).f_to_device(device)?;
        let all: Vec<Vec<u8>> = self
            .all_gather(&own, what)?
            .iter()
            .map(|t| Vec::try_from(&t.to_device(Device::Cpu)))
            .collect::<std::result::Result<_, _>>()?;
        let differing: Vec<u32> = (0..self.world_size)
            .filter(|&r| all[r as usize] != all[0])
            .collect();
        let Some(&first) = differing.first() else {
            return Ok(());
        };
        let key = |rank: u32| format!("tsm/shapes/{rank}");
        if self.rank == 0 || self.rank == first {
            link.store.set(&key(self.rank), text.as_bytes())?;
        }
        let (ours, theirs) = (key(0), key(first));
        link.store.wait(&[&ours, &theirs], super::blame::WINDOW)?;
        let zero = String::from_utf8_lossy(&link.store.get(&ours)?).into_owned();
        let other = String::from_utf8_lossy(&link.store.get(&theirs)?).into_owned();
        let ranks: Vec<String> = differing.iter().map(u32::to_string).collect();
        let ranks = match &ranks[..] {
            [one] => format!("rank {one} has"),
            more => format!("ranks {} have", more.join(", ")),
        };
        bail!(
            "{ranks} another network than rank 0: {}\n  hint: every rank must run the same config.yaml and the same program",
            first_difference(&zero, &other, first)
        );
    }

    /// Makes BatchNorm's running statistics the same on all ranks: their mean
    /// ([`BnBuffers::Mean`]), or those of rank 0. Integer buffers are taken from rank 0.
    ///
    /// # Errors
    /// Exit code PEER, naming the rank that is gone or stuck.
    pub fn sync_buffers<'a>(
        &self,
        buffers: impl IntoIterator<Item = &'a Tensor>,
        how: BnBuffers,
    ) -> Result<()> {
        if self.world_size == 1 {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        let (floats, others): (Vec<&Tensor>, Vec<&Tensor>) = buffers
            .into_iter()
            .partition(|t| how == BnBuffers::Mean && t.kind() == Kind::Float);
        let others: Vec<Tensor> = others.into_iter().map(Tensor::shallow_clone).collect();
        self.broadcast(&others, 0, "broadcast of the BatchNorm buffers")?;
        if floats.is_empty() {
            return Ok(());
        }
        let flat: Vec<Tensor> = floats
            .iter()
            .map(|t| t.f_reshape([-1]))
            .collect::<std::result::Result<_, _>>()?;
        let flat = Tensor::f_cat(&flat, 0)?.f_div_scalar(f64::from(self.world_size))?;
        self.all_reduce(&flat, ReduceOp::Sum, "all-reduce of the BatchNorm buffers")?;
        let mut start = 0;
        for t in floats {
            let numel = t.numel() as i64;
            let mut t = t.shallow_clone();
            t.f_copy_(&flat.f_narrow(0, start, numel)?.f_reshape(t.size())?)?;
            start += numel;
        }
        Ok(())
    }
}

/// The first line in which two listings differ.
fn first_difference(zero: &str, other: &str, rank: u32) -> String {
    let (mut a, mut b) = (zero.lines(), other.lines());
    loop {
        match (a.next(), b.next()) {
            (Some(x), Some(y)) if x == y => {}
            (Some(x), Some(y)) => return format!("{x} on rank 0, {y} on rank {rank}"),
            (Some(x), None) => return format!("{x} on rank 0 only"),
            (None, Some(y)) => return format!("{y} on rank {rank} only"),
            (None, None) => return "the listings are equal now".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_shown() {
        assert_eq!(
            first_difference("a [1] Float\nb [2] Float", "a [1] Float\nb [3] Float", 2),
            "b [2] Float on rank 0, b [3] Float on rank 2"
        );
        assert_eq!(first_difference("a", "a\nb", 1), "b on rank 1 only");
    }

    #[test]
    fn alone_every_collective_is_nothing() {
        let p = Peers::alone();
        let t = Tensor::from_slice(&[1.0f32, 2.0]);
        p.all_reduce(&t, ReduceOp::Sum, "x").unwrap();
        p.broadcast(&[t.shallow_clone()], 0, "x").unwrap();
        p.sync_buffers([&t], BnBuffers::Mean).unwrap();
        assert_eq!(p.all_gather(&t, "x").unwrap(), [t]);
    }
}
