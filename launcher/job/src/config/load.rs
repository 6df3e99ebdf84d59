//! From text to [`Config`]: parse, override, collect every problem with its place.

use super::Config;
use super::explain::{Repair, explain, not_a_mapping};
use super::overrides::{self, Override};
use super::problem::{ConfigError, Problem};
use super::template::Examples;
use super::tree::{Document, KeyPath, Segment, get, get_mut};
use serde_json::Value;
use std::io::{ErrorKind, Read};
use std::path::Path;

/// Bytes of a file. A complete configuration has about 4 kB.
const LARGEST: u64 = 1 << 20;

impl Config {
    /// Reads `path`, applies `overrides` (`key.path=value`, typed like the field) and validates.
    ///
    /// Paths inside the configuration stay as written: they are relative to the directory that
    /// the program runs in, not to the file. Whether they exist is [`Config::check_files`]'s
    /// question.
    ///
    /// # Errors
    /// A [`ConfigError`] that lists every problem at once.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Config, ConfigError> {
        let refuse = |why: String, hint: &str| {
            let problem = Problem::new(&KeyPath::default(), why).hint(hint);
            ConfigError::new(path, "", vec![problem])
        };
        let mut text = String::new();
        fs_err::File::open(path)
            .and_then(|file| file.take(LARGEST + 1).read_to_string(&mut text))
            .map_err(|error| {
                let hint = match error.kind() {
                    ErrorKind::NotFound => "check the name; configs/ has one for each recipe",
                    ErrorKind::IsADirectory => "give a YAML file in it",
                    ErrorKind::PermissionDenied => "make it readable for this user",
                    ErrorKind::InvalidData => "a config is a text in YAML; this is something else",
                    _ => "give a YAML file that can be read",
                };
                refuse(error.to_string(), hint)
            })?;
        if text.len() as u64 > LARGEST {
            let why = format!("larger than {} MiB", LARGEST >> 20);
            let hint = "a config is a short text in YAML; this is something else";
            return Err(refuse(why, hint));
        }
        Config::from_yaml(&text, path, overrides)
    }

    /// As [`Config::load`], from a text already read; `file` names it in errors.
    ///
    /// # Errors
    /// A [`ConfigError`] that lists every problem at once.
    pub fn from_yaml(text: &str, file: &Path, overrides: &[String]) -> Result<Config, ConfigError> {
        let (document, mut problems) =
            Document::parse(text).map_err(|problem| ConfigError::new(file, text, vec![problem]))?;
        let mut root = document.value.clone();
        let mut applied = Vec::new();
        for text in overrides {
            match overrides::apply(&mut root, text) {
                Ok(done) => applied.push(done),
                Err(problem) => problems.push(*problem),
            }
        }
        let mut checker = Checker {
            document: &document,
            overrides: &applied,
            examples: Examples::new(),
            repaired: Vec::new(),
            problems,
        };
        checker.sections(&mut root, &KeyPath::default());
        let config = checker.typed(root);
        checker.rules(&config);
        let mut problems = checker.problems;
        if problems.is_empty() {
            return Ok(config);
        }
        problems.sort_by_key(|problem| {
            let text = problem.override_text.as_ref();
            let position = text.and_then(|text| overrides.iter().position(|o| o == text));
            (position, problem.place)
        });
        Err(ConfigError::new(file, text, problems))
    }

    /// The complete configuration as YAML, every default written out; [`Config::load`] reads the
    /// same configuration back.
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(self).expect("a config always serialises")
    }
}

struct Checker<'a> {
    document: &'a Document,
    overrides: &'a [Override],
    examples: Examples,
    /// What stands in the tree no longer comes from the user.
    repaired: Vec<KeyPath>,
    problems: Vec<Problem>,
}

