//! One job in SLURM's queue: its state, why it is being stopped, and whether it is queued again.

use std::fmt;
use std::io::{ErrorKind, Write};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};
use tsm_job::exit::{self, Coded};

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

/// How a start of a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended<'a> {
    pub exit_code: i32,
    /// As in the manifest: `succeeded`, `failed`, `stopped`.
    pub outcome: &'a str,
    /// How often the job was queued again before.
    pub restart_count: u32,
    /// The last starts in a row that ended without a new checkpoint, this one included.
    pub fruitless: u32,
}

/// What permits a job to be queued again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// [`Job::requeue`].
    pub requeue: bool,
    /// Of restarts; `None`: any number.
    pub limit: Option<u32>,
}

/// So many starts without a new checkpoint, and the next would not get further either.
const MAX_FRUITLESS: u32 = 3;

/// Whether the job is to be queued again, or why not.
///
/// # Errors
/// With the reason, for the report.
pub fn should_requeue(ended: Ended, allowed: Allowed) -> Result<(), String> {
    let Ended {
        exit_code,
        outcome,
        restart_count,
        fruitless,
    } = ended;
    if outcome == "succeeded" || exit_code == exit::OK {
        return Err("the run is finished".into());
    }
    if exit_code != exit::REQUEUE {
        let code = exit::REQUEUE;
        return Err(format!(
            "it ended with code {exit_code}; only {code}, saved and to be continued, is queued again"
        ));
    }
    if !allowed.requeue {
        return Err("the job was submitted with --no-requeue".into());
    }
    if let Some(limit) = allowed.limit.filter(|&limit| restart_count >= limit) {
        return Err(format!(
            "it was queued again {restart_count} times, the limit is {limit}"
        ));
    }
    if fruitless >= MAX_FRUITLESS {
        return Err(format!(
            "{fruitless} starts in a row ended without a new checkpoint; \
             give the job more time, or let it save more often (train.checkpoint_steps)"
        ));
    }
    Ok(())
}

/// What a job does when it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A new run; a folder of that name that is there belongs to an earlier launch of the same job.
    Fresh,
    /// Continue the run in the folder.
    Resume,
    /// Do nothing, and exit with this code.
    AlreadyFinished(i32),
}

/// Decides by the outcome and exit code in the manifest of the job's own run folder, where there is one.
pub fn on_entry(restart_count: u32, last: Option<(&str, Option<i32>)>) -> Entry {
    match last {
        None => Entry::Fresh,
        Some(_) if restart_count == 0 => Entry::Fresh,
        Some(("succeeded", _)) => Entry::AlreadyFinished(exit::OK),
        Some((_, Some(exit::DO_NOT_REQUEUE))) => Entry::AlreadyFinished(exit::DO_NOT_REQUEUE),
        // Nobody but its user queues a job again that ended otherwise, and will have mended the cause.
        Some(_) => Entry::Resume,
    }
}

/// SLURM's commands.
#[derive(Clone, Debug, Default)]
pub struct Slurm {
    env: Vec<(String, String)>,
}

impl Slurm {
    /// Sets a variable for its commands, such as `SLURM_CONF`.
    pub fn env(mut self, name: &str, value: &str) -> Slurm {
        self.env.push((name.into(), value.into()));
        self
    }

    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env("LC_ALL", "C");
        command
    }

    /// Runs a command of SLURM with `input`, and returns what it says.
    ///
    /// # Errors
    /// [`exit::PREFLIGHT`] when it is not there, or refuses: then with its own words.
    pub(super) fn run(
        &self,
        mut command: Command,
        input: Option<&str>,
        what: &str,
    ) -> Result<String, Coded> {
        let name = command.get_program().to_string_lossy().into_owned();
        let refuse = |why: String, hint: &str| {
            let hint = if hint.is_empty() {
                String::new()
            } else {
                format!("\n  hint: {hint}")
            };
            Coded::new(exit::PREFLIGHT, format!("cannot {what}: {why}{hint}"))
        };
        let output = output(&mut command, input).map_err(|e| match e.kind() {
            ErrorKind::NotFound => refuse(
                format!("there is no {name} here"),
                "run it where SLURM's commands are in PATH: a login node, or a node of the job",
            ),
            _ => refuse(format!("{name}: {e}"), ""),
        })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.trim();
            let why = if said.is_empty() {
                format!("{name}: {}", output.status)
            } else {
                said.replace('\n', "\n  ")
            };
            return Err(refuse(why, ""));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The state of a job.
    ///
    /// # Errors
    /// [`exit::PREFLIGHT`] when SLURM does not answer or does not know it.
    pub fn job(&self, job: JobId) -> Result<Job, Coded> {
        let mut command = self.command("scontrol");
        // Seconds since 1970 need no time zone.
        command
            .env("SLURM_TIME_FORMAT", "%s")
            .args(["show", "job", &job.to_string()]);
        let text = self.run(command, None, &format!("ask for the state of job {job}"))?;
        Ok(Job::parse(&text))
    }

    /// Queues the job again. SLURM then ends every process of it: call this last of all.
    ///
    /// # Errors
    /// [`exit::PREFLIGHT`] with SLURM's words when it refuses.
    pub fn requeue(&self, job: JobId) -> Result<(), Coded> {
        let mut command = self.command("scontrol");
        command.args(["requeue", &job.to_string()]);
        self.run(command, None, &format!("queue job {job} again"))
            .map(|_| ())
    }
}

