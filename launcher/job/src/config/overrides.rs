//! Dotted overrides (`optim.lr=0.01`) on a parsed configuration.

use super::problem::Problem;
use super::tree::{KeyPath, Segment, get_mut, parse_value};
use serde_json::{Map, Value};

/// Values of one variant each: naming another variant replaces the whole value.
const ENUMS: [&str; 2] = ["data.train.crop", "optim.schedule"];

/// An override that was applied.
#[derive(Debug)]
pub(super) struct Override {
    /// As given.
    pub text: String,
    /// Right of the `=`.
    pub raw_value: String,
    /// The key it names.
    pub target: KeyPath,
    /// The outermost value that it made or replaced; everything inside comes from it.
    pub made: KeyPath,
}

/// Sets one value.
///
/// # Errors
/// An override that has no `=`, no value, a value that is not YAML, or a key inside a value that
/// has no keys. A key that does not exist is set all the same; deserialising names it.
pub(super) fn apply(root: &mut Value, text: &str) -> Result<Override, Box<Problem>> {
    let fail = |path: &KeyPath, message: String, hint: &str| {
        let mut problem = Problem::new(path, message).hint(hint);
        problem.override_text = Some(text.into());
        Box::new(problem)
    };
    let nowhere = KeyPath::default();
    let form = "write it like optim.lr=0.01";
    let Some((target, raw_value)) = text.split_once('=') else {
        return Err(fail(&nowhere, "an override needs a `=`".into(), form));
    };
    let (target, raw_value) = (target.trim(), raw_value.trim());
    if target.split('.').any(str::is_empty) {
        return Err(fail(&nowhere, format!("{target:?} is not a key"), form));
    }
    let target = KeyPath::of(target);
    if raw_value.is_empty() {
        return Err(fail(
            &target,
            format!("no value for {target}"),
            "write null to unset it, '\"\"' for empty text",
        ));
    }
    let value = parse_value(raw_value)
        .map_err(|message| fail(&target, message, "quote text that YAML reads otherwise"))?;

    let made = make_parents(root, &target).map_err(|(at, found)| {
        let hint = match found {
            Value::Array(_) => "a list is set as a whole, like [1, 2]",
            _ => "leave out what comes after it",
        };
        fail(&target, format!("{at} is {found}, it has no keys"), hint)
    })?;
    if let Some(Value::Object(map)) = get_mut(root, &target.parent()) {
        map.insert(target.last_key().into(), value);
    }
    Ok(Override {
        text: text.into(),
        raw_value: raw_value.into(),
        target,
        made,
    })
}

/// Makes every ancestor of `target` a mapping; returns the outermost value that this changes, or
/// the ancestor that cannot be one with its value.
fn make_parents(root: &mut Value, target: &KeyPath) -> Result<KeyPath, (KeyPath, Value)> {
    let mut at = KeyPath::default();
    let mut made = None;
    let mut node = root;
    for segment in &target.0 {
        let Segment::Key(key) = segment else {
            unreachable!("an override's path has only keys, got {target}");
        };
        if node.is_null() {
            *node = Value::Object(Map::new());
            made.get_or_insert(at.clone());
        }
        let is_enum = ENUMS.contains(&at.to_string().as_str());
        if is_enum && node.get(key).is_none() {
            *node = Value::Object(Map::new());
            made.get_or_insert(at.clone());
        }
        at = at.key(key);
        let Value::Object(map) = node else {
            return Err((at.parent(), node.clone()));
        };
        if at == *target {
            break;
        }
        node = map.entry(key).or_insert(Value::Null);
    }
    Ok(made.unwrap_or_else(|| target.clone()))
}
