//! From what was asked for to a session that is ready to run: its folder, its settings, its screen.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tsm_job::exit;

use super::{again, variables};
use crate::cli::{Args, Preflight, Show};
use crate::clock;
use crate::cluster::agent;
use crate::cluster::coordinator::{Job, Settings};
use crate::cluster::key::Key;
use crate::cluster::link::{Hub, Link};
use crate::cluster::policy;
use crate::console::painter::Style;
use crate::console::screen::{Outputs, Screen};
use crate::doctor::preflight::Scale;
use crate::folder::{self, Folder};
use crate::hang::progress::Limits;
use crate::logs::Shown;
use crate::manifest::{self, Manifest};
use crate::plan::Devices;
use crate::report::GoOn;
use crate::say::say;
use crate::session::{Session, Voice};
use crate::start::agent::{self as start_agent, Parts};
use crate::start::children::Children;
use crate::start::slurm::Turn;
use crate::status::Snapshot;
use crate::status::http::Server;
use crate::status::view::{View, wants_colour};
use crate::target::{Resume, Target};

/// How long to wait for more nodes when there are enough.
const LAST_CALL: Duration = Duration::from_secs(5);
/// Between SIGTERM and SIGKILL, where neither the command line nor a config says it.
const GRACE: Duration = Duration::from_secs(30);
/// How long the end waits for somebody who reads the output, but takes nothing.
const FLUSH: Duration = Duration::from_secs(2);

/// A session that is ready to run.
pub(super) struct Prepared {
    pub session: Session,
    screen: Screen,
    /// Ends with the job.
    status: Option<Server>,
    /// The config differs from the one that the run folder had.
    revised: bool,
    config: PathBuf,
}

impl Prepared {
    /// Makes it a turn of a job of SLURM, which saves before its time is over.
    pub fn take_turn(&mut self, turn: Turn, start: Instant) {
        let settings = &mut self.session.settings;
        if settings.job.saves {
            let save_in = turn.save_in(std::time::SystemTime::now());
            settings.save_at = save_in.map(|d| start.elapsed() + d);
            settings.job.shielded = true;
            settings.job.resume = turn.go_on().or(settings.job.resume.take());
        }
        settings.requeues = turn.may_be_queued_again();
        self.session.turn = Some(turn);
    }

    /// Runs the job, whose ranks are all on other nodes.
    pub async fn run(self) -> anyhow::Result<i32> {
        self.run_beside(None).await
    }

    /// Runs the job, and the agent of this node in the same process.
    pub async fn run_with_agent(
        mut self,
        args: &Args,
        devices: Devices,
        order: Option<u32>,
        key: Option<Key>,
    ) -> anyhow::Result<i32> {
        let program = self.session.settings.job.command.first().map(PathBuf::from);
        let folder = self.session.folder.dir.path().to_path_buf();
        let context = || start_agent::context(&devices, Some(folder), program);
        let parts = Parts {
            preflight: (args.preflight != Preflight::Off).then(context),
            start: self.session.start,
            host: manifest::host(),
            order,
            job: None,
            options: Vec::new(),
            key,
            local: true,
            shown: Some(Shown {
                host: manifest::host(),
                feed: self.screen.feed(),
                patience: self.screen.patience(),
            }),
            devices,
        };
        let link = self.session.hub.local();
        self.run_beside(Some((parts, link))).await
    }

    async fn run_beside(self, agent_here: Option<(Parts, Link)>) -> anyhow::Result<i32> {
        let Prepared {
            session,
            screen,
            status,
            revised,
            config,
        } = self;
        let end = match agent_here {
            Some((parts, link)) => {
                let (end, leave) = tokio::join!(session.run(), agent::run(parts.setup()?, link));
                leave?;
                end?
            }
            None => session.run().await?,
        };
        screen.finish(FLUSH);
        if revised && end.code == exit::CONFIG {
            // The next `--resume` takes the newest config, which must not be one the workers refused.
            fs_err::rename(&config, config.with_extension("yaml.refused"))?;
        }
        // Removes a file from the folder, which from then on is the next launcher's.
        drop(status);
        let folder = end.folder.dir.path().to_path_buf();
        drop(end.folder);
        // Last of all, since SLURM may end this process for it.
        let turn = end.turn.as_ref();
        let again = |turn: &Turn| turn.end(end.code, end.outcome, &folder, end.stopped, end.saves);
        if let Some(text) = turn.and_then(again) {
            say(text);
        }
        Ok(end.code)
    }
}

/// Makes the run folder and all that the coordinator needs. `devices`: of this node, where it has ranks.
///
/// # Errors
/// [`exit::USAGE`] for `--env` before there is a folder; then for whatever cannot be written or opened.
pub(super) fn prepare(
    args: &Args,
    mut target: Target,
    devices: Option<&Devices>,
    start: Instant,
) -> anyhow::Result<Prepared> {
    if let Some(devices) = devices {
        target.settle(devices);
    }
    let env = variables::parse(&args.env, |name| std::env::var(name).ok())?;
    let now = clock::Utc::now();
    let (folder, revised) = open_folder(args, &target, &now)?;
    let job = job(args, &target, &folder, env)?;
    let mut manifest = manifest(args, &target, &job, &now);
    manifest.gpus = devices.map_or(Vec::new(), |devices| devices.gpus().to_vec());
    let settings = settings(args, &target, job);
    let style = style(args, &settings, devices, &folder);
    let (snapshots, seen) = watch::channel(Arc::new(Snapshot::default()));
    let view = (!args.no_view && target.is_trainer())
        .then(|| View::new(seen.clone(), wants_colour(|name| std::env::var(name).ok())));
    let screen = Screen::start(Outputs::standard()?, style, view)?;
    let status = Server::start(args.status_port, &folder.dir, seen)?;
    let voice = Voice {
        feed: screen.feed(),
        host: manifest.host.clone(),
    };
    Ok(Prepared {
        config: folder.config.clone(),
        session: Session {
            start,
            settings,
            hub: Hub::new(),
            folder,
            manifest,
            voice,
            children: Children::new(),
            turn: None,
            snapshots,
        },
        screen,
        status,
        revised,
    })
}

