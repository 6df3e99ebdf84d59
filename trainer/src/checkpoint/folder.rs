//! The folder `checkpoints/` of a run: which files are in it, which one to resume from, which to
//! drop.

use super::file::{self, broken, cannot_write, file_name, manifest_of};
use super::{Meta, Snapshot};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use tsm_job::exit::{self, Coded};

/// The checkpoints of a run. Only rank 0 may write.
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep_last: usize,
}

/// A checkpoint found by [`find`].
#[derive(Debug)]
pub struct Found {
    pub snapshot: Snapshot,
    /// Its tensor file.
    pub path: PathBuf,
    /// Of that file, in hexadecimal.
    pub sha256: String,
    /// Newer checkpoints that could not be used, each with the reason: warn about them.
    pub skipped: Vec<String>,
}

impl Found {
    /// The checkpoint's two files as bytes, for a process that cannot read them; see [`Found::unpack`].
    ///
    /// # Errors
    /// A file cannot be read any more (exit code DATA).
    pub fn pack(&self) -> Result<Vec<u8>> {
        let manifest = manifest_of(&self.path);
        let read = |path: &Path| fs_err::read(path).map_err(|e| broken(&self.path, &e.to_string()));
        let (manifest, tensors) = (read(&manifest)?, read(&self.path)?);
        let path = self.path.as_os_str().as_bytes();
        let mut bytes = Vec::with_capacity(16 + path.len() + manifest.len() + tensors.len());
        for part in [path, &manifest] {
            bytes.extend((part.len() as u64).to_le_bytes());
            bytes.extend(part);
        }
        bytes.extend(tensors);
        Ok(bytes)
    }

    /// What [`Found::pack`] has packed, verified as if it were read from the files; `path` is the one there.
    ///
    /// # Errors
    /// The bytes are no checkpoint (exit code DATA).
    pub fn unpack(bytes: &[u8]) -> Result<Found> {
        let part = |bytes: &[u8]| -> Option<(Vec<u8>, usize)> {
            let length = u64::from_le_bytes(*bytes.first_chunk()?);
            let end = usize::try_from(length).ok()?.checked_add(8)?;
            Some((bytes.get(8..end)?.to_vec(), end))
        };
        let cut = || broken(Path::new("from another rank"), "its end is missing");
        let (path, end) = part(bytes).ok_or_else(cut)?;
        let bytes = &bytes[end..];
        let (manifest, end) = part(bytes).ok_or_else(cut)?;
        let path = PathBuf::from(OsString::from_vec(path));
        let manifest = file::parse_manifest(&path, &String::from_utf8_lossy(&manifest))?;
        let sha256 = manifest.sha256.clone();
        Ok(Found {
            snapshot: file::parse(manifest, &path, &bytes[end..])?,
            path,
            sha256,
            skipped: Vec::new(),
        })
    }
}

impl Checkpoints {
    /// Opens the folder for writing: makes it, and removes what an interrupted save left behind.
    ///
    /// # Errors
    /// The folder cannot be made or read (exit code CANNOT_WRITE).
    pub fn open(dir: &Path, keep_last: u32) -> Result<Checkpoints> {
        fs_err::create_dir_all(dir).map_err(|e| cannot_write(dir, 0, &e))?;
        for name in names(dir)? {
            if name.starts_with(file::TEMPORARY) {
                remove(&dir.join(&name))?;
            }
        }
        Ok(Checkpoints {
            dir: dir.to_path_buf(),
            keep_last: keep_last.max(1) as usize,
        })
    }

    /// Saves `step-<meta.step>`, drops the oldest beyond `keep_last`, and with `best` makes it
    /// `best.safetensors` and `best.json` too. Returns the tensor file's path.
    ///
    /// # Errors
    /// Exit code CANNOT_WRITE with the path, the bytes needed and the bytes free; the earlier
    /// checkpoints are then as they were.
    pub fn save(&self, snapshot: &Snapshot, best: bool) -> Result<PathBuf> {
        let path = self
            .dir
            .join(format!("step-{:08}.safetensors", snapshot.meta.step));
        let manifest = file::write(&path, snapshot)?;
        if best {
            self.link_best(&path, manifest)?;
        }
        self.prune()?;
        Ok(path)
    }

    /// What the manifest of the best checkpoint says; `None` when there is none.
    pub fn best(&self) -> Result<Option<Meta>> {
        let path = self.dir.join("best.json");
        if !path.exists() {
            return Ok(None);
        }
        Ok(Some(file::read_manifest(&path)?.meta))
    }

