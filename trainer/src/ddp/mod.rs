//! Data parallel training: mean gradients over the ranks, reduced while backward still runs.
//!
//! Gradients are strided views of a few flat buckets. A hook on every parameter counts the
//! bucket's gradients; when the last is there, the bucket's all-reduce starts. The order of the
//! buckets is recorded once, before training, and is the same on all ranks and after a resume,
//! so that sums are formed in the same order.
//!
//! Call order:
//! 1. [`Peers::alone`], [`Peers::join`] or [`mpi::join`]; the network on its device, in its memory format and
//!    kind (channels_last, o2) - changing these later would take the gradients out of their buckets;
//! 2. [`Peers::verify_same_shapes`], [`Peers::broadcast`] of parameters and buffers;
//! 3. [`Ddp::new`], [`Ddp::record_order`] around one backward on a dummy batch;
//! 4. [`crate::optim::Sgd::new`] over [`Ddp::buckets`];
//! 5. every step: [`Ddp::zero`]; per micro step [`Ddp::begin`]`(last)`, forward, the mean loss of
//!    its clips divided by the number of micro steps, `tsm_torch_ext::ops::backward`,
//!    [`Ddp::finish`]; then `Sgd::step`;
//! 6. before validation or a checkpoint: [`Peers::sync_buffers`]; at the end: [`Peers::leave`].

mod blame;
mod bucket;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(not(feature = "mpi"))]
#[path = "no_mpi.rs"]
pub mod mpi;
mod peers;
mod transport;

pub use bucket::{Bucket, Member, layout};
pub use peers::{Link, Peers};
pub use transport::{Transport, Wait};

use crate::optim::ParamInfo;
use anyhow::{Context, Result, bail};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Instant;
use tch::{Kind, Tensor};
use tsm_torch_ext::ops::{on_grad_ready, set_grad};

/// The first bucket is small, so that communication starts early (c10d's default).
const FIRST_BUCKET_BYTES: usize = 1 << 20;

/// The bucket engine of one rank.
pub struct Ddp {
    state: Arc<Mutex<State>>,
    peers: Arc<Peers>,
    bucket_bytes: usize,
}

#[derive(Debug, PartialEq)]
enum Phase {
    /// Between `finish` and `begin`.
    Idle,
    /// The dry backward of `record_order`: parameters in the order of their gradients.
    Recording(Vec<usize>),
    /// A micro step; `reduce` on the last of a step.
    Backward { reduce: bool },
}

struct State {
    names: Vec<String>,
    params: Vec<Tensor>,
    /// Bucket and member of every parameter.
    places: Vec<(usize, usize)>,
    buckets: Vec<Bucket>,
    phase: Phase,
    /// Whether each parameter's gradient has arrived in this micro step.
    arrived: Vec<bool>,
    /// Gradients each bucket still waits for.
    missing: Vec<usize>,
    /// Buckets start in index order on every rank, or ranks would reduce different ones together.
    next: usize,
    pending: Vec<(usize, Wait)>,
    /// A reduction that could not even start.
    refused: Option<(usize, String)>,
    /// Start of the micro step's first reduction.
    started: Option<Instant>,
    peers: Arc<Peers>,
}

impl Ddp {
    /// Hooks the parameters; `params` are the trainable ones, in the same order on all ranks.
    /// `bucket_mib` is `train.bucket_mib`.
    ///
    /// # Errors
    /// A parameter that is not a leaf requiring a gradient.
    pub fn new(params: &[ParamInfo], peers: Arc<Peers>, bucket_mib: u32) -> Result<Ddp> {
        let state = Arc::new(Mutex::new(State {
            names: params.iter().map(|p| p.name.clone()).collect(),
            params: params.iter().map(|p| p.tensor.shallow_clone()).collect(),
            places: Vec::new(),
            buckets: Vec::new(),
            phase: Phase::Idle,
            arrived: vec![false; params.len()],
            missing: Vec::new(),
            next: 0,
            pending: Vec::new(),
            refused: None,
            started: None,
            peers: peers.clone(),
        }));
        for (i, p) in params.iter().enumerate() {
            // The state owns the parameters and they own their hooks: weak, or none is ever freed.
            let state: Weak<Mutex<State>> = Arc::downgrade(&state);
            on_grad_ready(&p.tensor, move || match state.upgrade() {
                Some(state) => lock(&state).arrive(i),
                None => Ok(()),
            })
            .with_context(|| format!("cannot follow the gradient of {}", p.name))?;
        }
        Ok(Ddp {
            state,
            peers,
            bucket_bytes: (bucket_mib.max(1) as usize) << 20,
        })
    }

