//! The first failure, for people (stderr) and for programs (failure.json).

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::blame::{Culprit, Fault, Role, role};
use crate::class::{self, Again, Class, Facts, classify};
use crate::cluster::policy::Incident;
use crate::cores::to_list;
use crate::end::End;
use crate::logs::{TAIL_LINES, read_small};
use crate::supervisor::Rank;

/// What the launcher knows about each rank besides its end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Place {
    pub host: String,
    pub device: String,
    pub pid: i32,
    pub stderr_file: PathBuf,
    pub error_file: PathBuf,
    /// The message in torch's error file.
    #[serde(default)]
    pub exception: Option<String>,
    pub stderr: Vec<String>,
    /// State of a process that SIGKILL did not end.
    pub stuck_in: Option<String>,
}

/// The first failure of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    pub run_id: String,
    /// The rank to blame; of ranks that hang the first; `None` for a lost node.
    pub rank: Option<usize>,
    /// Ranks that made no step.
    pub late: Vec<usize>,
    pub host: String,
    pub device: Option<String>,
    pub pid: Option<i32>,
    pub end: Option<End>,
    /// The launcher's exit code.
    pub exit_code: i32,
    pub class: Class,
    pub again: Again,
    /// The line that tells, or how it ended.
    pub evidence: String,
    /// Equal for two failures of the same cause.
    pub signature: String,
    /// Milliseconds from the start of the launcher to the end of the rank.
    pub after_ms: f64,
    pub step: Option<u64>,
    pub section: Option<String>,
    /// What usually stands behind such an end.
    pub meaning: Option<String>,
    /// `panic`, `error` or `peer` from a failure record; `exception` from torch's error file.
    pub cause: Option<String>,
    pub message: Option<String>,
    pub backtrace: Option<String>,
    /// Why this rank and no other is named.
    pub reason: String,
    /// The last lines.
    pub stderr: Vec<String>,
    pub stderr_file: Option<PathBuf>,
    /// What the ranks that hang were doing.
    pub stacks: Option<String>,
    pub others: Vec<Other>,
    /// What was answered by a restart, the first first.
    pub earlier: Vec<Incident>,
    pub hint: String,
}

/// How another rank ended.
#[derive(Clone, Debug, Serialize)]
pub struct Other {
    pub rank: usize,
    pub host: String,
    pub end: Option<End>,
    pub role: Role,
    /// Milliseconds after the first failure; negative where it ended before.
    pub after_ms: f64,
    pub stuck_in: Option<String>,
}

/// What is said of the run as a whole.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub id: &'a str,
    pub dir: &'a Path,
    pub exit_code: i32,
    /// Processes that the kernel's out-of-memory killer ended meanwhile on the machine of the culprit.
    pub oom_kills: u64,
    /// Lines of the kernel's log about GPUs of that machine.
    pub xids: &'a [String],
    /// Hosts that were lost.
    pub lost: &'a [String],
    /// Of ranks that hang.
    pub stacks: Option<&'a str>,
    pub earlier: &'a [Incident],
    /// The command that continues the run, where the workers know how to.
    pub resume: Option<&'a str>,
}

/// All a rank said about its end: torch's error file and the end of its stderr.
pub fn own_words(place: &Place) -> String {
    let exception = place.exception.as_deref().unwrap_or_default();
    format!("{exception}\n{}", place.stderr.join("\n"))
}

/// What is known of the culprit besides the texts.
struct Subject<'a> {
    number: Option<usize>,
    late: &'a [usize],
    host: &'a str,
    lost: Option<&'a str>,
    at: Duration,
}

impl Subject<'_> {
    fn of<'a>(culprit: &'a Culprit, ranks: &[Rank], places: &'a [Place]) -> Subject<'a> {
        match culprit {
            Culprit::Rank(rank) => Subject {
                number: Some(*rank),
                late: &[],
                host: &places[*rank].host,
                lost: None,
                at: ranks[*rank].ended_at,
            },
            Culprit::Node { host, how, at } => Subject {
                number: None,
                late: &[],
                host,
                lost: Some(how),
                at: *at,
            },
            Culprit::Late { ranks: late, at } => Subject {
                number: late.first().copied(),
                late,
                host: late.first().map_or("", |&rank| &places[rank].host),
                lost: None,
                at: *at,
            },
        }
    }
}