/// The run folder with the config in it, and whether that differs from the one it had.
fn open_folder(args: &Args, target: &Target, now: &clock::Utc) -> anyhow::Result<(Folder, bool)> {
    let (root, name) = target.place();
    let mut folder = match (&args.run_dir, &target.resume) {
        (Some(dir), _) => Folder::at(dir)?,
        (None, Some(Resume::Run(dir))) => Folder::resume(dir)?,
        (None, _) => Folder::create(&root, &name, &now.compact())?,
    };
    let revised = match target.config() {
        Some(config) => folder.write_config(config)?,
        None => false,
    };
    Ok((folder, revised))
}

fn job(
    args: &Args,
    target: &Target,
    folder: &Folder,
    env: Vec<(String, String)>,
) -> anyhow::Result<Job> {
    let config = target.config();
    let text = |path: &Path| -> std::io::Result<(String, String)> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Ok((name.into_owned(), fs_err::read_to_string(path)?))
    };
    let grace = args.grace.or(config.map(|config| config.launch.grace));
    let is_trainer = target.is_trainer();
    let run_dir = folder.dir.path().to_path_buf();
    Ok(Job {
        run_id: run_id(&run_dir),
        config: config.map(|_| text(&folder.config)).transpose()?,
        digest: String::new(),
        options: Vec::new(),
        command: target.command(&folder.config),
        directory: folder::current()?,
        base_env: None,
        env,
        resume_from: target.resume.as_ref().map(|from| from.path().to_path_buf()),
        start_from: start_from(target, &run_dir),
        grace: grace.unwrap_or(GRACE),
        show: match &args.show_ranks {
            Some(Show::Ranks(ranks)) => Some(ranks.clone()),
            None if is_trainer => Some(vec![0]),
            Some(Show::All) | None => None,
        },
        affinity: !args.no_affinity,
        resume: is_trainer
            .then(|| GoOn::Command(again::command(std::env::args_os(), args, &run_dir))),
        saves: is_trainer,
        shielded: false,
        run_dir,
    })
}

fn manifest(args: &Args, target: &Target, job: &Job, now: &clock::Utc) -> Manifest {
    let text = |word: &OsString| word.to_string_lossy().into_owned();
    let path = |path: &Path| path.to_string_lossy().into_owned();
    Manifest {
        run_id: job.run_id.clone(),
        argv: again::shown(std::env::args_os()),
        overrides: args.overrides.clone(),
        command: job.command.iter().map(text).collect(),
        folder: path(&job.run_dir),
        resumed_from: target.resume.as_ref().map(|from| path(from.path())),
        tsm_launch: env!("CARGO_PKG_VERSION"),
        host: manifest::host(),
        started: now.rfc3339(),
        outcome: "running",
        ..Manifest::default()
    }
}

fn settings(args: &Args, target: &Target, job: Job) -> Settings {
    let nodes = args.num_nodes();
    Settings {
        min_nodes: nodes.min,
        max_nodes: nodes.max,
        join: args.join_timeout,
        last_call: LAST_CALL,
        lease: args.node_timeout,
        open: false,
        is_read: false,
        hosts: Vec::new(),
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
        measure: (args.preflight == Preflight::Full).then(|| Scale {
            trainer: target.trainer().map(Path::to_path_buf),
            ..args.preflight_scale.clone()
        }),
        save_at: None,
        requeues: false,
    }
}

fn style(args: &Args, settings: &Settings, devices: Option<&Devices>, folder: &Folder) -> Style {
    // Nodes that are not there yet say later how many ranks they have; this is for the width of the labels.
    let here = devices.map_or(8, Devices::len) as u32;
    let world_size = here * settings.max_nodes;
    let shown = settings.job.show.as_ref();
    Style {
        format: args.log_format,
        hosts: settings.max_nodes > 1,
        world_size,
        shown: shown.map_or(world_size as usize, Vec::len),
        run_dir: folder.dir.clone(),
    }
}

/// What the run in `dir` began from, in this launch or an earlier one; `None`: from the beginning.
pub(super) fn start_from(target: &Target, dir: &Path) -> Option<PathBuf> {
    match &target.resume {
        Some(from) if from.path() != dir => Some(from.path().to_path_buf()),
        Some(_) => manifest::earlier::began_from(dir),
        None => None,
    }
}

/// A run is called after its folder.
pub(super) fn run_id(dir: &Path) -> String {
    dir.file_name()
        .unwrap_or(dir.as_os_str())
        .to_string_lossy()
        .into_owned()
}
