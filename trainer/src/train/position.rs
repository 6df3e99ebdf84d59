//! Where a training stands, and how a checkpoint takes it there again, also with another number of
//! ranks.

use super::step::Stepper;
use crate::checkpoint::{self, Found, Meta, Snapshot, section};
use crate::meter::short;
use anyhow::Result;
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tsm_data::order::{Cut, Share, TrainOrder};
use tsm_job::config::BnBuffers;
use tsm_job::exit::{self, Coded};
use tsm_job::{Config, WorkerEnv};

/// Counters of a training.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Position {
    /// Epoch of the next step, from 0.
    pub epoch: u32,
    /// Steps finished in it.
    pub step_in_epoch: u64,
    /// Clips of its order that are behind: trained on, or left out at its end.
    pub clips_in_epoch: u64,
    /// Steps finished in all.
    pub step: u64,
    pub samples_seen: u64,
    /// Percent.
    pub best_top1: Option<f64>,
    /// Epoch of the best validation, from 1; 0 before any.
    pub best_epoch: u32,
}

/// The extent of a training with this number of ranks.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub num_epochs: u32,
    /// Of an epoch that these ranks train from its start.
    pub steps_per_epoch: u64,
    /// Clips of a step.
    pub global_batch: u64,
    /// Clips of the list.
    pub num_clips: u64,
}

impl Shape {
    /// Where `at` lies on the schedule, in steps of this shape. A fraction after a change of the
    /// batch inside an epoch; [`Position::step`] counts what was really done.
    pub fn schedule_step(&self, at: &Position) -> f64 {
        let whole = u64::from(at.epoch) * self.steps_per_epoch;
        if at.clips_in_epoch >= self.num_clips {
            return (whole + self.steps_per_epoch) as f64;
        }
        whole as f64 + at.clips_in_epoch as f64 / self.global_batch as f64
    }
}

/// What is left to train in the current epoch.
pub fn rest(config: &Config, env: &WorkerEnv, num_clips: u64, at: &Position) -> TrainOrder {
    let cut = Cut {
        batch_per_rank: config.train.batch_per_rank,
        accumulation: config.train.accumulation,
        drop_last: config.train.drop_last,
    };
    let share = Share::new(env.rank, env.world_size);
    let epoch = u64::from(at.epoch);
    TrainOrder::new(
        num_clips,
        config.run.seed,
        epoch,
        share,
        cut,
        at.clips_in_epoch,
    )
}

