//! `metrics.jsonl`: one JSON object a line, written as the run goes, read again for the report.

use super::record::{EpochRecord, Record, StartRecord, StepRecord, ValidationRecord};
use super::warn::WarnOnce;
use anyhow::Context;
use fs_err::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Appends to `metrics.jsonl`. Each record is one write, so that a killed run loses at most a line.
///
/// A failing write is named once on standard error and never stops the training; the next record
/// tries again.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: Option<File>,
    /// The file may end inside a line.
    torn: bool,
    warn: WarnOnce,
}

impl Metrics {
    /// Goes on at the end of `path`, or begins it.
    pub fn append(path: impl Into<PathBuf>) -> Metrics {
        let mut metrics = Metrics {
            path: path.into(),
            file: None,
            torn: false,
            warn: WarnOnce::default(),
        };
        metrics.open();
        metrics
    }

    /// Writes one line.
    pub fn write(&mut self, record: &Record) {
        if self.file.is_none() {
            self.open();
        }
        let Some(file) = &mut self.file else { return };
        let mut line = if self.torn {
            String::from("\n")
        } else {
            String::new()
        };
        line += &serde_json::to_string(record).expect("records have string keys and plain numbers");
        line.push('\n');
        match file.write_all(line.as_bytes()) {
            Ok(()) => self.torn = false,
            Err(error) => {
                self.torn = true;
                self.warn.failed("cannot write a line of metrics", &error);
            }
        }
    }

    fn open(&mut self) {
        match open_for_append(&self.path) {
            Ok((file, torn)) => {
                self.file = Some(file);
                self.torn = torn;
            }
            Err(error) => self.warn.failed("cannot open the metrics file", &error),
        }
    }
}

/// The file, and whether its last line has no end.
fn open_for_append(path: &Path) -> std::io::Result<(File, bool)> {
    let mut file = OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .open(path)?;
    let mut last = [b'\n'];
    if file.metadata()?.len() > 0 {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
    }
    Ok((file, last != [b'\n']))
}

/// What `metrics.jsonl` says, without the steps a restart made void.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    pub starts: Vec<StartRecord>,
    pub steps: Vec<StepRecord>,
    pub validations: Vec<ValidationRecord>,
    pub epochs: Vec<EpochRecord>,
    /// Wall time of all processes of the run, void steps included, pauses between them not.
    pub elapsed_s: f64,
    /// Lines that are no record, e.g. the last one of a process that was killed while writing.
    pub broken_lines: u64,
}

impl History {
    /// # Errors
    /// The file cannot be read; a broken line is only counted.
    pub fn read(path: &Path) -> anyhow::Result<History> {
        let bytes = fs_err::read(path).context("cannot read the run's metrics")?;
        Ok(Self::parse(&String::from_utf8_lossy(&bytes)))
    }

    pub fn parse(text: &str) -> History {
        let mut history = History::default();
        // Unix times of the current process's first and last record.
        let mut span: Option<(f64, f64)> = None;
        for line in text.lines().filter(|l| !l.trim().is_empty()) {
            let Ok(record) = serde_json::from_str::<Record>(line) else {
                history.broken_lines += 1;
                continue;
            };
            let time_s = record.time_s();
            if matches!(record, Record::Start(_)) {
                history.end_span(span.take());
            }
            span = Some((span.map_or(time_s, |(first, _)| first), time_s));
            history.push(record);
        }
        history.end_span(span);
        history
    }

    /// The validation with the highest top-1, the earlier of two equals.
    pub fn best(&self) -> Option<&ValidationRecord> {
        let top1 = |v: &ValidationRecord| v.top1.unwrap_or(f64::NEG_INFINITY);
        self.validations
            .iter()
            .filter(|v| v.top1.is_some())
            .reduce(|best, v| if top1(v) > top1(best) { v } else { best })
    }

