//! serde's error messages in a user's words, with the next step.

use super::problem::Problem;
use super::template::Examples;
use super::tree::{KeyPath, get};
use serde_json::Value;

/// What a deserialisation error asks to be repaired before the rest can be checked.
#[derive(Debug, PartialEq)]
pub(super) enum Repair {
    /// The key does not exist; the second path is the key that was meant, where one is near.
    Drop(KeyPath, Option<KeyPath>),
    /// The value is missing or of a wrong kind.
    Replace(KeyPath),
}

impl Repair {
    pub fn path(&self) -> &KeyPath {
        match self {
            Repair::Drop(path, _) | Repair::Replace(path) => path,
        }
    }
}

/// Explains what serde says about the value at `path` of `root`.
pub(super) fn explain(
    message: &str,
    path: &KeyPath,
    root: &Value,
    examples: &Examples,
) -> (Problem, Repair) {
    if message.starts_with("unknown field ") {
        return unknown_key(message, path, examples);
    }
    if let Some(rest) = message.strip_prefix("missing field ") {
        let path = path.key(rest.trim_matches('`'));
        return (missing_key(&path, examples), Repair::Replace(path));
    }
    // A bad variant is reported below its key; the value that the user wrote is the key's.
    let mut path = path.clone();
    while get(root, &path).is_none() {
        path = path.parent();
    }
    let value = get(root, &path).unwrap_or(root);
    let problem = if message.starts_with("unknown variant ") {
        unknown_variant(message, &path)
    } else {
        wrong_type(message, &path, value, examples)
    };
    (problem, Repair::Replace(path))
}

fn unknown_key(message: &str, path: &KeyPath, examples: &Examples) -> (Problem, Repair) {
    let (key, section) = (path.last_key(), path.parent());
    let valid = backticked(message.trim_start_matches(&format!("unknown field `{key}`")));
    let problem = Problem::new(
        path,
        match section.0.is_empty() {
            true => format!("unknown section `{key}`"),
            false => format!("unknown key `{key}` in {section}"),
        },
    );
    let list = match valid.len() {
        0 => format!("{section} takes no keys"),
        _ => format!("valid keys: {}", valid.join(", ")),
    };
    let meant = nearest(key, &valid);
    let hint = match (meant, examples.section_with(key)) {
        (Some(best), _) => format!("did you mean `{best}`? {list}"),
        (None, Some(other)) if !other.0.is_empty() => format!("`{key}` belongs to {other}; {list}"),
        (None, _) => list,
    };
    let meant = meant.map(|best| section.key(best));
    (problem.hint(hint), Repair::Drop(path.clone(), meant))
}

fn missing_key(path: &KeyPath, examples: &Examples) -> Problem {
    let key = path.last_key();
    let what = if path.0.len() == 1 { "section" } else { "key" };
    let problem = Problem::new(path, format!("the {what} `{path}` is missing"));
    match examples.get(path) {
        Some(Value::Object(map)) => {
            let keys: Vec<_> = map.keys().map(String::as_str).collect();
            problem.hint(format!("add `{key}:` with the keys {}", keys.join(", ")))
        }
        Some(example) => problem.hint(format!("add it, like `{key}: {}`", sample(example))),
        None => problem,
    }
}

fn unknown_variant(message: &str, path: &KeyPath) -> Problem {
    let names = backticked(message);
    let Some((given, valid)) = names.split_first() else {
        return Problem::new(path, format!("{path}: {message}"));
    };
    let list = format!("valid values: {}", valid.join(", "));
    Problem::new(path, format!("{path} cannot be {given:?}")).hint(match nearest(given, valid) {
        Some(best) => format!("did you mean `{best}`? {list}"),
        None => list,
    })
}

