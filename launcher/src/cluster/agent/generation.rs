//! One generation on one node: its workers from the first start to the last byte of output.

use anyhow::Context;
use fs_err::File;
use std::io::IsTerminal;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use tsm_job::RunDir;

use super::Setup;
use super::leftovers::Leftovers;
use super::news::News;
use super::prepared::{Prepared, inherited, prepare};
use crate::ahead::Ahead;
use crate::cluster::message::{NodeReport, Start};
use crate::console::lines::{BAR_PERIOD, Bars, Lines};
use crate::contain::{self, Ability, Containment};
use crate::cores;
use crate::logs::keep;
use crate::logs::{Finished, Logs, Shown, Sink, Source, Tail};
use crate::manifest::environment::{self, Change};
use crate::oom;
use crate::own::Executable;
use crate::plan::{WorkerPlan, error_file};
use crate::port::Port;
use crate::process::{self, Guard, Spec, Worker};
use crate::report::{self, Place};
use crate::supervisor::{self, Action, Event, State};
use crate::watch::{Happening, Watch};

/// How long to read on after the last process: only one that is not known as ours still writes.
const DRAIN: Duration = Duration::from_secs(2);
/// The same where the disk takes its time.
const DRAIN_SLOWLY: Duration = Duration::from_secs(15);
/// How long a start that failed waits for what it kills.
const A_LITTLE: Duration = Duration::from_millis(100);
const HELD_OPEN: &str = "a process that is not known as one of this job's holds a worker's output open; it was left alone";
/// Workers started before the agent looks at anything else.
const AT_ONCE: usize = 8;

/// The workers of one start.
pub struct Generation {
    pub start: Start,
    pub state: State,
    plans: Vec<WorkerPlan>,
    /// Variables that no worker inherits.
    remove: Vec<String>,
    dir: RunDir,
    host: String,
    shim: Executable,
    directory: Option<PathBuf>,
    workers: Vec<Worker>,
    tails: Vec<Tail>,
    watch: Watch,
    containment: Containment,
    guard: Guard,
    sources: Vec<Source>,
    logs: Option<Logs>,
    pub news: News,
    kernel: oom::Mark,
    leftovers: Leftovers,
    began_at: Duration,
    _port: Option<Port>,
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
        let Prepared {
            plans,
            remove,
            dir,
            directory,
            port,
        } = prepare(setup, &start)?;
        let containment = Containment::open(ability, &start.run_id, start.generation);
        Ok(Generation {
            state: State::new(plans.len(), start.grace, start.saves, start.shielded),
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
            news: News::new(start.node_rank == 0),
            kernel: oom::Mark::now(),
            leftovers: Leftovers::new(now),
            began_at: now,
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
            self.start_logs(shown)?;
        }
        Ok(())
    }

