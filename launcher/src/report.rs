//! The first failure, for people (stderr) and for programs (failure.json).

mod text;

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tsm_job::exit;

use crate::blame::{Culprit, Fault, Role, role};
use crate::class::{self, Again, Class, Facts, classify, unstarted};
use crate::cluster::policy::Incident;
use crate::end::End;
use crate::logs::read_small;
use crate::oom::OomKills;
use crate::supervisor::Rank;
use crate::text::count;

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
    /// What the kernel's log says of it, where the out-of-memory killer ended it.
    #[serde(default)]
    pub oom_kill: Option<String>,
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
    /// Of the node to blame: several may have one host name.
    pub node_rank: usize,
    pub device: Option<String>,
    pub pid: Option<i32>,
    pub end: Option<End>,
    /// A signal of the launcher ended it: what it had told before is the failure.
    pub was_stopped: bool,
    /// The launcher's exit code.
    pub exit_code: i32,
    pub class: Class,
    /// The line that tells, or how it ended.
    pub evidence: String,
    /// Equal for two failures of the same cause.
    pub signature: String,
    /// What to expect of starting the same ranks once more.
    pub again: Again,
    /// Milliseconds from the start of the launcher to the first sign of the failure.
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

impl Failure {
    /// For the restart policy, except for what only the coordinator knows. `step` is the last finished step of the job, `checkpoint_step` that of its newest
    /// complete checkpoint; `ran` is how long this start had lasted.
    pub fn incident(
        &self,
        ran: Duration,
        step: Option<u64>,
        checkpoint_step: Option<u64>,
    ) -> Incident {
        Incident {
            at: Duration::try_from_secs_f64(self.after_ms / 1e3).unwrap_or_default(),
            ran,
            class: self.class,
            again: self.again,
            signature: self.signature.clone(),
            evidence: self.evidence.clone(),
            host: Some(self.host.clone()),
            agent: 0,
            tells: false,
            rank: self.rank.and_then(|rank| u32::try_from(rank).ok()),
            step,
            checkpoint_step,
        }
    }
}

/// How another rank ended.
#[derive(Clone, Debug, Serialize)]
pub struct Other {
    pub rank: usize,
    pub host: String,
    pub node_rank: usize,
    pub end: Option<End>,
    pub role: Role,
    /// The launcher had told it to end before it did.
    pub was_told: bool,
    /// Milliseconds after the first failure; negative where it ended before.
    pub after_ms: f64,
    /// How far that may be off, since the clocks of two nodes were compared.
    pub unsure_ms: f64,
    pub stuck_in: Option<String>,
}

/// What is said of the run as a whole.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub id: &'a str,
    pub dir: &'a Path,
    pub exit_code: i32,
    /// The workers talk to the launcher, as our trainer does, and so give the exit codes of [`tsm_job::exit`].
    pub tells: bool,
    /// Processes that the kernel's out-of-memory killer ended meanwhile on the machine of the culprit.
    pub oom_kills: OomKills,
    /// Lines of the kernel's log about GPUs of that machine.
    pub xids: &'a [String],
    /// By rank.
    pub homes: &'a [Home],
    /// Of ranks that hang.
    pub stacks: Option<&'a str>,
    pub earlier: &'a [Incident],
    /// Why some output of ranks is not in the log files.
    pub missing: Option<&'a str>,
    /// Where the workers know how to continue it.
    pub resume: Option<&'a GoOn>,
}

/// How a run is continued after a failure.
#[derive(Clone, Debug, PartialEq)]
pub enum GoOn {
    /// By this command.
    Command(String),
    /// By the same job of SLURM. `may`: SLURM lets its user queue it again.
    Requeue { job: String, may: bool },
}

impl GoOn {
    /// What to continue the run in `dir` with that ended with `code`.
    fn words(&self, code: i32, dir: &Path) -> String {
        match self {
            GoOn::Command(command) => command.clone(),
            // Of a job that ended with that code the next turn ends as the last.
            GoOn::Requeue { job, may: true } if code != exit::DO_NOT_REQUEUE => {
                format!("scontrol requeue {job}")
            }
            GoOn::Requeue { .. } => {
                format!("a new job, and --resume {} in it", dir.display())
            }
        }
    }
}

/// The node of a rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct Home {
    pub node_rank: usize,
    /// How far times of that node may be off.
    pub uncertainty: Duration,
    pub is_lost: bool,
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
    node_rank: usize,
    lost: Option<&'a str>,
    /// The first sign of the failure.
    at: Duration,
}

impl Subject<'_> {
    fn of<'a>(culprit: &'a Culprit, run: &Run, ranks: &[Rank], places: &'a [Place]) -> Subject<'a> {
        let of_rank = |rank: usize, late, at| Subject {
            number: Some(rank),
            late,
            host: &places[rank].host,
            node_rank: run.home(rank).node_rank,
            lost: None,
            at,
        };
        match culprit {
            Culprit::Rank(rank) => of_rank(*rank, &[], ranks[*rank].first_at),
            Culprit::Node {
                node,
                host,
                how,
                at,
            } => Subject {
                number: None,
                late: &[],
                host,
                node_rank: *node,
                lost: Some(how),
                at: *at,
            },
            Culprit::Late { ranks: late, at } => of_rank(late[0], late, *at),
        }
    }
}

