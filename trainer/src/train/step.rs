//! One optimizer step: forward, loss, backward with overlapped reduction, update.

use super::pace::Pace;
use super::place::Place;
use crate::ddp::{Ddp, Peers};
use crate::model::Network;
use crate::optim::{ParamInfo, Sgd, StepTensors};
use crate::precision::Precision;
use anyhow::Result;
use std::sync::Arc;
use tch::{Kind, Reduction, Tensor};
use tsm_job::Config;
use tsm_torch_ext::cuda::Event;
use tsm_torch_ext::ops;

/// Everything that a step changes.
pub struct Stepper {
    pub network: Network,
    pub sgd: Sgd,
    pub precision: Precision,
    pub peers: Arc<Peers>,
    ddp: Ddp,
    label_smoothing: f64,
}

/// What a micro step leaves on the device.
pub struct MicroStep {
    /// This rank's part of the global mean loss, float32 scalar: the ranks' and micro steps' parts
    /// add up to `world_size` times it.
    pub loss: Tensor,
    /// float32 `[n, k]`, detached.
    pub logits_nk: Tensor,
    /// When this rank had all its gradients, before it waits for the others'; `None` on the CPU.
    pub gradients: Option<Event>,
}

impl Stepper {
    /// Brings `network` into the training's memory format and number format, makes rank 0's
    /// parameters everyone's, and lays out the gradient buckets.
    ///
    /// # Errors
    /// A number format the device lacks, ranks with different networks, or a peer that is gone.
    pub fn new(config: &Config, place: &Place, network: Network) -> Result<Stepper> {
        let precision = Precision::new(&config.train.precision, place.device)?;
        if let Some(kind) = precision.weight_kind() {
            network.cast_half_except_bn(kind);
        }
        if config.train.channels_last {
            network.to_channels_last();
        }
        let peers = place.peers.clone();
        let named = || network.named_params().chain(network.named_buffers());
        peers.verify_same_shapes(named(), place.device)?;
        let all: Vec<Tensor> = named().map(|(_, t)| t.shallow_clone()).collect();
        peers.broadcast(&all, 0, "broadcast of the initial parameters")?;

        let trainable = ParamInfo::of(&network);
        let ddp = Ddp::new(&trainable, peers.clone(), config.train.bucket_mib)?;
        let size = i64::from(config.data.train.size);
        let dummy = Tensor::zeros(
            [i64::from(config.model.num_segments), 3, size, size],
            (Kind::Float, place.device),
        );
        let dummy = if config.train.channels_last {
            ops::to_channels_last(&dummy)?
        } else {
            dummy
        };
        // In evaluation mode the dry run leaves BatchNorm's statistics alone.
        ddp.record_order(|| {
            let logits = forward(&network, &precision, &dummy, false);
            Ok(ops::backward(&logits.sum(Kind::Float))?)
        })?;
        let sgd = Sgd::new(&trainable, &ddp.buckets(), &config.optim)?;
        Ok(Stepper {
            network,
            sgd,
            precision,
            peers,
            ddp,
            label_smoothing: config.optim.label_smoothing,
        })
    }

    /// Forgets the gradients of the step before.
    pub fn begin(&self) -> Result<()> {
        self.ddp.zero()
    }

    /// Makes this rank vote to stop after this step; after [`Self::begin`].
    pub fn vote(&self) -> Result<()> {
        self.ddp.vote()
    }

    /// The votes of all ranks, after the last micro step: see [`Ddp::votes`].
    pub fn votes(&self) -> Result<Tensor> {
        self.ddp.votes()
    }

    /// Forward and backward of one micro step; the `last` one of a step averages the gradients
    /// over the ranks. `frames` is `[n * t, 3, h, w]`, `labels_n` int64 `[n]`, and `step_samples`
    /// the clips of the whole step over ranks and micro steps, so that every clip weighs the same
    /// however they are dealt out.
    ///
    /// # Errors
    /// A peer that is gone (exit code PEER), or no memory.
    pub fn micro_step(
        &self,
        frames: &Tensor,
        labels_n: &Tensor,
        step_samples: u64,
        last: bool,
    ) -> Result<MicroStep> {
        self.ddp.begin(last);
        let logits = forward(&self.network, &self.precision, frames, true);
        let none = None::<Tensor>;
        let sum = logits.f_cross_entropy_loss(
            labels_n,
            none.as_ref(),
            Reduction::Sum,
            -100,
            self.label_smoothing,
        )?;
        let loss = sum * (f64::from(self.peers.world_size()) / step_samples as f64);
        ops::backward(&self.precision.scale_loss(&loss))?;
        let gradients = Pace::event(frames.device())?;
        self.ddp.finish()?;
        Ok(MicroStep {
            loss: loss.detach(),
            logits_nk: logits.detach(),
            gradients,
        })
    }

    /// The update from the gradients of the micro steps.
    pub fn update(&mut self, lr: f64) -> Result<StepTensors> {
        self.sgd.step(lr, &mut self.precision)
    }

    /// Logits in evaluation mode, float32 `[n, k]`, without gradients.
    pub fn evaluate(&self, frames: &Tensor) -> Tensor {
        tch::no_grad(|| forward(&self.network, &self.precision, frames, false))
    }
}

/// float32 logits `[n, k]`.
fn forward(network: &Network, precision: &Precision, frames: &Tensor, train: bool) -> Tensor {
    let frames = match precision.weight_kind() {
        Some(kind) => frames.to_kind(kind),
        None => frames.shallow_clone(),
    };
    precision
        .forward(|| network.forward(&frames, train))
        .to_kind(Kind::Float)
}
