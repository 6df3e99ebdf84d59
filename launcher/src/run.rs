//! One run on this node: start the workers, follow them to their end, tell what became of it.
//!
//! One loop on one thread owns all state. It asks [`supervisor::decide`] what to do, and does nothing
//! that could wait: output is read on another thread, the machine is described on a third.

use anyhow::Context;
use fs_err::File;
use serde_json::json;
use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::blame::Blame;
use crate::cli::Show;
use crate::clock::Utc;
use crate::console::lines::Lines;
use crate::console::screen::{Format, Outputs, Screen, Style};
use crate::crew::Crew;
use crate::folder::Folder;
use crate::logs::{Logs, Shown, Sink, Source, Tail};
use crate::manifest::{Events, Manifest, write_json};
use crate::plan::{REMOVED_VARIABLES, WorkerPlan, error_file};
use crate::process::{self, Guard, Spec, Worker};
use crate::report::{self, Place, own_words};
use crate::signals::Signals;
use crate::supervisor::{self, Event, Phase, State, StopCause};
use crate::watch::Watch;

/// How long to read on after the last worker: only a process that left its session still writes.
const DRAIN: Duration = Duration::from_secs(2);
/// How long to wait for the description of the machine at the end of a short run.
const DESCRIBE: Duration = Duration::from_secs(2);

/// Open files of the launcher itself, generously, and those that it has for each rank: two pipes, two logs,
/// a pidfd and a socket.
const FILES: u64 = 64;
const FILES_PER_RANK: u64 = 6;

/// All that is decided before the first worker starts.
pub struct Run {
    pub start: Instant,
    /// This executable.
    pub shim: PathBuf,
    pub host: String,
    pub folder: Folder,
    pub workers: Vec<WorkerPlan>,
    pub command: Vec<OsString>,
    pub show: Show,
    pub grace: Duration,
    pub manifest: Manifest,
    /// The command that continues the run, where the workers know how to.
    pub resume: Option<String>,
}

