//! One job in SLURM's queue: its state, and why it is being stopped. Pure.

use std::fmt;
use std::time::{Duration, SystemTime};

/// A job, or one task of a job array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobId {
    pub id: u32,
    /// Job and task of the array.
    pub array: Option<(u32, u32)>,
}

impl fmt::Display for JobId {
    /// As SLURM's commands read it: `123`, or `120_3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.array {
            Some((job, task)) => write!(f, "{job}_{task}"),
            None => write!(f, "{}", self.id),
        }
    }
}

/// The name of the run folder of `job`: one that the same job finds again after it was queued again.
pub fn run_folder_name(run: &str, job: JobId) -> String {
    format!("{}-slurm-{job}", run.replace('/', "-"))
}

/// What `scontrol show job` tells of a job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Job {
    /// `PENDING`, `RUNNING`, `SIGNALING`, `COMPLETING`, `CANCELLED`, ...
    pub state: String,
    pub reason: String,
    /// SLURM may queue it again (`--requeue`).
    pub requeue: bool,
    pub restarts: u32,
    /// Exit code, and the signal that ended the batch shell.
    pub exit: (i32, i32),
    pub start: Option<SystemTime>,
    /// `None` without a limit.
    pub limit: Option<Duration>,
    /// When it ends by its time limit, or by the grace of its pre-emption; or when it ended.
    pub end: Option<SystemTime>,
    /// Since when it is being pre-empted.
    pub preempted: Option<SystemTime>,
    pub nodes: String,
}

/// Why SLURM stops a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// For a job of higher priority. It has until then; if it ends before, SLURM does not queue it again.
    Preempted {
        until: Option<SystemTime>,
    },
    TimeLimit,
    Cancelled,
    /// It ends, and SLURM has queued it again: pre-empted without grace, by `scontrol requeue`, or
    /// for a lost node.
    Requeued,
    /// SLURM has no part in it.
    Other,
}

impl StopCause {
    /// Behind "a signal from"; `None` where SLURM has no part in it.
    pub fn describe(self) -> Option<&'static str> {
        match self {
            StopCause::Preempted { .. } => Some("SLURM: pre-empted"),
            StopCause::TimeLimit => Some("SLURM: its time is over"),
            StopCause::Cancelled => Some("SLURM: cancelled"),
            StopCause::Requeued => Some("SLURM: queued again"),
            StopCause::Other => None,
        }
    }
}

impl Job {
    /// Reads the output of `SLURM_TIME_FORMAT=%s scontrol show job ID`.
    pub fn parse(text: &str) -> Job {
        // Lines that begin with what a user wrote hold nothing that is needed.
        let own = |line: &&str| {
            let users = [
                "JobId",
                "Command",
                "WorkDir",
                "Std",
                "Comment",
                "AdminComment",
                "SystemComment",
            ];
            !users.iter().any(|key| line.trim_start().starts_with(key))
        };
        let words = || text.lines().filter(own).flat_map(str::split_whitespace);
        let field = |key: &str| {
            words()
                .find_map(|word| {
                    word.split_once('=')
                        .filter(|(k, _)| *k == key)
                        .map(|(_, v)| v)
                })
                .unwrap_or("")
        };
        let time = |key: &str| {
            let seconds: u64 = field(key).parse().ok()?;
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
        };
        let (code, signal) = field("ExitCode").split_once(':').unwrap_or(("", ""));
        Job {
            state: field("JobState").into(),
            reason: field("Reason").into(),
            requeue: field("Requeue") == "1",
            restarts: field("Restarts").parse().unwrap_or(0),
            exit: (code.parse().unwrap_or(0), signal.parse().unwrap_or(0)),
            start: time("StartTime"),
            limit: time_limit(field("TimeLimit")),
            end: time("EndTime"),
            preempted: time("PreemptTime"),
            nodes: field("NodeList").into(),
        }
    }

    /// Why a process of this job got SIGTERM, if `restart_count` is what the job started with.
    pub fn stop_cause(&self, restart_count: u32) -> StopCause {
        let in_time = || {
            let limit = self
                .start
                .zip(self.limit)
                .and_then(|(start, limit)| start.checked_add(limit));
            limit.zip(self.end).is_none_or(|(limit, end)| end < limit)
        };
        match self.state.as_str() {
            "CANCELLED" => StopCause::Cancelled,
            "TIMEOUT" | "DEADLINE" => StopCause::TimeLimit,
            _ if self.restarts > restart_count => StopCause::Requeued,
            "PREEMPTED" | "REQUEUED" | "NODE_FAIL" => StopCause::Requeued,
            // RUNNING, for a moment SIGNALING, and COMPLETING where pre-emption cancels.
            _ if self.preempted.is_some() => StopCause::Preempted { until: self.end },
            // Its end is the moment in which SLURM began to end it.
            "COMPLETING" if in_time() => StopCause::Cancelled,
            "COMPLETING" => StopCause::TimeLimit,
            _ => StopCause::Other,
        }
    }
}

