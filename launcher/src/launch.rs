//! From the command line to a job: everything that can be refused is refused here, before anything starts.

mod in_slurm;

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
use tsm_job::exit::{self, Coded};

use crate::cli::{Args, Preflight, Show};
use crate::cluster::agent::{self, Leave};
use crate::cluster::coordinator::{Job, Settings};
use crate::cluster::key::Key;
use crate::cluster::link::{Hub, Link};
use crate::cluster::policy;
use crate::cluster::tls::Tls;
use crate::cluster::wire::Connection;
use crate::console::painter::Style;
use crate::console::screen::{Outputs, Screen};
use crate::doctor::Context;
use crate::folder::{self, Folder};
use crate::hang::progress::Limits;
use crate::logs::Shown;
use crate::manifest::{self, Manifest};
use crate::plan::{self, Devices, Seat, Shape};
use crate::session::{End, Session, Voice};
use crate::start::adopt::{self, Kind};
use crate::start::agent::Parts;
use crate::start::by_hand::{self, Part};
use crate::start::children::Children;
use crate::start::slurm::{Allocation, Place, Turn};
use crate::start::{agent as start_agent, meet, run_here, ssh};
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
    let lookup = |name: &str| std::env::var(name).ok();
    let is_told = args.rendezvous.is_some() || args.hosts.is_some() || args.hostfile.is_some();
    let adopted = if args.ignore_env || is_told {
        None
    } else {
        adopt::adopt(lookup, args.share_host)?
    };
    // Kubeflow sets torch's variables too, for nodes instead of ranks.
    let is_meant = matches!(&adopted, Some(a) if matches!(a.kind, Kind::Point { .. }));
    if let Some((name, value)) =
        plan::stale_variable(lookup).filter(|_| !args.ignore_env && !is_meant)
    {
        let hint = format!("unset {name}, or give --ignore-env to replace it");
        let text = format!(
            "{name} is {value:?} in the environment: this is inside another job\n  hint: {hint}"
        );
        bail!(Coded::new(exit::USAGE, text));
    }
    let mut target = Target::resolve(args)?;
    if !args.dry_run && !is_told && adopted.is_none() {
        // A user's own srun of one task is a node alone.
        let allocation = Allocation::from_env(lookup)?;
        if let Some(allocation) = allocation.filter(|a| !matches!(a.place, Place::Step { .. })) {
            return in_slurm::launch(args, target, allocation, start);
        }
    }
    if let Some(plan) = ssh::Plan::new(args, &mut target)? {
        if args.dry_run {
            return show(&plan.describe(&target, &run_dir(args, &target)?));
        }
        return run_here(over_ssh(args, target, plan, start));
    }
    let launch = target.config().map(|config| &config.launch);
    let args = &match &adopted {
        Some(adopted) => adopted.applied_to(args, launch, || gpus::visible().len())?,
        None => args.clone(),
    };
    let devices = plan::devices(args.gpus.as_ref(), args.cpus, launch, gpus::visible)?;
    if args.dry_run {
        return dry_run(args, target, &devices);
    }
    let nodes = args.num_nodes().max;
    if nodes > 1 && adopted.is_none() && args.rendezvous.is_none() {
        let hint = "name them with --hosts, or give --rendezvous HOST:PORT and --key-file FILE on every node";
        let text = format!(
            "--nodes is {nodes}, and nothing says how the nodes find each other\n  hint: {hint}"
        );
        bail!(Coded::new(exit::USAGE, text));
    }
    let order = adopted
        .as_ref()
        .map(|a| a.order)
        .or(adopt::completion_index(lookup));
    let node = Node {
        args,
        target,
        devices,
        start,
        order,
    };
    match adopted.map(|a| a.kind).filter(|_| nodes > 1) {
        Some(Kind::File { by, id }) => run_here(node.meet_by_file(by, &id)),
        Some(Kind::Point { host, port, .. }) => {
            let (key, tls) = (args.key()?, args.tls()?);
            run_here(async {
                if order == Some(0) {
                    return node.coordinate(key, by_hand::listen(port)?, tls).await;
                }
                let connection =
                    by_hand::dial(&host, port, &key, tls.as_ref(), args.join_timeout).await?;
                Ok(start_agent::finish(node.attend(key, connection).await?))
            })
        }
        None => match &args.rendezvous {
            Some(point) => node.meet_by_hand(point),
            None => run_here(node.alone(None)),
        },
    }
}

/// This node of a job.
struct Node<'a> {
    args: &'a Args,
    target: Target,
    devices: Devices,
    start: Instant,
    /// Its place, where something gave it one.
    order: Option<u32>,
}

