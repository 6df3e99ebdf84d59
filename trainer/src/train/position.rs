//! Where a training stands, and how a checkpoint takes it there again.

use super::step::Stepper;
use crate::checkpoint::{self, Meta, Snapshot, section};
use anyhow::Result;
use std::path::Path;
use tsm_job::exit::{self, Coded};
use tsm_job::{Config, WorkerEnv};

/// Counters of a training.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Position {
    /// Epoch of the next step, from 0.
    pub epoch: u32,
    /// Steps finished in it.
    pub step_in_epoch: u64,
    /// Steps finished in all.
    pub step: u64,
    pub samples_seen: u64,
    /// Percent.
    pub best_top1: Option<f64>,
    /// Epoch of the best validation, from 1; 0 before any.
    pub best_epoch: u32,
}

impl Position {
    /// Steps that a training of `steps_per_epoch` has behind it here; [`Self::step`] differs after a
    /// resume with another batch.
    pub fn schedule_step(&self, steps_per_epoch: u64) -> u64 {
        u64::from(self.epoch) * steps_per_epoch + self.step_in_epoch
    }
}

/// The training as a checkpoint. Buffers must agree over the ranks before.
///
/// # Errors
/// The loss scale cannot be read back.
pub fn snapshot(
    stepper: &Stepper,
    config: &Config,
    env: &WorkerEnv,
    class_names: &[String],
    at: &Position,
) -> Result<Snapshot> {
    let mut snapshot = Snapshot::new(Meta {
        format: checkpoint::FORMAT,
        run_id: env.run_id.clone(),
        epoch: at.epoch,
        step: at.step,
        step_in_epoch: at.step_in_epoch,
        samples_seen: at.samples_seen,
        global_batch: config.global_batch(env.world_size),
        world_size: env.world_size,
        seed: config.run.seed,
        loss_scale: stepper.precision.scale().map(|s| s.export()).transpose()?,
        best_top1: at.best_top1,
        best_epoch: at.best_epoch,
        class_names: class_names.to_vec(),
        model: config.model.clone(),
        torch: tsm_torch_ext::ops::libtorch_version(),
    });
    let network = &stepper.network;
    snapshot.put(section::MODEL, network.named_params());
    snapshot.put(section::BUFFER, network.named_buffers());
    snapshot.put(section::MOMENTUM, stepper.sgd.momenta());
    snapshot.put(section::MASTER, stepper.sgd.masters());
    Ok(snapshot)
}

/// Continues from the checkpoint at `path` (a file, a folder of checkpoints or a run folder).
/// Returns the position and what to tell the user.
///
/// # Errors
/// No usable checkpoint, another network, or a place in the middle of an epoch that this job's
/// batch or seed does not have.
pub fn resume(
    stepper: &mut Stepper,
    config: &Config,
    env: &WorkerEnv,
    path: &Path,
) -> Result<(Position, Vec<String>)> {
    let found = checkpoint::find(path)?;
    let (snapshot, meta) = (&found.snapshot, &found.snapshot.meta);
    snapshot.check_model(&config.model)?;
    let step_in_epoch = translate(meta, config, env, &found.path)?;
    let network = &stepper.network;
    snapshot.restore(section::MODEL, network.named_params())?;
    snapshot.restore(section::BUFFER, network.named_buffers())?;
    stepper.sgd.import(
        &snapshot.section(section::MOMENTUM),
        &snapshot.section(section::MASTER),
    )?;
    if let (Some(scale), Some(state)) = (stepper.precision.scale_mut(), meta.loss_scale) {
        scale.import(state)?;
    }
    let mut notes: Vec<String> = found
        .skipped
        .iter()
        .map(|s| format!("warning: {s}"))
        .collect();
    notes.push(format!(
        "resumed from {} (epoch {}, step {} of it, {} steps in all)",
        found.path.display(),
        meta.epoch + 1,
        step_in_epoch,
        meta.step
    ));
    let position = Position {
        epoch: meta.epoch,
        step_in_epoch,
        step: meta.step,
        samples_seen: meta.samples_seen,
        best_top1: meta.best_top1,
        best_epoch: meta.best_epoch,
    };
    Ok((position, notes))
}

/// Steps of this job's size that the checkpoint's place in its epoch amounts to.
fn translate(meta: &Meta, config: &Config, env: &WorkerEnv, path: &Path) -> Result<u64> {
    if meta.step_in_epoch == 0 {
        return Ok(0);
    }
    let refuse = |what: String| -> anyhow::Error {
        Coded::new(
            exit::CONFIG,
            format!(
                "cannot continue {} in the middle of epoch {}: {what}\n  hint: keep the checkpoint's value, or resume from a checkpoint at the end of an epoch",
                path.display(),
                meta.epoch + 1
            ),
        )
        .into()
    };
    if meta.seed != config.run.seed {
        return Err(refuse(format!(
            "run.seed was {}, now {}: the order of the clips differs",
            meta.seed, config.run.seed
        )));
    }
    let (before, now) = (meta.global_batch, config.global_batch(env.world_size));
    let clips = meta.step_in_epoch * before;
    if !clips.is_multiple_of(now) {
        return Err(refuse(format!(
            "a step had {before} clips, now {now}, which does not divide the {clips} clips done"
        )));
    }
    Ok(clips / now)
}
