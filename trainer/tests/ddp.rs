//! The gradient engine over several ranks, against serial sums and libtorch's own Reducer.

mod common;

use common::{Net, Rank, TIMEOUT, batch, difference, world};
use std::sync::{Arc, Barrier};
use std::time::Duration;
use tch::{Device, Kind, Tensor};
use tsm_job::config::{BnBuffers, PrecisionMode};
use tsm_job::exit;
use tsm_torch_ext::ops::backward;
use tsm_trainer::ddp::{Ddp, Peers};
use tsm_trainer::model::ParamRole;
use tsm_trainer::optim::ParamInfo;

fn grads(net: &Net) -> Vec<Tensor> {
    net.params.iter().map(|p| p.tensor.grad().copy()).collect()
}

/// Gradients of plain autograd, one batch after the other, averaged.
fn serial_mean(batches: &[(Tensor, Tensor)]) -> Vec<Tensor> {
    let net = Net::new();
    for b in batches {
        backward(&(net.loss(b) / batches.len() as f64)).unwrap();
    }
    grads(&net)
}

#[test]
fn gradients_are_the_mean_over_ranks() {
    let errors = world(3, TIMEOUT, |peers| {
        let rank = i64::from(peers.rank());
        let r = Rank::new(peers, PrecisionMode::Fp32);
        assert!(r.ddp.buckets().len() > 1);
        let mut worst = 0.0f64;
        for step in 0..3 {
            let of = |rank: i64| batch(step * 100 + rank * 10, 4);
            r.gradients(&[of(rank)]).unwrap();
            let want = serial_mean(&[of(0), of(1), of(2)]);
            worst = worst.max(difference(&grads(&r.net), &want));
        }
        worst
    });
    eprintln!("largest relative error per rank: {errors:?}");
    // The serial sum divides the losses, the engine the gradients: a few roundings apart.
    assert!(errors.iter().all(|&e| e < 4e-6), "{errors:?}");
}

#[test]
fn two_ranks_train_like_one_with_twice_the_batch() {
    let train = |r: &mut Rank, from: &dyn Fn(i64) -> (Tensor, Tensor)| {
        for step in 0..10 {
            r.step(&[from(step)], 0.05).unwrap();
        }
        r.net.tensors()
    };
    let mut alone = Rank::new(Arc::new(Peers::alone()), PrecisionMode::Fp32);
    let want = train(&mut alone, &|step| batch(step * 8, 8));
    let start = difference(&Net::new().tensors(), &want);
    assert!(start > 1e-2, "the training must move the weights: {start}");
    let got = world(2, TIMEOUT, |peers| {
        let rank = i64::from(peers.rank());
        let mut r = Rank::new(peers, PrecisionMode::Fp32);
        train(&mut r, &|step| batch(step * 8 + rank * 4, 4))
    });
    for tensors in got {
        let error = difference(&tensors, &want);
        eprintln!("2 x 4 against 1 x 8 after 10 steps: {error:.2e}");
        assert!(error < 1e-5, "{error}");
    }
}

#[test]
fn ranks_stay_equal_to_the_last_bit() {
    let bits = world(4, TIMEOUT, |peers| {
        let rank = i64::from(peers.rank());
        let mut r = Rank::new(peers.clone(), PrecisionMode::Fp32);
        for step in 0..50 {
            r.step(&[batch(step * 8 + rank * 2, 2)], 0.05).unwrap();
        }
        peers.leave();
        r.net.bits()
    });
    assert_ne!(bits[0], Net::new().bits());
    assert!(bits.iter().all(|b| *b == bits[0]));
}

#[test]
fn accumulation_equals_a_larger_batch() {
    let errors = world(2, TIMEOUT, |peers| {
        let rank = i64::from(peers.rank());
        let r = Rank::new(peers, PrecisionMode::Fp32);
        let micro: Vec<_> = (0..3).map(|m| batch(rank * 6 + m * 2, 2)).collect();
        // Twice: what the first step left must be gone.
        r.gradients(&micro).unwrap();
        r.gradients(&micro).unwrap();
        difference(&grads(&r.net), &serial_mean(&[batch(0, 12)]))
    });
    assert!(errors.iter().all(|&e| e < 2e-6), "{errors:?}");
}

