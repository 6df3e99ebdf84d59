use super::*;
use crate::blame::tests::{rank, said};
use proptest::prelude::*;
use tsm_job::exit;

const MS: Duration = Duration::from_millis(1);

/// The ranks of each node with the time of their end, numbered on; node `i` is called `gpu-<i>`.
fn cluster<'a>(nodes: &'a [Vec<(Rank, u32)>], uncertainty: Duration) -> Vec<NodeEnds<'a>> {
    const HOSTS: [&str; 4] = ["gpu-0", "gpu-1", "gpu-2", "gpu-3"];
    let mut number = 0;
    let mut node = |(i, ranks): (usize, &'a Vec<(Rank, u32)>)| {
        let mut seen = |(rank, at): &'a (Rank, u32)| {
            number += 1;
            Seen {
                number: number - 1,
                rank,
                at: MS * *at,
            }
        };
        NodeEnds {
            host: HOSTS[i],
            ranks: ranks.iter().map(&mut seen).collect(),
            uncertainty,
            lost: None,
        }
    };
    nodes.iter().enumerate().map(&mut node).collect()
}

fn found(nodes: &[NodeEnds], hang: Option<&Hang>) -> Fault {
    first_failure(nodes, hang, |_| String::new()).unwrap()
}

fn stopped(order: usize) -> Rank {
    Rank {
        after_stop: true,
        sent: vec![15],
        ..rank(order, End::Signal(15))
    }
}

#[test]
fn within_a_node_the_order_counts_and_between_nodes_the_time() {
    // The times of one node may not say what its order says.
    let nodes = [
        vec![(rank(2, End::Code(1)), 20), (rank(1, End::Code(17)), 21)],
        vec![(rank(1, End::Code(1)), 25), (stopped(2), 30)],
    ];
    let fault = found(&cluster(&nodes, MS), None);
    assert_eq!(fault.culprit, Culprit::Rank(1));
    assert_eq!(fault.reason, "its end came first");
    let fault = found(&cluster(&nodes, MS * 2), None);
    assert_eq!(fault.culprit, Culprit::Rank(1));
    assert_eq!(
        fault.reason,
        "no other rank is known to have failed before it; rank 2 on gpu-1 ended within 4.0 ms of it, less than the clocks tell"
    );
}

#[test]
fn causes_come_before_consequences_on_whatever_node() {
    let peer = rank(1, End::Code(exit::PEER));
    let nodes = [
        vec![(peer.clone(), 5), (peer, 6)],
        vec![(stopped(2), 9), (rank(1, End::Signal(11)), 7)],
    ];
    let fault = found(&cluster(&nodes, Duration::ZERO), None);
    assert_eq!(fault.culprit, Culprit::Rank(3));
    assert_eq!(
        fault.reason,
        "rank 0 on gpu-0 and 1 more failed earlier, but by what they say they lost another rank"
    );
}

#[test]
fn where_the_clocks_cannot_tell_the_rank_that_says_why_is_named() {
    let told = Rank {
        record: said("panic", "boom"),
        ..rank(1, End::Code(70))
    };
    let nodes = [vec![(rank(1, End::Code(1)), 10)], vec![(told, 11)]];
    assert_eq!(found(&cluster(&nodes, MS), None).culprit, Culprit::Rank(1));
    assert_eq!(
        found(&cluster(&nodes, MS / 4), None).culprit,
        Culprit::Rank(0)
    );
}

fn lost(heard: u32, given_up: u32) -> Option<Lost<'static>> {
    let how = "its connection was closed";
    Some(Lost {
        heard: MS * heard,
        given_up: MS * given_up,
        how,
    })
}

#[test]
fn a_lost_node_is_to_blame_unless_a_rank_failed_before() {
    let node = || Culprit::Node {
        node: 1,
        host: "gpu-1".into(),
        how: "its connection was closed".into(),
        at: MS * 100,
    };
    let blame = |first: Rank, at: u32| {
        let nodes = [
            vec![(first, at), (stopped(2), 120)],
            vec![(Rank::default(), 0)],
        ];
        let mut nodes = cluster(&nodes, MS);
        nodes[1].lost = lost(90, 100);
        found(&nodes, None).culprit
    };
    assert_eq!(blame(stopped(1), 120), node());
    assert_eq!(blame(rank(1, End::Code(exit::PEER)), 50), node());
    assert_eq!(
        blame(rank(1, End::Code(17)), 50),
        Culprit::Rank(0),
        "the node was heard after it"
    );
    assert_eq!(
        blame(rank(1, End::Code(1)), 95),
        node(),
        "a silent end may be a consequence"
    );
    assert_eq!(
        blame(rank(1, End::Signal(11)), 95),
        Culprit::Rank(0),
        "a crash is none"
    );
    assert_eq!(
        blame(rank(1, End::Signal(11)), 101),
        node(),
        "later is later"
    );
}