/// A time limit as sbatch reads it and SLURM shows it; `None` for none, and for what is no limit.
pub(super) fn time_limit(text: &str) -> Option<Duration> {
    let (days, rest) = match text.split_once('-') {
        Some((days, rest)) => (Some(days), rest),
        None => (None, text),
    };
    let parts: Vec<u64> = rest
        .split(':')
        .map(|part| part.parse().ok())
        .collect::<Option<_>>()?;
    let parts = match (days.is_some(), parts.as_slice()) {
        (false, &[m]) => [0, m, 0],
        (false, &[m, s]) => [0, m, s],
        (true, &[h]) => [h, 0, 0],
        (true, &[h, m]) => [h, m, 0],
        (_, &[h, m, s]) => [h, m, s],
        _ => return None,
    };
    let days: u64 = days.unwrap_or("0").parse().ok()?;
    let units = [
        (days, 86_400),
        (parts[0], 3600),
        (parts[1], 60),
        (parts[2], 1),
    ];
    let seconds = units.iter().try_fold(0u64, |sum, (n, unit)| {
        sum.checked_add(n.checked_mul(*unit)?)
    })?;
    Some(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "\
JobId=4 JobName=a JobState=FAILED Requeue=0
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=3:9
   RunTime=00:00:04 TimeLimit=00:10:00 TimeMin=N/A
   StartTime=1795307999 EndTime=1795308015 Deadline=N/A
   PreemptEligibleTime=1795307999 PreemptTime=1795308005
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=n[1-4]
   Command=/x/NodeList=y Restarts=9
";

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_job_is_read_and_its_name_cannot_pretend() {
        let job = Job::parse(SHOWN);
        let expected = Job {
            state: "RUNNING".into(),
            reason: "None".into(),
            requeue: true,
            restarts: 2,
            exit: (3, 9),
            start: Some(at(1_795_307_999)),
            limit: Some(Duration::from_secs(600)),
            end: Some(at(1_795_308_015)),
            preempted: Some(at(1_795_308_005)),
            nodes: "n[1-4]".into(),
        };
        assert_eq!(job, expected);
        let unknown = Job::parse(
            "   JobState=PENDING Reason=BeginTime\n   EndTime=Unknown\n   PreemptTime=None\n",
        );
        assert_eq!(
            (unknown.end, unknown.preempted, unknown.requeue),
            (None, None, false)
        );
    }

    #[test]
    fn the_cause_of_a_stop_is_told_apart() {
        let running = Job {
            state: "RUNNING".into(),
            start: Some(at(0)),
            limit: Some(Duration::from_secs(100)),
            end: Some(at(100)),
            ..Job::default()
        };
        let cause = |job: &Job| job.stop_cause(0);
        assert_eq!(cause(&running), StopCause::Other);
        let ending = Job {
            state: "COMPLETING".into(),
            ..running.clone()
        };
        assert_eq!(cause(&ending), StopCause::TimeLimit);
        assert_eq!(
            cause(&Job {
                end: Some(at(130)),
                ..ending.clone()
            }),
            StopCause::TimeLimit
        );
        assert_eq!(
            cause(&Job {
                end: Some(at(99)),
                ..ending.clone()
            }),
            StopCause::Cancelled
        );
        assert_eq!(
            cause(&Job {
                limit: None,
                ..ending.clone()
            }),
            StopCause::Cancelled
        );
        let preempted = Job {
            preempted: Some(at(30)),
            end: Some(at(40)),
            ..running.clone()
        };
        assert_eq!(
            cause(&preempted),
            StopCause::Preempted {
                until: Some(at(40))
            }
        );
        let told = Job {
            state: "SIGNALING".into(),
            ..preempted.clone()
        };
        assert_eq!(cause(&told), cause(&preempted));
        let again = Job {
            restarts: 1,
            ..ending.clone()
        };
        assert_eq!(cause(&again), StopCause::Requeued);
        assert_eq!(
            again.stop_cause(1),
            StopCause::TimeLimit,
            "queued again before, not now"
        );
        let state = |state: &str| {
            cause(&Job {
                state: state.into(),
                ..running.clone()
            })
        };
        assert_eq!(
            (state("CANCELLED"), state("TIMEOUT"), state("NODE_FAIL")),
            (
                StopCause::Cancelled,
                StopCause::TimeLimit,
                StopCause::Requeued
            )
        );
    }

    #[test]
    fn time_limits_are_read_as_sbatch_reads_them() {
        let seconds = |text| time_limit(text).map(|t| t.as_secs());
        assert_eq!(seconds("5"), Some(300));
        assert_eq!(seconds("5:30"), Some(330));
        assert_eq!(seconds("1:00:01"), Some(3601));
        assert_eq!(seconds("2-1"), Some(176_400));
        assert_eq!(seconds("1-0:10"), Some(87_000));
        assert_eq!(seconds("1-00:00:10"), Some(86_410));
        for none in ["UNLIMITED", "1:2:3:4", "", "18446744073709551615", "1-"] {
            assert_eq!(seconds(none), None, "{none}");
        }
    }
    #[test]
    fn a_run_folder_is_called_after_the_job() {
        let job = JobId {
            id: 123,
            array: None,
        };
        assert_eq!(run_folder_name("a/b", job), "a-b-slurm-123");
        assert_eq!(
            run_folder_name(
                "a",
                JobId {
                    array: Some((120, 3)),
                    ..job
                }
            ),
            "a-slurm-120_3"
        );
    }
}
