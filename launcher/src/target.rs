//! What is to be run: the trainer with a config, or any program; new, or continued.

use anyhow::{Context, bail};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use tsm_job::config::DeviceKind;
use tsm_job::exit::{self, Coded};
use tsm_job::{Config, RunDir};

use crate::cli::Args;
use crate::own;
use crate::plan::Devices;
use crate::say::reading;

/// A resolved command line.
pub struct Target {
    pub what: What,
    pub resume: Option<Resume>,
}

pub enum What {
    Trainer {
        trainer: PathBuf,
        config: Box<Config>,
    },
    Program(Vec<OsString>),
}

/// Where the run takes up.
#[derive(Clone, Debug, PartialEq)]
pub enum Resume {
    /// A run folder, to be continued in place.
    Run(PathBuf),
    /// A checkpoint, from which a new run starts.
    Checkpoint(PathBuf),
}

impl Resume {
    pub fn path(&self) -> &Path {
        match self {
            Resume::Run(path) | Resume::Checkpoint(path) => path,
        }
    }
}

impl Target {
    /// Loads and checks everything that the command line names.
    ///
    /// # Errors
    /// With the exit code for a wrong command line, config or missing file.
    pub fn resolve(args: &Args) -> anyhow::Result<Target> {
        let resume = args.resume.as_deref().map(resume).transpose()?;
        if !args.program.is_empty() {
            if let Some(config) = &args.config {
                let text = format!(
                    "both a config ({}) and a program after -- are given",
                    config.display()
                );
                bail!(Coded::new(exit::USAGE, text));
            }
            if let Some(Resume::Run(dir)) = &resume
                && Config::load(&last_config(dir), &[]).is_ok()
            {
                let text = format!(
                    "{} is the run of a training, which a program cannot continue\n  hint: leave out the program, or \
                     leave out --resume: the program's run has a folder of its own then",
                    dir.display()
                );
                bail!(Coded::new(exit::USAGE, text));
            }
            let mut program = args.program.clone();
            program[0] = find_program(&program[0])?.into();
            return Ok(Target {
                what: What::Program(program),
                resume,
            });
        }
        let config = match (&args.config, &resume) {
            (Some(path), _) => match not_a_config(path.as_os_str()) {
                Some(text) => bail!(Coded::new(exit::USAGE, text)),
                None => path.clone(),
            },
            (None, Some(Resume::Run(dir))) => last_config(dir),
            (None, _) => bail!(Coded::new(
                exit::USAGE,
                "nothing to run\n  hint: give a CONFIG.yaml, or -- PROGRAM ARGS, or --resume RUN_FOLDER; see --help"
            )),
        };
        let config = reading(&config, || Config::load(&config, &args.overrides))
            .map_err(|e| Coded::new(exit::CONFIG, e.to_string()))?;
        check_files(&config)?;
        let trainer = match &args.trainer {
            Some(path) => std::path::absolute(path)?,
            None => own::path()
                .context("cannot find the trainer")?
                .with_file_name("tsm-trainer"),
        };
        if !is_executable(&trainer) {
            let hint =
                "build it (cargo build --release -p tsm-trainer), or name it with --trainer PATH";
            let text = format!(
                "cannot start the trainer: {} is not a program\n  hint: {hint}",
                trainer.display()
            );
            bail!(Coded::new(exit::PREFLIGHT, text));
        }
        Ok(Target {
            what: What::Trainer {
                trainer,
                config: Box::new(config),
            },
            resume,
        })
    }

    /// Where the runs of a command line are, and what this one is called, whether or not its files are there.
    ///
    /// # Errors
    /// As [`Target::resolve`], where the config cannot be read.
    pub fn place_of(args: &Args) -> anyhow::Result<(PathBuf, String)> {
        match (&args.config, args.program.first()) {
            (Some(path), None) => {
                let config = Config::load(path, &args.overrides)
                    .map_err(|e| Coded::new(exit::CONFIG, e.to_string()))?;
                Ok((config.run.dir, config.run.name))
            }
            (None, Some(program)) => Ok(place_of_program(program)),
            _ => Ok(Target::resolve(args)?.place()),
        }
    }

