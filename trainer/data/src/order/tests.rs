//! Tests of its parent module.

use super::*;
use std::collections::BTreeSet;

fn plan(
    n: u64,
    share: (u32, u32),
    b: u32,
    accumulation: u32,
    drop_last: bool,
    num_done: u64,
) -> TrainOrder {
    let cut = Cut {
        batch_per_rank: b,
        accumulation,
        drop_last,
    };
    TrainOrder::new(n, 7, 3, Share::new(share.0, share.1), cut, num_done)
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
        let last = batches(&plan(16 + 7, (rank, 4), 2, 2, false, 16));
        assert_eq!(last.len(), 1);
        assert_eq!(
            (last[0].step, last[0].micro_steps, last[0].step_samples),
            (0, 1, 7)
        );
        sizes.push(last[0].indices.len());
    }
    assert_eq!(sizes, [2, 2, 2, 1]);
    // 9 samples need a second micro step; no slice may be empty.
    let last = batches(&plan(16 + 9, (3, 4), 2, 2, false, 16));
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
    let order = plan(8 + 5, (3, 4), 1, 2, false, 8);
    assert_eq!((order.num_steps(), order.num_left_out()), (1, 1));
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
fn starting_behind_whole_steps_continues_the_epoch() {
    let whole = batches(&plan(103, (1, 2), 4, 2, false, 0));
    let rest = batches(&plan(103, (1, 2), 4, 2, false, 3 * 16));
    let content = |all: &[BatchPlan]| -> Vec<(u32, Vec<u64>)> {
        let pair = |b: &BatchPlan| (b.micro_step, b.indices.clone());
        all.iter().map(pair).collect()
    };
    assert_eq!(content(&whole[6..]), content(&rest));
    assert_eq!(rest[0].step, 0);
    assert!(batches(&plan(103, (1, 2), 4, 2, false, 103)).is_empty());
}

/// Ranks that come and go inside an epoch: each crew takes some steps and hands over by samples.
#[test]
fn no_sample_comes_twice_however_often_the_number_of_ranks_changes() {
    for drop_last in [true, false] {
        let (n, mut done) = (211, 0);
        let mut seen = BTreeSet::new();
        for (world, num_steps) in [(4, 3), (3, 2), (2, 4), (5, 1), (4, u64::MAX)] {
            let of = |rank| plan(n, (rank, world), 3, 2, drop_last, done);
            let taken = num_steps.min(of(0).num_steps());
            for batch in (0..world).flat_map(|rank| batches(&of(rank))) {
                if batch.step < taken {
                    for i in batch.indices {
                        assert!(seen.insert(i), "{i} twice");
                    }
                }
            }
            if taken < num_steps {
                let left_out = of(0).num_left_out();
                assert!(left_out < if drop_last { 4 * 3 * 2 } else { 4 });
                assert_eq!(seen.len() as u64 + left_out, n);
            } else {
                done += taken * of(0).global_batch();
                assert_eq!(seen.len() as u64, done);
            }
        }
    }
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
