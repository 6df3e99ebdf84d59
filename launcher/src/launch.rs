//! From the command line to a job: everything that can be refused is refused here, before anything starts.

use anyhow::{Context as _, bail};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tsm_job::Config;
use tsm_job::config::DeviceKind;
use tsm_job::exit::{self, Coded};

use crate::cli::{Args, Gpus, Nodes, Preflight, Show};
use crate::cluster::agent;
use crate::cluster::coordinator::{Job, Settings};
use crate::cluster::key::Key;
use crate::cluster::link::{Hub, Link};
use crate::cluster::policy;
use crate::cluster::wire;
use crate::console::screen::{Outputs, Screen, Style};
use crate::doctor::Context;
use crate::folder::{self, Folder};
use crate::hang::progress::Limits;
use crate::logs::Shown;
use crate::manifest::{self, Manifest};
use crate::plan::{self, Devices, Seat, Shape};
use crate::session::{End, Session, Voice};
use crate::start::agent::Parts;
use crate::start::by_hand::{self, Part};
use crate::start::children::{Children, Starter};
use crate::start::slurm::{self, Allocation, Entry, Place, Request, Turn};
use crate::start::{agent as start_agent, run_here};
use crate::status::Snapshot;
use crate::status::http::Server;
use crate::status::view::{View, wants_colour};
use crate::target::{Resume, Target, What};
use crate::{addresses, clock, cores, gpus};

/// How long to wait for more nodes when there are enough.
const LAST_CALL: Duration = Duration::from_secs(5);
/// How long the end waits for somebody who reads the output, but takes nothing.
const FLUSH: Duration = Duration::from_secs(2);

