//! Which rank failed first. Pure.
//!
//! The order of the ends alone is not enough: a process closes its sockets before its death can be seen, and
//! some libraries close them while the program is still unwinding, so a peer can notice, complain and end
//! earlier. What a rank says about its own end therefore counts before the order.

use serde::{Deserialize, Serialize};
use std::time::Duration;
use tsm_job::exit;

use crate::end::End;
use crate::supervisor::Rank;

/// The rank that failed first, and how that is known.
#[derive(Clone, Debug, PartialEq)]
pub struct Blame {
    pub rank: usize,
    pub reason: String,
}

/// How an end stands to the first failure, the likeliest origin first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It failed by itself before the launcher stopped anything, or by a signal the launcher did not send.
    Origin,
    /// It was being stopped, but had an error of its own to tell.
    OwnError,
    /// It was being stopped, and left by a code that is no answer to a signal.
    OwnCode,
    /// It says that it lost another rank.
    LostPeer,
    /// It ended because the launcher told it to.
    Stopped,
    Succeeded,
    /// It could not be ended.
    Stuck,
    /// Its node was lost, and its end is not known.
    NodeLost,
}

/// What gloo, NCCL and c10d print when the other end of a connection is gone.
const LOST_PEER: [&str; 10] = [
    "ncclRemoteError",
    "remote process exited or there was a network error",
    "NCCL communicator was aborted",
    "Connection closed by peer [",
    "Connection reset by peer [",
    "Broken pipe [",
    "failed to recv, got 0 bytes",
    "Connection was likely closed",
    // Older gloo: `[.../transport/tcp/pair.cc:589] Read error [10.0.0.2]:25266: Connection reset by peer`.
    "] Read error [",
    "] Write error [",
];

/// Whether `text` holds what a collective library prints when a peer has gone.
pub fn speaks_of_lost_peer(text: &str) -> bool {
    LOST_PEER.iter().any(|phrase| text.contains(phrase))
}

/// How the end of `rank` stands to the first failure.
pub fn role(rank: &Rank, stderr: impl FnOnce() -> String) -> Role {
    let own_record = rank
        .record
        .as_ref()
        .is_some_and(|r| r.cause != "peer" && !speaks_of_lost_peer(&r.message));
    let lost_peer = rank.record.is_some() && !own_record;
    match rank.end {
        None if own_record => Role::OwnError,
        None => Role::Stuck,
        Some(end) if end.is_success() => Role::Succeeded,
        Some(_) if lost_peer => Role::LostPeer,
        Some(_) if own_record => {
            if rank.after_stop {
                Role::OwnError
            } else {
                Role::Origin
            }
        }
        Some(End::Code(exit::PEER)) => Role::LostPeer,
        Some(End::Signal(signal)) if rank.sent.contains(&signal) => Role::Stopped,
        // An abort is how collective libraries end a process that lost a peer; other signals come from elsewhere.
        Some(End::Signal(signal)) if signal != libc::SIGABRT => Role::Origin,
        Some(_) if speaks_of_lost_peer(&stderr()) => Role::LostPeer,
        Some(_) if !rank.after_stop => Role::Origin,
        Some(end) if answers_a_signal(end, &rank.sent) => Role::Stopped,
        Some(_) => Role::OwnCode,
    }
}

/// Codes with which programs leave when they are told to: 128 + the signal, or "saved".
fn answers_a_signal(end: End, sent: &[i32]) -> bool {
    let shell = |signal: &i32| end == End::Code(exit::SIGNAL_BASE + signal);
    end == End::Code(exit::REQUEUE) || sent.iter().any(shell)
}

/// The rank that failed first; `None` when none failed. `stderr_of` gives the end of a rank's stderr.
pub fn first_failure(ranks: &[Rank], stderr_of: impl Fn(usize) -> String) -> Option<Blame> {
    let roles: Vec<Role> = ranks
        .iter()
        .enumerate()
        .map(|(i, rank)| role(rank, || stderr_of(i)))
        .collect();
    let failed = |&i: &usize| roles[i] < Role::Succeeded;
    let rank = (0..ranks.len())
        .filter(failed)
        .min_by_key(|&i| (roles[i], ranks[i].order))?;
    let earlier: Vec<usize> = (0..ranks.len())
        .filter(|i| failed(i) && ranks[*i].order < ranks[rank].order)
        .collect();
    let reason = if !earlier.is_empty() {
        let names: Vec<String> = earlier.iter().map(usize::to_string).collect();
        format!(
            "rank {} ended earlier, but by what they say they lost another rank",
            names.join(", ")
        )
    } else if ranks[rank].record.is_some() {
        "it announced its failure before any rank ended".into()
    } else {
        "its end came first in the kernel's order".into()
    };
    Some(Blame { rank, reason })
}

