//! What a person sees: a bar on a terminal, plain lines anywhere else.

use indicatif::{ProgressBar, ProgressStyle};
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// Shows how far the training is. Output that cannot be written is dropped.
pub struct Progress {
    out: Out,
    total_steps: u64,
    done_at_start: u64,
    started: Instant,
}

enum Out {
    Bar(ProgressBar),
    Lines(Box<dyn Write + Send>),
}

/// `epoch 3/32 step 120/340 loss 1.234 …`: what is not known is left out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepLine {
    /// From 1.
    pub epoch: u32,
    pub num_epochs: u32,
    /// Steps of this epoch finished.
    pub step: u64,
    pub steps_per_epoch: u64,
    pub loss: Option<f64>,
    /// Percent.
    pub top1: Option<f64>,
    pub top5: Option<f64>,
    pub lr: Option<f64>,
    /// Over all ranks.
    pub clips_per_s: Option<f64>,
    pub data_time: Option<Duration>,
    pub step_time: Option<Duration>,
    pub eta: Option<Duration>,
}

/// `epoch 3/32 validation loss 1.234 top1 56.10 …`
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ValidationLine {
    pub epoch: u32,
    pub num_epochs: u32,
    pub loss: f64,
    /// Percent.
    pub top1: f64,
    pub top5: f64,
    pub mean_class: f64,
    pub num_clips: u64,
    /// Clips with a logit that is not finite, counted as wrong.
    pub num_non_finite: u64,
    pub took: Duration,
}

/// `best top1 93.87 at epoch 28`
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Best {
    /// Percent.
    pub top1: f64,
    pub epoch: u32,
}

impl Progress {
    /// A bar if standard error is a terminal, else lines on standard output. `done` of the
    /// `total_steps` were finished before `now`, by an earlier process.
    pub fn new(total_steps: u64, done: u64, now: Instant) -> Progress {
        let out = if io::stderr().is_terminal() && io::stdout().is_terminal() {
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {wide_msg}")
                .expect("a constant template");
            Out::Bar(
                ProgressBar::new(total_steps)
                    .with_position(done)
                    .with_style(style),
            )
        } else {
            Out::Lines(Box::new(io::stdout()))
        };
        Progress {
            out,
            total_steps,
            done_at_start: done,
            started: now,
        }
    }

    /// Plain lines into `out`.
    pub fn lines(
        out: impl Write + Send + 'static,
        total_steps: u64,
        done: u64,
        now: Instant,
    ) -> Progress {
        Progress {
            out: Out::Lines(Box::new(out)),
            total_steps,
            done_at_start: done,
            started: now,
        }
    }

    /// Moves the bar; call after every step with the steps finished since the training's start.
    pub fn done(&mut self, done: u64) {
        if let Out::Bar(bar) = &self.out {
            bar.set_position(done);
        }
    }

    /// Time left at the pace of this process so far, validations included; `None` before its first step.
    pub fn eta(&self, done: u64, now: Instant) -> Option<Duration> {
        let here = done.checked_sub(self.done_at_start).filter(|&n| n > 0)?;
        let pace = now.saturating_duration_since(self.started).as_secs_f64() / here as f64;
        Duration::try_from_secs_f64(pace * self.total_steps.saturating_sub(done) as f64).ok()
    }

    /// Call every `train.log_every` steps.
    pub fn step(&mut self, line: &StepLine) {
        match &self.out {
            Out::Bar(bar) => bar.set_message(line.to_string()),
            Out::Lines(_) => self.line(&line.to_string()),
        }
    }

    pub fn validation(&mut self, line: &ValidationLine) {
        self.line(&line.to_string());
    }

    /// Call after each validation, with the best so far.
    pub fn best(&mut self, best: &Best) {
        self.line(&best.to_string());
    }

    /// Any other line, above the bar where there is one.
    pub fn line(&mut self, text: &str) {
        match &mut self.out {
            Out::Bar(bar) => bar.suspend(|| {
                let _ = writeln!(io::stdout(), "{text}");
            }),
            Out::Lines(out) => {
                let _ = writeln!(out, "{text}").and_then(|()| out.flush());
            }
        }
    }

    /// Leaves the bar as it stands.
    pub fn finish(&mut self) {
        if let Out::Bar(bar) = &self.out {
            bar.abandon();
        }
    }
}

