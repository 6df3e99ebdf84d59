//! What rank 0 writes while it trains: `metrics.jsonl`, TensorBoard events, the console.

use super::log::StepNumbers;
use super::position::Position;
use crate::eval::AccuracyResult;
use crate::meter::{
    Best, EpochRecord, EventWriter, LoadMeter, Metrics, Progress, Record, StartRecord, StepLine,
    StepMeter, StepRecord, ValidationLine, ValidationRecord, unix_s,
};
use std::time::{Duration, Instant, SystemTime};
use tsm_job::RunDir;

/// Where a step lies in the training, for people.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub num_epochs: u32,
    pub steps_per_epoch: u64,
}

/// The outputs of rank 0.
pub struct Outputs {
    metrics: Metrics,
    tb: EventWriter,
    progress: Progress,
    load: LoadMeter,
    pub meter: StepMeter,
    shape: Shape,
}

impl Outputs {
    /// Opens the files of `run` and notes that a process trains on from `at`.
    pub fn new(
        run: &RunDir,
        shape: Shape,
        at: &Position,
        world_size: u32,
        num_segments: u32,
        cuda_index: Option<u32>,
    ) -> Outputs {
        let now = SystemTime::now();
        let finished = at.schedule_step(shape.steps_per_epoch);
        let mut outputs = Outputs {
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

    pub fn line(&mut self, text: &str) {
        self.progress.line(text);
    }

    /// Free text of TensorBoard's text page.
    pub fn text(&mut self, tag: &str, markdown: &str) {
        self.tb.text(tag, 0, markdown, SystemTime::now());
    }

    /// Moves the progress bar; after every step.
    pub fn moved(&mut self, at: &Position) {
        self.progress
            .done(at.schedule_step(self.shape.steps_per_epoch));
    }

    /// Steps read back together: one record each, and one line for the last.
    pub fn steps(&mut self, numbers: &[StepNumbers], at: &Position) {
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
        let finished = at.schedule_step(self.shape.steps_per_epoch);
        let eta = self.progress.eta(finished, Instant::now());
        self.progress.step(&StepLine {
            epoch: at.epoch + 1,
            num_epochs: self.shape.num_epochs,
            step: at.step_in_epoch,
            steps_per_epoch: self.shape.steps_per_epoch,
            loss: Some(mean(|n| n.loss)),
            top1: Some(mean(|n| n.top1)),
            top5: Some(mean(|n| n.top5)),
            lr: Some(last.facts.lr),
            clips_per_s: window.and_then(|w| w.rate).map(|r| r.clips_per_s),
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

    /// Leaves the console and the files complete.
    pub fn finish(mut self) {
        self.progress.finish();
        self.tb.flush(SystemTime::now());
    }
}
