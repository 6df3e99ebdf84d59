use std::time::Duration;

use tch::{Device, Kind, Tensor};

use super::*;
use crate::ops::backward;

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(300);

/// A store of this process, and connections to it.
fn server() -> Store {
    ranks_as_threads().unwrap();
    Store::tcp("127.0.0.1", 0, 1, true, LONG).unwrap()
}

fn connect(port: u16, timeout: Duration) -> Store {
    Store::tcp("127.0.0.1", port, 1, false, timeout).unwrap()
}

/// Runs `f(rank group)` on `world` threads joined by Gloo on loopback; results by rank.
fn world<R: Send>(
    world: usize,
    timeout: Duration,
    f: impl Fn(&ProcessGroup) -> R + Sync,
) -> Vec<R> {
    let server = server();
    let port = server.port();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let f = &f;
                scope.spawn(move || {
                    let store = connect(port, timeout);
                    let group = ProcessGroup::gloo(&store, rank, world, "lo", timeout, 2).unwrap();
                    (f(&group), group, store)
                })
            })
            .collect();
        // Nobody closes its connections while another rank may still be at work.
        let ended: Vec<_> = ranks.into_iter().map(|r| r.join()).collect();
        ended.into_iter().map(|r| r.unwrap().0).collect()
    })
}

fn values(t: &Tensor) -> Vec<f32> {
    Vec::try_from(t.contiguous().view([-1])).unwrap()
}

#[test]
fn a_store_holds_values_counters_and_bytes_of_any_kind() {
    let server = server();
    let other = connect(server.port(), LONG);
    server.set("k", &[0, 255, 10, 0]).unwrap();
    assert_eq!(other.get("k").unwrap(), [0, 255, 10, 0]);
    server.set("empty", &[]).unwrap();
    assert!(other.get("empty").unwrap().is_empty());
    assert_eq!(
        (server.add("n", 3).unwrap(), other.add("n", -1).unwrap()),
        (3, 2)
    );
    assert!(other.check(&["k", "n"]).unwrap());
    assert!(!other.check(&["k", "absent"]).unwrap());
    let prefixed = server.prefix("generation 2").unwrap();
    assert!(!prefixed.check(&["k"]).unwrap());
}

#[test]
fn waiting_ends_by_a_set_or_by_the_timeout() {
    let server = server();
    let error = server.wait(&["never"], SHORT).unwrap_err();
    assert!(
        error.to_string().to_lowercase().contains("timeout"),
        "{error}"
    );
    let brief = connect(server.port(), SHORT);
    assert!(brief.get("never").is_err());

    let waiting = connect(server.port(), LONG);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| waiting.wait(&["a", "b"], LONG));
        server.set("a", b"1").unwrap();
        server.set("b", b"1").unwrap();
        waiter.join().unwrap().unwrap();
    });
}

#[test]
fn a_store_nobody_serves_is_an_error() {
    let port = server().port();
    let error = Store::tcp("127.0.0.1", port, 1, false, SHORT).unwrap_err();
    assert!(error.to_string().contains(&port.to_string()), "{error}");
}

#[test]
fn all_reduce_sums_averages_and_takes_the_maximum() {
    for n in [1, 2, 3, 4] {
        let results = world(n, LONG, |group| {
            assert_eq!(group.world_size(), n);
            let t = |op| {
                let t = Tensor::full([5], group.rank() as f64 + 1.0, F32);
                group.all_reduce(&t, op).unwrap();
                values(&t)
            };
            [t(ReduceOp::Sum), t(ReduceOp::Avg), t(ReduceOp::Max)]
        });
        let n = n as f32;
        let sum = n * (n + 1.0) / 2.0;
        for r in results {
            assert_eq!(r, [vec![sum; 5], vec![sum / n; 5], vec![n; 5]]);
        }
    }
}

#[test]
fn several_collectives_in_flight_keep_their_order() {
    let results = world(2, LONG, |group| {
        let list: Vec<_> = (0..8)
            .map(|i| Tensor::full([1000], f64::from(i), F32))
            .collect();
        let works: Vec<_> = list
            .iter()
            .map(|t| group.all_reduce_async(t, ReduceOp::Sum).unwrap())
            .collect();
        works.into_iter().for_each(|w| w.wait().unwrap());
        list.iter()
            .map(|t| t.double_value(&[999]))
            .collect::<Vec<_>>()
    });
    assert_eq!(results[0], [0., 2., 4., 6., 8., 10., 12., 14.]);
    assert_eq!(results[0], results[1]);
}