    fn push(&mut self, record: Record) {
        match record {
            Record::Start(start) => {
                self.steps.retain(|r| r.step <= start.step);
                self.validations.retain(|r| r.step <= start.step);
                self.epochs.retain(|r| r.step <= start.step);
                self.starts.push(start);
            }
            Record::Step(r) => self.steps.push(r),
            Record::Validation(r) => self.validations.push(r),
            Record::Epoch(r) => self.epochs.push(r),
        }
    }

    fn end_span(&mut self, span: Option<(f64, f64)>) {
        if let Some((first, last)) = span {
            self.elapsed_s += (last - first).max(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, time_s: f64) -> Record {
        Record::Step(StepRecord {
            step,
            epoch: 1,
            time_s,
            loss: Some(1.5),
            ..StepRecord::default()
        })
    }

    fn start(step: u64, time_s: f64) -> Record {
        Record::Start(StartRecord {
            step,
            time_s,
            world_size: 2,
        })
    }

    #[test]
    fn a_restart_voids_later_steps_and_validations() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let validation = |step, top1| {
            Record::Validation(ValidationRecord {
                step,
                epoch: 1,
                top1: Some(top1),
                time_s: 13.0,
                ..Default::default()
            })
        };
        let mut first = Metrics::append(&path);
        for record in [
            start(0, 10.0),
            step(1, 11.0),
            step(2, 12.0),
            validation(2, 99.0),
            step(3, 15.0),
        ] {
            first.write(&record);
        }
        drop(first);
        let mut second = Metrics::append(&path);
        for record in [start(1, 100.0), step(2, 101.0), validation(2, 50.0)] {
            second.write(&record);
        }
        let history = History::read(&path).unwrap();
        assert_eq!(
            history
                .steps
                .iter()
                .map(|s| (s.step, s.time_s))
                .collect::<Vec<_>>(),
            [(1, 11.0), (2, 101.0)]
        );
        assert_eq!(history.best().unwrap().top1, Some(50.0));
        assert_eq!(history.starts.len(), 2);
        // 10 to 15, and 100 to 101 (the validation's clock in this test is behind: never negative).
        assert!(history.elapsed_s >= 5.0);
    }

    #[test]
    fn elapsed_leaves_out_the_pause_between_processes() {
        let lines: Vec<String> = [
            start(0, 10.0),
            step(1, 14.0),
            start(1, 100.0),
            step(2, 103.0),
        ]
        .iter()
        .map(|r| serde_json::to_string(r).unwrap())
        .collect();
        assert_eq!(History::parse(&lines.join("\n")).elapsed_s, 7.0);
    }

    #[test]
    fn a_torn_line_is_ended_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs_err::write(&path, r#"{"event":"step","st"#).unwrap();
        Metrics::append(&path).write(&step(1, 1.0));
        let history = History::read(&path).unwrap();
        assert_eq!((history.steps.len(), history.broken_lines), (1, 1));
    }

    #[test]
    fn a_full_disk_warns_once_and_goes_on() {
        let mut full = Metrics::append("/dev/full");
        full.write(&step(1, 1.0));
        assert!(full.warn.warned && full.torn);
        full.write(&step(2, 2.0));
    }

    #[test]
    fn a_file_that_can_be_opened_later_is_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("run");
        let path = folder.join("metrics.jsonl");
        let mut metrics = Metrics::append(&path);
        metrics.write(&step(1, 1.0));
        assert!(metrics.warn.warned);
        fs_err::create_dir(&folder).unwrap();
        metrics.write(&step(2, 2.0));
        assert_eq!(History::read(&path).unwrap().steps[0].step, 2);
    }

    #[test]
    fn of_two_equal_validations_the_earlier_is_best() {
        let validations = [(1, Some(3.0)), (2, Some(9.0)), (3, Some(9.0)), (4, None)];
        let history = History {
            validations: validations
                .map(|(epoch, top1)| ValidationRecord {
                    epoch,
                    top1,
                    ..Default::default()
                })
                .to_vec(),
            ..History::default()
        };
        assert_eq!(history.best().unwrap().epoch, 2);
        assert_eq!(History::default().best(), None);
    }
}