    /// Learns the order in which gradients become ready from one backward pass, takes rank 0's
    /// order on all ranks, and builds the buckets.
    ///
    /// `backward` runs forward and backward on a dummy batch of the training's shape. Its numbers
    /// are thrown away, but it must leave no trace: run BatchNorm in evaluation mode or restore
    /// its buffers, and seed the generators afterwards. Gradients are views of the buckets from
    /// here on.
    ///
    /// # Errors
    /// `backward` failed; a parameter got no gradient (by name); a peer is gone (exit code PEER).
    pub fn record_order(&self, backward: impl FnOnce() -> Result<()>) -> Result<()> {
        {
            let mut s = lock(&self.state);
            for p in &s.params {
                set_grad(p, None)?;
            }
            s.arrived.fill(false);
            s.phase = Phase::Recording(Vec::new());
        }
        let ran = backward();
        let mut s = lock(&self.state);
        let phase = std::mem::replace(&mut s.phase, Phase::Idle);
        ran.context("the dry backward failed")?;
        let Phase::Recording(order) = phase else {
            bail!("the dry backward must not call begin or finish");
        };
        s.check_all_arrived()?;
        let order = self.rank0_order(&order, &s)?;
        let bytes: Vec<usize> = s
            .params
            .iter()
            .map(|p| p.numel() * p.kind().elt_size_in_bytes())
            .collect();
        let kinds: Vec<Kind> = s.params.iter().map(Tensor::kind).collect();
        let plan = layout(
            &order,
            &bytes,
            &kinds,
            FIRST_BUCKET_BYTES.min(self.bucket_bytes),
            self.bucket_bytes,
        );
        s.places = vec![(0, 0); s.params.len()];
        s.buckets = Vec::with_capacity(plan.len());
        for (b, members) in plan.iter().enumerate() {
            let last = b + 1 == plan.len();
            let bucket = Bucket::allocate(members, &s.params, last)?;
            for (m, &param) in members.iter().enumerate() {
                s.places[param] = (b, m);
            }
            s.buckets.push(bucket);
        }
        Ok(())
    }

    fn rank0_order(&self, order: &[usize], s: &State) -> Result<Vec<usize>> {
        if self.peers.world_size() == 1 {
            return Ok(order.to_vec());
        }
        let order: Vec<i64> = order.iter().map(|&i| i as i64).collect();
        let tensor = Tensor::from_slice(&order).f_to_device(s.params[0].device())?;
        let list = [tensor];
        self.peers
            .broadcast(&list, 0, "broadcast of the bucket order")?;
        let order: Vec<i64> = Vec::try_from(&list[0].to_device(tch::Device::Cpu))?;
        let mut seen = vec![false; s.params.len()];
        for &i in &order {
            match seen.get_mut(i as usize) {
                Some(seen) if !*seen => *seen = true,
                _ => bail!(
                    "rank 0 sent a bucket order that is not one of {} parameters",
                    s.params.len()
                ),
            }
        }
        Ok(order.into_iter().map(|i| i as usize).collect())
    }

    /// The buckets: shared tensors, valid for the life of this engine.
    pub fn buckets(&self) -> Vec<Bucket> {
        let s = lock(&self.state);
        s.buckets
            .iter()
            .map(|b| Bucket {
                flat: b.flat.shallow_clone(),
                wire: b.wire.shallow_clone(),
                members: b
                    .members
                    .iter()
                    .map(|m| Member {
                        param: m.param,
                        view: m.view.shallow_clone(),
                        offset: m.offset,
                    })
                    .collect(),
            })
            .collect()
    }

