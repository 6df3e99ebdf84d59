//! Inside a job of SLURM everything is known: its nodes, its folder, and how long it may run.

use anyhow::Context as _;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Instant;
use tokio::net::TcpListener;

use super::node::Node;
use super::prepared::prepare;
use super::take_up::{self, Begin};
use crate::cli::{Args, Gpus, Preflight};
use crate::cluster::fit;
use crate::cluster::key::Key;
use crate::own::{self, Executable};
use crate::plan::{self, Workers};
use crate::start::children::Starter;
use crate::start::slurm::{self, Allocation, Place, Request, Turn};
use crate::start::{agent, run_here};
use crate::target::Target;
use crate::{addresses, gpus};

/// Runs the job of `args` on the nodes that it has been given.
///
/// # Errors
/// As [`super::launch`].
pub fn launch(args: &Args, allocation: Allocation, start: Instant) -> anyhow::Result<i32> {
    allocation.check(Request {
        nodes: args.nodes.map(|n| n.max),
        gpus: args.gpus.as_ref().and_then(Gpus::count),
    })?;
    let turn = Turn::begin(allocation);
    let args = match take_up::in_turn(&turn, args)? {
        Begin::Finished(code) => return Ok(code),
        Begin::Run(args) => args,
    };
    let target = Target::resolve(&args)?;
    run_here(on_nodes(&args, target, turn, start))
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
    let listener = TcpListener::from_std(addresses::listen_on_all()?)?;
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
        code_meaning: |_, _| None,
        retries: 0,
    };
    let voice = session.voice.clone();
    session
        .children
        .start(&Executable::own()?, starter, &session.hub, &key, &voice);
    prepared.take_turn(turn, start);
    prepared.run().await
}

/// Where a coordinator with the addresses `own` is found, as agents take it: by those in turn, then on its own node.
fn points(own: impl Iterator<Item = IpAddr>, port: u16) -> String {
    let loopback = IpAddr::from([127, 0, 0, 1]);
    let all = own.chain([loopback]).map(|ip| SocketAddr::new(ip, port));
    all.map(|point| point.to_string())
        .collect::<Vec<_>>()
        .join(",")
}

/// What srun starts on every node, for a coordinator that listens at `port` of this one.
fn agent_command(
    launcher: &Path,
    args: &Args,
    workers: Option<&Workers>,
    port: u16,
) -> Vec<OsString> {
    let own = addresses::list().into_iter().map(|(ip, _)| ip);
    let mut command: Vec<OsString> = vec![launcher.into(), agent::AGENT.into()];
    let mut give = |flag: &str, value: &str| command.extend([flag.into(), value.into()]);
    give("--connect", &points(own, port));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_are_given_the_addresses_of_both_kinds() {
        let own = ["10.0.0.1", "fd00::5"].map(|ip| ip.parse().unwrap());
        assert_eq!(
            points(own.into_iter(), 29_400),
            "10.0.0.1:29400,[fd00::5]:29400,127.0.0.1:29400"
        );
    }
}
