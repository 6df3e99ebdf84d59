//! Which rank does its own work more slowly than the others. Pure.
//!
//! In data parallel training every rank waits for the slowest, so the time of a step says nothing; the time
//! that a rank did not spend waiting does. A rank is slow when the median of its last steps is far above the
//! medians of the others, measured by how much those medians scatter and by how uncertain each of them is.

use crate::median::median;

/// When a rank is slow.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Steps that are looked back at.
    pub window: usize,
    /// Fewer steps than this say nothing.
    pub min_steps: usize,
    /// New steps of every rank between two looks.
    pub stride: usize,
    /// Distance from the others' median, in units of the scatter.
    pub min_score: f64,
    /// Distance from the others' median, as a share of it.
    pub min_excess: f64,
    /// The scatter is taken to be at least this share of the median: machines differ a little.
    pub min_scatter: f64,
    /// So many looks more must contradict what a rank was called so far than agree with it.
    pub confirm: u32,
}

impl Default for Rule {
    fn default() -> Rule {
        Rule {
            window: 32,
            min_steps: 20,
            stride: 4,
            min_score: 5.0,
            min_excess: 0.10,
            min_scatter: 0.02,
            confirm: 4,
        }
    }
}

/// How slow a rank is.
#[derive(Clone, Debug, PartialEq)]
pub struct Slowness {
    pub rank: u32,
    /// Its median over that of the others; 1.25: a quarter slower.
    pub factor: f64,
    pub work_ms: f64,
    pub others_ms: f64,
    /// Steps over which its median was taken.
    pub steps: usize,
}

/// A rank became slow, or is no longer.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    Slow(Slowness),
    Recovered(Slowness),
}

/// The last steps of all ranks.
#[derive(Clone, Debug)]
pub struct Stragglers {
    rule: Rule,
    ranks: Vec<Series>,
}

#[derive(Clone, Debug, Default)]
struct Series {
    /// The last [`Rule::window`] samples; `next` is overwritten next when it is full.
    samples: Vec<f64>,
    next: usize,
    /// Since the last look.
    new: usize,
    slow: bool,
    /// Looks that contradict `slow`, less those that agree.
    against: u32,
}

/// Median of a rank's last steps, and the standard error of it.
#[derive(Clone, Copy, Debug)]
struct Level {
    rank: usize,
    median: f64,
    error: f64,
    steps: usize,
}

impl Stragglers {
    pub fn new(world_size: u32, rule: Rule) -> Stragglers {
        let ranks = vec![Series::default(); world_size as usize];
        Stragglers { rule, ranks }
    }

    /// Takes in the own work of the next steps of a rank. What cannot be a duration is left out.
    pub fn feed(&mut self, rank: u32, work_ms: &[f32]) {
        let Some(series) = self.ranks.get_mut(rank as usize) else {
            return;
        };
        let usable = work_ms.iter().filter(|ms| ms.is_finite() && **ms > 0.0);
        for ms in usable.map(|ms| f64::from(*ms)) {
            if series.samples.len() < self.rule.window {
                series.samples.push(ms);
            } else {
                series.samples[series.next] = ms;
            }
            series.next = (series.next + 1) % self.rule.window;
            series.new += 1;
        }
    }

    /// A rank that has ended is compared with no more.
    pub fn forget(&mut self, rank: u32) {
        if let Some(series) = self.ranks.get_mut(rank as usize) {
            *series = Series::default();
        }
    }

    pub fn is_slow(&self, rank: u32) -> bool {
        self.ranks.get(rank as usize).is_some_and(|s| s.slow)
    }

