//! The command line once more: to continue the run with, and to write down. Pure.

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, CommandFactory};
use std::ffi::{OsStr, OsString};
use std::path::Path;

use crate::cli::Args;
use crate::manifest::environment::{HIDDEN, is_secret};
use crate::plan;

/// Options that say where this run came from, and where it is.
const OF_THE_FIRST_START: [&str; 3] = ["run_dir", "resume", "dry_run"];
/// They are taken from `Args`, since the environment may have decided.
const DEVICES: [&str; 2] = ["gpus", "cpus"];

/// The command that continues the run in `dir` with the same program, on the same devices and hosts, under the same
/// rules: with every option of the command line `argv`, of which `args` was made. A secret of `--env` is to be taken
/// from the environment.
pub(super) fn command(argv: impl Iterator<Item = OsString>, args: &Args, dir: &Path) -> String {
    let option = |flag: &str, value: OsString| (flag.to_string(), Some(value));
    let gpus = args.gpus.as_ref().map(|g| g.to_string().into());
    let cpus = args.cpus.map(|n| n.to_string().into());
    let devices = [
        gpus.map(|gpus| option("--gpus", gpus)),
        cpus.map(|cpus| option("--cpus", cpus)),
    ];
    let all = devices.into_iter().flatten();
    let all = all
        .chain(kept(argv))
        .chain([option("--resume", dir.into())]);
    let words = all.flat_map(|(flag, value)| match value {
        // It would be taken for another option.
        Some(value) if value.as_encoded_bytes().starts_with(b"-") => {
            vec![[OsStr::new(&flag), &value].join(OsStr::new("="))]
        }
        value => std::iter::once(flag.into()).chain(value).collect(),
    });
    let words: Vec<OsString> = std::iter::once("tsm-launch".into()).chain(words).collect();
    plan::shell(&words)
}

/// Options of `argv` that hold for every start, as they were written.
fn kept(argv: impl Iterator<Item = OsString>) -> Vec<(String, Option<OsString>)> {
    let Ok(given) = Args::command().try_get_matches_from(argv) else {
        return Vec::new();
    };
    let values = |option: &Arg| {
        let id = option.get_id().as_str();
        let flag = format!("--{}", option.get_long()?);
        let is_kept = !OF_THE_FIRST_START.contains(&id) && !DEVICES.contains(&id);
        if !is_kept || given.value_source(id) != Some(ValueSource::CommandLine) {
            return None;
        }
        if matches!(option.get_action(), ArgAction::SetTrue) {
            return Some(vec![(flag, None)]);
        }
        let public = |value: &OsStr| match value.to_str().and_then(|pair| pair.split_once('=')) {
            Some((name, secret)) if id == "env" && is_secret(name, secret) => name.into(),
            _ => value.to_os_string(),
        };
        let values = given
            .get_raw(id)?
            .map(|value| (flag.clone(), Some(public(value))));
        Some(values.collect())
    };
    let command = Args::command();
    command
        .get_arguments()
        .filter_map(values)
        .flatten()
        .collect()
}

/// The command line as it may be written down: without the secrets of `--env`.
pub(super) fn shown(argv: impl Iterator<Item = OsString>) -> Vec<String> {
    let (mut is_own, mut is_env) = (true, false);
    let word = |word: OsString| {
        let word = word.to_string_lossy().into_owned();
        is_own &= word != "--";
        let pair = match word.strip_prefix("--env=") {
            Some(pair) if is_own => Some(pair),
            _ => Some(word.as_str()).filter(|_| is_env),
        };
        is_env = is_own && word == "--env";
        match pair.and_then(|pair| pair.split_once('=')) {
            Some((name, value)) if is_secret(name, value) => {
                let before = &word[..word.len() - value.len()];
                format!("{before}{HIDDEN}")
            }
            _ => word,
        }
    };
    argv.map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn words(line: &str) -> impl Iterator<Item = OsString> {
        line.split(' ').map(OsString::from)
    }

    fn again(line: &str) -> String {
        let args = Args::try_parse_from(words(line)).unwrap();
        command(words(line), &args, Path::new("runs/a"))
    }

    #[test]
    fn a_run_is_continued_where_and_as_it_was() {
        for (given, kept) in [
            ("--cpus 2 --run-dir b --resume c", "--cpus 2"),
            ("--gpus=8 --nodes 4", "--gpus 8 --nodes 4"),
            (
                "--hosts a:1,b:1 --cpus 1 --nodes 1:2 --ssh my-ssh --trainer /opt/trainer",
                "--cpus 1 --nodes 1:2 --hosts a:1,b:1 --ssh my-ssh --trainer /opt/trainer",
            ),
            (
                "--nodes 2 --rendezvous a:1 --key-file k --tls-cert c --tls-key p --tls-ca r",
                "--nodes 2 --rendezvous a:1 --tls-cert c --tls-key p --tls-ca r --key-file k",
            ),
            (
                "--max-restarts 3 --grace 500ms --hang-timeout=1h --env A=b --env=C --preflight off --env=-D=1 --no-view",
                "--max-restarts 3 --hang-timeout 1h --preflight off --env A=b --env C --env=-D=1 --grace 500ms --no-view",
            ),
        ] {
            let line = format!("tsm-launch {given} a.yaml optim.lr=1");
            assert_eq!(again(&line), format!("tsm-launch {kept} --resume runs/a"));
        }
    }

    #[test]
    fn secrets_are_neither_printed_nor_written_down() {
        let line = "tsm-launch --cpus 1 --env API_KEY=s3 --env=HF_TOKEN=s3 --env A=b a.yaml";
        let kept = "tsm-launch --cpus 1 --env API_KEY --env HF_TOKEN --env A=b --resume runs/a";
        assert_eq!(again(line), kept);
        let line = "tsm-launch --env API_KEY=s3 --env=HF_TOKEN=s3 --env A=b -- x --env API_KEY=own";
        let expected = "tsm-launch --env API_KEY=(hidden) --env=HF_TOKEN=(hidden) --env A=b -- x --env API_KEY=own";
        assert_eq!(shown(words(line)).join(" "), expected);
    }
}