impl Checker<'_> {
    /// Notes and repairs lists that stand where a section belongs: serde would fill the section's
    /// fields from them in order.
    fn sections(&mut self, node: &mut Value, at: &KeyPath) {
        let Some(example @ Value::Object(_)) = self.examples.get(at) else {
            return;
        };
        match node {
            Value::Array(_) => {
                let problem = not_a_mapping(at, node);
                *node = example.clone();
                self.note(problem, at, false);
                self.repaired.push(at.clone());
            }
            Value::Object(map) => {
                for (key, value) in map {
                    self.sections(value, &at.key(key));
                }
            }
            _ => {}
        }
    }

    /// Deserialises; serde stops at the first error, so each is noted and repaired until none is
    /// left.
    fn typed(&mut self, mut root: Value) -> Config {
        loop {
            let error = match serde_path_to_error::deserialize::<_, Config>(&root) {
                Ok(config) => return config,
                Err(error) => error,
            };
            let path = path_of(error.path());
            let message = error.inner().to_string();
            if self.quote_override(&mut root, &path, &message) {
                continue;
            }
            let (problem, repair) = explain(&message, &path, &root, &self.examples);
            // A second error at a repaired place means that the cause lies further out; one
            // around a repaired place may be the example's and not the user's.
            let again = self.repaired.contains(repair.path());
            if !self.repaired.iter().any(|r| r.is_within(repair.path())) {
                self.note(problem, repair.path(), matches!(repair, Repair::Drop(..)));
            }
            let repair = match again {
                true => Repair::Replace(repair.path().parent()),
                false => repair,
            };
            self.repair(&mut root, repair);
        }
    }

    /// Text given by an override needs no quotes, whatever YAML takes it for: `run.name=123`.
    fn quote_override(&self, root: &mut Value, path: &KeyPath, message: &str) -> bool {
        let text_wanted =
            message.ends_with("expected a string") || message.ends_with("expected path string");
        let given = self.overrides.iter().rfind(|o| o.target == *path);
        match (given, get_mut(root, path)) {
            (Some(given), Some(value))
                if text_wanted && (value.is_number() || value.is_boolean()) =>
            {
                *value = given.raw_value.clone().into();
                true
            }
            _ => false,
        }
    }

    fn repair(&mut self, root: &mut Value, repair: Repair) {
        match repair {
            Repair::Drop(path, meant) => {
                if let Some(Value::Object(map)) = get_mut(root, &path.parent()) {
                    map.shift_remove(path.last_key());
                }
                // Otherwise a misspelt key would be reported as missing, too.
                if let Some(meant) = meant
                    && get(root, &meant).is_none()
                {
                    self.repair(root, Repair::Replace(meant));
                }
            }
            Repair::Replace(mut path) => {
                while self.examples.get(&path).is_none() || get(root, &path.parent()).is_none() {
                    path = path.parent();
                }
                let example = self.examples.get(&path).cloned().unwrap_or_default();
                match (path.0.last(), get_mut(root, &path.parent())) {
                    (Some(Segment::Key(key)), Some(Value::Object(map))) => {
                        map.insert(key.clone(), example);
                    }
                    (Some(Segment::Index(index)), Some(Value::Array(list)))
                        if *index < list.len() =>
                    {
                        list[*index] = example;
                    }
                    _ => {
                        path = KeyPath::default();
                        *root = self.examples.get(&path).cloned().unwrap_or_default();
                    }
                }
                self.repaired.push(path);
            }
        }
    }

    /// The rules between values, where all of them are the user's own.
    fn rules(&mut self, config: &Config) {
        for finding in config.findings() {
            let paths: Vec<_> = finding.paths.iter().map(|path| KeyPath::of(path)).collect();
            let replaced = |path: &KeyPath| {
                let related = |r: &KeyPath| path.is_within(r) || r.is_within(path);
                self.repaired.iter().any(related)
            };
            if paths.iter().any(replaced) {
                continue;
            }
            let blamed = paths.iter().find(|path| self.origin(path).is_some());
            let path = blamed.unwrap_or(&paths[0]);
            let mut problem = Problem::new(path, finding.message);
            problem.hint = finding.hint;
            self.note(problem, path, false);
        }
    }

    /// Adds `problem` with the place of `path`: an override's text, or a place in the file.
    fn note(&mut self, mut problem: Problem, path: &KeyPath, at_key: bool) {
        match self.origin(path) {
            Some(given) => problem.override_text = Some(given.text.clone()),
            None if at_key => problem.place = self.document.key_place(path),
            None => problem.place = self.document.value_place(path),
        }
        self.problems.push(problem);
    }

    /// The override that made the value at `path`.
    fn origin(&self, path: &KeyPath) -> Option<&Override> {
        self.overrides.iter().rfind(|o| path.is_within(&o.made))
    }
}

fn path_of(path: &serde_path_to_error::Path) -> KeyPath {
    use serde_path_to_error::Segment as Part;
    let segments = path.iter().filter_map(|part| match part {
        Part::Seq { index } => Some(Segment::Index(*index)),
        Part::Map { key } => Some(Segment::Key(key.clone())),
        Part::Enum { variant } => Some(Segment::Key(variant.clone())),
        Part::Unknown => None,
    });
    KeyPath(segments.collect())
}
