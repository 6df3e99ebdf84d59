//! Validation: exact over any number of ranks, no padded clip counted.

use super::feed::Feed;
use super::place::Place;
use super::step::Stepper;
use crate::eval::{Accuracy, AccuracyResult};
use crate::preempt;
use anyhow::Result;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use tsm_data::clip::Dataset;
use tsm_data::loader::{BadSample, LoaderSpec};
use tsm_data::order::Share;
use tsm_job::Config;
use tsm_torch_ext::dist::ReduceOp;

/// What all ranks know after a validation.
pub struct Validated {
    /// `None` when it was abandoned.
    pub accuracy: Option<AccuracyResult>,
    /// A rank was asked to save and leave meanwhile.
    pub stop: bool,
    /// This rank's own.
    pub bad: Vec<BadSample>,
}

/// Runs the validation list once, or abandons it on all ranks when one is asked to save and leave
/// before its share is done.
///
/// # Errors
/// A clip that cannot be read under `data.on_error: fail`, or a peer that is gone.
pub fn validate(
    config: &Config,
    place: &Place,
    stepper: &Stepper,
    feed: &mut Feed,
    dataset: &Arc<Dataset>,
) -> Result<Validated> {
    let share = Share::new(place.peers.rank(), place.peers.world_size());
    let spec = LoaderSpec::val(config, dataset.clone(), share);
    let mut counts = Accuracy::new(i64::from(config.model.num_classes), place.device);
    let num_clips = spec.clip.num_clips() as i64;
    let mut bad = Vec::new();
    feed.start(spec)?;
    let mut abandoned = false;
    while let Some(batch) = feed.next()? {
        if preempt::asked() {
            abandoned = true;
            break;
        }
        bad.extend(batch.skipped.iter().cloned());
        let n = batch.n as i64;
        if n == 0 {
            feed.hold(batch)?;
            continue;
        }
        let (frames, labels_n) = feed.input(&batch, num_clips, config.data.val.size)?;
        feed.hold(batch)?;
        // A dense protocol reads several clips of a sample: their logits are averaged.
        let logits = stepper.evaluate(&frames).view([n, num_clips, -1]);
        counts.update(
            &logits.mean_dim([1i64].as_slice(), false, Kind::Float),
            &labels_n,
        );
    }
    feed.end()?;
    let counts = counts.to_tensor();
    let flags = [abandoned, preempt::asked()].map(|flag| f64::from(u8::from(flag)));
    let flags = Tensor::from_slice(&flags).f_to_device(place.device)?;
    let total = Tensor::f_cat(&[&counts, &flags], 0)?;
    place
        .peers
        .all_reduce(&total, ReduceOp::Sum, "all-reduce of the validation counts")?;
    let behind = counts.size()[0];
    let flags: Vec<f64> = Vec::try_from(&total.f_narrow(0, behind, 2)?.to_device(Device::Cpu))?;
    let complete = flags[0] == 0.0;
    let accuracy = complete.then(|| Accuracy::from_tensor(&total.narrow(0, 0, behind)).result());
    Ok(Validated {
        accuracy,
        stop: flags[1] > 0.0,
        bad,
    })
}
