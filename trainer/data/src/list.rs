//! Annotation lists: which videos there are, where, how long and of which class.
//!
//! A line is `path frames label` (rawframes) or `path label` (video). The last fields are split
//! from the right, so a path may contain spaces. Blank lines and lines that begin with `#` are
//! skipped. No video is dropped for being short, unlike in the original's training.

use anyhow::Result;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use tsm_job::Config;
use tsm_job::config::DataFormat;
use tsm_job::exit::{self, Coded};

/// Bad lines of a file that are shown before the rest is only counted.
const SHOWN: usize = 20;

/// One video of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// A folder of frames or a video file, root included.
    pub path: PathBuf,
    /// Frames in the folder; 0 for a video file, whose length only its decoder knows.
    pub num_frames: u64,
    /// Below the number of classes.
    pub label: u32,
    /// Line in the list, from 1.
    pub line: usize,
}

/// An annotation list, checked line by line.
#[derive(Clone, Debug)]
pub struct SampleList {
    /// The list's own path, for messages.
    pub file: PathBuf,
    pub entries: Vec<Entry>,
}

/// Which of the two lists of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    Train,
    Val,
}

impl SampleList {
    /// Reads the list of `split`.
    ///
    /// # Errors
    /// As [`SampleList::load`].
    pub fn of_config(config: &Config, split: Split) -> Result<SampleList> {
        let data = &config.data;
        let file = match split {
            Split::Train => &data.train_list,
            Split::Val => &data.val_list,
        };
        SampleList::load(file, data.format, &data.root, config.model.num_classes)
    }

    /// Reads a list; relative paths in it start at `root`.
    ///
    /// # Errors
    /// With exit code [`exit::DATA`]: the file cannot be read, names no video, or has bad lines,
    /// which are reported together with what to do about each.
    pub fn load(
        file: &Path,
        format: DataFormat,
        root: &Path,
        num_classes: u32,
    ) -> Result<SampleList> {
        let text = read(file)?;
        let mut entries = Vec::new();
        let mut bad = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match parse_line(line, format, num_classes) {
                Ok((path, num_frames, label)) => entries.push(Entry {
                    path: root.join(path),
                    num_frames,
                    label,
                    line: number + 1,
                }),
                Err(reason) => bad.push((number + 1, line, reason)),
            }
        }
        if !bad.is_empty() {
            return Err(bad_lines(file, &bad));
        }
        if entries.is_empty() {
            let message = format!(
                "{} names no video; a line is `{}`",
                file.display(),
                line_format(format)
            );
            return Err(Coded::new(exit::DATA, message).into());
        }
        Ok(SampleList {
            file: file.to_path_buf(),
            entries,
        })
    }
}

fn line_format(format: DataFormat) -> &'static str {
    match format {
        DataFormat::Rawframes => "path frames label",
        DataFormat::Video => "path label",
    }
}

fn read(file: &Path) -> Result<String> {
    let text = fs_err::read_to_string(file).map_err(|e| Coded::new(exit::DATA, e.to_string()))?;
    // Spreadsheets put a byte order mark in front; it would become part of the first path.
    Ok(text
        .strip_prefix('\u{feff}')
        .map(str::to_owned)
        .unwrap_or(text))
}

/// Path, frames and label of a line, or what is wrong with it and what to do.
fn parse_line(
    line: &str,
    format: DataFormat,
    num_classes: u32,
) -> Result<(&str, u64, u32), String> {
    let (num_numbers, other) = match format {
        DataFormat::Rawframes => (2, "for lists of `path label` set data.format: video"),
        DataFormat::Video => (1, "a line needs a path and a label"),
    };
    let fields = split_from_right(line, num_numbers);
    if fields.len() != num_numbers + 1 {
        return Err(format!(
            "{} of the {} fields `{}`; {other}",
            fields.len(),
            num_numbers + 1,
            line_format(format)
        ));
    }
    let (label, path) = (fields[0], fields[num_numbers]);
    let num_frames = match format {
        DataFormat::Video => 0,
        DataFormat::Rawframes => match fields[1].parse::<i64>() {
            Ok(n) if n >= 1 => n as u64,
            Ok(n) => {
                return Err(format!(
                    "{n} frames; extract the frames again or remove the line"
                ));
            }
            Err(_) => {
                return Err(format!(
                    "the number of frames is `{}`, not a whole number; {other}",
                    fields[1]
                ));
            }
        },
    };
    match label.parse::<i64>() {
        Ok(l) if (0..i64::from(num_classes)).contains(&l) => Ok((path, num_frames, l as u32)),
        Ok(l) => Err(format!(
            "label {l} is not in 0..{num_classes}; correct the line or model.num_classes \
             (labels start at 0)"
        )),
        Err(_) => Err(format!(
            "the label is `{label}`, not a whole number; write the class's line number in the \
             class names file, from 0"
        )),
    }
}

