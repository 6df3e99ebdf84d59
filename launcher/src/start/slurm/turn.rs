//! One turn of a job: from where SLURM starts it to where it asks to be queued again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use tsm_job::RunDir;
use tsm_job::exit;

use super::allocation::{Allocation, Place};
use super::commands::Slurm;
use super::job::{Job, StopCause, run_folder_name};
use super::requeue::{Ended, Entry, on_entry, should_requeue};
use crate::manifest::earlier;
use crate::manifest::files::checkpoints;
use crate::report::GoOn;

/// A job without `--signal` saves itself so long before its end; never more than a tenth of its time.
const LEAD: Duration = Duration::from_secs(120);

/// How long to ask why the job is being stopped, and how long to wait in between.
const ASK: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(50);

/// What the job does in this turn.
pub struct Turn {
    pub allocation: Allocation,
    slurm: Slurm,
    /// As it was when the turn began; `None` where SLURM did not answer.
    job: Option<Job>,
}

impl Turn {
    /// Asks SLURM about the job, which takes it some ten milliseconds.
    pub fn begin(allocation: Allocation) -> Turn {
        let slurm = Slurm::default();
        let job = slurm.job(allocation.job).ok();
        Turn {
            allocation,
            slurm,
            job,
        }
    }

    /// Its run folder, the same in every turn.
    pub fn folder(&self, root: &Path, run: &str) -> PathBuf {
        root.join(run_folder_name(run, self.allocation.job))
    }

    /// What to do with that folder.
    pub fn entry(&self, folder: &Path) -> Entry {
        let last = earlier::outcome(folder);
        let last = last
            .as_ref()
            .map(|(outcome, code)| (outcome.as_str(), *code));
        on_entry(self.allocation.restart_count, last)
    }

    /// How long until the job should save itself, if it has a time limit.
    pub fn save_in(&self, now: SystemTime) -> Option<Duration> {
        let job = self.job.as_ref()?;
        let end = self
            .allocation
            .end
            .or(job.end.filter(|_| job.limit.is_some()))?;
        let left = end.duration_since(now).unwrap_or_default();
        let lead = job.limit.map_or(LEAD, |limit| LEAD.min(limit / 10));
        Some(left.saturating_sub(lead))
    }

    /// Whether SLURM queues it again where it is asked to.
    pub fn may_be_queued_again(&self) -> bool {
        self.allocation.place == Place::Batch && self.may_requeue()
    }

    /// For the question why this job is being stopped, which waits for SLURM.
    pub fn asker(&self) -> impl Fn() -> StopCause + Send + 'static {
        let (slurm, job) = (self.slurm.clone(), self.allocation.job);
        let restart_count = self.allocation.restart_count;
        move || {
            let asked = Instant::now();
            loop {
                match slurm.job(job) {
                    Ok(job) => return job.stop_cause(restart_count),
                    // The signal that is asked about goes to all processes of the job, and so to this scontrol.
                    Err(_) if asked.elapsed() < ASK => std::thread::sleep(AGAIN),
                    Err(_) => return StopCause::Other,
                }
            }
        }
    }

    /// How the run is continued after a failure; `None` where the same command line does it, as in a shell of salloc.
    pub fn go_on(&self) -> Option<GoOn> {
        (self.allocation.place == Place::Batch).then(|| GoOn::Requeue {
            job: self.allocation.job.to_string(),
            may: self.may_requeue(),
        })
    }

    /// Where SLURM did not answer it may.
    fn may_requeue(&self) -> bool {
        self.job.as_ref().is_none_or(|job| job.requeue)
    }

    /// Queues the job again where that is right, and says what was done. SLURM then ends this process.
    /// `stopped`: SLURM had a reason of its own to end the turn. `saves`: the run's checkpoints are ours, so that
    /// they tell whether it gets anywhere.
    pub fn end(
        &self,
        code: i32,
        outcome: &str,
        folder: &Path,
        stopped: Option<StopCause>,
        saves: bool,
    ) -> Option<String> {
        let job = self.allocation.job;
        if code != exit::REQUEUE || self.allocation.place != Place::Batch {
            return None;
        }
        if stopped == Some(StopCause::Requeued) {
            return Some(format!("SLURM has queued job {job} again"));
        }
        let ended = Ended {
            exit_code: code,
            outcome,
            fruitless: if saves { fruitless(folder) } else { 0 },
        };
        Some(match should_requeue(ended, self.may_requeue()) {
            Err(why) => format!("job {job} is not queued again: {why}"),
            Ok(()) => match self.slurm.requeue(job) {
                // SLURM begins to end the processes of the job at once, and its own scontrol may be the first.
                Err(e) if self.asker()() != StopCause::Requeued => format!("warning: {e}"),
                Ok(()) | Err(_) => format!("job {job} is queued again, and goes on from here"),
            },
        })
    }
}

