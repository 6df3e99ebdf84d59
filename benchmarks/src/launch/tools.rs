//! The launchers that are measured, and how each is told the same job.

use super::stage::Stage;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use tsm_job::exit::{self, Coded};

/// A launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum Tool {
    #[value(skip)]
    TsmLaunch,
    Torchrun,
    Srun,
    Mpirun,
}

impl Tool {
    pub const OTHERS: [Tool; 3] = [Tool::Torchrun, Tool::Srun, Tool::Mpirun];

    pub fn name(self) -> &'static str {
        match self {
            Tool::TsmLaunch => "tsm-launch",
            Tool::Torchrun => "torchrun",
            Tool::Srun => "srun",
            Tool::Mpirun => "mpirun",
        }
    }
}

/// What to start.
#[derive(Clone, Debug)]
pub struct Job {
    /// Of one launcher.
    pub ranks: u32,
    pub max_restarts: u32,
    /// As far as the launcher can be told; see [`Tool::TsmLaunch`].
    pub grace: Option<Duration>,
    /// Output goes to files below `logs` alone.
    pub to_files: bool,
    pub nodes: Option<Nodes>,
    /// For the ranks.
    pub words: Vec<String>,
}

/// Two or more launchers on this machine that make one job.
#[derive(Clone, Debug)]
pub struct Nodes {
    pub num: u32,
    pub port: u16,
    pub key_file: PathBuf,
}

impl Job {
    pub fn new(ranks: u32) -> Job {
        Job {
            ranks,
            max_restarts: 0,
            grace: None,
            to_files: false,
            nodes: None,
            words: Vec::new(),
        }
    }
}

/// The programs of this machine.
pub struct Programs {
    launch: PathBuf,
    rank: PathBuf,
    python: Option<PathBuf>,
}

impl Programs {
    /// `launch` instead of the `tsm-launch` beside this program.
    ///
    /// # Errors
    /// [`exit::PREFLIGHT`] when ours is not there.
    pub fn find(launch: Option<PathBuf>, python: Option<PathBuf>) -> Result<Programs> {
        let me = std::env::current_exe()?;
        let beside = |name: &str| me.with_file_name(name);
        let launch = launch.unwrap_or_else(|| beside("tsm-launch"));
        let rank = beside("bench-rank");
        for program in [&launch, &rank] {
            if !program.is_file() {
                let hint = "cargo build --release -p tsm-launch -p tsm-bench";
                let text = format!("there is no {}\n  hint: {hint}", program.display());
                bail!(Coded::new(exit::PREFLIGHT, text));
            }
        }
        let python = python.or_else(|| Some(std::env::var_os("TSM_PYTHON")?.into()));
        Ok(Programs {
            launch: fs_err::canonicalize(launch)?,
            rank,
            python,
        })
    }

    /// The version of a launcher, or why it cannot be measured here.
    ///
    /// # Errors
    /// The reason.
    pub fn version(&self, tool: Tool) -> Result<String> {
        match tool {
            Tool::TsmLaunch => said(Command::new(&self.launch).arg("--version")),
            Tool::Torchrun => {
                let python = self.python.as_ref();
                let python = python.context("TSM_PYTHON names no Python that has PyTorch")?;
                let version = "import torch.distributed.run; print(torch.__version__)";
                Ok(format!(
                    "torch {}",
                    said(Command::new(python).args(["-c", version]))?
                ))
            }
            Tool::Srun => {
                // A command without a cluster waits for it; one with a cluster answers at once.
                said(Command::new("timeout").args(["10", "sinfo", "--noheader"]))
                    .context("no SLURM cluster answers")?;
                said(Command::new("srun").arg("--version"))
            }
            Tool::Mpirun => said(Command::new("mpirun").arg("--version")),
        }
    }

    /// `tool` with `job` on `stage`, whose ranks will say there what happens to them.
    pub fn command(&self, tool: Tool, job: &Job, stage: &Stage) -> Command {
        let ranks = job.ranks.to_string();
        let mut command = match tool {
            Tool::TsmLaunch => {
                let mut command = Command::new(&self.launch);
                command.args(["--cpus", &ranks, "--run-dir", "run"]);
                command.args(["--max-restarts", &job.max_restarts.to_string()]);
                if let Some(grace) = job.grace {
                    command.args(["--grace", &format!("{}ms", grace.as_millis())]);
                }
                if job.to_files {
                    command.args(["--show-ranks", "none"]);
                }
                if let Some(nodes) = &job.nodes {
                    let (num, point) = (nodes.num.to_string(), format!("127.0.0.1:{}", nodes.port));
                    command.args(["--nodes", &num, "--rendezvous", &point, "--key-file"]);
                    command.arg(&nodes.key_file).args(["--join-timeout", "3m"]);
                }
                command.arg("--");
                command
            }
            Tool::Torchrun => {
                let mut command =
                    Command::new(self.python.as_deref().unwrap_or("python3".as_ref()));
                command.args([
                    "-m",
                    "torch.distributed.run",
                    "--no-python",
                    "--nproc-per-node",
                    &ranks,
                ]);
                command.args(["--max-restarts", &job.max_restarts.to_string()]);
                match &job.nodes {
                    None => command.arg("--standalone"),
                    Some(nodes) => command.args([
                        format!("--nnodes={}", nodes.num),
                        "--rdzv-backend=c10d".into(),
                        "--rdzv-id=bench".into(),
                        format!("--rdzv-endpoint=127.0.0.1:{}", nodes.port),
                    ]),
                };
                if job.to_files {
                    command.args(["--redirects", "3", "--log-dir", "logs"]);
                }
                // It would set, and say, that.
                command.env("OMP_NUM_THREADS", "1");
                command
            }
            Tool::Srun => {
                let nodes = job.nodes.as_ref().map_or(1, |n| n.num);
                let mut command = Command::new("srun");
                command.args(["--kill-on-bad-exit=1", "--overcommit", "--quiet"]);
                command.args([
                    "--nodes",
                    &nodes.to_string(),
                    "--ntasks",
                    &(nodes * job.ranks).to_string(),
                ]);
                if job.to_files {
                    command.args(["--output", "logs/%t.out"]);
                }
                command
            }
            Tool::Mpirun => {
                let mut command = Command::new("mpirun");
                command.args([
                    "--allow-run-as-root",
                    "--oversubscribe",
                    "--bind-to",
                    "none",
                    "-n",
                    &ranks,
                ]);
                if job.to_files {
                    command.args(["--output-filename", "logs:nocopy"]);
                }
                command
            }
        };
        command.arg(&self.rank).arg(stage.pipe()).args(&job.words);
        command
    }
}

/// The first line that a command prints.
fn said(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_owned();
    let name = OsStr::to_string_lossy(&name);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {name}"))?;
    let line = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        text.lines()
            .map(str::trim)
            .rfind(|l| !l.is_empty())
            .map(str::to_owned)
    };
    if !output.status.success() {
        bail!(
            "{name} ended with {}: {}",
            output.status,
            line(&output.stderr).unwrap_or_default()
        );
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let first = text.lines().map(str::trim).find(|l| !l.is_empty());
    Ok(first.unwrap_or_default().to_owned())
}
