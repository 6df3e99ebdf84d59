//! Checkpoints: everything a run needs to go on as if it had never stopped.
//!
//! A checkpoint is two files: `step-00001200.safetensors` with the tensors and
//! `step-00001200.json`, its manifest, with [`Meta`], the size and the SHA-256 of the first. The
//! manifest is written last, so a checkpoint either has a valid manifest or does not exist.
//!
//! Saving (rank 0 only): fill a [`Snapshot`] with [`Snapshot::put`], then [`Checkpoints::save`].
//! Resuming (every rank): [`find`] or [`find_if_any`], or what another rank found ([`Found::pack`]);
//! [`Snapshot::check_model`], then [`Snapshot::restore`] into the network and [`Snapshot::section`] into the optimizer.

mod file;
mod folder;

pub use folder::{Checkpoints, Found, find, find_if_any};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tch::Tensor;
use tsm_job::config;
use tsm_job::exit::{self, Coded};

/// Names of the sections of [`Snapshot::tensors`]; a tensor's key is `<section>/<name>`.
pub mod section {
    /// Parameters, PyTorch's keys.
    pub const MODEL: &str = "model";
    /// BatchNorm's running statistics, PyTorch's keys.
    pub const BUFFER: &str = "buffer";
    /// SGD's momentum, by parameter name.
    pub const MOMENTUM: &str = "momentum";
    /// float32 master weights of o2, by parameter name.
    pub const MASTER: &str = "master";
    /// What every rank had for itself when the ranks had not agreed on it, by rank.
    pub const RANKS: &str = "ranks";
}

/// The version of the file layout this program writes and reads.
pub const FORMAT: u32 = 1;

/// The dynamic loss scale's state.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScaleState {
    pub scale: f64,
    /// Steps in a row without an infinity since the scale last changed.
    pub good_steps: i32,
}

/// What a checkpoint says about itself besides its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    /// [`FORMAT`]
    pub format: u32,
    pub run_id: String,
    /// Epoch of the next step, from 0.
    pub epoch: u32,
    /// Optimizer steps finished.
    pub step: u64,
    /// Optimizer steps finished in `epoch`.
    pub step_in_epoch: u64,
    /// Clips of `epoch`'s order that are behind: trained on, or left out at its end. Not in files of
    /// older programs, whose steps all had `global_batch` clips.
    #[serde(default)]
    pub clips_in_epoch: Option<u64>,
    /// Clips of the training list.
    #[serde(default)]
    pub num_clips: Option<u64>,
    /// Clips trained on.
    pub samples_seen: u64,
    /// Clips a step, over all ranks.
    pub global_batch: u64,
    pub world_size: u32,
    pub seed: u64,
    /// Only in fp16 and o2.
    pub loss_scale: Option<LossScaleState>,
    /// Best validation top1 so far, in percent.
    pub best_top1: Option<f64>,
    /// Epoch of that validation, from 1; 0 before any.
    pub best_epoch: u32,
    /// In label order; empty when the job names none.
    pub class_names: Vec<String>,
    /// The network's configuration.
    pub model: config::Model,
    /// Version of libtorch that wrote the file.
    pub torch: String,
}

/// A checkpoint in memory.
#[derive(Debug)]
pub struct Snapshot {
    /// `<section>/<name>` to tensor. On load: on the CPU and contiguous.
    pub tensors: BTreeMap<String, Tensor>,
    pub meta: Meta,
}

impl Snapshot {
    /// A snapshot without tensors.
    pub fn new(meta: Meta) -> Snapshot {
        Snapshot {
            tensors: BTreeMap::new(),
            meta,
        }
    }

