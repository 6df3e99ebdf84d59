//! Ranks under a real `mpirun`: the gradient engine against Gloo, and the trainer's ends.

mod common;

use common::{Net, Rank, TIMEOUT, batch, difference};
use fs_err as fs;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use tsm_data::demo::Demo;
use tsm_job::config::{BnBuffers, PrecisionMode};
use tsm_job::{RunDir, WorkerEnv, exit};
use tsm_torch_ext::dist::ReduceOp;
use tsm_trainer::ddp::{Peers, mpi};
use tsm_trainer::meter::History;

/// Far longer than anything here takes, so that only a hang reaches it.
const DEADLINE: Duration = Duration::from_secs(180);

/// Names the test whose rank a process is.
const RANK_OF: &str = "TSM_TEST_RANK_OF";
const RESULTS: &str = "TSM_TEST_RESULTS";

/// Open MPI's `mpirun` for `n` ranks on this host, without the program; `None`, with a word, where it
/// is missing. It keeps its files in `folder`.
fn mpirun(n: u32, folder: &Path) -> Option<Command> {
    let mut command = Command::new("mpirun");
    let version = command.arg("--version").output();
    if !version.is_ok_and(|v| String::from_utf8_lossy(&v.stdout).contains("Open MPI")) {
        eprintln!("skipped: there is no mpirun of Open MPI");
        return None;
    }
    let mut command = Command::new("mpirun");
    command.args([
        "--allow-run-as-root",
        "--oversubscribe",
        "--bind-to",
        "none",
    ]);
    // Containers forbid the one-copy path between processes, about which Open MPI would warn.
    command.args(["--mca", "btl_vader_single_copy_mechanism", "none"]);
    // Several that start and end at the same time take the common folder from each other.
    command.env("OMPI_MCA_orte_tmpdir_base", folder);
    command.args(["-n", &n.to_string()]);
    command.env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"] {
        command.env_remove(name);
    }
    Some(command)
}

fn rank_variables(get: impl Fn(&str) -> Option<String>, name: &str) -> Option<String> {
    match name {
        "RANK" | "LOCAL_RANK" => get("OMPI_COMM_WORLD_RANK"),
        "WORLD_SIZE" | "LOCAL_WORLD_SIZE" => get("OMPI_COMM_WORLD_SIZE"),
        "MASTER_ADDR" => Some("127.0.0.1".into()),
        "MASTER_PORT" => Some("0".into()),
        _ => None,
    }
}

/// Runs `f` on `n` ranks, each a process of its own that runs the calling test, `name`, again;
/// results by rank. `None` where there is no `mpirun`.
fn world<R: Serialize + DeserializeOwned>(
    name: &str,
    n: u32,
    timeout: Duration,
    f: impl FnOnce(Arc<Peers>) -> R,
) -> Option<Vec<R>> {
    let file = |folder: &Path, rank: u32| folder.join(rank.to_string());
    if std::env::var(RANK_OF).is_ok_and(|of| of == name) {
        let var = |name: &str| std::env::var(name).ok();
        let env = WorkerEnv::from_lookup(|name| rank_variables(var, name)).unwrap();
        let peers = Arc::new(mpi::join(&env, timeout).unwrap());
        let result = serde_json::to_vec(&f(peers.clone())).unwrap();
        let folder = PathBuf::from(var(RESULTS).unwrap());
        fs::write(file(&folder, env.rank), result).unwrap();
        peers.leave();
        std::process::exit(0);
    }
    let folder = tempfile::tempdir().unwrap();
    let mut command = mpirun(n, folder.path())?;
    command
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(RANK_OF, name)
        .env(RESULTS, folder.path());
    let outcome = Running::start(command, folder.path()).finish();
    assert_eq!(outcome.code, 0, "{}\n{}", outcome.out, outcome.err);
    let read =
        |rank| serde_json::from_slice(&fs::read(file(folder.path(), rank)).unwrap()).unwrap();
    Some((0..n).map(read).collect())
}

/// A program at work whose output goes to files; dropped while it runs (a failing test), it is ended
/// in order, so that `mpirun` takes its ranks along.
struct Running {
    child: Child,
    out: PathBuf,
    err: PathBuf,
    since: Instant,
}

struct Outcome {
    code: i32,
    out: String,
    err: String,
}