impl Node<'_> {
    /// At a point that everybody was told, whoever can listen there coordinates.
    fn meet_by_hand(self, point: &str) -> anyhow::Result<i32> {
        let (args, key, tls) = (self.args, self.args.key()?, self.args.tls()?);
        let late = adopt::names_come_late(|name| std::env::var(name).ok());
        let patience = if late {
            args.join_timeout
        } else {
            Duration::ZERO
        };
        let (host, port, addresses) = by_hand::resolve(point, patience)?;
        run_here(async {
            match by_hand::part(&addresses)? {
                Part::Coordinator(listener) => self.coordinate(key, listener, tls).await,
                Part::Agent => {
                    let connection =
                        by_hand::dial(&host, port, &key, tls.as_ref(), args.join_timeout).await?;
                    Ok(start_agent::finish(self.attend(key, connection).await?))
                }
            }
        })
    }

    /// By a file in a folder that all nodes share; `id` is the same on all, and `by` has started them.
    async fn meet_by_file(self, by: &str, id: &str) -> anyhow::Result<i32> {
        if let Some(text) = adopt::too_few_cores(by, &cores::allowed(), cores::online()) {
            eprintln!("tsm-launch: warning: {text}");
        }
        let run_dir = run_dir(self.args, &self.target)?;
        let dir = match (&self.args.rendezvous_dir, run_dir.parent()) {
            (Some(dir), _) => dir,
            (None, Some(root)) => root,
            (None, None) => &run_dir,
        };
        if self.order == Some(0) {
            let listener = TcpListener::from_std(addresses::listen_on_all()?)?;
            let (port, key) = (listener.local_addr()?.port(), Key::random());
            let _announced = meet::announce(dir, id, port, &key)?;
            return self.coordinate(key, listener, None).await;
        }
        let say = |text: &str| eprintln!("tsm-launch: {text}");
        let (connection, key) = meet::join(dir, id, self.args.join_timeout, say).await?;
        let leave = self.attend(key, connection).await?;
        // mpirun and srun end all others at once for a code that is not 0. So only the first node, which is
        // still writing down what happened, ends with the code of the job.
        let is_told = leave.message.is_none();
        let code = start_agent::finish(leave);
        Ok(if is_told { exit::OK } else { code })
    }

    /// A job of one node: coordinator and agent in one process, and nothing listens. `turn`: of a job of SLURM.
    async fn alone(self, turn: Option<Turn>) -> anyhow::Result<i32> {
        let mut prepared = prepare(self.args, self.target, Some(&self.devices), self.start)?;
        if let Some(turn) = turn {
            prepared.take_turn(turn, self.start);
        }
        let preflight = prepared.preflight(self.args, &self.devices);
        let link = prepared.session.hub.local();
        let shown = Some(prepared.shown());
        let parts = Parts {
            start: self.start,
            host: manifest::host(),
            devices: self.devices,
            order: None,
            job: None,
            key: None,
            local: true,
            shown,
            preflight,
        };
        prepared.run(Some((parts, link))).await
    }

    /// The first of several nodes.
    async fn coordinate(
        self,
        key: Key,
        listener: TcpListener,
        tls: Option<Tls>,
    ) -> anyhow::Result<i32> {
        let digest = digest(&self.target);
        let mut prepared = prepare(self.args, self.target, Some(&self.devices), self.start)?;
        prepared.session.settings.open = true;
        prepared.session.settings.job.digest = digest;
        prepared.session.hub.listen(listener, key.clone(), tls);
        let link = prepared.session.hub.local();
        let (host, key, shown) = (manifest::host(), Some(key), Some(prepared.shown()));
        let preflight = prepared.preflight(self.args, &self.devices);
        let parts = Parts {
            start: self.start,
            host,
            devices: self.devices,
            order: self.order.or(Some(0)),
            job: None,
            key,
            local: true,
            shown,
            preflight,
        };
        prepared.run(Some((parts, link))).await
    }

    /// One of the others.
    async fn attend(self, key: Key, connection: Connection) -> anyhow::Result<Leave> {
        let looks = self.args.preflight != Preflight::Off;
        let preflight = looks.then(|| start_agent::context(&self.devices, None, None));
        let parts = Parts {
            preflight,
            start: self.start,
            host: manifest::host(),
            order: self.order,
            job: Some(digest(&self.target)),
            devices: self.devices,
            key: Some(key),
            local: false,
            shown: None,
        };
        agent::run(parts.setup()?, Link::over(connection)).await
    }
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
    let job = &mut session.settings.job;
    let mut env = ssh::environment(std::env::vars_os());
    env.push(("PWD".into(), job.directory.clone().into()));
    job.base_env = Some(env);
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

    /// What the agent of this node looks at first.
    fn preflight(&self, args: &Args, devices: &Devices) -> Option<Context> {
        let program = self.session.settings.job.command.first().map(PathBuf::from);
        let folder = self.session.folder.dir.path().to_path_buf();
        (args.preflight != Preflight::Off)
            .then(|| start_agent::context(devices, Some(folder), program))
    }

    /// Makes it a turn of a job of SLURM, which saves before its time is over.
    fn take_turn(&mut self, turn: Turn, start: Instant) {
        let settings = &mut self.session.settings;
        if settings.job.saves {
            let save_in = turn.save_in(std::time::SystemTime::now());
            settings.save_at = save_in.map(|d| start.elapsed() + d);
            settings.job.shielded = true;
        }
        self.session.turn = Some(turn);
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
fn run_id(dir: &Path) -> String {
    dir.file_name()
        .unwrap_or(dir.as_os_str())
        .to_string_lossy()
        .into_owned()
}
