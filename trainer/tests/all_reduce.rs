//! The measurement of all-reduce over Gloo, its ranks as threads.

mod common;

use common::{TIMEOUT, stores, world};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;
use tch::{Device, Tensor};
use tsm_job::exit;
use tsm_torch_ext::dist::{ProcessGroup, ReduceOp};
use tsm_trainer::all_reduce::{Measured, measure};
use tsm_trainer::ddp::{Link, Peers, Transport, Wait};

const BYTES: u64 = 1 << 18;

#[test]
fn ranks_agree_on_the_rounds_and_every_sum_is_right() {
    for n in [1, 2, 3] {
        let budget = Duration::from_millis(50);
        let all = world(n, TIMEOUT, |peers| {
            measure(&peers, Device::Cpu, BYTES, budget).unwrap()
        });
        for measured in &all {
            assert_eq!(measured.wrong, None);
            assert_eq!(measured.rounds, all[0].rounds, "{n} ranks");
            assert!(measured.rounds > 0 && (n == 1 || measured.seconds > 0.0));
        }
    }
}

/// A transport that spoils the sum of some round on one rank.
struct Spoiled {
    group: Arc<ProcessGroup>,
    /// Sums of many numbers so far.
    sums: AtomicU32,
    spoil: fn(u32, &Tensor),
}

impl Transport for Spoiled {
    fn rank(&self) -> usize {
        self.group.rank()
    }
    fn world_size(&self) -> usize {
        self.group.world_size()
    }
    fn start_mean(&self, t: &Tensor) -> Result<Wait, String> {
        self.group.start_mean(t)
    }
    fn all_reduce(&self, t: &Tensor, op: ReduceOp) -> Result<(), String> {
        Transport::all_reduce(&*self.group, t, op)?;
        if self.rank() == 1 && t.numel() > 1 {
            (self.spoil)(self.sums.fetch_add(1, Ordering::Relaxed), t);
        }
        Ok(())
    }
    fn broadcast(&self, tensors: &[Tensor], root: usize) -> Result<(), String> {
        Transport::broadcast(&*self.group, tensors, root)
    }
    fn all_gather(&self, t: &Tensor) -> Result<Vec<Tensor>, String> {
        Transport::all_gather(&*self.group, t)
    }
    fn barrier(&self, timeout: Duration) -> Result<(), String> {
        Transport::barrier(&*self.group, timeout)
    }
    fn shutdown(&self) -> Result<(), String> {
        Transport::shutdown(&*self.group)
    }
}

fn spoiled(spoil: fn(u32, &Tensor)) -> Vec<Measured> {
    stores(2, TIMEOUT, |store, group| {
        let group = Spoiled {
            group,
            sums: AtomicU32::new(0),
            spoil,
        };
        let link = Link {
            store,
            group: Arc::new(group),
        };
        let peers = Peers::join(link).unwrap();
        measure(&peers, Device::Cpu, BYTES, Duration::from_millis(20)).unwrap()
    })
}

#[test]
fn the_rank_with_a_wrong_sum_says_where() {
    // One number in the last unit, in a round of the warm-up.
    let all = spoiled(|round, t| {
        if round == 2 {
            let _ = t.get(777).g_add_scalar_(1.0);
        }
    });
    assert_eq!(all[0].wrong, None);
    // Rank 0 has 779 there, rank 1 7919 more.
    assert_eq!(
        all[1].wrong.as_deref(),
        Some("1 of 65536 sums of round 2 are wrong; number 777 is 9478, not 9477")
    );
}

#[test]
fn a_sum_of_another_round_is_wrong() {
    let all = spoiled(|round, t| {
        if round == 3 {
            // As if nothing had arrived since the round before.
            let _ = t.shallow_clone().g_sub_scalar_(2.0);
        }
    });
    let wrong = all[1].wrong.as_deref().unwrap();
    assert!(
        wrong.contains("sums of round 3 are wrong; number 0 is 7923, not 7925"),
        "{wrong}"
    );
}

/// What the others say when rank 1 of three does `instead`.
fn without_rank_1(timeout: Duration, instead: impl Fn() + Sync) -> Vec<String> {
    let both = Barrier::new(2);
    let texts = world(3, timeout, |peers| {
        if peers.rank() == 1 {
            instead();
            return None;
        }
        let error = measure(&peers, Device::Cpu, BYTES, Duration::ZERO).unwrap_err();
        assert_eq!(exit::code_of(&error), exit::PEER);
        both.wait();
        Some(error.to_string())
    });
    texts.into_iter().flatten().collect()
}

#[test]
fn a_dead_rank_is_named() {
    for text in without_rank_1(TIMEOUT, || ()) {
        assert!(
            text.starts_with("rank 1 is gone or stuck: agreement on the next round failed"),
            "{text}"
        );
    }
}