/// The training as a checkpoint. Buffers must agree over the ranks, or `own_buffers` be what
/// [`gather_buffers`] gave before they were made to.
///
/// # Errors
/// The loss scale cannot be read back.
pub fn snapshot(
    stepper: &Stepper,
    config: &Config,
    env: &WorkerEnv,
    class_names: &[String],
    num_clips: u64,
    at: &Position,
    own_buffers: Option<&Tensor>,
) -> Result<Snapshot> {
    let mut snapshot = Snapshot::new(Meta {
        format: checkpoint::FORMAT,
        run_id: env.run_id.clone(),
        epoch: at.epoch,
        step: at.step,
        step_in_epoch: at.step_in_epoch,
        clips_in_epoch: Some(at.clips_in_epoch),
        num_clips: Some(num_clips),
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
    snapshot.put(section::RANKS, own_buffers.map(|t| (BUFFERS, t)));
    Ok(snapshot)
}

/// Name of the one tensor of [`section::RANKS`].
const BUFFERS: &str = "buffers";

/// The float32 buffers of every rank, `[world_size, elements]`, for a save at a step at which the
/// training would not have made them agree: the mean would not go on bit for bit. `None` where
/// rank 0's are all that counts.
///
/// # Errors
/// A peer that is gone.
pub fn gather_buffers(stepper: &Stepper, config: &Config) -> Result<Option<Tensor>> {
    if stepper.peers.world_size() == 1 || config.train.bn_buffers == BnBuffers::Rank0 {
        return Ok(None);
    }
    let flat: Vec<Tensor> = floats(stepper)
        .map(|t| t.f_reshape([-1]))
        .collect::<Result<_, _>>()?;
    if flat.is_empty() {
        return Ok(None);
    }
    let own = Tensor::f_cat(&flat, 0)?;
    let all = stepper
        .peers
        .all_gather(&own, "all-gather of the BatchNorm buffers")?;
    Ok(Some(Tensor::f_stack(&all, 0)?))
}

/// Gives this rank the buffers that it had itself; returns whether the checkpoint holds them for
/// this number of ranks.
fn restore_own_buffers(stepper: &Stepper, snapshot: &Snapshot, env: &WorkerEnv) -> Result<bool> {
    let section = snapshot.section(section::RANKS);
    let Some(all) = section.get(BUFFERS) else {
        return Ok(false);
    };
    let numel: usize = floats(stepper).map(|t| t.numel()).sum();
    if all.size() != [i64::from(env.world_size), numel as i64] || all.kind() != Kind::Float {
        return Ok(false);
    }
    let own = all.f_select(0, i64::from(env.rank))?;
    let _guard = tch::no_grad_guard();
    let mut start = 0;
    for t in floats(stepper) {
        let numel = t.numel() as i64;
        let mut t = t.shallow_clone();
        t.f_copy_(&own.f_narrow(0, start, numel)?.f_reshape(t.size())?)?;
        start += numel;
    }
    Ok(true)
}

fn floats(stepper: &Stepper) -> impl Iterator<Item = &Tensor> {
    let buffers = stepper.network.buffers().iter().map(|b| &b.tensor);
    buffers.filter(|t| t.kind() == Kind::Float)
}

/// A training put back to where a checkpoint was made.
pub struct Resumed {
    pub at: Position,
    /// For the user.
    pub notes: Vec<String>,
    /// The buffers are the same on all ranks.
    pub buffers_agree: bool,
}

/// Continues from a checkpoint.
///
/// # Errors
/// Another network, or a place in the middle of an epoch whose order this job does not have.
pub fn resume(
    stepper: &mut Stepper,
    config: &Config,
    env: &WorkerEnv,
    num_clips: u64,
    found: Found,
) -> Result<Resumed> {
    let (snapshot, meta) = (&found.snapshot, &found.snapshot.meta);
    snapshot.check_model(&config.model)?;
    let clips_in_epoch = clips_in_epoch(meta);
    check_order(meta, config, num_clips, &found.path)?;
    let network = &stepper.network;
    snapshot.restore(section::MODEL, network.named_params())?;
    snapshot.restore(section::BUFFER, network.named_buffers())?;
    let buffers_agree = !restore_own_buffers(stepper, snapshot, env)?;
    stepper.sgd.import(
        &snapshot.section(section::MOMENTUM),
        &snapshot.section(section::MASTER),
    )?;
    if let (Some(scale), Some(state)) = (stepper.precision.scale_mut(), meta.loss_scale) {
        scale.import(state)?;
    }
    let at = Position {
        epoch: meta.epoch,
        step_in_epoch: meta.step_in_epoch,
        clips_in_epoch,
        step: meta.step,
        samples_seen: meta.samples_seen,
        best_top1: meta.best_top1,
        best_epoch: meta.best_epoch,
    };
    let skipped = found.skipped.iter().map(|s| format!("warning: {s}"));
    let mut notes: Vec<String> = skipped.collect();
    notes.push(format!(
        "resumed from {} (epoch {}, step {} of it, {} steps in all)",
        found.path.display(),
        meta.epoch + 1,
        meta.step_in_epoch,
        meta.step
    ));
    notes.extend(changed_batch(meta, config, env.world_size));
    let inside = 0 < clips_in_epoch && clips_in_epoch < num_clips;
    if inside && meta.global_batch != config.global_batch(env.world_size) {
        notes.push(changed_rest(
            &rest(config, env, num_clips, &at),
            &at,
            num_clips,
        ));
    }
    Ok(Resumed {
        at,
        notes,
        buffers_agree,
    })
}

fn clips_in_epoch(meta: &Meta) -> u64 {
    meta.clips_in_epoch
        .unwrap_or(meta.step_in_epoch * meta.global_batch)
}

/// What another number of ranks or another batch does to the learning rate. The schedule's position
/// and the momentum stay: SGD's momentum is one of gradients, which the rate multiplies afterwards.
fn changed_batch(meta: &Meta, config: &Config, world_size: u32) -> Option<String> {
    let (before, now) = (meta.global_batch, config.global_batch(world_size));
    if (meta.world_size, before) == (world_size, now) {
        return None;
    }
    let what = if meta.world_size == world_size {
        format!("clips a step {before} -> {now}")
    } else {
        format!("world size {} -> {world_size}", meta.world_size)
    };
    let optim = &config.optim;
    let lr = |batch: u64| short(optim.lr * batch as f64 / f64::from(optim.base_batch));
    Some(if before == now {
        format!("{what}: lr unchanged, a step still has {now} clips")
    } else if optim.scale_lr {
        format!(
            "{what}: lr {} -> {} (linear scaling rule; a step has {now} clips, before {before})",
            lr(before),
            lr(now)
        )
    } else {
        format!(
            "{what}: lr {} unchanged (optim.scale_lr is off), though a step has {now} clips, before {before}",
            short(optim.lr)
        )
    })
}

/// How another batch divides the rest of an epoch.
fn changed_rest(rest: &TrainOrder, at: &Position, num_clips: u64) -> String {
    let left = num_clips.saturating_sub(at.clips_in_epoch);
    let steps = match rest.num_steps() {
        1 => "1 step".to_string(),
        n => format!("{n} steps"),
    };
    format!(
        "epoch {}: {left} of its {num_clips} clips are left for {steps} of {}; {} left out, none repeated",
        at.epoch + 1,
        rest.global_batch(),
        rest.num_left_out()
    )
}

/// A place inside an epoch means something only in the order that the epoch began with.
fn check_order(meta: &Meta, config: &Config, num_clips: u64, path: &Path) -> Result<()> {
    if clips_in_epoch(meta) == 0 {
        return Ok(());
    }
    let refuse = |what: String, hint: &str| -> anyhow::Error {
        Coded::new(
            exit::CONFIG,
            format!(
                "cannot continue {} in the middle of epoch {}: {what}: the order of the clips differs\n  hint: {hint}, or resume from a checkpoint at the end of an epoch",
                path.display(),
                meta.epoch + 1
            ),
        )
        .into()
    };
    if meta.seed != config.run.seed {
        let what = format!("run.seed was {}, now {}", meta.seed, config.run.seed);
        return Err(refuse(what, "keep the checkpoint's value"));
    }
    let before = meta.num_clips.unwrap_or(num_clips);
    if before != num_clips || clips_in_epoch(meta) > num_clips {
        let what = format!("data.train_list had {before} clips, now {num_clips}");
        return Err(refuse(what, "keep the list"));
    }
    Ok(())
}

/// Checks that all ranks are at one place, and asks whether one of them was told to stop already.
///
/// # Errors
/// Ranks that count otherwise (exit code DATA), or a peer that is gone.
pub fn agree(stepper: &Stepper, device: Device, at: &Position, asked: bool) -> Result<bool> {
    let own = [
        at.step,
        u64::from(at.epoch),
        at.clips_in_epoch,
        u64::from(asked),
    ];
    let own = Tensor::from_slice(&own.map(|n| n as i64)).f_to_device(device)?;
    let all = stepper
        .peers
        .all_gather(&own, "comparison of the positions")?;
    let all: Vec<Vec<i64>> = all
        .iter()
        .map(|t| Vec::try_from(&t.to_device(Device::Cpu)))
        .collect::<Result<_, _>>()?;
    if let Some((rank, other)) = all.iter().enumerate().find(|(_, p)| p[..3] != all[0][..3]) {
        let place = |p: &[i64]| format!("step {} (epoch {}, clip {} of it)", p[0], p[1] + 1, p[2]);
        let message = format!(
            "rank {rank} starts from {}, rank 0 from {}\n  hint: every rank must run the same config.yaml and the same program",
            place(other),
            place(&all[0])
        );
        return Err(Coded::new(exit::DATA, message).into());
    }
    let any_asked = all.iter().any(|p| p[3] != 0);
    Ok(any_asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        num_epochs: 5,
        steps_per_epoch: 3,
        global_batch: 32,
        num_clips: 100,
    };

    fn at(epoch: u32, clips_in_epoch: u64) -> Position {
        Position {
            epoch,
            clips_in_epoch,
            ..Position::default()
        }
    }

    #[test]
    fn whole_steps_are_whole_and_an_epoch_ends_at_the_next() {
        let step = |epoch, clips| SHAPE.schedule_step(&at(epoch, clips));
        assert_eq!([step(0, 0), step(0, 64), step(2, 32)], [0.0, 2.0, 7.0]);
        assert_eq!(step(1, 100), step(2, 0));
        assert_eq!(step(0, 48), 1.5);
        // The longest rest begins a step before its end and stays inside the epoch.
        assert!(step(0, 67) < 3.0);
    }

    #[test]
    fn the_rest_of_an_epoch_is_told() {
        let cut = Cut {
            batch_per_rank: 8,
            accumulation: 1,
            drop_last: true,
        };
        let rest = TrainOrder::new(100, 0, 2, Share::new(0, 3), cut, 32);
        assert_eq!(
            changed_rest(&rest, &at(2, 32), 100),
            "epoch 3: 68 of its 100 clips are left for 2 steps of 24; 20 left out, none repeated"
        );
    }
}
