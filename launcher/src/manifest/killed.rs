//! The manifest of a launcher that had no time to write how its job ended.

use serde_json::{Value, json};
use std::io::Result;
use std::path::Path;
use std::time::SystemTime;
use tsm_job::RunDir;

use super::{files, write_json};
use crate::clock::Utc;

const CAUSE: &str = "tsm-launch or its machine was killed";

/// Gives the manifest in `dir` a true outcome where it says that the job runs. Only for who holds the folder, so that
/// it does not run. What is no manifest stays as it is.
///
/// # Errors
/// When it cannot be written.
pub fn tell(dir: &RunDir) -> Result<()> {
    let path = dir.manifest();
    let text = fs_err::read_to_string(&path).unwrap_or_default();
    let Ok(mut manifest) = serde_json::from_str::<Value>(&text) else {
        return Ok(());
    };
    if manifest["outcome"] != "running" {
        return Ok(());
    }
    let ended = Utc::from(last_sign(dir)).rfc3339();
    close(&mut manifest, &ended);
    manifest["checkpoints"] = json!(files::checkpoints(dir));
    write_json(&path, &manifest)
}

fn close(manifest: &mut Value, ended: &str) {
    manifest["outcome"] = "killed".into();
    manifest["ended"] = ended.into();
    manifest["reason"] = CAUSE.into();
    let newest = manifest["generations"].as_array_mut();
    if let Some(newest) = newest.and_then(|all| all.last_mut())
        && newest["ended"].is_null()
    {
        newest["ended"] = ended.into();
        newest["cause"] = CAUSE.into();
    }
}

/// When something was last written into the folder: soon after that the job was over.
fn last_sign(dir: &RunDir) -> SystemTime {
    let files = |dir: &Path| fs_err::read_dir(dir).into_iter().flatten().flatten();
    let all = files(dir.path()).chain(files(&dir.logs()));
    let changed = |entry: fs_err::DirEntry| {
        let about = entry.metadata().ok().filter(std::fs::Metadata::is_file)?;
        about.modified().ok()
    };
    all.filter_map(changed)
        .max()
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn told(text: &str) -> String {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::new(root.path());
        fs_err::create_dir(dir.logs()).unwrap();
        fs_err::write(dir.manifest(), text).unwrap();
        let log = fs_err::File::create(dir.log("a", 0, false)).unwrap();
        for (file, s) in [
            (fs_err::File::open(dir.manifest()).unwrap(), 1_000_000_000),
            (log, 1_000_000_060),
        ] {
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(s);
            file.file().set_modified(time).unwrap();
        }
        tell(&dir).unwrap();
        fs_err::read_to_string(dir.manifest()).unwrap()
    }

    #[test]
    fn a_job_that_ran_to_the_last_was_killed_when_it_last_wrote_something() {
        let running = r#"{"run_id": "a", "ended": null, "outcome": "running", "generations": [
            {"ended": "T1", "cause": "rank 0 failed first"}, {"ended": null, "cause": null, "last_step": 7}]}"#;
        let manifest: Value = serde_json::from_str(&told(running)).unwrap();
        let ended = "2001-09-09T01:47:40.000Z";
        let expected = json!({"run_id": "a", "ended": ended, "outcome": "killed", "reason": CAUSE, "generations": [
            {"ended": "T1", "cause": "rank 0 failed first"},
            {"ended": ended, "cause": CAUSE, "last_step": 7}], "checkpoints": []});
        assert_eq!(manifest, expected);
    }

    #[test]
    fn one_that_was_killed_between_two_starts_keeps_the_cause_of_the_last() {
        let running = r#"{"outcome": "running", "generations": [{"ended": "T1", "cause": "c"}]}"#;
        let manifest: Value = serde_json::from_str(&told(running)).unwrap();
        assert_eq!(manifest["outcome"], "killed");
        assert_eq!(manifest["generations"][0]["cause"], "c");
    }

    #[test]
    fn what_says_how_it_ended_or_is_no_manifest_stays() {
        for text in [
            r#"{"outcome":"failed","ended":"T"}"#,
            "",
            "{",
            "7",
            "[]",
            "{}",
        ] {
            assert_eq!(told(text), text);
        }
    }
}
