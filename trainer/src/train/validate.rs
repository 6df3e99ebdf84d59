//! Validation: exact over any number of ranks, no padded clip counted.

use super::feed::Feed;
use super::place::Place;
use super::step::Stepper;
use crate::eval::{Accuracy, AccuracyResult};
use anyhow::Result;
use std::sync::Arc;
use tch::Kind;
use tsm_data::clip::Dataset;
use tsm_data::loader::{BadSample, LoaderSpec};
use tsm_data::order::Share;
use tsm_job::Config;
use tsm_torch_ext::dist::ReduceOp;

/// Runs the validation list once. All ranks return the same numbers, each its own bad samples.
///
/// # Errors
/// A clip that cannot be read under `data.on_error: fail`, or a peer that is gone.
pub fn validate(
    config: &Config,
    place: &Place,
    stepper: &Stepper,
    feed: &mut Feed,
    dataset: &Arc<Dataset>,
) -> Result<(AccuracyResult, Vec<BadSample>)> {
    let share = Share::new(place.peers.rank(), place.peers.world_size());
    let spec = LoaderSpec::val(config, dataset.clone(), share);
    let mut counts = Accuracy::new(i64::from(config.model.num_classes), place.device);
    let num_clips = spec.clip.num_clips() as i64;
    let mut bad = Vec::new();
    feed.start(spec)?;
    while let Some(batch) = feed.next()? {
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
        counts.update(&logits.mean_dim([1i64].as_slice(), false, Kind::Float), &labels_n);
    }
    feed.end()?;
    let total = counts.to_tensor();
    place.peers.all_reduce(&total, ReduceOp::Sum, "all-reduce of the validation counts")?;
    Ok((Accuracy::from_tensor(&total).result(), bad))
}
