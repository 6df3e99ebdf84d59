//! Why a rank is named first: a sentence that is true beside how and when every other rank ended.

use super::Role;
use super::cluster::{NodeEnds, Suspect, close};

/// When a rank showed its end, by its order on one node and by the clocks between two.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Before,
    /// The clocks cannot tell.
    Together,
    After,
}

/// `all` are the ranks of the job with their roles, `first` that of them which is named.
pub fn reason(nodes: &[NodeEnds], all: &[Suspect], first: &Suspect) -> String {
    let several = nodes.len() > 1;
    let name = |s: &Suspect| match several {
        true => format!("rank {} on {}", s.seen.number, nodes[s.node].host),
        false => format!("rank {}", s.seen.number),
    };
    let seen = |s: &&Suspect| !matches!(s.role, Role::Stuck | Role::NodeLost);
    let not_after: Vec<(&Suspect, When)> = all
        .iter()
        .filter(|s| s.seen.number != first.seen.number)
        .filter(seen)
        .map(|s| (s, when(nodes, s, first)))
        .filter(|(_, when)| *when != When::After)
        .collect();
    let mut clauses = Vec::new();
    for (role, when) in [
        (Role::LostPeer, When::Before),
        (Role::LostPeer, When::Together),
        (Role::OwnError, When::Before),
        (Role::OwnError, When::Together),
        (Role::OwnCode, When::Before),
        (Role::OwnCode, When::Together),
        (Role::LastWords, When::Before),
        (Role::LastWords, When::Together),
    ] {
        let alike = not_after
            .iter()
            .filter(|(s, at)| s.role == role && *at == when);
        let alike: Vec<&Suspect> = alike.map(|(s, _)| *s).collect();
        if role > first.role
            && let [one, rest @ ..] = alike.as_slice()
        {
            clauses.push(clause(&name(one), rest.len(), (role, when), first.role));
        }
    }
    let rivals = not_after.iter().filter(|(s, _)| s.role == first.role);
    let apart = |s: &Suspect| s.seen.at.abs_diff(first.seen.at);
    let rival = rivals.map(|(s, _)| *s).min_by_key(|s| apart(s));
    let unknown = all.iter().any(|s| s.role == Role::NodeLost);
    if rival.is_some() || unknown {
        clauses.insert(0, "no other rank is known to have failed before it".into());
    } else if not_after.is_empty() {
        clauses.push(match first.seen.rank.record {
            Some(_) => "it announced its failure before any other rank ended".into(),
            None if several => "its end came first".into(),
            None => "its end came first in the kernel's order".into(),
        });
    } else if clauses.is_empty() {
        // What else was before is no failure.
        clauses.push("no other rank failed before it".into());
    }
    if let Some(rival) = rival {
        let ms = apart(rival).as_secs_f64() * 1e3;
        clauses.push(format!(
            "{} ended within {ms:.1} ms of it, less than the clocks tell",
            name(rival)
        ));
    }
    clauses.join("; ")
}

/// Why ranks that failed no later than the one that is named are not named themselves.
fn clause(one: &str, more: usize, (role, when): (Role, When), first: Role) -> String {
    let who = match more {
        0 => one.to_string(),
        more => format!("{one} and {more} more"),
    };
    let at = match when {
        When::Together => "at about the same time",
        When::Before | When::After => "earlier",
    };
    let (they, were) = match more {
        0 => ("it", "was"),
        _ => ("they", "were"),
    };
    match role {
        Role::LostPeer if more == 0 => {
            format!("{who} failed {at}, but by what it says it lost another rank")
        }
        Role::LostPeer => format!("{who} failed {at}, but by what they say they lost another rank"),
        Role::OwnError => {
            format!("{who} told of an own error {at}, but while {they} {were} being stopped")
        }
        Role::LastWords => format!("{who} had told of an error {at}, but ended by the stop"),
        // The one that is named was being stopped too.
        _ if first == Role::OwnError => {
            format!("{who} ended {at} with an own code, but told of no error")
        }
        _ => format!("{who} ended {at} with an own code, but while {they} {were} being stopped"),
    }
}

fn when(nodes: &[NodeEnds], other: &Suspect, first: &Suspect) -> When {
    let is_before = match other.node == first.node {
        true => other.seen.rank.order < first.seen.rank.order,
        false if close(nodes, other, first) => return When::Together,
        false => other.seen.at < first.seen.at,
    };
    if is_before { When::Before } else { When::After }
}

#[cfg(test)]
mod tests;
