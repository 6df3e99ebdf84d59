//! Folders that the job writes to.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cluster::message::Finding;
use crate::replace::beside;
use crate::text::size;

/// Room for the logs of a short run. What checkpoints need is not known here.
const MIN_FREE: u64 = 16 << 20;
const LOW_FREE: u64 = 5 << 30;
const LOW_INODES: u64 = 10_000;
const SLOW: Duration = Duration::from_secs(1);

/// A folder's file system.
#[derive(Clone, Debug)]
pub struct Disk {
    pub free_bytes: u64,
    pub total_bytes: u64,
    /// `None`: the file system does not count them.
    pub free_inodes: Option<u64>,
    /// How long a small file took to be written, synchronised, renamed and removed.
    pub write: Result<Duration, String>,
}

/// Those of `folders` that lie on different file systems or cannot be looked at.
pub fn distinct(folders: &[PathBuf]) -> Vec<PathBuf> {
    let mut seen = Vec::new();
    let is_new = |folder: &&PathBuf| match fs_err::metadata(existing(folder)) {
        Ok(found) if seen.contains(&found.dev()) => false,
        Ok(found) => {
            seen.push(found.dev());
            true
        }
        Err(_) => true,
    };
    folders.iter().filter(is_new).cloned().collect()
}

/// The folder itself, or the nearest one above it that exists.
fn existing(folder: &Path) -> PathBuf {
    let folder = std::path::absolute(folder).unwrap_or(folder.into());
    let mut above = folder.ancestors();
    above
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"))
        .into()
}

pub fn read(folder: &Path) -> Disk {
    let tried = existing(folder);
    let write = write(&tried).map_err(|e| e.to_string());
    match rustix::fs::statvfs(&tried) {
        Ok(found) => Disk {
            free_bytes: found.f_bavail * found.f_frsize,
            total_bytes: found.f_blocks * found.f_frsize,
            free_inodes: (found.f_files > 0).then_some(found.f_favail),
            write,
        },
        Err(e) => Disk {
            free_bytes: 0,
            total_bytes: 0,
            free_inodes: None,
            write: write.and(Err(format!("statvfs {}: {e}", tried.display()))),
        },
    }
}

/// What a checkpoint does, with a small file.
fn write(folder: &Path) -> std::io::Result<Duration> {
    let start = Instant::now();
    // The process's own number is another one's on another node, or in another container.
    let [path, done] = [(); 2].map(|()| beside(&folder.join("tsm-doctor")));
    let written = (|| {
        let mut file = fs_err::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)?;
        file.write_all(b"tsm-launch doctor\n")?;
        file.sync_all()?;
        fs_err::rename(&path, &done)
    })();
    let took = start.elapsed();
    let _ = (
        fs_err::remove_file(&done),
        written.is_err() && fs_err::remove_file(&path).is_ok(),
    );
    written.map(|()| took)
}

pub fn judge(folder: &Path, disk: &Disk) -> Vec<Finding> {
    let name = folder.display();
    let took = match &disk.write {
        Ok(took) => *took,
        Err(e) => {
            let text = format!("{name} cannot be written to: {e}");
            return vec![Finding::error(
                "disk",
                text,
                "take another folder with --run-dir, or repair this one",
            )];
        }
    };
    let (free, total) = (size(disk.free_bytes), size(disk.total_bytes));
    let hint = "remove old runs, or take another folder with --run-dir";
    let mut found = Vec::new();
    if disk.free_bytes < MIN_FREE {
        found.push(Finding::error(
            "disk",
            format!(
                "{free} of {total} are free for {name}, and even a short run needs {}",
                size(MIN_FREE)
            ),
            hint,
        ));
    } else if disk.free_bytes < LOW_FREE {
        found.push(Finding::warning(
            "disk",
            format!("{free} of {total} are free for {name}"),
            hint,
        ));
    }
    match disk.free_inodes {
        Some(0) => found.push(Finding::error(
            "disk",
            format!("no inode is free for {name}"),
            hint,
        )),
        Some(n) if n < LOW_INODES => {
            found.push(Finding::warning(
                "disk",
                format!("{n} inodes are free for {name}"),
                hint,
            ));
        }
        _ => {}
    }
    let ms = took.as_secs_f64() * 1e3;
    if took > SLOW {
        let text =
            format!("{name} is slow: a small file takes {ms:.0} ms to be written and synchronised");
        found.push(Finding::warning(
            "disk",
            text,
            "checkpoints will hold up training; a local disk is quicker",
        ));
    }
    if found.is_empty() {
        found.push(Finding::ok(
            "disk",
            format!("{name}: {free} of {total} free, a small file is safe in {ms:.1} ms"),
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::message::Severity::{self, Error, Ok as Good, Warning};

    fn severities(change: impl Fn(&mut Disk)) -> Vec<Severity> {
        let mut disk = Disk {
            free_bytes: 50 << 30,
            total_bytes: 100 << 30,
            free_inodes: Some(1_000_000),
            write: Ok(Duration::from_millis(3)),
        };
        change(&mut disk);
        judge(Path::new("/data/runs"), &disk)
            .iter()
            .map(|f| f.severity)
            .collect()
    }

    #[test]
    fn how_much_is_needed_is_said() {
        let disk = Disk {
            free_bytes: 3 << 20,
            total_bytes: 3 << 20,
            free_inodes: None,
            write: Ok(Duration::ZERO),
        };
        assert_eq!(
            judge(Path::new("/r"), &disk)[0].text,
            "3.0 MiB of 3.0 MiB are free for /r, and even a short run needs 16.0 MiB"
        );
    }

    #[test]
    fn space_inodes_and_speed() {
        assert_eq!(severities(|_| {}), [Good]);
        assert_eq!(severities(|d| d.free_inodes = None), [Good]);
        assert_eq!(severities(|d| d.free_bytes = (5 << 30) - 1), [Warning]);
        assert_eq!(severities(|d| d.free_bytes = MIN_FREE - 1), [Error]);
        assert_eq!(severities(|d| d.free_inodes = Some(9_999)), [Warning]);
        assert_eq!(severities(|d| d.free_inodes = Some(0)), [Error]);
        assert_eq!(
            severities(|d| d.write = Ok(Duration::from_secs(2))),
            [Warning]
        );
        assert_eq!(
            severities(|d| d.write = Err("read-only file system".into())),
            [Error]
        );
    }

    #[test]
    fn a_folder_that_does_not_exist_yet_is_tried_above() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("runs/a");
        let disk = read(&folder);
        assert_eq!(existing(&folder), dir.path());
        assert!(
            disk.write.is_ok() && disk.total_bytes >= disk.free_bytes,
            "{disk:?}"
        );
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 0);
        let twice = [folder.clone(), folder.join("checkpoints"), "/proc".into()];
        assert_eq!(distinct(&twice), [folder, "/proc".into()]);
    }

    #[test]
    fn many_may_try_the_same_folder_at_the_same_time() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            let tries = [(); 8].map(|()| scope.spawn(|| read(dir.path()).write));
            for tried in tries {
                tried.join().unwrap().unwrap();
            }
        });
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn where_nothing_can_be_written_the_path_is_named() {
        let found = judge(Path::new("/proc/x"), &read(Path::new("/proc/x")));
        assert_eq!(found[0].severity, Error);
        assert!(found[0].text.contains("/proc/.tsm-doctor."), "{found:?}");
    }
}
