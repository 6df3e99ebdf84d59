//! Whether a job is queued again when it ends, and what it does when it starts again. Pure.

use tsm_job::exit;

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
