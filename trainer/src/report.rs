//! The end of a run: `summary.json` for programs, `report.md` and `curves.svg` for people.
//!
//! All numbers come from `metrics.jsonl`, so a resumed run reports its whole training.

mod compare;
mod curves;
mod svg;

pub use compare::compare;

use crate::meter::{History, coarse, short};
use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;
use tsm_job::config::{Arch, ShiftMode};
use tsm_job::{Config, RunDir};

/// `summary.json`. What was not measured is left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// `run.name` of the configuration.
    pub run: String,
    pub arch: Arch,
    pub shift: ShiftMode,
    pub num_segments: u32,
    pub num_classes: u32,
    pub world_size: u32,
    /// Clips in one optimizer step over all ranks.
    pub global_batch: u64,
    /// As configured.
    pub epochs: u32,
    /// Optimizer steps finished.
    pub final_step: u64,
    /// Percent: the highest of all validations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_top1: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_epoch: Option<u32>,
    /// The last validation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<LastValidation>,
    /// Clips/s over all ranks in the last epoch of 7 steps or more: mean of the steps' rates without the first 5 and the
    /// last, as the reference tables do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fps_mean: Option<f64>,
    /// Clips/s over all ranks: all clips / all step time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fps_total: Option<f64>,
    /// `fps_mean` x segments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frames_per_s_mean: Option<f64>,
    /// `fps_total` x segments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frames_per_s_total: Option<f64>,
    /// Wall time of all processes of the run, validation and repeated steps included.
    pub elapsed_s: f64,
    /// Steps the last resume started from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_from: Option<u64>,
    /// Samples left out because they could not be read, over all ranks, since the start or the last resume.
    pub bad_videos: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<Reference>,
    /// Hardware and versions, by name.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
}

/// The last validation of a run; percentages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LastValidation {
    pub epoch: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top1: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top5: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_class: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Clips with a logit that is not finite, counted as wrong.
    #[serde(default)]
    pub num_non_finite: u64,
}

/// A published result that the recipe reproduces.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// Source and protocol, as written in the configuration.
    pub text: String,
    /// Percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top1: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clips_per_s: Option<f64>,
}

/// What only the process that ends a run knows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunEnd {
    pub world_size: u32,
    /// Optimizer steps finished.
    pub final_step: u64,
    pub bad_videos: u64,
    /// Hardware and versions, by name, for the report.
    pub environment: BTreeMap<String, String>,
}

impl Reference {
    /// Finds the numbers in `run.reference`: `top1 93.87` (or `top-1`), `410.492 clips/s` (or
    /// `FPS 410.492`, where the published FPS means clips). The text stays whole.
    pub fn from_text(text: &str) -> Reference {
        let words: Vec<String> = text
            .split(|c: char| c.is_whitespace() || ",;:=()".contains(c))
            .filter(|w| !w.is_empty())
            .map(str::to_lowercase)
            .collect();
        let number = |i: usize| {
            words
                .get(i)?
                .trim_end_matches('%')
                .parse::<f64>()
                .ok()
                .filter(|v| v.is_finite())
        };
        let position = |names: &[&str]| words.iter().position(|w| names.contains(&w.as_str()));
        let clips = position(&["clips/s"]).and_then(|i| number(i.checked_sub(1)?));
        Reference {
            text: text.into(),
            top1: position(&["top1", "top-1"]).and_then(|i| number(i + 1)),
            clips_per_s: clips.or_else(|| position(&["fps"]).and_then(|i| number(i + 1))),
        }
    }
}

