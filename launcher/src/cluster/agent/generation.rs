//! One generation on one node: its workers from the first start to the last byte of output.

use anyhow::Context;
use fs_err::File;
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use tsm_job::RunDir;
use tsm_job::exit::{self, Coded};
use tsm_job::message::WorkerMessage;

use super::Setup;
use crate::ahead::Ahead;
use crate::cluster::message::{About, NodeReport, Progress, Start};
use crate::console::lines::{BAR_PERIOD, Bars, Lines};
use crate::contain::{self, Ability, Containment, Left, Process};
use crate::cores;
use crate::doctor::kmsg;
use crate::logs::{Finished, Logs, Shown, Sink, Source, Tail};
use crate::manifest::environment::{self, Change};
use crate::plan::{self, REMOVED_VARIABLES, Seat, Shape, WorkerPlan, error_file};
use crate::port::Port;
use crate::process::{self, Guard, Spec, Worker};
use crate::report::{self, Place};
use crate::start::adopt::identity_in_mpi;
use crate::supervisor::{self, Action, Event, State};
use crate::watch::{Happening, Watch};

/// How long to read on after the last process: only one that is not known as ours still writes.
const DRAIN: Duration = Duration::from_secs(2);
/// How long the kernel may take to end what the workers started after SIGKILL, before it is named as stuck.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// The same where a worker was stuck for long enough already.
const KILL_WAIT_MORE: Duration = Duration::from_millis(100);
/// Processes that are named in a notice.
const NAMED: usize = 8;
/// Between two looks for them, at first and later.
const LOOK: Duration = Duration::from_millis(5);
const LOOK_LATER: Duration = Duration::from_millis(50);
const HELD_OPEN: &str = "a process that is not known as one of this job's holds a worker's output open; it was left alone";
/// Workers started before the agent looks at anything else.
const AT_ONCE: usize = 8;

/// Open files of the launcher itself, generously, and those that it has for each rank: two pipes, two logs,
/// a pidfd and a socket.
const FILES: u64 = 64;
const FILES_PER_RANK: u64 = 6;

/// The workers of one start.
pub struct Generation {
    pub start: Start,
    pub state: State,
    plans: Vec<WorkerPlan>,
    /// Variables that no worker inherits.
    remove: Vec<String>,
    dir: RunDir,
    host: String,
    shim: PathBuf,
    directory: Option<PathBuf>,
    workers: Vec<Worker>,
    tails: Vec<Tail>,
    watch: Watch,
    containment: Containment,
    guard: Guard,
    sources: Vec<Source>,
    logs: Option<Logs>,
    progress: BTreeMap<usize, Progress>,
    sections: BTreeMap<usize, String>,
    /// What rank 0 of this node has said of itself.
    words: Vec<About>,
    metrics: BTreeMap<String, f64>,
    oom_before: u64,
    /// How far the processes that workers left behind have been ended.
    descendants: Descendants,
    /// Those of them that were asked to end.
    asked: BTreeSet<i32>,
    /// When to look for them again.
    pub next_look: Duration,
    stuck: Vec<String>,
    began_at: Duration,
    /// The same by the kernel's log.
    kernel_time: Duration,
    _port: Option<Port>,
}

#[derive(Clone, Copy, PartialEq)]
enum Descendants {
    NotLooked,
    /// They were asked to end, and are killed when the grace is over.
    Asked {
        since: Duration,
    },
    Killed {
        since: Duration,
    },
    Gone,
}