    fn start_logs(&mut self, shown: &Shown) -> anyhow::Result<()> {
        let sources = std::mem::take(&mut self.sources);
        self.logs = Some(Logs::start(sources, shown.clone())?);
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
            let file = File::options().create(true).append(true).open(path);
            file.map_err(|e| keep::refuse(&e))
        };
        let (out_file, err_file) = (log(false)?, log(true)?);
        // Watched from before the start, so that no message is older than the watch.
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket for a worker")?;
        self.watch.add_agent(ours)?;
        let (worker, streams) = process::spawn(&spec, theirs)?;
        let tail = Tail::default();
        let sink = |file, stderr: bool| Sink {
            file,
            stderr,
            shown: self.lines_of(plan.rank, stderr),
            tail: tail.clone(),
        };
        let out = Source {
            pipe: streams.out.into(),
            to: sink(out_file, false),
        };
        let err = Source {
            pipe: streams.err.into(),
            to: sink(err_file, true),
        };
        self.sources.extend([out, err]);
        self.tails.push(tail);
        if let Err(e) = self.watch.add_worker(&worker) {
            worker.kill();
            return Err(e);
        }
        self.containment.add(worker.pid.as_raw_nonzero().get());
        self.workers.push(worker);
        Ok(())
    }

    /// How a stream of a rank is shown; `None`: not at all.
    fn lines_of(&self, rank: u32, stderr: bool) -> Option<Lines> {
        let shows = |rank: u32| {
            let chosen = self.start.show.as_ref();
            chosen.is_none_or(|ranks| ranks.contains(&rank))
        };
        let first_shown = self.plans.iter().map(|plan| plan.rank).find(|r| shows(*r));
        let bars = if !std::io::stderr().is_terminal() {
            Bars::Lines(BAR_PERIOD)
        } else if stderr && first_shown == Some(rank) {
            Bars::Drawn
        } else {
            Bars::Hidden
        };
        shows(rank).then(|| Lines::new(rank, stderr, bars))
    }

    /// What differs in the workers' environment from that of the agent; empty but on the first node.
    pub fn environment(&self) -> Vec<Change> {
        if self.start.node_rank > 0 {
            return Vec::new();
        }
        let inherited = |name: &str| {
            inherited(&self.start, name).map(|value| value.to_string_lossy().into_owned())
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
        const NAME: &str = "NCCL_RAS_ADDR";
        let mut own = self.plans.first()?.env.iter();
        match own.find(|(name, _)| name == NAME) {
            Some((_, value)) => Some(value.clone()),
            None => inherited(&self.start, NAME)?.into_string().ok(),
        }
    }

    pub fn pids(&self) -> Vec<i32> {
        self.workers
            .iter()
            .map(|w| w.pid.as_raw_nonzero().get())
            .collect()
    }

    /// The cores of each worker, as in [`crate::cluster::message::FromAgent::Started`].
    pub fn cores(&self) -> Vec<String> {
        let plans = self.plans.iter();
        plans.map(|plan| cores::to_list(&plan.cores)).collect()
    }

    /// Waits until a worker did something; the supervisor's events about it.
    ///
    /// # Errors
    /// When epoll fails, which it does not.
    pub async fn next(&mut self) -> anyhow::Result<Vec<Event>> {
        let happenings = self.watch.next(&self.workers).await?;
        let events = happenings
            .into_iter()
            .filter_map(|(rank, happening)| match happening {
                Happening::Ended(end) => Some(Event::Ended { rank, end }),
                Happening::Left { is_exiting } => Some(Event::Left { rank, is_exiting }),
                Happening::Said(message) => self.news.hear(rank, message),
            });
        Ok(events.collect())
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
        self.start_logs(shown)
    }

    /// The guard kills the workers unless this is called again within `time`.
    pub fn lease(&mut self, time: Duration) {
        self.guard.lease(time);
    }

    /// Ends what the workers started and left behind. Call again at [`Self::next_look`] until it says true.
    pub fn end_leftovers(
        &mut self,
        now: Duration,
        at_once: bool,
        notice: impl FnOnce(String),
    ) -> bool {
        let ranks = &self.state.ranks;
        let is_stuck = ranks.iter().any(|rank| rank.end.is_none());
        let killed = ranks.iter().any(|rank| rank.sent.contains(&libc::SIGKILL));
        let grace = (!killed && !at_once).then_some(self.start.grace);
        let containment = &self.containment;
        self.leftovers
            .end(containment, grace, is_stuck, now, notice)
    }

    /// When to look for leftovers again.
    pub fn next_look(&self) -> Duration {
        self.leftovers.next_look
    }

    /// Kills everything, and waits a little for it.
    pub fn kill(&self) {
        self.containment.end(A_LITTLE);
    }

    /// The reader of the output, to be waited for; see [`drain`].
    pub fn take_logs(&mut self) -> Option<Logs> {
        self.logs.take()
    }

    /// What became of the generation. Frees the process table and lets the guard go.
    pub fn conclude(self, output: Finished) -> NodeReport {
        let mut warnings = Vec::new();
        // One that is stuck holds what it had, and is named below.
        if output.held_open && self.leftovers.stuck.is_empty() {
            warnings.push(HELD_OPEN.into());
        }
        let kernel = self.kernel.since();
        let place = |i: usize| {
            let plan = &self.plans[i];
            let pid = self.workers[i].pid.as_raw_nonzero().get();
            let error_file = error_file(self.dir.path(), &self.host, plan.rank);
            Place {
                host: self.host.clone(),
                device: plan.device.clone(),
                pid,
                oom_kill: kernel.kill_of(pid).map(str::to_owned),
                stderr_file: self.dir.log(&self.host, plan.rank, true),
                exception: report::torch_error(&error_file),
                error_file,
                stderr: self.tails[i].lines(),
                stuck_in: self.state.ranks[i]
                    .end
                    .is_none()
                    .then(|| self.workers[i].stuck_in()),
            }
        };
        let stuck = &self.leftovers.stuck;
        if !stuck.is_empty() {
            warnings.push(format!(
                "processes that SIGKILL did not end: {}",
                stuck.join("; ")
            ));
        }
        let gpus = self.plans.iter().any(|plan| plan.device.starts_with("GPU"));
        let xids = kernel.xids.iter().filter(|_| gpus);
        let xids = xids.map(|xid| xid.text.clone()).collect();
        let places: Vec<Place> = (0..self.workers.len()).map(place).collect();
        // The guard first: it knows the sessions by numbers, which may be used again from then on.
        self.guard.dismiss();
        self.workers.iter().for_each(Worker::reap);
        NodeReport {
            ranks: self.state.ranks.into_iter().zip(places).collect(),
            started_at: self.began_at,
            oom_kills: kernel.oom_kills,
            xids,
            warnings,
            missing: output.missing,
        }
    }
}

/// Reads the rest of the output; waits, so not for the thread of the event loop.
pub fn drain(logs: Logs) -> Finished {
    logs.finish(DRAIN, DRAIN_SLOWLY)
}
