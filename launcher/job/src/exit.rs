//! Exit codes of `tsm-launch` and `tsm-trainer`. A failed job exits with the first failing
//! rank's own code, or 128 + the signal that ended it; these are the codes we give ourselves.

/// The job ran to its end.
pub const OK: i32 = 0;
/// The command line is wrong (`EX_USAGE` of sysexits.h).
pub const USAGE: i32 = 64;
/// An input file (list, clip, weights, checkpoint) is missing or broken (`EX_DATAERR`).
pub const DATA: i32 = 65;
/// The machine cannot run the job, e.g. fewer GPUs than asked for, or it computes a wrong sum (`EX_UNAVAILABLE`).
pub const PREFLIGHT: i32 = 69;
/// A bug of ours (`EX_SOFTWARE`); a panic ends with this code.
pub const BUG: i32 = 70;
/// An output could not be written, e.g. the disk is full (`EX_CANTCREAT`).
pub const CANNOT_WRITE: i32 = 73;
/// Saved, and asks to be started again (`EX_TEMPFAIL`).
pub const REQUEUE: i32 = 75;
/// A peer died or a collective timed out (`EX_PROTOCOL`): the consequence of another failure.
pub const PEER: i32 = 76;
/// The configuration is wrong (`EX_CONFIG`).
pub const CONFIG: i32 = 78;
/// Training cannot go on: the loss is not finite on some rank.
pub const DIVERGED: i32 = 92;
/// Starting again would fail again.
pub const DO_NOT_REQUEUE: i32 = 93;
/// A signal ended the process: 128 + its number, as a shell reports it.
pub const SIGNAL_BASE: i32 = 128;

/// An error that carries its exit code up to `main` through an `anyhow` chain.
///
/// `main` looks for it with `error.downcast_ref::<Coded>()` anywhere in the chain.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Coded {
    pub code: i32,
    pub message: String,
}

impl Coded {
    pub fn new(code: i32, message: impl Into<String>) -> Self {
        Coded {
            code,
            message: message.into(),
        }
    }
}

/// The exit code an error asks for; [`BUG`]'s neighbour 1 where none was given.
pub fn code_of(error: &anyhow::Error) -> i32 {
    // `downcast_ref` finds a `Coded` given as context, which the chain hides behind its own type.
    let in_context = error.downcast_ref::<Coded>();
    let coded = in_context.or_else(|| error.chain().find_map(|e| e.downcast_ref()));
    coded.map_or(1, |c| c.code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_code_is_found_wherever_it_was_given() {
        let plain: anyhow::Error = Coded::new(DATA, "list").into();
        assert_eq!(code_of(&plain.context("outer")), DATA);
        let disk = || Err::<(), _>(std::io::Error::other("disk full"));
        let as_context = disk()
            .context(Coded::new(CANNOT_WRITE, "demo"))
            .unwrap_err();
        assert_eq!(code_of(&as_context.context("outer")), CANNOT_WRITE);
        assert_eq!(code_of(&disk().context("no code").unwrap_err()), 1);
    }
}