/// Puts together what is known about the failure that `fault` names. `ranks` and `places` are those of the whole job,
/// with all times on one clock.
///
/// # Panics
/// If `fault` names a rank that is not there.
pub fn failure(run: &Run, fault: &Fault, ranks: &[Rank], places: &[Place]) -> Failure {
    let subject = Subject::of(&fault.culprit, ranks, places);
    let (rank, place) = (
        subject.number.map(|n| &ranks[n]),
        subject.number.map(|n| &places[n]),
    );
    let record = rank.and_then(|rank| rank.record.as_ref());
    let end = rank.and_then(|rank| rank.end);
    let exception = place.and_then(|place| place.exception.clone());
    let facts = Facts {
        end,
        record,
        exception: exception.as_deref(),
        stderr: place.map_or(&[], |place| &place.stderr),
        oom_kills: run.oom_kills,
        xids: run.xids,
        node_lost: subject.lost,
        hung: !subject.late.is_empty(),
        sent: rank.map_or(&[], |rank| &rank.sent),
    };
    let verdict = classify(&facts);
    let signature = class::signature(&verdict, &facts);
    let ms = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
    let others =
        (0..ranks.len()).filter(|i| Some(*i) != subject.number && !subject.late.contains(i));
    let others = others.map(|i| Other {
        rank: i,
        host: places[i].host.clone(),
        end: ranks[i].end,
        role: match ranks[i].end {
            None if run.lost.contains(&places[i].host) => Role::NodeLost,
            _ => role(&ranks[i], || own_words(&places[i])),
        },
        after_ms: ms(ranks[i].ended_at) - ms(subject.at),
        stuck_in: places[i].stuck_in.clone(),
    });
    let of_host = || (0..ranks.len()).filter(|&i| places[i].host == subject.host);
    let step = match rank {
        Some(rank) => rank.step.or(record.and_then(|r| r.step)),
        None => of_host().filter_map(|i| ranks[i].step).max(),
    };
    let cause = record
        .map(|r| r.cause.clone())
        .or(exception.as_ref().map(|_| "exception".into()));
    Failure {
        run_id: run.id.into(),
        rank: subject.number,
        late: subject.late.to_vec(),
        host: subject.host.into(),
        device: place.map(|place| place.device.clone()),
        pid: place.map(|place| place.pid),
        end,
        exit_code: run.exit_code,
        class: verdict.class,
        again: verdict.again,
        evidence: verdict.evidence,
        signature,
        after_ms: ms(subject.at),
        step,
        section: rank.and_then(|rank| rank.section.clone()),
        meaning: meaning(run, end, &facts),
        cause,
        message: record.map(|r| r.message.clone()).or(exception.clone()),
        backtrace: record.and_then(|r| r.backtrace.clone()),
        reason: fault.reason.clone(),
        stderr: place.map_or(Vec::new(), |place| place.stderr.clone()),
        stderr_file: place.map(|place| place.stderr_file.clone()),
        stacks: run
            .stacks
            .map(str::to_owned)
            .filter(|_| !subject.late.is_empty()),
        others: others.collect(),
        earlier: run.earlier.to_vec(),
        hint: hint(run, &verdict.hint),
    }
}

/// What usually stands behind such an end; nothing for one that the launcher brought about.
fn meaning(run: &Run, end: Option<End>, facts: &Facts) -> Option<String> {
    match end? {
        _ if facts.hung => None,
        End::Signal(signal) if facts.sent.contains(&signal) => None,
        End::Signal(libc::SIGKILL) if run.oom_kills > 0 => Some(format!(
            "the kernel's out-of-memory killer ended {} process(es) during the run",
            run.oom_kills
        )),
        End::Signal(libc::SIGKILL) => {
            Some("killed from outside; the out-of-memory killer did not count a process".into())
        }
        end => end.meaning().map(str::to_string),
    }
}