#[test]
fn a_dead_rank_is_named_by_all_others() {
    let texts = world(4, TIMEOUT, |peers| {
        let rank = i64::from(peers.rank());
        let mut r = Rank::new(peers, PrecisionMode::Fp32);
        r.step(&[batch(rank, 2)], 0.05).unwrap();
        if rank == 1 {
            return None;
        }
        let e = r.step(&[batch(rank, 2)], 0.05).unwrap_err();
        Some((exit::code_of(&e), format!("{e:#}")))
    });
    for (rank, outcome) in texts.iter().enumerate() {
        let Some((code, text)) = outcome else {
            assert_eq!(rank, 1);
            continue;
        };
        eprintln!("{text}");
        assert_eq!(*code, exit::PEER);
        assert!(
            text.starts_with("rank 1 is gone or stuck: all-reduce of bucket "),
            "{text}"
        );
        assert!(
            text.contains(&format!("failed on rank {rank} after ")),
            "{text}"
        );
    }
}

#[test]
fn a_rank_that_never_comes_is_named_after_the_timeout() {
    let both = Barrier::new(2);
    let texts = world(2, Duration::from_secs(3), |peers| {
        let rank = peers.rank();
        let mut r = Rank::new(peers, PrecisionMode::Fp32);
        let outcome = (rank == 0).then(|| r.step(&[batch(0, 2)], 0.05).unwrap_err().to_string());
        both.wait();
        outcome
    });
    let text = texts[0].as_ref().unwrap();
    eprintln!("{text}");
    assert!(text.starts_with("rank 1 is gone or stuck: "), "{text}");
    assert!(text.ends_with("(alive, but not in a collective)"), "{text}");
}

#[test]
fn a_dead_rank_0_is_named_though_it_held_the_store() {
    let texts = world(3, TIMEOUT, |peers| {
        let rank = peers.rank();
        let r = Rank::new(peers, PrecisionMode::Fp32);
        (rank != 0).then(|| r.gradients(&[batch(0, 2)]).unwrap_err().to_string())
    });
    for text in texts.into_iter().flatten() {
        eprintln!("{text}");
        assert!(text.starts_with("rank 0 is gone or stuck: "), "{text}");
    }
}

fn param(name: &str) -> ParamInfo {
    ParamInfo {
        name: name.into(),
        role: ParamRole::Weight,
        tensor: Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true),
    }
}

#[test]
fn unused_parameters_are_named() {
    let params = [param("used"), param("idle.weight"), param("idle.bias")];
    let ddp = Ddp::new(&params, Arc::new(Peers::alone()), 25).unwrap();
    let run = |which: &[usize]| {
        let sum: Vec<Tensor> = which
            .iter()
            .map(|&i| params[i].tensor.sum(Kind::Float))
            .collect();
        Ok(backward(&Tensor::stack(&sum, 0).sum(Kind::Float))?)
    };
    let text = ddp.record_order(|| run(&[0])).unwrap_err().to_string();
    assert!(
        text.starts_with("2 of 3 parameters got no gradient: idle.weight, idle.bias"),
        "{text}"
    );
    ddp.record_order(|| run(&[0, 1, 2])).unwrap();
    ddp.zero().unwrap();
    ddp.begin(true);
    run(&[0, 1]).unwrap();
    let text = ddp.finish().unwrap_err().to_string();
    assert!(
        text.contains("1 of 3 parameters got no gradient: idle.bias"),
        "{text}"
    );
}

#[test]
fn misuse_is_an_error_of_backward() {
    let params = [param("w")];
    let ddp = Ddp::new(&params, Arc::new(Peers::alone()), 25).unwrap();
    let run = || -> anyhow::Result<()> { Ok(backward(&params[0].tensor.sum(Kind::Float))?) };
    ddp.record_order(run).unwrap();
    let text = run().unwrap_err().to_string();
    assert!(
        text.contains("w got a gradient outside of Ddp::begin"),
        "{text}"
    );
    ddp.begin(true);
    run().unwrap();
    let text = run().unwrap_err().to_string();
    assert!(text.contains("w got a second gradient"), "{text}");
    ddp.begin(true);
    tsm_torch_ext::ops::set_grad(&params[0].tensor, None).unwrap();
    let text = run().unwrap_err().to_string();
    assert!(
        text.contains("the gradient of w has left its bucket"),
        "{text}"
    );
    drop(ddp);
    run().unwrap();
}

