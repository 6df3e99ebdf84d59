//! From what was asked for to a session that is ready to run: its folder, its settings, its screen.

use anyhow::{Context as _, bail};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tsm_job::exit::{self, Coded};

use crate::cli::{Args, Preflight, Show};
use crate::clock;
use crate::cluster::agent;
use crate::cluster::coordinator::{Job, Settings};
use crate::cluster::link::{Hub, Link};
use crate::cluster::policy;
use crate::console::painter::Style;
use crate::console::screen::{Outputs, Screen};
use crate::doctor::Context;
use crate::folder::Folder;
use crate::hang::progress::Limits;
use crate::logs::Shown;
use crate::manifest::{self, Manifest};
use crate::plan::{self, Devices};
use crate::session::{End, Session, Voice};
use crate::start::agent::{self as start_agent, Parts};
use crate::start::children::Children;
use crate::start::slurm::Turn;
use crate::status::Snapshot;
use crate::status::http::Server;
use crate::status::view::{View, wants_colour};
use crate::target::{Resume, Target, What};

/// How long to wait for more nodes when there are enough.
const LAST_CALL: Duration = Duration::from_secs(5);
/// How long the end waits for somebody who reads the output, but takes nothing.
const FLUSH: Duration = Duration::from_secs(2);

/// A session that is ready to run.
pub(super) struct Prepared {
    pub session: Session,
    screen: Screen,
    /// Ends with the job.
    _status: Option<Server>,
    /// The config differs from the one that the run folder had.
    revised: bool,
    config: PathBuf,
}

impl Prepared {
    /// Where an agent in this process shows its lines.
    pub fn shown(&self) -> Shown {
        Shown {
            host: manifest::host(),
            feed: self.screen.feed(),
            patience: self.screen.patience(),
        }
    }

    /// What the agent of this node looks at first.
    pub fn preflight(&self, args: &Args, devices: &Devices) -> Option<Context> {
        let program = self.session.settings.job.command.first().map(PathBuf::from);
        let folder = self.session.folder.dir.path().to_path_buf();
        (args.preflight != Preflight::Off)
            .then(|| start_agent::context(devices, Some(folder), program))
    }

    /// Makes it a turn of a job of SLURM, which saves before its time is over.
    pub fn take_turn(&mut self, turn: Turn, start: Instant) {
        let settings = &mut self.session.settings;
        if settings.job.saves {
            let save_in = turn.save_in(std::time::SystemTime::now());
            settings.save_at = save_in.map(|d| start.elapsed() + d);
            settings.job.shielded = true;
        }
        self.session.turn = Some(turn);
    }

    /// Runs the job, and the agent of this node where it has ranks.
    pub async fn run(self, agent_here: Option<(Parts, Link)>) -> anyhow::Result<i32> {
        let Prepared {
            session,
            screen,
            _status,
            revised,
            config,
        } = self;
        let end = match agent_here {
            Some((parts, link)) => {
                let (code, leave) = tokio::join!(session.run(), agent::run(parts.setup()?, link));
                leave?;
                code?
            }
            None => session.run().await?,
        };
        screen.finish(FLUSH);
        let End {
            code,
            outcome,
            stopped,
            turn,
            folder,
        } = end;
        // SLURM may end this process for it, so it comes last of all that can be lost.
        let requeue = || {
            if let Some(text) = turn.and_then(|turn| turn.end(code, outcome, &folder, stopped)) {
                eprintln!("tsm-launch: {text}");
            }
        };
        if revised && code == exit::CONFIG {
            // The next `--resume` takes the newest config, which must not be one the workers refused.
            fs_err::rename(&config, config.with_extension("yaml.refused"))?;
        }
        requeue();
        Ok(code)
    }
}

