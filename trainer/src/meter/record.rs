//! The lines of `metrics.jsonl`, and what TensorBoard shows of them.

use super::{Load, Rate, StepMeter};
use crate::eval::AccuracyResult;
use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

/// One line. The `event` key names the kind.
///
/// A number that is not known is left out; one that is not finite is `null`. `step` counts the
/// optimizer steps finished since the start of the training, across restarts; `epoch` counts from 1;
/// `time_s` is Unix time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Record {
    Start(StartRecord),
    Step(StepRecord),
    Validation(ValidationRecord),
    Epoch(EpochRecord),
}

/// The process began or, after a restart, went on. Every later `step` of an earlier process that is
/// larger than this one is void.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StartRecord {
    /// Steps finished before: 0, or the checkpoint's.
    pub step: u64,
    pub time_s: f64,
    pub world_size: u32,
}

/// One optimizer step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    pub step: u64,
    pub epoch: u32,
    pub time_s: f64,
    /// Mean over all ranks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Percent, over the clips of this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top1: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top5: Option<f64>,
    /// Of the parameter groups with multiplier 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Global L2 norm before it was limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Over all ranks, over the steps since the last record with a rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clips_per_s: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frames_per_s: Option<f64>,
    /// Wait for the batch, part of the step's time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_time_ms: Option<f64>,
    /// From the end of the step before to the end of this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_time_ms: Option<f64>,
    /// Resident memory of rank 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_bytes: Option<u64>,
    /// Of rank 0, in percent of one core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<f64>,
    /// Of all cores of rank 0's host, 0 to 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_cpu_percent: Option<f64>,
    /// Memory in use on rank 0's device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_mem_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_util_percent: Option<f64>,
}

/// One validation over the whole list.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ValidationRecord {
    pub step: u64,
    pub epoch: u32,
    pub time_s: f64,
    pub num_clips: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top1: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top5: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_class: Option<f64>,
    /// Clips with a logit that is not finite, counted as wrong.
    #[serde(default)]
    pub num_non_finite: u64,
}

/// The rates of a finished epoch; after a resume inside it, of its rest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    pub step: u64,
    pub epoch: u32,
    pub time_s: f64,
    pub num_steps: u64,
    /// Over all ranks.
    pub num_clips: u64,
    /// Sum of step times.
    pub train_s: f64,
    /// Mean of the steps' rates without the first 5 and the last; left out for 6 steps or fewer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clips_per_s_mean: Option<f64>,
}

/// Unix time in seconds, as records hold it.
pub fn unix_s(now: SystemTime) -> f64 {
    now.duration_since(UNIX_EPOCH)
        .map_or(0.0, |d| d.as_secs_f64())
}

impl Record {
    pub fn time_s(&self) -> f64 {
        match self {
            Record::Start(r) => r.time_s,
            Record::Step(r) => r.time_s,
            Record::Validation(r) => r.time_s,
            Record::Epoch(r) => r.time_s,
        }
    }

    pub fn step(&self) -> u64 {
        match self {
            Record::Start(r) => r.step,
            Record::Step(r) => r.step,
            Record::Validation(r) => r.step,
            Record::Epoch(r) => r.step,
        }
    }

    /// The known numbers under their TensorBoard tags.
    pub fn scalars(&self) -> Vec<(&'static str, f64)> {
        let pairs: Vec<(&'static str, Option<f64>)> = match self {
            Record::Start(_) => vec![],
            Record::Step(r) => vec![
                ("train/loss", r.loss),
                ("train/top1", r.top1),
                ("train/top5", r.top5),
                ("train/lr", r.lr),
                ("train/grad_norm", r.grad_norm),
                ("train/loss_scale", r.loss_scale),
                ("speed/clips_per_s", r.clips_per_s),
                ("speed/frames_per_s", r.frames_per_s),
                ("speed/data_time_ms", r.data_time_ms),
                ("speed/step_time_ms", r.step_time_ms),
                ("load/mem_bytes", r.mem_bytes.map(|b| b as f64)),
                ("load/cpu_percent", r.cpu_percent),
                ("load/host_cpu_percent", r.host_cpu_percent),
                ("load/gpu_mem_bytes", r.gpu_mem_bytes.map(|b| b as f64)),
                ("load/gpu_util_percent", r.gpu_util_percent),
            ],
            Record::Validation(r) => vec![
                ("validation/loss", r.loss),
                ("validation/top1", r.top1),
                ("validation/top5", r.top5),
                ("validation/mean_class", r.mean_class),
            ],
            Record::Epoch(r) => vec![("speed/epoch_clips_per_s_mean", r.clips_per_s_mean)],
        };
        pairs
            .into_iter()
            .filter_map(|(tag, value)| Some((tag, value?)))
            .collect()
    }
}

