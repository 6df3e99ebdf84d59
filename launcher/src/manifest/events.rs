//! `events.jsonl`: the launcher's diary.

use fs_err::File;
use serde_json::{Value, json};
use std::io::{Read, Result, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tsm_job::RunDir;

use crate::clock::Utc;

/// A line that cannot be written is left out, since the job matters more, and counted: the next one that can be
/// follows a line of the kind `lost`.
pub struct Events {
    path: PathBuf,
    /// `None`: it could not be opened yet.
    file: Option<File>,
    /// What is written next begins a line: the last one may have been written in part.
    broken: bool,
    lost: u64,
    start: Instant,
}

impl Events {
    pub fn open(dir: &RunDir, start: Instant) -> Events {
        let path = dir.events();
        Events {
            file: None,
            broken: is_torn(&path),
            path,
            lost: 0,
            start,
        }
    }

    /// Adds a line: `fields` after the time, the milliseconds since the start, and the kind.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, kind: &str, fields: Value) -> Result<()> {
        if self.lost > 0 && self.add("lost", json!({"lines": self.lost})).is_ok() {
            self.lost = 0;
        }
        let written = self.add(kind, fields);
        self.lost += u64::from(written.is_err());
        written
    }

    fn add(&mut self, kind: &str, fields: Value) -> Result<()> {
        let ms = self.start.elapsed().as_secs_f64() * 1e3;
        let mut line =
            json!({"time": Utc::now().rfc3339(), "ms": (ms * 1e3).round() / 1e3, "event": kind});
        if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields) {
            line.extend(fields);
        }
        let before = if self.broken { "\n" } else { "" };
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(File::options().create(true).append(true).open(&self.path)?),
        };
        let written = file.write_all(format!("{before}{line}\n").as_bytes());
        self.broken = written.is_err();
        written
    }
}

/// Whether a launcher that wrote there before did not finish its last line.
fn is_torn(path: &Path) -> bool {
    let last = || {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::End(-1))?;
        let mut last = [0];
        file.read_exact(&mut last).map(|()| last[0])
    };
    last().is_ok_and(|byte: u8| byte != b'\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(path: &Path) -> Vec<String> {
        let text = fs_err::read_to_string(path).unwrap();
        let kind = |line| match serde_json::from_str::<Value>(line) {
            Ok(line) if line["event"] == "lost" => format!("{} lost", line["lines"]),
            Ok(line) => line["event"].as_str().unwrap().into(),
            Err(_) => format!("torn: {line}"),
        };
        text.lines().map(kind).collect()
    }

    #[test]
    fn lines_that_a_full_disk_does_not_take_are_counted_once_there_is_room() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::new(root.path());
        let mut events = Events::open(&dir, Instant::now());
        let write = |events: &mut Events, kind| events.write(kind, json!({"a": 1}));
        write(&mut events, "first").unwrap();
        for round in ["second", "third"] {
            let full = File::options().append(true).open("/dev/full").unwrap();
            let file = events.file.replace(full);
            for _ in 0..3 {
                let e = write(&mut events, "not this").unwrap_err();
                assert_eq!(e.kind(), std::io::ErrorKind::StorageFull);
            }
            events.file = file;
            // What such a disk keeps of a line.
            let mut half = events.file.as_ref().unwrap().file();
            half.write_all(b"{\"time\"").unwrap();
            write(&mut events, round).unwrap();
        }
        write(&mut events, "last").unwrap();
        let torn = "torn: {\"time\"";
        let expected = [
            "first", torn, "3 lost", "second", torn, "3 lost", "third", "last",
        ];
        assert_eq!(kinds(&dir.events()), expected);
    }

    #[test]
    fn a_diary_that_cannot_be_opened_yet_is_opened_later() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::new(root.path().join("run"));
        let mut events = Events::open(&dir, Instant::now());
        assert!(events.write("first", json!({})).is_err());
        fs_err::create_dir(dir.path()).unwrap();
        events.write("second", json!({})).unwrap();
        assert_eq!(kinds(&dir.events()), ["1 lost", "second"]);
    }

    #[test]
    fn after_half_a_line_of_a_former_launcher_comes_a_new_one() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::new(root.path());
        for before in ["{\"event\":\"a\"}\n", "{\"event\":\"a\"}\n{\"ev"] {
            fs_err::write(dir.events(), before).unwrap();
            let mut events = Events::open(&dir, Instant::now());
            events.write("b", json!({})).unwrap();
            let found = kinds(&dir.events());
            assert_eq!(
                (found[0].as_str(), found.last().unwrap().as_str()),
                ("a", "b")
            );
        }
    }
}
