//! Whether what is written is kept: the disk may fill up, and the run folder be removed, while the job runs.

use fs_err::File;
use rustix::fs::fstat;
use std::io::{Error, ErrorKind};
use std::time::Duration;
use tsm_job::exit::{self, Coded};

/// Between two looks for the folder.
const LOOK: Duration = Duration::from_secs(2);

/// What is known of the log files of a node. It is said once.
pub struct Keep {
    host: String,
    /// `None`: what there is to say was said.
    next_look: Option<Duration>,
    /// Why output is missing in the files.
    missing: Option<String>,
}

impl Keep {
    pub fn new(host: &str) -> Keep {
        Keep {
            host: host.into(),
            next_look: Some(LOOK),
            missing: None,
        }
    }

    /// When to [`Self::look`] next.
    pub fn next_look(&self) -> Option<Duration> {
        self.next_look
    }

    pub fn missing(self) -> Option<String> {
        self.missing
    }

    /// Words for the user about a file that could not be written, unless they have heard of one.
    pub fn failed(&mut self, e: &Error) -> Option<String> {
        if self.missing.is_some() {
            return None;
        }
        let host = &self.host;
        let hint = remedy(e.kind());
        self.missing = Some(e.to_string());
        Some(format!(
            "warning: output of the ranks on {host} is lost: {e}\n  hint: {hint}; until then nothing but what is shown here is kept"
        ))
    }

    /// Words for the user when the folder has been removed: its `files` are open, so writing to them does not fail.
    pub fn look<'a>(
        &mut self,
        now: Duration,
        files: impl IntoIterator<Item = &'a File>,
    ) -> Option<String> {
        if self.next_look.is_none_or(|at| now < at) {
            return None;
        }
        self.next_look = Some(now + LOOK);
        let mut files = files.into_iter();
        let first = files.next().filter(|file| is_removed(file))?;
        if !files.all(is_removed) {
            return None;
        }
        self.next_look = None;
        let folder = first.path().ancestors().nth(2).unwrap_or(first.path());
        let folder = folder.display();
        self.missing = Some(format!("{folder} was removed while the job ran"));
        Some(format!(
            "warning: the run folder was removed while the job runs, and what the ranks on {} print goes nowhere: {folder}\n  \
             hint: what is shown here is all there is of it; stop the job if it is to be kept or continued",
            self.host
        ))
    }
}

/// A node that cannot write in the run folder runs nothing.
pub fn refuse(e: &Error) -> Coded {
    let hint = remedy(e.kind());
    let text = format!("cannot write to the run folder: {e}\n  hint: {hint}");
    Coded::new(exit::CANNOT_WRITE, text)
}

/// What may help where files cannot be written.
pub fn remedy(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::StorageFull => "free some space on that disk",
        ErrorKind::QuotaExceeded => "free some space, or have the quota raised",
        ErrorKind::FileTooLarge => {
            "raise the limit of file size: ulimit -f, fsize in /etc/security/limits.conf, LimitFSIZE= of systemd"
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "let this user write there on every node of the job, or give another --run-dir"
        }
        ErrorKind::IsADirectory | ErrorKind::NotADirectory => {
            "move away what stands there, or give another --run-dir"
        }
        ErrorKind::NotFound => "the run folder was removed while the job ran",
        _ => "see whether that disk or its file server is there and takes what is written",
    }
}

/// Whether no name leads to it any more. A file that was moved is still kept.
fn is_removed(file: &File) -> bool {
    match fstat(file) {
        Ok(stat) => stat.st_nlink == 0,
        Err(e) => e == rustix::io::Errno::STALE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn a_folder_that_was_removed_is_named_once_and_one_that_was_moved_never() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        fs_err::create_dir_all(run.join("logs")).unwrap();
        let file = |name| File::create(run.join("logs").join(name)).unwrap();
        let files = [file("a-0.out"), file("a-0.err")];
        let mut keep = Keep::new("gpu-02");
        assert_eq!(keep.look(S(2), &files), None);
        fs_err::remove_file(run.join("logs/a-0.out")).unwrap();
        fs_err::rename(&run, dir.path().join("moved")).unwrap();
        assert_eq!(keep.look(S(4), &files), None);
        fs_err::remove_dir_all(dir.path().join("moved")).unwrap();
        assert_eq!(
            keep.look(S(5), &files),
            None,
            "it is too early to look again"
        );
        let said = keep.look(S(6), &files).unwrap();
        assert!(
            said.contains(&format!(
                "on gpu-02 print goes nowhere: {}\n  hint: ",
                run.display()
            )),
            "{said}"
        );
        assert_eq!((keep.look(S(8), &files), keep.next_look()), (None, None));
        assert!(
            keep.missing()
                .unwrap()
                .ends_with("run was removed while the job ran")
        );
    }

    #[test]
    fn a_full_disk_is_said_once_with_what_helps() {
        let mut keep = Keep::new("gpu-02");
        let full = Error::from_raw_os_error(libc::ENOSPC);
        let said = keep.failed(&full).unwrap();
        assert!(said.contains("gpu-02 is lost: No space left"), "{said}");
        assert!(
            said.contains("hint: free some space on that disk"),
            "{said}"
        );
        assert_eq!(keep.failed(&Error::from_raw_os_error(libc::EIO)), None);
        assert_eq!(keep.missing(), Some(full.to_string()));
    }
}
