//! The first failure, for people (stderr) and for programs (failure.json).

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tsm_job::exit;

use crate::blame::{Blame, Role, role};
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
    pub stderr: Vec<String>,
    /// State of a process that SIGKILL did not end.
    pub stuck_in: Option<String>,
}

/// The first failure of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    pub run_id: String,
    pub rank: usize,
    pub host: String,
    pub device: String,
    pub pid: i32,
    pub end: Option<End>,
    /// The launcher's exit code.
    pub exit_code: i32,
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
    pub stderr_file: PathBuf,
    pub others: Vec<Other>,
    pub hint: String,
}

/// How another rank ended.
#[derive(Clone, Debug, Serialize)]
pub struct Other {
    pub rank: usize,
    pub end: Option<End>,
    pub role: Role,
    /// Milliseconds after the first failure; negative where it ended before.
    pub after_ms: f64,
    pub stuck_in: Option<String>,
}

/// What is said of the run as a whole.
pub struct Run<'a> {
    pub id: &'a str,
    pub dir: &'a Path,
    pub exit_code: i32,
    /// Processes that the kernel's out-of-memory killer ended on this machine meanwhile.
    pub oom_kills: u64,
    /// The command that continues the run, where the workers know how to.
    pub resume: Option<&'a str>,
}

/// All a rank said about its end: torch's error file and the end of its stderr.
pub fn own_words(place: &Place) -> String {
    let exception = torch_error(&place.error_file).unwrap_or_default();
    format!("{exception}\n{}", place.stderr.join("\n"))
}

/// Puts together what is known about the failure of `blame.rank`.
pub fn failure(run: &Run, blame: &Blame, ranks: &[Rank], places: &[Place]) -> Failure {
    let (rank, place) = (&ranks[blame.rank], &places[blame.rank]);
    let ms = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
    let record = rank.record.as_ref();
    let exception = torch_error(&place.error_file);
    let cause = record
        .map(|r| r.cause.clone())
        .or(exception.as_ref().map(|_| "exception".into()));
    let others = (0..ranks.len())
        .filter(|&i| i != blame.rank)
        .map(|i| Other {
            rank: i,
            end: ranks[i].end,
            role: role(&ranks[i], || own_words(&places[i])),
            after_ms: ms(ranks[i].ended_at) - ms(rank.ended_at),
            stuck_in: places[i].stuck_in.clone(),
        });
    let killed = rank.end == Some(End::Signal(libc::SIGKILL));
    let meaning = match rank.end {
        Some(_) if killed && run.oom_kills > 0 => Some(format!(
            "the kernel's out-of-memory killer ended {} process(es) during the run",
            run.oom_kills
        )),
        Some(_) if killed => {
            Some("killed from outside; the out-of-memory killer did not count a process".into())
        }
        end => end.and_then(End::meaning).map(str::to_string),
    };
    Failure {
        run_id: run.id.into(),
        rank: blame.rank,
        host: place.host.clone(),
        device: place.device.clone(),
        pid: place.pid,
        end: rank.end,
        exit_code: run.exit_code,
        after_ms: ms(rank.ended_at),
        step: rank.step.or(record.and_then(|r| r.step)),
        section: rank.section.clone(),
        meaning,
        cause,
        message: record.map(|r| r.message.clone()).or(exception),
        backtrace: record.and_then(|r| r.backtrace.clone()),
        reason: blame.reason.clone(),
        stderr: place.stderr.clone(),
        stderr_file: place.stderr_file.clone(),
        others: others.collect(),
        hint: hint(run, rank.end, killed && run.oom_kills > 0),
    }
}

fn hint(run: &Run, end: Option<End>, out_of_memory: bool) -> String {
    match end {
        _ if out_of_memory => {
            "less memory is needed: fewer data.workers, a smaller data.prefetch, or fewer ranks"
                .into()
        }
        Some(End::Signal(libc::SIGBUS)) => {
            "look at the size of /dev/shm, and whether a data file was replaced".into()
        }
        Some(End::Code(exit::CONFIG | exit::DATA | exit::PREFLIGHT | exit::DO_NOT_REQUEUE)) => {
            "starting again fails again until this is changed".into()
        }
        Some(End::Code(exit::DIVERGED)) => {
            "a lower optim.lr, a longer warmup or optim.max_grad_norm may help".into()
        }
        _ => match run.resume {
            Some(command) => format!("once the cause is gone, continue with: {command}"),
            None => format!(
                "the whole output of every rank is in {}",
                run.dir.join("logs").display()
            ),
        },
    }
}

