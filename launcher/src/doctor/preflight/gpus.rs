//! An all-reduce over the GPUs of one node or of a group of nodes: what NCCL makes of them, and whether it sums right.
//!
//! The measurement is a job of its own: every member starts this launcher again, with `tsm-trainer all-reduce` as the
//! workers, and the first member coordinates. So a worker that fails is named as in any job, and nothing survives.

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::DirBuilder;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{fmt, io};
use tokio::sync::oneshot;
use tsm_job::RunDir;
use tsm_job::all_reduce::{self, AllReduce};

use super::ring::{LATE, LEFT, Measured, failed};
use super::{OwnNode, Scale, Task};
use crate::cluster::key::Key;
use crate::cluster::message::Finding;
use crate::limits;
use crate::own::Executable;
use crate::plan::{self, Devices};
use crate::shim;
use crate::text::count;

/// A group of nodes with GPUs is done by then: NCCL may take a minute to make its first connections.
pub const GPU_WAIT: Duration = Duration::from_secs(120);
/// The launcher below may take so long to end in order.
const GRACE: Duration = Duration::from_secs(3);
/// How often somebody who gave up on the measurement is looked for.
const LOOK: Duration = Duration::from_millis(50);

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

    /// The launcher below, in `own`, which is a folder of this process alone.
    fn command(&self, own: &Path) -> anyhow::Result<Command> {
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
        let (flag, visible) = match &self.devices {
            Devices::Gpus(gpus) => {
                let ids: Vec<&str> = gpus.iter().map(|gpu| gpu.id.as_str()).collect();
                ("--gpus", Some(ids.join(",")))
            }
            Devices::Cpu(_) => ("--cpus", None),
        };
        command.args([flag, &self.devices.len().to_string()]);
        if let Some(visible) = visible {
            command.env("CUDA_VISIBLE_DEVICES", visible);
        }
        command.args(["--preflight", "off", "--ignore-env", "--no-view"]);
        command.args(["--status-port", "off", "--show-ranks", "none"]);
        command.args(["--hang-timeout", "off", "--grace", "1s"]);
        command.arg("--run-dir").arg(self.run_dir());
        if let [first, _, ..] = members[..] {
            let key_file = own.join("key");
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
        command.env(all_reduce::DIR_VARIABLE, own);
        // This job is not the one that a scheduler gave to the node.
        let names = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned());
        let theirs = |name: &String| name.starts_with("SLURM_") || name == "JOB_COMPLETION_INDEX";
        names.filter(theirs).for_each(|name| {
            command.env_remove(name);
        });
        // A folder that every node has.
        command.current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let stderr = fs_err::File::create(own.join(STDERR))?;
        command.stderr(Stdio::from(stderr.into_file()));
        Ok(command)
    }
}

const STDERR: &str = "stderr";

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
        findings: vec![judge(&what, result, &command_by_hand(task))],
        ..OwnNode::default()
    }
}

fn command_by_hand(task: &GpuTask) -> String {
    let flag = match task.devices {
        Devices::Gpus(_) => "--gpus",
        Devices::Cpu(_) => "--cpus",
    };
    let trainer = plan::shell(&[task.trainer().into()]);
    format!(
        "tsm-launch {flag} {} -- {trainer} all-reduce",
        task.devices.len()
    )
}

/// `again`: the command that measures once more.
fn judge(what: &str, result: Result<Vec<AllReduce>, String>, again: &str) -> Finding {
    let hint = |text: &str| format!("{text}; {again} measures again");
    let lines = match result {
        Ok(lines) => lines,
        Err(e) => {
            let (text, remedy) = e.split_once("\n  hint: ").unwrap_or((
                &e,
                "look at the kernel log (dmesg | grep -e NVRM -e Xid), and at nvidia-smi topo -m",
            ));
            let text = format!("the all-reduce over {what} failed: {text}");
            return Finding::error("all-reduce", text, hint(remedy));
        }
    };
    let measured = summary(&lines);
    let device = lines.first().map_or("", |line| &line.device);
    match measured.wrong {
        Some(wrong) => {
            let remedy = "a GPU, its memory or a link computes wrong: leave this node out";
            Finding::error("all-reduce", wrong, hint(remedy))
        }
        None if lines.len() == 1 => {
            let text = format!("{what} ({device}) alone starts and computes right");
            Finding::ok("all-reduce", text)
        }
        None => {
            let gb_s = measured.gbit_s / 8.0;
            let text =
                format!("{what} ({device}): {gb_s:.1} GB/s bus bandwidth, every sum is right");
            Finding::ok("all-reduce", text)
        }
    }
}

