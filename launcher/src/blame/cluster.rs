//! The first failure of a job, over all its nodes.

use serde::{Deserialize, Serialize};
use std::time::Duration;

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
mod tests;