    /// Adds tensors under `<section>/`. They are shared, not copied: save before the next step.
    pub fn put<'a>(
        &mut self,
        section: &str,
        tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    ) {
        for (name, tensor) in tensors {
            self.tensors
                .insert(format!("{section}/{name}"), tensor.shallow_clone());
        }
    }

    /// The tensors of a section by name.
    pub fn section(&self, section: &str) -> BTreeMap<String, Tensor> {
        self.tensors
            .iter()
            .filter_map(|(key, tensor)| {
                let name = key.strip_prefix(section)?.strip_prefix('/')?;
                Some((name.to_string(), tensor.shallow_clone()))
            })
            .collect()
    }

    /// Copies a section into the given tensors; nothing is written unless all of it fits.
    ///
    /// # Errors
    /// Names missing on either side, shapes or element types that differ (exit code DATA).
    pub fn restore<'a>(
        &self,
        section: &str,
        into: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    ) -> Result<()> {
        copy_by_name(section, &self.section(section), into)
    }

    /// Checks that the checkpoint was made by the same network.
    ///
    /// `model.weights` and `model.weights_min_coverage` may differ: they only choose where a
    /// fresh run starts.
    ///
    /// # Errors
    /// Every differing field with both values (exit code CONFIG).
    pub fn check_model(&self, model: &config::Model) -> Result<()> {
        let differences = model_differences(&self.meta.model, model)?;
        if differences.is_empty() {
            return Ok(());
        }
        Err(Coded::new(
            exit::CONFIG,
            format!(
                "the checkpoint of run {} at step {} is from another network:\n  {}\n  hint: resume with the run's own config.yaml, or start a new run",
                self.meta.run_id,
                self.meta.step,
                differences.join("\n  ")
            ),
        )
        .into())
    }
}

/// Copies tensors by name; the two sides must name the same tensors, of equal shape and kind.
pub(crate) fn copy_by_name<'a>(
    what: &str,
    from: &BTreeMap<String, Tensor>,
    into: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> Result<()> {
    let mut problems = Vec::new();
    let mut pairs = Vec::new();
    let mut used = 0;
    for (name, to) in into {
        match from.get(name) {
            None => problems.push(format!("{what}/{name} is missing in the checkpoint")),
            Some(source) => {
                used += 1;
                if source.size() != to.size() {
                    problems.push(format!(
                        "{what}/{name} has shape {:?} in the checkpoint, {:?} here",
                        source.size(),
                        to.size()
                    ));
                } else if source.kind() != to.kind() {
                    problems.push(format!(
                        "{what}/{name} is {:?} in the checkpoint, {:?} here",
                        source.kind(),
                        to.kind()
                    ));
                }
                pairs.push((name, source, to.shallow_clone()));
            }
        }
    }
    if used < from.len() {
        let known: std::collections::BTreeSet<&str> = pairs.iter().map(|(n, ..)| *n).collect();
        for name in from.keys().filter(|n| !known.contains(n.as_str())) {
            problems.push(format!("{what}/{name} of the checkpoint is unknown here"));
        }
    }
    if !problems.is_empty() {
        const SHOWN: usize = 10;
        let more = problems.len().saturating_sub(SHOWN);
        problems.truncate(SHOWN);
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        return Err(Coded::new(
            exit::DATA,
            format!("cannot restore {what}:\n  {}", problems.join("\n  ")),
        )
        .into());
    }
    let _guard = tch::no_grad_guard();
    for (_, source, mut to) in pairs {
        to.f_copy_(source)?;
    }
    Ok(())
}

fn model_differences(saved: &config::Model, now: &config::Model) -> Result<Vec<String>> {
    let neutral = |m: &config::Model| {
        let mut m = m.clone();
        m.weights = None;
        m.weights_min_coverage = 0.0;
        serde_json::to_value(m)
    };
    let mut out = Vec::new();
    json_differences("model", &neutral(saved)?, &neutral(now)?, &mut out);
    Ok(out)
}

fn json_differences(
    path: &str,
    saved: &serde_json::Value,
    now: &serde_json::Value,
    out: &mut Vec<String>,
) {
    use serde_json::Value::Object;
    match (saved, now) {
        (Object(a), Object(b)) => {
            let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let null = serde_json::Value::Null;
                json_differences(
                    &format!("{path}.{key}"),
                    a.get(key).unwrap_or(&null),
                    b.get(key).unwrap_or(&null),
                    out,
                );
            }
        }
        _ if saved != now => out.push(format!(
            "{path} is {saved} in the checkpoint, {now} in this run"
        )),
        _ => {}
    }
}
