//! The first failure of a job, over all its nodes.

use serde::{Deserialize, Serialize};
use std::time::Duration;

use super::reason::reason;
use super::{Role, role};
use crate::end::End;
use crate::supervisor::Rank;

/// Who failed first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Culprit {
    Rank(usize),
    /// The node was lost, and no rank is known to have failed before.
    Node {
        /// Its place among the nodes of the job.
        node: usize,
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

/// A rank with how its end stands to the others, and its node.
#[derive(Clone, Copy)]
pub(super) struct Suspect<'a> {
    pub seen: Seen<'a>,
    pub role: Role,
    pub node: usize,
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

/// Who failed first in a job of one node or several; `None` when nobody did. `words_of` gives the end of a rank's stderr.
///
/// Within a node the kernel's order counts, between nodes the time; before both, what a rank says about its own end. A
/// lost node is to blame unless a rank failed by itself before. A hang is, unless something failed before it was
/// found: what a stopped rank says then is its answer to the stop.
pub fn first_failure(
    nodes: &[NodeEnds],
    hang: Option<&Hang>,
    words_of: impl Fn(usize) -> String,
) -> Option<Fault> {
    let all: Vec<Suspect> = nodes
        .iter()
        .enumerate()
        .flat_map(|(n, node)| roles_of(n, node, &words_of))
        .collect();
    let first = first_suspect(nodes, &all);
    let lost = nodes
        .iter()
        .enumerate()
        .filter_map(|(n, node)| Some((n, node.host, node.lost?)))
        .min_by_key(|(_, _, l)| l.given_up);
    let found = hang.filter(|h| !h.late.is_empty());
    let origin = first.filter(|s| s.role == Role::Origin);
    if let Some((node, host, lost)) = lost
        && !origin.is_some_and(|o| precedes_loss(&o, &nodes[o.node], node, &lost))
        && found.is_none_or(|h| lost.heard <= h.at)
    {
        let reason = match origin.filter(|o| o.seen.at <= lost.given_up) {
            None => "no rank is known to have failed by itself before".into(),
            Some(o) => format!(
                "rank {} on {} failed before the loss was noticed, but perhaps because of it",
                o.seen.number, nodes[o.node].host
            ),
        };
        let (host, how, at) = (host.into(), lost.how.into(), lost.given_up);
        let culprit = Culprit::Node {
            node,
            host,
            how,
            at,
        };
        return Some(Fault { culprit, reason });
    }
    if let Some(hang) = found
        && origin.is_none_or(|o| o.seen.at > hang.at)
    {
        return Some(Fault {
            culprit: Culprit::Late {
                ranks: hang.late.clone(),
                at: hang.at,
            },
            reason: "nothing had failed when the hang was found".into(),
        });
    }
    let first = first?;
    Some(Fault {
        culprit: Culprit::Rank(first.seen.number),
        reason: reason(nodes, &all, &first),
    })
}

fn roles_of<'a>(
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
    let suspect = |&seen: &Seen<'a>| Suspect {
        seen,
        role: role(&seen),
        node: index,
    };
    node.ranks.iter().map(suspect).collect()
}

/// The likeliest failure of each node by its own order, then of these the first in time. Among those that none surely
/// precedes, the one that is certain counts.
fn first_suspect<'a>(nodes: &[NodeEnds], all: &[Suspect<'a>]) -> Option<Suspect<'a>> {
    let of_node = |n: usize| {
        all.iter()
            .filter(|s| s.role < Role::Succeeded)
            .filter(move |s| s.node == n)
            .min_by_key(|s| (s.role, s.seen.rank.order))
            .copied()
    };
    let firsts: Vec<Suspect> = (0..nodes.len()).filter_map(of_node).collect();
    let role = firsts.iter().map(|s| s.role).min()?;
    let alike = || firsts.iter().filter(move |s| s.role == role);
    let surely_later = |s: &&Suspect| {
        let before = |o: &Suspect| o.seen.at < s.seen.at && !close(nodes, o, s);
        alike().any(before)
    };
    alike()
        .filter(|s| !surely_later(s))
        .min_by_key(|s| (!s.is_certain(), s.seen.at))
        .copied()
}

/// Whether the clocks cannot tell which of two was first.
pub(super) fn close(nodes: &[NodeEnds], one: &Suspect, other: &Suspect) -> bool {
    let apart = one.seen.at.abs_diff(other.seen.at);
    one.node == other.node || apart <= nodes[one.node].uncertainty + nodes[other.node].uncertainty
}

/// Whether `origin` failed before a node was lost: on that node whenever it told; elsewhere before the node was heard
/// for the last time, and with certainty also as long as nobody had noticed the loss.
fn precedes_loss(origin: &Suspect, node: &NodeEnds, lost_node: usize, lost: &Lost) -> bool {
    let at = origin.seen.at;
    let before_last_word = at + node.uncertainty < lost.heard;
    origin.node == lost_node || before_last_word || (origin.is_certain() && at <= lost.given_up)
}

#[cfg(test)]
mod tests;
