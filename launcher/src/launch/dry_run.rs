//! What a job would be, without one.

use std::path::PathBuf;
use tsm_job::exit;

use super::prepared::{run_id, start_from};
use super::variables;
use crate::cli::Args;
use crate::plan::{self, Devices, Seat, Shape};
use crate::say::print;
use crate::target::{Resume, Target};
use crate::{clock, cores, folder, manifest};

pub(super) fn dry_run(args: &Args, mut target: Target, devices: &Devices) -> anyhow::Result<i32> {
    target.settle(devices);
    let dir = run_dir(args, &target)?;
    let cores = if args.no_affinity {
        Vec::new()
    } else {
        cores::allowed()
    };
    let num_nodes = args.num_nodes().max;
    let mut seat = Seat::alone(devices.len() * num_nodes as usize);
    seat.num_nodes = num_nodes;
    seat.max_restarts = args.max_restarts;
    let is_in_place = target
        .resume
        .as_ref()
        .is_some_and(|from| from.path() == dir);
    let began = start_from(&target, &dir).filter(|_| is_in_place);
    let shape = Shape {
        devices,
        seat,
        run_id: &run_id(&dir),
        run_dir: &dir,
        host: &manifest::host(),
        master_port: None,
        ras_port: None,
        resume_from: target.resume.as_ref().map(Resume::path),
        start_from: began.as_deref(),
        cores: &cores,
        parallelism: std::thread::available_parallelism().map_or(1, usize::from),
    };
    let env = variables::parse(&args.env, |name| std::env::var(name).ok())?;
    let inherited =
        |name: &str| std::env::var_os(name).is_some() || env.iter().any(|(given, _)| given == name);
    let mut workers = plan::workers(&shape, inherited);
    for worker in &mut workers {
        worker.env.splice(0..0, env.iter().cloned());
    }
    let command = target.command(&tsm_job::RunDir::new(&dir).config());
    show(&plan::describe(&shape, &workers, &command))
}

/// Where a dry run would have its folder.
pub(super) fn run_dir(args: &Args, target: &Target) -> std::io::Result<PathBuf> {
    let (root, name) = target.place();
    match (&args.run_dir, &target.resume) {
        (Some(dir), _) | (None, Some(Resume::Run(dir))) => std::path::absolute(dir),
        (None, _) => {
            std::path::absolute(folder::name(&root, &name, &clock::Utc::now().compact(), 1))
        }
    }
}

pub(super) fn show(text: &str) -> anyhow::Result<i32> {
    print(text)?;
    Ok(exit::OK)
}