/// How many turns in a row, up to the present one, have ended with the same newest checkpoint.
fn fruitless(folder: &Path) -> u32 {
    let run = RunDir::new(folder);
    let newest = checkpoints(&run).iter().map(|c| c.step).max();
    let before = (1..)
        .map(|n| folder.join(format!("manifest-{n}.json")))
        .take_while(|path| path.is_file());
    let step_of = |path: PathBuf| {
        let text = fs_err::read_to_string(path).ok()?;
        let manifest: serde_json::Value = serde_json::from_str(&text).ok()?;
        let steps = manifest["checkpoints"].as_array()?.iter();
        steps.filter_map(|c| c["step"].as_u64()).max()
    };
    let mut turns: Vec<Option<u64>> = before.map(step_of).collect();
    turns.reverse();
    let same = turns.iter().take_while(|step| **step == newest).count();
    match (newest, same) {
        (None, same) => same as u32 + 1,
        // The turn that made the checkpoint was of use.
        (Some(_), same) => same as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::start::slurm::JobId;

    fn turn(restart_count: u32) -> Turn {
        let allocation = Allocation {
            job: JobId { id: 7, array: None },
            nodes: vec!["n1".into()],
            gpus_per_node: None,
            cpus: Vec::new(),
            end: None,
            restart_count,
            place: Place::Batch,
        };
        Turn {
            allocation,
            slurm: Slurm::default(),
            job: None,
        }
    }

    /// A turn whose scontrol is this script, in a folder of its own.
    fn with_scontrol(dir: &Path, script: &str) -> Turn {
        // Another process writes it: what this one has open for writing, a child of another thread may have open too,
        // and nobody could execute it (ETXTBSY).
        let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod 755 "$0""#;
        let mut sh = std::process::Command::new("sh");
        sh.args(["-c", write]).arg(dir.join("scontrol")).arg(script);
        assert!(sh.status().unwrap().success());
        let slurm = Slurm::default().env("PATH", &dir.to_string_lossy());
        Turn { slurm, ..turn(0) }
    }

    #[test]
    fn a_question_that_was_ended_by_the_job_s_own_signal_is_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let script =
            "[ -e $0.1 ] || { : > $0.1; kill -TERM $$; }\necho JobState=COMPLETING Restarts=1";
        let turn = with_scontrol(dir.path(), script);
        assert_eq!(turn.asker()(), StopCause::Requeued);
        assert!(dir.path().join("scontrol.1").exists());
    }

    #[test]
    fn a_job_is_queued_again_also_where_slurm_ends_the_one_that_asks_for_it() {
        for (state, expected) in [
            (
                "COMPLETING Restarts=1",
                "job 7 is queued again, and goes on",
            ),
            ("RUNNING Restarts=0", "warning: cannot queue job 7 again: "),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let script = format!("[ $1 = show ] || kill -TERM $$\necho JobState={state}");
            let turn = with_scontrol(dir.path(), &script);
            let said = turn.end(exit::REQUEUE, "stopped", dir.path(), None, false);
            assert!(said.as_ref().unwrap().starts_with(expected), "{said:?}");
        }
    }

    #[test]
    fn a_batch_job_goes_on_by_being_queued_again_and_a_shell_by_the_command() {
        let with = |requeue, place| {
            let mut turn = turn(0);
            turn.job = Some(Job {
                requeue,
                ..Job::default()
            });
            turn.allocation.place = place;
            turn.go_on()
        };
        let requeue = |may| {
            let job = "7".into();
            Some(GoOn::Requeue { job, may })
        };
        assert_eq!(with(true, Place::Batch), requeue(true));
        assert_eq!(with(false, Place::Batch), requeue(false));
        assert_eq!(turn(0).go_on(), requeue(true), "SLURM did not answer");
        assert_eq!(with(true, Place::Shell), None);
        assert_eq!(with(true, Place::Step { id: 0, node: 0 }), None);
    }

    #[test]
    fn the_manifest_of_the_last_turn_decides_how_this_one_begins() {
        let root = tempfile::tempdir().unwrap();
        let folder = turn(0).folder(root.path(), "a/b");
        assert_eq!(folder, root.path().join("a-b-slurm-7"));
        assert_eq!(turn(1).entry(&folder), Entry::Fresh);
        fs_err::create_dir(&folder).unwrap();
        for (manifest, entry) in [
            (r#"{"outcome":"stopped","exit_code":75}"#, Entry::Resume),
            (r#"{"outcome":"running","exit_code":null}"#, Entry::Resume),
            ("", Entry::Resume),
            (
                r#"{"outcome":"succeeded","exit_code":0}"#,
                Entry::AlreadyFinished(0),
            ),
            (
                r#"{"outcome":"failed","exit_code":93}"#,
                Entry::AlreadyFinished(93),
            ),
        ] {
            fs_err::write(folder.join("manifest.json"), manifest).unwrap();
            assert_eq!(turn(1).entry(&folder), entry, "{manifest}");
            assert_eq!(turn(0).entry(&folder), Entry::Fresh);
        }
    }

    #[test]
    fn only_a_batch_job_that_may_be_requeued_is_queued_again() {
        let with = |place, requeue| {
            let mut turn = turn(0);
            turn.allocation.place = place;
            turn.job = Some(Job {
                requeue,
                ..Job::default()
            });
            turn.may_be_queued_again()
        };
        assert!(with(Place::Batch, true));
        assert!(!with(Place::Batch, false), "--no-requeue");
        assert!(!with(Place::Shell, true));
        assert!(turn(0).may_be_queued_again(), "SLURM did not answer");
    }

    #[test]
    fn a_job_saves_before_its_end() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let with = |limit: u64| {
            let mut turn = turn(0);
            turn.job = Some(Job {
                limit: Some(Duration::from_secs(limit)),
                end: Some(now + Duration::from_secs(limit)),
                ..Job::default()
            });
            turn.save_in(now)
        };
        assert_eq!(with(3600), Some(Duration::from_secs(3480)));
        assert_eq!(with(100), Some(Duration::from_secs(90)));
        assert_eq!(turn(0).save_in(now), None, "SLURM did not answer");
    }

    #[test]
    fn turns_without_a_new_checkpoint_are_counted() {
        let root = tempfile::tempdir().unwrap();
        let old = |n: u32, steps: &str| {
            let text = format!(r#"{{"checkpoints":[{steps}]}}"#);
            fs_err::write(root.path().join(format!("manifest-{n}.json")), text).unwrap();
        };
        assert_eq!(fruitless(root.path()), 1, "no checkpoint at all");
        old(1, "");
        old(2, "");
        assert_eq!(fruitless(root.path()), 3);
        old(2, r#"{"step":5}"#);
        assert_eq!(fruitless(root.path()), 1);
    }
}