#[test]
fn broadcast_overwrites_parameters_of_mixed_kinds() {
    let results = world(3, LONG, |group| {
        let rank = group.rank() as f64;
        let weight = Tensor::full([2, 3], rank, F32).set_requires_grad(true);
        let count = Tensor::full([1], group.rank() as i64, (Kind::Int64, Device::Cpu));
        group
            .broadcast(&[weight.shallow_clone(), count.shallow_clone()], 1)
            .unwrap();
        group.broadcast(&[], 0).unwrap();
        (values(&weight), count.int64_value(&[0]))
    });
    assert_eq!(results, vec![(vec![1.0; 6], 1); 3]);
}

#[test]
fn all_gather_returns_the_ranks_in_order() {
    let results = world(3, LONG, |group| {
        let rank = group.rank() as f32;
        let t = Tensor::from_slice(&[rank, rank + 10.0, 0., 0.])
            .view([2, 2])
            .transpose(0, 1);
        group
            .all_gather(&t)
            .unwrap()
            .iter()
            .map(values)
            .collect::<Vec<_>>()
    });
    for r in results {
        assert_eq!(r, [[0., 0., 10., 0.], [1., 0., 11., 0.], [2., 0., 12., 0.]]);
    }
}

#[test]
fn a_rank_that_never_joins_is_a_timeout() {
    let server = server();
    let store = connect(server.port(), LONG);
    let error = ProcessGroup::gloo(&store, 0, 2, "lo", SHORT, 1).unwrap_err();
    assert!(error.to_string().to_lowercase().contains("time"), "{error}");
}

#[test]
fn a_rank_that_stays_away_from_a_collective_is_a_timeout() {
    let results = world(2, Duration::from_secs(3), |group| {
        let t = Tensor::zeros([4], F32);
        (group.rank() == 0).then(|| group.all_reduce(&t, ReduceOp::Sum).unwrap_err().to_string())
    });
    assert!(results[0].is_some());
}

#[test]
fn a_barrier_names_the_missing_rank() {
    let results = world(3, LONG, |group| {
        group.barrier(LONG).unwrap();
        (group.rank() != 2).then(|| group.barrier(SHORT).err().map(|e| e.to_string()))
    });
    let message = results[0].clone().flatten().expect("rank 0 notices");
    assert!(message.contains('2'), "{message}");
}

#[test]
fn an_unknown_interface_is_an_error() {
    let error = ProcessGroup::gloo(&server(), 0, 1, "nosuch0", LONG, 1).unwrap_err();
    assert!(error.to_string().contains("nosuch0"), "{error}");
}

#[test]
fn the_reducer_leaves_the_mean_gradient_on_every_rank() {
    let results = world(2, LONG, |group| {
        let params: Vec<_> = (0..3)
            .map(|i| Tensor::full([64], f64::from(i) + 1.0, F32).set_requires_grad(true))
            .collect();
        // 256 bytes: one bucket a parameter after the first step.
        let reducer = ReducerOracle::new(group, &params, 256).unwrap();
        let mut grads = Vec::new();
        for step in 1..=2 {
            for p in &params {
                crate::ops::set_grad(p, None).unwrap();
            }
            reducer.before_forward().unwrap();
            let scale = (group.rank() + 1) as f64 * f64::from(step);
            let loss = params.iter().fold(Tensor::zeros([], F32), |l, p| {
                l + (p * p).sum(Kind::Float) * scale
            });
            reducer.before_backward().unwrap();
            backward(&loss).unwrap();
            grads.extend(params.iter().map(|p| p.grad().double_value(&[63])));
        }
        grads
    });
    // d/dp of scale * p^2 is 2 * scale * p; the mean of scale over the ranks is 1.5 * step.
    assert_eq!(results[0], [3.0, 6.0, 9.0, 6.0, 12.0, 18.0]);
    assert_eq!(results[0], results[1]);
}