/// The message that torch's `@record` left: `{"message": text}` or `{"message": {"message": text, ..}}`.
fn torch_error(path: &Path) -> Option<String> {
    let value: serde_json::Value = serde_json::from_str(&read_small(path)?).ok()?;
    let message = &value["message"];
    message
        .as_str()
        .or_else(|| message["message"].as_str())
        .map(str::to_string)
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self
            .end
            .map_or("it could not be ended".into(), |end| end.to_string());
        writeln!(f, "error: rank {} failed first: {end}", self.rank)?;
        if let Some(meaning) = &self.meaning {
            writeln!(f, "  meaning: {meaning}")?;
        }
        writeln!(
            f,
            "  where: host {}, {}, pid {}",
            self.host, self.device, self.pid
        )?;
        write!(f, "  when: {:.1} s after the start", self.after_ms / 1e3)?;
        if let Some(step) = self.step {
            write!(f, ", last finished step {step}")?;
        }
        if let Some(section) = &self.section {
            write!(f, ", in section {section}")?;
        }
        writeln!(f)?;
        if let Some(message) = &self.message {
            let cause = self.cause.as_deref().unwrap_or("error");
            writeln!(
                f,
                "  {cause}: {}",
                message.trim_end().replace('\n', "\n    ")
            )?;
        }
        if self.stderr.is_empty() {
            writeln!(f, "  stderr: empty ({})", self.stderr_file.display())?;
        } else {
            let upto = if self.stderr.len() == TAIL_LINES {
                format!("last {TAIL_LINES} lines of ")
            } else {
                String::new()
            };
            writeln!(f, "  {upto}stderr ({}):", self.stderr_file.display())?;
            for line in &self.stderr {
                writeln!(f, "    | {line}")?;
            }
        }
        if !self.others.is_empty() {
            writeln!(f, "  named first because {}; the others:", self.reason)?;
            self.fmt_others(f)?;
        }
        write!(f, "  hint: {}", self.hint)
    }
}

impl Failure {
    /// One line for all ranks that ended alike.
    fn fmt_others(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut groups: Vec<(String, Vec<&Other>)> = Vec::new();
        for other in &self.others {
            let end = other.end.map_or(String::new(), |end| end.to_string());
            let text = match other.role {
                Role::Succeeded => "succeeded".into(),
                Role::Stopped => format!("stopped by the launcher: {end}"),
                Role::LostPeer => format!("lost another rank: {end}"),
                Role::Origin | Role::OwnCode => end,
                Role::OwnError => format!("had an error of its own: {end}"),
                Role::Stuck => {
                    format!(
                        "did not end after SIGKILL, {}",
                        other.stuck_in.as_deref().unwrap_or("state unknown")
                    )
                }
            };
            match groups.iter_mut().find(|(have, _)| *have == text) {
                Some((_, members)) => members.push(other),
                None => groups.push((text, vec![other])),
            }
        }
        for (text, members) in groups {
            let ranks: Vec<usize> = members.iter().map(|o| o.rank).collect();
            let plural = if ranks.len() == 1 { "rank" } else { "ranks" };
            let after = members
                .iter()
                .map(|o| o.after_ms)
                .fold(f64::INFINITY, f64::min);
            let when = match members[0].role {
                Role::Stuck => String::new(),
                _ if after < 0.0 => format!(", {:.1} ms before", -after),
                _ => format!(", {after:.1} ms after"),
            };
            writeln!(f, "    {plural} {}: {text}{when}", to_list(&ranks))?;
        }
        Ok(())
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
            resume: Some("tsm-launch --cpus 6 --resume runs/r"),
        };
        failure(&run, &blame, &ranks, &places).to_string()
    }

    #[test]
    fn the_report_says_who_what_where_and_what_next() {
        let (term, zero) = (End::Signal(libc::SIGTERM), End::Code(0));
        let text = report(&[End::Code(17), term, term, zero, term, End::Code(76)], 0);
        let expected = "error: rank 0 failed first: exit code 17
  where: host gpu-01, cpu, pid 100
  when: 2.1 s after the start, last finished step 7
  stderr (logs/gpu-01-0.err):
    | boom
  named first because its end came first in the kernel's order; the others:
    ranks 1-2,4: stopped by the launcher: signal 15 (SIGTERM), 0.9 ms after
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
