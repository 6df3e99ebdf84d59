//! Files that are put in their place in one step: a reader never sees half of one, and several processes may write it.

use fs_err::os::unix::fs::OpenOptionsExt;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A name beside `path` that nobody else uses, on whatever host.
pub fn beside(path: &Path) -> PathBuf {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes).expect("the kernel gives random numbers");
    let number = u64::from_ne_bytes(bytes);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.trim_start_matches('.');
    path.with_file_name(format!(".{name}.{number:016x}"))
}

/// Writes `text` to a file of this mode, less the umask, and renames it to `path`.
///
/// # Errors
/// When it cannot be written; nothing is left of it then.
pub fn replace(path: &Path, text: &str, mode: u32) -> std::io::Result<()> {
    let own = beside(path);
    let write = || {
        let mut options = fs_err::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(mode).open(&own)?;
        file.write_all(text.as_bytes())?;
        // Over NFS this brings it to the server.
        drop(file);
        fs_err::rename(&own, path)
    };
    write().inspect_err(|_| {
        let _ = fs_err::remove_file(&own);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_ever_reads_a_part() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".config.yaml");
        let texts = ["a", "b"].map(|letter| letter.repeat(100_000));
        replace(&path, &texts[0], 0o600).unwrap();
        std::thread::scope(|scope| {
            for text in &texts {
                scope.spawn(|| (0..50).for_each(|_| replace(&path, text, 0o600).unwrap()));
            }
            for _ in 0..200 {
                let read = fs_err::read_to_string(&path).unwrap();
                assert!(texts.contains(&read), "{} bytes", read.len());
            }
        });
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 1);
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &fs_err::metadata(&path).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn what_cannot_be_put_in_place_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        fs_err::create_dir(&path).unwrap();
        assert!(replace(&path, "text", 0o600).is_err());
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 1);
    }
}