/// Makes the run folder and all that the coordinator needs. `devices`: of this node, where it has ranks.
pub(super) fn prepare(
    args: &Args,
    mut target: Target,
    devices: Option<&Devices>,
    start: Instant,
) -> anyhow::Result<Prepared> {
    if let Some(devices) = devices {
        target.settle(devices);
    }
    let time = clock::Utc::now();
    let (root, name) = target.place();
    let mut folder = match (&args.run_dir, &target.resume) {
        (Some(dir), _) => Folder::at(dir)?,
        (None, Some(Resume::Run(dir))) => Folder::resume(dir)?,
        (None, _) => Folder::create(&root, &name, &time.compact())?,
    };
    let revised = match target.config() {
        Some(config) => folder.write_config(config)?,
        None => false,
    };
    let config = folder.config.clone();
    let dir = folder.dir.path().to_path_buf();
    let run_id = run_id(&dir);
    let command = target.command(&folder.config);
    let is_trainer = matches!(target.what, What::Trainer { .. });
    let default_show = if is_trainer {
        Show::Ranks(vec![0])
    } else {
        Show::All
    };
    let launch = target.config().map(|config| &config.launch);
    let host = manifest::host();
    let text = |word: &OsString| word.to_string_lossy().into_owned();
    let manifest = Manifest {
        run_id: run_id.clone(),
        argv: std::env::args_os().map(|word| text(&word)).collect(),
        overrides: args.overrides.clone(),
        command: command.iter().map(text).collect(),
        folder: dir.to_string_lossy().into_owned(),
        resumed_from: target
            .resume
            .as_ref()
            .map(|from| from.path().to_string_lossy().into_owned()),
        tsm_launch: env!("CARGO_PKG_VERSION"),
        commit: None,
        host: host.clone(),
        machine: None,
        gpus: match devices {
            Some(Devices::Gpus(gpus)) => gpus.clone(),
            _ => Vec::new(),
        },
        world_size: 0,
        started: time.rfc3339(),
        ended: None,
        outcome: "running",
        exit_code: None,
        ranks: Vec::new(),
        ..Manifest::default()
    };
    let config_text = match target.config() {
        Some(_) => {
            let name = config
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            Some((name, fs_err::read_to_string(&config)?))
        }
        None => None,
    };
    let job = Job {
        run_id,
        run_dir: dir.clone(),
        config: config_text,
        digest: String::new(),
        command,
        directory: std::env::current_dir().context("the current folder is gone")?,
        base_env: None,
        env: args
            .env
            .iter()
            .map(|pair| variable(pair))
            .collect::<anyhow::Result<_>>()?,
        resume_from: target.resume.as_ref().map(|from| from.path().to_path_buf()),
        grace: args
            .grace
            .or(launch.map(|l| l.grace))
            .unwrap_or(Duration::from_secs(30)),
        show: match args.show_ranks.clone().unwrap_or(default_show) {
            Show::All => None,
            Show::Ranks(ranks) => Some(ranks),
        },
        affinity: !args.no_affinity,
        resume: is_trainer.then(|| resume_command(args, &dir)),
        saves: is_trainer,
        shielded: false,
    };
    let settings = Settings {
        min_nodes: args.num_nodes().min,
        max_nodes: args.num_nodes().max,
        join: args.join_timeout,
        last_call: LAST_CALL,
        lease: args.node_timeout,
        open: false,
        job,
        policy: policy::Options {
            max_restarts: args.max_restarts,
            seed: u64::from(std::process::id()),
            ..policy::Options::default()
        },
        hang: Limits {
            hang_timeout: args.hang_timeout.0,
            ..Limits::default()
        },
        measure: (args.preflight == Preflight::Full).then(|| args.preflight_scale.clone()),
        save_at: None,
    };
    // Nodes that are not there yet say later how many ranks they have; this is for the width of the labels.
    let here = devices.map_or(8, Devices::len) as u32;
    let world_size = here * settings.max_nodes;
    let style = Style {
        format: args.log_format,
        hosts: settings.max_nodes > 1,
        world_size,
        shown: settings
            .job
            .show
            .as_ref()
            .map_or(world_size as usize, Vec::len),
        run_dir: folder.dir.clone(),
    };
    let (snapshots, seen) = watch::channel(Arc::new(Snapshot::default()));
    let view = (!args.no_view && is_trainer)
        .then(|| View::new(seen.clone(), wants_colour(|name| std::env::var(name).ok())));
    let screen = Screen::start(Outputs::standard()?, style, view)?;
    let status = Server::start(args.status_port, &folder.dir, seen)?;
    let session = Session {
        start,
        settings,
        hub: Hub::new(),
        folder,
        manifest,
        voice: Voice {
            feed: screen.feed(),
            host,
        },
        children: Children::new(),
        turn: None,
        snapshots,
    };
    Ok(Prepared {
        session,
        screen,
        _status: status,
        revised,
        config,
    })
}

/// `NAME=VALUE`, or `NAME` for the value that it has here.
fn variable(pair: &str) -> anyhow::Result<(String, String)> {
    let refuse = |why: &str| Coded::new(exit::USAGE, format!("--env {pair}: {why}"));
    match pair.split_once('=') {
        Some(("", _)) => bail!(refuse("a variable needs a name")),
        Some((name, value)) => Ok((name.into(), value.into())),
        None => match std::env::var(pair) {
            Ok(value) => Ok((pair.into(), value)),
            Err(_) => bail!(refuse(
                "the variable is not set here\n  hint: write NAME=VALUE"
            )),
        },
    }
}

/// The command that continues the run in `dir` on the same devices and hosts.
fn resume_command(args: &Args, dir: &Path) -> String {
    let mut words: Vec<OsString> = vec!["tsm-launch".into()];
    let mut give = |flag: &str, value: Option<OsString>| {
        words.extend(value.into_iter().flat_map(|value| [flag.into(), value]));
    };
    give("--gpus", args.gpus.as_ref().map(|g| g.to_string().into()));
    give("--cpus", args.cpus.map(|n| n.to_string().into()));
    if args.rendezvous.is_some() {
        give("--nodes", args.nodes.map(|n| n.to_string().into()));
        give("--rendezvous", args.rendezvous.as_ref().map(OsString::from));
        give("--key-file", args.key_file.as_ref().map(OsString::from));
    }
    give("--hosts", args.hosts.as_ref().map(OsString::from));
    give("--hostfile", args.hostfile.as_ref().map(OsString::from));
    let launcher = args.remote_launcher.as_ref();
    give("--remote-launcher", launcher.map(OsString::from));
    let own_ssh = (args.ssh != "ssh").then(|| OsString::from(&args.ssh));
    give("--ssh", own_ssh);
    give("--resume", Some(dir.into()));
    plan::shell(&words)
}

/// A run is called after its folder.
pub(super) fn run_id(dir: &Path) -> String {
    dir.file_name()
        .unwrap_or(dir.as_os_str())
        .to_string_lossy()
        .into_owned()
}