#[test]
fn all_ranks_take_rank_0s_order() {
    let orders = world(3, TIMEOUT, |peers| {
        let rank = peers.rank() as usize;
        let params: Vec<ParamInfo> = (0..4).map(|i| param(&i.to_string())).collect();
        let ddp = Ddp::new(&params, peers, 25).unwrap();
        ddp.record_order(|| {
            // Each rank's graph is built in another order.
            let mut sum = Tensor::zeros([3], (Kind::Float, Device::Cpu));
            for i in 0..4 {
                sum = &params[(i + rank) % 4].tensor * &sum;
            }
            Ok(backward(&sum.sum(Kind::Float))?)
        })
        .unwrap();
        let buckets = ddp.buckets();
        buckets[0]
            .members
            .iter()
            .map(|m| m.param)
            .collect::<Vec<_>>()
    });
    assert_eq!(orders[0], [3, 2, 1, 0]);
    assert!(orders.iter().all(|o| *o == orders[0]), "{orders:?}");
}

#[test]
fn ranks_with_another_network_are_named() {
    let texts = world(3, TIMEOUT, |peers| {
        let k = if peers.rank() == 2 { 7 } else { 5 };
        let t = |k: i64| Tensor::zeros([k, 4], (Kind::Float, Device::Cpu));
        let (same, other) = (t(3), t(k));
        peers
            .verify_same_shapes([("conv1.weight", &same)], Device::Cpu)
            .unwrap();
        peers
            .verify_same_shapes(
                [("conv1.weight", &same), ("fc.weight", &other)],
                Device::Cpu,
            )
            .unwrap_err()
            .to_string()
    });
    for text in &texts {
        assert!(
            text.starts_with("rank 2 has another network than rank 0: fc.weight [5, 4] Float on rank 0, fc.weight [7, 4] Float on rank 2"),
            "{text}"
        );
    }
}

#[test]
fn buffers_agree_before_a_validation() {
    let outcome = world(2, TIMEOUT, |peers| {
        let rank = f64::from(peers.rank());
        let make = || {
            [
                Tensor::full([2, 2], 1.0 + rank, (Kind::Float, Device::Cpu)),
                Tensor::full([3], 10.0 * rank, (Kind::Float, Device::Cpu)),
                Tensor::from(5 + i64::from(peers.rank())),
            ]
        };
        let (mean, first) = (make(), make());
        peers.sync_buffers(&mean, BnBuffers::Mean).unwrap();
        peers.sync_buffers(&first, BnBuffers::Rank0).unwrap();
        [mean, first]
            .map(|list| list.map(|t| f64::try_from(t.to_kind(Kind::Double).max()).unwrap()))
    });
    assert!(
        outcome
            .iter()
            .all(|o| *o == [[1.5, 5.0, 5.0], [1.0, 0.0, 5.0]]),
        "{outcome:?}"
    );
}

#[test]
fn an_infinity_on_one_rank_skips_the_step_on_all() {
    let outcome = world(2, TIMEOUT, |peers| {
        let rank = peers.rank();
        let mut r = Rank::new(peers, PrecisionMode::Fp16);
        r.ddp.zero().unwrap();
        r.ddp.begin(true);
        let loss = r.precision.forward(|| r.net.loss(&batch(0, 2)));
        let factor = if rank == 1 { f64::INFINITY } else { 1.0 };
        backward(&(r.precision.scale_loss(&loss) * factor)).unwrap();
        r.ddp.finish().unwrap();
        let out = r.sgd.step(0.1, &mut r.precision).unwrap();
        let skipped = f64::try_from(out.found_inf).unwrap();
        let untouched = r.net.bits() == Net::new().bits();
        (
            skipped,
            untouched,
            r.precision.scale().unwrap().export().unwrap().scale,
        )
    });
    assert_eq!(outcome, [(1.0, true, 32768.0); 2]);
}

