//! Which rank reads which sample when, and the random numbers of an epoch.
//!
//! Everything here is a function of (seed, epoch, step, rank): two runs, or one run before and
//! after a resume, see the same samples, however many threads decode them.

/// A small counter-based generator (SplitMix64; Steele, Lea, Flood, OOPSLA 2014).
///
/// Its state is one addition per draw, so any (seed, epoch, index) opens an independent stream.
#[derive(Clone, Debug)]
pub struct SplitMix64 {
    state: u64,
}

const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl SplitMix64 {
    /// The generator of the reference implementation for this seed.
    pub fn new(seed: u64) -> Self {
        SplitMix64 { state: seed }
    }

    /// The stream of one sample in one epoch; nothing else may feed its augmentation.
    pub fn for_sample(seed: u64, epoch: u64, index: u64) -> Self {
        let state = [seed, epoch, index].iter().fold(0, |state: u64, &part| {
            mix(state.wrapping_add(GOLDEN_GAMMA) ^ part)
        });
        SplitMix64 { state }
    }

    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN_GAMMA);
        mix(self.state)
    }

    /// Uniform in `[0, bound)`, by multiplication: a value's share is off by at most
    /// `bound / 2^64`.
    ///
    /// # Panics
    /// If `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "a draw from an empty range");
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `[low, high)`.
    pub fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }
}

/// This process among the ranks of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub rank: u32,
    pub world_size: u32,
}

impl Share {
    /// # Panics
    /// If `rank` is not below `world_size`.
    pub fn new(rank: u32, world_size: u32) -> Self {
        assert!(rank < world_size, "rank {rank} of {world_size}");
        Share { rank, world_size }
    }
}

/// The samples of one batch and its place in the epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchPlan {
    /// Optimizer step within the epoch; in validation the number of the batch.
    pub step: u64,
    /// Position within the step, below `micro_steps`.
    pub micro_step: u32,
    /// Batches of this rank in the step, the same on all ranks.
    pub micro_steps: u32,
    /// Samples of the step over all ranks and micro steps: the divisor of an exact mean.
    pub step_samples: u64,
    /// Positions in the list.
    pub indices: Vec<u64>,
}

/// What one rank reads in an epoch, batch by batch.
#[derive(Clone, Debug)]
pub enum Plan {
    Train(TrainOrder),
    Val(ValOrder),
}

impl Plan {
    /// Batches of this rank from the first step on.
    pub fn num_batches(&self) -> u64 {
        match self {
            Plan::Train(order) => order.num_batches(),
            Plan::Val(order) => order.num_batches(),
        }
    }

    /// The `n`-th batch of this rank, counted from the first step; `None` past the end.
    pub fn batch(&self, n: u64) -> Option<BatchPlan> {
        match self {
            Plan::Train(order) => order.batch(n),
            Plan::Val(order) => order.batch(n),
        }
    }

    /// Most samples that a batch of this plan holds.
    pub fn batch_per_rank(&self) -> u32 {
        match self {
            Plan::Train(order) => order.batch_per_rank,
            Plan::Val(order) => order.batch_per_rank,
        }
    }
}

/// A shuffled epoch cut into steps of `world_size x batch_per_rank x accumulation` samples.
///
/// Step `s` takes `perm[s * G .. (s + 1) * G]`; micro step `m` of rank `r` the contiguous slice
/// of `batch_per_rank` that starts at `(m * world_size + r) * batch_per_rank`. With the same
/// global batch G the samples of a step are therefore the same for any number of ranks.
///
/// A last step with fewer than G samples is left out (`drop_last`) or divided as evenly as
/// possible: as many micro steps as the samples need, sizes that differ by at most one, earlier
/// slices larger. No slice is empty, since a rank without a sample has no gradient to contribute:
/// up to `world_size - 1` samples are left out where the ranks could not share them
/// ([`TrainOrder::num_left_out`]).
#[derive(Clone, Debug)]
pub struct TrainOrder {
    perm: Vec<u64>,
    share: Share,
    batch_per_rank: u32,
    accumulation: u32,
    drop_last: bool,
    first_step: u64,
}

/// How an epoch is cut into steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    pub batch_per_rank: u32,
    pub accumulation: u32,
    pub drop_last: bool,
}

