//! Whether a job is queued again when it ends, and what it does when it starts again. Pure.

use tsm_job::exit;

/// How a start of a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended<'a> {
    pub exit_code: i32,
    /// As in the manifest: `succeeded`, `failed`, `stopped`.
    pub outcome: &'a str,
    /// The last starts in a row that ended without a new checkpoint, this one included.
    pub fruitless: u32,
}

/// So many starts without a new checkpoint, and the next would not get further either.
const MAX_FRUITLESS: u32 = 3;

/// Whether the job is to be queued again, or why not. `permitted`: SLURM may, see [`super::Job::requeue`].
///
/// # Errors
/// With the reason, for the report.
pub fn should_requeue(ended: Ended, permitted: bool) -> Result<(), String> {
    let Ended {
        exit_code,
        outcome,
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
    if !permitted {
        return Err("the job was submitted with --no-requeue".into());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_saved_job_is_queued_again() {
        let saved = Ended {
            exit_code: 75,
            outcome: "stopped",
            fruitless: 0,
        };
        assert_eq!(should_requeue(saved, true), Ok(()));
        for exit_code in [0, 1, 64, 65, 69, 70, 73, 76, 78, 92, 93, 137, 143] {
            let ended = Ended { exit_code, ..saved };
            assert!(should_requeue(ended, true).is_err(), "{exit_code}");
        }
        let why = |ended, permitted| should_requeue(ended, permitted).unwrap_err();
        let succeeded = Ended {
            outcome: "succeeded",
            ..saved
        };
        assert!(why(succeeded, true).contains("finished"));
        assert!(why(saved, false).contains("--no-requeue"));
        let fruitless = |fruitless| Ended { fruitless, ..saved };
        assert_eq!(should_requeue(fruitless(2), true), Ok(()));
        assert!(why(fruitless(3), true).contains("3 starts in a row"));
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
}