/// Who failed first in a job over several nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Culprit {
    Rank(usize),
    /// The node was lost, and no rank is known to have failed before.
    Node {
        host: String,
        how: String,
        /// It was given up.
        at: Duration,
    },
    /// These ranks did not step; not empty.
    Late {
        ranks: Vec<usize>,
        /// It was found.
        at: Duration,
    },
}

/// A culprit, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub culprit: Culprit,
    pub reason: String,
}

impl From<Blame> for Fault {
    fn from(blame: Blame) -> Fault {
        Fault {
            culprit: Culprit::Rank(blame.rank),
            reason: blame.reason,
        }
    }
}

/// What is known of one node, all times on the coordinator's clock.
#[derive(Clone, Debug)]
pub struct NodeEnds<'a> {
    pub host: &'a str,
    /// In order of rank; `order` counts within the node. Empty where the node was lost before it told.
    pub ranks: Vec<Seen<'a>>,
    /// How far its times may be off: half the shortest round trip.
    pub uncertainty: Duration,
    pub lost: Option<Lost<'a>>,
}

/// One rank of a node.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// Number in the job.
    pub number: usize,
    pub rank: &'a Rank,
    /// When the first sign of its end came, the one that [`Rank::order`] counts.
    pub at: Duration,
}

/// How a node went.
#[derive(Clone, Copy, Debug)]
pub struct Lost<'a> {
    /// It was heard for the last time.
    pub heard: Duration,
    /// The coordinator gave it up.
    pub given_up: Duration,
    pub how: &'a str,
}

/// The job was stopped because ranks made no step.
#[derive(Clone, Debug)]
pub struct Hang {
    pub at: Duration,
    pub late: Vec<usize>,
}

/// A rank that may be the first, with its node.
#[derive(Clone, Copy)]
struct Suspect<'a> {
    seen: Seen<'a>,
    role: Role,
    node: usize,
}

impl Suspect<'_> {
    /// It told of an error of its own, or was ended by a signal that no consequence brings.
    fn is_certain(&self) -> bool {
        let rank = self.seen.rank;
        self.role == Role::Origin && (rank.record.is_some() || rank.end.is_some_and(was_killed))
    }
}

fn was_killed(end: End) -> bool {
    matches!(end, End::Signal(signal) if signal != libc::SIGABRT)
}

/// Who failed first in a job over several nodes; `None` when nobody did. `words_of` gives the end of a rank's stderr.
///
/// Within a node the kernel's order counts, between nodes the time; before both, what a rank says about its own end. A
/// lost node is to blame unless a rank failed by itself before. A hang is, unless something failed before it was
/// found: what a stopped rank says then is its answer to the stop.
pub fn first_failure_of_cluster(
    nodes: &[NodeEnds],
    hang: Option<&Hang>,
    words_of: impl Fn(usize) -> String,
) -> Option<Fault> {
    let suspects: Vec<Suspect> = nodes
        .iter()
        .enumerate()
        .flat_map(|(n, node)| suspects_of(n, node, &words_of))
        .collect();
    let first = first_suspect(nodes, &suspects);
    let lost = nodes
        .iter()
        .filter_map(|n| Some((n, n.lost?)))
        .min_by_key(|(_, l)| l.given_up);
    let found = hang.filter(|h| !h.late.is_empty());
    let origin = first.filter(|s| s.role == Role::Origin);
    if let Some((node, lost)) = lost
        && !origin.is_some_and(|o| precedes_loss(&o, &nodes[o.node], node.host, &lost))
        && found.is_none_or(|h| lost.heard <= h.at)
    {
        return Some(Fault {
            culprit: Culprit::Node {
                host: node.host.into(),
                how: lost.how.into(),
                at: lost.given_up,
            },
            reason: "no rank is known to have failed by itself before".into(),
        });
    }
    if let Some(hang) = found
        && origin.is_none_or(|o| o.seen.at > hang.at)
    {
        return Some(Fault {
            culprit: Culprit::Late {
                ranks: hang.late.clone(),
                at: hang.at,
            },
            reason: "the others had come further, and nothing had failed when it was found".into(),
        });
    }
    let first = first?;
    Some(Fault {
        culprit: Culprit::Rank(first.seen.number),
        reason: reason(nodes, &suspects, &first),
    })
}

