//! From the command line to a job: everything that can be refused is refused here, before anything starts.

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tsm_job::Config;
use tsm_job::exit::{self, Coded};

use crate::cli::{Args, Show};
use crate::cluster::agent;
use crate::cluster::coordinator::{Job, Settings};
use crate::cluster::key::Key;
use crate::cluster::link::{Hub, Link};
use crate::cluster::policy;
use crate::console::screen::{Outputs, Screen, Style};
use crate::folder::{self, Folder};
use crate::hang::progress::Limits;
use crate::logs::Shown;
use crate::manifest::{self, Manifest};
use crate::plan::{self, Devices, Seat, Shape};
use crate::session::{Session, Voice};
use crate::start::agent::Parts;
use crate::start::by_hand::{self, Part};
use crate::start::children::Children;
use crate::start::{agent as start_agent, run_here, ssh};
use crate::status::Snapshot;
use crate::status::http::Server;
use crate::status::view::{View, wants_colour};
use crate::target::{Resume, Target, What};
use crate::{clock, cores, gpus};

/// How long to wait for more nodes when there are enough.
const LAST_CALL: Duration = Duration::from_secs(5);
/// How long the end waits for somebody who reads the output, but takes nothing.
const FLUSH: Duration = Duration::from_secs(2);

/// Runs the job of `args`, or prints its plan, and returns the exit code.
///
/// # Errors
/// With an exit code for whatever is wrong with the command line, the config, or the machine.
pub fn launch(args: &Args, start: Instant) -> anyhow::Result<i32> {
    if let Some((name, value)) =
        plan::stale_variable(|name| std::env::var(name).ok()).filter(|_| !args.ignore_env)
    {
        let hint = format!("unset {name}, or give --ignore-env to replace it");
        let text = format!(
            "{name} is {value:?} in the environment: this is inside another job\n  hint: {hint}"
        );
        bail!(Coded::new(exit::USAGE, text));
    }
    let mut target = Target::resolve(args)?;
    if let Some(plan) = ssh::Plan::new(args, &mut target)? {
        if args.dry_run {
            return show(&plan.describe(&target, &run_dir(args, &target)?));
        }
        return run_here(over_ssh(args, target, plan, start));
    }
    let launch = target.config().map(|config| &config.launch);
    let devices = plan::devices(args.gpus.as_ref(), args.cpus, launch, gpus::visible)?;
    if args.dry_run {
        return dry_run(args, target, &devices);
    }
    let Some(point) = &args.rendezvous else {
        let nodes = args.num_nodes().max;
        if nodes > 1 {
            let hint = "name them with --hosts, or give --rendezvous HOST:PORT and --key-file FILE on every node";
            let text = format!(
                "--nodes is {nodes}, and nothing says how the nodes find each other\n  hint: {hint}"
            );
            bail!(Coded::new(exit::USAGE, text));
        }
        return run_here(alone(args, target, devices, start));
    };
    let Some(key_file) = &args.key_file else {
        unreachable!("clap asks for both")
    };
    let key = Key::read_file(key_file)?;
    let (host, port, addresses) = by_hand::resolve(point)?;
    run_here(async {
        match by_hand::part(&addresses)? {
            Part::Coordinator(listener) => {
                together(args, target, devices, start, key, listener).await
            }
            Part::Agent => {
                let digest = digest(&target);
                let connection = by_hand::dial(&host, port, &key, args.join_timeout).await?;
                let (host, job, key) = (manifest::host(), Some(digest), Some(key));
                let parts = Parts {
                    start,
                    host,
                    devices,
                    order: None,
                    job,
                    key,
                    local: false,
                    shown: None,
                };
                let leave = agent::run(parts.setup()?, Link::over(connection)).await?;
                Ok(start_agent::finish(leave))
            }
        }
    })
}

/// A job of one node: coordinator and agent in one process, and nothing listens.
async fn alone(
    args: &Args,
    target: Target,
    devices: Devices,
    start: Instant,
) -> anyhow::Result<i32> {
    let mut prepared = prepare(args, target, Some(&devices), start)?;
    let link = prepared.session.hub.local();
    let shown = Some(prepared.shown());
    let parts = Parts {
        start,
        host: manifest::host(),
        devices,
        order: None,
        job: None,
        key: None,
        local: true,
        shown,
    };
    prepared.run(Some((parts, link))).await
}

/// The first of several nodes.
async fn together(
    args: &Args,
    target: Target,
    devices: Devices,
    start: Instant,
    key: Key,
    listener: TcpListener,
) -> anyhow::Result<i32> {
    let digest = digest(&target);
    let mut prepared = prepare(args, target, Some(&devices), start)?;
    prepared.session.settings.open = true;
    prepared.session.settings.job.digest = digest;
    prepared.session.hub.listen(listener, key.clone(), None);
    let link = prepared.session.hub.local();
    let (host, key, shown) = (manifest::host(), Some(key), Some(prepared.shown()));
    let parts = Parts {
        start,
        host,
        devices,
        order: Some(0),
        job: None,
        key,
        local: true,
        shown,
    };
    prepared.run(Some((parts, link))).await
}

