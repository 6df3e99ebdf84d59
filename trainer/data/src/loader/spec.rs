//! What a loader delivers, from the job's configuration.

use crate::clip::{ClipSpec, Crop, Dataset};
use crate::order::{Cut, Plan, Share, TrainOrder, ValOrder};
use crate::sample::Mode;
use anyhow::Result;
use std::sync::Arc;
use tsm_job::Config;
use tsm_job::config::OnError;
use tsm_job::exit::{self, Coded};

/// Everything that decides what a [`Loader`] delivers.
#[derive(Clone, Debug)]
pub struct LoaderSpec {
    pub dataset: Arc<Dataset>,
    pub clip: ClipSpec,
    pub plan: Plan,
    /// Decoder threads, at least 1.
    pub threads: usize,
    /// Batches decoded ahead of the one in use.
    pub prefetch: usize,
    pub on_error: OnError,
    /// Bad samples of this loader, one rank and epoch, that are borne with [`OnError::Skip`].
    pub max_bad: u64,
}

impl LoaderSpec {
    /// Training clips of `epoch`, behind the first `num_done` of its order.
    ///
    /// # Errors
    /// With exit code [`exit::CONFIG`] if no step is left, the list being too short.
    pub fn train(
        config: &Config,
        dataset: Arc<Dataset>,
        share: Share,
        epoch: u64,
        num_done: u64,
    ) -> Result<LoaderSpec> {
        let train = &config.train;
        let cut = Cut {
            batch_per_rank: train.batch_per_rank,
            accumulation: train.accumulation,
            drop_last: train.drop_last,
        };
        let seed = config.run.seed;
        let order = TrainOrder::new(dataset.len(), seed, epoch, share, cut, num_done);
        if order.num_steps() == 0 {
            let message = format!(
                "{} has {} samples, a step takes {} ({} ranks x batch_per_rank {} x accumulation {}); \
                 lower train.batch_per_rank or set train.drop_last: false",
                dataset.list.file.display(),
                dataset.len(),
                order.global_batch(),
                share.world_size,
                train.batch_per_rank,
                train.accumulation
            );
            return Err(Coded::new(exit::CONFIG, message).into());
        }
        let mode = if config.data.dense {
            Mode::DenseTrain
        } else {
            Mode::Train
        };
        let crop = Crop::Train(config.data.train.clone());
        Ok(Self::new(
            config,
            dataset,
            mode,
            crop,
            epoch,
            Plan::Train(order),
        ))
    }

    /// The validation clips of this rank. Random choices (`mit` dense starts) do not change with
    /// the epoch, so that validations can be compared.
    pub fn val(config: &Config, dataset: Arc<Dataset>, share: Share) -> LoaderSpec {
        let aug = &config.data.val;
        let batch = aug.batch_per_rank.unwrap_or(config.train.batch_per_rank);
        let plan = Plan::Val(ValOrder::new(dataset.len(), share, batch));
        let mode = if config.data.dense {
            Mode::DenseVal
        } else {
            Mode::Val
        };
        Self::new(config, dataset, mode, Crop::Val(aug.clone()), 0, plan)
    }

    fn new(
        config: &Config,
        dataset: Arc<Dataset>,
        mode: Mode,
        crop: Crop,
        epoch: u64,
        plan: Plan,
    ) -> LoaderSpec {
        let data = &config.data;
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        LoaderSpec {
            dataset,
            clip: ClipSpec {
                sampler: data.sampler,
                mode,
                num_segments: config.model.num_segments as usize,
                crop,
                seed: config.run.seed,
                epoch,
            },
            plan,
            threads: data.workers.map_or_else(cores, |n| n as usize).max(1),
            prefetch: data.prefetch as usize,
            on_error: data.on_error,
            max_bad: data.max_bad_videos,
        }
    }

    /// Bytes of a full batch: `[batch_per_rank, num_clips * T, size, size, 3]`.
    pub fn batch_bytes(&self) -> usize {
        self.plan.batch_per_rank() as usize * self.clip.sample_bytes()
    }
}