impl Summary {
    /// Puts together what the configuration, the history and the end of the run say.
    pub fn new(config: &Config, history: &History, end: RunEnd) -> Summary {
        let frames = |clips_per_s: Option<f64>| {
            clips_per_s.map(|r| r * f64::from(config.model.num_segments))
        };
        let num_clips: u64 = history.epochs.iter().map(|e| e.num_clips).sum();
        let train_s: f64 = history.epochs.iter().map(|e| e.train_s).sum();
        let fps_total = (train_s > 0.0).then(|| num_clips as f64 / train_s);
        let fps_mean = history.epochs.iter().rev().find_map(|e| e.clips_per_s_mean);
        let best = history.best();
        Summary {
            run: config.run.name.clone(),
            arch: config.model.arch,
            shift: config.model.shift.mode,
            num_segments: config.model.num_segments,
            num_classes: config.model.num_classes,
            world_size: end.world_size,
            global_batch: config.global_batch(end.world_size),
            epochs: config.train.epochs,
            final_step: end.final_step,
            best_top1: best.and_then(|v| v.top1),
            best_epoch: best.map(|v| v.epoch),
            last: history.validations.last().map(|v| LastValidation {
                epoch: v.epoch,
                top1: v.top1,
                top5: v.top5,
                mean_class: v.mean_class,
                loss: v.loss,
                num_non_finite: v.num_non_finite,
            }),
            fps_mean,
            fps_total,
            frames_per_s_mean: frames(fps_mean),
            frames_per_s_total: frames(fps_total),
            elapsed_s: history.elapsed_s,
            resumed_from: history.starts.last().map(|s| s.step).filter(|&s| s > 0),
            bad_videos: end.bad_videos,
            reference: config.run.reference.as_deref().map(Reference::from_text),
            environment: end.environment,
        }
    }

    /// # Errors
    /// `summary.json` cannot be read, or is none.
    pub fn read(run: &RunDir) -> anyhow::Result<Summary> {
        let path = run.summary();
        let text = fs_err::read_to_string(&path)?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is not a summary of this version", path.display()))
    }

    /// # Errors
    /// `summary.json` cannot be written.
    pub fn write(&self, run: &RunDir) -> anyhow::Result<()> {
        let text =
            serde_json::to_string_pretty(self).context("cannot write the summary as JSON")?;
        Ok(fs_err::write(run.summary(), text + "\n")?)
    }
}

/// The picture beside `report.md`.
pub fn curves_path(run: &RunDir) -> PathBuf {
    run.path().join("curves.svg")
}

/// Writes `summary.json`, `curves.svg` and `report.md` from the run's `metrics.jsonl`.
///
/// # Errors
/// A file of the run folder cannot be read or written.
pub fn write(run: &RunDir, config: &Config, end: RunEnd) -> anyhow::Result<Summary> {
    let history = History::read(&run.metrics())?;
    let summary = Summary::new(config, &history, end);
    summary.write(run)?;
    fs_err::write(curves_path(run), curves::curves(&history))?;
    fs_err::write(run.report(), markdown(&summary, &history))?;
    Ok(summary)
}

/// The text of `report.md`.
pub fn markdown(summary: &Summary, history: &History) -> String {
    let s = summary;
    let elapsed = coarse(Duration::try_from_secs_f64(s.elapsed_s).unwrap_or_default());
    let mut out = format!(
        "# {}\n\n{}, shift {}, {} segments, {} classes; {} {} of a global batch of {} clips on {} {}, in {elapsed}.\n",
        s.run,
        arch_name(s.arch),
        shift_name(s.shift),
        s.num_segments,
        s.num_classes,
        s.final_step,
        plural(s.final_step, "step"),
        s.global_batch,
        s.world_size,
        plural(s.world_size.into(), "rank"),
    );
    out += &results(s);
    out += &remarks(s, history);
    out += "\n## Curves\n\n![loss, top-1, learning rate and clips/s](curves.svg)\n";
    if !s.environment.is_empty() {
        out += "\n## Environment\n\n| | |\n|---|---|\n";
        for (name, value) in &s.environment {
            let _ = writeln!(out, "| {name} | {} |", value.replace('|', "\\|"));
        }
    }
    out += "\n## Files\n\n\
            `config.yaml` is what ran, `metrics.jsonl` has every step, `tb/` the same for TensorBoard, `checkpoints/` the weights.\n";
    out
}

