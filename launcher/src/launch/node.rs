//! This node of a job: alone, the first of several, or one of the others.

use sha2::{Digest, Sha256};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tsm_job::Config;
use tsm_job::config::DeviceKind;
use tsm_job::exit;

use super::dry_run::run_dir;
use super::of_first;
use super::prepared::prepare;
use crate::cli::{Args, Preflight};
use crate::cluster::agent::{self, Leave};
use crate::cluster::fit;
use crate::cluster::key::Key;
use crate::cluster::link::Link;
use crate::cluster::tls::Tls;
use crate::cluster::wire::Connection;
use crate::plan::Devices;
use crate::say::say;
use crate::start::adopt::{kubernetes, mpi};
use crate::start::agent::{self as start_agent, Parts};
use crate::start::by_hand::{self, Part};
use crate::start::slurm::Turn;
use crate::start::{meet, run_here};
use crate::target::{Target, What};
use crate::{addresses, cores, manifest};

/// This node of a job.
pub(super) struct Node<'a> {
    pub args: &'a Args,
    pub target: Target,
    pub devices: Devices,
    pub start: Instant,
    /// Its place, where something gave it one.
    pub order: Option<u32>,
}

impl Node<'_> {
    /// At a point that everybody was told, whoever can listen there coordinates.
    pub fn meet_by_hand(self, point: &str) -> anyhow::Result<i32> {
        let (args, key, tls) = (self.args, self.args.key()?, self.args.tls()?);
        let late = kubernetes::names_come_late(|name| std::env::var(name).ok());
        let patience = if late {
            args.join_timeout
        } else {
            Duration::ZERO
        };
        let (host, port, addresses) = by_hand::resolve(point, patience)?;
        run_here(async {
            match by_hand::part(&addresses)? {
                Part::Coordinator(listener) => self.coordinate(key, listener, tls, true).await,
                Part::Agent => self.dial(&host, port, key, tls).await,
            }
        })
    }

    /// At a point of which everybody was told who listens there.
    pub async fn meet_at(self, host: &str, port: u16) -> anyhow::Result<i32> {
        let (key, tls) = (self.args.key()?, self.args.tls()?);
        if self.order == Some(0) {
            let listener = by_hand::listen(port)?;
            return self.coordinate(key, listener, tls, true).await;
        }
        self.dial(host, port, key, tls).await
    }

    async fn dial(self, host: &str, port: u16, key: Key, tls: Option<Tls>) -> anyhow::Result<i32> {
        let wait = self.args.join_timeout;
        let connection = by_hand::dial(host, port, &key, tls.as_ref(), wait).await?;
        Ok(start_agent::finish(self.attend(key, connection).await?))
    }

    /// By a file in a folder that all nodes share; `id` is the same on all, and `by` has started them.
    pub async fn meet_by_file(self, by: &str, id: &str) -> anyhow::Result<i32> {
        if let Some(text) = mpi::too_few_cores(by, &cores::allowed(), cores::online()) {
            say(format_args!("warning: {text}"));
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
            // mpirun and srun bring the words of all nodes to one screen.
            return self.coordinate(key, listener, None, false).await;
        }
        let (connection, key) =
            meet::join(dir, id, self.args.join_timeout, |text| say(text)).await?;
        let leave = self.attend(key, connection).await?;
        // mpirun and srun end all others at once for a code that is not 0. So only the first node, which is
        // still writing down what happened, ends with the code of the job.
        let is_told = leave.message.is_none();
        let code = start_agent::finish(leave);
        Ok(if is_told { exit::OK } else { code })
    }

    /// A job of one node: coordinator and agent in one process, and nothing listens. `turn`: of a job of SLURM.
    pub async fn alone(self, turn: Option<Turn>) -> anyhow::Result<i32> {
        let mut prepared = prepare(self.args, self.target, Some(&self.devices), self.start)?;
        if let Some(turn) = turn {
            prepared.take_turn(turn, self.start);
        }
        prepared
            .run_with_agent(self.args, self.devices, None, None)
            .await
    }

    /// The first of several nodes. `is_read`: see [`crate::cluster::coordinator::Settings::is_read`].
    async fn coordinate(
        self,
        key: Key,
        listener: TcpListener,
        tls: Option<Tls>,
        is_read: bool,
    ) -> anyhow::Result<i32> {
        let digest = digest(&self.target);
        let mut prepared = prepare(self.args, self.target, Some(&self.devices), self.start)?;
        prepared.session.settings.open = true;
        prepared.session.settings.is_read = is_read;
        prepared.session.settings.job.digest = digest;
        prepared.session.settings.job.options = of_first::options(std::env::args_os(), false);
        fit::job(&prepared.session.settings.job)?;
        prepared.session.hub.listen(listener, key.clone(), tls);
        let order = self.order.or(Some(0));
        prepared
            .run_with_agent(self.args, self.devices, order, Some(key))
            .await
    }

    /// One of the others.
    async fn attend(self, key: Key, connection: Connection) -> anyhow::Result<Leave> {
        let context = || start_agent::context(&self.devices, None, None);
        let parts = Parts {
            preflight: (self.args.preflight != Preflight::Off).then(context),
            start: self.start,
            host: manifest::host(),
            order: self.order,
            job: Some(digest(&self.target)),
            options: of_first::options(std::env::args_os(), true),
            devices: self.devices,
            key: Some(key),
            local: false,
            shown: None,
        };
        agent::run(parts.setup()?, Link::over(connection)).await
    }
}

/// What must be the same on the command lines of all nodes.
fn digest(target: &Target) -> String {
    let mut hash = Sha256::new();
    match &target.what {
        What::Trainer { config, .. } => {
            // One node may go on with a config into which another has written its devices.
            let mut config = config.clone();
            (config.launch.device, config.launch.nproc_per_node) = (DeviceKind::Cpu, None);
            hash.update(Config::to_yaml(&config));
        }
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
