//! The first failure, for people.

use std::fmt;

use super::{Failure, Other};
use crate::blame::Role;
use crate::class::Class;
use crate::cores::to_list;
use crate::end::End;
use crate::logs::TAIL_LINES;
use crate::text::ranks_named;

/// Lines about the other ranks in the text; failure.json has them all.
const MAX_OTHERS: usize = 16;
/// Of the failures before, so many of the first and of the last.
const MAX_EARLIER: usize = 8;

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error: {}", self.headline())?;
        writeln!(f, "  class: {}", self.class)?;
        if self.evidence_tells() {
            writeln!(f, "  evidence: {}", self.evidence)?;
        }
        if let Some(meaning) = &self.meaning {
            writeln!(f, "  meaning: {meaning}")?;
        }
        self.fmt_place(f)?;
        if let Some(message) = &self.message {
            let cause = self.cause.as_deref().unwrap_or("error");
            writeln!(
                f,
                "  {cause}: {}",
                message.trim_end().replace('\n', "\n    ")
            )?;
        }
        if let Some(stacks) = &self.stacks {
            writeln!(f, "  stacks:")?;
            for line in stacks.trim_end().lines() {
                writeln!(f, "    | {line}")?;
            }
        }
        self.fmt_stderr(f)?;
        if !self.others.is_empty() {
            writeln!(f, "  named first because {}; the others:", self.reason)?;
            self.fmt_others(f)?;
        }
        self.fmt_earlier(f)?;
        write!(f, "  hint: {}", self.hint)
    }
}

impl Failure {
    pub fn headline(&self) -> String {
        match self.rank {
            None => format!("node {} was lost first: {}", self.host, self.evidence),
            Some(_) if self.late.len() > 1 => {
                format!("ranks {} hang: no step for too long", to_list(&self.late))
            }
            Some(rank) if !self.late.is_empty() => {
                format!("rank {rank} hangs: no step for too long")
            }
            Some(rank) => {
                let end = match self.end {
                    None => "it could not be ended".into(),
                    Some(end) if self.was_stopped && self.evidence.is_empty() => {
                        format!("it said so, and was stopped: {end}")
                    }
                    // Its end is our own doing.
                    Some(_) if self.was_stopped => self.evidence.clone(),
                    // Only an announcement makes it a failure.
                    Some(end) if end.is_success() => format!("it said so, and ended with {end}"),
                    Some(end) => end.to_string(),
                };
                format!("rank {rank} failed first: {end}")
            }
        }
    }

    /// Whether the evidence is not said elsewhere in the text.
    fn evidence_tells(&self) -> bool {
        let in_end = self.was_stopped
            || self
                .end
                .is_some_and(|end| self.evidence.starts_with(&end.to_string()));
        let in_message = self
            .message
            .as_ref()
            .is_some_and(|m| m.trim().starts_with(&self.evidence));
        let in_stderr = self
            .stderr
            .last()
            .is_some_and(|last| last.trim() == self.evidence);
        let hung = self.class == Class::Hang && !self.late.is_empty();
        self.rank.is_some() && !hung && !in_end && !in_message && !in_stderr
    }

    fn fmt_place(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  where: host {}", self.host)?;
        match (&self.device, self.pid) {
            (Some(device), Some(pid)) => write!(f, ", {device}, pid {pid}")?,
            _ => {
                let of_node = self.others.iter();
                let of_node = of_node.filter(|o| o.node_rank == self.node_rank);
                let ranks: Vec<usize> = of_node.map(|o| o.rank).collect();
                if !ranks.is_empty() {
                    write!(f, ", {}", ranks_named(&ranks))?;
                }
            }
        }
        write!(f, "\n  when: {:.1} s after the start", self.after_ms / 1e3)?;
        if let Some(step) = self.step {
            write!(f, ", last finished step {step}")?;
        }
        if let Some(section) = &self.section {
            write!(f, ", in section {section}")?;
        }
        writeln!(f)
    }

    fn fmt_stderr(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(file) = &self.stderr_file else {
            return Ok(());
        };
        if self.stderr.is_empty() {
            return writeln!(f, "  stderr: empty ({})", file.display());
        }
        let upto = if self.stderr.len() == TAIL_LINES {
            format!("last {TAIL_LINES} lines of ")
        } else {
            String::new()
        };
        writeln!(f, "  {upto}stderr ({}):", file.display())?;
        for line in &self.stderr {
            writeln!(f, "    | {line}")?;
        }
        Ok(())
    }