impl Generation {
    /// Prepares everything; [`Generation::start_some`] starts the workers.
    ///
    /// # Errors
    /// What keeps this node from running the job.
    pub fn prepare(
        setup: &Setup,
        ability: &mut Ability,
        start: Start,
        now: Duration,
    ) -> anyhow::Result<Generation> {
        let here = std::env::current_dir().unwrap_or_default();
        let directory = (start.directory != here).then(|| start.directory.clone());
        if let Some(directory) = &directory {
            fs_err::metadata(directory).context("the working directory of the job is not here")?;
        }
        let dir = RunDir::new(&start.run_dir);
        fs_err::create_dir_all(dir.logs()).context("cannot write to the run folder")?;
        if let Some((name, text)) = &start.config {
            let path = dir.path().join(name);
            // Written by the coordinator where the file system is shared.
            if fs_err::read_to_string(&path).map_or(true, |old| old != *text) {
                fs_err::write(&path, text).context("cannot write the resolved config")?;
            }
        }
        let num_ranks = start.num_ranks as usize;
        let devices = setup.devices.first(num_ranks);
        let port = match start.master_port {
            0 => Some(Port::reserve(false)?),
            _ => None,
        };
        let ras = matches!(devices, plan::Devices::Gpus(_))
            .then(|| Port::reserve(false))
            .transpose()?;
        let allowed = if start.affinity {
            cores::allowed()
        } else {
            Vec::new()
        };
        let seat = Seat {
            node_rank: start.node_rank,
            first_rank: start.first_rank,
            world_size: start.world_size,
            master_addr: start.master_addr,
            interface: start.interface.clone().unwrap_or("lo".into()),
            restart_count: start.restart_count,
            max_restarts: start.max_restarts,
        };
        let shape = Shape {
            devices: &devices,
            seat,
            run_id: &start.run_id,
            run_dir: &start.run_dir,
            host: &setup.host,
            master_port: Some(port.as_ref().map_or(start.master_port, |p| p.number)),
            // NCCL may not share the port, so it is only kept apart from MASTER_PORT.
            ras_port: ras.as_ref().map(|port| port.number),
            resume_from: start.resume_from.as_deref(),
            cores: &allowed,
            parallelism: std::thread::available_parallelism().map_or(1, usize::from),
        };
        let base = start.base_env.as_deref().unwrap_or_default();
        let inherited = |name: &str| {
            std::env::var_os(name).is_some()
                || base.iter().any(|(n, _)| n == name)
                || start.env.iter().any(|(n, _)| n == name)
        };
        let mut plans = plan::workers(&shape, inherited);
        for plan in &mut plans {
            plan.env.splice(0..0, start.env.iter().cloned());
        }
        let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        let removed = REMOVED_VARIABLES.map(String::from).into_iter();
        let remove = removed.chain(identity_in_mpi(names)).collect();
        let files = FILES + FILES_PER_RANK * num_ranks as u64;
        if let Err(limit) = process::allow_open_files(files) {
            let text = format!(
                "{num_ranks} ranks need {files} open files, and the hard limit is {limit}\n  hint: ulimit -Hn {files}, \
                nofile in /etc/security/limits.conf, LimitNOFILE= of systemd, docker run --ulimit nofile={files}"
            );
            anyhow::bail!(Coded::new(exit::PREFLIGHT, text));
        }
        let containment = Containment::open(ability, &start.run_id, start.generation);
        Ok(Generation {
            state: State::new(num_ranks, start.grace, start.saves, start.shielded),
            plans,
            remove,
            dir,
            host: setup.host.clone(),
            shim: setup.shim.clone(),
            directory,
            workers: Vec::new(),
            tails: Vec::new(),
            watch: Watch::new()?,
            guard: Guard::start(&setup.shim, &containment)?,
            containment,
            sources: Vec::new(),
            logs: None,
            progress: BTreeMap::new(),
            sections: BTreeMap::new(),
            words: Vec::new(),
            metrics: BTreeMap::new(),
            oom_before: oom_kills(),
            descendants: Descendants::NotLooked,
            asked: BTreeSet::new(),
            next_look: now,
            stuck: Vec::new(),
            began_at: now,
            kernel_time: kmsg::now(),
            _port: port,
            start,
        })
    }

    pub fn is_started(&self) -> bool {
        self.logs.is_some()
    }

    /// Starts a few of the workers that are not started yet; after the last their output is read.
    ///
    /// # Errors
    /// When a worker cannot be started; none is left then.
    pub fn start_some(&mut self, shown: &Shown) -> anyhow::Result<()> {
        let from = self.workers.len();
        for index in from..self.plans.len().min(from + AT_ONCE) {
            if let Err(e) = self.start_worker(index) {
                self.workers.iter().for_each(Worker::kill);
                return Err(e.context(format!("cannot start rank {}", self.plans[index].rank)));
            }
        }
        self.guard.watch(&self.workers[from..]);
        if self.workers.len() == self.plans.len() {
            self.logs = Some(Logs::start(
                std::mem::take(&mut self.sources),
                shown.clone(),
            )?);
        }
        Ok(())
    }

