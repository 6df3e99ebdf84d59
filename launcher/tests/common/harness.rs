//! Starts `tsm-launch` with fake workers in a folder of its own. Every test program of this crate has it.

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use std::io::Write;
use std::ops::Range;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

pub const FAKE: &str = env!("CARGO_BIN_EXE_fake-worker");

/// Far longer than anything takes, so that only a hang reaches it, also on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// For `--node-timeout`, where no loss is waited for: several nodes share the cores of a busy machine, and none of them
/// is lost because it had to wait for them.
pub const NODE_TIMEOUT: &str = "5s";

/// Undoes what `nohup` and a shell's `&` do to the signals of everything below them: the launcher
/// rightly leaves an ignored signal ignored, and these tests send them.
#[expect(unsafe_code, reason = "the dispositions are set between fork and exec")]
fn with_default_signals(command: &mut Command) {
    let defaults = || {
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
            // SAFETY: `signal` may be called between fork and exec, and SIG_DFL runs no code of ours.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        Ok(())
    };
    // SAFETY: the closure calls nothing but `signal`.
    unsafe { command.pre_exec(defaults) };
}

/// What a launcher would take up from a scheduler or a pod that runs these tests, and would pass on to ranks.
fn is_of_surroundings(name: &str) -> bool {
    let starts = [
        "SLURM_",
        "OMPI_COMM_WORLD_",
        "PMIX_NAMESPACE",
        "PMI_",
        "PET_",
        "KUBERNETES_",
        "JOB_COMPLETION_INDEX",
        "NCCL_",
        "GLOO_",
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
    ];
    let is_rank = tsm_launch::plan::RANK_VARIABLES.contains(&name);
    is_rank || starts.iter().any(|start| name.starts_with(start))
}

/// A folder for one test; the run folder is `run` in it.
pub struct Scene {
    dir: tempfile::TempDir,
}

/// What a launcher left.
pub struct Outcome {
    /// As a shell reports it.
    pub code: i32,
    pub out: String,
    pub err: String,
    pub took: Duration,
}

impl Scene {
    pub fn new() -> Scene {
        Scene {
            dir: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn run_dir(&self) -> PathBuf {
        self.path("run")
    }

    /// `tsm-launch` with these words, in this folder, with a clean environment.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = self.command_of(env!("CARGO_BIN_EXE_tsm-launch"));
        command.args(words);
        command
    }

    /// A program that starts `tsm-launch`, in this folder and with a clean environment.
    pub fn command_of(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        let names = std::env::vars_os().map(|(name, _)| name);
        for name in names.filter(|name| is_of_surroundings(&name.to_string_lossy())) {
            command.env_remove(name);
        }
        // A name that does not exist is known not to within a second or two, also where no server of names answers.
        command.env("RES_OPTIONS", "timeout:1 attempts:1");
        with_default_signals(&mut command);
        command
    }

    /// Runs `tsm-launch` with `options` and fake workers that do `actions`, to its end.
    pub fn launch(&self, options: &str, actions: &str) -> Outcome {
        finish(self.start(options, actions))
    }

    /// As [`Self::launch`], without waiting.
    pub fn start(&self, options: &str, actions: &str) -> Running {
        let mut words = vec!["--run-dir", "run"];
        words.extend(options.split_whitespace());
        words.extend(["--", FAKE]);
        words.extend(actions.split_whitespace());
        start(&mut self.command(&words))
    }

    /// Runs `script` by `sh` in each worker, with the fake worker as `$0`, to the end.
    pub fn shell(&self, options: &str, script: &str) -> Outcome {
        let mut words = vec!["--run-dir", "run"];
        words.extend(options.split_whitespace());
        words.extend(["--", "sh", "-c", script, FAKE]);
        finish(start(&mut self.command(&words)))
    }

    /// A copy of `tsm-launch` in this folder, so that [`survivors`] finds what it starts.
    pub fn own_launcher(&self) -> PathBuf {
        let copy = self.path("tsm-launch");
        if !copy.exists() {
            // Not by this process, see `write_program`.
            let mut cp = Command::new("cp");
            let copied = cp.arg(env!("CARGO_BIN_EXE_tsm-launch")).arg(&copy).status();
            assert!(copied.expect("cp starts").success());
        }
        copy
    }

    /// Waits until no process is left that has this folder among its arguments.
    pub fn assert_nothing_survives(&self) {
        until("every process to end", || {
            survivors(&self.path("")).is_empty().then_some(())
        });
    }

    pub fn read(&self, name: &str) -> String {
        let path = self.run_dir().join(name);
        fs_err::read_to_string(path).unwrap_or_else(|e| panic!("{e}"))
    }

    /// The log of one rank.
    pub fn log(&self, rank: u32, kind: &str) -> Vec<u8> {
        let host = tsm_launch::manifest::host();
        fs_err::read(self.run_dir().join(format!("logs/{host}-{rank}.{kind}")))
            .unwrap_or_else(|e| panic!("{e}"))
    }

    pub fn json(&self, name: &str) -> serde_json::Value {
        serde_json::from_str(&self.read(name)).expect("JSON")
    }

    /// Waits until `ranks` workers have made the file `<name><rank>` here; their pids.
    pub fn wait_for_pids(&self, name: &str, ranks: u32) -> Vec<i32> {
        self.wait_for_pids_of(name, 0..ranks)
    }

    /// As [`Self::wait_for_pids`], for some ranks.
    pub fn wait_for_pids_of(&self, name: &str, ranks: Range<u32>) -> Vec<i32> {
        let read = |rank| {
            let path = self.path(&format!("{name}{rank}"));
            fs_err::read_to_string(path).ok()?.parse().ok()
        };
        until(&format!("{name}{ranks:?}"), || {
            ranks.clone().map(read).collect::<Option<Vec<i32>>>()
        })
    }
}

/// A launcher at work. Dropped while it runs (a failing test), it is killed.
pub struct Running {
    child: Option<Child>,
    since: Instant,
}

impl Running {
    pub fn pid(&self) -> i32 {
        self.child.as_ref().expect("running").id() as i32
    }

