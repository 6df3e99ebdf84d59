//! From the command line to a job: everything that can be refused is refused here, before anything starts.

mod again;
mod dry_run;
mod idle;
mod in_slurm;
mod node;
mod of_first;
mod prepared;
mod take_up;
mod variables;

use anyhow::bail;
use std::time::Instant;
use tsm_job::exit::{self, Coded};

use crate::cli::Args;
use crate::cluster::fit;
use crate::cluster::key::Key;
use crate::own::Executable;
use crate::start::adopt::{self, Adopted, Kind};
use crate::start::slurm::{Allocation, Place};
use crate::start::{orphan, run_here, ssh};
use crate::target::Target;
use crate::{folder, gpus, plan};

use dry_run::{dry_run, run_dir, show};
use node::Node;
use prepared::prepare;
use take_up::Begin;

/// Runs the job of `args`, or prints its plan, and returns the exit code.
///
/// # Errors
/// With an exit code for whatever is wrong with the command line, the config, or the machine.
pub fn launch(args: &Args, start: Instant) -> anyhow::Result<i32> {
    folder::current()?;
    let args = &args.clone().settled();
    let lookup = |name: &str| std::env::var(name).ok();
    let is_told = args.rendezvous.is_some() || args.hosts.is_some() || args.hostfile.is_some();
    let adopted = if args.ignore_env || is_told {
        None
    } else {
        adopt::adopt(lookup, args.share_host)?
    };
    if !args.ignore_env {
        refuse_other_job(adopted.as_ref())?;
    }
    idle::refuse(args, adopted.as_ref(), lookup)?;
    variables::parse(&args.env, lookup)?;
    let args = &match take_up::by_option(args)? {
        Begin::Finished(code) => return Ok(code),
        Begin::Run(args) => args,
    };
    orphan::end_with_mpirun();
    if !args.dry_run && !is_told && adopted.is_none() {
        // A user's own srun of one task is a node alone.
        let allocation = Allocation::from_env(lookup)?;
        if let Some(allocation) = allocation.filter(|a| !matches!(a.place, Place::Step { .. })) {
            return in_slurm::launch(args, allocation, start);
        }
    }
    let mut target = Target::resolve(args)?;
    if let Some(plan) = ssh::Plan::new(args, &mut target)? {
        if args.dry_run {
            return show(&plan.describe(&target, &run_dir(args, &target)?));
        }
        return run_here(over_ssh(args, target, plan, start));
    }
    let launch = target.config().map(|config| &config.launch);
    let args = &match &adopted {
        Some(adopted) => adopted.applied_to(args, launch, || gpus::visible().len())?,
        None => (**args).clone(),
    };
    let devices = plan::devices(args.gpus.as_ref(), args.cpus, launch, gpus::visible)?;
    let nodes = args.num_nodes().max;
    if nodes == 1 {
        // Others may have more ranks than this one.
        idle::refuse_ranks(args.show_ranks.as_ref(), devices.len())?;
    }
    if args.dry_run {
        return dry_run(args, target, &devices);
    }
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
        .or(adopt::kubernetes::completion_index(lookup));
    let node = Node {
        args,
        target,
        devices,
        start,
        order,
    };
    match adopted.map(|a| a.kind).filter(|_| nodes > 1) {
        Some(Kind::File { by, id }) => run_here(node.meet_by_file(by, &id)),
        Some(Kind::Point { host, port, .. }) => run_here(node.meet_at(&host, port)),
        None => match &args.rendezvous {
            Some(point) => node.meet_by_hand(point),
            None => run_here(node.alone(None)),
        },
    }
}

/// A worker of another job must not start a job by accident.
fn refuse_other_job(adopted: Option<&Adopted>) -> Result<(), Coded> {
    // Kubeflow sets torch's variables too, for nodes instead of ranks.
    let is_meant = adopted.is_some_and(|a| matches!(a.kind, Kind::Point { .. }));
    match plan::stale_variable(|name| std::env::var(name).ok()) {
        Some((name, value)) if !is_meant => Err(Coded::new(
            exit::USAGE,
            format!(
                "{name} is {value:?} in the environment: this is inside another job\n  \
                 hint: unset {name}, or give --ignore-env to replace it"
            ),
        )),
        _ => Ok(()),
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
    session.settings.hosts = plan.hosts().map(String::from).collect();
    let job = &mut session.settings.job;
    let mut env = ssh::environment(std::env::vars_os());
    env.push(("PWD".into(), job.directory.clone().into()));
    job.base_env = Some(env);
    fit::job(job)?;
    let (shim, key) = (Executable::own()?, Key::random());
    for starter in plan.starters() {
        session
            .children
            .start(&shim, starter, &session.hub, &key, &session.voice);
    }
    prepared.run().await
}