#[test]
fn the_engine_agrees_with_libtorchs_reducer() {
    let errors = common::groups(2, TIMEOUT, |group, peers| {
        let rank = i64::from(peers.rank());
        let r = Rank::new(peers, PrecisionMode::Fp32);
        let oracle_net = Net::new();
        let oracle =
            tsm_torch_ext::dist::ReducerOracle::new(&group, &oracle_net.tensors(), 1 << 20)
                .unwrap();
        let mut worst = 0.0f64;
        for step in 0..3 {
            let b = batch(step * 20 + rank * 10, 4);
            r.gradients(&[(b.0.shallow_clone(), b.1.shallow_clone())])
                .unwrap();
            oracle.before_forward().unwrap();
            let loss = oracle_net.loss(&b);
            oracle.before_backward().unwrap();
            backward(&loss).unwrap();
            worst = worst.max(difference(&grads(&r.net), &grads(&oracle_net)));
            for p in oracle_net.tensors() {
                let _ = p.grad().zero_();
            }
        }
        worst
    });
    eprintln!("largest relative difference to the reducer: {errors:?}");
    assert!(errors.iter().all(|&e| e < 1e-6), "{errors:?}");
}

/// Losses of 30 steps on one batch.
fn losses(mode: PrecisionMode) -> Vec<f64> {
    let mut r = Rank::new(Arc::new(Peers::alone()), mode);
    (0..30)
        .map(|_| r.step(&[batch(0, 8)], 0.05).unwrap())
        .collect()
}

#[test]
fn every_precision_learns_like_float32() {
    let want = losses(PrecisionMode::Fp32);
    assert!(want[29] < 0.8 * want[0], "{want:?}");
    for (mode, tolerance) in [
        (PrecisionMode::Bf16, 0.03),
        (PrecisionMode::Fp16, 0.01),
        (PrecisionMode::O2, 0.01),
    ] {
        let got = losses(mode);
        let worst = got
            .iter()
            .zip(&want)
            .map(|(g, w)| (g - w).abs() / w)
            .fold(0.0, f64::max);
        eprintln!(
            "{mode:?}: loss {:.4} -> {:.4}, float32 {:.4} -> {:.4}, largest difference {worst:.1e}",
            got[0], got[29], want[0], want[29]
        );
        assert!(worst > 0.0 && worst < tolerance, "{mode:?} {worst}");
    }
}

/// One vote is heard by all ranks at its step and no other, and touches no gradient.
#[test]
fn a_vote_reaches_every_rank_with_the_gradients() {
    for mode in [PrecisionMode::Fp32, PrecisionMode::O2] {
        let results = world(3, TIMEOUT, |peers| {
            let rank = peers.rank();
            let mut r = Rank::new(peers, mode);
            let mut heard = Vec::new();
            let mut norms = Vec::new();
            for step in 0..3 {
                r.ddp.zero().unwrap();
                if step == 1 && rank == 2 {
                    r.ddp.vote().unwrap();
                }
                for (micro, last) in [(0, false), (1, true)] {
                    r.ddp.begin(last);
                    let data = batch(i64::from(rank) * 4 + micro * 2, 2);
                    let loss = r.precision.forward(|| r.net.loss(&data));
                    backward(&r.precision.scale_loss(&loss)).unwrap();
                    r.ddp.finish().unwrap();
                }
                heard.push(r.ddp.votes().unwrap().double_value(&[]) > 0.0);
                // A rate of 0 keeps the weights, so that all steps have the same gradients.
                let done = r.sgd.step(0.0, &mut r.precision).unwrap();
                norms.push(f64::try_from(done.grad_norm).unwrap());
            }
            (heard, norms)
        });
        for (heard, norms) in results {
            assert_eq!(heard, [false, true, false], "{mode:?}");
            assert!(
                norms[0] > 0.0 && norms[1] == norms[0],
                "{mode:?}: {norms:?}"
            );
        }
    }
}
