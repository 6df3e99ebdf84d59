//! Workers whose program was never executed: the shim says why, see [`crate::shim`].

use tsm_job::message::FailureRecord;

use super::{Again, Class, Facts, Verdict, first_line};

/// Cause of a record by which a worker's shim tells that it could not prepare the worker.
pub const UNPREPARED: &str = "not prepared";
/// The same when the program could not be executed.
pub const UNEXECUTED: &str = "not executed";

pub fn verdict(facts: &Facts) -> Option<Verdict> {
    let record = facts.record?;
    let line = first_line(&record.message);
    let (class, again, hint) = match record.cause.as_str() {
        UNPREPARED => (
            Class::Machine,
            Again::MayWork,
            "nothing is wrong with the program: something on this machine took away what the launcher had made for the \
             worker, such as its control group or its cores; tsm-launch doctor shows what can be made here",
        ),
        UNEXECUTED => {
            let (again, hint) = unexecuted(errno(record));
            (Class::Config, again, hint)
        }
        _ => return None,
    };
    Some(Verdict::new(class, again, line, hint))
}

/// What the worker's end means, where its shim has told.
pub fn meaning(record: &FailureRecord) -> Option<&'static str> {
    match record.cause.as_str() {
        UNPREPARED => {
            Some("the launcher could not prepare the worker; the program was not executed")
        }
        _ => None,
    }
}

fn unexecuted(errno: Option<i32>) -> (Again, &'static str) {
    let hint = match errno {
        Some(libc::ENOENT) => {
            "see whether the program is installed and in PATH on this node; of a script, also the interpreter in its \
             first line, and of a binary the loader that it names"
        }
        Some(libc::EACCES) => {
            "chmod +x the program; it may also be a folder, in a folder that may not be entered, or on a file system \
             mounted with noexec"
        }
        Some(libc::ENOEXEC) => {
            "it is built for another kind of machine than this one (`file` says for which)"
        }
        Some(libc::E2BIG) => {
            "its arguments and the environment are too long together: put what is long into a file (`getconf ARG_MAX`, \
             `ulimit -s`)"
        }
        Some(libc::ETXTBSY) => {
            return (
                Again::MayWork,
                "somebody writes to the program at this moment: start when the copy is complete, and replace programs \
                 by a rename",
            );
        }
        Some(libc::EAGAIN | libc::ENOMEM) => {
            return (
                Again::MayWork,
                "the machine has no room for another process: see free memory and `ulimit -u`",
            );
        }
        Some(libc::EIO | libc::ESTALE | libc::ETIMEDOUT) => {
            return (
                Again::MayWork,
                "the file system of the program does not answer as it should",
            );
        }
        _ => "see whether the program is installed, executable, and in PATH on this node",
    };
    (Again::Fails, hint)
}

/// As [`std::io::Error`] shows it.
fn errno(record: &FailureRecord) -> Option<i32> {
    let (_, rest) = first_line(&record.message).rsplit_once("(os error ")?;
    rest.strip_suffix(')')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::class::classify;
    use crate::end::End;
    use tsm_job::exit;

    fn told(cause: &str, code: i32, what: &str, errno: i32) -> Verdict {
        let error = std::io::Error::from_raw_os_error(errno);
        let record = FailureRecord {
            rank: 0,
            step: None,
            code,
            cause: cause.into(),
            message: format!("cannot start train: {what}: {error}"),
            backtrace: None,
        };
        let (record, end) = (Some(&record), Some(End::Code(code)));
        classify(&Facts {
            record,
            end,
            ..Facts::default()
        })
    }

    #[test]
    fn a_worker_that_could_not_be_prepared_is_no_fault_of_the_program() {
        let what = "cannot enter its control group";
        let verdict = told(UNPREPARED, exit::PREFLIGHT, what, libc::ENOENT);
        assert_eq!(
            (verdict.class, verdict.again),
            (Class::Machine, Again::MayWork)
        );
        assert!(
            verdict
                .evidence
                .contains("cannot enter its control group: No such file")
        );
        assert!(verdict.hint.contains("nothing is wrong with the program"));
    }

    #[test]
    fn what_keeps_a_program_from_being_executed_has_its_own_remedy() {
        for (errno, again, hint) in [
            (libc::ENOENT, Again::Fails, "in PATH"),
            (libc::EACCES, Again::Fails, "chmod +x"),
            (libc::ENOEXEC, Again::Fails, "another kind of machine"),
            (libc::E2BIG, Again::Fails, "too long together"),
            (libc::ETXTBSY, Again::MayWork, "writes to the program"),
            (libc::EAGAIN, Again::MayWork, "no room for another process"),
            (libc::ELOOP, Again::Fails, "installed, executable"),
        ] {
            let verdict = told(UNEXECUTED, 126, "exec", errno);
            assert_eq!(
                (verdict.class, verdict.again),
                (Class::Config, again),
                "{errno}"
            );
            assert!(verdict.hint.contains(hint), "{errno}: {}", verdict.hint);
        }
    }
}