    /// The config, where there is one.
    pub fn config(&self) -> Option<&Config> {
        match &self.what {
            What::Trainer { config, .. } => Some(config),
            What::Program(_) => None,
        }
    }

    /// Our trainer, where its workers are that.
    pub fn trainer(&self) -> Option<&Path> {
        match &self.what {
            What::Trainer { trainer, .. } => Some(trainer),
            What::Program(_) => None,
        }
    }

    /// Whether its workers report progress, save on SIGUSR2 and find their own checkpoints.
    pub fn is_trainer(&self) -> bool {
        matches!(self.what, What::Trainer { .. })
    }

    /// Writes the devices chosen into the config, which is where the trainer learns of them.
    pub fn settle(&mut self, devices: &Devices) {
        let device = match devices {
            Devices::Cpu(_) => DeviceKind::Cpu,
            Devices::Gpus(_) => DeviceKind::Gpu,
        };
        self.settle_as(device, Some(devices.len() as u32));
    }

    /// As [`Target::settle`], for nodes that are not this one. `None`: as many as each has.
    pub fn settle_as(&mut self, device: DeviceKind, nproc_per_node: Option<u32>) {
        if let What::Trainer { config, .. } = &mut self.what {
            config.launch.device = device;
            config.launch.nproc_per_node = nproc_per_node;
        }
    }

    /// Folder of run folders, and the name of this run.
    pub fn place(&self) -> (PathBuf, String) {
        match &self.what {
            What::Trainer { config, .. } => (config.run.dir.clone(), config.run.name.clone()),
            What::Program(program) => place_of_program(&program[0]),
        }
    }

    /// What a worker executes; `config` is the resolved one in the run folder.
    pub fn command(&self, config: &Path) -> Vec<OsString> {
        match &self.what {
            What::Trainer { trainer, .. } => vec![trainer.into(), "--config".into(), config.into()],
            What::Program(program) => program.clone(),
        }
    }
}

fn place_of_program(program: &OsStr) -> (PathBuf, String) {
    let name = Path::new(program).file_name().unwrap_or(program);
    ("runs".into(), name.to_string_lossy().into_owned())
}

/// Every file that the config names is there.
fn check_files(config: &Config) -> anyhow::Result<()> {
    let missing: Vec<String> = config.check_files().iter().map(|p| p.to_string()).collect();
    match missing.as_slice() {
        [] => Ok(()),
        [one] => bail!(Coded::new(exit::DATA, one.clone())),
        many => {
            let (number, all) = (many.len(), many.join("\n\n"));
            let text = format!("{number} paths of the configuration lead nowhere\n\n{all}");
            bail!(Coded::new(exit::DATA, text))
        }
    }
}

/// What `--resume` names.
///
/// # Errors
/// [`exit::DATA`] when nothing is there.
pub fn resume(path: &Path) -> anyhow::Result<Resume> {
    let found = fs_err::metadata(path).map_err(|e| {
        Coded::new(
            exit::DATA,
            format!("cannot resume: {e}\n  hint: give a run folder or a checkpoint of one"),
        )
    })?;
    let path = std::path::absolute(path)?;
    let run = RunDir::new(&path);
    // Where nodes have disks of their own, only that of the first has a manifest.
    let is_run = run.manifest().is_file() || run.config().is_file();
    Ok(if found.is_dir() && is_run {
        Resume::Run(path)
    } else {
        Resume::Checkpoint(path)
    })
}

/// The config a run folder was last continued with: `config-3.yaml` before `config-2.yaml` before `config.yaml`.
pub fn last_config(dir: &Path) -> PathBuf {
    let numbered = |n: u32| dir.join(format!("config-{n}.yaml"));
    let last = (2..).take_while(|&n| numbered(n).is_file()).last();
    last.map_or_else(|| RunDir::new(dir).config(), numbered)
}