fn suspects_of<'a>(
    index: usize,
    node: &NodeEnds<'a>,
    words_of: &impl Fn(usize) -> String,
) -> Vec<Suspect<'a>> {
    // What a rank announced before its node was lost came before any stop.
    let role = |seen: &Seen| match role(seen.rank, || words_of(seen.number)) {
        Role::Stuck if node.lost.is_some() => Role::NodeLost,
        Role::OwnError if seen.rank.end.is_none() && !seen.rank.after_stop => Role::Origin,
        role => role,
    };
    let suspects = node.ranks.iter().map(|&seen| Suspect {
        seen,
        role: role(&seen),
        node: index,
    });
    suspects.filter(|s| s.role < Role::Succeeded).collect()
}

/// The likeliest suspect of each node by its own order, then of these the first in time. Where the clocks cannot tell
/// two apart, the one that is certain counts.
fn first_suspect<'a>(nodes: &[NodeEnds], suspects: &[Suspect<'a>]) -> Option<Suspect<'a>> {
    let of_node = |n: usize| {
        suspects
            .iter()
            .filter(move |s| s.node == n)
            .min_by_key(|s| (s.role, s.seen.rank.order))
            .copied()
    };
    let firsts: Vec<Suspect> = (0..nodes.len()).filter_map(of_node).collect();
    let role = firsts.iter().map(|s| s.role).min()?;
    let alike = || firsts.iter().filter(move |s| s.role == role);
    let earliest = alike().min_by_key(|s| s.seen.at)?;
    alike()
        .filter(|s| close(nodes, s, earliest))
        .min_by_key(|s| (!s.is_certain(), s.seen.at))
        .copied()
}

/// Whether the clocks cannot tell which of two was first.
fn close(nodes: &[NodeEnds], one: &Suspect, other: &Suspect) -> bool {
    let apart = one.seen.at.abs_diff(other.seen.at);
    one.node == other.node || apart <= nodes[one.node].uncertainty + nodes[other.node].uncertainty
}

/// Whether `origin` failed before a node was lost: on that node whenever it told; elsewhere before the node was heard
/// for the last time, and with certainty also as long as nobody had noticed the loss.
fn precedes_loss(origin: &Suspect, node: &NodeEnds, lost_host: &str, lost: &Lost) -> bool {
    let at = origin.seen.at;
    let before_last_word = at + node.uncertainty < lost.heard;
    node.host == lost_host || before_last_word || (origin.is_certain() && at <= lost.given_up)
}