#[test]
fn a_rank_that_failed_takes_its_own_node_along() {
    let told = Rank {
        record: said("panic", "boom"),
        end: None,
        order: 1,
        ..Rank::default()
    };
    let nodes = [
        vec![(stopped(1), 120)],
        vec![(told, 99), (Rank::default(), 0)],
    ];
    let mut nodes = cluster(&nodes, MS);
    nodes[1].lost = lost(98, 100);
    // It said so, and its end was never seen.
    assert_eq!(found(&nodes, None).culprit, Culprit::Rank(1));
}

#[test]
fn late_ranks_are_to_blame_for_a_hang_unless_something_failed_before() {
    let own = Rank {
        record: said("error", "interrupted"),
        after_stop: true,
        ..rank(1, End::Code(1))
    };
    let nodes = [vec![(own, 110), (stopped(2), 111)], vec![(stopped(1), 112)]];
    let hang = Hang {
        at: MS * 100,
        late: vec![1, 2],
    };
    assert_eq!(
        found(&cluster(&nodes, MS), Some(&hang)).culprit,
        Culprit::Late {
            ranks: vec![1, 2],
            at: MS * 100
        }
    );
    let nodes = [vec![(rank(1, End::Code(17)), 90)], vec![(stopped(1), 112)]];
    assert_eq!(
        found(&cluster(&nodes, MS), Some(&hang)).culprit,
        Culprit::Rank(0)
    );
}

#[test]
fn of_one_node_the_order_is_the_kernel_s() {
    let ranks = [rank(2, End::Code(1)), rank(1, End::Code(17)), stopped(3)];
    let alone = [ranks.into_iter().zip([2, 1, 3]).collect::<Vec<_>>()];
    let fault = found(&cluster(&alone, MS), None);
    assert_eq!(fault.culprit, Culprit::Rank(1));
    assert_eq!(fault.reason, "its end came first in the kernel's order");
    let quiet = [vec![(rank(1, End::Code(0)), 1)]];
    assert_eq!(
        first_failure(&cluster(&quiet, MS), None, |_| String::new()),
        None
    );
}

/// What becomes of a rank whose peer died, and whether its end could be told from a failure of its own.
fn consequence() -> impl Strategy<Value = (Rank, bool)> {
    let lost_peer = Rank {
        record: said("peer", "rank 3 is gone"),
        ..rank(0, End::Code(76))
    };
    prop_oneof![
        Just((stopped(0), false)),
        Just((lost_peer, false)),
        Just((rank(0, End::Code(exit::PEER)), false)),
        Just((
            Rank {
                after_stop: true,
                sent: vec![15],
                ..rank(0, End::Code(3))
            },
            false
        )),
        Just((rank(0, End::Code(0)), false)),
        Just((rank(0, End::Code(1)), true)),
    ]
}

proptest! {
    /// Three nodes whose clocks are off by up to their uncertainty. The culprit tells of its own error; what follows
    /// may be seen in any order, except that what looks like an own failure happens after it.
    #[test]
    fn the_culprit_with_an_error_of_its_own_is_always_named(
        others in proptest::collection::vec((consequence(), 0u32..3, 0u32..3000), 1..12),
        home in 0usize..3,
        place in 0usize..12,
        skews in proptest::collection::vec(-40i64..=40, 3),
    ) {
        let culprit_at = 1000i64;
        let culprit = Rank { record: said("error", "no such clip"), ..rank(0, End::Code(1)) };
        let mut nodes: Vec<Vec<(Rank, i64)>> = vec![Vec::new(); 3];
        for ((rank, looks_own), node, at) in others {
            let at = i64::from(at);
            nodes[node as usize].push((rank, if looks_own { culprit_at + 1 + at % 100 } else { at }));
        }
        let place = place.min(nodes[home].len());
        nodes[home].insert(place, (culprit, culprit_at));
        let number = nodes[..home].iter().map(Vec::len).sum::<usize>() + place;
        for (node, skew) in nodes.iter_mut().zip(&skews) {
            let mut by_time: Vec<usize> = (0..node.len()).collect();
            by_time.sort_by_key(|&i| node[i].1);
            for (order, i) in by_time.into_iter().enumerate() {
                node[i].0.order = order + 1;
                node[i].1 += skew + 100;
            }
        }
        let nodes: Vec<Vec<(Rank, u32)>> = nodes
            .into_iter()
            .map(|node| node.into_iter().map(|(rank, at)| (rank, at as u32)).collect())
            .collect();
        let fault = found(&cluster(&nodes, MS * 40), None);
        prop_assert_eq!(fault.culprit, Culprit::Rank(number));
    }
}