    /// To its stdin, which is a pipe, and ends.
    pub fn write(&mut self, bytes: &[u8]) {
        let stdin = self.child.as_mut().and_then(|child| child.stdin.take());
        stdin.expect("piped").write_all(bytes).expect("it reads");
    }

    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Killed and reaped when dropped, also when a test fails.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn start(command: &mut Command) -> Running {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("tsm-launch starts");
    Running {
        child: Some(child),
        since: Instant::now(),
    }
}

/// Waits for the end; the launcher's own output comes with it. One that hangs is killed.
pub fn finish(mut running: Running) -> Outcome {
    let child = running.child.take().expect("running");
    let pid = Pid::from_child(&child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("it is not reaped");
    let (ended, is_ended) = channel::<()>();
    std::thread::spawn(move || {
        if is_ended.recv_timeout(3 * DEADLINE) == Err(RecvTimeoutError::Timeout) {
            eprintln!("killed after {:?}: process {pid}", 3 * DEADLINE);
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    });
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().expect("tsm-launch ends");
    drop(ended);
    Outcome {
        code: status
            .code()
            .or(status.signal().map(|s| 128 + s))
            .expect("ended"),
        out: String::from_utf8_lossy(&stdout).into_owned(),
        err: String::from_utf8_lossy(&stderr).into_owned(),
        took: running.since.elapsed(),
    }
}

/// Looks again and again until `look` finds something.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < DEADLINE, "waited {DEADLINE:?} for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether a process runs; a zombie does not.
pub fn alive(pid: i32) -> bool {
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.trim_start().chars().next());
    matches!(state, Some(state) if !"ZX".contains(state))
}

pub fn send(pid: i32, signal: Signal) {
    let pid = Pid::from_raw(pid).expect("a pid");
    kill_process(pid, signal).expect("it runs");
}

/// The process that started this one; `None`: it is gone.
pub fn parent(pid: i32) -> Option<i32> {
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// Processes that were started with `marker` (a path of one test) among their arguments.
pub fn survivors(marker: &Path) -> Vec<String> {
    let marker = marker.to_string_lossy().into_owned();
    let entries = fs_err::read_dir("/proc").expect("/proc").flatten();
    let command = |e: fs_err::DirEntry| {
        let pid: i32 = e.file_name().to_str()?.parse().ok()?;
        let command = fs_err::read(e.path().join("cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        (alive(pid) && command.contains(&marker)).then(|| format!("{pid}: {command}"))
    };
    entries.filter_map(command).collect()
}