impl TrainOrder {
    /// The order of `epoch`, to be read from `first_step` on.
    ///
    /// # Panics
    /// If a count of `cut` is 0.
    pub fn new(
        num_samples: u64,
        seed: u64,
        epoch: u64,
        share: Share,
        cut: Cut,
        first_step: u64,
    ) -> Self {
        assert!(
            cut.batch_per_rank > 0 && cut.accumulation > 0,
            "a step of no samples: {cut:?}"
        );
        TrainOrder {
            perm: permutation(num_samples, seed, epoch),
            share,
            batch_per_rank: cut.batch_per_rank,
            accumulation: cut.accumulation,
            drop_last: cut.drop_last,
            first_step,
        }
    }

    /// Samples of a full step over all ranks.
    pub fn global_batch(&self) -> u64 {
        self.micro_step_samples() * u64::from(self.accumulation)
    }

    /// Steps of the whole epoch, whatever the first one to read is.
    pub fn num_steps(&self) -> u64 {
        self.num_full_steps() + u64::from(self.last_step_samples() > 0)
    }

    /// Samples that no step of this epoch takes.
    pub fn num_left_out(&self) -> u64 {
        let rest = self.perm.len() as u64 % self.global_batch();
        rest - self.last_step_samples()
    }

    fn num_full_steps(&self) -> u64 {
        self.perm.len() as u64 / self.global_batch()
    }

    /// Samples of the final partial step, 0 when there is none.
    fn last_step_samples(&self) -> u64 {
        let rest = self.perm.len() as u64 % self.global_batch();
        let world = u64::from(self.share.world_size);
        if self.drop_last || rest < world {
            return 0;
        }
        let micro_steps = rest.div_ceil(self.micro_step_samples());
        if rest < micro_steps * world {
            (micro_steps - 1) * self.micro_step_samples()
        } else {
            rest
        }
    }

    fn last_micro_steps(&self) -> u64 {
        self.last_step_samples().div_ceil(self.micro_step_samples())
    }

    /// Samples of a full micro step over all ranks.
    fn micro_step_samples(&self) -> u64 {
        u64::from(self.share.world_size) * u64::from(self.batch_per_rank)
    }

    fn num_batches(&self) -> u64 {
        let all = self.num_full_steps() * u64::from(self.accumulation) + self.last_micro_steps();
        all.saturating_sub(self.first_step.saturating_mul(u64::from(self.accumulation)))
    }

    fn batch(&self, n: u64) -> Option<BatchPlan> {
        if n >= self.num_batches() {
            return None;
        }
        let accumulation = u64::from(self.accumulation);
        let step = self.first_step + n / accumulation;
        let micro_step = n % accumulation;
        let (micro_steps, step_samples) = if step < self.num_full_steps() {
            (accumulation, self.global_batch())
        } else {
            (self.last_micro_steps(), self.last_step_samples())
        };
        let slices = micro_steps * u64::from(self.share.world_size);
        let slice = micro_step * u64::from(self.share.world_size) + u64::from(self.share.rank);
        let step_start = step * self.global_batch();
        let (small, larger) = (step_samples / slices, step_samples % slices);
        let start = step_start + slice * small + slice.min(larger);
        let len = small + u64::from(slice < larger);
        Some(BatchPlan {
            step,
            micro_step: micro_step as u32,
            micro_steps: micro_steps as u32,
            step_samples,
            indices: self.perm[start as usize..(start + len) as usize].to_vec(),
        })
    }
}

/// The list in its own order: index `i` goes to rank `i % world_size`. Nothing is padded and
/// nothing counts twice, so ranks may have a different number of batches, or none.
#[derive(Clone, Debug)]
pub struct ValOrder {
    num_samples: u64,
    share: Share,
    batch_per_rank: u32,
}

impl ValOrder {
    /// # Panics
    /// If `batch_per_rank` is 0.
    pub fn new(num_samples: u64, share: Share, batch_per_rank: u32) -> Self {
        assert!(batch_per_rank > 0, "a batch of no samples");
        ValOrder {
            num_samples,
            share,
            batch_per_rank,
        }
    }

    /// Samples of this rank.
    pub fn num_own(&self) -> u64 {
        let (world, rank) = (u64::from(self.share.world_size), u64::from(self.share.rank));
        (self.num_samples + world - 1 - rank) / world
    }

