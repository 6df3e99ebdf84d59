//! The all-reduce of `--preflight full`, with a double of the trainer: a job in a job, of which nothing is left.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;
use tsm_launch::cluster::key::Key;
use tsm_launch::cluster::message::Severity;
use tsm_launch::doctor::preflight::{GpuTask, Scale, all_reduce, own_gpus};
use tsm_launch::own::Executable;
use tsm_launch::plan::Devices;
use tsm_launch::port::Port;

use crate::harness::{DEADLINE, Running, Scene, alive, finish, start, survivors, until};

const LAUNCHER: &str = env!("CARGO_BIN_EXE_tsm-launch");

/// A trainer that does what `name` says, in the folder of this test.
fn trainer(scene: &Scene, name: &str) -> PathBuf {
    let double = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/launch/fake-all-reduce.sh");
    let path = scene.path(name);
    if !path.exists() {
        symlink(double, &path).unwrap();
    }
    path
}

fn alone(scene: &Scene, name: &str) -> GpuTask {
    let scale = Scale {
        trainer: Some(trainer(scene, name)),
        ..Scale::default()
    };
    let mut task = GpuTask::alone(Devices::Cpu(2), Executable::at(LAUNCHER.as_ref()), &scale);
    task.task.wait = DEADLINE;
    task
}

/// Two members of one group on this host, and the port at which they meet, held.
fn group(scene: &Scene, name: &str) -> ([GpuTask; 2], Port) {
    let held = Port::reserve().unwrap();
    let first = SocketAddr::from((Ipv4Addr::LOCALHOST, held.number));
    let second = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let key = Key::random();
    let tasks = [0, 1].map(|me| {
        let mut task = alone(scene, name);
        task.key = key.clone();
        task.devices = Devices::Cpu(1);
        task.task.members = vec![first, second];
        task.task.me = me;
        task
    });
    (tasks, held)
}

/// The second member begins when the first coordinates, as it does where only the first has the address.
fn measure_both([first, second]: [GpuTask; 2]) -> [Result<String, String>; 2] {
    let said = |task: GpuTask| move || all_reduce(&task).map(|m| format!("{m} {:?}", m.wrong));
    let lock = run_dir(&first).join("launcher.lock");
    thread::scope(|scope| {
        let first = scope.spawn(said(first));
        until("the first member", || {
            (lock.exists() || first.is_finished()).then_some(())
        });
        let second = scope.spawn(said(second));
        [first.join().unwrap(), second.join().unwrap()]
    })
}

/// The folder of the nested job.
fn run_dir(task: &GpuTask) -> PathBuf {
    let secret = task.key.derive(b"tsm all-reduce folder").to_line();
    std::env::temp_dir().join(format!("tsm-all-reduce-{}", &secret[..16]))
}

/// No process and no file.
fn nothing_is_left(scene: &Scene, task: &GpuTask) {
    let run_dir = run_dir(task);
    let name = run_dir.file_name().unwrap().to_string_lossy().into_owned();
    let left = fs_err::read_dir(std::env::temp_dir()).unwrap().flatten();
    let left: Vec<_> = left
        .filter(|e| e.file_name().to_string_lossy().starts_with(&name))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    until("all processes to end", || {
        (survivors(&run_dir).is_empty() && survivors(&scene.path("")).is_empty()).then_some(())
    });
}

#[test]
fn a_node_alone_is_measured() {
    let scene = Scene::new();
    let task = alone(&scene, "right");
    let measured = all_reduce(&task).unwrap();
    assert_eq!((measured.seconds, measured.gbit_s), (0.5, 24.0));
    assert_eq!(
        (measured.wrong, measured.round_trip),
        (None, Duration::ZERO)
    );
    nothing_is_left(&scene, &task);
}

#[test]
fn a_wrong_sum_is_a_measurement_and_a_dead_rank_is_none() {
    let scene = Scene::new();
    let wrong = all_reduce(&alone(&scene, "wrong")).unwrap().wrong;
    assert_eq!(
        wrong.as_deref(),
        Some("rank 1 on h (cpu): 1 of 2 sums are wrong")
    );
    let task = alone(&scene, "dies");
    let host = tsm_launch::manifest::host();
    assert_eq!(
        all_reduce(&task).unwrap_err(),
        format!("rank 1 on {host} (cpu): no GPU can be used: the driver is gone")
    );
    nothing_is_left(&scene, &task);
}

