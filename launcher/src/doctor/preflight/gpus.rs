//! An all-reduce over the GPUs of one node or of a group of nodes: what NCCL makes of them, and whether it sums right.
//!
//! The measurement is a job of its own: every member starts this launcher again, with `tsm-trainer all-reduce` as the
//! workers, and the first member coordinates. So a worker that fails is named as in any job, and nothing survives.

mod nested;
mod result;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::sync::oneshot;
use tsm_job::all_reduce::{self, AllReduce};

use super::ring::{Measured, failed};
use super::{OwnNode, Scale, Task};
use crate::cluster::key::Key;
use crate::limits;
use crate::own::Executable;
use crate::plan::{self, Devices};
use crate::shim;
use crate::text::count;
use nested::{Folders, Nested};
use result::{judge, reason, summary};

/// A group of nodes with GPUs is done by then: NCCL may take a minute to make its first connections.
pub const GPU_WAIT: Duration = Duration::from_secs(120);

/// An all-reduce in which this node takes part.
#[derive(Clone, Debug)]
pub struct GpuTask {
    /// As for a [`super::Ring`], with a trainer, which is at the same place on all members. The ring that was open
    /// for this node is closed by now: the job meets at the address of the first member.
    pub task: Task,
    /// Of this group alone, and equal on all its members, see [`Key::derive`].
    pub key: Key,
    /// What this node measures with. CPUs sum over Gloo instead of NCCL.
    pub devices: Devices,
    pub launcher: Executable,
}

impl GpuTask {
    /// For this node alone.
    pub fn alone(devices: Devices, launcher: Executable, scale: &Scale) -> GpuTask {
        GpuTask {
            task: Task::new(Vec::new(), 0, scale),
            key: Key::random(),
            devices,
            launcher,
        }
    }

    /// Measures on a thread of its own. When the receiver is dropped, it ends all that it has started.
    pub fn start(self) -> oneshot::Receiver<Result<Measured, String>> {
        let (done, result) = oneshot::channel();
        let started = limits::thread("all-reduce", "measures the GPUs", move || {
            let lines = measure(&self, || done.is_closed());
            let _ = done.send(lines.map(|lines| summary(&lines)));
        });
        started.map_or_else(|e| failed(e.message), |_| result)
    }

    fn trainer(&self) -> PathBuf {
        self.task.trainer.clone().unwrap_or("tsm-trainer".into())
    }

    fn first(&self) -> bool {
        self.task.me == 0
    }

    /// The folder of the nested job; the same on all members, and nobody else can guess it.
    fn run_dir(&self) -> PathBuf {
        let secret = self.key.derive(b"tsm all-reduce folder").to_line();
        std::env::temp_dir().join(format!("tsm-all-reduce-{}", &secret[..16]))
    }

    /// `--gpus N` or `--cpus N`.
    fn flag(&self) -> [String; 2] {
        let kind = match self.devices {
            Devices::Gpus(_) => "--gpus",
            Devices::Cpu(_) => "--cpus",
        };
        [kind.into(), self.devices.len().to_string()]
    }

    /// Measures once more, from a shell.
    fn by_hand(&self) -> String {
        let flag = self.flag().join(" ");
        let trainer = plan::shell(&[self.trainer().into()]);
        format!("tsm-launch {flag} -- {trainer} all-reduce")
    }

    /// The launcher below.
    fn command(&self, folders: &Folders) -> anyhow::Result<Command> {
        let Task {
            members,
            bytes,
            budget,
            wait,
            ..
        } = &self.task;
        // The shim ends it with the thread that starts it.
        let mut command = self.launcher.command();
        command.args(shim::plain()).arg(self.launcher.program());
        command.args(self.flag());
        if let Devices::Gpus(gpus) = &self.devices {
            let ids: Vec<&str> = gpus.iter().map(|gpu| gpu.id.as_str()).collect();
            command.env("CUDA_VISIBLE_DEVICES", ids.join(","));
        }
        command.args(["--preflight", "off", "--ignore-env", "--no-view"]);
        command.args(["--status-port", "off", "--show-ranks", "none"]);
        command.args(["--hang-timeout", "off", "--grace", "1s"]);
        command.arg("--run-dir").arg(&folders.run);
        if let [first, _, ..] = members[..] {
            let key_file = folders.own.join("key");
            self.key.write_file(&key_file)?;
            let join = format!("{}ms", (*wait / 2).as_millis());
            command.args(["--nodes", &members.len().to_string()]);
            command.args(["--rendezvous", &first.to_string()]);
            command.arg("--key-file").arg(key_file);
            command.args(["--join-timeout", &join]);
        }
        command.arg("--").arg(self.trainer());
        command.args(["all-reduce", "--json"]);
        command.args(["--bytes", &(bytes / 4 * 4).max(4).to_string()]);
        command.args(["--seconds", &budget.as_secs_f64().to_string()]);
        // A rank that waits in vain says for whom, before all is over.
        let timeout = format!("{}ms", (*wait * 3 / 4).as_millis());
        command.args(["--timeout", &timeout]);
        command.env(all_reduce::DIR_VARIABLE, &folders.own);
        // This job is not the one that a scheduler gave to the node.
        let names = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned());
        let theirs = |name: &String| name.starts_with("SLURM_") || name == "JOB_COMPLETION_INDEX";
        names.filter(theirs).for_each(|name| {
            command.env_remove(name);
        });
        // A folder that every node has.
        command.current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(folders.stderr()?);
        Ok(command)
    }
}

/// Measures, and waits for the result. The first member, or a node alone, names the rank that failed first.
///
/// # Errors
/// Why there is no measurement. A member that only knows that another one failed says so, see
/// [`super::ring::is_consequence`].
pub fn all_reduce(task: &GpuTask) -> Result<Measured, String> {
    measure(task, || false).map(|lines| summary(&lines))
}

/// What the devices of this node do together, without any other node. `cancelled`: nobody waits for it any more.
pub fn own_gpus(task: &GpuTask, cancelled: impl Fn() -> bool) -> OwnNode {
    let what = match &task.devices {
        Devices::Gpus(gpus) if gpus.is_empty() => return OwnNode::default(),
        Devices::Gpus(gpus) => count(gpus.len(), "GPU"),
        Devices::Cpu(n) => count(*n, "rank") + " on the CPU",
    };
    let result = measure(task, cancelled);
    let slowest = |lines: &Vec<AllReduce>| (lines.len() > 1).then(|| summary(lines).gbit_s / 8.0);
    OwnNode {
        all_reduce_gb_s: result.as_ref().ok().and_then(slowest),
        findings: vec![judge(&what, result, &task.by_hand())],
        ..OwnNode::default()
    }
}

/// The lines of this node's ranks.
fn measure(task: &GpuTask, cancelled: impl Fn() -> bool) -> Result<Vec<AllReduce>, String> {
    let text = |e: anyhow::Error| format!("{e:#}");
    let folders = Folders::make(task).map_err(text)?;
    let command = task.command(&folders).map_err(text)?;
    let status = Nested::start(command)
        .map_err(text)?
        .wait(task.task.wait, cancelled)
        .map_err(|e| e.to_string())?;
    let lines = folders.lines();
    // A rank that sums wrong ends the job, perhaps before the others come to their lines.
    let wrong = lines.iter().any(|line| line.wrong.is_some());
    let all = lines.len() == task.devices.len();
    // Another node's rank may have failed; the first member knows which.
    if wrong || (all && (status.success() || !task.first())) {
        return Ok(lines);
    }
    let failure = folders.failure();
    let words = folders.last_words();
    Err(reason(task.first(), failure.as_deref(), &words, status))
}