    fn link_best(&self, path: &Path, mut manifest: file::Manifest) -> Result<()> {
        let best = self.dir.join("best.safetensors");
        let temporary = file::temporary(&best);
        let bytes = manifest.bytes;
        // Some file systems have no hard links.
        if fs_err::hard_link(path, &temporary).is_err()
            && let Err(e) = fs_err::copy(path, &temporary)
        {
            let _ = fs_err::remove_file(&temporary);
            return Err(cannot_write(&best, bytes, &e));
        }
        file::publish(&temporary, &best, bytes)?;
        manifest.file = file_name(&best);
        file::write_manifest(&manifest_of(&best), &manifest)
    }

    fn prune(&self) -> Result<()> {
        for (_, manifest) in steps(&self.dir)?.into_iter().skip(self.keep_last) {
            // Without its manifest a checkpoint no longer exists: a crash in between leaves no
            // manifest whose tensors are gone.
            remove(&manifest)?;
            let tensors = manifest.with_extension("safetensors");
            if tensors.exists() {
                remove(&tensors)?;
            }
        }
        Ok(())
    }
}

/// The checkpoint to resume from. `path` is a run folder, its `checkpoints` folder (the newest
/// valid one is taken), or one checkpoint's `.safetensors` or `.json` file.
///
/// # Errors
/// There is none, or the one named is not usable (exit code DATA).
pub fn find(path: &Path) -> Result<Found> {
    if !path.is_dir() {
        if !path.exists() {
            return Err(nothing(path, "it does not exist"));
        }
        let manifest = manifest_of(path);
        if !manifest.exists() {
            return Err(broken(
                path,
                &format!("it has no manifest {}", manifest.display()),
            ));
        }
        let (snapshot, sha256) = file::read(&manifest)?;
        return Ok(Found {
            snapshot,
            path: path.with_extension("safetensors"),
            sha256,
            skipped: Vec::new(),
        });
    }
    let dir = folder_in(path);
    let (found, skipped) = newest(&dir)?;
    found.ok_or_else(|| {
        let why = match skipped.len() {
            0 => "it holds no step-*.json".to_string(),
            n => format!(
                "none of its {n} checkpoints is usable:\n  {}",
                skipped.join("\n  ")
            ),
        };
        nothing(&dir, &why)
    })
}

/// As [`find`], but a run folder without a usable checkpoint is no error: the reasons why those that
/// are there cannot be used.
///
/// # Errors
/// The folder does not exist or cannot be read, or the checkpoint named is not usable (exit code
/// DATA).
pub fn find_if_any(path: &Path) -> Result<std::result::Result<Found, Vec<String>>> {
    if !path.is_dir() {
        return find(path).map(Ok);
    }
    let (found, skipped) = newest(&folder_in(path))?;
    Ok(found.ok_or(skipped))
}

/// The folder of checkpoints that `path`, a run folder or that folder itself, means.
fn folder_in(path: &Path) -> PathBuf {
    let inner = path.join("checkpoints");
    if inner.is_dir() {
        inner
    } else {
        path.to_path_buf()
    }
}

/// The newest checkpoint of a folder that can be used, and why newer ones cannot.
fn newest(dir: &Path) -> Result<(Option<Found>, Vec<String>)> {
    let mut skipped = Vec::new();
    for (_, manifest) in steps(dir)? {
        match file::read(&manifest) {
            Ok((snapshot, sha256)) => {
                let found = Found {
                    snapshot,
                    path: manifest.with_extension("safetensors"),
                    sha256,
                    skipped,
                };
                return Ok((Some(found), Vec::new()));
            }
            Err(e) => skipped.push(format!("{e:#}")),
        }
    }
    Ok((None, skipped))
}

fn nothing(path: &Path, why: &str) -> anyhow::Error {
    Coded::new(
        exit::DATA,
        format!("cannot resume from {}: {why}", path.display()),
    )
    .into()
}

/// Step and manifest of every checkpoint in the folder, newest first.
fn steps(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut out: Vec<(u64, PathBuf)> = names(dir)?
        .into_iter()
        .filter_map(|name| {
            let step = name.strip_prefix("step-")?.strip_suffix(".json")?;
            Some((step.parse().ok()?, dir.join(&name)))
        })
        .collect();
    out.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    Ok(out)
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let list = || -> std::io::Result<Vec<String>> {
        fs_err::read_dir(dir)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    };
    list().with_context(|| format!("cannot list checkpoints in {}", dir.display()))
}

fn remove(path: &Path) -> Result<()> {
    fs_err::remove_file(path).context("cannot remove an old checkpoint")
}
