//! What the job was made of and what it left: digests of programs and checkpoints.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::{Path, PathBuf};
use tsm_job::RunDir;

use crate::logs::read_small;
use crate::own;

/// A program that took part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Binary {
    pub path: PathBuf,
    pub bytes: u64,
    /// In hexadecimal.
    pub sha256: String,
}

/// A checkpoint in the run folder, as its own manifest describes it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Checkpoint {
    /// Name of the tensor file, below `checkpoints`.
    pub file: String,
    /// Optimizer steps finished.
    pub step: u64,
    pub bytes: u64,
    /// Of the tensor file, in hexadecimal, taken when it was written.
    pub sha256: String,
    /// Why it cannot be used, where that is plain without reading all of it.
    pub problem: Option<String>,
}

/// The part of a checkpoint's manifest that is of interest here.
#[derive(Deserialize)]
struct Described {
    file: String,
    bytes: u64,
    sha256: String,
    meta: Meta,
}

#[derive(Deserialize)]
struct Meta {
    step: u64,
}

/// This program, and the one that the workers run where it is found.
pub fn binaries(command: &[String]) -> Vec<Binary> {
    let own = own::path().ok();
    // The link leads to the program that runs, also when its file was replaced.
    let own = own.and_then(|path| digest(&path, Path::new("/proc/self/exe")).ok());
    let search = std::env::var_os("PATH").unwrap_or_default();
    let worker = command.first().and_then(|program| {
        let path = find(program, std::env::split_paths(&search))?;
        digest(&path, &path).ok()
    });
    own.into_iter().chain(worker).collect()
}

/// Where a shell would find `program`.
fn find(program: &str, mut search: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    if program.contains('/') {
        return std::path::absolute(program).ok().filter(|p| p.is_file());
    }
    search.find_map(|dir| Some(dir.join(program)).filter(|path| path.is_file()))
}

fn digest(path: &Path, content: &Path) -> std::io::Result<Binary> {
    let mut file = fs_err::File::open(content)?;
    let (mut digest, mut bytes) = (Sha256::new(), 0);
    let mut buffer = vec![0; 256 << 10];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        digest.update(&buffer[..n]);
        bytes += n as u64;
    }
    let hex = |byte: &u8| format!("{byte:02x}");
    Ok(Binary {
        path: path.into(),
        bytes,
        sha256: digest.finalize().iter().map(hex).collect(),
    })
}

/// The checkpoints in the folder, by step; `best` comes behind the step that it is. What cannot be read as
/// the manifest of a checkpoint is left out.
pub fn checkpoints(dir: &RunDir) -> Vec<Checkpoint> {
    let Ok(entries) = fs_err::read_dir(dir.checkpoints()) else {
        return Vec::new();
    };
    let is_manifest = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.ends_with(".json") && !name.starts_with('.')
    };
    let read = |path: PathBuf| {
        let found: Described = serde_json::from_str(&read_small(&path)?).ok()?;
        let size = fs_err::metadata(dir.checkpoints().join(&found.file)).map(|m| m.len());
        let problem = match size {
            Ok(size) if size == found.bytes => None,
            Ok(size) => Some(format!("its file has {size} bytes")),
            Err(e) => Some(e.to_string()),
        };
        Some(Checkpoint {
            file: found.file,
            step: found.meta.step,
            bytes: found.bytes,
            sha256: found.sha256,
            problem,
        })
    };
    let paths = entries.flatten().map(|entry| entry.path());
    let mut found: Vec<_> = paths.filter(is_manifest).filter_map(read).collect();
    found.sort_by(|a, b| (a.step, b.file.as_str()).cmp(&(b.step, a.file.as_str())));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_come_in_order_with_what_is_wrong() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::new(root.path());
        assert!(checkpoints(&dir).is_empty());
        fs_err::create_dir(dir.checkpoints()).unwrap();
        let write =
            |name: &str, text: &str| fs_err::write(dir.checkpoints().join(name), text).unwrap();
        for (name, step, bytes) in [
            ("step-00000020", 20, 3),
            ("step-00000010", 10, 3),
            ("best", 20, 3),
            ("step-00000030", 30, 4),
        ] {
            let file = format!("{name}.safetensors");
            write(&file, "abc");
            let meta = serde_json::json!({"format": 3, "step": step, "seed": 0});
            let manifest =
                serde_json::json!({"file": file, "bytes": bytes, "sha256": "ba78", "meta": meta});
            write(&format!("{name}.json"), &manifest.to_string());
        }
        write("notes.json", "{}");
        write(".tmp-step-00000040.json", "{");
        fs_err::remove_file(dir.checkpoints().join("step-00000010.safetensors")).unwrap();
        let found = checkpoints(&dir);
        let files: Vec<_> = found
            .iter()
            .map(|c| c.file.trim_end_matches(".safetensors"))
            .collect();
        assert_eq!(
            files,
            ["step-00000010", "step-00000020", "best", "step-00000030"]
        );
        assert!(found[0].problem.is_some());
        assert_eq!(
            (found[1].problem.as_deref(), found[1].sha256.as_str()),
            (None, "ba78")
        );
        assert_eq!(found[3].problem.as_deref(), Some("its file has 3 bytes"));
    }

    #[test]
    fn a_program_is_digested_as_sha256sum_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc");
        fs_err::write(&path, "abc").unwrap();
        let found = find(
            "abc",
            [PathBuf::from("/nonexistent"), dir.path().into()].into_iter(),
        );
        assert_eq!(found.as_deref(), Some(path.as_path()));
        let digest = digest(&path, &path).unwrap();
        assert_eq!(digest.bytes, 3);
        // FIPS 180-2, appendix B.1.
        assert_eq!(
            digest.sha256,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(find("abc", std::iter::empty()), None);
        assert_eq!(find("./none/abc", std::iter::empty()), None);
        assert_eq!(binaries(&[path.to_string_lossy().into()]).len(), 2);
    }
}