    fn start_worker(&mut self, index: usize) -> anyhow::Result<()> {
        let plan = &self.plans[index];
        // A message of the run that is continued here would be taken for this one's.
        let _ = fs_err::remove_file(error_file(self.dir.path(), &self.host, plan.rank));
        let spec = Spec {
            shim: &self.shim,
            command: &self.start.command,
            base_env: self.start.base_env.as_deref().unwrap_or_default(),
            directory: self.directory.as_deref(),
            env: &plan.env,
            remove: &self.remove,
            cores: &plan.cores,
            shielded: self.start.shielded,
            containment: &self.containment,
        };
        let log = |stderr: bool| {
            let path = self.dir.log(&self.host, plan.rank, stderr);
            File::options().create(true).append(true).open(path)
        };
        let (out_file, err_file) = (log(false)?, log(true)?);
        // Watched from before the start, so that no message is older than the watch.
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket for a worker")?;
        self.watch.add_agent(ours)?;
        let (worker, streams) = process::spawn(&spec, theirs)?;
        let tail = Tail::default();
        let shows = |rank: u32| {
            self.start
                .show
                .as_ref()
                .is_none_or(|ranks| ranks.contains(&rank))
        };
        let first_shown = self.plans.iter().find(|w| shows(w.rank)).map(|w| w.rank);
        let is_first = first_shown == Some(plan.rank);
        let is_terminal = std::io::stderr().is_terminal();
        let shown = |stderr| {
            let bars = match is_terminal {
                false => Bars::Lines(BAR_PERIOD),
                true if is_first && stderr => Bars::Drawn,
                true => Bars::Hidden,
            };
            shows(plan.rank).then(|| Lines::new(plan.rank, stderr, bars))
        };
        let sink = |file, stderr: bool| Sink {
            file,
            stderr,
            shown: shown(stderr),
            tail: tail.clone(),
        };
        self.sources.push(Source {
            pipe: streams.out.into(),
            to: sink(out_file, false),
        });
        self.sources.push(Source {
            pipe: streams.err.into(),
            to: sink(err_file, true),
        });
        self.tails.push(tail);
        if let Err(e) = self.watch.add_worker(&worker) {
            worker.kill();
            return Err(e);
        }
        self.containment.add(worker.pid.as_raw_nonzero().get());
        self.workers.push(worker);
        Ok(())
    }

    /// What differs in the workers' environment from that of the agent; empty but on the first node.
    pub fn environment(&self) -> Vec<Change> {
        if self.start.node_rank > 0 {
            return Vec::new();
        }
        let base = self.start.base_env.as_deref().unwrap_or_default();
        let inherited = |name: &str| {
            let value = base
                .iter()
                .find(|(n, _)| n == name)
                .map(|(_, value)| value.clone());
            Some(
                value
                    .or_else(|| std::env::var_os(name))?
                    .to_string_lossy()
                    .into_owned(),
            )
        };
        let ranks: Vec<_> = self.plans.iter().map(|plan| plan.env.as_slice()).collect();
        environment::difference(inherited, &ranks, &self.remove)
    }

    pub fn containment(&self) -> contain::Kind {
        self.containment.kind()
    }

    /// Rank and device of each worker that was started.
    pub fn places(&self) -> Vec<(u32, String)> {
        let started = self.plans.iter().take(self.workers.len());
        started
            .map(|plan| (plan.rank, plan.device.clone()))
            .collect()
    }

    /// Where NCCL answers on this node, where there are GPUs.
    pub fn ras_address(&self) -> Option<String> {
        let own = self
            .plans
            .first()?
            .env
            .iter()
            .find(|(name, _)| name == "NCCL_RAS_ADDR");
        own.map(|(_, value)| value.clone())
            .or_else(|| std::env::var("NCCL_RAS_ADDR").ok())
    }

    pub fn pids(&self) -> Vec<i32> {
        self.workers
            .iter()
            .map(|w| w.pid.as_raw_nonzero().get())
            .collect()
    }

