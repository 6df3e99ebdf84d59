//! What rank 0 says while it trains: `metrics.jsonl`, TensorBoard events, the console, the launcher.

use super::log::StepNumbers;
use super::position::{Position, Shape};
use crate::eval::AccuracyResult;
use crate::meter::{
    Best, EpochRecord, EventWriter, LoadMeter, Metrics, Progress, Record, StartRecord, StepLine,
    StepMeter, StepRecord, ValidationLine, ValidationRecord, unix_s,
};
use std::time::{Duration, Instant, SystemTime};
use tsm_job::RunDir;
use tsm_job::message::{AgentLink, WorkerMessage};

/// The outputs of rank 0.
pub struct Outputs<'a> {
    link: &'a AgentLink,
    metrics: Metrics,
    tb: EventWriter,
    progress: Progress,
    load: LoadMeter,
    pub meter: StepMeter,
    shape: Shape,
}

impl<'a> Outputs<'a> {
    /// Opens the files of `run` and notes that a process trains on from `at`.
    pub fn new(
        run: &RunDir,
        link: &'a AgentLink,
        shape: Shape,
        at: &Position,
        world_size: u32,
        num_segments: u32,
        cuda_index: Option<u32>,
    ) -> Outputs<'a> {
        let now = SystemTime::now();
        let finished = shape.schedule_step(at) as u64;
        let mut outputs = Outputs {
            link,
            metrics: Metrics::append(run.metrics()),
            tb: EventWriter::create(run.tb(), Some(at.step), Duration::from_secs(5), now),
            progress: Progress::new(
                u64::from(shape.num_epochs) * shape.steps_per_epoch,
                finished,
                Instant::now(),
            ),
            load: LoadMeter::new(cuda_index, Duration::from_secs(2)),
            meter: StepMeter::new(num_segments),
            shape,
        };
        outputs.write(
            &Record::Start(StartRecord {
                step: at.step,
                time_s: unix_s(now),
                world_size,
            }),
            now,
        );
        outputs
    }

    fn write(&mut self, record: &Record, now: SystemTime) {
        self.metrics.write(record);
        self.tb.record(record, now);
    }

    /// Tells the launcher a metric. JSON has no word for a number that is not finite.
    fn tell(&self, name: &str, value: f64) {
        if value.is_finite() {
            let name = name.into();
            self.link.send(&WorkerMessage::Metric { name, value });
        }
    }

    pub fn line(&mut self, text: &str) {
        self.progress.line(text);
    }

    /// Free text of TensorBoard's text page.
    pub fn text(&mut self, tag: &str, markdown: &str) {
        self.tb.text(tag, 0, markdown, SystemTime::now());
    }

    /// Moves the progress bar; after every step.
    pub fn moved(&mut self, at: &Position) {
        self.progress.done(self.shape.schedule_step(at) as u64);
    }

    /// Steps read back together: one record each, and one line and the launcher's metrics for the
    /// last. `steps_in_epoch` is the number of steps that the epoch comes to.
    pub fn steps(&mut self, numbers: &[StepNumbers], at: &Position, steps_in_epoch: u64) {
        let Some(last) = numbers.last() else { return };
        let load = self.load.load(Instant::now());
        let window = self.meter.take_window();
        for n in numbers {
            let mut record = StepRecord {
                step: n.facts.step,
                epoch: at.epoch + 1,
                time_s: unix_s(n.facts.ended),
                loss: Some(n.loss),
                top1: Some(n.top1),
                top5: Some(n.top5),
                lr: Some(n.facts.lr),
                grad_norm: Some(n.grad_norm),
                loss_scale: n.loss_scale,
                data_time_ms: Some(n.facts.data_time.as_secs_f64() * 1e3),
                step_time_ms: Some(n.facts.step_time.as_secs_f64() * 1e3),
                ..StepRecord::default()
            };
            if n.facts.step == last.facts.step {
                record.set_load(&load);
                if let Some(window) = &window {
                    record.set_rate(window.rate);
                }
            }
            self.write(&Record::Step(record), n.facts.ended);
        }
        let mean =
            |f: fn(&StepNumbers) -> f64| numbers.iter().map(f).sum::<f64>() / numbers.len() as f64;
        let loss = mean(|n| n.loss);
        let clips_per_s = window.and_then(|w| w.rate).map(|r| r.clips_per_s);
        self.tell("loss", loss);
        self.tell("lr", last.facts.lr);
        if let Some(rate) = clips_per_s {
            self.tell("clips_per_s", rate);
        }
        let finished = self.shape.schedule_step(at) as u64;
        let eta = self.progress.eta(finished, Instant::now());
        self.progress.step(&StepLine {
            epoch: at.epoch + 1,
            num_epochs: self.shape.num_epochs,
            step: at.step_in_epoch,
            steps_per_epoch: steps_in_epoch,
            loss: Some(loss),
            top1: Some(mean(|n| n.top1)),
            top5: Some(mean(|n| n.top5)),
            lr: Some(last.facts.lr),
            clips_per_s,
            data_time: window.map(|w| w.data_time),
            step_time: window.map(|w| w.step_time),
            eta,
        });
    }

    /// The end of an epoch's training.
    pub fn epoch(&mut self, at: &Position) {
        let now = SystemTime::now();
        let record = EpochRecord::new(at.step, at.epoch + 1, unix_s(now), &self.meter);
        self.write(&Record::Epoch(record), now);
        self.meter.begin_epoch();
    }

    /// A validation after epoch `at.epoch`; `best` is the best so far, this one included.
    pub fn validation(
        &mut self,
        at: &Position,
        result: &AccuracyResult,
        took: Duration,
        best: Best,
    ) {
        let now = SystemTime::now();
        self.write(
            &Record::Validation(ValidationRecord::new(
                at.step,
                at.epoch + 1,
                unix_s(now),
                result,
            )),
            now,
        );
        self.tell("top1", result.top1);
        self.progress.validation(&ValidationLine {
            epoch: at.epoch + 1,
            num_epochs: self.shape.num_epochs,
            loss: result.loss,
            top1: result.top1,
            top5: result.top5,
            mean_class: result.mean_class,
            num_clips: result.num_clips,
            num_non_finite: result.num_non_finite,
            took,
        });
        self.progress.best(&best);
    }

    /// Leaves the files complete up to here.
    pub fn flush(&mut self) {
        self.tb.flush(SystemTime::now());
    }

    /// Leaves the console and the files complete.
    pub fn finish(mut self) {
        self.progress.finish();
        self.flush();
    }
}
