//! What the launchers before this one wrote into a run folder.

use std::path::{Path, PathBuf};
use tsm_job::RunDir;

/// What the run in `dir` began from: its first launcher was told so, later ones continued it in its place. `None`: from
/// the beginning, as far as is known.
pub fn began_from(dir: &Path) -> Option<PathBuf> {
    let kept = dir.join("manifest-1.json");
    let first = [kept, RunDir::new(dir).manifest()];
    let first = first.iter().find(|path| path.is_file())?;
    let manifest = read(first)?;
    let from = PathBuf::from(manifest["resumed_from"].as_str()?);
    (from != dir).then_some(from)
}

/// The outcome of a launcher whose manifest is empty or half of one, as a machine that loses its power may leave it.
pub const UNREADABLE: &str = "unreadable";

/// The outcome and exit code of the last launcher in `dir`; `None` where none has come to write a manifest.
pub fn outcome(dir: &Path) -> Option<(String, Option<i32>)> {
    let path = RunDir::new(dir).manifest();
    let Some(manifest) = read(&path) else {
        return path.exists().then(|| (UNREADABLE.into(), None));
    };
    let outcome = manifest["outcome"].as_str().unwrap_or("running");
    let code = manifest["exit_code"].as_i64();
    let code = code.and_then(|code| i32::try_from(code).ok());
    Some((outcome.into(), code))
}

fn read(manifest: &Path) -> Option<serde_json::Value> {
    let text = fs_err::read_to_string(manifest).ok()?;
    serde_json::from_str(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_launcher_of_a_run_knows_what_it_began_from() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path();
        let write = |name: &str, from: serde_json::Value| {
            let manifest = serde_json::json!({"resumed_from": from});
            fs_err::write(dir.join(name), manifest.to_string()).unwrap();
        };
        assert_eq!(began_from(dir), None, "it wrote nothing");
        write("manifest.json", serde_json::Value::Null);
        assert_eq!(began_from(dir), None);
        write("manifest.json", "/old/step-7.safetensors".into());
        let old = Some(PathBuf::from("/old/step-7.safetensors"));
        assert_eq!(began_from(dir), old);
        // As a second launcher, which continued the run, finds and leaves it.
        fs_err::rename(dir.join("manifest.json"), dir.join("manifest-1.json")).unwrap();
        write("manifest.json", dir.to_string_lossy().into());
        assert_eq!(began_from(dir), old);
        write("manifest-1.json", dir.to_string_lossy().into());
        assert_eq!(began_from(dir), None);
    }
}
