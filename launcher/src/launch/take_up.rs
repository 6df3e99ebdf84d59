//! The same command, given again: whether it starts a run, goes on with one, or finds it finished.
//!
//! A scheduler, or a loop in a shell, gives it again without knowing. What is in the run folder tells, and counts more
//! than what the command line says by then: a run goes on with its own config and from its own checkpoint.

use anyhow::Context;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use tsm_job::exit::{self, Coded};
use tsm_job::{Config, RunDir};

use crate::cli::Args;
use crate::manifest::earlier;
use crate::say::{print, say};
use crate::start::slurm::{Entry, Turn, on_entry};
use crate::target::{Resume, Target, last_config, resume};

/// What there is to do.
pub(super) enum Begin {
    /// Run this command line.
    Run(Box<Args>),
    /// Nothing; the exit code.
    Finished(i32),
}

/// By `--continue`, which the command line has or not.
///
/// # Errors
/// As the folder cannot be read.
pub(super) fn by_option(args: &Args) -> anyhow::Result<Begin> {
    let Some(folder) = args.run_dir.as_ref().filter(|_| args.go_on) else {
        return Ok(Begin::Run(Box::new(args.clone())));
    };
    let folder = std::path::absolute(folder)?;
    // A launcher that is about to write a manifest has written the config, and one of several nodes may look then.
    let entry = match (earlier::outcome(&folder), RunDir::new(&folder).config()) {
        (None, config) if config.is_file() => Entry::Resume,
        (outcome, _) => on_entry(1, outcome.as_ref().map(|(o, code)| (o.as_str(), *code))),
    };
    Ok(match entry {
        Entry::AlreadyFinished(code) => finished("the run", &folder, code),
        Entry::Resume => Begin::Run(Box::new(go_on(args, &folder))),
        Entry::Fresh => Begin::Run(Box::new(args.clone())),
    })
}

/// By what an earlier turn of the same job of SLURM has left. A checkpoint on the command line counts until the run has
/// a folder.
///
/// # Errors
/// Of a command line that does not say where its run is, or a folder that cannot be made.
pub(super) fn in_turn(turn: &Turn, args: &Args) -> anyhow::Result<Begin> {
    let from = args.resume.as_deref().map(resume).transpose()?;
    let (job, count) = (turn.allocation.job, turn.allocation.restart_count);
    let folder = match (&args.run_dir, from) {
        // The same in every turn.
        (None, Some(Resume::Run(_))) => return Ok(Begin::Run(Box::new(args.clone()))),
        (Some(dir), _) => std::path::absolute(dir)?,
        (None, _) => {
            let (root, name) = Target::place_of(args)?;
            let first = std::path::absolute(turn.folder(&root, &name))?;
            own_folder(&first, count, &words(args))
                .context(Coded::new(exit::CANNOT_WRITE, "cannot make the run folder"))?
        }
    };
    Ok(match turn.entry(&folder) {
        Entry::AlreadyFinished(code) => finished(&format!("job {job}"), &folder, code),
        Entry::Resume => Begin::Run(Box::new(go_on(args, &folder))),
        Entry::Fresh => {
            if count > 0 {
                say(format_args!(
                    "warning: job {job} was queued again, but {} holds no run on this node: it starts anew\n  hint: run.dir has to be on a file system that all nodes share",
                    folder.display()
                ));
            }
            let run_dir = Some(folder);
            Begin::Run(Box::new(Args {
                run_dir,
                ..args.clone()
            }))
        }
    })
}

fn finished(what: &str, folder: &Path, code: i32) -> Begin {
    let folder = folder.display();
    // Whoever asks for it has the exit code, too.
    let _ = print(&format!(
        "tsm-launch: {what} has finished in {folder} with exit code {code}\n"
    ));
    Begin::Finished(code)
}

/// The command line that goes on with the run in `folder`, whatever CONFIG says by now, which is told where it differs.
fn go_on(args: &Args, folder: &Path) -> Args {
    if earlier::outcome(folder).is_some_and(|(outcome, _)| outcome == earlier::UNREADABLE) {
        let manifest = RunDir::new(folder).manifest();
        say(format_args!(
            "warning: {} cannot be read: how the run ended is not known, and it goes on",
            manifest.display()
        ));
    }
    if let (Some(config), true) = (&args.config, args.program.is_empty()) {
        let own = last_config(folder);
        let load = |path: &Path, overrides: &[String]| {
            let mut config = Config::load(path, overrides).ok()?;
            // Chosen for the devices that there were.
            config.launch = Default::default();
            Some(config.to_yaml())
        };
        let now = load(config, &args.overrides);
        if now.is_none() || now != load(&own, &[]) {
            let (config, own, folder) = (config.display(), own.display(), folder.display());
            say(format_args!(
                "warning: {config} is not what the run in {folder} was started with: it goes on with {own}\n  hint: to change the run, give --resume {folder} {config}"
            ));
        }
    }
    Args {
        config: None,
        overrides: Vec::new(),
        run_dir: None,
        resume: Some(folder.into()),
        ..args.clone()
    }
}

/// What is run, in words that are the same in every turn.
fn words(args: &Args) -> String {
    let what = (&args.config, &args.overrides, &args.program, &args.resume);
    format!("{what:?}\n")
}

