//! A YAML document as a JSON value plus the place of every key, so that an error found long after
//! parsing still points at its line.

use super::problem::Problem;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use serde_saphyr::Spanned;
use serde_saphyr::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};
use std::collections::HashMap;
use std::fmt;

/// 1-based line and column, the column in characters.
pub(super) type Place = (usize, usize);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Segment {
    Key(String),
    Index(usize),
}

/// Where a value stands in a configuration; shown like `data.train.crop.multi_scale.scales[1]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct KeyPath(pub Vec<Segment>);

impl KeyPath {
    /// Reads a path of keys: `optim.lr` has two.
    pub fn of(dotted: &str) -> KeyPath {
        KeyPath(
            dotted
                .split('.')
                .map(|key| Segment::Key(key.into()))
                .collect(),
        )
    }
    pub fn join(&self, segment: Segment) -> KeyPath {
        let mut segments = self.0.clone();
        segments.push(segment);
        KeyPath(segments)
    }
    pub fn key(&self, key: &str) -> KeyPath {
        self.join(Segment::Key(key.into()))
    }
    /// The path without its last segment; the root is its own parent.
    pub fn parent(&self) -> KeyPath {
        KeyPath(self.0[..self.0.len().saturating_sub(1)].to_vec())
    }
    pub fn last_key(&self) -> &str {
        match self.0.last() {
            Some(Segment::Key(key)) => key,
            _ => "",
        }
    }
    pub fn is_within(&self, ancestor: &KeyPath) -> bool {
        self.0.starts_with(&ancestor.0)
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Key(key) if i == 0 => f.write_str(key)?,
                Segment::Key(key) => write!(f, ".{key}")?,
                Segment::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

pub(super) fn get<'v>(root: &'v Value, path: &KeyPath) -> Option<&'v Value> {
    path.0
        .iter()
        .try_fold(root, |node, segment| match (segment, node) {
            (Segment::Key(key), Value::Object(map)) => map.get(key),
            (Segment::Index(index), Value::Array(list)) => list.get(*index),
            _ => None,
        })
}

/// As [`get`], to change the value in place.
pub(super) fn get_mut<'v>(root: &'v mut Value, path: &KeyPath) -> Option<&'v mut Value> {
    path.0
        .iter()
        .try_fold(root, |node, segment| match (segment, node) {
            (Segment::Key(key), Value::Object(map)) => map.get_mut(key),
            (Segment::Index(index), Value::Array(list)) => list.get_mut(*index),
            _ => None,
        })
}

/// Where a key and its value stand; an element of a list has no key.
#[derive(Clone, Copy, Debug)]
struct Places {
    key: Option<Place>,
    value: Place,
}

/// A parsed file.
#[derive(Debug, Default)]
pub(super) struct Document {
    pub value: Value,
    places: HashMap<KeyPath, Places>,
}

impl Document {
    /// Parses one YAML document. Keys written twice are reported; the first one counts.
    ///
    /// # Errors
    /// The syntax error, which leaves nothing to go on with.
    pub fn parse(text: &str) -> Result<(Document, Vec<Problem>), Problem> {
        let root = parse_node(text)?;
        let mut document = Document::default();
        let mut problems = Vec::new();
        document.value = document.take(root, None, &KeyPath::default(), &mut problems);
        Ok((document, problems))
    }

    /// Where the value at `path` stands, or its nearest ancestor that the file names.
    pub fn value_place(&self, path: &KeyPath) -> Option<Place> {
        match self.places.get(path) {
            Some(places) => Some(places.value),
            None => self.key_place(&path.parent()),
        }
    }

    /// Where the key at `path` stands, or its nearest ancestor's.
    pub fn key_place(&self, path: &KeyPath) -> Option<Place> {
        let mut path = path.clone();
        while !path.0.is_empty() {
            if let Some(places) = self.places.get(&path) {
                return Some(places.key.unwrap_or(places.value));
            }
            path = path.parent();
        }
        None
    }

    fn take(
        &mut self,
        node: Spanned<Node>,
        key: Option<Place>,
        path: &KeyPath,
        problems: &mut Vec<Problem>,
    ) -> Value {
        let value = place_of(&node.referenced);
        self.places.insert(path.clone(), Places { key, value });
        match node.value {
            Node::Scalar(value) => value,
            Node::List(nodes) => nodes
                .into_iter()
                .enumerate()
                .map(|(i, node)| self.take(node, None, &path.join(Segment::Index(i)), problems))
                .collect(),
            Node::Map(entries) => {
                let mut map = Map::new();
                for (key, node) in entries {
                    let at = path.key(&key.value);
                    let place = place_of(&key.referenced);
                    if map.contains_key(&key.value) {
                        let first = self.key_place(&at).map_or(0, |(line, _)| line);
                        problems.push(
                            Problem::new(&at, format!("`{at}` is written twice"))
                                .at(Some(place))
                                .hint(format!("its first value is on line {first}; keep one")),
                        );
                    } else {
                        let value = self.take(node, Some(place), &at, problems);
                        map.insert(key.value, value);
                    }
                }
                Value::Object(map)
            }
        }
    }
}

/// Reads one YAML value, such as the right-hand side of an override.
///
/// # Errors
/// The parser's message.
pub(super) fn parse_value(text: &str) -> Result<Value, String> {
    let root = parse_node(text).map_err(|problem| problem.message)?;
    Ok(Document::default().take(root, None, &KeyPath::default(), &mut Vec::new()))
}

fn parse_node(text: &str) -> Result<Spanned<Node>, Problem> {
    let options = serde_saphyr::options! {
        // Our own visitor sees repeated keys, so that all of them are listed at once.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        // JSON has no infinity; as text it fails where a number is expected.
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        with_snippet: false,
        strict_booleans: true,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let place = error.location().map(|location| place_of(&location));
        let message = error.without_snippet().to_string();
        // The parser appends the place, which the frame shows already.
        let message = message.split(" at line ").next().unwrap_or(&message);
        Problem::new(&KeyPath::default(), format!("not valid YAML: {message}")).at(place)
    })
}

fn place_of(location: &serde_saphyr::Location) -> Place {
    (location.line() as usize, location.column() as usize)
}

enum Node {
    Scalar(Value),
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }
    fn visit_bool<E>(self, v: bool) -> Result<Node, E> {
        Ok(Node::Scalar(v.into()))
    }
    fn visit_i64<E>(self, v: i64) -> Result<Node, E> {
        Ok(Node::Scalar(v.into()))
    }
    fn visit_u64<E>(self, v: u64) -> Result<Node, E> {
        Ok(Node::Scalar(v.into()))
    }
    fn visit_f64<E>(self, v: f64) -> Result<Node, E> {
        Ok(Node::Scalar(v.into()))
    }
    fn visit_str<E>(self, v: &str) -> Result<Node, E> {
        Ok(Node::Scalar(v.into()))
    }
    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }
    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = seq.next_element()? {
            nodes.push(node);
        }
        Ok(Node::List(nodes))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Map(entries))
    }
}