    /// Looks at all ranks, if each has made enough new steps since the last look.
    pub fn check(&mut self) -> Vec<Change> {
        let rule = &self.rule;
        let most_new = self.ranks.iter().map(|s| s.new).max().unwrap_or(0);
        // One that makes no step while the others go on is not waited for.
        let counted = |series: &Series| {
            series.samples.len() >= rule.min_steps
                && (series.new >= rule.stride || most_new < rule.window)
        };
        let few = |series: &Series| series.new < rule.stride;
        if self.ranks.iter().any(|s| counted(s) && few(s)) {
            return Vec::new();
        }
        let levels: Vec<Level> = (self.ranks.iter().enumerate())
            .filter(|(_, series)| counted(series))
            .filter_map(|(rank, series)| level(rank, &series.samples))
            .collect();
        if levels.len() < 2 {
            return Vec::new();
        }
        let mut changes = Vec::new();
        for (level, others_ms, scatter) in compare(&levels, rule) {
            let series = &mut self.ranks[level.rank];
            series.new = 0;
            let (excess, score) = (
                level.median / others_ms - 1.0,
                (level.median - others_ms) / scatter,
            );
            let contradicts = if series.slow {
                excess < rule.min_excess / 2.0 || score < rule.min_score / 2.0
            } else {
                excess >= rule.min_excess && score >= rule.min_score
            };
            series.against = if contradicts {
                series.against + 1
            } else {
                series.against.saturating_sub(1)
            };
            if series.against < rule.confirm {
                continue;
            }
            (series.slow, series.against) = (!series.slow, 0);
            let slowness = Slowness {
                rank: level.rank as u32,
                factor: 1.0 + excess,
                work_ms: level.median,
                others_ms,
                steps: level.steps,
            };
            changes.push(if series.slow {
                Change::Slow(slowness)
            } else {
                Change::Recovered(slowness)
            });
        }
        changes
    }
}

/// For every rank, the median of the others and the scatter that its distance is measured in.
fn compare<'a>(levels: &'a [Level], rule: &Rule) -> impl Iterator<Item = (&'a Level, f64, f64)> {
    let mut medians: Vec<f64> = levels.iter().map(|l| l.median).collect();
    let center = median(&mut medians).unwrap_or_default();
    let mut distances: Vec<f64> = medians.iter().map(|m| (m - center).abs()).collect();
    // 1.4826 makes the median distance of a normal distribution its standard deviation.
    let between = 1.4826 * median(&mut distances).unwrap_or_default();
    // The error of one rank is itself known badly, that of all together well.
    let squares: f64 = levels.iter().map(|l| l.error * l.error).sum();
    let pooled = (squares / levels.len() as f64).sqrt();
    let min_scatter = rule.min_scatter;
    levels.iter().enumerate().map(move |(i, level)| {
        // Of two ranks, neither is the rule: each is compared with the other.
        let (others_ms, between, error) = match levels {
            [a, b] => {
                let other = if i == 0 { b } else { a };
                (other.median, 0.0, level.error.hypot(other.error))
            }
            _ => (center, between, pooled),
        };
        let scatter = (min_scatter * others_ms).max(between).max(error);
        (level, others_ms, scatter)
    })
}

