//! What the launcher changed in the environment of the workers. Pure.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// One variable that differs from the launcher's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    pub name: String,
    /// In the launcher's environment; `None`: not there.
    pub before: Option<String>,
    /// In the workers'; `None`: removed.
    pub after: Option<String>,
}

const SECRET: [&str; 6] = ["KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL"];

/// The variables that were set or removed, by name. A secret's value is never in the result.
///
/// `ranks` holds what was set for each rank, `removed` what was removed for all.
pub fn difference(
    inherited: impl Fn(&str) -> Option<String>,
    ranks: &[&[(String, String)]],
    removed: &[impl AsRef<str>],
) -> Vec<Change> {
    let set = ranks
        .iter()
        .flat_map(|env| env.iter().map(|(name, _)| name.as_str()));
    let names: BTreeSet<&str> = set.chain(removed.iter().map(AsRef::as_ref)).collect();
    let is_removed = |name: &str| removed.iter().any(|removed| removed.as_ref() == name);
    let change = |name: &str| {
        // The last one counts, as in a worker's environment.
        let own = |env: &&[(String, String)]| {
            let last = env.iter().rev().find(|(set, _)| set == name);
            last.map(|(_, value)| value.clone())
        };
        let mut values: Vec<Option<String>> = ranks.iter().map(own).collect();
        values.dedup();
        let (before, after) = match (inherited(name), values.as_slice()) {
            (before, [] | [None]) => (before.clone(), before.filter(|_| !is_removed(name))),
            (before, [Some(value)]) => (before, Some(value.clone())),
            (before, _) => (before, Some("(differs by rank)".into())),
        };
        let change = Change {
            before: before.clone().map(|value| shown(name, value)),
            after: after.clone().map(|value| shown(name, value)),
            name: name.into(),
        };
        (before != after).then_some(change)
    };
    names.into_iter().filter_map(change).collect()
}

fn shown(name: &str, value: String) -> String {
    if is_secret(name, &value) {
        HIDDEN.into()
    } else {
        value
    }
}

/// In place of a secret.
pub const HIDDEN: &str = "(hidden)";

/// Whether the value of a variable must not be written down, by its name or as a URL with a password.
pub fn is_secret(name: &str, value: &str) -> bool {
    let name = name.to_ascii_uppercase();
    let in_url = value.split_once("://").is_some_and(|(_, rest)| {
        rest.split('/')
            .next()
            .is_some_and(|host| host.contains('@'))
    });
    in_url || SECRET.iter().any(|word| name.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(n, v)| (n.to_string(), v.to_string()))
            .collect()
    }

    fn inherited(name: &str) -> Option<String> {
        let all = [
            ("HOME", "/root"),
            ("OMP_NUM_THREADS", "4"),
            ("ROLE_RANK", "0"),
            ("hf_token", "hf_x"),
        ];
        all.iter()
            .find(|(n, _)| *n == name)
            .map(|(_, v)| v.to_string())
    }

    #[test]
    fn what_was_set_or_removed_is_told_and_nothing_else() {
        let (a, b) = (
            env(&[("RANK", "0"), ("OMP_NUM_THREADS", "2"), ("HOME", "/root")]),
            env(&[("RANK", "1"), ("OMP_NUM_THREADS", "2"), ("HOME", "/root")]),
        );
        let found = difference(inherited, &[&a, &b], &["ROLE_RANK", "ROLE_NAME"]);
        let told: Vec<_> = found
            .iter()
            .map(|c| (c.name.as_str(), c.before.as_deref(), c.after.as_deref()))
            .collect();
        let expected = [
            ("OMP_NUM_THREADS", Some("4"), Some("2")),
            ("RANK", None, Some("(differs by rank)")),
            ("ROLE_RANK", Some("0"), None),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn a_variable_that_is_removed_and_set_is_set() {
        let a = env(&[("TSM_AGENT_FD", "3"), ("TSM_AGENT_FD", "5")]);
        let found = difference(inherited, &[&a], &["TSM_AGENT_FD"]);
        assert_eq!(found[0].after.as_deref(), Some("5"));
        // Set for one rank only.
        let found = difference(inherited, &[&a, &[]], &[""; 0]);
        assert_eq!(found[0].after.as_deref(), Some("(differs by rank)"));
    }

    #[test]
    fn secrets_are_hidden() {
        let a = env(&[
            ("WANDB_API_KEY", "k"),
            ("hf_token", "hf_y"),
            ("DB_PASSWORD", "p"),
            ("MY_SECRET", "s"),
            ("PROXY", "http://me:pw@proxy:3128/"),
            ("PLAIN", "http://proxy/@a"),
        ]);
        let found = difference(inherited, &[&a], &["hf_token"]);
        for change in found {
            let hidden = change.after.as_deref() == Some("(hidden)");
            assert_eq!(hidden, change.name != "PLAIN", "{change:?}");
            assert!(change.before.is_none_or(|before| before == "(hidden)"));
        }
        let gone = difference(inherited, &[], &["hf_token"]);
        assert_eq!(gone[0].before.as_deref(), Some("(hidden)"));
    }
}