fn reason(nodes: &[NodeEnds], suspects: &[Suspect], first: &Suspect) -> String {
    let several = nodes.len() > 1;
    let name = |s: &Suspect| match several {
        true => format!("{} on {}", s.seen.number, nodes[s.node].host),
        false => s.seen.number.to_string(),
    };
    let earlier = |s: &&Suspect| match s.node == first.node {
        true => s.seen.rank.order < first.seen.rank.order,
        false => s.seen.at < first.seen.at,
    };
    let misled: Vec<&Suspect> = suspects
        .iter()
        .filter(|s| s.role > first.role)
        .filter(earlier)
        .collect();
    let mut reason = match misled.as_slice() {
        [] if first.seen.rank.record.is_some() => {
            "it announced its failure before any rank ended".to_string()
        }
        [] if several => "its end came first".into(),
        [] => "its end came first in the kernel's order".into(),
        [one] => format!(
            "rank {} ended earlier, but by what it says it lost another rank",
            name(one)
        ),
        [one, rest @ ..] => format!(
            "rank {} and {} more ended earlier, but by what they say they lost another rank",
            name(one),
            rest.len()
        ),
    };
    let rivals = suspects
        .iter()
        .filter(|s| s.node != first.node && s.role == first.role && close(nodes, s, first));
    if let Some(rival) = rivals.min_by_key(|s| s.seen.at.abs_diff(first.seen.at)) {
        let apart = rival.seen.at.abs_diff(first.seen.at).as_secs_f64() * 1e3;
        reason += &format!(
            "; rank {} ended within {apart:.1} ms of it, less than the clocks tell",
            name(rival)
        );
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;
    use tsm_job::message::FailureRecord;

    fn rank(order: usize, end: End) -> Rank {
        Rank {
            end: Some(end),
            order,
            ..Rank::default()
        }
    }

    fn said(cause: &str, message: &str) -> Option<FailureRecord> {
        let (cause, message) = (cause.into(), message.into());
        Some(FailureRecord {
            rank: 0,
            step: None,
            code: 1,
            cause,
            message,
            backtrace: None,
        })
    }

    fn blamed(ranks: &[Rank]) -> usize {
        first_failure(ranks, |_| String::new()).unwrap().rank
    }

    #[test]
    fn among_silent_deaths_the_first_counts() {
        assert_eq!(
            blamed(&[
                rank(2, End::Code(1)),
                rank(1, End::Code(17)),
                rank(3, End::Code(1))
            ]),
            1
        );
    }

    #[test]
    fn a_lost_peer_is_never_first_while_there_is_another() {
        let peer = rank(1, End::Code(exit::PEER));
        assert_eq!(
            blamed(&[peer.clone(), rank(2, End::Signal(libc::SIGSEGV))]),
            1
        );
        assert_eq!(blamed(std::slice::from_ref(&peer)), 0);
        let announced = Rank {
            record: said("peer", "rank 1 is gone"),
            ..rank(1, End::Code(1))
        };
        assert_eq!(blamed(&[announced, rank(2, End::Code(1))]), 1);
    }

    #[test]
    fn a_death_that_became_visible_late_is_still_the_origin() {
        // The launcher sent SIGTERM, but the rank was already dying of a SIGKILL from elsewhere.
        let late = Rank {
            after_stop: true,
            sent: vec![libc::SIGTERM],
            ..rank(2, End::Signal(libc::SIGKILL))
        };
        let gloo =
            "RuntimeError: [transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"
                .to_string();
        let ranks = [rank(1, End::Code(1)), late];
        let found = first_failure(
            &ranks,
            |i| if i == 0 { gloo.clone() } else { String::new() },
        )
        .unwrap();
        assert_eq!(found.rank, 1);
        assert!(
            found.reason.starts_with("rank 0 ended earlier"),
            "{}",
            found.reason
        );
    }

    #[test]
    fn an_ordinary_reset_in_the_log_accuses_nobody() {
        let ranks = [
            rank(1, End::Code(1)),
            Rank {
                after_stop: true,
                ..rank(2, End::Code(1))
            },
        ];
        let found = first_failure(&ranks, |_| {
            "download failed: Connection reset by peer\n".into()
        })
        .unwrap();
        assert_eq!(found.rank, 0);
    }

    #[test]
    fn ends_that_the_launcher_asked_for_are_not_failures_of_their_own() {
        for (end, sent) in [
            (End::Signal(15), 15),
            (End::Signal(9), 9),
            (End::Code(143), 15),
            (End::Code(75), 15),
        ] {
            let stopped = Rank {
                after_stop: true,
                sent: vec![sent],
                ..rank(2, end)
            };
            assert_eq!(role(&stopped, String::new), Role::Stopped, "{end}");
        }
        let own = Rank {
            after_stop: true,
            sent: vec![15],
            ..rank(2, End::Code(17))
        };
        assert_eq!(role(&own, String::new), Role::OwnCode);
    }

    #[test]
    fn a_record_counts_from_the_moment_it_was_sent() {
        let mut ranks = [rank(2, End::Code(1)), rank(1, End::Code(1))];
        ranks[1].record = said("panic", "boom");
        assert_eq!(blamed(&ranks), 1);
    }

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
        first_failure_of_cluster(nodes, hang, |_| String::new()).unwrap()
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
            "its end came first; rank 2 on gpu-1 ended within 4.0 ms of it, less than the clocks tell"
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
            "rank 0 on gpu-0 and 1 more ended earlier, but by what they say they lost another rank"
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
    fn one_node_is_judged_as_before() {
        let ranks = [rank(2, End::Code(1)), rank(1, End::Code(17)), stopped(3)];
        let alone = [ranks.iter().cloned().zip([2, 1, 3]).collect::<Vec<_>>()];
        let expected = first_failure(&ranks, |_| String::new()).unwrap();
        assert_eq!(found(&cluster(&alone, MS), None), Fault::from(expected));
        let quiet = [vec![(rank(1, End::Code(0)), 1)]];
        assert_eq!(
            first_failure_of_cluster(&cluster(&quiet, MS), None, |_| String::new()),
            None
        );
    }

    use proptest::prelude::*;

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
                nodes[node as usize].push((rank, if looks_own { culprit_at + 1 + at } else { at }));
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

    #[test]
    fn nobody_is_to_blame_for_success() {
        assert_eq!(
            first_failure(&[rank(1, End::Code(0))], |_| String::new()),
            None
        );
    }
}
