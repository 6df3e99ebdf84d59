//! Options that count on the command line of the first node alone, in words that nodes can compare. Pure.

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, CommandFactory};
use std::ffi::OsString;

use crate::cli::Args;

/// What a run is, and its rules; not what a node shows or looks at by itself.
const COUNT_THERE: [&str; 9] = [
    "nodes",
    "max_restarts",
    "node_timeout",
    "hang_timeout",
    "env",
    "grace",
    "run_dir",
    "resume",
    "no_affinity",
];

/// Those that the command line `argv` has, with their values; `given`: without those that it leaves to their default.
pub(super) fn options(argv: impl Iterator<Item = OsString>, given: bool) -> Vec<(String, String)> {
    let command = Args::command();
    let Ok(found) = command.clone().try_get_matches_from(argv) else {
        return Vec::new();
    };
    let words = |option: &Arg| {
        let id = option.get_id().as_str();
        let is_given = found.value_source(id) == Some(ValueSource::CommandLine);
        if !COUNT_THERE.contains(&id) || (given && !is_given) {
            return None;
        }
        let flag = format!("--{}", option.get_long()?);
        if matches!(option.get_action(), ArgAction::SetTrue) {
            return is_given.then_some((flag, String::new()));
        }
        let values = found.get_raw(id)?.map(|value| value.to_string_lossy());
        Some((flag, values.collect::<Vec<_>>().join(" ")))
    };
    command.get_arguments().filter_map(words).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str, given: bool) -> Vec<String> {
        let all = options(line.split(' ').map(OsString::from), given).into_iter();
        all.map(|(flag, value)| format!("{flag} {value}")).collect()
    }

    #[test]
    fn what_was_given_is_told_and_a_default_is_known() {
        let line = "tsm-launch --gpus 2 --nodes 2:3 --log-format json --env A=1 --env B --no-affinity -- x --grace 1s";
        let given = ["--nodes 2:3", "--env A=1 B", "--no-affinity "];
        assert_eq!(of(line, true), given);
        let all = of("tsm-launch --cpus 1 --grace 5s a.yaml", false);
        let expected = [
            "--max-restarts 0",
            "--node-timeout 1400ms",
            "--hang-timeout 10m",
            "--grace 5s",
        ];
        assert_eq!(all, expected);
    }

    #[test]
    fn every_option_is_one() {
        let command = Args::command();
        let mut ids = command
            .get_arguments()
            .map(|option| option.get_id().as_str());
        for id in COUNT_THERE {
            assert!(ids.any(|known| known == id), "{id}, in this order");
        }
    }
}