impl Run<'_> {
    fn home(&self, rank: usize) -> Home {
        self.homes.get(rank).copied().unwrap_or_default()
    }

    /// How far the time between the failure and the end of `rank` may be off.
    fn unsure(&self, fault: &Fault, rank: usize) -> Duration {
        let of = |rank| self.home(rank).uncertainty;
        match fault.culprit {
            Culprit::Rank(first) if self.home(first).node_rank == self.home(rank).node_rank => {
                Duration::ZERO
            }
            Culprit::Rank(first) => of(first) + of(rank),
            // By the coordinator's own clock.
            Culprit::Node { .. } | Culprit::Late { .. } => of(rank),
        }
    }
}

/// Puts together what is known about the failure that `fault` names. `ranks` and `places` are those of the whole job,
/// with all times on one clock.
///
/// # Panics
/// If `fault` names a rank that is not there, or no late one.
pub fn failure(run: &Run, fault: &Fault, ranks: &[Rank], places: &[Place]) -> Failure {
    let subject = Subject::of(&fault.culprit, run, ranks, places);
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
        oom_kill: place.and_then(|place| place.oom_kill.as_deref()),
        oom_kills: run.oom_kills,
        xids: run.xids,
        node_lost: subject.lost,
        hung: !subject.late.is_empty(),
        sent: rank.map_or(&[], |rank| &rank.sent),
    };
    let by_launcher = |end: End| facts.sent.iter().any(|&signal| end.is_by(signal));
    let own_role = match (rank, place) {
        (Some(rank), Some(place)) => role(rank, || own_words(place)),
        _ => Role::NodeLost,
    };
    let verdict = classify(&facts);
    let signature = class::signature(&verdict, &facts);
    let ms = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
    let others =
        (0..ranks.len()).filter(|i| Some(*i) != subject.number && !subject.late.contains(i));
    let others = others.map(|i| Other {
        rank: i,
        host: places[i].host.clone(),
        node_rank: run.home(i).node_rank,
        end: ranks[i].end,
        role: match ranks[i].end {
            None if run.home(i).is_lost => Role::NodeLost,
            _ => role(&ranks[i], || own_words(&places[i])),
        },
        was_told: !ranks[i].sent.is_empty(),
        after_ms: match ranks[i].end {
            Some(_) => ms(ranks[i].ended_at) - ms(subject.at),
            None => ms(ranks[i].first_at) - ms(subject.at),
        },
        unsure_ms: ms(run.unsure(fault, i)),
        stuck_in: places[i].stuck_in.clone(),
    });
    let of_node = || (0..ranks.len()).filter(|&i| run.home(i).node_rank == subject.node_rank);
    let step = match rank {
        Some(rank) => rank.step.or(record.and_then(|r| r.step)),
        None => of_node().filter_map(|i| ranks[i].step).max(),
    };
    let cause = record
        .map(|r| r.cause.clone())
        .or(exception.as_ref().map(|_| "exception".into()));
    Failure {
        run_id: run.id.into(),
        rank: subject.number,
        late: subject.late.to_vec(),
        host: subject.host.into(),
        node_rank: subject.node_rank,
        device: place.map(|place| place.device.clone()),
        pid: place.map(|place| place.pid),
        end,
        was_stopped: end.is_some_and(by_launcher),
        exit_code: run.exit_code,
        class: verdict.class,
        evidence: verdict.evidence,
        signature,
        again: verdict.again,
        after_ms: ms(subject.at),
        step,
        section: rank.and_then(|rank| rank.section.clone()),
        meaning: meaning(run, end, &facts, own_role),
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

/// What usually stands behind such an end.
fn meaning(run: &Run, end: Option<End>, facts: &Facts, role: Role) -> Option<String> {
    let unstarted = facts.record.and_then(unstarted::meaning);
    let killer = run.oom_kills.words();
    let killer = killer.map(|words| format!("{words} during the run"));
    match end? {
        _ if facts.hung => None,
        _ if unstarted.is_some() => unstarted.map(str::to_string),
        End::Signal(signal) if facts.sent.contains(&signal) => {
            let told = matches!(role, Role::Origin | Role::OwnError | Role::LastWords);
            told.then(|| "the launcher stopped it before its own end was done".into())
        }
        End::Signal(libc::SIGKILL) => match (facts.oom_kill, run.oom_kills) {
            (Some(line), _) => Some(format!("the kernel logged: {line}")),
            (None, OomKills { all: 0, .. }) => {
                Some("killed from outside; the out-of-memory killer did not count a process".into())
            }
            (None, OomKills { all, unnamed: 0 }) => Some(format!(
                "killed from outside; the out-of-memory killer ended {} meanwhile",
                count(all, "other")
            )),
            (None, _) => killer,
        },
        end => end.meaning(run.tells).map(str::to_string).or(killer),
    }
}

fn hint(run: &Run, advice: &str) -> String {
    let resume = run.resume.map(|go_on| go_on.words(run.exit_code, run.dir));
    match resume {
        Some(command) if advice.is_empty() => {
            format!("once the cause is gone, continue with: {command}")
        }
        Some(command) => format!("{advice}; then continue with: {command}"),
        None if advice.is_empty() => match (run.missing, run.dir.join("logs").display()) {
            (None, logs) => format!("the whole output of every rank is in {logs}"),
            (Some(why), logs) => format!("not all output of the ranks is in {logs}: {why}"),
        },
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

#[cfg(test)]
mod tests;
