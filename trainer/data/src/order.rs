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
    /// Optimizer step, counted from the first that is read; in validation the number of the batch.
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
///
/// Reading may begin behind any number of samples, so that another number of ranks can go on where
/// the one before stopped: no sample comes twice, whatever both global batches are.
#[derive(Clone, Debug)]
pub struct TrainOrder {
    /// What is left of the epoch.
    perm: Vec<u64>,
    share: Share,
    batch_per_rank: u32,
    accumulation: u32,
    drop_last: bool,
}

/// How an epoch is cut into steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    pub batch_per_rank: u32,
    pub accumulation: u32,
    pub drop_last: bool,
}

impl TrainOrder {
    /// The order of `epoch` behind its first `num_done` samples.
    ///
    /// # Panics
    /// If a count of `cut` is 0.
    pub fn new(
        num_samples: u64,
        seed: u64,
        epoch: u64,
        share: Share,
        cut: Cut,
        num_done: u64,
    ) -> Self {
        assert!(
            cut.batch_per_rank > 0 && cut.accumulation > 0,
            "a step of no samples: {cut:?}"
        );
        let mut perm = permutation(num_samples, seed, epoch);
        perm.drain(..num_done.min(num_samples) as usize);
        TrainOrder {
            perm,
            share,
            batch_per_rank: cut.batch_per_rank,
            accumulation: cut.accumulation,
            drop_last: cut.drop_last,
        }
    }

    /// Samples of a full step over all ranks.
    pub fn global_batch(&self) -> u64 {
        self.micro_step_samples() * u64::from(self.accumulation)
    }

    /// Steps to read.
    pub fn num_steps(&self) -> u64 {
        self.num_full_steps() + u64::from(self.last_step_samples() > 0)
    }

    /// Samples behind the last step.
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
        self.num_full_steps() * u64::from(self.accumulation) + self.last_micro_steps()
    }

    fn batch(&self, n: u64) -> Option<BatchPlan> {
        if n >= self.num_batches() {
            return None;
        }
        let accumulation = u64::from(self.accumulation);
        let step = n / accumulation;
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
mod tests;