    fn fmt_earlier(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.earlier.is_empty() {
            writeln!(f, "  failed before, and was started again:")?;
        }
        let left_out = match self.earlier.len().saturating_sub(2 * MAX_EARLIER) {
            // A line for a line.
            1 => 0,
            more => more,
        };
        for (i, incident) in self.earlier.iter().enumerate() {
            match i.checked_sub(MAX_EARLIER) {
                Some(0) if left_out > 0 => {
                    writeln!(f, "    and {left_out} more, see failure.json")?;
                }
                Some(n) if n < left_out => {}
                _ => writeln!(
                    f,
                    "    {:.1} s after the start: {incident}",
                    incident.at.as_secs_f64()
                )?,
            }
        }
        Ok(())
    }

    /// One line for all ranks that ended alike.
    fn fmt_others(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one_host = self.others.iter().all(|other| other.host == self.host);
        type Alike<'a> = (String, &'a str, bool);
        let mut groups: Vec<(Alike, Vec<&Other>)> = Vec::new();
        for other in &self.others {
            let host = if one_host || is_usual(other.role) {
                ""
            } else {
                &other.host
            };
            let key = (how_it_ended(other), host, is_unsure(other));
            match groups.iter_mut().find(|(have, _)| *have == key) {
                Some((_, members)) => members.push(other),
                None => groups.push((key, vec![other])),
            }
        }
        for ((text, ..), members) in groups.iter().take(MAX_OTHERS) {
            let ranks: Vec<usize> = members.iter().map(|o| o.rank).collect();
            let hosts = if one_host {
                String::new()
            } else {
                on_hosts(members)
            };
            writeln!(
                f,
                "    {}{hosts}: {text}{}",
                ranks_named(&ranks),
                when(members)
            )?;
        }
        match groups.len().saturating_sub(MAX_OTHERS) {
            0 => Ok(()),
            more => writeln!(f, "    and {more} more such lines, see failure.json"),
        }
    }
}

/// Ends that say nothing about the host.
fn is_usual(role: Role) -> bool {
    matches!(
        role,
        Role::Succeeded | Role::Stopped | Role::LostPeer | Role::NodeLost
    )
}

fn how_it_ended(other: &Other) -> String {
    let end = other.end.map_or(String::new(), |end| end.to_string());
    match other.role {
        Role::Succeeded if !other.end.is_some_and(End::is_success) => {
            format!("saved and ended: {end}")
        }
        // Whether it was done, or has only obeyed, nobody knows.
        Role::Succeeded if other.was_told => format!("stopped by the launcher: {end}"),
        Role::Succeeded => "succeeded".into(),
        Role::Stopped => format!("stopped by the launcher: {end}"),
        Role::LostPeer => format!("lost another rank: {end}"),
        Role::Origin | Role::OwnCode => end,
        Role::OwnError if other.end.is_none() => {
            "had an error of its own, and could not be ended".into()
        }
        Role::OwnError => format!("had an error of its own: {end}"),
        Role::LastWords => format!("had told of an error, and was stopped by the launcher: {end}"),
        Role::Stuck => {
            let state = other.stuck_in.as_deref().unwrap_or("state unknown");
            format!("did not end after SIGKILL, {state}")
        }
        Role::NodeLost => "on a node that was lost; its end is not known".into(),
    }
}

fn on_hosts(members: &[&Other]) -> String {
    let mut hosts: Vec<&str> = members.iter().map(|o| o.host.as_str()).collect();
    hosts.sort_unstable();
    hosts.dedup();
    match hosts.as_slice() {
        [host] => format!(" on {host}"),
        hosts => format!(" on {} hosts", hosts.len()),
    }
}

/// Whether the clocks do not tell if it ended before the failure or after.
fn is_unsure(other: &Other) -> bool {
    other.after_ms.abs() <= other.unsure_ms && other.unsure_ms > 0.0
}

/// `, 3.1 to 8.9 ms after`. The ends of all `members` are sure, or of none.
fn when(members: &[&Other]) -> String {
    if matches!(members[0].role, Role::Stuck | Role::NodeLost) {
        return String::new();
    }
    let after = members.iter().map(|o| o.after_ms);
    let first = after.clone().fold(f64::INFINITY, f64::min);
    let last = after.fold(f64::NEG_INFINITY, f64::max);
    let shown = |ms: f64| format!("{:.1}", ms.abs());
    if is_unsure(members[0]) {
        let most = shown(first.abs().max(last.abs()));
        return format!(", within {most} ms of it, less than the clocks tell");
    }
    let range = |from: f64, to: f64| match (shown(from), shown(to)) {
        (from, to) if from == to => from,
        (from, to) => format!("{from} to {to}"),
    };
    match (first < 0.0, last < 0.0) {
        (true, false) => format!(", {} ms before to {} ms after", shown(first), shown(last)),
        (true, true) => format!(", {} ms before", range(last, first)),
        _ => format!(", {} ms after", range(first, last)),
    }
}