/// The folder of this launch among those of its job and name, `first`, `first-2` and so on: a script may launch several
/// in a turn. It is one that the same words were run in before, or that is free, and that no other launch of this turn
/// has taken. A file in it says so.
fn own_folder(first: &Path, turn: u32, words: &str) -> std::io::Result<PathBuf> {
    let mark = |folder: &Path, turn: u32| folder.join(format!("slurm-turn-{turn}"));
    for number in 1u32.. {
        let folder = match number {
            1 => first.to_path_buf(),
            n => first.with_file_name(format!(
                "{}-{n}",
                first.file_name().unwrap_or_default().to_string_lossy()
            )),
        };
        let mut marks = (0..=turn).map(|turn| fs_err::read_to_string(mark(&folder, turn)));
        let is_ours = match marks.find_map(Result::ok) {
            Some(other) => other == words,
            // Made by hand, or by a version that left no such file.
            None => turn > 0 || !RunDir::new(&folder).manifest().exists(),
        };
        if !is_ours {
            continue;
        }
        fs_err::create_dir_all(&folder)?;
        match fs_err::File::create_new(mark(&folder, turn)) {
            Ok(mut file) => {
                file.write_all(words.as_bytes())?;
                return Ok(folder);
            }
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Err(ErrorKind::StorageFull.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn args(line: &str) -> Args {
        Args::try_parse_from(line.split(' ')).unwrap()
    }

    #[test]
    fn every_launch_of_a_turn_finds_the_folder_that_it_had_in_the_last() {
        let root = tempfile::tempdir().unwrap();
        let first = root.path().join("x-slurm-7");
        let own = |turn, words: &str| {
            let folder = own_folder(&first, turn, words).unwrap();
            folder.file_name().unwrap().to_string_lossy().into_owned()
        };
        // Two stages, the second of them twice.
        let (one, two, again) = ("x-slurm-7", "x-slurm-7-2", "x-slurm-7-3");
        assert_eq!([own(0, "a"), own(0, "b"), own(0, "b")], [one, two, again]);
        assert_eq!([own(1, "a"), own(1, "b"), own(1, "b")], [one, two, again]);
        // One that no turn before has come to; and one that is left out.
        assert_eq!([own(2, "b"), own(2, "c")], [two, "x-slurm-7-4"]);
        assert_eq!([own(3, "c"), own(3, "a")], ["x-slurm-7-4", one]);
        // A folder of an older version is gone on with, but not begun in.
        let first = root.path().join("y-slurm-7");
        fs_err::create_dir(&first).unwrap();
        fs_err::write(first.join("manifest.json"), "{}").unwrap();
        assert_eq!(own_folder(&first, 1, "a").unwrap(), first);
        let other = own_folder(&first, 0, "b").unwrap();
        assert_eq!(other, root.path().join("y-slurm-7-2"));
    }

    #[test]
    fn what_is_run_is_the_same_whatever_it_is_run_on() {
        let of = |line: &str| words(&args(line));
        let base = of("tsm-launch --cpus 1 a.yaml optim.lr=1");
        assert_eq!(base, of("tsm-launch --cpus 2 --grace 1s a.yaml optim.lr=1"));
        for other in [
            "tsm-launch --cpus 1 a.yaml optim.lr=2",
            "tsm-launch --cpus 1 b.yaml optim.lr=1",
            "tsm-launch --cpus 1 --resume c a.yaml optim.lr=1",
            "tsm-launch --cpus 1 -- a.yaml optim.lr=1",
        ] {
            assert_ne!(base, of(other), "{other}");
        }
    }

    #[test]
    fn the_folder_says_how_a_command_goes_on() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("run");
        let line = format!("tsm-launch --continue --run-dir {} -- x", folder.display());
        let resumed = || match by_option(&args(&line)).unwrap() {
            Begin::Run(args) => Ok(args.resume.clone().map(|from| (from, args.run_dir.clone()))),
            Begin::Finished(code) => Err(code),
        };
        assert_eq!(resumed(), Ok(None));
        fs_err::create_dir(&folder).unwrap();
        assert_eq!(resumed(), Ok(None));
        let goes_on = Ok(Some((folder.clone(), None)));
        fs_err::write(folder.join("config.yaml"), "").unwrap();
        assert_eq!(resumed(), goes_on);
        for (manifest, expected) in [
            (r#"{"outcome":"failed","exit_code":76}"#, goes_on.clone()),
            (r#"{"outcome":"running","exit_code":null}"#, goes_on.clone()),
            (r#"{"outcome":"succeeded","exit_code":0}"#, Err(0)),
            (r#"{"outcome":"failed","exit_code":93}"#, Err(93)),
            ("", goes_on.clone()),
            (r#"{"outcome":"succ"#, goes_on.clone()),
        ] {
            fs_err::write(folder.join("manifest.json"), manifest).unwrap();
            assert_eq!(resumed(), expected, "{manifest}");
        }
        // Of a program, which has no config.
        fs_err::remove_file(folder.join("config.yaml")).unwrap();
        assert_eq!(resumed(), goes_on);
    }
}