    /// Fills every bucket with zero, and takes back the vote. Once a step, before its first micro
    /// step.
    pub fn zero(&self) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for bucket in &mut lock(&self.state).buckets {
            let _ = bucket.wire.f_zero_()?;
        }
        Ok(())
    }

    /// Makes this rank vote to stop after this step. Before the backward that reduces; the vote
    /// travels behind the gradients of the last bucket and costs no collective of its own.
    pub fn vote(&self) -> Result<()> {
        let _guard = tch::no_grad_guard();
        if let Some(mut vote) = lock(&self.state).vote()? {
            let _ = vote.f_fill_(1.0)?;
        }
        Ok(())
    }

    /// After [`Self::finish`] of a micro step that reduced: above 0 where any rank has voted, the
    /// same on all of them. A scalar on the host; from a GPU a copy under way, which is there once an
    /// event recorded now is done.
    pub fn votes(&self) -> Result<Tensor> {
        match lock(&self.state).vote()? {
            Some(vote) => Ok(vote.f_to_device_(tch::Device::Cpu, vote.kind(), true, true)?),
            None => Ok(Tensor::zeros([], (Kind::Float, tch::Device::Cpu))),
        }
    }

    /// Starts a micro step. With `reduce`, its backward also averages the gradients, those of the
    /// earlier micro steps included, over the ranks: true for the last micro step of a step.
    ///
    /// # Panics
    /// Before [`Self::record_order`].
    pub fn begin(&self, reduce: bool) {
        let mut s = lock(&self.state);
        assert!(
            !s.buckets.is_empty() || s.params.is_empty(),
            "Ddp::begin before Ddp::record_order"
        );
        s.arrived.fill(false);
        s.missing = s.buckets.iter().map(|b| b.members.len()).collect();
        s.next = 0;
        s.pending.clear();
        s.refused = None;
        s.started = None;
        s.phase = Phase::Backward { reduce };
    }

    /// Ends a micro step: waits until every bucket is reduced. After the last micro step of a
    /// step the gradients are the means over the ranks of the sums over the micro steps. (With
    /// NCCL the device's stream waits, not the host.)
    ///
    /// # Errors
    /// Parameters that got no gradient, by name; a peer that is gone (exit code PEER).
    pub fn finish(&self) -> Result<()> {
        let (pending, refused, started) = {
            let mut s = lock(&self.state);
            s.phase = Phase::Idle;
            s.check_all_arrived()?;
            (
                std::mem::take(&mut s.pending),
                s.refused.take(),
                s.started.take(),
            )
        };
        let started = started.unwrap_or_else(Instant::now);
        let total = pending.len() + usize::from(refused.is_some());
        for (bucket, wait) in pending {
            let what = format!("all-reduce of bucket {bucket}");
            self.peers.waiting(&what, started, wait)?;
        }
        if let Some((bucket, error)) = refused {
            let what = format!("all-reduce of bucket {bucket} of {total}");
            return self.peers.waiting(&what, started, || Err(error));
        }
        Ok(())
    }
}

impl State {
    /// The element that holds the vote; `None` without parameters.
    fn vote(&self) -> Result<Option<Tensor>> {
        let Some(bucket) = self.buckets.last() else {
            return Ok(None);
        };
        let behind = bucket.flat.numel() as i64;
        Ok(Some(bucket.wire.f_select(0, behind)?))
    }

    /// Called by parameter `i`'s hook, on the thread that runs backward.
    fn arrive(&mut self, i: usize) -> Result<(), String> {
        let name = &self.names[i];
        if self.phase == Phase::Idle {
            return Err(format!(
                "{name} got a gradient outside of Ddp::begin and Ddp::finish"
            ));
        }
        if std::mem::replace(&mut self.arrived[i], true) {
            return Err(format!(
                "{name} got a second gradient: one backward pass per Ddp::begin"
            ));
        }
        let reduce = match &mut self.phase {
            Phase::Recording(order) => {
                order.push(i);
                return Ok(());
            }
            Phase::Backward { reduce } => *reduce,
            Phase::Idle => false,
        };
        let (b, m) = self.places[i];
        if self.params[i].grad().data_ptr() != self.buckets[b].members[m].view.data_ptr() {
            return Err(format!(
                "the gradient of {name} has left its bucket: only Ddp::zero may clear gradients, and parameters must not change memory format after Ddp::record_order"
            ));
        }
        self.missing[b] -= 1;
        if reduce && self.peers.world_size() > 1 {
            while self.next < self.buckets.len() && self.missing[self.next] == 0 {
                self.reduce(self.next);
                self.next += 1;
            }
        }
        Ok(())
    }

    /// Starts a bucket's all-reduce. A failure is kept for `finish`, where the peer is named.
    fn reduce(&mut self, b: usize) {
        if self.refused.is_some() {
            return;
        }
        self.started.get_or_insert_with(Instant::now);
        let wire = &self.buckets[b].wire;
        match self.peers.transport().and_then(|t| t.start_mean(wire)) {
            Ok(wait) => self.pending.push((b, wait)),
            Err(e) => self.refused = Some((b, e)),
        }
    }

    fn check_all_arrived(&self) -> Result<()> {
        let missing: Vec<&str> = self
            .arrived
            .iter()
            .zip(&self.names)
            .filter_map(|(arrived, name)| (!arrived).then_some(name.as_str()))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        const SHOWN: usize = 8;
        let more = match missing.len().saturating_sub(SHOWN) {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        bail!(
            "{} of {} parameters got no gradient: {}{more}\n  hint: every trainable parameter must take part in the loss; freeze the others",
            missing.len(),
            self.names.len(),
            missing[..missing.len().min(SHOWN)].join(", ")
        );
    }
}

/// A panic in a hook becomes an error of backward; the state is reset by the next `begin`.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