#[test]
fn the_trainer_hears_what_to_do() {
    let scene = Scene::new();
    let mut task = alone(&scene, "arguments");
    (task.task.bytes, task.task.budget) = (4099, Duration::from_millis(1500));
    task.task.wait = Duration::from_secs(40);
    assert_eq!(
        all_reduce(&task).unwrap().wrong.as_deref(),
        Some(
            "rank 0 on h (cpu): all-reduce --json --bytes 4096 --seconds 1.5 --timeout 30000ms in /, devices '', "
        )
    );
}

#[test]
fn a_measurement_that_takes_too_long_leaves_nothing() {
    let scene = Scene::new();
    let mut task = alone(&scene, "hangs");
    // Both ranks are killed in the middle, if they were started by then.
    task.task.wait = Duration::from_secs(1);
    let error = all_reduce(&task).unwrap_err();
    assert_eq!(error, "not done within 1s");
    nothing_is_left(&scene, &task);
}

#[test]
fn a_measurement_that_nobody_waits_for_leaves_nothing() {
    let scene = Scene::new();
    let task = alone(&scene, "hangs");
    let result = task.clone().start();
    let pids = scene.wait_for_pids("pid", 2);
    drop(result);
    until("the ranks to end", || {
        (!pids.iter().any(|&pid| alive(pid))).then_some(())
    });
    until("the folders to go", || {
        (!run_dir(&task).exists()).then_some(())
    });
    nothing_is_left(&scene, &task);
}

#[test]
fn two_members_measure_together() {
    let scene = Scene::new();
    let (tasks, _held) = group(&scene, "right");
    let first = tasks[0].clone();
    for said in measure_both(tasks) {
        assert_eq!(said.unwrap(), "24.00 Gbit/s None");
    }
    nothing_is_left(&scene, &first);
}

#[test]
fn of_two_members_the_first_names_the_rank_that_failed() {
    let scene = Scene::new();
    let (tasks, _held) = group(&scene, "dies");
    let task = tasks[0].clone();
    let [first, second] = measure_both(tasks).map(Result::unwrap_err);
    let host = tsm_launch::manifest::host();
    assert_eq!(
        first,
        format!("rank 1 on {host} (cpu): no GPU can be used: the driver is gone")
    );
    assert!(
        second.starts_with("a neighbour left: rank 1 failed first: exit code 69"),
        "{second}"
    );
    nothing_is_left(&scene, &task);
}

#[test]
fn a_member_without_a_trainer_says_so_and_the_other_misses_it() {
    let scene = Scene::new();
    let (mut tasks, _held) = group(&scene, "right");
    tasks[1].task.trainer = Some(scene.path("missing"));
    for task in &mut tasks {
        task.task.wait = Duration::from_secs(12);
    }
    let [first, second] = measure_both(tasks).map(Result::unwrap_err);
    assert!(first.starts_with("a neighbour left: 1 node"), "{first}");
    let missing = scene.path("missing");
    assert!(
        second.starts_with(&format!("cannot start {}", missing.display())),
        "{second}"
    );
}

fn doctor(scene: &Scene, name: &str) -> Running {
    let trainer = trainer(scene, name).display().to_string();
    let words = ["doctor", "--preflight", "full", "--cpus", "2", "--trainer"];
    let mut command = scene.command(&words);
    start(command.arg(trainer).env("TMPDIR", scene.path("")))
}

#[test]
fn the_doctor_tells_of_the_all_reduce() {
    let scene = Scene::new();
    let text = finish(doctor(&scene, "right")).out;
    let good = "all-reduce  2 ranks on the CPU (cpu): 3.0 GB/s bus bandwidth, every sum is right";
    assert!(text.contains(good), "{text}");
    let found = own_gpus(&alone(&scene, "dies"), || false).findings;
    assert_eq!(found[0].severity, Severity::Error);
    let bad = "the all-reduce over 2 ranks on the CPU failed: rank 1 on ";
    assert!(found[0].text.starts_with(bad), "{found:?}");
    assert!(
        found[0].hint.contains("all-reduce measures again"),
        "{found:?}"
    );
}

#[test]
fn nothing_survives_a_doctor_that_is_killed() {
    let scene = Scene::new();
    let doctor = doctor(&scene, "hangs");
    let pids = scene.wait_for_pids("pid", 2);
    // SIGKILL.
    drop(doctor);
    until("the ranks to end", || {
        (!pids.iter().any(|&pid| alive(pid))).then_some(())
    });
    until("all processes to end", || {
        survivors(&scene.path("")).is_empty().then_some(())
    });
}
