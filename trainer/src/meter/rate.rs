//! Clips and frames per second, in both definitions in use.

use std::time::Duration;

/// Iterations the reference tables leave out at the start of an epoch.
const SKIPPED_FIRST: usize = 5;
/// And at its end.
const SKIPPED_LAST: usize = 1;

/// Times steps. Clips are counted over all ranks; times are this rank's, passed in.
///
/// A step's time runs from the end of the previous step to its own end, the wait for data included.
/// Where the host does not wait for the device in every step, single times jitter (their sum is
/// right), and the mean of rates, which favours short steps, then reads too high.
#[derive(Debug)]
pub struct StepMeter {
    num_segments: u32,
    epoch: Vec<Step>,
    window_start: usize,
    run_clips: u64,
    run_time: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    num_clips: u64,
    data_time: Duration,
    step_time: Duration,
}

/// Throughput over all ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    pub clips_per_s: f64,
    /// Clips x segments: the frames that go through the network.
    pub frames_per_s: f64,
}

/// What happened since the last log line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    pub num_steps: usize,
    /// Clips / time; `None` before any time has passed.
    pub rate: Option<Rate>,
    /// Mean wait for the batch.
    pub data_time: Duration,
    /// Mean time of a step, the wait for data included.
    pub step_time: Duration,
}

/// Why an epoch has no mean of rates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the mean of step rates leaves out the first 5 steps and the last, so it needs 7; the epoch had {num_steps}"
)]
pub struct TooFewSteps {
    pub num_steps: usize,
}

impl StepMeter {
    /// `num_segments` is T, the frames of a clip.
    pub fn new(num_segments: u32) -> StepMeter {
        StepMeter {
            num_segments,
            epoch: Vec::new(),
            window_start: 0,
            run_clips: 0,
            run_time: Duration::ZERO,
        }
    }

    /// Forgets the steps of the epoch before; those of the run stay in [`Self::run_total`].
    pub fn begin_epoch(&mut self) {
        self.epoch.clear();
        self.window_start = 0;
    }

    /// One optimizer step: its clips over all ranks, its wait for data, and its whole time, which
    /// includes that wait.
    pub fn step(&mut self, num_clips: u64, data_time: Duration, step_time: Duration) {
        self.epoch.push(Step {
            num_clips,
            data_time,
            step_time,
        });
        self.run_clips += num_clips;
        self.run_time += step_time;
    }

    /// Means over the steps since the last call (or the epoch's start); `None` if there were none.
    pub fn take_window(&mut self) -> Option<Window> {
        let steps = &self.epoch[self.window_start..];
        let num_steps = steps.len();
        self.window_start = self.epoch.len();
        let count = u32::try_from(num_steps).ok().filter(|&n| n > 0)?;
        let step_time: Duration = steps.iter().map(|s| s.step_time).sum();
        let data_time: Duration = steps.iter().map(|s| s.data_time).sum();
        Some(Window {
            num_steps,
            rate: self.rate(steps.iter().map(|s| s.num_clips).sum(), step_time),
            data_time: data_time / count,
            step_time: step_time / count,
        })
    }

    /// FPS as the reference tables of UCF101 and SSv2 define it: the arithmetic mean of the steps'
    /// clips/s over the epoch without its first 5 steps and its last (ModelZoo-PyTorch TSM,
    /// `mmcv_need/checkpoint.py`: `[5:-1]`). Theirs multiplies by 8 whatever the number of devices;
    /// ours counts the clips.
    ///
    /// # Errors
    /// An epoch of 6 steps or fewer has nothing left to average.
    pub fn epoch_mean_of_rates(&self) -> Result<Rate, TooFewSteps> {
        let num_steps = self.epoch.len();
        let too_few = TooFewSteps { num_steps };
        let end = num_steps.saturating_sub(SKIPPED_LAST);
        let counted = self
            .epoch
            .get(SKIPPED_FIRST..end)
            .filter(|s| !s.is_empty())
            .ok_or(too_few)?;
        // A step of no measurable time has no rate.
        let rates: Vec<f64> = counted
            .iter()
            .filter(|s| !s.step_time.is_zero())
            .map(|s| s.num_clips as f64 / s.step_time.as_secs_f64())
            .collect();
        if rates.is_empty() {
            return Err(too_few);
        }
        let clips_per_s = rates.iter().sum::<f64>() / rates.len() as f64;
        Ok(Rate {
            clips_per_s,
            frames_per_s: clips_per_s * f64::from(self.num_segments),
        })
    }