/// What to say of a word that stands where a config is expected, as for other launchers a program does.
pub fn not_a_config(word: &OsStr) -> Option<String> {
    let path = Path::new(word);
    let is_script = path.extension().is_some_and(|e| e == "py" || e == "sh");
    let is_missing = || !path.exists();
    // No config is called as a program of PATH is, where there is none of that name.
    let is_command = || path.components().count() == 1 && find_program(word).is_ok();
    let shown = path.display();
    if is_script || (is_missing() && is_command()) {
        Some(format!(
            "{shown} is a program, and stands where a config is expected\n  \
             hint: a program comes after --: tsm-launch --gpus 8 -- python train.py --epochs 10"
        ))
    } else if word == "help" && is_missing() {
        Some("there is no config called help\n  hint: tsm-launch --help says what there is".into())
    } else {
        None
    }
}

/// Looks a program up as a shell does, so that a missing one is known before anything starts.
///
/// # Errors
/// [`exit::PREFLIGHT`] when there is none.
pub fn find_program(name: &OsStr) -> anyhow::Result<PathBuf> {
    let path = Path::new(name);
    let found = if path.components().count() > 1 {
        std::path::absolute(path).ok().filter(|p| is_executable(p))
    } else {
        let dirs = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&dirs)
            .map(|dir| dir.join(path))
            .find(|p| is_executable(p))
    };
    found.ok_or_else(|| {
        let shown = path.display();
        let text = if path.is_dir() {
            format!("cannot start {shown}: it is a folder\n  hint: give a program")
        } else if path.components().count() > 1 && path.exists() {
            format!("cannot start {shown}: it is not executable\n  hint: chmod +x {shown}, or give the program that runs it")
        } else {
            format!("cannot start {shown}: no such program\n  hint: check the name and PATH")
        };
        Coded::new(exit::PREFLIGHT, text).into()
    })
}

pub fn is_executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_a_shell_does() {
        assert!(find_program("sh".as_ref()).unwrap().is_absolute());
        let error = find_program("no-such-program".as_ref()).unwrap_err();
        assert_eq!(exit::code_of(&error), exit::PREFLIGHT);
        let text = tempfile::NamedTempFile::new().unwrap();
        assert!(
            find_program(text.path().as_os_str()).is_err(),
            "a file that is no program"
        );
    }

    #[test]
    fn a_program_where_a_config_is_expected_is_told_where_it_belongs() {
        for word in ["train.py", "./run.sh", "sh"] {
            let text = not_a_config(word.as_ref()).unwrap();
            assert!(text.contains("comes after --"), "{text}");
        }
        assert!(not_a_config("help".as_ref()).unwrap().contains("--help"));
        for word in ["a.yaml", "configs/sh", "no-such-program", "optim.lr=0.1"] {
            assert_eq!(not_a_config(word.as_ref()), None);
        }
    }

    #[test]
    fn a_folder_with_a_manifest_or_config_is_a_run_and_anything_else_a_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        fs_err::write(other.path().join("config.yaml"), "").unwrap();
        let run = Resume::Run(other.path().into());
        assert_eq!(resume(other.path()).unwrap(), run);
        assert_eq!(
            resume(dir.path()).unwrap(),
            Resume::Checkpoint(dir.path().into())
        );
        fs_err::write(dir.path().join("manifest.json"), "{}").unwrap();
        assert_eq!(resume(dir.path()).unwrap(), Resume::Run(dir.path().into()));
        assert_eq!(last_config(dir.path()), dir.path().join("config.yaml"));
        fs_err::write(dir.path().join("config-2.yaml"), "").unwrap();
        assert_eq!(last_config(dir.path()), dir.path().join("config-2.yaml"));
        assert_eq!(
            exit::code_of(&resume(&dir.path().join("none")).unwrap_err()),
            exit::DATA
        );
    }
}