/// The slowest of these ranks, and the first wrong sum.
fn summary(lines: &[AllReduce]) -> Measured {
    let wrong = lines.iter().find_map(|line| {
        let (rank, host, device) = (line.rank, &line.host, &line.device);
        let wrong = line.wrong.as_ref()?;
        Some(format!("rank {rank} on {host} ({device}): {wrong}"))
    });
    let rates = lines.iter().filter_map(|line| line.busbw_gb_s);
    Measured {
        seconds: lines.iter().map(|line| line.seconds).fold(0.0, f64::max),
        gbit_s: rates.reduce(f64::min).unwrap_or(0.0) * 8.0,
        round_trip: Duration::ZERO,
        wrong,
    }
}

/// The lines of this node's ranks.
fn measure(task: &GpuTask, cancelled: impl Fn() -> bool) -> Result<Vec<AllReduce>, String> {
    let text = |e: anyhow::Error| format!("{e:#}");
    let folders = Folders::make(task).map_err(text)?;
    let command = task.command(&folders.own).map_err(text)?;
    let status = Nested::start(command)
        .map_err(text)?
        .wait(task.task.wait, cancelled)
        .map_err(|e| e.to_string())?;
    let stderr = fs_err::read_to_string(folders.own.join(STDERR)).unwrap_or_default();
    let failure = fs_err::read_to_string(RunDir::new(&folders.run).failure()).ok();
    let lines = read_lines(&folders.own);
    // A rank that sums wrong ends the job, perhaps before the others come to their lines.
    let wrong = lines.iter().any(|line| line.wrong.is_some());
    let all = lines.len() == task.devices.len();
    // Another node's rank may have failed; the first member knows which.
    if wrong || (all && (status.success() || !task.first())) {
        return Ok(lines);
    }
    Err(reason(task.first(), failure.as_deref(), &stderr, status))
}

/// Of the ranks that came to the end, by rank.
fn read_lines(dir: &Path) -> Vec<AllReduce> {
    let files = fs_err::read_dir(dir).into_iter().flatten().flatten();
    let files = files.map(|e| e.path());
    let lines = files.filter(|path| path.extension().is_some_and(|e| e == "json"));
    let line = |path: PathBuf| serde_json::from_str(&fs_err::read_to_string(path).ok()?).ok();
    let mut lines: Vec<AllReduce> = lines.filter_map(line).collect();
    lines.sort_by_key(|line| line.rank);
    lines
}

/// Why the nested job failed, by its failure.json where there is one, and by its last words.
fn reason(first: bool, failure: Option<&str>, stderr: &str, status: ExitStatus) -> String {
    let failure = failure.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    if let Some(failure) = failure.filter(|_| first) {
        let word = |name: &str| failure[name].as_str().unwrap_or("?").to_string();
        let rank = failure["rank"].as_u64();
        let who = rank.map_or("a node".into(), |rank| format!("rank {rank}"));
        let device = failure["device"]
            .as_str()
            .map_or(String::new(), |d| format!(" ({d})"));
        let said = failure["message"]
            .as_str()
            .map_or_else(|| word("evidence"), String::from);
        let said = said.strip_prefix("error: ").unwrap_or(&said);
        return format!("{who} on {}{device}: {said}", word("host"));
    }
    // An error of this node itself has one line, or a hint below it.
    let own = stderr.rsplit_once("error: ").map(|(_, text)| text.trim());
    match own {
        // What the coordinator told.
        Some(text) if !first && text.starts_with("rank ") => {
            format!("{LEFT}: {}", text.lines().next().unwrap_or(text))
        }
        Some(text) => text.into(),
        None => {
            let last = stderr.lines().last().unwrap_or("no word");
            let last = last.strip_prefix("tsm-launch: ").unwrap_or(last);
            format!("{LEFT}: {last} ({status})")
        }
    }
}

/// Where the nested job writes; gone with this.
struct Folders {
    /// Of this process: the key and the results.
    own: PathBuf,
    /// Of the nested job on this node.
    run: PathBuf,
    first: bool,
}

impl Folders {
    fn make(task: &GpuTask) -> anyhow::Result<Folders> {
        let run = task.run_dir();
        let me = format!("{}-{}", std::process::id(), task.task.me);
        let own = run.with_extension(me);
        let folders = Folders {
            own,
            run,
            first: task.first(),
        };
        for path in [&folders.own, &folders.run] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
            made.with_context(|| format!("cannot make the temporary folder {}", path.display()))?;
        }
        Ok(folders)
    }
}

impl Drop for Folders {
    fn drop(&mut self) {
        let _ = fs_err::remove_dir_all(&self.own);
        // Two members on one file system, as in tests: the coordinator's is the one to go.
        let shared = self.run.join("launcher.lock").exists();
        if self.first || !shared {
            let _ = fs_err::remove_dir_all(&self.run);
        }
    }
}

/// Why there is no result.
enum Given {
    Up,
    Late(Duration),
    Lost(io::Error),
}

impl fmt::Display for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Given::Up => f.write_str("nobody waits for the measurement any more"),
            Given::Late(wait) => write!(f, "{LATE} {wait:?}"),
            Given::Lost(e) => write!(f, "the launcher of the measurement is lost: {e}"),
        }
    }
}