/// Nodes that are started from here; this one has no ranks of its own.
async fn over_ssh(
    args: &Args,
    target: Target,
    plan: ssh::Plan,
    start: Instant,
) -> anyhow::Result<i32> {
    let args = Args {
        nodes: Some(plan.nodes),
        ..args.clone()
    };
    let mut prepared = prepare(&args, target, None, start)?;
    let session = &mut prepared.session;
    session.settings.job.base_env = Some(ssh::environment(std::env::vars_os()));
    let (shim, key) = (std::env::current_exe()?, Key::random());
    for starter in plan.starters() {
        session
            .children
            .start(&shim, starter, &session.hub, &key, &session.voice);
    }
    prepared.run(None).await
}

/// A session that is ready to run.
struct Prepared {
    session: Session,
    screen: Screen,
    /// Ends with the job.
    _status: Option<Server>,
    /// The config differs from the one that the run folder had.
    revised: bool,
    config: PathBuf,
}

impl Prepared {
    /// Where an agent in this process shows its lines.
    fn shown(&self) -> Shown {
        Shown {
            host: manifest::host(),
            feed: self.screen.feed(),
            patience: self.screen.patience(),
        }
    }

    /// Runs the job, and the agent of this node where it has ranks.
    async fn run(self, agent_here: Option<(Parts, Link)>) -> anyhow::Result<i32> {
        let Prepared {
            session,
            screen,
            _status,
            revised,
            config,
        } = self;
        let code = match agent_here {
            Some((parts, link)) => {
                let (code, leave) = tokio::join!(session.run(), agent::run(parts.setup()?, link));
                leave?;
                code?
            }
            None => session.run().await?,
        };
        screen.finish(FLUSH);
        if revised && code == exit::CONFIG {
            // The next `--resume` takes the newest config, which must not be one the workers refused.
            fs_err::rename(&config, config.with_extension("yaml.refused"))?;
        }
        Ok(code)
    }
}

/// Makes the run folder and all that the coordinator needs. `devices`: of this node, where it has ranks.
fn prepare(
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

fn dry_run(args: &Args, mut target: Target, devices: &Devices) -> anyhow::Result<i32> {
    target.settle(devices);
    let dir = run_dir(args, &target)?;
    let cores = if args.no_affinity {
        Vec::new()
    } else {
        cores::allowed()
    };
    let mut seat = Seat::alone(devices.len() * args.num_nodes().max as usize);
    seat.max_restarts = args.max_restarts;
    let shape = Shape {
        devices,
        seat,
        run_id: &run_id(&dir),
        run_dir: &dir,
        host: &manifest::host(),
        master_port: None,
        ras_port: None,
        resume_from: target.resume.as_ref().map(Resume::path),
        cores: &cores,
        parallelism: std::thread::available_parallelism().map_or(1, usize::from),
    };
    let inherited = |name: &str| std::env::var_os(name).is_some();
    let command = target.command(&tsm_job::RunDir::new(&dir).config());
    show(&plan::describe(
        &shape,
        &plan::workers(&shape, inherited),
        &command,
    ))
}

/// Where a dry run would have its folder.
fn run_dir(args: &Args, target: &Target) -> std::io::Result<PathBuf> {
    let (root, name) = target.place();
    match (&args.run_dir, &target.resume) {
        (Some(dir), _) | (None, Some(Resume::Run(dir))) => std::path::absolute(dir),
        (None, _) => {
            std::path::absolute(folder::name(&root, &name, &clock::Utc::now().compact(), 1))
        }
    }
}

fn show(text: &str) -> anyhow::Result<i32> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("cannot print the plan")?;
    Ok(exit::OK)
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

/// What must be the same on the command lines of all nodes.
fn digest(target: &Target) -> String {
    let mut hash = Sha256::new();
    match &target.what {
        What::Trainer { config, .. } => hash.update(Config::to_yaml(config)),
        What::Program(words) => {
            for word in words {
                hash.update(word.as_encoded_bytes());
                hash.update([0]);
            }
        }
    }
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The command that continues the run in `dir` on the same devices.
fn resume_command(args: &Args, dir: &Path) -> String {
    let device = match (&args.gpus, args.cpus) {
        (Some(gpus), _) => format!("--gpus {gpus} "),
        (None, Some(n)) => format!("--cpus {n} "),
        (None, None) => String::new(),
    };
    format!("tsm-launch {device}--resume {}", plan::shell(&[dir.into()]))
}

/// A run is called after its folder.
fn run_id(dir: &Path) -> String {
    dir.file_name()
        .unwrap_or(dir.as_os_str())
        .to_string_lossy()
        .into_owned()
}