/// Runs the job of `args`, or prints its plan, and returns the exit code.
///
/// # Errors
/// With an exit code for whatever is wrong with the command line, the config, or the machine.
pub fn launch(args: &Args, start: Instant) -> anyhow::Result<i32> {
    let mut args = args.clone();
    if let Some((name, value)) =
        plan::stale_variable(|name| std::env::var(name).ok()).filter(|_| !args.ignore_env)
    {
        let hint = format!("unset {name}, or give --ignore-env to replace it");
        let text = format!(
            "{name} is {value:?} in the environment: this is inside another job\n  hint: {hint}"
        );
        bail!(Coded::new(exit::USAGE, text));
    }
    let mut target = Target::resolve(&args)?;
    let allocation = Allocation::from_env(|name| std::env::var(name).ok())?;
    if let Some(allocation) = allocation.filter(|a| !matches!(a.place, Place::Step { .. }))
        && !args.dry_run
        && args.rendezvous.is_none()
    {
        let request = Request {
            nodes: args.nodes.map(|n| n.max),
            gpus: args.gpus.as_ref().and_then(Gpus::count),
        };
        allocation.check(request)?;
        let turn = Turn::begin(allocation);
        if let Some(code) = take_up(&turn, &mut args, &mut target) {
            return Ok(code);
        }
        return run_here(in_slurm(&args, target, turn, start));
    }
    let args = &args;
    let nodes = args.nodes.unwrap_or(Nodes::ONE);
    let launch = target.config().map(|config| &config.launch);
    let devices = plan::devices(args.gpus.as_ref(), args.cpus, launch, gpus::visible)?;
    if args.dry_run {
        return dry_run(args, target, &devices);
    }
    let Some(point) = &args.rendezvous else {
        if nodes.max > 1 {
            let hint = "give --rendezvous HOST:PORT and --key-file FILE on every node";
            let text = format!(
                "--nodes is {}, and nothing says how the nodes find each other\n  hint: {hint}",
                nodes.max
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
                let preflight = (args.preflight != Preflight::Off)
                    .then(|| start_agent::context(&devices, None, None));
                let parts = Parts {
                    preflight,
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

/// Decides by what an earlier turn of the same job has left; the exit code, where there is nothing left to do.
fn take_up(turn: &Turn, args: &mut Args, target: &mut Target) -> Option<i32> {
    if args.run_dir.is_some() || target.resume.is_some() {
        return None;
    }
    let (root, name) = target.place();
    let folder = std::path::absolute(turn.folder(&root, &name)).unwrap_or_default();
    match turn.entry(&folder) {
        Entry::AlreadyFinished(code) => {
            let job = turn.allocation.job;
            println!(
                "tsm-launch: job {job} has finished in {} with exit code {code}",
                folder.display()
            );
            return Some(code);
        }
        Entry::Resume => target.resume = Some(Resume::Run(folder)),
        Entry::Fresh if !folder.exists() => args.run_dir = Some(folder),
        // Another run of the same job has that name.
        Entry::Fresh => {}
    }
    None
}

/// A job of SLURM: on one node like any other, on several with agents that srun starts.
async fn in_slurm(
    args: &Args,
    mut target: Target,
    turn: Turn,
    start: Instant,
) -> anyhow::Result<i32> {
    let launch = target.config().map(|config| &config.launch);
    let hosts = turn.allocation.nodes.clone();
    let wanted = args.nodes.map_or(hosts.len(), |n| n.max as usize);
    let save_in = turn.save_in(std::time::SystemTime::now());
    if wanted == 1 && turn.allocation.place == Place::Batch {
        let devices = plan::devices(args.gpus.as_ref(), args.cpus, launch, gpus::visible)?;
        return alone_in(args, target, devices, start, Some(turn)).await;
    }
    let device = device_arguments(args, target.config());
    if let [kind, count] = device.as_slice() {
        target.settle_as(
            kind == "--gpus",
            count.to_str().and_then(|n| n.parse().ok()),
        );
    }
    let gpus = device
        .get(1)
        .filter(|_| device[0] == "--gpus")
        .and_then(|n| n.to_str()?.parse().ok());
    let mut prepared = prepare(args, target, None, start)?;
    let session = &mut prepared.session;
    session.settings.max_nodes = wanted as u32;
    session.settings.min_nodes = args.nodes.map_or(wanted as u32, |n| n.min);
    if session.settings.job.saves {
        session.settings.save_at = save_in.map(|d| start.elapsed() + d);
    }
    let key = Key::random();
    let listener = wire::listen(std::net::SocketAddr::from(([0, 0, 0, 0], 0)))?;
    let port = listener.local_addr()?.port();
    session.hub.listen(listener, key.clone(), None);
    let own = addresses::list()
        .into_iter()
        .filter(|(ip, _)| ip.is_ipv4())
        .map(|(ip, _)| ip);
    let loopback = std::net::IpAddr::from([127, 0, 0, 1]);
    let points: Vec<String> = own
        .chain([loopback])
        .map(|ip| format!("{ip}:{port}"))
        .collect();
    let shim = std::env::current_exe().context("cannot find this program")?;
    let mut agent: Vec<OsString> = vec![shim.clone().into(), start_agent::AGENT.into()];
    agent.extend(
        [
            "--connect",
            &points.join(","),
            "--order-from",
            "SLURM_NODEID",
            "--host-from",
            "SLURMD_NODENAME",
        ]
        .map(OsString::from),
    );
    if args.preflight == Preflight::Off {
        agent.push("--no-preflight".into());
    }
    agent.extend(device);
    let srun = slurm::srun(
        &turn.allocation,
        &hosts[..wanted.min(hosts.len())],
        gpus,
        &agent,
    );
    let starter = Starter {
        host: "srun".into(),
        argv: srun.argv,
        env_remove: srun.env_remove,
        is_wire: false,
        code_meaning: |_| None,
    };
    let voice = session.voice.clone();
    session
        .children
        .start(&shim, starter, &session.hub, &key, &voice)?;
    session.turn = Some(turn);
    prepared.run(None).await
}

/// By which an agent is told what its workers run on.
fn device_arguments(args: &Args, config: Option<&Config>) -> Vec<OsString> {
    let pair = |flag: &str, value: String| vec![OsString::from(flag), OsString::from(value)];
    match (&args.gpus, args.cpus, config.map(|c| &c.launch)) {
        (Some(gpus), _, _) => pair("--gpus", gpus.to_string()),
        (None, Some(n), _) => pair("--cpus", n.to_string()),
        (None, None, Some(launch)) => {
            let count = launch.nproc_per_node;
            match launch.device {
                DeviceKind::Cpu => pair("--cpus", count.unwrap_or(1).to_string()),
                DeviceKind::Gpu => pair("--gpus", count.map_or("auto".into(), |n| n.to_string())),
            }
        }
        // The agents refuse, and say what is missing.
        (None, None, None) => Vec::new(),
    }
}

/// A job of one node: coordinator and agent in one process, and nothing listens.
async fn alone(
    args: &Args,
    target: Target,
    devices: Devices,
    start: Instant,
) -> anyhow::Result<i32> {
    alone_in(args, target, devices, start, None).await
}

/// The same, where it is a turn of a job of SLURM.
async fn alone_in(
    args: &Args,
    target: Target,
    devices: Devices,
    start: Instant,
    turn: Option<Turn>,
) -> anyhow::Result<i32> {
    let mut prepared = prepare(args, target, Some(&devices), start)?;
    if let Some(turn) = turn {
        if prepared.session.settings.job.saves {
            let save_in = turn.save_in(std::time::SystemTime::now());
            prepared.session.settings.save_at = save_in.map(|d| start.elapsed() + d);
        }
        prepared.session.turn = Some(turn);
    }
    let link = prepared.session.hub.local();
    let shown = Some(prepared.shown());
    let preflight = prepared.preflight(args, &devices);
    let parts = Parts {
        preflight,
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
    let preflight = prepared.preflight(args, &devices);
    let parts = Parts {
        preflight,
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

    /// What the agent of this node looks at first.
    fn preflight(&self, args: &Args, devices: &Devices) -> Option<Context> {
        let program = self.session.settings.job.command.first().map(PathBuf::from);
        let folder = self.session.folder.dir.path().to_path_buf();
        (args.preflight != Preflight::Off)
            .then(|| start_agent::context(devices, Some(folder), program))
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
    let nodes = args.nodes.unwrap_or(Nodes::ONE);
    let settings = Settings {
        min_nodes: nodes.min,
        max_nodes: nodes.max,
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
    let here = devices.map_or(1, Devices::len) as u32;
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

fn dry_run(args: &Args, mut target: Target, devices: &Devices) -> anyhow::Result<i32> {
    target.settle(devices);
    let (root, name) = target.place();
    let dir = match (&args.run_dir, &target.resume) {
        (Some(dir), _) | (None, Some(Resume::Run(dir))) => std::path::absolute(dir)?,
        (None, _) => {
            std::path::absolute(folder::name(&root, &name, &clock::Utc::now().compact(), 1))?
        }
    };
    let cores = if args.no_affinity {
        Vec::new()
    } else {
        cores::allowed()
    };
    let mut seat = Seat::alone(devices.len() * args.nodes.unwrap_or(Nodes::ONE).max as usize);
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
    let text = plan::describe(&shape, &plan::workers(&shape, inherited), &command);
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
    let together = match (args.nodes, &args.rendezvous, &args.key_file) {
        (Some(nodes), Some(point), Some(key)) => {
            let words = [nodes.to_string().into(), point.into(), key.into()];
            let [nodes, point, key] = words.map(|word| plan::shell(&[word]));
            format!("--nodes {nodes} --rendezvous {point} --key-file {key} ")
        }
        _ => String::new(),
    };
    format!(
        "tsm-launch {together}{device}--resume {}",
        plan::shell(&[dir.into()])
    )
}

/// A run is called after its folder.
fn run_id(dir: &Path) -> String {
    dir.file_name()
        .unwrap_or(dir.as_os_str())
        .to_string_lossy()
        .into_owned()
}