impl Running {
    fn start(mut command: Command, folder: &Path) -> Running {
        let (out, err) = (folder.join("stdout"), folder.join("stderr"));
        let file = |path| Stdio::from(fs::File::create(path).unwrap().into_parts().0);
        let child = command.stdout(file(&out)).stderr(file(&err)).spawn();
        Running {
            child: child.unwrap(),
            out,
            err,
            since: Instant::now(),
        }
    }

    /// Looks again and again until `look` finds something, as long as the program runs.
    fn until<T>(&mut self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        loop {
            if let Some(found) = look() {
                return found;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none() && self.since.elapsed() < DEADLINE,
                "no {what}; ended: {ended:?}\n{}",
                fs::read_to_string(&self.err).unwrap()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn finish(mut self) -> Outcome {
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                self.since.elapsed() < DEADLINE,
                "not ended after {DEADLINE:?}\n{}",
                fs::read_to_string(&self.err).unwrap()
            );
            std::thread::sleep(Duration::from_millis(5));
        };
        let signal = status.signal().map(|s| 128 + s);
        Outcome {
            code: status.code().or(signal).unwrap(),
            out: fs::read_to_string(&self.out).unwrap(),
            err: fs::read_to_string(&self.err).unwrap(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            signal(self.child.id(), rustix::process::Signal::TERM);
            let _ = self.child.wait();
        }
    }
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Ten steps of four clips a rank, in this rank's share of the same list.
fn ten_steps(peers: Arc<Peers>) -> Vec<Tensor> {
    let (rank, ranks) = (i64::from(peers.rank()), i64::from(peers.world_size()));
    // Sums within an operation must not depend on the test process's threads.
    tch::set_num_threads(1);
    let clips = 8 / ranks;
    let mut r = Rank::new(peers, PrecisionMode::Fp32);
    for step in 0..10 {
        r.step(&[batch(step * 8 + rank * clips, clips)], 0.05)
            .unwrap();
    }
    r.net.tensors()
}

fn numbers(tensors: &[Tensor]) -> Vec<Vec<f32>> {
    let flat = |t: &Tensor| Vec::try_from(t.detach().reshape(-1)).unwrap();
    tensors.iter().map(flat).collect()
}

#[test]
fn two_ranks_train_like_one_with_twice_the_batch() {
    let name = "two_ranks_train_like_one_with_twice_the_batch";
    let Some(got) = world(name, 2, TIMEOUT, |peers| numbers(&ten_steps(peers))) else {
        return;
    };
    let want = ten_steps(Arc::new(Peers::alone()));
    let start = difference(&Net::new().tensors(), &want);
    assert!(start > 1e-2, "the training must move the weights: {start}");
    for tensors in &got {
        let tensors: Vec<Tensor> = tensors
            .iter()
            .zip(&want)
            .map(|(t, like)| Tensor::from_slice(t).reshape_as(like))
            .collect();
        let error = difference(&tensors, &want);
        eprintln!("2 x 4 against 1 x 8 after 10 steps: {error:.2e}");
        assert!(error < 1e-5, "{error}");
    }
    // Two summands have one sum, in whatever order.
    let gloo = common::world(2, TIMEOUT, |peers| numbers(&ten_steps(peers)));
    assert!(got == gloo, "MPI and Gloo differ");
}

#[test]
fn ranks_stay_equal_to_the_last_bit() {
    let bits = world("ranks_stay_equal_to_the_last_bit", 4, TIMEOUT, |peers| {
        let rank = i64::from(peers.rank());
        let mut r = Rank::new(peers, PrecisionMode::Fp32);
        for step in 0..50 {
            r.step(&[batch(step * 8 + rank * 2, 2)], 0.05).unwrap();
        }
        r.net.bits()
    });
    let Some(bits) = bits else { return };
    assert_ne!(bits[0], Net::new().bits());
    assert!(bits.iter().all(|b| *b == bits[0]));
}

#[test]
fn every_collective_and_type() {
    let outcome = world("every_collective_and_type", 3, TIMEOUT, |peers| {
        let rank = i64::from(peers.rank());
        let cpu = |kind| (kind, Device::Cpu);
        // Counts.
        for kind in [
            Kind::Double,
            Kind::Int64,
            Kind::Int,
            Kind::Float,
            Kind::Half,
        ] {
            let t = Tensor::full([5], 2 * rank + 1, cpu(kind));
            peers.all_reduce(&t, ReduceOp::Sum, "sum").unwrap();
            assert_eq!(t, Tensor::full([5], 9, cpu(kind)), "{kind:?}");
            let t = Tensor::full([2, 3], rank, cpu(kind)).transpose(0, 1);
            peers.all_reduce(&t, ReduceOp::Max, "max").unwrap();
            assert_eq!(t, Tensor::full([3, 2], 2, cpu(kind)), "{kind:?}");
        }
        // No half holds the sum.
        for kind in [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
            let t = Tensor::full([], 60000.0, cpu(kind));
            let want = t.copy();
            peers.all_reduce(&t, ReduceOp::Avg, "mean").unwrap();
            assert!(t.allclose(&want, 1e-3, 0.0, false), "{kind:?} {t:?}");
        }
        // All kinds and strides from rank 1.
        let make = |rank: i64| {
            [
                Tensor::full([2, 3], rank, cpu(Kind::BFloat16)),
                Tensor::from(rank),
                Tensor::full([4], rank % 2, cpu(Kind::Bool)),
                (Tensor::arange(6, cpu(Kind::Float)).reshape([2, 3]) * rank).transpose(0, 1),
            ]
        };
        let list = make(rank + 1);
        peers.broadcast(&list, 1, "broadcast").unwrap();
        for (got, want) in list.iter().zip(make(2)) {
            assert_eq!(*got, want);
        }
        let gathered = peers.all_gather(&list_of(rank), "gather").unwrap();
        assert_eq!(gathered, [list_of(0), list_of(1), list_of(2)]);
        // BatchNorm's buffers, and the comparison of networks.
        let buffer = Tensor::full([2], rank as f64, cpu(Kind::Float));
        peers.sync_buffers([&buffer], BnBuffers::Mean).unwrap();
        let mean: Vec<f32> = Vec::try_from(&buffer).unwrap();
        let k = if rank == 2 { 7 } else { 5 };
        let other = Tensor::zeros([k, 4], cpu(Kind::Float));
        let text = peers
            .verify_same_shapes([("fc.weight", &other)], Device::Cpu)
            .unwrap_err();
        peers.barrier(TIMEOUT, "barrier").unwrap();
        (mean, text.to_string())
    });
    for (mean, text) in outcome.into_iter().flatten() {
        assert!(mean.iter().all(|m| (m - 1.0).abs() < 1e-6), "{mean:?}");
        let want = "rank 2 has another network than rank 0: fc.weight [5, 4] Float on rank 0, fc.weight [7, 4] Float on rank 2";
        assert!(text.starts_with(want), "{text}");
    }
}

fn list_of(rank: i64) -> Tensor {
    Tensor::from_slice(&[rank, -rank, 7])
}

#[test]
fn half_gradients_have_the_mean_of_float_gradients() {
    let name = "half_gradients_have_the_mean_of_float_gradients";
    let losses = world(name, 2, TIMEOUT, |peers| {
        let rank = i64::from(peers.rank());
        let mut r = Rank::new(peers, PrecisionMode::O2);
        (0..30)
            .map(|_| r.step(&[batch(rank * 4, 4)], 0.05).unwrap())
            .collect::<Vec<f64>>()
    });
    let Some(losses) = losses else { return };
    let mut alone = Rank::new(Arc::new(Peers::alone()), PrecisionMode::Fp32);
    for (a, b) in losses[0].iter().zip(&losses[1]) {
        let want = alone.step(&[batch(0, 8)], 0.05).unwrap();
        let got = (a + b) / 2.0;
        // As for o2 in the tests of the engine.
        assert!((got - want).abs() / want < 0.01, "{got} {want}");
    }
    assert_eq!(losses[0].len(), 30);
}

#[test]
fn a_rank_that_does_not_come_is_named_with_the_operation() {
    let name = "a_rank_that_does_not_come_is_named_with_the_operation";
    let texts = world(name, 2, TIMEOUT, |peers| {
        let verdict = PathBuf::from(std::env::var(RESULTS).unwrap()).join("verdict");
        if peers.rank() == 1 {
            while !verdict.exists() {
                std::thread::sleep(Duration::from_millis(5));
            }
            // The one that rank 0 still has in flight.
            peers.barrier(TIMEOUT, "late barrier").unwrap();
            return None;
        }
        let error = peers.barrier(Duration::from_secs(1), "barrier at the end");
        fs::write(verdict, "").unwrap();
        let error = error.unwrap_err();
        Some((exit::code_of(&error), error.to_string()))
    });
    let Some(texts) = texts else { return };
    let (code, text) = texts[0].as_ref().unwrap();
    eprintln!("{text}");
    assert_eq!(*code, exit::PEER);
    assert!(
        text.starts_with("rank 1 is gone or stuck: barrier at the end failed on rank 0 after 1."),
        "{text}"
    );
    assert!(
        text.contains("MPI_Ibarrier did not end within 1s"),
        "{text}"
    );
}

/// A folder with a small data set, and the trainings in it.
struct Scene(tempfile::TempDir);

impl Scene {
    fn new() -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let demo = Demo {
            train: 96,
            val: 8,
            size: 32,
            frames: 12,
            seed: 0,
        };
        demo.make(&folder.path().join("motion")).unwrap();
        Scene(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The trainer's words for the demo made small: 12 steps of 8 clips on 2 ranks.
    fn words(&self, overrides: &[&str]) -> Vec<String> {
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/demo.yaml");
        let data = self.path("motion");
        let path = |key: &str, name: &str| format!("data.{key}={}", data.join(name).display());
        let mut words = vec!["--config".into(), config.display().to_string()];
        words.extend([
            path("root", ""),
            path("train_list", "train.txt"),
            path("val_list", "val.txt"),
            path("class_names", "classes.txt"),
        ]);
        let small = [
            "model.num_segments=4",
            "data.train.size=32",
            "data.val.short_side=32",
            "data.val.size=32",
            "train.batch_per_rank=4",
            "train.epochs=1",
            "train.log_every=1",
        ];
        words.extend(small.iter().chain(overrides).map(|w| (*w).to_owned()));
        words
    }

    /// The trainer under `mpirun`, its run in the folder `run`.
    fn under_mpi(&self, ranks: u32, run: &str, overrides: &[&str]) -> Option<Running> {
        let mut command = mpirun(ranks, self.0.path())?;
        // The environment that a worker reads, out of Open MPI's.
        let adopt = "export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE \
             LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK LOCAL_WORLD_SIZE=$OMPI_COMM_WORLD_LOCAL_SIZE \
             MASTER_ADDR=127.0.0.1 MASTER_PORT=0; exec \"$0\" \"$@\"";
        command
            .args(["sh", "-c", adopt, env!("CARGO_BIN_EXE_tsm-trainer")])
            .args(self.words(overrides))
            .arg("launch.collectives=mpi")
            .env("TSM_RUN_DIR", self.path(run))
            .current_dir(self.0.path());
        Some(Running::start(command, self.0.path()))
    }

    fn history(&self, run: &str) -> History {
        History::read(&RunDir::new(self.path(run)).metrics()).unwrap()
    }

    /// Waits for three steps of `run` and gives the process of `rank`.
    fn rank_at_work(&self, running: &mut Running, run: &str, rank: u32) -> u32 {
        let metrics = RunDir::new(self.path(run)).metrics();
        running.until("third step", || {
            let history = History::read(&metrics).ok()?;
            (history.steps.len() >= 3).then_some(())
        });
        let variable = format!("RANK={rank}");
        let pid = self.processes().into_iter().find(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|b| *b == 0)
                .any(|v| v == variable.as_bytes())
        });
        pid.expect("the rank runs")
    }

    /// Processes with this folder among their arguments; a zombie has none.
    fn processes(&self) -> Vec<u32> {
        let marker = self.0.path().to_str().unwrap();
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pid = |e: fs::DirEntry| {
            let pid = e.file_name().to_str()?.parse().ok()?;
            let words = fs::read(e.path().join("cmdline")).ok()?;
            String::from_utf8_lossy(&words)
                .contains(marker)
                .then_some(pid)
        };
        entries.filter_map(pid).collect()
    }

    fn assert_all_gone(&self) {
        assert_eq!(self.processes(), [] as [u32; 0]);
    }
}

/// The same job over Gloo, its ranks started by hand.
fn over_gloo(scene: &Scene, run: &str) {
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let start = |rank: u32| {
        let folder = scene.path(&format!("gloo-{rank}"));
        fs::create_dir(&folder).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tsm-trainer"));
        command
            .args(scene.words(&[]))
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", "2")
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string())
            .env("OMP_NUM_THREADS", "1")
            .env("TSM_RUN_DIR", scene.path(run))
            .current_dir(scene.path("."));
        Running::start(command, &folder)
    };
    for rank in [0, 1].map(start) {
        let outcome = rank.finish();
        assert_eq!(outcome.code, exit::OK, "{}", outcome.err);
    }
}

#[test]
fn the_trainer_trains_as_over_gloo() {
    let scene = Scene::new();
    let Some(running) = scene.under_mpi(2, "mpi", &[]) else {
        return;
    };
    let outcome = running.finish();
    assert_eq!(outcome.code, exit::OK, "{}\n{}", outcome.out, outcome.err);
    assert_eq!(outcome.err, "", "an orderly end says nothing");
    scene.assert_all_gone();
    over_gloo(&scene, "gloo");
    let losses = |run: &str| -> Vec<Option<f64>> {
        let history = scene.history(run);
        let validation = history.validations.last().unwrap();
        assert_eq!(validation.num_clips, 8);
        let steps = history.steps.iter().map(|s| s.loss);
        steps.chain([validation.loss, validation.top1]).collect()
    };
    let (mpi, gloo) = (losses("mpi"), losses("gloo"));
    assert_eq!(mpi.len(), 12 + 2);
    assert_eq!(mpi, gloo);
}

#[test]
fn a_killed_rank_ends_the_job_with_its_signal() {
    let scene = Scene::new();
    let Some(mut running) = scene.under_mpi(3, "killed", &["train.epochs=1000"]) else {
        return;
    };
    let pid = scene.rank_at_work(&mut running, "killed", 1);
    signal(pid, rustix::process::Signal::KILL);
    let outcome = running.finish();
    assert_eq!(outcome.code, 128 + 9, "{}", outcome.err);
    scene.assert_all_gone();
}

#[test]
fn a_hung_rank_ends_the_job_after_the_collective_timeout() {
    let scene = Scene::new();
    let overrides = ["train.epochs=1000", "launch.collective_timeout=5s"];
    let Some(mut running) = scene.under_mpi(3, "hung", &overrides) else {
        return;
    };
    let pid = scene.rank_at_work(&mut running, "hung", 1);
    signal(pid, rustix::process::Signal::STOP);
    let outcome = running.finish();
    assert_eq!(outcome.code, exit::PEER, "{}", outcome.err);
    let line = outcome
        .err
        .lines()
        .find(|l| l.starts_with("error: rank "))
        .unwrap_or_else(|| panic!("{}", outcome.err));
    eprintln!("{line}");
    for part in [
        "rank 1 is gone or stuck: ",
        " did not end within 5s",
        "MPI_I",
    ] {
        assert!(line.contains(part), "{line}");
    }
    scene.assert_all_gone();
}

#[test]
fn the_exit_code_of_the_first_error_survives_mpirun() {
    let scene = Scene::new();
    // One clip that one of the ranks meets in its course.
    let list = fs::read_to_string(scene.path("motion/train.txt")).unwrap();
    let broken = list.lines().next().unwrap().split(' ').next().unwrap();
    fs::remove_dir_all(scene.path("motion").join(broken)).unwrap();
    let Some(running) = scene.under_mpi(2, "broken", &["train.epochs=1000"]) else {
        return;
    };
    let outcome = running.finish();
    assert_eq!(outcome.code, exit::DATA, "{}", outcome.err);
    let errors: Vec<&str> = outcome
        .err
        .lines()
        .filter(|l| l.starts_with("error: rank "))
        .collect();
    assert!(
        errors.len() == 1 && errors[0].contains(broken),
        "{}",
        outcome.err
    );
    scene.assert_all_gone();
}

/// One rank of two without `mpirun`, in `environment`.
fn refused(environment: &[(&str, &str)]) -> (i32, String) {
    let scene = Scene::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tsm-trainer"));
    command
        .args(scene.words(&["launch.collectives=mpi"]))
        .env("RANK", "0")
        .env("WORLD_SIZE", "2")
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", "0")
        .env("TSM_RUN_DIR", scene.path("run"))
        .envs(environment.iter().copied());
    let outcome = Running::start(command, scene.0.path()).finish();
    (outcome.code, outcome.err)
}

#[test]
fn ranks_that_mpi_did_not_number_are_refused() {
    let (code, text) = refused(&[]);
    assert_eq!(code, exit::USAGE, "{text}");
    assert!(
        text.contains("MPI did not start this process") && text.contains("mpirun -n 2"),
        "{text}"
    );
    let (code, text) = refused(&[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "4")]);
    assert_eq!(code, exit::USAGE, "{text}");
    let want = "rank 0 of 2 by its environment and rank 1 of 4 by MPI";
    assert!(text.contains(want), "{text}");
}
