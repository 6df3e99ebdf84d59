//! Which rank failed first. Pure.
//!
//! The order of the ends alone is not enough: a process closes its sockets before its death can be seen, and
//! some libraries close them while the program is still unwinding, so a peer can notice, complain and end
//! earlier. What a rank says about its own end therefore counts before the order.

mod cluster;
mod reason;

pub use cluster::{Culprit, Fault, Hang, Lost, NodeEnds, Seen, first_failure};

use serde::{Deserialize, Serialize};
use std::time::Duration;
use tsm_job::exit;

use crate::class::words;
use crate::end::End;
use crate::supervisor::Rank;

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
    /// The signal of the stop ended it, but what it had written last is an error of its own: Python may take seconds
    /// from an exception to the end of the process, and its peers lose their connections before.
    LastWords,
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

/// The rank that failed first as far as its own node can tell, by its place in `ranks`.
pub fn first_on_node(ranks: &[Rank], words_of: impl Fn(usize) -> String) -> Option<usize> {
    match first_failure(&[alone(ranks)], None, words_of)?.culprit {
        Culprit::Rank(rank) => Some(rank),
        Culprit::Node { .. } | Culprit::Late { .. } => None,
    }
}

/// The ranks of one node by its own clock.
fn alone(ranks: &[Rank]) -> NodeEnds<'_> {
    let seen = ranks.iter().enumerate().map(|(number, rank)| Seen {
        number,
        rank,
        at: rank.first_at,
    });
    NodeEnds {
        host: "",
        ranks: seen.collect(),
        uncertainty: Duration::ZERO,
        lost: None,
    }
}

