//! The run folder: made new under a name of its own, or taken up again.

use anyhow::bail;
use fs_err::File;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use tsm_job::exit::{self, Coded};
use tsm_job::{Config, RunDir};

use crate::manifest::killed;
use crate::replace::replace;
use crate::say::say;

/// A run folder that this launcher alone writes to.
pub struct Folder {
    pub dir: RunDir,
    /// The resolved config for the workers; nothing is there for a program.
    pub config: PathBuf,
    refuse: Refuse,
    /// Held as long as the launcher lives.
    _lock: File,
}

/// What the next free folder is called: `<root>/<name>-<time>`, then `-2`, `-3` behind it.
pub fn name(root: &Path, name: &str, time: &str, attempt: u32) -> PathBuf {
    // A slash in a run's name would make folders in folders.
    let name = name.replace('/', "-");
    root.join(if attempt < 2 {
        format!("{name}-{time}")
    } else {
        format!("{name}-{time}-{attempt}")
    })
}

/// What to say when the folder, or something in it, cannot be made.
type Refuse = fn(&std::io::Error) -> Coded;

/// Of the folder of a run that goes on, which cannot be another.
fn refuse_own(e: &std::io::Error) -> Coded {
    let hint = match e.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free some space",
        _ => "a run goes on in its own folder: let this user write there",
    };
    let text = format!("cannot write to the run folder: {e}\n  hint: {hint}");
    Coded::new(exit::CANNOT_WRITE, text)
}

/// Of the folder of a new run.
fn refuse(e: &std::io::Error) -> Coded {
    let hint = match e.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "free some space, or give another --run-dir"
        }
        _ => "give another --run-dir",
    };
    let text = format!("cannot make the run folder: {e}\n  hint: {hint}");
    Coded::new(exit::CANNOT_WRITE, text)
}

/// The current folder, from which everything on the command line is found.
///
/// # Errors
/// [`exit::PREFLIGHT`] when it was removed, or cannot be looked at.
pub fn current() -> Result<PathBuf, Coded> {
    std::env::current_dir().map_err(|e| {
        let text =
            format!("the current folder is gone: {e}\n  hint: change to one that is there (cd)");
        Coded::new(exit::PREFLIGHT, text)
    })
}

impl Folder {
    /// Makes a folder that did not exist, also when several launchers start in the same second.
    ///
    /// # Errors
    /// [`exit::CANNOT_WRITE`] when it cannot be made.
    pub fn create(root: &Path, run: &str, time: &str) -> anyhow::Result<Folder> {
        let root = std::path::absolute(root)?;
        fs_err::create_dir_all(&root).map_err(|e| refuse(&e))?;
        for attempt in 1..10_000 {
            let path = name(&root, run, time, attempt);
            match fs_err::create_dir(&path) {
                Ok(()) => return Folder::open(path, refuse),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => bail!(refuse(&e)),
            }
        }
        bail!(Coded::new(
            exit::CANNOT_WRITE,
            format!("too many runs called {run}-{time} in {}", root.display())
        ))
    }

    /// Uses `path` for a new run.
    ///
    /// # Errors
    /// [`exit::USAGE`] when it holds a run already.
    pub fn at(path: &Path) -> anyhow::Result<Folder> {
        let path = std::path::absolute(path)?;
        let is_new = || match RunDir::new(&path).manifest().exists() {
            false => Ok(()),
            true => Err(Coded::new(
                exit::USAGE,
                format!(
                    "{} holds a run already\n  hint: continue it with --resume {0}, or give another --run-dir",
                    path.display()
                ),
            )),
        };
        is_new()?;
        fs_err::create_dir_all(&path).map_err(|e| refuse(&e))?;
        let folder = Folder::open(path.clone(), refuse)?;
        // Another launcher may have come and gone before the lock.
        is_new()?;
        Ok(folder)
    }

    /// Takes up the run in `path`; what its last launcher wrote at the end is kept under a number.
    ///
    /// # Errors
    /// When another launcher runs in it.
    pub fn resume(path: &Path) -> anyhow::Result<Folder> {
        let refuse = refuse_own;
        let folder = Folder::open(path.to_path_buf(), refuse)?;
        killed::tell(&folder.dir).map_err(|e| refuse(&e))?;
        keep(&folder.dir.manifest()).map_err(|e| refuse(&e))?;
        let failure = folder.dir.failure();
        if failure.exists() {
            fs_err::rename(&failure, free_number(&failure, 1)).map_err(|e| refuse(&e))?;
        }
        Ok(folder)
    }