impl StepRecord {
    /// Takes over the throughput of a window, if it has one.
    pub fn set_rate(&mut self, rate: Option<Rate>) {
        self.clips_per_s = rate.map(|r| r.clips_per_s);
        self.frames_per_s = rate.map(|r| r.frames_per_s);
    }

    /// Takes over what the process and its device are busy with.
    pub fn set_load(&mut self, load: &Load) {
        self.mem_bytes = load.mem_bytes;
        self.cpu_percent = load.cpu_percent;
        self.host_cpu_percent = load.host_cpu_percent;
        self.gpu_mem_bytes = load.gpu_mem_bytes;
        self.gpu_util_percent = load.gpu_util_percent;
    }
}

impl ValidationRecord {
    /// The outcome of a validation after `step` steps; percentages of no clips at all are left out.
    pub fn new(step: u64, epoch: u32, time_s: f64, result: &AccuracyResult) -> ValidationRecord {
        let measured = |value: f64| (result.num_clips > 0).then_some(value);
        ValidationRecord {
            step,
            epoch,
            time_s,
            num_clips: result.num_clips,
            loss: measured(result.loss),
            top1: measured(result.top1),
            top5: measured(result.top5),
            mean_class: measured(result.mean_class),
            num_non_finite: result.num_non_finite,
        }
    }
}

impl EpochRecord {
    /// The epoch that `meter` has just timed.
    pub fn new(step: u64, epoch: u32, time_s: f64, meter: &StepMeter) -> EpochRecord {
        EpochRecord {
            step,
            epoch,
            time_s,
            num_steps: meter.epoch_steps() as u64,
            num_clips: meter.epoch_clips(),
            train_s: meter.epoch_time().as_secs_f64(),
            clips_per_s_mean: meter.epoch_mean_of_rates().ok().map(|r| r.clips_per_s),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_is_not_known_is_left_out_and_not_finite_is_null() {
        let record = Record::Step(StepRecord {
            step: 7,
            epoch: 2,
            time_s: 0.5,
            loss: Some(f64::NAN),
            ..StepRecord::default()
        });
        assert_eq!(
            serde_json::to_string(&record).unwrap(),
            r#"{"event":"step","step":7,"epoch":2,"time_s":0.5,"loss":null}"#
        );
        assert_eq!(record.scalars().len(), 1);
    }

    #[test]
    fn an_epoch_comes_from_its_meter() {
        let mut meter = StepMeter::new(8);
        let record = |meter: &StepMeter| EpochRecord::new(9, 2, 0.0, meter);
        for num_steps in 1..=7u64 {
            meter.step(10, Duration::ZERO, Duration::from_millis(100));
            let mean = record(&meter).clips_per_s_mean;
            assert_eq!(
                mean.is_some(),
                num_steps == 7,
                "after {num_steps} steps: {mean:?}"
            );
        }
        assert_eq!(
            (record(&meter).num_steps, record(&meter).num_clips),
            (7, 70)
        );
    }

    #[test]
    fn a_validation_of_no_clips_measures_nothing() {
        let nothing = crate::eval::Accuracy::new(3, tch::Device::Cpu).result();
        let record = ValidationRecord::new(1, 1, 0.0, &nothing);
        assert_eq!(
            (record.top1, record.loss, record.num_clips),
            (None, None, 0)
        );
    }
}