impl fmt::Display for StepLine {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "epoch {}/{} step {}/{}",
            self.epoch, self.num_epochs, self.step, self.steps_per_epoch
        )?;
        if let Some(loss) = self.loss {
            write!(f, " loss {loss:.3}")?;
        }
        if let Some(top1) = self.top1 {
            write!(f, " top1 {top1:.1}")?;
        }
        if let Some(top5) = self.top5 {
            write!(f, " top5 {top5:.1}")?;
        }
        if let Some(lr) = self.lr {
            write!(f, " lr {}", short(lr))?;
        }
        if let Some(rate) = self.clips_per_s {
            write!(f, " {rate:.1} clips/s")?;
        }
        if let Some(time) = self.data_time {
            write!(f, " data {:.0} ms", time.as_secs_f64() * 1e3)?;
        }
        if let Some(time) = self.step_time {
            write!(f, " step {:.0} ms", time.as_secs_f64() * 1e3)?;
        }
        if let Some(eta) = self.eta {
            write!(f, " eta {}", coarse(eta))?;
        }
        Ok(())
    }
}

impl fmt::Display for ValidationLine {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "epoch {}/{} validation loss {:.3} top1 {:.2} top5 {:.2} mean_class {:.2} over {} clips in {}",
            self.epoch,
            self.num_epochs,
            self.loss,
            self.top1,
            self.top5,
            self.mean_class,
            self.num_clips,
            coarse(self.took)
        )?;
        if self.num_non_finite > 0 {
            write!(
                f,
                ", {} of them with logits that are not finite, counted as wrong",
                self.num_non_finite
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Best {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "best top1 {:.2} at epoch {}", self.top1, self.epoch)
    }
}

/// Four significant digits without trailing zeros; an exponent only below 1e-5.
pub(crate) fn short(value: f64) -> String {
    let rounded: f64 = format!("{value:.3e}").parse().unwrap_or(value);
    if rounded != 0.0 && rounded.abs() < 1e-5 {
        format!("{rounded:e}")
    } else {
        rounded.to_string()
    }
}

/// `40s`, `12m`, `1h 05m`: rounded down, two units at most.
pub(crate) fn coarse(time: Duration) -> String {
    match time.as_secs() {
        s @ ..60 => format!("{s}s"),
        s @ ..3600 => format!("{}m", s / 60),
        s @ ..86400 => format!("{}h {:02}m", s / 3600, s % 3600 / 60),
        s => format!("{}d {:02}h", s / 86400, s % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);
    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn plain_lines_read_as_documented() {
        let out = Shared::default();
        let mut progress = Progress::lines(out.clone(), 1088, 0, Instant::now());
        progress.step(&StepLine {
            epoch: 3,
            num_epochs: 32,
            step: 20,
            steps_per_epoch: 34,
            loss: Some(1.2341),
            top1: Some(56.1),
            top5: Some(83.25),
            lr: Some(0.0015),
            clips_per_s: Some(412.3),
            data_time: Some(Duration::from_millis(3)),
            step_time: Some(Duration::from_millis(87)),
            eta: Some(Duration::from_secs(750)),
        });
        progress.step(&StepLine {
            epoch: 1,
            num_epochs: 1,
            step: 1,
            steps_per_epoch: 2,
            ..StepLine::default()
        });
        progress.validation(&ValidationLine {
            epoch: 28,
            num_epochs: 32,
            loss: 0.25,
            top1: 93.871,
            top5: 99.0,
            mean_class: 93.5,
            num_clips: 3783,
            num_non_finite: 2,
            took: Duration::from_secs(9),
        });
        progress.best(&Best {
            top1: 93.871,
            epoch: 28,
        });
        assert_eq!(
            String::from_utf8(out.0.lock().unwrap().clone()).unwrap(),
            "epoch 3/32 step 20/34 loss 1.234 top1 56.1 top5 83.2 lr 0.0015 412.3 clips/s data 3 ms step 87 ms eta 12m\n\
             epoch 1/1 step 1/2\n\
             epoch 28/32 validation loss 0.250 top1 93.87 top5 99.00 mean_class 93.50 over 3783 clips in 9s, \
             2 of them with logits that are not finite, counted as wrong\n\
             best top1 93.87 at epoch 28\n"
        );
    }

    #[test]
    fn eta_counts_the_steps_of_this_process() {
        let now = Instant::now();
        let progress = Progress::lines(io::sink(), 100, 40, now);
        assert_eq!(progress.eta(40, now + Duration::from_secs(5)), None);
        // 10 steps in 20 s, 50 to go.
        assert_eq!(
            progress.eta(50, now + Duration::from_secs(20)),
            Some(Duration::from_secs(100))
        );
        assert_eq!(
            progress.eta(100, now + Duration::from_secs(60)),
            Some(Duration::ZERO)
        );
    }

    #[test]
    fn numbers_and_times_are_short() {
        assert_eq!(
            ["0.0015", "1.5e-7", "0", "123.5"].map(String::from),
            [0.0015, 1.5e-7, 0.0, 123.46].map(short)
        );
        let times = [40, 750, 3900, 90000].map(|s| coarse(Duration::from_secs(s)));
        assert_eq!(times, ["40s", "12m", "1h 05m", "1d 01h"]);
    }
}