fn results(s: &Summary) -> String {
    let published = s.reference.as_ref();
    let last = s.last.clone().unwrap_or_default();
    let best = match (s.best_top1, s.best_epoch) {
        (Some(top1), Some(epoch)) => format!("{top1:.2} at epoch {epoch}"),
        _ => percent(None),
    };
    let published_top1 = published.and_then(|r| r.top1).map(|v| v.to_string());
    let published_rate = published.and_then(|r| r.clips_per_s).map(|v| v.to_string());
    let rows: [(&str, String, Option<String>); 9] = [
        ("best top-1, %", best, published_top1),
        ("last top-1, %", percent(last.top1), None),
        ("last top-5, %", percent(last.top5), None),
        (
            "last mean class accuracy, %",
            percent(last.mean_class),
            None,
        ),
        (
            "last validation loss",
            last.loss.map_or_else(|| percent(None), short),
            None,
        ),
        (
            "clips/s, mean of step rates [1]",
            rate(s.fps_mean),
            published_rate,
        ),
        (
            "frames/s, mean of step rates [1]",
            rate(s.frames_per_s_mean),
            None,
        ),
        (
            "clips/s, all clips / all step time",
            rate(s.fps_total),
            None,
        ),
        (
            "frames/s, all frames / all step time",
            rate(s.frames_per_s_total),
            None,
        ),
    ];
    let mut out = String::from("\n## Results\n\n");
    out += if published.is_some() {
        "| | measured | published |\n|---|--:|--:|\n"
    } else {
        "| | measured |\n|---|--:|\n"
    };
    for (name, ours, theirs) in rows {
        let _ = match published {
            Some(_) => writeln!(out, "| {name} | {ours} | {} |", theirs.unwrap_or_default()),
            None => writeln!(out, "| {name} | {ours} |"),
        };
    }
    out += "\n[1] of the last epoch of 7 steps or more, without its first 5 steps and its last.\n";
    if let Some(reference) = published {
        let _ = writeln!(
            out,
            "\nPublished: {}. A published rate belongs to its own hardware; accuracies compare only under the same \
             protocol, pretraining and number of epochs.",
            reference.text.trim_end_matches('.')
        );
    }
    out
}

/// What a reader should know before trusting the numbers.
fn remarks(s: &Summary, history: &History) -> String {
    let mut remarks = Vec::new();
    if let Some(step) = s.resumed_from {
        let times = history.starts.iter().filter(|start| start.step > 0).count() as u64;
        remarks.push(format!(
            "The run was resumed {times} {}, last after step {step}.",
            plural(times, "time")
        ));
    }
    let sizes: Vec<u32> = history
        .starts
        .iter()
        .map(|start| start.world_size)
        .collect();
    if sizes.windows(2).any(|w| w[0] != w[1]) {
        remarks.push(format!("The number of ranks changed: {sizes:?}."));
    }
    if s.bad_videos > 0 {
        remarks.push(format!(
            "{} {} could not be read and left out since the start or the last resume.",
            s.bad_videos,
            plural(s.bad_videos, "sample")
        ));
    }
    if let Some(v) = history
        .validations
        .iter()
        .rev()
        .find(|v| v.num_non_finite > 0)
    {
        remarks.push(format!(
            "{} of {} clips had logits that are not finite in the validation of epoch {}; they count as wrong.",
            v.num_non_finite, v.num_clips, v.epoch
        ));
    }
    if history.broken_lines > 0 {
        let n = history.broken_lines;
        remarks.push(format!(
            "{n} {} of metrics.jsonl could not be read.",
            plural(n, "line")
        ));
    }
    if remarks.is_empty() {
        return String::new();
    }
    remarks
        .iter()
        .fold("\n".into(), |out, remark| out + "- " + remark + "\n")
}

fn plural(n: u64, word: &str) -> String {
    if n == 1 {
        word.into()
    } else {
        format!("{word}s")
    }
}

fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| "not measured".into(), |v| format!("{v:.2}"))
}

fn rate(value: Option<f64>) -> String {
    value.map_or_else(|| "not measured".into(), |v| format!("{v:.1}"))
}

fn shift_name(shift: ShiftMode) -> &'static str {
    match shift {
        ShiftMode::Bi => "bi",
        ShiftMode::Uni => "uni",
        ShiftMode::None => "none",
    }
}

fn arch_name(arch: Arch) -> &'static str {
    match arch {
        Arch::Resnet18 => "ResNet-18",
        Arch::Resnet34 => "ResNet-34",
        Arch::Resnet50 => "ResNet-50",
        Arch::Resnet101 => "ResNet-101",
        Arch::Resnet152 => "ResNet-152",
        Arch::Mobilenetv2 => "MobileNetV2",
    }
}

#[cfg(test)]
pub(crate) mod tests;
