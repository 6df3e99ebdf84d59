//! What the ranks of a node have said, until it is passed on. Pure.

use std::collections::BTreeMap;
use tsm_job::message::WorkerMessage;

use crate::cluster::message::{About, Progress};
use crate::supervisor::Event;

/// What is new, and how far each rank has come. Ranks are local here.
pub struct News {
    /// Rank 0 of the node is rank 0 of the job.
    is_first: bool,
    progress: BTreeMap<usize, Progress>,
    so_far: BTreeMap<usize, SoFar>,
    words: Vec<About>,
    metrics: BTreeMap<String, f64>,
}

#[derive(Default)]
struct SoFar {
    step: Option<u64>,
    in_checkpoint: bool,
}

impl News {
    pub fn new(is_first: bool) -> News {
        News {
            is_first,
            progress: BTreeMap::new(),
            so_far: BTreeMap::new(),
            words: Vec::new(),
            metrics: BTreeMap::new(),
        }
    }

    /// Takes in what a rank says; what of it the supervisor has to hear.
    pub fn hear(&mut self, rank: usize, message: WorkerMessage) -> Option<Event> {
        match message {
            WorkerMessage::Step {
                step,
                epoch,
                work_ms,
            } => {
                let progress = self.progress_of(rank);
                (progress.step, progress.epoch) = (Some(step), Some(epoch));
                progress.first_step.get_or_insert(step);
                // JSON has no word for what is too large for it.
                let work_ms = work_ms.map(|ms| ms as f32).filter(|ms| ms.is_finite());
                progress.work_ms.extend(work_ms);
                self.so_far.entry(rank).or_default().step = Some(step);
                Some(Event::Step { rank, step })
            }
            WorkerMessage::Section { name } => {
                let so_far = self.so_far.entry(rank).or_default();
                let in_checkpoint = name == "checkpoint";
                let was_in = std::mem::replace(&mut so_far.in_checkpoint, in_checkpoint);
                let saved = so_far.step.filter(|_| was_in && !in_checkpoint);
                let progress = self.progress_of(rank);
                progress.section = Some(name.clone());
                progress.checkpoint = saved.or(progress.checkpoint);
                Some(Event::Section { rank, name })
            }
            WorkerMessage::Failure(record) => {
                let record = record.shortened();
                Some(Event::Failing { rank, record })
            }
            WorkerMessage::Hello { .. } => {
                // That it talks is news too.
                self.progress_of(rank);
                Some(Event::Hello { rank })
            }
            WorkerMessage::Metric { name, value } => {
                // JSON has no word for the others.
                if value.is_finite() {
                    self.metrics.insert(name, value);
                }
                None
            }
            WorkerMessage::Versions { versions } => self.tell(rank, About::Versions(versions)),
            WorkerMessage::Resumed { path, step } => self.tell(rank, About::Resumed { path, step }),
        }
    }

    fn tell(&mut self, rank: usize, word: About) -> Option<Event> {
        if self.is_first && rank == 0 {
            self.words.push(word);
        }
        None
    }

    fn progress_of(&mut self, rank: usize) -> &mut Progress {
        self.progress.entry(rank).or_insert_with(|| Progress {
            local_rank: rank as u32,
            ..Progress::default()
        })
    }

    /// What rank 0 of the job has said of itself since this was asked last.
    pub fn take_words(&mut self) -> Vec<About> {
        std::mem::take(&mut self.words)
    }

    /// Ranks and metrics that have changed since this was asked last.
    pub fn take(&mut self) -> (Vec<Progress>, Vec<(String, f64)>) {
        let progress = std::mem::take(&mut self.progress).into_values().collect();
        let metrics = std::mem::take(&mut self.metrics).into_iter().collect();
        (progress, metrics)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, work_ms: f64) -> WorkerMessage {
        WorkerMessage::Step {
            step,
            epoch: 2,
            work_ms: Some(work_ms),
        }
    }

    fn section(name: &str) -> WorkerMessage {
        WorkerMessage::Section { name: name.into() }
    }

    #[test]
    fn steps_add_up_until_they_are_taken() {
        let mut news = News::new(true);
        for message in [step(5, 1.5), step(6, f64::MAX), step(7, 2.5)] {
            assert!(matches!(news.hear(3, message), Some(Event::Step { .. })));
        }
        let progress = Progress {
            local_rank: 3,
            step: Some(7),
            first_step: Some(5),
            epoch: Some(2),
            work_ms: vec![1.5, 2.5],
            ..Progress::default()
        };
        assert_eq!(news.take().0, [progress]);
        assert_eq!(news.take(), (Vec::new(), Vec::new()));
        news.hear(3, step(8, 1.0));
        assert_eq!(news.take().0[0].first_step, Some(8));
    }

    #[test]
    fn a_checkpoint_is_finished_when_its_section_is_left() {
        let mut news = News::new(true);
        let checkpoint = |news: &mut News| news.take().0[0].checkpoint;
        news.hear(0, section("checkpoint"));
        news.hear(0, section("train"));
        assert_eq!(checkpoint(&mut news), None, "before the first step");
        news.hear(0, step(9, 1.0));
        news.hear(0, section("checkpoint"));
        assert_eq!(checkpoint(&mut news), None);
        news.hear(0, section("checkpoint"));
        assert_eq!(checkpoint(&mut news), None, "it is still there");
        news.hear(0, section("train"));
        news.hear(0, section("validate"));
        assert_eq!(checkpoint(&mut news), Some(9));
        news.hear(0, section("train"));
        assert_eq!(checkpoint(&mut news), None, "that of another section");
    }

    #[test]
    fn only_rank_0_of_the_job_is_asked_about_itself() {
        let resumed = || WorkerMessage::Resumed {
            path: "c".into(),
            step: 4,
        };
        let words = |is_first, rank| {
            let mut news = News::new(is_first);
            assert_eq!(news.hear(rank, resumed()), None);
            news.take_words().len()
        };
        assert_eq!((words(true, 0), words(true, 1), words(false, 0)), (1, 0, 0));
    }

    #[test]
    fn a_metric_that_is_no_number_is_left_out() {
        let mut news = News::new(false);
        for (name, value) in [("loss", 2.0), ("loss", f64::NAN), ("lr", f64::INFINITY)] {
            let name = name.into();
            assert_eq!(news.hear(1, WorkerMessage::Metric { name, value }), None);
        }
        assert_eq!(news.take(), (Vec::new(), vec![("loss".into(), 2.0)]));
    }
}
