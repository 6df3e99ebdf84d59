//! The command line.

mod help;
mod values;

pub use values::{Gpus, Limit, Nodes, Preflight, Show};

use clap::{ArgGroup, Parser};
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;
use tsm_job::config::duration;
use tsm_job::exit::{self, Coded};

use crate::cluster::key::Key;
use crate::cluster::tls::{Tls, TlsFiles};
use crate::console::painter::Format;
use crate::doctor::preflight::Scale;
use crate::say::reading;
use crate::status::http::Port;

/// Starts one worker per GPU (or CPU share), watches them, and ends them all when one fails.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "tsm-launch",
    version,
    after_help = help::AFTER,
    override_usage = "tsm-launch [--gpus N|auto|0,1,3 | --cpus N] [OPTIONS] CONFIG.yaml [key.path=value ...]\n       \
                      tsm-launch [--gpus N|auto|0,1,3 | --cpus N] [OPTIONS] -- PROGRAM [ARGS ...]"
)]
#[command(group(ArgGroup::new("device").args(["gpus", "cpus"])))]
#[command(group(ArgGroup::new("key").args(["key_file", "key_fd"])))]
#[command(group(ArgGroup::new("over_ssh").args(["hosts", "hostfile"])))]
pub struct Args {
    /// Start one worker on each of N GPUs, on all visible ones (`auto`), or on those listed (`0,1,3`; `2,` for one).
    #[arg(long, allow_hyphen_values = true, value_name = "N|auto|LIST")]
    pub gpus: Option<Gpus>,

    /// Start N workers on the CPU.
    #[arg(long, allow_hyphen_values = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub cpus: Option<u32>,

    /// Nodes of the job; with MIN:MAX it starts with MIN and goes on with as few, and more join up to MAX
    /// [default: all that --hosts, SLURM or mpirun gives, or else 1].
    #[arg(long, allow_hyphen_values = true, value_name = "N|MIN:MAX")]
    pub nodes: Option<Nodes>,

    /// Start the workers on these hosts by ssh; N: how many, of the kind that --gpus or --cpus says.
    #[arg(long, value_name = "HOST[:N],...", conflicts_with = "rendezvous")]
    pub hosts: Option<String>,

    /// The same, with one host a line: `gpu-01 slots=8`, or `gpu-01:8`.
    #[arg(long, value_name = "FILE", conflicts_with = "rendezvous")]
    pub hostfile: Option<PathBuf>,