    /// Waits until a worker did something; the supervisor's events about it.
    ///
    /// # Errors
    /// When epoll fails, which it does not.
    pub async fn next(&mut self) -> anyhow::Result<Vec<Event>> {
        let happenings = self.watch.next(&self.workers).await?;
        let mut events = Vec::new();
        for (rank, happening) in happenings {
            events.push(match happening {
                Happening::Ended(end) => Event::Ended { rank, end },
                Happening::Left => Event::Left { rank },
                Happening::Said(WorkerMessage::Step {
                    step,
                    epoch,
                    work_ms,
                }) => {
                    let progress = self.progress_of(rank);
                    (progress.step, progress.epoch) = (Some(step), Some(epoch));
                    progress.first_step.get_or_insert(step);
                    // JSON has no word for what is too large for it.
                    let work_ms = work_ms.map(|ms| ms as f32).filter(|ms| ms.is_finite());
                    progress.work_ms.extend(work_ms);
                    Event::Step { rank, step }
                }
                Happening::Said(WorkerMessage::Section { name }) => {
                    let left = self.sections.insert(rank, name.clone());
                    let saved = left.is_some_and(|l| l == "checkpoint") && name != "checkpoint";
                    let step = self.state.ranks[rank].step;
                    let progress = self.progress_of(rank);
                    progress.section = Some(name.clone());
                    if saved {
                        progress.checkpoint = progress.step.or(step);
                    }
                    Event::Section { rank, name }
                }
                Happening::Said(WorkerMessage::Failure(record)) => {
                    let record = record.shortened();
                    Event::Failing { rank, record }
                }
                Happening::Said(WorkerMessage::Metric { name, value }) => {
                    // JSON has no word for the others.
                    if value.is_finite() {
                        self.metrics.insert(name, value);
                    }
                    continue;
                }
                Happening::Said(WorkerMessage::Versions { versions }) => {
                    self.words
                        .extend((rank == 0).then_some(About::Versions(versions)));
                    continue;
                }
                Happening::Said(WorkerMessage::Resumed { path, step }) => {
                    let word = About::Resumed { path, step };
                    self.words.extend((rank == 0).then_some(word));
                    continue;
                }
                Happening::Said(WorkerMessage::Hello { .. }) => {
                    // That it talks is news too.
                    self.progress_of(rank);
                    Event::Hello { rank }
                }
            });
        }
        Ok(events)
    }

    fn progress_of(&mut self, local_rank: usize) -> &mut Progress {
        self.progress.entry(local_rank).or_insert_with(|| Progress {
            local_rank: local_rank as u32,
            ..Progress::default()
        })
    }

    /// What rank 0 has said of itself since this was asked last; empty but on the first node.
    pub fn take_words(&mut self) -> Vec<About> {
        let words = std::mem::take(&mut self.words);
        if self.start.node_rank == 0 {
            words
        } else {
            Vec::new()
        }
    }

    /// What has changed since it was asked last.
    pub fn news(&mut self) -> (Vec<Progress>, Vec<(String, f64)>) {
        let progress = std::mem::take(&mut self.progress).into_values().collect();
        (
            progress,
            std::mem::take(&mut self.metrics).into_iter().collect(),
        )
    }

    /// Takes in events and signals the workers as is decided; what is left is for others to do.
    pub fn decide(&mut self, events: &[Event], now: Duration) -> Vec<Action> {
        let actions = supervisor::decide(&mut self.state, events, now);
        let _ahead = (actions.len() > 1).then(Ahead::new);
        for action in &actions {
            match action {
                Action::Signal { rank, signal } => {
                    if let Some(worker) = self.workers.get(*rank) {
                        worker.signal(*signal);
                    }
                }
                Action::Kill { rank } => {
                    if let Some(worker) = self.workers.get(*rank) {
                        worker.kill();
                    }
                }
                Action::Failing { .. } | Action::Answered { .. } | Action::GraceOver { .. } => {}
            }
        }
        actions
    }

    /// Ranks that were never started, since the job was stopped meanwhile, count as stopped.
    pub fn give_up_starting(&mut self, shown: &Shown) -> anyhow::Result<()> {
        self.plans.truncate(self.workers.len());
        self.state.ranks.truncate(self.workers.len());
        self.logs = Some(Logs::start(
            std::mem::take(&mut self.sources),
            shown.clone(),
        )?);
        Ok(())
    }

    /// The guard kills the workers unless this is called again within `time`.
    pub fn lease(&mut self, time: Duration) {
        self.guard.lease(time);
    }