fn output(command: &mut Command, input: Option<&str>) -> std::io::Result<Output> {
    let stdin = if input.is_some() {
        Stdio::piped()
    } else {
        Stdio::null()
    };
    let mut child = command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        // One that does not read to the end has a reason, which it gives on stderr.
        let _ = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output()
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
    fn only_a_saved_job_is_queued_again() {
        let yes = Allowed {
            requeue: true,
            limit: None,
        };
        let saved = Ended {
            exit_code: 75,
            outcome: "stopped",
            restart_count: 5,
            fruitless: 0,
        };
        assert_eq!(should_requeue(saved, yes), Ok(()));
        for exit_code in [0, 1, 64, 65, 69, 70, 73, 76, 78, 92, 93, 137, 143] {
            assert!(
                should_requeue(Ended { exit_code, ..saved }, yes).is_err(),
                "{exit_code}"
            );
        }
        let why = |ended, allowed| should_requeue(ended, allowed).unwrap_err();
        assert!(
            why(
                Ended {
                    outcome: "succeeded",
                    ..saved
                },
                yes
            )
            .contains("finished")
        );
        assert!(
            why(
                saved,
                Allowed {
                    requeue: false,
                    ..yes
                }
            )
            .contains("--no-requeue")
        );
        assert!(
            why(
                saved,
                Allowed {
                    limit: Some(5),
                    ..yes
                }
            )
            .contains("the limit is 5")
        );
        assert_eq!(
            should_requeue(
                saved,
                Allowed {
                    limit: Some(6),
                    ..yes
                }
            ),
            Ok(())
        );
        assert_eq!(
            should_requeue(
                Ended {
                    fruitless: 2,
                    ..saved
                },
                yes
            ),
            Ok(())
        );
        assert!(
            why(
                Ended {
                    fruitless: 3,
                    ..saved
                },
                yes
            )
            .contains("3 starts in a row")
        );
    }

    #[test]
    fn a_job_that_was_queued_again_finds_its_run() {
        assert_eq!(on_entry(0, None), Entry::Fresh);
        assert_eq!(
            on_entry(2, None),
            Entry::Fresh,
            "it was ended before it made the folder"
        );
        assert_eq!(
            on_entry(0, Some(("succeeded", Some(0)))),
            Entry::Fresh,
            "a second launch in one job"
        );
        assert_eq!(
            on_entry(1, Some(("running", None))),
            Entry::Resume,
            "ended without a chance to say so"
        );
        assert_eq!(on_entry(1, Some(("stopped", Some(75)))), Entry::Resume);
        assert_eq!(on_entry(1, Some(("failed", Some(65)))), Entry::Resume);
        assert_eq!(
            on_entry(1, Some(("succeeded", Some(0)))),
            Entry::AlreadyFinished(0)
        );
        assert_eq!(
            on_entry(1, Some(("failed", Some(93)))),
            Entry::AlreadyFinished(93)
        );
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

    #[test]
    fn a_missing_command_is_an_error_with_a_remedy() {
        let slurm = Slurm::default().env("PATH", "/nonexistent");
        let error = slurm.job(JobId { id: 1, array: None }).unwrap_err();
        assert_eq!(error.code, exit::PREFLIGHT);
        assert!(
            error.message.contains("there is no scontrol here"),
            "{error}"
        );
    }
}