/// The launcher below. Ended with this.
struct Nested {
    child: Child,
    pidfd: OwnedFd,
}

impl Nested {
    fn start(mut command: Command) -> anyhow::Result<Nested> {
        let mut child = command
            .spawn()
            .context("cannot start the launcher of a measurement")?;
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Nested { child, pidfd }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e).context("cannot watch the launcher of a measurement")
            }
        }
    }

    fn wait(mut self, wait: Duration, cancelled: impl Fn() -> bool) -> Result<ExitStatus, Given> {
        let deadline = Instant::now() + wait;
        while !self.ended_within(LOOK).map_err(Given::Lost)? {
            if cancelled() {
                return Err(Given::Up);
            }
            if Instant::now() >= deadline {
                return Err(Given::Late(wait));
            }
        }
        self.child.wait().map_err(Given::Lost)
    }

    fn ended_within(&self, time: Duration) -> io::Result<bool> {
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&time)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        // In order first, so that the workers' children and the other nodes hear of it from the launcher.
        let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
        let _ = self.ended_within(GRACE);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::message::Severity;
    use std::os::unix::process::ExitStatusExt;

    fn line(rank: u32, seconds: f64, wrong: Option<&str>) -> AllReduce {
        AllReduce {
            rank,
            world_size: 2,
            host: "gpu-01".into(),
            device: "NVIDIA H200".into(),
            bytes: 1 << 26,
            rounds: 5,
            seconds,
            algbw_gb_s: Some(1.0 / seconds),
            busbw_gb_s: Some(2.0 / seconds),
            wrong: wrong.map(String::from),
        }
    }

    #[test]
    fn the_slowest_rank_counts_and_any_wrong_sum() {
        let measured = summary(&[line(0, 0.5, None), line(1, 1.0, Some("1 of 2 sums"))]);
        assert_eq!((measured.seconds, measured.gbit_s), (1.0, 16.0));
        assert_eq!(
            measured.wrong.as_deref(),
            Some("rank 1 on gpu-01 (NVIDIA H200): 1 of 2 sums")
        );
    }

    #[test]
    fn a_finding_has_the_figure_or_what_failed_first() {
        let judge = |result| judge("2 GPUs", result, "tsm-launch again");
        let good = judge(Ok(vec![line(0, 0.5, None), line(1, 1.0, None)]));
        assert_eq!(good.severity, Severity::Ok);
        assert_eq!(
            good.text,
            "2 GPUs (NVIDIA H200): 2.0 GB/s bus bandwidth, every sum is right"
        );
        let wrong = judge(Ok(vec![line(0, 1.0, None), line(1, 1.0, Some("bad"))]));
        assert_eq!(wrong.severity, Severity::Error);
        assert!(wrong.text.starts_with("rank 1 on gpu-01"), "{wrong:?}");
        let failed = judge(Err("rank 1 on a: no GPU\n  hint: do this".into()));
        assert_eq!(
            failed.text,
            "the all-reduce over 2 GPUs failed: rank 1 on a: no GPU"
        );
        assert_eq!(failed.hint, "do this; tsm-launch again measures again");
        let failed = judge(Err("rank 1 on a: SIGSEGV".into()));
        assert!(
            failed.hint.starts_with("look at the kernel log"),
            "{failed:?}"
        );
    }

    #[test]
    fn a_member_that_was_only_told_is_no_witness() {
        let failure =
            r#"{"rank":3,"host":"b","device":"GPU 1 (H200)","evidence":"e","message":"no memory"}"#;
        let status = ExitStatus::from_raw(69 << 8);
        assert_eq!(
            reason(true, Some(failure), "", status),
            "rank 3 on b (GPU 1 (H200)): no memory"
        );
        let node =
            r#"{"rank":null,"host":"b","device":null,"message":null,"evidence":"it was lost"}"#;
        assert_eq!(
            reason(true, Some(node), "", status),
            "a node on b: it was lost"
        );
        let consequence = super::super::ring::is_consequence;
        let told = "error: rank 3 failed first: exit code 69 on b\n  hint: see there\n";
        let text = reason(false, None, told, status);
        assert_eq!(
            text,
            "a neighbour left: rank 3 failed first: exit code 69 on b"
        );
        assert!(consequence(&text));
        // The other node never came, and says itself why.
        let alone = "tsm-launch: a joined: 1 of 2 nodes\ntsm-launch: 1 node (a) joined within 60s, 2 are needed\n";
        assert!(consequence(&reason(true, None, alone, status)));
        let own = "error: cannot start /x/tsm-trainer: no such program\n  hint: check the name and PATH\n";
        let text = reason(false, None, own, status);
        assert!(
            text.starts_with("cannot start /x/tsm-trainer") && !consequence(&text),
            "{text}"
        );
    }
}