    /// All clips of the epoch / all its step time; `None` before any time has passed.
    pub fn epoch_total(&self) -> Option<Rate> {
        self.rate(self.epoch_clips(), self.epoch_time())
    }

    /// All clips of this process's steps / all their time. Validation and checkpoints between
    /// epochs are in no step's time.
    pub fn run_total(&self) -> Option<Rate> {
        self.rate(self.run_clips, self.run_time)
    }

    pub fn epoch_steps(&self) -> usize {
        self.epoch.len()
    }

    /// Clips of the epoch so far, over all ranks.
    pub fn epoch_clips(&self) -> u64 {
        self.epoch.iter().map(|s| s.num_clips).sum()
    }

    /// Sum of the epoch's step times.
    pub fn epoch_time(&self) -> Duration {
        self.epoch.iter().map(|s| s.step_time).sum()
    }

    fn rate(&self, num_clips: u64, time: Duration) -> Option<Rate> {
        let clips_per_s = num_clips as f64 / time.as_secs_f64();
        (!time.is_zero()).then(|| Rate {
            clips_per_s,
            frames_per_s: clips_per_s * f64::from(self.num_segments),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn meter(step_ms: &[u32]) -> StepMeter {
        let mut meter = StepMeter::new(8);
        for &ms in step_ms {
            meter.step(10, MS, MS * ms);
        }
        meter
    }

    #[test]
    fn mean_of_rates_leaves_out_the_first_five_and_the_last() {
        // Left over: 100 ms and 50 ms, so 100 and 200 clips/s.
        let meter = meter(&[9000, 9000, 9000, 9000, 9000, 100, 50, 9000]);
        let rate = meter.epoch_mean_of_rates().unwrap();
        assert!((rate.clips_per_s - 150.0).abs() < 1e-9);
        assert!((rate.frames_per_s - 1200.0).abs() < 1e-9);
        // 80 clips in 54.15 s.
        let total = meter.epoch_total().unwrap();
        assert!((total.clips_per_s - 80.0 / 54.15).abs() < 1e-9);
    }

    #[test]
    fn six_steps_are_too_few_and_say_so() {
        for num_steps in [0, 1, 5, 6] {
            let error = meter(&vec![100; num_steps])
                .epoch_mean_of_rates()
                .unwrap_err();
            assert_eq!(error, TooFewSteps { num_steps });
            assert!(
                error
                    .to_string()
                    .ends_with(&format!("the epoch had {num_steps}"))
            );
        }
        assert!((meter(&[100; 7]).epoch_mean_of_rates().unwrap().clips_per_s - 100.0).abs() < 1e-9);
    }

    #[test]
    fn a_window_is_what_came_since_the_last() {
        let mut meter = meter(&[100, 100]);
        let first = meter.take_window().unwrap();
        assert_eq!(
            (first.num_steps, first.step_time, first.data_time),
            (2, MS * 100, MS)
        );
        assert_eq!(meter.take_window(), None);
        meter.step(30, MS * 20, MS * 50);
        let second = meter.take_window().unwrap();
        assert_eq!((second.num_steps, second.data_time), (1, MS * 20));
        assert!((second.rate.unwrap().clips_per_s - 600.0).abs() < 1e-9);
        meter.begin_epoch();
        assert_eq!(meter.take_window(), None);
    }

    #[test]
    fn the_run_adds_epochs_up() {
        let mut meter = meter(&[100]);
        meter.begin_epoch();
        meter.step(30, MS, MS * 300);
        assert_eq!(meter.epoch_clips(), 30);
        assert!((meter.run_total().unwrap().clips_per_s - 100.0).abs() < 1e-9);
    }

    #[test]
    fn no_time_gives_no_rate_rather_than_infinity() {
        assert_eq!(meter(&[]).epoch_total(), None);
        assert_eq!(meter(&[0]).run_total(), None);
        assert!(meter(&[0; 9]).epoch_mean_of_rates().is_err());
    }
}