    fn open(path: PathBuf, refuse: Refuse) -> anyhow::Result<Folder> {
        let lock = File::options()
            .create(true)
            .append(true)
            .open(path.join("launcher.lock"));
        let lock = lock.map_err(|e| refuse(&e))?;
        let shown = path.display();
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let hint = "wait for it, or give another folder";
                let text = format!("another tsm-launch is running in {shown}\n  hint: {hint}");
                bail!(Coded::new(exit::USAGE, text));
            }
            // Such as Lustre that is mounted without `flock`.
            Err(e) => say(format_args!(
                "warning: files in {shown} cannot be locked ({e}): a second tsm-launch there would not be noticed"
            )),
        }
        let dir = RunDir::new(path);
        fs_err::create_dir_all(dir.logs()).map_err(|e| refuse(&e))?;
        Ok(Folder {
            config: dir.config(),
            dir,
            refuse,
            _lock: lock,
        })
    }

    /// Writes the resolved config. One that is there and differs stays, and the new one gets a
    /// number: then the result is true.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_config(&mut self, config: &Config) -> anyhow::Result<bool> {
        let text = config.to_yaml();
        let first = self.dir.config();
        let same = |path: &Path| fs_err::read_to_string(path).is_ok_and(|old| old == text);
        let numbered = (2..)
            .map(|n| numbered(&first, n))
            .take_while(|path| path.exists());
        let written: Vec<PathBuf> = std::iter::once(first.clone())
            .filter(|p| p.exists())
            .chain(numbered)
            .collect();
        let revised = written.last().is_some_and(|last| !same(last));
        self.config = match written.last() {
            Some(_) if revised => free_number(&first, 2),
            Some(last) => last.clone(),
            None => first,
        };
        // In one step, since nothing else holds what the run was made with.
        if !same(&self.config) {
            replace(&self.config, &text, 0o666).map_err(|e| (self.refuse)(&e))?;
        }
        Ok(revised)
    }
}

/// Gives a manifest a number too. It stays until the next one replaces it: without any, the folder holds no run for
/// whoever looks, or comes after a launcher that wrote none.
fn keep(manifest: &Path) -> std::io::Result<()> {
    let text = match fs_err::read(manifest) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        read => read?,
    };
    let free = free_number(manifest, 1);
    let numbers = (1..).map(|n| numbered(manifest, n));
    let last = numbers.take_while(|path| *path != free).last();
    if last.is_some_and(|last| fs_err::read(last).is_ok_and(|kept| kept == text)) {
        return Ok(());
    }
    // Not every file system has links.
    fs_err::hard_link(manifest, &free).or_else(|_| fs_err::copy(manifest, &free).map(|_| ()))
}

/// `config-2.yaml` for `config.yaml` and 2.
fn numbered(path: &Path, n: u32) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}-{n}.{extension}"))
}

fn free_number(path: &Path, from: u32) -> PathBuf {
    let mut n = from;
    while numbered(path, n).exists() {
        n += 1;
    }
    numbered(path, n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_runs_of_the_same_second_have_two_folders() {
        let root = tempfile::tempdir().unwrap();
        let one = Folder::create(root.path(), "a/b", "T").unwrap();
        let two = Folder::create(root.path(), "a/b", "T").unwrap();
        assert_eq!(one.dir.path(), root.path().join("a-b-T"));
        assert_eq!(two.dir.path(), root.path().join("a-b-T-2"));
    }

    #[test]
    fn a_folder_belongs_to_one_launcher_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let first = Folder::at(root.path()).unwrap();
        let error = Folder::resume(root.path()).err().unwrap();
        assert!(error.to_string().contains("another tsm-launch"), "{error}");
        drop(first);
        assert!(Folder::resume(root.path()).is_ok());
    }

    #[test]
    fn of_launchers_that_start_together_one_has_the_folder() {
        for i in 0..200 {
            let root = tempfile::tempdir().unwrap();
            let run = || {
                let folder = Folder::at(root.path()).ok()?;
                fs_err::write(folder.dir.manifest(), "{}").unwrap();
                Some(())
            };
            let runs = std::thread::scope(|scope| {
                let runs = [0; 4].map(|_| scope.spawn(run));
                runs.into_iter()
                    .filter_map(|run| run.join().unwrap())
                    .count()
            });
            assert_eq!(runs, 1, "round {i}");
        }
    }

    #[test]
    fn resuming_keeps_what_the_last_run_left() {
        let root = tempfile::tempdir().unwrap();
        for n in 1..3 {
            replace(&root.path().join("manifest.json"), &n.to_string(), 0o666).unwrap();
            fs_err::write(root.path().join("failure.json"), n.to_string()).unwrap();
            drop(Folder::resume(root.path()).unwrap());
        }
        let read = |name: &str| fs_err::read_to_string(root.path().join(name)).unwrap();
        assert_eq!(
            (read("manifest-1.json"), read("failure-2.json")),
            ("1".into(), "2".into())
        );
        // It is there all the time, and a launcher that comes to write none leaves all as it is.
        assert_eq!(read("manifest.json"), "2");
        drop(Folder::resume(root.path()).unwrap());
        assert!(!root.path().join("manifest-3.json").exists());
        assert_eq!(read("manifest.json"), "2");
        assert!(!root.path().join("failure.json").exists());
    }

    #[test]
    fn only_a_new_run_is_advised_to_have_another_folder() {
        let root = tempfile::tempdir().unwrap();
        fs_err::create_dir(root.path().join("launcher.lock")).unwrap();
        let hint = |folder: anyhow::Result<Folder>| {
            let error = folder.err().unwrap();
            assert_eq!(exit::code_of(&error), exit::CANNOT_WRITE);
            let text = error.to_string();
            text.split_once("hint: ").unwrap().1.to_owned()
        };
        assert_eq!(hint(Folder::at(root.path())), "give another --run-dir");
        assert_eq!(
            hint(Folder::resume(root.path())),
            "a run goes on in its own folder: let this user write there"
        );
    }

    #[test]
    fn a_used_folder_is_not_overwritten() {
        let root = tempfile::tempdir().unwrap();
        fs_err::write(root.path().join("manifest.json"), "{}").unwrap();
        assert_eq!(
            exit::code_of(&Folder::at(root.path()).err().unwrap()),
            exit::USAGE
        );
    }
}