    /// Ends what the workers started and left behind: SIGTERM, the grace, SIGKILL. Call again at
    /// [`Self::next_look`] until it says true.
    pub fn end_descendants(
        &mut self,
        now: Duration,
        at_once: bool,
        notice: impl FnOnce(String),
    ) -> bool {
        let since = match self.descendants {
            Descendants::Gone => return true,
            Descendants::NotLooked => {
                let left = self.containment.processes();
                let killed = (self.state.ranks.iter()).any(|r| r.sent.contains(&libc::SIGKILL));
                if !left.is_empty() && !killed && !at_once {
                    let grace = tsm_job::config::duration::format(self.start.grace);
                    let (number, names) = (left.len(), names(&left));
                    notice(format!(
                        "processes that the workers left behind: ending {number} ({names}), grace {grace}"
                    ));
                    self.containment.signal(&left, Signal::TERM);
                    self.asked = left.iter().map(|process| process.pid).collect();
                    self.descendants = Descendants::Asked { since: now };
                    self.look_again(now, now);
                    return false;
                }
                now
            }
            Descendants::Asked { since } if !at_once && now < since + self.start.grace => {
                if now < self.next_look {
                    return false;
                }
                let mut left = self.containment.processes();
                if !left.is_empty() {
                    // One that was started while the others were asked.
                    left.retain(|process| self.asked.insert(process.pid));
                    self.containment.signal(&left, Signal::TERM);
                    self.look_again(since, now);
                    return false;
                }
                now
            }
            Descendants::Asked { .. } => now,
            Descendants::Killed { .. } if now < self.next_look => return false,
            Descendants::Killed { since } => since,
        };
        let is_stuck = self.state.ranks.iter().any(|rank| rank.end.is_none());
        let limit = match self.containment.kill() {
            Left::Nothing => Duration::ZERO,
            Left::Perhaps => contain::DOUBT,
            Left::Some if is_stuck => KILL_WAIT_MORE,
            Left::Some => KILL_WAIT,
        };
        if now < since + limit {
            self.descendants = Descendants::Killed { since };
            self.look_again(since, now);
            return false;
        }
        self.descendants = Descendants::Gone;
        let left = if limit.is_zero() {
            Vec::new()
        } else {
            self.containment.processes()
        };
        let describe = |process: &Process| format!("{process}, {}", process::stuck_in(process.pid));
        self.stuck = left.iter().map(describe).collect();
        true
    }

    /// Looks cost more where many processes run, so they become rarer.
    fn look_again(&mut self, since: Duration, now: Duration) {
        if self.next_look <= now {
            let pause = now.saturating_sub(since) / 8;
            self.next_look = now + pause.clamp(LOOK, LOOK_LATER);
        }
    }

    /// Kills everything, and waits a little for it.
    pub fn kill(&self) {
        self.containment.end(KILL_WAIT_MORE);
    }

    /// The reader of the output, to be waited for; see [`drain`].
    pub fn take_logs(&mut self) -> Option<Logs> {
        self.logs.take()
    }

    /// What became of the generation. Frees the process table and lets the guard go.
    pub fn conclude(self, output: Finished) -> NodeReport {
        let mut warnings = Vec::new();
        if !output.all {
            warnings.push(HELD_OPEN.into());
        }
        let dir_path = self.dir.path();
        let place = |i: usize| {
            let plan = &self.plans[i];
            Place {
                host: self.host.clone(),
                device: plan.device.clone(),
                pid: self.workers[i].pid.as_raw_nonzero().get(),
                stderr_file: self.dir.log(&self.host, plan.rank, true),
                error_file: error_file(self.dir.path(), &self.host, plan.rank),
                exception: report::torch_error(&error_file(dir_path, &self.host, plan.rank)),
                stderr: self.tails[i].lines(),
                stuck_in: self.state.ranks[i]
                    .end
                    .is_none()
                    .then(|| self.workers[i].stuck_in()),
            }
        };
        if !self.stuck.is_empty() {
            warnings.push(format!(
                "processes that SIGKILL did not end: {}",
                self.stuck.join("; ")
            ));
        }
        let gpus = self.plans.iter().any(|plan| plan.device.starts_with("GPU"));
        let xids = match gpus.then(|| kmsg::xids(self.kernel_time)).flatten() {
            Some(xids) => xids.into_iter().map(|xid| xid.text).collect(),
            None => Vec::new(),
        };
        let places: Vec<Place> = (0..self.workers.len()).map(place).collect();
        self.workers.iter().for_each(Worker::reap);
        self.guard.dismiss();
        NodeReport {
            ranks: self.state.ranks.into_iter().zip(places).collect(),
            started_at: self.began_at,
            oom_kills: oom_kills().saturating_sub(self.oom_before),
            xids,
            warnings,
            missing: output.missing,
        }
    }
}

/// The first few, by number and name.
fn names(processes: &[Process]) -> String {
    let named = processes.iter().take(NAMED).map(Process::to_string);
    let more = processes.len().saturating_sub(NAMED);
    let more = (more > 0).then(|| format!("{more} more"));
    named.chain(more).collect::<Vec<_>>().join(", ")
}

/// Reads the rest of the output; waits, so not for the thread of the event loop.
pub fn drain(logs: Logs) -> Finished {
    logs.finish(DRAIN)
}

/// How many processes the kernel's out-of-memory killer has ended since the machine started.
fn oom_kills() -> u64 {
    let text = fs_err::read_to_string("/proc/vmstat").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.and_then(|n| n.parse().ok()).unwrap_or(0)
}
