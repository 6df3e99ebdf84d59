//! A real SLURM cluster of four nodes on this machine, by `tests/slurm-cluster/cluster.sh`.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use tsm_launch::start::slurm::{Job, JobId, Slurm};

pub const SCRIPT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../tests/slurm-cluster/cluster.sh"
);

/// Far longer than anything takes, so that only a hang reaches it, also on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// Four nodes, `n1` to `n4`, of 4 cores and 8 (pretended) GPUs each; partitions `low` and `high`.
pub struct Cluster {
    dir: tempfile::TempDir,
    keeper: Child,
    /// The script stops the cluster when this closes, also when the test is killed.
    hold: Option<ChildStdin>,
}

impl Cluster {
    /// The cluster that all tests of this program share, started by the first of them and stopped behind
    /// the last; `None`, said on stderr, where none can run.
    pub fn shared() -> Option<Arc<Cluster>> {
        static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(cluster) = shared.upgrade() {
            return Some(cluster);
        }
        let cluster = Arc::new(Cluster::start()?);
        *shared = Arc::downgrade(&cluster);
        Some(cluster)
    }

    /// A cluster of one's own.
    ///
    /// # Panics
    /// When it could run here and does not.
    pub fn start() -> Option<Cluster> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut keeper = Command::new(SCRIPT)
            .arg("hold")
            .arg(dir.path().join("slurm"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("bash starts");
        let hold = keeper.stdin.take();
        let mut said = BufReader::new(keeper.stdout.take().expect("a pipe"));
        let mut line = String::new();
        said.read_line(&mut line).expect("readable");
        if line.trim() == "ready" {
            return Some(Cluster { dir, keeper, hold });
        }
        let _ = said.read_to_string(&mut line);
        let status = keeper.wait().expect("waitable");
        assert_eq!(
            status.code(),
            Some(77),
            "the cluster does not start: {line}"
        );
        eprintln!("{}", line.trim());
        None
    }

    fn conf(&self) -> String {
        self.dir
            .path()
            .join("slurm/slurm.conf")
            .to_string_lossy()
            .into_owned()
    }

    /// SLURM's commands, for this cluster.
    pub fn slurm(&self) -> Slurm {
        Slurm::default().env("SLURM_CONF", &self.conf())
    }

    /// A folder for files of the tests that all nodes see.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A command of this cluster, in [`Self::path`], as from a login shell: in no job.
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.slurm().command(program);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("SLURM_")
                || name.starts_with("SBATCH_")
                || name.starts_with("SRUN_")
            {
                command.env_remove(&*name);
            }
        }
        command
            .env("SLURM_CONF", self.conf())
            .current_dir(self.path())
            .stdin(Stdio::null());
        command
    }

    /// What a command prints.
    ///
    /// # Panics
    /// When it fails.
    pub fn output(&self, program: &str, args: &[&str]) -> String {
        let output = self
            .command(program)
            .args(args)
            .output()
            .unwrap_or_else(|e| panic!("{program}: {e}"));
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{program} {args:?}: {}\n{err}",
            output.status
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Submits a script (its text) with more options; its output lies in [`Self::job_output`].
    pub fn sbatch(&self, options: &[&str], script: &str) -> JobId {
        let file = tempfile::NamedTempFile::with_prefix_in("job", self.path()).expect("a file");
        fs_err::write(file.path(), script).expect("writable");
        let path = file.path().to_string_lossy().into_owned();
        let mut args = vec!["--parsable", "--output=%j.out"];
        args.extend(options);
        args.push(&path);
        let id = self
            .output("sbatch", &args)
            .trim()
            .parse()
            .expect("a job's number");
        JobId { id, array: None }
    }

    pub fn job_output(&self, job: JobId) -> String {
        fs_err::read_to_string(self.path().join(format!("{job}.out"))).unwrap_or_default()
    }

    pub fn job(&self, job: JobId) -> Job {
        self.slurm().job(job).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Waits until the job is over; its state and exit code.
    pub fn wait(&self, job: JobId) -> Job {
        let over = [
            "COMPLETED",
            "FAILED",
            "CANCELLED",
            "TIMEOUT",
            "NODE_FAIL",
            "PREEMPTED",
        ];
        self.until(&format!("the end of job {job}"), || {
            Some(self.job(job)).filter(|j| over.contains(&j.state.as_str()))
        })
    }

    /// Looks again and again until `look` finds something.
    pub fn until<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            if start.elapsed() > DEADLINE {
                let queue = self.output("squeue", &[]);
                panic!("waited {DEADLINE:?} for {what}\n{queue}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Where a job finds a file of the repository.
    pub fn repository(&self, path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.hold = None;
        let status = self.keeper.wait();
        if !std::thread::panicking() {
            assert!(
                status.is_ok_and(|s| s.success()),
                "the cluster does not stop"
            );
        }
    }
}