fn hint(run: &Run, advice: &str) -> String {
    match run.resume {
        Some(command) if advice.is_empty() => {
            format!("once the cause is gone, continue with: {command}")
        }
        Some(command) => format!("{advice}; then continue with: {command}"),
        None if advice.is_empty() => format!(
            "the whole output of every rank is in {}",
            run.dir.join("logs").display()
        ),
        None => advice.into(),
    }
}

/// The message that torch's `@record` left: `{"message": text}` or `{"message": {"message": text, ..}}`.
pub fn torch_error(path: &Path) -> Option<String> {
    let value: serde_json::Value = serde_json::from_str(&read_small(path)?).ok()?;
    let message = &value["message"];
    message
        .as_str()
        .or_else(|| message["message"].as_str())
        .map(str::to_string)
}

/// Lines about the other ranks in the text; failure.json has them all.
const MAX_OTHERS: usize = 16;

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
        if !self.earlier.is_empty() {
            writeln!(f, "  failed before, and was started again:")?;
            for incident in &self.earlier {
                writeln!(
                    f,
                    "    {:.1} s after the start: {incident}",
                    incident.at.as_secs_f64()
                )?;
            }
        }
        write!(f, "  hint: {}", self.hint)
    }
}

impl Failure {
    /// Who failed, and how.
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
                let end = self
                    .end
                    .map_or("it could not be ended".into(), |end| end.to_string());
                format!("rank {rank} failed first: {end}")
            }
        }
    }

    /// Whether the evidence is not said elsewhere in the text.
    fn evidence_tells(&self) -> bool {
        let in_end = self
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
        self.rank.is_some() && !in_end && !in_message && !in_stderr
    }

    fn fmt_place(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  where: host {}", self.host)?;
        match (&self.device, self.pid) {
            (Some(device), Some(pid)) => write!(f, ", {device}, pid {pid}")?,
            _ => {
                let on_host = self.others.iter().filter(|o| o.host == self.host);
                let ranks: Vec<usize> = on_host.map(|o| o.rank).collect();
                if !ranks.is_empty() {
                    write!(f, ", {}", named(&ranks))?;
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

    /// One line for all ranks that ended alike.
    fn fmt_others(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one_host = self.others.iter().all(|other| other.host == self.host);
        let mut groups: Vec<((String, &str), Vec<&Other>)> = Vec::new();
        for other in &self.others {
            let host = if one_host || is_usual(other.role) {
                ""
            } else {
                &other.host
            };
            let key = (how_it_ended(other), host);
            match groups.iter_mut().find(|(have, _)| *have == key) {
                Some((_, members)) => members.push(other),
                None => groups.push((key, vec![other])),
            }
        }
        for ((text, _), members) in groups.iter().take(MAX_OTHERS) {
            let ranks: Vec<usize> = members.iter().map(|o| o.rank).collect();
            let hosts = if one_host {
                String::new()
            } else {
                on_hosts(members)
            };
            writeln!(f, "    {}{hosts}: {text}{}", named(&ranks), when(members))?;
        }
        match groups.len().saturating_sub(MAX_OTHERS) {
            0 => Ok(()),
            more => writeln!(f, "    and {more} more such lines, see failure.json"),
        }
    }
}

/// `rank 3`, `ranks 0-6,8-63`.
fn named(ranks: &[usize]) -> String {
    let plural = if ranks.len() == 1 { "rank" } else { "ranks" };
    format!("{plural} {}", to_list(ranks))
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
        Role::Succeeded => "succeeded".into(),
        Role::Stopped => format!("stopped by the launcher: {end}"),
        Role::LostPeer => format!("lost another rank: {end}"),
        Role::Origin | Role::OwnCode => end,
        Role::OwnError => format!("had an error of its own: {end}"),
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

/// `, 3.1 to 8.9 ms after`.
fn when(members: &[&Other]) -> String {
    if matches!(members[0].role, Role::Stuck | Role::NodeLost) {
        return String::new();
    }
    let after = members.iter().map(|o| o.after_ms);
    let first = after.clone().fold(f64::INFINITY, f64::min);
    let last = after.fold(f64::NEG_INFINITY, f64::max);
    let (from, to) = (format!("{:.1}", first.abs()), format!("{:.1}", last.abs()));
    match (first < 0.0, last < 0.0) {
        (true, false) => format!(", {from} ms before to {to} ms after"),
        (true, true) if from == to => format!(", {from} ms before"),
        (true, true) => format!(", {from} to {to} ms before"),
        _ if from == to => format!(", {from} ms after"),
        _ => format!(", {from} to {to} ms after"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blame::first_failure;

    fn place(rank: usize, stderr: &[&str]) -> Place {
        Place {
            host: "gpu-01".into(),
            device: "cpu".into(),
            pid: 100 + rank as i32,
            stderr_file: format!("logs/gpu-01-{rank}.err").into(),
            exception: None,
            error_file: "/nonexistent".into(),
            stderr: stderr.iter().map(|s| s.to_string()).collect(),
            stuck_in: None,
        }
    }

    fn report(ends: &[End], oom_kills: u64) -> String {
        let sent = vec![libc::SIGTERM];
        let rank = |(i, end): (usize, &End)| Rank {
            end: Some(*end),
            order: i,
            after_stop: i > 0,
            sent: if i > 0 { sent.clone() } else { Vec::new() },
            ended_at: Duration::from_micros(2_100_000 + 900 * i as u64),
            step: Some(7),
            ..Rank::default()
        };
        let ranks: Vec<Rank> = ends.iter().enumerate().map(rank).collect();
        let places: Vec<Place> = (0..ends.len())
            .map(|i| place(i, if i == 0 { &["boom"] } else { &[] }))
            .collect();
        let blame = first_failure(&ranks, |i| own_words(&places[i])).unwrap();
        let run = Run {
            id: "r",
            dir: Path::new("runs/r"),
            exit_code: 17,
            oom_kills,
            xids: &[],
            lost: &[],
            stacks: None,
            earlier: &[],
            resume: Some("tsm-launch --cpus 6 --resume runs/r"),
        };
        failure(&run, &blame.into(), &ranks, &places).to_string()
    }

    #[test]
    fn the_report_says_who_what_where_and_what_next() {
        let (term, zero) = (End::Signal(libc::SIGTERM), End::Code(0));
        let text = report(&[End::Code(17), term, term, zero, term, End::Code(76)], 0);
        let expected = "error: rank 0 failed first: exit code 17
  class: program error
  where: host gpu-01, cpu, pid 100
  when: 2.1 s after the start, last finished step 7
  stderr (logs/gpu-01-0.err):
    | boom
  named first because its end came first in the kernel's order; the others:
    ranks 1-2,4: stopped by the launcher: signal 15 (SIGTERM), 0.9 to 3.6 ms after
    rank 3: succeeded, 2.7 ms after
    rank 5: lost another rank: exit code 76, 4.5 ms after
  hint: once the cause is gone, continue with: tsm-launch --cpus 6 --resume runs/r";
        assert_eq!(text, expected);
    }

    #[test]
    fn sigkill_comes_with_the_evidence_for_the_out_of_memory_killer() {
        let killed = End::Signal(libc::SIGKILL);
        assert!(report(&[killed], 2).contains("out-of-memory killer ended 2 process(es)"));
        assert!(report(&[killed], 0).contains("the out-of-memory killer did not count a process"));
    }

    #[test]
    fn torchs_error_file_is_read_in_both_forms() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("e.json");
        fs_err::write(
            &path,
            r#"{"message": {"message": "ValueError: x", "extraInfo": {}}}"#,
        )
        .unwrap();
        assert_eq!(torch_error(&path).as_deref(), Some("ValueError: x"));
        fs_err::write(&path, r#"{"message": "plain"}"#).unwrap();
        assert_eq!(torch_error(&path).as_deref(), Some("plain"));
        fs_err::write(&path, "not json").unwrap();
        assert_eq!(torch_error(&path), None);
    }
}