    /// The ssh to use for --hosts, and options of its own, separated by spaces.
    #[arg(
        long,
        value_name = "COMMAND",
        default_value = "ssh",
        requires = "over_ssh"
    )]
    pub ssh: String,

    /// Where tsm-launch is on the other hosts [default: where it is here].
    #[arg(long, value_name = "PATH", requires = "over_ssh")]
    pub remote_launcher: Option<PathBuf>,

    /// Where the nodes meet, for the same command on every node: whoever can listen there coordinates.
    #[arg(long, value_name = "HOST:PORT", requires = "key")]
    pub rendezvous: Option<String>,

    /// Talk TLS at --rendezvous: this node's certificate, for the name by which others reach it (PEM).
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_ca", "key"])]
    pub tls_cert: Option<PathBuf>,

    /// The certificate's private key, in a file that is yours alone.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// Who signed the certificates of all nodes.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_ca: Option<PathBuf>,

    /// Where processes that mpirun or srun started on several nodes find each other: a folder that all nodes share
    /// [default: the one of run folders].
    #[arg(long, value_name = "PATH", conflicts_with_all = ["over_ssh", "rendezvous"])]
    pub rendezvous_dir: Option<PathBuf>,

    /// Take several processes that mpirun started on one machine for nodes, as tests do.
    #[arg(long, conflicts_with_all = ["over_ssh", "rendezvous"])]
    pub share_host: bool,

    /// The job's key, in a file that is yours alone; `tsm-launch key FILE` makes one.
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,

    /// The same from a descriptor that is open for reading, 0 for stdin; no file is needed.
    #[arg(long, value_name = "N")]
    pub key_fd: Option<RawFd>,

    /// Start all ranks again after a failure, so many times in a row without a new checkpoint: not what fails again
    /// until it is changed, nor the same failure at the same step twice. A program that reports no steps is started
    /// again so many times in all.
    #[arg(
        long,
        allow_hyphen_values = true,
        value_name = "N",
        default_value_t = 0
    )]
    pub max_restarts: u32,

    /// Wait this long for nodes to join.
    #[arg(long, allow_hyphen_values = true, value_name = "TIME", value_parser = duration::parse, default_value = "10m")]
    pub join_timeout: Duration,

    /// A node that is silent for this long is lost.
    #[arg(long, allow_hyphen_values = true, value_name = "TIME", value_parser = values::node_timeout, default_value = "1400ms")]
    pub node_timeout: Duration,

    /// Name the late ranks and stop when no rank has made a step for this long.
    #[arg(
        long,
        allow_hyphen_values = true,
        value_name = "TIME|off",
        default_value = "10m"
    )]
    pub hang_timeout: Limit,

    /// Look at every node before the first rank is started.
    #[arg(long, value_name = "HOW", value_enum, default_value = "quick")]
    pub preflight: Preflight,

    /// How much `--preflight full` measures: `BYTES,BUDGET,WAIT[,cpus]`.
    #[arg(long, hide = true, default_value = "67108864,2s,30s")]
    pub preflight_scale: Scale,

    /// A variable for the workers: with its value, or as it is here. Not one that tsm-launch sets itself.
    #[arg(long = "env", value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,

    /// Wait this long between the first signal to a worker and SIGKILL [default: launch.grace, or 30s].
    #[arg(long, allow_hyphen_values = true, value_name = "TIME", value_parser = duration::parse)]
    pub grace: Option<Duration>,

    /// Use this folder for the run instead of a new one below run.dir (or `runs`).
    #[arg(long, value_name = "PATH")]
    pub run_dir: Option<PathBuf>,

    /// Go on with the run in --run-dir where there is one, with its own config and from its own checkpoint, and do
    /// nothing where it is finished: for a command that is given again until it succeeds.
    #[arg(long = "continue", requires = "run_dir")]
    pub go_on: bool,

    /// Continue a run folder in place, or start from a checkpoint. A program finds the path in TSM_RESUME_FROM, and
    /// makes of it what it can.
    #[arg(long, value_name = "PATH")]
    pub resume: Option<PathBuf>,

    /// Show the output of these ranks here [default: 0 for a config, all for a program].
    #[arg(long, value_name = "all|none|LIST")]
    pub show_ranks: Option<Show>,

    /// How lines are shown: `text`, or `json` with one object a line.
    #[arg(long, value_name = "text|json", default_value = "text")]
    pub log_format: Format,

    /// Do not draw the state of the job at the bottom of a terminal.
    #[arg(long)]
    pub no_view: bool,

    /// Serve the state of the job as JSON and for Prometheus on this port of the loopback interface.
    #[arg(long, value_name = "PORT|off", default_value = "0")]
    pub status_port: Port,

    /// Start this program for a config instead of the tsm-trainer beside tsm-launch.
    #[arg(long, value_name = "PATH", conflicts_with = "program")]
    pub trainer: Option<PathBuf>,

    /// Leave the workers on all cores instead of giving each its own share.
    #[arg(long)]
    pub no_affinity: bool,

    /// Replace RANK, WORLD_SIZE, MASTER_ADDR and the like found in the environment instead of refusing them, and
    /// start a job of its own in a process of mpirun, srun or Kubeflow.
    #[arg(long)]
    pub ignore_env: bool,

    /// Print ranks, devices, cores, environment and commands, and start nothing.
    #[arg(long)]
    pub dry_run: bool,

    /// The job as YAML.
    #[arg(value_name = "CONFIG.yaml")]
    pub config: Option<PathBuf>,

    /// Values that replace those of the config, such as `optim.lr=0.01`.
    #[arg(value_name = "key.path=value")]
    pub overrides: Vec<String>,

    /// A program that reads torch's environment variables, and its arguments.
    #[arg(last = true, value_name = "PROGRAM")]
    pub program: Vec<OsString>,
}