/// The last `num_numbers` fields, last first, then what is left.
fn split_from_right(line: &str, num_numbers: usize) -> Vec<&str> {
    let mut fields = Vec::new();
    let mut rest = line;
    while fields.len() < num_numbers {
        let Some(at) = rest.rfind(char::is_whitespace) else {
            break;
        };
        fields.push(rest[at..].trim());
        rest = rest[..at].trim_end();
    }
    fields.push(rest);
    fields
}

fn bad_lines(file: &Path, bad: &[(usize, &str, String)]) -> anyhow::Error {
    let mut message = format!(
        "{}: {} bad line{}",
        file.display(),
        bad.len(),
        if bad.len() == 1 { "" } else { "s" }
    );
    for (number, line, reason) in bad.iter().take(SHOWN) {
        let _ = write!(
            message,
            "\n  {}:{number}: `{line}`: {reason}",
            file.display()
        );
    }
    if bad.len() > SHOWN {
        let _ = write!(message, "\n  and {} more", bad.len() - SHOWN);
    }
    Coded::new(exit::DATA, message).into()
}

/// Reads the class names, one a line in label order; blank lines at the end do not count.
///
/// # Errors
/// With exit code [`exit::DATA`]: the file cannot be read, has another number of names than
/// `num_classes`, a blank line between names, or a name twice.
pub fn load_class_names(file: &Path, num_classes: u32) -> Result<Vec<String>> {
    let text = read(file)?;
    let names: Vec<String> = text
        .trim_end()
        .lines()
        .map(|l| l.trim().to_owned())
        .collect();
    let place = file.display();
    let mut problems = Vec::new();
    if names.len() != num_classes as usize {
        problems.push(format!(
            "{place} has {} class names, model.num_classes is {num_classes}; make them equal",
            names.len()
        ));
    }
    let mut first_line = std::collections::HashMap::new();
    for (number, name) in names.iter().enumerate() {
        if name.is_empty() {
            problems.push(format!(
                "{place}:{}: blank line; every line is the name of a class",
                number + 1
            ));
        } else if let Some(first) = first_line.insert(name, number) {
            problems.push(format!(
                "{place}:{}: `{name}` is also line {}; class names must differ",
                number + 1,
                first + 1
            ));
        }
    }
    if problems.is_empty() {
        Ok(names)
    } else {
        problems.truncate(SHOWN);
        Err(Coded::new(exit::DATA, problems.join("\n")).into())
    }
}

/// The name of frame `n` of a folder: a text with one `{}`, `{:05}` or `{:05d}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameTemplate {
    prefix: String,
    suffix: String,
    width: usize,
}

impl FrameTemplate {
    /// # Errors
    /// With exit code [`exit::CONFIG`] when there is not exactly one number in the template.
    pub fn parse(template: &str) -> Result<FrameTemplate> {
        let parsed = template.split_once('{').and_then(|(prefix, rest)| {
            let (spec, suffix) = rest.split_once('}')?;
            let width = match spec.strip_prefix(":0") {
                Some(width) => {
                    let width = width.strip_suffix('d').unwrap_or(width);
                    let digits = width.bytes().all(|b| b.is_ascii_digit());
                    width.parse().ok().filter(|_| digits)?
                }
                None if spec.is_empty() => 0,
                None => return None,
            };
            let whole = width <= 20 && !prefix.contains('}') && !suffix.contains(['{', '}']);
            whole.then(|| FrameTemplate {
                prefix: prefix.into(),
                suffix: suffix.into(),
                width,
            })
        });
        parsed.ok_or_else(|| {
            let message = format!(
                "data.frame_template is `{template}`; it needs the frame's number once, \
                 like img_{{:05}}.jpg"
            );
            Coded::new(exit::CONFIG, message).into()
        })
    }

    /// The file name of frame `number`.
    pub fn name(&self, number: u64) -> String {
        format!(
            "{}{number:0width$}{}",
            self.prefix,
            self.suffix,
            width = self.width
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, format: DataFormat) -> Result<SampleList> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("list.txt");
        fs_err::write(&file, text).unwrap();
        SampleList::load(&file, format, Path::new("/data"), 10)
    }

    fn message(result: Result<SampleList>) -> String {
        let error = result.unwrap_err();
        assert_eq!(exit::code_of(&error), exit::DATA);
        error.to_string()
    }