/// What gloo, NCCL and c10d print when the other end of a connection is gone.
pub const LOST_PEER: [&str; 10] = [
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
fn speaks_of_lost_peer(text: &str) -> bool {
    LOST_PEER.iter().any(|phrase| text.contains(phrase))
}

/// Whether the last error in `text` is neither a lost peer nor a stop.
fn tells_own_error(text: &str) -> bool {
    let lines: Vec<String> = text.lines().map(String::from).collect();
    let stop = ["KeyboardInterrupt", "SystemExit"];
    words::of_stderr(&lines).last().is_some_and(|last| {
        !speaks_of_lost_peer(text) && !stop.iter().any(|name| last.text.starts_with(name))
    })
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
        // One that announced a failure has not succeeded, whatever its code says.
        Some(end) if end.is_success() && rank.record.is_none() => Role::Succeeded,
        Some(_) if lost_peer => Role::LostPeer,
        Some(_) if own_record => {
            if rank.after_stop {
                Role::OwnError
            } else {
                Role::Origin
            }
        }
        Some(End::Code(exit::PEER)) => Role::LostPeer,
        // It saved, as it was asked to or by itself.
        Some(End::Code(exit::REQUEUE))
            if rank.saved_by_itself() || rank.sent.contains(&libc::SIGUSR2) =>
        {
            Role::Succeeded
        }
        // After a first signal it may have written its answer to that.
        Some(End::Signal(signal)) if rank.sent.first() == Some(&signal) => {
            match tells_own_error(&stderr()) {
                true => Role::LastWords,
                false => Role::Stopped,
            }
        }
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

#[cfg(test)]
pub mod tests {
    use super::*;
    use tsm_job::message::FailureRecord;

    pub fn rank(order: usize, end: End) -> Rank {
        Rank {
            end: Some(end),
            order,
            ..Rank::default()
        }
    }

    pub fn said(cause: &str, message: &str) -> Option<FailureRecord> {
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

    /// Who failed first among the ranks of one node.
    pub fn fault(ranks: &[Rank], words_of: impl Fn(usize) -> String) -> Option<Fault> {
        first_failure(&[alone(ranks)], None, words_of)
    }

    fn blamed(ranks: &[Rank]) -> Culprit {
        fault(ranks, |_| String::new()).unwrap().culprit
    }

    #[test]
    fn among_silent_deaths_the_first_counts() {
        assert_eq!(
            blamed(&[
                rank(2, End::Code(1)),
                rank(1, End::Code(17)),
                rank(3, End::Code(1))
            ]),
            Culprit::Rank(1)
        );
    }

    #[test]
    fn a_lost_peer_is_never_first_while_there_is_another() {
        let peer = rank(1, End::Code(exit::PEER));
        assert_eq!(
            blamed(&[peer.clone(), rank(2, End::Signal(libc::SIGSEGV))]),
            Culprit::Rank(1)
        );
        assert_eq!(blamed(std::slice::from_ref(&peer)), Culprit::Rank(0));
        let announced = Rank {
            record: said("peer", "rank 1 is gone"),
            ..rank(1, End::Code(1))
        };
        assert_eq!(
            blamed(&[announced, rank(2, End::Code(1))]),
            Culprit::Rank(1)
        );
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
        let words = |i| if i == 0 { gloo.clone() } else { String::new() };
        let found = fault(&ranks, words).unwrap();
        assert_eq!(found.culprit, Culprit::Rank(1));
        assert_eq!(
            found.reason,
            "rank 0 failed earlier, but by what it says it lost another rank"
        );
    }

    #[test]
    fn an_exception_counts_also_when_the_stop_was_faster_than_the_end_of_python() {
        let traceback =
            "Traceback (most recent call last):\n  File \"a.py\", line 1, in <module>\n";
        let raised = |what: &str| format!("{traceback}{what}\n");
        let peer = raised("RuntimeError: [pair.cc:598] Connection closed by peer [::1]:1");
        let stopped = |end, sent: &[i32]| Rank {
            after_stop: true,
            sent: sent.to_vec(),
            ..rank(2, end)
        };
        let ended = |raising: Rank, words: String| {
            let ranks = [rank(1, End::Code(1)), raising];
            let found = fault(&ranks, |i| [peer.clone(), words.clone()][i].clone()).unwrap();
            (found.culprit, found.reason)
        };
        let by_term = || stopped(End::Signal(15), &[15]);
        let (culprit, reason) = ended(by_term(), raised("ValueError: broken clip"));
        assert_eq!(culprit, Culprit::Rank(1));
        assert_eq!(
            reason,
            "rank 0 failed earlier, but by what it says it lost another rank"
        );
        // What it wrote after the first signal may be an answer; and not every traceback is a failure.
        for (raising, words) in [
            (
                stopped(End::Signal(9), &[15, 9]),
                raised("ValueError: broken clip"),
            ),
            (by_term(), raised("KeyboardInterrupt")),
            (by_term(), peer.clone()),
            (by_term(), "epoch 1".into()),
        ] {
            assert_eq!(ended(raising, words.clone()).0, Culprit::Rank(0), "{words}");
        }
        // One that failed by itself counts before.
        let ranks = [rank(1, End::Code(17)), by_term()];
        let found = fault(&ranks, |i| ["", &raised("ValueError: x")][i].into()).unwrap();
        assert_eq!(found.culprit, Culprit::Rank(0));
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
        let found = fault(&ranks, |_| {
            "download failed: Connection reset by peer\n".into()
        })
        .unwrap();
        assert_eq!(found.culprit, Culprit::Rank(0));
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
        assert_eq!(blamed(&ranks), Culprit::Rank(1));
    }

    #[test]
    fn a_record_is_a_failure_also_of_a_rank_that_ended_with_0() {
        let well = rank(1, End::Code(0));
        let announced = |cause: &str| Rank {
            record: said(cause, "index 7 out of range"),
            ..rank(2, End::Code(0))
        };
        assert_eq!(
            blamed(&[well.clone(), announced("error")]),
            Culprit::Rank(1)
        );
        assert_eq!(role(&announced("peer"), String::new), Role::LostPeer);
        assert!(well.has_succeeded() && !announced("error").is_well());
    }

    #[test]
    fn nobody_is_to_blame_for_success() {
        assert_eq!(fault(&[rank(1, End::Code(0))], |_| String::new()), None);
    }
}