    fn num_batches(&self) -> u64 {
        self.num_own().div_ceil(u64::from(self.batch_per_rank))
    }

    fn batch(&self, n: u64) -> Option<BatchPlan> {
        let (world, rank) = (u64::from(self.share.world_size), u64::from(self.share.rank));
        let b = u64::from(self.batch_per_rank);
        let own = (n * b)..self.num_own().min((n + 1) * b);
        if own.is_empty() {
            return None;
        }
        let indices: Vec<u64> = own.map(|i| i * world + rank).collect();
        Some(BatchPlan {
            step: n,
            micro_step: 0,
            micro_steps: 1,
            step_samples: indices.len() as u64,
            indices,
        })
    }
}

/// Fisher and Yates' shuffle of `0..n`, the same on every rank.
fn permutation(n: u64, seed: u64, epoch: u64) -> Vec<u64> {
    // No sample has this index, so the order shares no stream with an augmentation.
    let mut rng = SplitMix64::for_sample(seed, epoch, u64::MAX);
    let mut perm: Vec<u64> = (0..n).collect();
    for i in (1..perm.len()).rev() {
        perm.swap(i, rng.below(i as u64 + 1) as usize);
    }
    perm
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn plan(
        n: u64,
        share: (u32, u32),
        b: u32,
        accumulation: u32,
        drop_last: bool,
        first: u64,
    ) -> TrainOrder {
        let cut = Cut {
            batch_per_rank: b,
            accumulation,
            drop_last,
        };
        TrainOrder::new(n, 7, 3, Share::new(share.0, share.1), cut, first)
    }

    fn batches(order: &TrainOrder) -> Vec<BatchPlan> {
        let all: Vec<_> = (0..).map_while(|n| order.batch(n)).collect();
        assert_eq!(all.len() as u64, order.num_batches());
        all
    }

    /// Samples of each step over all ranks.
    fn steps(n: u64, world: u32, b: u32, accumulation: u32, drop_last: bool) -> Vec<BTreeSet<u64>> {
        let mut steps = Vec::new();
        for rank in 0..world {
            let order = plan(n, (rank, world), b, accumulation, drop_last, 0);
            steps.resize(order.num_steps() as usize, BTreeSet::new());
            for batch in batches(&order) {
                for i in batch.indices {
                    assert!(steps[batch.step as usize].insert(i), "{i} twice");
                }
            }
        }
        steps
    }

    #[test]
    fn splitmix64_gives_the_reference_sequence() {
        // Vigna's splitmix64.c from state 1234567.
        let mut rng = SplitMix64::new(1_234_567);
        let first: Vec<u64> = (0..5).map(|_| rng.next_u64()).collect();
        assert_eq!(
            first,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423,
                4_593_380_528_125_082_431,
                16_408_922_859_458_223_821
            ]
        );
    }

    #[test]
    fn streams_of_neighbouring_samples_differ_and_fill_their_range() {
        let mut seen = BTreeSet::new();
        let mut sum = 0.0;
        for index in 0..4000 {
            let mut rng = SplitMix64::for_sample(0, 0, index);
            assert!(seen.insert(rng.clone().next_u64()));
            sum += rng.unit();
            assert!(rng.below(3) < 3);
        }
        // The mean of 4000 uniform draws has a standard deviation of 0.0046.
        assert!((sum / 4000.0 - 0.5).abs() < 0.023, "mean {}", sum / 4000.0);
        assert!(seen.insert(SplitMix64::for_sample(0, 1, 0).next_u64()));
        assert!(seen.insert(SplitMix64::for_sample(1, 0, 0).next_u64()));
    }

    #[test]
    fn the_order_is_a_permutation_that_changes_with_seed_and_epoch() {
        for n in [0, 1, 2, 17, 1000] {
            let perm = permutation(n, 5, 0);
            assert_eq!(
                perm.iter().copied().collect::<BTreeSet<_>>(),
                (0..n).collect()
            );
            assert_eq!(perm.len() as u64, n);
        }
        assert_eq!(permutation(100, 5, 0), permutation(100, 5, 0));
        assert_ne!(permutation(100, 5, 0), permutation(100, 5, 1));
        assert_ne!(permutation(100, 5, 0), permutation(100, 6, 0));
    }

    #[test]
    fn the_samples_of_a_step_depend_on_the_global_batch_alone() {
        for drop_last in [true, false] {
            let one = steps(103, 1, 16, 1, drop_last);
            assert_eq!(one, steps(103, 2, 8, 1, drop_last));
            assert_eq!(one, steps(103, 4, 4, 1, drop_last));
            assert_eq!(one, steps(103, 2, 4, 2, drop_last));
            assert_eq!(one, steps(103, 1, 2, 8, drop_last));
            assert_eq!(one.len(), if drop_last { 6 } else { 7 });
            let seen: usize = one.iter().map(BTreeSet::len).sum();
            assert_eq!(seen, if drop_last { 96 } else { 103 });
        }
    }

    #[test]
    fn a_final_partial_step_is_divided_evenly() {
        let mut sizes = Vec::new();
        for rank in 0..4 {
            let last = batches(&plan(16 + 7, (rank, 4), 2, 2, false, 1));
            assert_eq!(last.len(), 1);
            assert_eq!(
                (last[0].step, last[0].micro_steps, last[0].step_samples),
                (1, 1, 7)
            );
            sizes.push(last[0].indices.len());
        }
        assert_eq!(sizes, [2, 2, 2, 1]);
        // 9 samples need a second micro step; no slice may be empty.
        let last = batches(&plan(16 + 9, (3, 4), 2, 2, false, 1));
        assert_eq!(
            last.iter().map(|b| b.indices.len()).collect::<Vec<_>>(),
            [1, 1]
        );
    }

    #[test]
    fn a_final_step_with_fewer_samples_than_ranks_is_left_out_and_counted() {
        let order = plan(16 + 3, (0, 4), 2, 2, false, 0);
        assert_eq!((order.num_steps(), order.num_left_out()), (1, 3));
        let order = plan(16 + 4, (0, 4), 2, 2, false, 0);
        assert_eq!((order.num_steps(), order.num_left_out()), (2, 0));
        // 5 samples, one per rank and micro step: four ranks share four of them.
        let order = plan(8 + 5, (3, 4), 1, 2, false, 1);
        assert_eq!((order.num_steps(), order.num_left_out()), (2, 1));
        assert_eq!(batches(&order).len(), 1);
    }

    #[test]
    fn no_slice_is_empty_and_micro_steps_agree() {
        for n in 1..60 {
            for (world, b, accumulation) in [(1, 4, 1), (4, 1, 2), (3, 2, 3), (5, 1, 3)] {
                let of = |rank| batches(&plan(n, (rank, world), b, accumulation, false, 0));
                for rank in 0..world {
                    let own = of(rank);
                    assert!(
                        own.iter()
                            .all(|x| (1..=b as usize).contains(&x.indices.len()))
                    );
                    assert!(
                        own.iter()
                            .zip(of(0))
                            .all(|(x, y)| (x.step, x.micro_steps) == (y.step, y.micro_steps))
                    );
                    assert_eq!(own.len(), of(0).len());
                }
                let planned: usize = (0..world).flat_map(of).map(|x| x.indices.len()).sum();
                let left_out = plan(n, (0, world), b, accumulation, false, 0).num_left_out();
                assert_eq!(planned as u64 + left_out, n);
                assert!(left_out < u64::from(world));
            }
        }
    }

    #[test]
    fn starting_at_a_step_continues_the_epoch() {
        let whole = batches(&plan(103, (1, 2), 4, 2, false, 0));
        let rest = batches(&plan(103, (1, 2), 4, 2, false, 3));
        assert_eq!(whole[6..], rest[..]);
        assert_eq!(rest[0].step, 3);
        assert!(batches(&plan(103, (1, 2), 4, 2, false, 7)).is_empty());
    }

    #[test]
    fn validation_reads_everything_once_without_padding() {
        for world in [1, 2, 3, 5] {
            let mut seen = Vec::new();
            for rank in 0..world {
                let order = ValOrder::new(13, Share::new(rank, world), 2);
                let all: Vec<_> = (0..).map_while(|n| order.batch(n)).collect();
                assert_eq!(all.len() as u64, order.num_batches());
                for i in all.into_iter().flat_map(|b| b.indices) {
                    assert_eq!(i % u64::from(world), u64::from(rank));
                    seen.push(i);
                }
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..13).collect::<Vec<_>>());
        }
        assert_eq!(ValOrder::new(1, Share::new(3, 4), 2).batch(0), None);
    }
}