/// The error comes from the order statistics two standard deviations of a fair coin away from the middle. Unlike
/// one from the spread, it is right for any distribution: where steps are either quick or slow, the median may
/// be either, and the error says so.
fn level(rank: usize, samples: &[f64]) -> Option<Level> {
    let mut sorted = samples.to_vec();
    let median = median(&mut sorted)?;
    let (steps, reach) = (sorted.len(), (sorted.len() as f64).sqrt());
    let middle = (steps as f64 - 1.0) / 2.0;
    let low = (middle - reach).floor().max(0.0) as usize;
    let high = ((middle + reach).ceil() as usize).min(steps - 1);
    Some(Level {
        rank,
        median,
        error: (sorted[high] - sorted[low]) / 4.0,
        steps,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// SplitMix64, and from it the noise of a step.
    struct Noise(u64);

    impl Noise {
        fn uniform(&mut self) -> f64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
        }

        fn normal(&mut self) -> f64 {
            let (radius, angle) = (1.0 - self.uniform(), self.uniform());
            (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
        }

        /// Log-normal around `ms`.
        fn step(&mut self, ms: f64, sd: f64) -> f32 {
            (ms * (sd * self.normal()).exp()) as f32
        }
    }

    /// What is found in `steps` steps when rank `r` takes `ms(r, step, noise)`, and at which step.
    fn run(
        world_size: u32,
        steps: usize,
        mut ms: impl FnMut(u32, usize) -> f32,
    ) -> Vec<(usize, Change)> {
        let mut stragglers = Stragglers::new(world_size, Rule::default());
        let mut found = Vec::new();
        for step in 1..=steps {
            for rank in 0..world_size {
                stragglers.feed(rank, &[ms(rank, step)]);
            }
            found.extend(stragglers.check().into_iter().map(|change| (step, change)));
        }
        found
    }

    #[test]
    fn noise_alone_is_no_straggler() {
        for seed in 0..150 {
            for (world_size, sd) in [(2, 0.05), (3, 0.3), (8, 0.02), (8, 0.3), (16, 0.1)] {
                let mut noise = Noise(seed * 1000 + world_size as u64);
                let found = run(world_size, 400, |_, _| noise.step(200.0, sd));
                assert_eq!(found, [], "seed {seed}, {world_size} ranks, sd {sd}");
            }
        }
    }

    #[test]
    fn neither_rare_spikes_nor_two_kinds_of_steps_are_a_straggler() {
        for seed in 0..150 {
            let mut noise = Noise(seed);
            let spikes = run(8, 400, |_, _| {
                let spike = if noise.uniform() < 0.02 { 20.0 } else { 1.0 };
                noise.step(100.0 * spike, 0.05)
            });
            assert_eq!(spikes, [], "seed {seed}");
            let kinds = run(8, 400, |_, _| {
                let decode = if noise.uniform() < 0.45 { 2.0 } else { 1.0 };
                noise.step(100.0 * decode, 0.05)
            });
            assert_eq!(kinds, [], "seed {seed}");
        }
    }

    #[test]
    fn a_quarter_slower_is_found_within_50_steps() {
        for seed in 0..200 {
            for since in [1, 101, 133] {
                let (slow, mut noise) = ((seed % 8) as u32, Noise(seed));
                let found = run(8, since + 49, |rank, step| {
                    let slower = rank == slow && step >= since;
                    noise.step(if slower { 250.0 } else { 200.0 }, 0.06)
                });
                assert_eq!(found.len(), 1, "seed {seed}, since {since}: {found:?}");
                let (step, Change::Slow(slowness)) = &found[0] else {
                    panic!("{found:?}")
                };
                assert!(*step >= since, "{found:?}");
                assert_eq!(slowness.rank, slow, "{found:?}");
                assert!((1.1..1.4).contains(&slowness.factor), "{found:?}");
            }
        }
    }

    #[test]
    fn of_two_ranks_the_slower_is_named() {
        let mut noise = Noise(1);
        let found = run(2, 60, |rank, _| {
            noise.step([120.0, 100.0][rank as usize], 0.03)
        });
        assert!(
            matches!(found.as_slice(), [(_, Change::Slow(s))] if s.rank == 0),
            "{found:?}"
        );
    }

    #[test]
    fn a_rank_is_named_once_and_once_when_it_recovers() {
        let mut noise = Noise(7);
        let found = run(8, 900, |rank, step| {
            let slow = rank == 5 && (200..600).contains(&step);
            noise.step(if slow { 300.0 } else { 200.0 }, 0.05)
        });
        let [
            (named, Change::Slow(slow)),
            (recovered, Change::Recovered(well)),
        ] = found.as_slice()
        else {
            panic!("{found:?}")
        };
        assert!((200..250).contains(named) && (600..650).contains(recovered));
        assert_eq!((slow.rank, well.rank, slow.steps), (5, 5, 32));
        assert!((slow.others_ms - 200.0).abs() < 10.0, "{slow:?}");
    }

    #[test]
    fn half_of_the_ranks_are_no_outliers() {
        let mut noise = Noise(3);
        let found = run(8, 300, |rank, _| {
            noise.step(if rank < 4 { 250.0 } else { 200.0 }, 0.02)
        });
        assert_eq!(found, []);
    }

    #[test]
    fn what_cannot_be_a_duration_is_left_out() {
        let mut stragglers = Stragglers::new(2, Rule::default());
        stragglers.feed(0, &[f32::NAN, f32::INFINITY, -1.0, 0.0]);
        stragglers.feed(9, &[1.0]);
        assert!(stragglers.ranks[0].samples.is_empty());
        stragglers.feed(0, &[3.0, f32::NAN, 1.0]);
        assert_eq!(stragglers.ranks[0].samples, [3.0, 1.0]);
    }

    #[test]
    fn a_rank_that_ended_holds_up_nobody() {
        let mut stragglers = Stragglers::new(4, Rule::default());
        stragglers.feed(3, &[100.0; 40]);
        stragglers.check();
        stragglers.forget(3);
        let mut found = Vec::new();
        for _ in 0..50 {
            for (rank, ms) in [(0, 100.0), (1, 101.0), (2, 150.0)] {
                stragglers.feed(rank, &[ms]);
            }
            found.extend(stragglers.check());
        }
        assert!(
            matches!(found.as_slice(), [Change::Slow(s)] if s.rank == 2),
            "{found:?}"
        );
    }

    #[test]
    fn a_rank_that_makes_no_step_holds_up_nobody() {
        let mut stragglers = Stragglers::new(4, Rule::default());
        let mut found = Vec::new();
        for step in 0..300 {
            for (rank, ms) in [(0, 100.0), (1, 101.0), (2, 150.0), (3, 100.0)] {
                if rank != 3 || step < 25 {
                    stragglers.feed(rank, &[ms]);
                }
            }
            found.extend(stragglers.check());
        }
        assert!(
            matches!(found.as_slice(), [Change::Slow(s)] if s.rank == 2),
            "{found:?}"
        );
    }

    proptest! {
        #[test]
        fn the_unit_of_time_does_not_matter(seed: u64, power in -12i32..12, factor in 1.0f64..1.6) {
            let found = |scale: f64| {
                let mut noise = Noise(seed);
                run(6, 120, |rank, _| {
                    let ms = if rank == 2 { 100.0 * factor } else { 100.0 };
                    noise.step(ms, 0.1) * scale as f32
                })
            };
            let names = |found: Vec<(usize, Change)>| -> Vec<(usize, u32, bool, f64)> {
                found.into_iter().map(|(step, change)| match change {
                    Change::Slow(s) => (step, s.rank, true, s.factor),
                    Change::Recovered(s) => (step, s.rank, false, s.factor),
                }).collect()
            };
            // A power of two changes no digit of a float.
            prop_assert_eq!(names(found(1.0)), names(found(2f64.powi(power))));
        }

        #[test]
        fn the_order_in_which_ranks_are_heard_does_not_matter(
            seed: u64,
            order in Just((0..6u32).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let found = |order: &[u32]| {
                let mut stragglers = Stragglers::new(6, Rule::default());
                let mut found = Vec::new();
                for step in 0..80u64 {
                    for &rank in order {
                        let mut noise = Noise(seed ^ (step << 8) ^ u64::from(rank));
                        let ms = if rank == 4 { 140.0 } else { 100.0 };
                        stragglers.feed(rank, &[noise.step(ms, 0.05)]);
                    }
                    found.extend(stragglers.check());
                }
                found
            };
            prop_assert_eq!(found(&order), found(&[0, 1, 2, 3, 4, 5]));
        }

        #[test]
        fn how_steps_are_cut_into_messages_does_not_hide_a_straggler(seed: u64, batch in 1usize..60) {
            let (mut stragglers, mut noise) = (Stragglers::new(8, Rule::default()), Noise(seed));
            let mut found = Vec::new();
            for _ in 0..400usize.div_ceil(batch) {
                for rank in 0..8 {
                    let ms = if rank == 6 { 125.0 } else { 100.0 };
                    let samples: Vec<f32> = (0..batch).map(|_| noise.step(ms, 0.08)).collect();
                    stragglers.feed(rank, &samples);
                }
                found.extend(stragglers.check());
            }
            prop_assert!(matches!(found.as_slice(), [Change::Slow(s)] if s.rank == 6), "{:?}", found);
        }
    }
}
