//! Inside a job of SLURM everything is known: its nodes, its folder, and how long it may run.

use anyhow::Context as _;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Instant;

use super::node::Node;
use super::prepared::prepare;
use crate::cli::{Args, Gpus, Preflight};
use crate::cluster::fit;
use crate::cluster::key::Key;
use crate::cluster::wire;
use crate::own::{self, Executable};
use crate::plan::{self, Workers};
use crate::say::{print, say};
use crate::start::children::Starter;
use crate::start::slurm::{self, Allocation, Entry, Place, Request, Turn};
use crate::start::{agent, run_here};
use crate::target::{Resume, Target};
use crate::{addresses, gpus};

/// Runs the job of `args` on the nodes that it has been given.
///
/// # Errors
/// As [`super::launch`].
pub fn launch(
    args: &Args,
    mut target: Target,
    allocation: Allocation,
    start: Instant,
) -> anyhow::Result<i32> {
    allocation.check(Request {
        nodes: args.nodes.map(|n| n.max),
        gpus: args.gpus.as_ref().and_then(Gpus::count),
    })?;
    let mut args = args.clone();
    let turn = Turn::begin(allocation);
    if let Some(code) = take_up(&turn, &mut args, &mut target) {
        return Ok(code);
    }
    run_here(on_nodes(&args, target, turn, start))
}

/// Decides by what an earlier turn of the same job has left; the exit code, where there is nothing left to do. A
/// checkpoint on the command line counts until the run has a folder.
fn take_up(turn: &Turn, args: &mut Args, target: &mut Target) -> Option<i32> {
    let folder = match (&args.run_dir, &target.resume) {
        // The same in every turn.
        (None, Some(Resume::Run(_))) => return None,
        (Some(dir), _) => dir.clone(),
        (None, _) => {
            let (root, name) = target.place();
            turn.folder(&root, &name)
        }
    };
    let folder = std::path::absolute(folder).unwrap_or_default();
    match turn.entry(&folder) {
        Entry::AlreadyFinished(code) => {
            let job = turn.allocation.job;
            // Whoever asks for it has the exit code, too.
            let _ = print(&format!(
                "tsm-launch: job {job} has finished in {} with exit code {code}\n",
                folder.display()
            ));
            return Some(code);
        }
        Entry::Resume => {
            args.run_dir = None;
            target.resume = Some(Resume::Run(folder));
        }
        Entry::Fresh if turn.allocation.restart_count > 0 => {
            let job = turn.allocation.job;
            say(format_args!(
                "warning: job {job} was queued again, but {} holds no run on this node: it starts anew\n  hint: run.dir has to be on a file system that all nodes share",
                folder.display()
            ));
            args.run_dir = Some(folder);
        }
        Entry::Fresh if !folder.exists() => args.run_dir = Some(folder),
        // Another run of the same job has that name.
        Entry::Fresh => {}
    }
    None
}

/// A job of SLURM: on one node like any other, on several with agents that srun starts.
async fn on_nodes(
    args: &Args,
    mut target: Target,
    turn: Turn,
    start: Instant,
) -> anyhow::Result<i32> {
    let launch = target.config().map(|config| &config.launch);
    let hosts = turn.allocation.nodes.clone();
    let wanted = args.nodes.map_or(hosts.len(), |n| n.max as usize);
    if wanted == 1 && turn.allocation.place == Place::Batch {
        let devices = plan::devices(args.gpus.as_ref(), args.cpus, launch, gpus::visible)?;
        let order = None;
        let node = Node {
            args,
            target,
            devices,
            start,
            order,
        };
        return node.alone(Some(turn)).await;
    }
    let workers = Workers::asked_for(args.gpus.as_ref(), args.cpus, launch);
    let gpus = match &workers {
        Some(Workers::Gpus(Gpus::Count(n))) => Some(*n),
        _ => None,
    };
    if let Some(workers) = &workers {
        target.settle_as(workers.device(), workers.count());
    }
    let mut prepared = prepare(args, target, None, start)?;
    let session = &mut prepared.session;
    fit::job(&session.settings.job)?;
    session.settings.max_nodes = wanted as u32;
    session.settings.min_nodes = args.nodes.map_or(wanted as u32, |n| n.min);
    let hosts = &hosts[..wanted.min(hosts.len())];
    session.settings.hosts = hosts.to_vec();
    let key = Key::random();
    let listener = wire::listen(SocketAddr::from(([0, 0, 0, 0], 0)))?;
    let port = listener.local_addr()?.port();
    session.hub.listen(listener, key.clone(), None);
    let launcher = own::path().context("cannot find this program")?;
    let command = agent_command(&launcher, args, workers.as_ref(), port);
    let srun = slurm::srun(&turn.allocation, hosts, gpus, &command);
    let starter = Starter {
        host: "srun".into(),
        argv: srun.argv,
        env_remove: srun.env_remove,
        is_wire: false,
        code_meaning: |_| None,
        retries: 0,
    };
    let voice = session.voice.clone();
    session
        .children
        .start(&Executable::own()?, starter, &session.hub, &key, &voice);
    prepared.take_turn(turn, start);
    prepared.run().await
}

/// What srun starts on every node, for a coordinator that listens at `port` of this one.
fn agent_command(
    launcher: &Path,
    args: &Args,
    workers: Option<&Workers>,
    port: u16,
) -> Vec<OsString> {
    let own = addresses::list().into_iter().map(|(ip, _)| ip);
    let loopback = IpAddr::from([127, 0, 0, 1]);
    let points = own.filter(IpAddr::is_ipv4).chain([loopback]);
    let points: Vec<String> = points.map(|ip| format!("{ip}:{port}")).collect();
    let mut command: Vec<OsString> = vec![launcher.into(), agent::AGENT.into()];
    let mut give = |flag: &str, value: &str| command.extend([flag.into(), value.into()]);
    give("--connect", &points.join(","));
    give("--order-from", "SLURM_NODEID");
    give("--host-from", "SLURMD_NODENAME");
    // Without any the agents refuse, and say what is missing.
    if let Some([flag, value]) = workers.map(Workers::flag) {
        give(&flag, &value);
    }
    if args.preflight == Preflight::Off {
        command.push("--no-preflight".into());
    }
    command
}