impl Run {
    /// Runs to the end and returns the exit code.
    ///
    /// # Errors
    /// When the workers cannot be started; none is left then.
    pub fn execute(self) -> anyhow::Result<i32> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        runtime.block_on(self.follow())
    }

    async fn follow(self) -> anyhow::Result<i32> {
        let mut signals = Signals::catch()?;
        let oom_before = oom_kills();
        let (mut crew, screen) = self.start_workers()?;
        let described = self.describe(&crew.workers);
        let mut state = State::new(crew.workers.len(), self.grace);
        while state.phase != Phase::Finished {
            let deadline = state
                .deadline()
                .map(|d| tokio::time::Instant::from_std(self.start + d));
            let events = tokio::select! {
                happenings = crew.watch.next(&crew.workers) => crew.take(happenings?),
                signal = signals.next() => {
                    crew.events.write("signal", json!({"signal": crate::end::signal_name(signal)}));
                    vec![Event::Signal(signal)]
                }
                () = tokio::time::sleep_until(deadline.unwrap_or_else(tokio::time::Instant::now)),
                    if deadline.is_some() => vec![Event::Deadline],
            };
            let actions = supervisor::decide(&mut state, &events, self.start.elapsed());
            crew.act(&actions);
            crew.write_ends(&events, &state);
        }
        crew.end_descendants(&state, &mut signals, self.grace).await;
        Ok(self.conclude(
            crew,
            screen,
            state,
            described,
            oom_kills().saturating_sub(oom_before),
        ))
    }

    /// Starts the guard and every worker, then reads their output.
    fn start_workers(&self) -> anyhow::Result<(Crew, Screen)> {
        process::allow_open_files(FILES + FILES_PER_RANK * self.workers.len() as u64);
        let mut watch = Watch::new()?;
        let mut guard = Guard::start(&self.shim)?;
        let mut events = Events::open(&self.folder.dir, self.start);
        let mut workers: Vec<Worker> = Vec::new();
        let (notes, notices) = std::io::pipe().context("cannot make a pipe")?;
        rustix::io::ioctl_fionbio(&notices, true).context("cannot make a pipe")?;
        let mut sources = vec![Source {
            pipe: notes.into(),
            to: Sink::Notices(Lines::own()),
        }];
        let mut tails = Vec::new();
        for plan in &self.workers {
            let started = self.start_worker(plan, &mut watch, &mut sources, &mut tails);
            match started {
                Ok(worker) => workers.push(worker),
                Err(e) => {
                    workers.iter().for_each(Worker::kill);
                    return Err(e.context(format!("cannot start rank {}", plan.rank)));
                }
            }
        }
        guard.watch(&workers);
        let style = Style {
            format: Format::Text,
            hosts: false,
            world_size: self.workers.len() as u32,
            shown: self
                .workers
                .iter()
                .filter(|w| self.show.shows(w.rank))
                .count(),
            run_dir: self.folder.dir.clone(),
        };
        let screen = Screen::start(Outputs::standard()?, style, None)?;
        let shown = Shown {
            host: self.host.clone(),
            feed: screen.feed(),
            patience: screen.patience(),
        };
        let logs = Logs::start(sources, shown)?;
        for (plan, worker) in self.workers.iter().zip(&workers) {
            events.write(
                "spawn",
                json!({"rank": plan.rank, "pid": worker.pid.as_raw_nonzero()}),
            );
        }
        let mut crew = Crew {
            workers,
            tails,
            watch,
            guard,
            logs,
            notices,
            events,
        };
        let number = supervisor::count(self.workers.len(), "worker");
        crew.notice(&format!(
            "{number} on {}; run folder {}",
            self.host,
            self.folder.dir.path().display()
        ));
        Ok((crew, screen))
    }

    fn start_worker(
        &self,
        plan: &WorkerPlan,
        watch: &mut Watch,
        sources: &mut Vec<Source>,
        tails: &mut Vec<Tail>,
    ) -> anyhow::Result<Worker> {
        // A message of the run that is continued here would be taken for this one's.
        let _ = fs_err::remove_file(error_file(self.folder.dir.path(), &self.host, plan.rank));
        let (command, env) = (self.command.as_slice(), plan.env.as_slice());
        let spec = Spec {
            shim: &self.shim,
            command,
            env,
            remove: &REMOVED_VARIABLES,
            cores: &plan.cores,
        };
        let log = |stderr: bool| {
            let path = self.folder.dir.log(&self.host, plan.rank, stderr);
            File::options().create(true).append(true).open(path)
        };
        let (out_file, err_file) = (log(false)?, log(true)?);
        // Watched from before the start, so that no message is older than the watch.
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket for a worker")?;
        watch.add_agent(ours)?;
        let (worker, streams) = process::spawn(&spec, theirs)?;
        let tail = Tail::default();
        let shown = |stderr, progress| {
            self.show
                .shows(plan.rank)
                .then(|| Lines::new(plan.rank, stderr, progress))
        };
        let first_shown = self
            .workers
            .iter()
            .find(|w| self.show.shows(w.rank))
            .map(|w| w.rank);
        let progress = first_shown == Some(plan.rank) && std::io::stderr().is_terminal();
        let out = Sink::Worker {
            file: out_file,
            stderr: false,
            shown: shown(false, false),
            tail: tail.clone(),
        };
        let err = Sink::Worker {
            file: err_file,
            stderr: true,
            shown: shown(true, progress),
            tail: tail.clone(),
        };
        sources.push(Source {
            pipe: streams.out.into(),
            to: out,
        });
        sources.push(Source {
            pipe: streams.err.into(),
            to: err,
        });
        tails.push(tail);
        if let Err(e) = watch.add_worker(&worker) {
            worker.kill();
            return Err(e);
        }
        Ok(worker)
    }

    /// Completes the manifest on a thread of its own, and writes it.
    fn describe(&self, workers: &[Worker]) -> Receiver<Manifest> {
        let mut manifest = self.manifest.clone();
        for (entry, worker) in manifest.ranks.iter_mut().zip(workers) {
            entry.pid = worker.pid.as_raw_nonzero().get();
        }
        let (send, receive) = channel();
        let dir = self.folder.dir.clone();
        let unfinished = manifest.clone();
        let thread = std::thread::Builder::new().name("manifest".into());
        let sender = send.clone();
        if thread
            .spawn(move || {
                manifest = manifest.complete();
                // What goes wrong here goes wrong again, and is said, at the end.
                let _ = manifest.write(&dir);
                let _ = sender.send(manifest);
            })
            .is_err()
        {
            let _ = send.send(unfinished);
        }
        receive
    }

    /// Writes everything down, reports a failure, and returns the exit code.
    fn conclude(
        &self,
        crew: Crew,
        screen: Screen,
        state: State,
        described: Receiver<Manifest>,
        oom_kills: u64,
    ) -> i32 {
        let Crew {
            workers,
            tails,
            watch,
            guard,
            logs,
            notices,
            mut events,
        } = crew;
        // What could still be said after this goes straight to stderr.
        drop(notices);
        let (mut warnings, drained) = logs.finish(DRAIN);
        if !drained {
            warnings.push("a process that left its session still holds a worker's output open; it was left alone".into());
        }
        screen.finish(DRAIN);
        drop(watch);
        let places: Vec<Place> = (0..workers.len())
            .map(|i| self.place(&workers[i], &tails[i], &state, i))
            .collect();
        let blame = state.first_failure(|rank| own_words(&places[rank]));
        let code = state.exit_code(blame.as_ref());
        workers.iter().for_each(Worker::reap);
        guard.dismiss();

        let mut stderr = std::io::stderr().lock();
        for warning in &warnings {
            let _ = writeln!(stderr, "warning: {warning}");
        }
        let outcome = match state.cause {
            None => "succeeded",
            Some(StopCause::Signal(_)) => "stopped",
            Some(StopCause::Failure) => "failed",
        };
        let seconds = self.start.elapsed().as_secs_f64();
        match &blame {
            Some(blame) => self.report(blame, code, &state, &places, oom_kills, &mut stderr),
            None => {
                let _ = writeln!(
                    stderr,
                    "tsm-launch: {outcome} after {seconds:.1} s, exit code {code}"
                );
            }
        }
        events.write(
            "end",
            json!({"outcome": outcome, "exit_code": code, "oom_kills": oom_kills}),
        );
        if let Ok(mut manifest) = described.recv_timeout(DESCRIBE) {
            manifest.ended = Some(Utc::now().rfc3339());
            (manifest.outcome, manifest.exit_code) = (outcome, Some(code));
            for (entry, rank) in manifest.ranks.iter_mut().zip(&state.ranks) {
                entry.end = rank.end;
            }
            if let Err(e) = manifest.write(&self.folder.dir) {
                let _ = writeln!(stderr, "warning: the manifest is not written: {e}");
            }
        }
        code
    }

    fn place(&self, worker: &Worker, tail: &Tail, state: &State, index: usize) -> Place {
        let plan = &self.workers[index];
        let dir = &self.folder.dir;
        Place {
            host: self.host.clone(),
            device: plan.device.clone(),
            pid: worker.pid.as_raw_nonzero().get(),
            stderr_file: dir.log(&self.host, plan.rank, true),
            error_file: error_file(dir.path(), &self.host, plan.rank),
            stderr: tail.lines(),
            stuck_in: state.ranks[index].end.is_none().then(|| worker.stuck_in()),
        }
    }

    fn report(
        &self,
        blame: &Blame,
        exit_code: i32,
        state: &State,
        places: &[Place],
        oom_kills: u64,
        stderr: &mut impl Write,
    ) {
        let dir = self.folder.dir.path();
        let run = report::Run {
            id: &self.manifest.run_id,
            dir,
            exit_code,
            oom_kills,
            resume: self.resume.as_deref(),
        };
        let failure = report::failure(&run, blame, &state.ranks, places);
        let _ = writeln!(stderr, "{failure}");
        if let Err(e) = write_json(&self.folder.dir.failure(), &failure) {
            let _ = writeln!(stderr, "warning: failure.json is not written: {e}");
        }
    }
}

/// How many processes the kernel's out-of-memory killer has ended since the machine started.
fn oom_kills() -> u64 {
    let text = fs_err::read_to_string("/proc/vmstat").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.and_then(|n| n.parse().ok()).unwrap_or(0)
}
