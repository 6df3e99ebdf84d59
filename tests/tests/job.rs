//! Starts jobs as a user would and reads what they leave.

use serde_json::Value;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tsm_data::demo::Demo;
use tsm_job::RunDir;
use tsm_trainer::meter::History;

pub const LAUNCH: &str = env!("CARGO_BIN_EXE_e2e-launch");
pub const TRAINER: &str = env!("CARGO_BIN_EXE_e2e-trainer");

/// Far longer than a small job takes, so that only a hang reaches it, also on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// A folder for one test, with the jobs that run in it.
pub struct Scene(tempfile::TempDir);

/// What a program printed, and its exit code as a shell reports it.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Scene {
    pub fn new() -> Scene {
        Scene(tempfile::tempdir().expect("a temporary folder"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn run(&self, name: &str) -> RunDir {
        RunDir::new(self.path(name))
    }

    /// Eight classes of synthetic motion, 32 x 32 pixels and 12 frames a clip, in the folder `motion`.
    pub fn motion_set(&self, train: usize, val: usize) {
        let demo = Demo {
            train,
            val,
            size: 32,
            frames: 12,
            seed: 0,
        };
        demo.make(&self.path("motion")).expect("the set is written");
    }

    /// The demo's configuration made small, with the lists of [`Self::motion_set`], and `overrides` on top.
    pub fn overrides(&self, overrides: &[&str]) -> Vec<String> {
        let data = self.path("motion");
        let path = |key: &str, name: &str| format!("data.{key}={}", data.join(name).display());
        let mut all = vec![
            path("root", ""),
            path("train_list", "train.txt"),
            path("val_list", "val.txt"),
            path("class_names", "classes.txt"),
        ];
        let small = [
            "model.num_segments=4",
            "data.train.size=32",
            "data.val.short_side=32",
            "data.val.size=32",
            "train.batch_per_rank=4",
            "optim.base_batch=8",
            "train.epochs=1",
        ];
        all.extend(small.iter().chain(overrides).map(|s| s.to_string()));
        all
    }

    /// `tsm-launch` with these words, in this folder, not started yet.
    pub fn launch<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> Command {
        let mut command = Command::new(LAUNCH);
        let is_program = words.iter().any(|word| word.as_ref() == "--");
        if !is_program {
            command.args(["--trainer", TRAINER]);
        }
        command.args(words);
        command.current_dir(self.0.path());
        for name in tsm_launch::plan::RANK_VARIABLES {
            command.env_remove(name);
        }
        // A launcher takes up what it is started by, which is not what runs these tests.
        for (name, _) in std::env::vars_os() {
            let starters = ["SLURM_", "OMPI_COMM_WORLD_", "PMI_", "PET_", "KUBERNETES_"];
            let text = name.to_string_lossy();
            if starters.iter().any(|starter| text.starts_with(starter)) {
                command.env_remove(&name);
            }
        }
        command
    }

    /// The small job on `ranks` CPU ranks in the run folder `run`, not started yet.
    pub fn job(&self, run: &str, ranks: u32, overrides: &[&str]) -> Command {
        let mut command = self.launch(&["--cpus", &ranks.to_string(), "--run-dir", run]);
        command.arg(config("demo.yaml"));
        command.args(self.overrides(overrides));
        command
    }

    /// Goes on with the run folder `run`, not started yet.
    pub fn resume(&self, run: &str, overrides: &[&str]) -> Command {
        let mut command = self.launch(&["--cpus", "2", "--resume", run]);
        if !overrides.is_empty() {
            command.arg(self.run(run).config()).args(overrides);
        }
        command
    }
}

/// A file of `configs/`.
pub fn config(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../configs")
        .join(name)
}

/// A program at work. Dropped while it runs (a failing test), it is killed; a launcher's guard then
/// ends its workers.
pub struct Running {
    child: Child,
    out: File,
    err: File,
    since: Instant,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a program whose output goes to files, so that it never waits for a reader.
pub fn start(command: Command) -> Running {
    start_with_stdin(command, Stdio::null())
}

pub fn start_with_stdin(mut command: Command, stdin: Stdio) -> Running {
    let file = || tempfile::tempfile().expect("a temporary file");
    let (out, err) = (file(), file());
    let share = |f: &File| Stdio::from(f.try_clone().expect("a descriptor"));
    let child = command
        .stdin(stdin)
        .stdout(share(&out))
        .stderr(share(&err))
        .spawn()
        .expect("the program starts");
    Running {
        child,
        out,
        err,
        since: Instant::now(),
    }
}

impl Running {
    pub fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// Waits for the end.
    pub fn finish(mut self, deadline: Duration) -> Outcome {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            let waited = self.since.elapsed();
            assert!(
                waited < deadline,
                "not ended after {waited:?}\n{:?}",
                self.output(0)
            );
            std::thread::sleep(Duration::from_millis(5));
        };
        let signal = status.signal().map(|s| 128 + s);
        let code = status.code().or(signal).expect("a code or a signal");
        self.output(code)
    }

    fn output(&mut self, code: i32) -> Outcome {
        let text = |file: &mut File| {
            let mut bytes = Vec::new();
            file.rewind()
                .and_then(|()| file.read_to_end(&mut bytes))
                .expect("a temporary file");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Outcome {
            code,
            out: text(&mut self.out),
            err: text(&mut self.err),
        }
    }

    /// Looks again and again until `look` finds something, as long as the program runs.
    pub fn until<T>(&mut self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        loop {
            if let Some(found) = look() {
                return found;
            }
            let ended = self.child.try_wait().expect("a child");
            let waited = self.since.elapsed();
            assert!(
                ended.is_none() && waited < DEADLINE,
                "no {what} after {waited:?}, ended: {ended:?}\n{:?}",
                self.output(0)
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Runs to the end; panics with both streams unless the exit code is `want`.
pub fn expect(command: Command, want: i32) -> Outcome {
    expect_within(command, want, DEADLINE)
}

pub fn expect_within(command: Command, want: i32, deadline: Duration) -> Outcome {
    let words: Vec<String> = command
        .get_args()
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    let outcome = start(command).finish(deadline);
    let (out, err) = (&outcome.out, &outcome.err);
    assert_eq!(
        outcome.code, want,
        "exit code of {words:?}\n--- stdout\n{out}\n--- stderr\n{err}"
    );
    outcome
}

/// Kills `rank` of a running job with SIGKILL.
pub fn kill_rank(run: &RunDir, rank: u64) {
    let spawn = events(&run.events(), "spawn")
        .into_iter()
        .rfind(|e| e["rank"] == rank)
        .expect("the rank was started");
    let pid = spawn["pid"]
        .as_i64()
        .and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.and_then(rustix::process::Pid::from_raw).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("the rank runs");
}

/// The lines of a JSONL file whose `event` is `event`.
pub fn events(file: &Path, event: &str) -> Vec<Value> {
    let text = fs_err::read_to_string(file).unwrap_or_default();
    let lines = text.lines().filter_map(|l| serde_json::from_str(l).ok());
    lines.filter(|v: &Value| v["event"] == event).collect()
}

pub fn json(file: &Path) -> Value {
    let text = fs_err::read_to_string(file).unwrap_or_else(|e| panic!("{e}"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

/// The numbers of a run without the steps a restart made void.
pub fn history(run: &RunDir) -> History {
    let history = History::read(&run.metrics()).unwrap_or_else(|e| panic!("{e:#}"));
    assert_eq!(history.broken_lines, 0);
    history
}

/// What a rank printed on stderr.
pub fn stderr_of(run: &RunDir, rank: u32) -> String {
    let file = run.log(&tsm_launch::manifest::host(), rank, true);
    fs_err::read_to_string(file).unwrap_or_else(|e| panic!("{e}"))
}

/// Panics unless `text` contains every one of `parts`.
pub fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

/// Processes that have `marker` (a folder of one test) among their arguments; a zombie has none.
pub fn survivors(marker: &Path) -> Vec<String> {
    let marker = marker.to_string_lossy().into_owned();
    let entries = fs_err::read_dir("/proc").expect("/proc").flatten();
    let command = |e: fs_err::DirEntry| {
        let command = fs_err::read(e.path().join("cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        command.contains(&marker).then_some(command)
    };
    entries.filter_map(command).collect()
}