fn wrong_type(message: &str, path: &KeyPath, value: &Value, examples: &Examples) -> Problem {
    if path.0.is_empty() {
        return not_a_mapping(path, value);
    }
    let shown = flow(value);
    let key = path.last_key();
    // A variant with keys, written as its bare name.
    if let (Value::String(name), Some(keys)) = (
        value,
        value.as_str().and_then(|v| examples.get(&path.key(v))),
    ) {
        return Problem::new(
            path,
            format!("{path} is {shown}, which takes keys of its own"),
        )
        .hint(format!("write `{key}: {{{name}: {}}}`", flow(keys)));
    }
    let expected = message
        .split_once(", expected ")
        .map(|(_, expected)| expected);
    let text = match expected {
        Some(expected) => format!("{path} is {shown}, expected {}", plain(expected, value)),
        None => format!("{path}: {message}"),
    };
    let problem = Problem::new(path, text);
    match (expected, value, examples.get(path)) {
        (None, ..) => problem,
        (Some("a string" | "path string"), Value::Number(_) | Value::Bool(_), Some(example))
            if !is_duration(example) =>
        {
            problem.hint(format!("put it in quotes: `\"{shown}\"`"))
        }
        (_, _, Some(example)) if !key.is_empty() => {
            problem.hint(format!("write it like `{key}: {}`", sample(example)))
        }
        _ => problem,
    }
}

/// A section that holds something else.
pub(super) fn not_a_mapping(path: &KeyPath, value: &Value) -> Problem {
    if !path.0.is_empty() {
        let message = format!("{path} is {}, expected a mapping", flow(value));
        return Problem::new(path, message).hint("write one `key: value` a line");
    }
    let message = match value {
        Value::Null => "the file is empty".into(),
        _ => format!("the file holds {}, expected sections of keys", flow(value)),
    };
    Problem::new(path, message).hint("start from one of the files in configs/")
}

fn is_duration(example: &Value) -> bool {
    example
        .as_str()
        .is_some_and(|text| super::duration::parse(text).is_ok())
}

/// serde's name of a type as a reader of YAML calls it.
fn plain(expected: &str, value: &Value) -> String {
    let whole = matches!(expected, "u8" | "u16" | "u32" | "u64" | "i64");
    match expected {
        "u32" if value.as_u64().is_some() => format!("at most {}", u32::MAX),
        _ if whole => "a whole number, 0 or more".into(),
        "f64" => "a number".into(),
        "a boolean" => "true or false".into(),
        "a string" | "path string" => "text".into(),
        "a sequence" => "a list".into(),
        "map with a single key" => "exactly one of its names".into(),
        "an array of length 3" => "a list of 3 numbers".into(),
        _ if expected.contains("string or map") => "one of its names".into(),
        _ if expected.starts_with("struct ") => "a mapping".into(),
        _ if expected.contains("tuple") && expected.ends_with('2') => "a list of 2 values".into(),
        _ => expected.into(),
    }
}

/// An example as one writes it: [`flow`] without the quotes that plain words don't need.
fn sample(value: &Value) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./-".contains(c);
    match value {
        Value::String(text) if text.chars().all(plain) => text.clone(),
        other => flow(other),
    }
}

/// A value on one line of YAML, shortened.
fn flow(value: &Value) -> String {
    let text = match value {
        Value::Object(map) => {
            let entries = map
                .iter()
                .map(|(key, value)| format!("{key}: {}", flow(value)));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
        }
        Value::Array(list) => {
            let items = list.iter().map(flow);
            format!("[{}]", items.collect::<Vec<_>>().join(", "))
        }
        scalar => scalar.to_string(),
    };
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// The names that a message of serde puts in backticks.
fn backticked(message: &str) -> Vec<&str> {
    message.split('`').skip(1).step_by(2).collect()
}

/// The candidate that a typing error could have come from.
fn nearest<'c>(given: &str, candidates: &[&'c str]) -> Option<&'c str> {
    let given = given.to_lowercase();
    candidates
        .iter()
        .map(|candidate| (strsim::damerau_levenshtein(&given, candidate), *candidate))
        .filter(|(distance, candidate)| {
            *distance <= 1.max(candidate.len() / 3) || candidate.starts_with(&given)
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}
