//! Words on stdout and stderr where no screen is up. The macros of std panic when they cannot be written.

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::Duration;
use tsm_job::exit::{self, Coded};

/// Prints what was asked for to stdout. A reader that has gone, such as `head`, has what it wanted.
///
/// # Errors
/// [`exit::CANNOT_WRITE`] when it cannot be written.
pub fn print(text: &str) -> Result<(), Coded> {
    print_to(&mut std::io::stdout().lock(), text)
}

fn print_to(out: &mut impl Write, text: &str) -> Result<(), Coded> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            let hint = "free some space where stdout leads to, or print elsewhere";
            let text = format!("cannot write to stdout: {e}\n  hint: {hint}");
            Err(Coded::new(exit::CANNOT_WRITE, text))
        }
        _ => Ok(()),
    }
}

/// Tells the user something on stderr, if anybody listens.
pub fn say(text: impl Display) {
    tell(format_args!("tsm-launch: {text}"));
}

/// As [`say`], with all words of its own.
pub fn tell(line: impl Display) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// How long a file may take to be read before something is said.
const PATIENCE: Duration = Duration::from_secs(2);

/// Reads what is at `path` by `read`. Meanwhile the user hears for what this process waits: somebody else has to
/// write to a fifo, or to bring a file server back.
pub fn reading<T>(path: &Path, read: impl FnOnce() -> T) -> T {
    let (done, is_done) = channel::<()>();
    let text = format!(
        "still waiting for {}: it is a fifo that nobody has written to its end, or its file system does not answer",
        path.display()
    );
    let wait = move || {
        if is_done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            say(text);
        }
    };
    // Without the thread it is read as well.
    let _ = Builder::new().name("patience".into()).spawn(wait);
    let result = read();
    drop(done);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails as stdout does.
    struct Broken(ErrorKind);

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Err(self.0.into())
        }
    }

    #[test]
    fn a_reader_that_has_gone_is_content_and_a_full_disk_is_an_error() {
        assert!(print_to(&mut Broken(ErrorKind::BrokenPipe), "x").is_ok());
        let e = print_to(&mut Broken(ErrorKind::StorageFull), "x").unwrap_err();
        assert_eq!(e.code, exit::CANNOT_WRITE);
        assert!(e.message.contains("\n  hint: "), "{e}");
    }
}