impl Args {
    /// With `--resume` the config may be left out, and the first word may be an override.
    #[must_use]
    pub fn settled(mut self) -> Args {
        let is_override = |path: &PathBuf| {
            let key = path.to_str().and_then(|word| word.split_once('='));
            let is_key = |key: &str| {
                let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.');
                !key.is_empty() && key.chars().all(named)
            };
            key.is_some_and(|(key, _)| is_key(key)) && !path.exists()
        };
        if self.resume.is_some()
            && let Some(word) = self.config.take_if(|path| is_override(path))
        {
            let word = word.to_string_lossy().into_owned();
            self.overrides.insert(0, word);
        }
        self
    }

    /// How many nodes, where nothing else says it.
    pub fn num_nodes(&self) -> Nodes {
        self.nodes.unwrap_or(Nodes::ONE)
    }

    /// TLS for the connections, where it is asked for.
    ///
    /// # Errors
    /// [`exit::USAGE`] when a file cannot be used.
    pub fn tls(&self) -> Result<Option<Tls>, Coded> {
        let files = (
            self.tls_cert.clone(),
            self.tls_key.clone(),
            self.tls_ca.clone(),
        );
        let (Some(cert), Some(key), Some(ca)) = files else {
            return Ok(None);
        };
        Tls::load(&TlsFiles { cert, key, ca }).map(Some)
    }

    /// The key of a job whose nodes are not started from here.
    ///
    /// # Errors
    /// [`exit::USAGE`] without `--key-file` and `--key-fd`, or when it cannot be used. A descriptor can be read once.
    pub fn key(&self) -> Result<Key, Coded> {
        match (&self.key_file, self.key_fd) {
            (Some(file), _) => reading(file, || Key::read_file(file)),
            (None, Some(fd)) => Key::read_fd(fd),
            (None, None) => {
                let hint =
                    "make one with tsm-launch key FILE, and give --key-file FILE on every node";
                let text =
                    format!("the nodes of this job need a key to know each other\n  hint: {hint}");
                Err(Coded::new(exit::USAGE, text))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_node_is_lost_after_its_lease_where_nothing_else_is_said() {
        let args = parse("tsm-launch --cpus 2 a.yaml").unwrap();
        assert_eq!(args.node_timeout, crate::cluster::message::LEASE);
    }

    #[test]
    fn a_config_takes_overrides_and_a_program_takes_anything() {
        let args = parse("tsm-launch --cpus 2 a.yaml optim.lr=-1 --grace 500ms b=c").unwrap();
        assert_eq!(args.overrides, ["optim.lr=-1", "b=c"]);
        assert_eq!(args.grace, Some(Duration::from_millis(500)));
        let settled = |words| parse(words).unwrap().settled();
        let args = settled("tsm-launch --cpus 2 --resume runs/a optim.lr=-1 b=c");
        assert_eq!((args.config, args.overrides.len()), (None, 2));
        assert_eq!(args.overrides[0], "optim.lr=-1");
        for words in [
            "tsm-launch --cpus 2 optim.lr=-1",
            "tsm-launch --cpus 2 --resume runs/a a.yaml b=c",
            "tsm-launch --cpus 2 --resume runs/a /lr=1/a.yaml",
        ] {
            assert!(settled(words).config.is_some(), "{words}");
        }
        let args = parse("tsm-launch --gpus auto -- python t.py --gpus 3 -- x").unwrap();
        assert_eq!(args.program, ["python", "t.py", "--gpus", "3", "--", "x"]);
        assert_eq!(args.config, None);
    }

    #[test]
    fn two_devices_or_a_bad_time_are_refused() {
        assert!(parse("tsm-launch --gpus 1 --cpus 1 a.yaml").is_err());
        assert!(parse("tsm-launch --cpus 0 a.yaml").is_err());
        assert!(parse("tsm-launch --cpus 1 --grace 30 a.yaml").is_err());
    }
}