    #[test]
    fn reads_paths_with_spaces_comments_blank_lines_and_any_white_space() {
        let list = load(
            "\u{feff}# path frames label\r\n\r\na b/c  d 12 3\r\n\t/abs/x\t7  9 \n",
            DataFormat::Rawframes,
        )
        .unwrap();
        let expected = [
            Entry {
                path: "/data/a b/c  d".into(),
                num_frames: 12,
                label: 3,
                line: 3,
            },
            Entry {
                path: "/abs/x".into(),
                num_frames: 7,
                label: 9,
                line: 4,
            },
        ];
        assert_eq!(list.entries, expected);
        let list = load("v one.mp4 0\n", DataFormat::Video).unwrap();
        assert_eq!(list.entries[0].path, Path::new("/data/v one.mp4"));
        assert_eq!((list.entries[0].num_frames, list.entries[0].label), (0, 0));
    }

    #[test]
    fn every_bad_line_is_named_with_its_remedy() {
        let text = "ok 5 1\nshort 5\nx 0 1\nx -3 1\nx 5 10\nx 5 -1\nx five 1\nx 5 one\nalone\n";
        let text = message(load(text, DataFormat::Rawframes));
        assert!(text.contains("list.txt: 8 bad lines"), "{text}");
        for (line, part) in [
            (
                2,
                "`short 5`: 2 of the 3 fields `path frames label`; for lists of `path label` set data.format: video",
            ),
            (3, "`x 0 1`: 0 frames; extract"),
            (4, "-3 frames"),
            (
                5,
                "label 10 is not in 0..10; correct the line or model.num_classes",
            ),
            (6, "label -1 is not in 0..10"),
            (7, "the number of frames is `five`"),
            (8, "the label is `one`"),
            (9, "1 of the 3 fields"),
        ] {
            let found = text
                .lines()
                .find(|l| l.contains(&format!("list.txt:{line}: ")));
            assert!(
                found.is_some_and(|l| l.contains(part)),
                "line {line}, `{part}`:\n{text}"
            );
        }
        let text = message(load("only_a_path\n", DataFormat::Video));
        assert!(text.contains("list.txt: 1 bad line\n"), "{text}");
        assert!(text.contains("1 of the 2 fields `path label`"), "{text}");
    }

    #[test]
    fn more_than_twenty_bad_lines_are_counted() {
        let text = message(load(&"x\n".repeat(25), DataFormat::Video));
        assert_eq!(text.lines().count(), 1 + 20 + 1);
        assert!(text.ends_with("and 5 more"), "{text}");
    }

    #[test]
    fn a_list_without_videos_or_file_is_an_error() {
        let text = message(load("# nothing\n\n", DataFormat::Video));
        assert!(
            text.contains("names no video; a line is `path label`"),
            "{text}"
        );
        let missing = SampleList::load(
            Path::new("/no/list.txt"),
            DataFormat::Video,
            Path::new("/"),
            2,
        );
        assert!(message(missing).contains("/no/list.txt"));
    }

    #[test]
    fn class_names_must_be_as_many_as_classes_and_differ() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("classes.txt");
        fs_err::write(&file, "Swiping Left\nSwiping Right\n\n").unwrap();
        assert_eq!(
            load_class_names(&file, 2).unwrap(),
            ["Swiping Left", "Swiping Right"]
        );
        let text = load_class_names(&file, 3).unwrap_err().to_string();
        assert!(
            text.contains("has 2 class names, model.num_classes is 3"),
            "{text}"
        );
        fs_err::write(&file, "a\n\na\n").unwrap();
        let text = load_class_names(&file, 3).unwrap_err().to_string();
        assert!(text.contains("classes.txt:2: blank line"), "{text}");
        assert!(text.contains("classes.txt:3: `a` is also line 1"), "{text}");
    }

    #[test]
    fn frame_templates() {
        let name = |template: &str, n| FrameTemplate::parse(template).map(|t| t.name(n));
        assert_eq!(name("img_{:05}.jpg", 7).unwrap(), "img_00007.jpg");
        assert_eq!(name("{:06d}.png", 1_234_567).unwrap(), "1234567.png");
        assert_eq!(name("f{}.jpg", 7).unwrap(), "f7.jpg");
        for bad in [
            "img.jpg",
            "{:5}.jpg",
            "{:05}_{:05}.jpg",
            "{:0x}",
            "{:0+5}",
            "{:05dd}",
            "{:0}",
            "{",
            "}{}",
            "{:099}",
        ] {
            let error = FrameTemplate::parse(bad).unwrap_err();
            assert_eq!(exit::code_of(&error), exit::CONFIG, "{bad}");
            assert!(error.to_string().contains(bad), "{error}");
        }
    }
}
