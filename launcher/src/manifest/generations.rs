//! The starts of a job's ranks, why each ended, and how much of the time was of use. Pure: `now`, counted
//! from the start of the launcher, is an argument.

use serde::Serialize;
use std::time::Duration;

use crate::class::Class;

/// One start of all ranks.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Generation {
    /// From 0.
    pub number: u32,
    /// RFC 3339, UTC.
    pub started: String,
    pub ended: Option<String>,
    pub world_size: u32,
    /// Hosts, in order of rank.
    pub nodes: Vec<String>,
    /// The checkpoint from which the ranks went on, as they say; of workers that do not say it, the one that they were
    /// told to. `None`: from the beginning.
    pub resumed_from: Option<String>,
    /// Steps that it holds.
    pub resumed_step: Option<u64>,
    /// Why it ended, where it has.
    pub cause: Option<String>,
    pub class: Option<Class>,
    /// Who failed first, where one did.
    pub culprit: Option<Culprit>,
    pub first_step: Option<u64>,
    pub last_step: Option<u64>,
    #[serde(skip)]
    pub span: Span,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Culprit {
    pub rank: u32,
    pub host: String,
    pub device: String,
}

/// When a generation was, and when it stepped.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Span {
    pub started: Duration,
    /// The first and the last step of which it is known when they were finished.
    pub steps: Option<(Step, Step)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Steps finished in the whole job with it.
    pub number: u64,
    pub at: Duration,
}

/// Why a generation ended.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    pub cause: String,
    pub class: Option<Class>,
    pub culprit: Option<Culprit>,
}

/// All generations of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Generations(Vec<Generation>);

impl Generations {
    /// A new one begins; `time` is the same moment as `now`, in RFC 3339.
    pub fn start(
        &mut self,
        now: Duration,
        time: String,
        world_size: u32,
        nodes: Vec<String>,
        resumed_from: Option<String>,
    ) {
        self.0.push(Generation {
            number: self.0.len() as u32,
            started: time,
            world_size,
            nodes,
            resumed_from,
            span: Span {
                started: now,
                steps: None,
            },
            ..Generation::default()
        });
    }

    /// The ranks of the newest generation go on from this checkpoint.
    pub fn resumed(&mut self, path: String, step: u64) {
        if let Some(generation) = self.0.last_mut() {
            (generation.resumed_from, generation.resumed_step) = (Some(path), Some(step));
        }
    }

    /// The ranks of the newest generation have finished the steps from `first_step` to `number`, which is that of the
    /// quickest rank.
    pub fn step(&mut self, now: Duration, (first_step, number): (u64, u64)) {
        let Some(generation) = self.0.last_mut() else {
            return;
        };
        generation.first_step = Some(first_step);
        let step = Step { number, at: now };
        let first = match generation.span.steps {
            Some((_, last)) if number <= last.number => return,
            Some((first, _)) => first,
            None => step,
        };
        generation.span.steps = Some((first, step));
        generation.last_step = Some(number);
    }

    /// The newest generation has ended. What was said first about its end stays.
    pub fn end(&mut self, time: String, why: Ending) {
        let newest = self.0.last_mut().filter(|g| g.ended.is_none());
        if let Some(generation) = newest {
            generation.ended = Some(time);
            generation.cause = Some(why.cause);
            (generation.class, generation.culprit) = (why.class, why.culprit);
        }
    }

    /// See [`goodput`].
    pub fn goodput(&self, now: Duration) -> Option<f64> {
        let spans: Vec<Span> = self.0.iter().map(|generation| generation.span).collect();
        goodput(&spans, now)
    }
}

