//! From the command line to a run: everything that can be refused is refused here, before anything starts.

use anyhow::{Context, bail};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tsm_job::exit::{self, Coded};

use crate::cli::{Args, Show};
use crate::folder::{self, Folder};
use crate::manifest::{self, Manifest, RankEntry, environment};
use crate::plan::{self, Devices, Shape};
use crate::port::Port;
use crate::target::{Resume, Target, What};
use crate::{clock, cores, gpus, run};

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
    let launch = target.config().map(|config| &config.launch);
    let devices = plan::devices(args.gpus.as_ref(), args.cpus, launch, gpus::visible)?;
    target.settle(&devices);
    let launch = target.config().map(|config| &config.launch);
    let (root, name) = target.place();
    let time = clock::Utc::now();

    let cores = if args.no_affinity {
        Vec::new()
    } else {
        cores::allowed()
    };
    let host = manifest::host();
    let mut shape = Shape {
        devices: &devices,
        run_id: "",
        run_dir: &PathBuf::new(),
        host: &host,
        master_port: None,
        ras_port: None,
        resume_from: target.resume.as_ref().map(Resume::path),
        cores: &cores,
        parallelism: std::thread::available_parallelism().map_or(1, usize::from),
    };
    let inherited = |name: &str| std::env::var_os(name).is_some();
    if args.dry_run {
        let dir = match (&args.run_dir, &target.resume) {
            (Some(dir), _) | (None, Some(Resume::Run(dir))) => std::path::absolute(dir)?,
            (None, _) => std::path::absolute(folder::name(&root, &name, &time.compact(), 1))?,
        };
        let id = run_id(&dir);
        (shape.run_dir, shape.run_id) = (&dir, &id);
        let command = target.command(&tsm_job::RunDir::new(&dir).config());
        let text = plan::describe(&shape, &plan::workers(&shape, inherited), &command);
        return std::io::stdout()
            .write_all(text.as_bytes())
            .context("cannot print the plan")
            .map(|()| exit::OK);
    }

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
    let port = Port::reserve()?;
    shape.master_port = Some(port.number);
    let ras = matches!(devices, Devices::Gpus(_))
        .then(Port::reserve)
        .transpose()?;
    shape.ras_port = ras.as_ref().map(|port| port.number);
    // NCCL may not share the port, so it is only kept apart from MASTER_PORT.
    drop(ras);
    let dir = folder.dir.path().to_path_buf();
    let id = run_id(&dir);
    (shape.run_dir, shape.run_id) = (&dir, &id);
    let workers = plan::workers(&shape, inherited);
    let command = target.command(&folder.config);

    let text = |word: &OsString| word.to_string_lossy().into_owned();
    let rank = |w: &plan::WorkerPlan| {
        let (rank, device, cores) = (w.rank, w.device.clone(), w.cores.clone());
        RankEntry {
            rank,
            pid: 0,
            device,
            cores,
            end: None,
        }
    };
    let manifest = Manifest {
        run_id: id.clone(),
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
        gpus: match &devices {
            Devices::Gpus(gpus) => gpus.clone(),
            Devices::Cpu(_) => Vec::new(),
        },
        world_size: workers.len(),
        started: time.rfc3339(),
        ended: None,
        outcome: "running",
        exit_code: None,
        ranks: workers.iter().map(rank).collect(),
        environment: {
            let ranks: Vec<_> = workers.iter().map(|w| w.env.as_slice()).collect();
            let inherited = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into());
            environment::difference(inherited, &ranks, &plan::REMOVED_VARIABLES)
        },
        ..Manifest::default()
    };
    let is_trainer = matches!(target.what, What::Trainer { .. });
    let default_show = if is_trainer {
        Show::Ranks(vec![0])
    } else {
        Show::All
    };
    let run = run::Run {
        start,
        shim: std::env::current_exe().context("cannot find this program")?,
        host: host.clone(),
        folder,
        workers,
        command,
        show: args.show_ranks.clone().unwrap_or(default_show),
        grace: args
            .grace
            .or(launch.map(|l| l.grace))
            .unwrap_or(Duration::from_secs(30)),
        manifest,
        resume: is_trainer.then(|| resume_command(args, &dir)),
    };
    let code = run.execute()?;
    if revised && code == exit::CONFIG {
        // The next `--resume` takes the newest config, which must not be one the workers refused.
        fs_err::rename(&config, config.with_extension("yaml.refused"))?;
    }
    Ok(code)
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
