use super::*;
use tsm_job::config::DeviceKind;

fn machine(n: usize) -> Vec<Gpu> {
    (0..n)
        .map(|i| Gpu {
            id: i.to_string(),
            name: "H200".into(),
            uuid: format!("GPU-{i}"),
        })
        .collect()
}

fn ids(devices: Result<Devices, Coded>) -> Vec<String> {
    match devices.unwrap() {
        Devices::Gpus(gpus) => gpus.into_iter().map(|g| g.id).collect(),
        Devices::Cpu(n) => vec![format!("cpu x {n}")],
    }
}

fn shape<'a>(devices: &'a Devices, cores: &'a [usize]) -> Shape<'a> {
    Shape {
        devices,
        seat: Seat::alone(devices.len()),
        run_id: "demo",
        run_dir: Path::new("/r/demo"),
        host: "h",
        master_port: Some(4242),
        ras_port: Some(4243),
        resume_from: None,
        start_from: None,
        cores,
        parallelism: 8,
    }
}

fn value(worker: &WorkerPlan, name: &str) -> Option<String> {
    worker
        .env
        .iter()
        .find(|(n, _)| n == name)
        .map(|(_, v)| v.clone())
}

#[test]
fn the_command_line_wins_over_the_config() {
    let cpu = Launch {
        device: DeviceKind::Cpu,
        nproc_per_node: Some(3),
        ..Launch::default()
    };
    let gpu = Launch {
        nproc_per_node: Some(2),
        ..Launch::default()
    };
    let never = || -> Vec<Gpu> { panic!("GPUs must not be looked for") };
    assert_eq!(ids(devices(None, Some(2), Some(&gpu), never)), ["cpu x 2"]);
    assert_eq!(ids(devices(None, None, Some(&cpu), never)), ["cpu x 3"]);
    assert_eq!(
        ids(devices(None, None, Some(&gpu), || machine(4))),
        ["0", "1"]
    );
    assert_eq!(
        ids(devices(None, None, Some(&Launch::default()), || machine(4))).len(),
        4
    );
    assert_eq!(
        ids(devices(
            Some(&Gpus::List(vec![3, 1])),
            None,
            Some(&cpu),
            || machine(4)
        )),
        ["3", "1"]
    );
    assert_eq!(
        devices(None, None, None, never).unwrap_err().code,
        exit::USAGE
    );
}

#[test]
fn too_few_gpus_are_refused_with_the_numbers() {
    let refused = |gpus: Gpus, n| devices(Some(&gpus), None, None, || machine(n)).unwrap_err();
    let error = refused(Gpus::Count(8), 0);
    assert_eq!(error.code, exit::PREFLIGHT);
    assert!(
        error
            .message
            .starts_with("cannot start 8 workers: --gpus is 8, 0 GPUs are visible\n"),
        "{error}"
    );
    assert!(
        refused(Gpus::Count(2), 1)
            .message
            .contains("give --gpus 1;")
    );
    assert!(refused(Gpus::Auto, 0).message.contains("--cpus N"));
    assert!(
        refused(Gpus::List(vec![0, 4]), 4)
            .message
            .contains("there is no GPU 4")
    );
}

#[test]
fn the_environment_is_torchs_and_ours() {
    let gpus = Devices::Gpus(machine(4)[1..3].to_vec());
    let cores: Vec<usize> = (0..8).collect();
    let plan = workers(&shape(&gpus, &cores), |_| false);
    let one = &plan[1];
    for (name, expected) in [
        ("RANK", "1"),
        ("LOCAL_RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("GROUP_RANK", "0"),
        ("GROUP_WORLD_SIZE", "1"),
        ("ROLE_NAME", "default"),
        ("ROLE_RANK", "1"),
        ("ROLE_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "4242"),
        ("CUDA_VISIBLE_DEVICES", "1,2"),
        ("OMP_NUM_THREADS", "4"),
        ("NCCL_RAS_ADDR", "localhost:4243"),
        ("TORCHELASTIC_ERROR_FILE", "/r/demo/logs/h-1.error.json"),
        ("TSM_RUN_DIR", "/r/demo"),
    ] {
        assert_eq!(value(one, name).as_deref(), Some(expected), "{name}");
    }
    assert_eq!(
        (one.device.as_str(), one.cores.as_slice()),
        ("GPU 2 (H200)", &cores[4..])
    );
    let read = tsm_job::WorkerEnv::from_lookup(|name| value(one, name)).unwrap();
    assert_eq!(
        (read.rank, read.world_size, read.run_id.as_str()),
        (1, 2, "demo")
    );
}

/// What is set although it was inherited is refused in `--env`.
#[test]
fn all_that_the_launcher_sets_has_a_name() {
    let gpus = Devices::Gpus(machine(1));
    let mut shape = shape(&gpus, &[]);
    shape.resume_from = Some(Path::new("/r/demo"));
    shape.start_from = Some(Path::new("/r/old"));
    let plan = workers(&shape, |_| true);
    let set = plan[0].env.iter().map(|(name, _)| name.as_str());
    // Each worker gets its socket when it is started.
    let set: Vec<&str> = set.chain(["TSM_AGENT_FD"]).collect();
    assert_eq!(set, SET_VARIABLES.map(|(name, _)| name));
}

#[test]
fn what_the_user_set_stays() {
    let cpu = Devices::Cpu(16);
    let plan = workers(&shape(&cpu, &[0, 1]), |name| {
        name == "OMP_NUM_THREADS" || name == "GLOO_SOCKET_IFNAME"
    });
    assert_eq!(value(&plan[0], "OMP_NUM_THREADS"), None);
    assert_eq!(value(&plan[0], "GLOO_SOCKET_IFNAME"), None);
    assert_eq!(value(&plan[0], "NCCL_SOCKET_IFNAME").as_deref(), Some("lo"));
    assert_eq!(value(&plan[0], "CUDA_VISIBLE_DEVICES").as_deref(), Some(""));
    assert_eq!(
        value(&workers(&shape(&cpu, &[]), |_| false)[0], "OMP_NUM_THREADS").as_deref(),
        Some("1")
    );
    assert!(
        plan[0].cores.is_empty(),
        "16 ranks cannot each have one of 2 cores"
    );
}

#[test]
fn a_variable_of_another_job_is_found() {
    assert_eq!(stale_variable(|_| None), None);
    let found = stale_variable(|name| (name == "WORLD_SIZE").then(|| "8".into()));
    assert_eq!(found, Some(("WORLD_SIZE", "8".into())));
}

#[test]
fn the_plan_is_readable() {
    let cpu = Devices::Cpu(2);
    let shape = Shape {
        master_port: None,
        ..shape(&cpu, &[0, 1, 2, 3])
    };
    let text = describe(
        &shape,
        &workers(&shape, |_| false),
        &["a b".into(), "it's".into(), "--x=1".into()],
    );
    assert!(
        text.contains(r"command     'a b' 'it'\''s' --x=1"),
        "{text}"
    );
    assert!(text.contains("  MASTER_PORT=(a free port)\n"), "{text}");
    assert!(
        text.contains("rank 1: cpu, cores 2-3\n  RANK=1\n  LOCAL_RANK=1\n"),
        "{text}"
    );
    assert_eq!(text.matches("WORLD_SIZE=2").count(), 3, "{text}");
}