/// Time in which steps were made that were kept, over all time since the first rank was started: 0 to 1.
///
/// In each generation the time from its first step to its last one that no later generation made again;
/// its steps are taken to be equally long. Starting, loading, and what a restart lost do not count. `None` where no
/// step was reported: of a program that reports none nothing is known.
pub fn goodput(spans: &[Span], now: Duration) -> Option<f64> {
    let start = spans.first()?.started;
    spans.iter().find(|span| span.steps.is_some())?;
    // Steps from this one on were made again later.
    let mut again = u64::MAX;
    let mut useful = Duration::ZERO;
    for (first, last) in spans.iter().rev().filter_map(|span| span.steps) {
        let kept = last.number.min(again.saturating_sub(1));
        if kept > first.number {
            let share = (kept - first.number) as f64 / (last.number - first.number) as f64;
            useful += last.at.saturating_sub(first.at).mul_f64(share);
        }
        again = again.min(first.number);
    }
    let all = now.saturating_sub(start).as_secs_f64();
    Some(if all > 0.0 {
        (useful.as_secs_f64() / all).min(1.0)
    } else {
        0.0
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn span(started: u64, steps: Option<(u64, u64, u64, u64)>) -> Span {
        let step = |number, at| Step { number, at: s(at) };
        Span {
            started: s(started),
            steps: steps.map(|(a, at, b, until)| (step(a, at), step(b, until))),
        }
    }

    #[test]
    fn starting_and_what_was_lost_do_not_count() {
        assert_eq!(goodput(&[], s(9)), None);
        assert_eq!(goodput(&[span(5, None)], s(9)), None);
        assert_eq!(goodput(&[span(5, Some((1, 5, 1, 5)))], s(5)), Some(0.0));
        // 10 s to start, 80 s of steps, 10 s to end.
        let one = span(10, Some((1, 20, 81, 100)));
        assert_eq!(goodput(&[one], s(110)), Some(0.8));
        // It failed at step 81; the checkpoint was of step 61, so 20 s were lost.
        let two = span(110, Some((62, 120, 102, 160)));
        let expected = (60.0 + 40.0) / 150.0;
        assert!((goodput(&[one, two], s(160)).unwrap() - expected).abs() < 1e-9);
        // A start that never came to a step only takes time.
        let none = span(110, None);
        let two = span(120, Some((62, 130, 102, 170)));
        let expected = (60.0 + 40.0) / 160.0;
        assert!((goodput(&[one, none, two], s(170)).unwrap() - expected).abs() < 1e-9);
    }

    #[test]
    fn a_job_that_started_all_over_lost_everything_before() {
        let one = span(0, Some((1, 10, 91, 100)));
        let two = span(100, Some((1, 110, 41, 150)));
        assert_eq!(goodput(&[one, two], s(200)), Some(0.2));
        // Also what a generation in between had kept.
        let three = span(200, Some((31, 210, 41, 220)));
        let expected = (29.0 + 10.0) / 300.0;
        assert!((goodput(&[one, two, three], s(300)).unwrap() - expected).abs() < 1e-9);
    }

    #[test]
    fn a_job_writes_down_its_generations() {
        let mut job = Generations::default();
        job.step(s(1), (7, 7));
        job.start(s(10), "T0".into(), 16, vec!["a".into(), "b".into()], None);
        for (at, step) in [(20, 2), (21, 2), (22, 3), (23, 2), (24, 4)] {
            job.step(s(at), (1, step));
        }
        let culprit = Some(Culprit {
            rank: 9,
            host: "b".into(),
            device: "GPU 1".into(),
        });
        let why = |cause: &str| Ending {
            cause: cause.into(),
            class: Some(Class::NodeLost),
            culprit: culprit.clone(),
        };
        job.end("T1".into(), why("node b was lost"));
        job.end("T2".into(), why("a consequence"));
        job.start(s(30), "T3".into(), 8, vec!["a".into()], Some("c".into()));
        let [first, second] = job.0.as_slice() else {
            panic!("{job:?}")
        };
        assert_eq!((first.first_step, first.last_step), (Some(1), Some(4)));
        assert_eq!(first.span.steps.unwrap().1.at, s(24));
        let json = serde_json::to_value(first).unwrap();
        assert_eq!(json["ended"], "T1");
        assert_eq!(json["cause"], "node b was lost");
        assert_eq!(
            (&json["class"], &json["culprit"]["rank"]),
            (&"node_lost".into(), &9.into())
        );
        assert!(json.get("span").is_none());
        assert_eq!((second.number, second.ended.as_deref()), (1, None));
        assert_eq!(job.goodput(s(50)), Some(4.0 / 40.0));
    }

    proptest! {
        #[test]
        fn never_outside_of_0_to_1(steps in proptest::collection::vec((0u64..100, 0u64..9, 0u64..200), 0..9), more in 0u64..9) {
            let mut spans = Vec::new();
            let mut now = 0;
            for (first, wait, number) in steps {
                let at = now + wait;
                now = at + number / 2;
                spans.push(span(at, Some((first, at, first + number, now))));
            }
            let found = goodput(&spans, s(now + more)).unwrap_or(0.0);
            prop_assert!((0.0..=1.0).contains(&found));
        }
    }
}
