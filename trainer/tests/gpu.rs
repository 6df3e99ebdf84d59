//! The trainer on a CUDA device: `cargo test --release -p tsm-trainer --test gpu -- --ignored`.
//!
//! With `TSM_GPU_CHECK_CPU=1` the same tests run on the CPU, so that their own logic can be checked
//! where there is no GPU.

mod common;

use common::{difference, formula};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tch::{Device, Kind, Tensor};
use tsm_job::config::{Arch, DeviceKind, PrecisionMode, ShiftMode};
use tsm_job::{Config, WorkerEnv};
use tsm_torch_ext::cuda;
use tsm_torch_ext::dist::{ProcessGroup, ReduceOp, Store};
use tsm_torch_ext::ops::{Flags, ShiftPattern, set_flags, temporal_shift, to_channels_last};
use tsm_trainer::all_reduce::{Pattern, measure};
use tsm_trainer::checkpoint::{Checkpoints, FORMAT, Meta, Snapshot, find, section};
use tsm_trainer::ddp::Peers;
use tsm_trainer::model::Network;
use tsm_trainer::train::{Place, Stepper};

const LIMIT: Duration = Duration::from_secs(120);
const CLIPS: i64 = 8;
const SEGMENTS: i64 = 4;
const SIZE: i64 = 32;
const CLASSES: i64 = 4;

/// libtorch's flags are the whole process's: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn on_cpu() -> bool {
    std::env::var("TSM_GPU_CHECK_CPU").is_ok_and(|v| v == "1")
}

/// The device under test.
fn device() -> Device {
    if on_cpu() {
        return Device::Cpu;
    }
    let info = cuda::load_cuda().expect("CUDA's libraries");
    assert!(
        info.device_count > 0,
        "no CUDA device: {:?}",
        info.no_device
    );
    Device::Cuda(0)
}

fn config(mode: PrecisionMode, loss_scale: Option<f64>) -> Config {
    let mut config = Config::template();
    config.launch.device = if on_cpu() {
        DeviceKind::Cpu
    } else {
        DeviceKind::Gpu
    };
    config.launch.collective_timeout = LIMIT;
    config.model.arch = Arch::Resnet18;
    config.model.width = 0.25;
    config.model.num_classes = CLASSES as u32;
    config.model.num_segments = SEGMENTS as u32;
    config.model.shift.mode = ShiftMode::Bi;
    config.model.head.dropout = 0.0;
    config.data.train.size = SIZE as u32;
    config.train.batch_per_rank = CLIPS as u32;
    config.train.channels_last = true;
    config.train.precision.mode = mode;
    config.train.precision.loss_scale = loss_scale;
    config.optim.momentum = 0.9;
    config.optim.max_grad_norm = Some(20.0);
    config
}

fn stepper(config: &Config, place: &Place) -> Stepper {
    let network = Network::new(&config.model, place.device, 0).unwrap();
    Stepper::new(config, place, network).unwrap()
}

/// A rank alone on `device`, in float32 without TF32, so that devices can be compared.
fn exact(device: Device) -> Place {
    set_flags(Flags {
        cudnn_benchmark: false,
        deterministic: true,
        allow_tf32: false,
    })
    .unwrap();
    Place {
        device,
        threads: 1,
        peers: Arc::new(Peers::alone()),
    }
}

/// Clips `from..from + n`: a class is a direction in which a brighter column moves.
fn clips(from: i64, n: i64, device: Device) -> (Tensor, Tensor) {
    let mut frames = formula(&[n, SEGMENTS, 3, SIZE, SIZE], 50.0 + from as f64) * 0.3;
    let labels: Vec<i64> = (from..from + n).map(|i| i % CLASSES).collect();
    for (i, label) in labels.iter().enumerate() {
        for t in 0..SEGMENTS {
            let at = (SIZE / 2 + (label - CLASSES / 2) * 3 * t).rem_euclid(SIZE - 4);
            let _ = frames
                .get(i as i64)
                .get(t)
                .narrow(2, at, 4)
                .g_add_scalar_(2.0);
        }
    }
    frames = to_channels_last(&frames.view([n * SEGMENTS, 3, SIZE, SIZE])).unwrap();
    (
        frames.to_device(device),
        Tensor::from_slice(&labels).to_device(device),
    )
}

fn step(stepper: &mut Stepper, batch: &(Tensor, Tensor), lr: f64) -> f64 {
    stepper.begin().unwrap();
    let out = stepper
        .micro_step(&batch.0, &batch.1, CLIPS as u64, true)
        .unwrap();
    stepper.update(lr).unwrap();
    out.loss.double_value(&[])
}

fn params(stepper: &Stepper) -> Vec<Tensor> {
    stepper
        .network
        .params()
        .iter()
        .map(|p| p.tensor.detach().to_device(Device::Cpu))
        .collect()
}

#[test]
#[ignore = "needs a CUDA device"]
fn every_precision_mode_learns() {
    let _one = alone();
    for (mode, loss_scale) in [
        (PrecisionMode::Fp32, None),
        (PrecisionMode::Bf16, None),
        (PrecisionMode::Fp16, None),
        (PrecisionMode::O2, None),
        (PrecisionMode::O2, Some(128.0)),
    ] {
        let config = config(mode, loss_scale);
        let place = Place::new(&config, &WorkerEnv::from_lookup(|_| None).unwrap()).unwrap();
        assert_eq!(place.device, device());
        let mut stepper = stepper(&config, &place);
        let batch = clips(0, CLIPS, place.device);
        let losses: Vec<f64> = (0..24).map(|_| step(&mut stepper, &batch, 0.02)).collect();
        eprintln!("{mode:?} {loss_scale:?}: {losses:.3?}");
        assert!(losses.iter().all(|l| l.is_finite()), "{mode:?}: {losses:?}");
        let (first, last) = (losses[0], losses[23]);
        assert!(
            (first - (CLASSES as f64).ln()).abs() < 0.2,
            "{mode:?} starts at chance: {first}"
        );
        assert!(
            last < 0.5 * first,
            "{mode:?} {loss_scale:?}: loss {first} to {last}"
        );
        let logits = stepper.evaluate(&batch.0);
        assert_eq!(
            (logits.kind(), logits.size()),
            (Kind::Float, vec![CLIPS, CLASSES])
        );
    }
}

// Both sides sum in float32 in their own order. Two memory formats on one CPU differ by 2e-7 in the loss and
// 2e-6 in the parameters; cuDNN may choose Winograd's sums, a hundred times coarser. TF32 or a wrong
// formula, scale or layout is above the limits.
#[test]
#[ignore = "needs a CUDA device"]
fn fp32_agrees_with_the_cpu() {
    let _one = alone();
    let config = config(PrecisionMode::Fp32, None);
    // On the CPU alone the other memory format stands for the other device: other kernels, other sums.
    let mut other = config.clone();
    other.train.channels_last = !on_cpu();
    let mut sides = [(device(), &other), (Device::Cpu, &config)].map(|(device, config)| {
        let place = exact(device);
        (stepper(config, &place), clips(0, CLIPS, device))
    });
    let mut first = 0.0;
    for i in 0..5 {
        let [ours, cpu] = [0, 1].map(|s| {
            let (stepper, batch) = &mut sides[s];
            step(stepper, batch, 0.005)
        });
        eprintln!("step {i}: loss {ours} on the device, {cpu} on the CPU");
        let limit = if i == 0 { 1e-4 } else { 1e-3 };
        if i == 0 {
            first = cpu;
        }
        assert!(
            (ours - cpu).abs() <= limit * first,
            "step {i}: {ours} against {cpu}"
        );
        if i == 0 {
            let worst = difference(&params(&sides[0].0), &params(&sides[1].0));
            eprintln!("parameters after a step differ by {worst:e}");
            assert!(worst < 1e-3, "after one step: {worst}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_shift_and_its_gradient_equal_the_cpus_bit_for_bit() {
    let _one = alone();
    let device = device();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        for nhwc in [false, true] {
            // Folds of 8, 3 and 1 channels: all widths of the kernel's loads.
            for (c, fold) in [(64, 8), (24, 3), (9, 1)] {
                let make = |seed: f64| {
                    let x = formula(&[2 * SEGMENTS, c, 7, 5], seed).to_kind(kind);
                    if nhwc {
                        to_channels_last(&x).unwrap()
                    } else {
                        x
                    }
                };
                let run = |device: Device| {
                    let x = make(1.0).to_device(device).set_requires_grad(true);
                    let y = temporal_shift(&x, SEGMENTS, fold, ShiftPattern::Bi, false).unwrap();
                    (&y * make(2.0).to_device(device))
                        .sum(Kind::Float)
                        .backward();
                    [y.detach(), x.grad()].map(|t| t.to_device(Device::Cpu))
                };
                let (ours, cpu) = (run(device), run(Device::Cpu));
                let case = format!("{kind:?} c {c} fold {fold} nhwc {nhwc}");
                assert!(ours[0].equal(&cpu[0]), "forward, {case}");
                assert!(ours[1].equal(&cpu[1]), "backward, {case}");
                assert!(
                    f64::try_from(cpu[1].abs().sum(Kind::Float)).unwrap() > 1.0,
                    "{case}"
                );
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_checkpoint_moves_between_devices() {
    let _one = alone();
    let config = config(PrecisionMode::Fp32, None);
    let folder = tempfile::tempdir().unwrap();
    for (from, to) in [(device(), Device::Cpu), (Device::Cpu, device())] {
        let mut saved = stepper(&config, &exact(from));
        for _ in 0..3 {
            step(&mut saved, &clips(0, CLIPS, from), 0.02);
        }
        let folder = folder.path().join(format!("{from:?}"));
        Checkpoints::open(&folder, 1)
            .unwrap()
            .save(&snapshot(&saved, &config), false)
            .unwrap();

        let mut loaded = stepper(&config, &exact(to));
        let found = find(&folder).unwrap().snapshot;
        let network = &loaded.network;
        found
            .restore(section::MODEL, network.named_params())
            .unwrap();
        found
            .restore(section::BUFFER, network.named_buffers())
            .unwrap();
        loaded
            .sgd
            .import(
                &found.section(section::MOMENTUM),
                &found.section(section::MASTER),
            )
            .unwrap();

        for (a, b) in params(&saved).iter().zip(&params(&loaded)) {
            assert!(
                a.equal(b),
                "{from:?} to {to:?}: a parameter changed on the way"
            );
        }
        let logits = [(&saved, from), (&loaded, to)]
            .map(|(s, d)| s.evaluate(&clips(0, CLIPS, d).0).to_device(Device::Cpu));
        let worst = difference(&logits[..1], &logits[1..]);
        assert!(
            worst < 1e-3,
            "logits of {from:?} and {to:?} differ by {worst}"
        );
        // Only the restored momentum makes the next step the same.
        step(&mut saved, &clips(0, CLIPS, from), 0.02);
        step(&mut loaded, &clips(0, CLIPS, to), 0.02);
        let worst = difference(&params(&loaded), &params(&saved));
        assert!(worst < 5e-3, "the step after the resume differs by {worst}");
    }
}

fn snapshot(stepper: &Stepper, config: &Config) -> Snapshot {
    let mut snapshot = Snapshot::new(Meta {
        format: FORMAT,
        run_id: "gpu".into(),
        epoch: 0,
        step: 3,
        step_in_epoch: 3,
        clips_in_epoch: Some(3 * CLIPS as u64),
        num_clips: Some(96),
        samples_seen: 3 * CLIPS as u64,
        global_batch: CLIPS as u64,
        world_size: 1,
        seed: 0,
        loss_scale: None,
        best_top1: None,
        best_epoch: 0,
        class_names: Vec::new(),
        model: config.model.clone(),
        torch: tsm_torch_ext::ops::libtorch_version(),
    });
    let network = &stepper.network;
    snapshot.put(section::MODEL, network.named_params());
    snapshot.put(section::BUFFER, network.named_buffers());
    snapshot.put(section::MOMENTUM, stepper.sgd.momenta());
    snapshot
}

#[test]
#[ignore = "needs a CUDA device"]
fn one_rank_runs_every_collective_of_the_trainer() {
    let _one = alone();
    let device = device();
    let store = Store::tcp("127.0.0.1", 0, 1, true, LIMIT).unwrap();
    let group = match device {
        Device::Cuda(index) => ProcessGroup::nccl(&store, 0, 1, index, LIMIT),
        _ => ProcessGroup::gloo(&store, 0, 1, "lo", LIMIT, 2),
    }
    .unwrap();
    group.barrier(LIMIT).unwrap();
    // The step log and the validation counts are f64, the digest of the network is bytes.
    for kind in [Kind::Double, Kind::Float, Kind::Half] {
        let t = Tensor::full([1000], 3.0, (kind, device));
        group.all_reduce(&t, ReduceOp::Sum).unwrap();
        assert_eq!(t.double_value(&[999]), 3.0, "{kind:?}");
    }
    let bytes = Tensor::from_slice(&[7u8; 32]).to_device(device);
    let all = group.all_gather(&bytes).unwrap();
    assert!(all.len() == 1 && all[0].equal(&bytes));
    let mixed = [
        Tensor::ones([3], (Kind::Half, device)),
        Tensor::ones([5], (Kind::Int64, device)),
        bytes,
    ];
    group.broadcast(&mixed, 0).unwrap();
    group.shutdown().unwrap();
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_sum_on_the_device_is_filled_and_checked() {
    let _one = alone();
    let device = device();
    let measured = measure(&Peers::alone(), device, 1 << 20, Duration::ZERO).unwrap();
    assert_eq!((measured.rounds, measured.wrong), (1, None));
    let numel = 1 << 18;
    let data = Tensor::zeros([numel], (Kind::Float, device));
    let [first, second] = [0, 1].map(|rank| Pattern::new(rank, 2, numel, device).unwrap());
    first.fill(&data, 9).unwrap();
    let sum = data.copy();
    second.fill(&data, 9).unwrap();
    let sum = sum + &data;
    assert_eq!(first.difference(&sum, 9).unwrap(), None);
    let _ = sum.get(numel - 1).g_add_scalar_(1.0);
    let text = first.difference(&sum, 9).unwrap().unwrap();
    assert!(
        text.starts_with("1 of 262144 sums of round 9 are wrong; number 262143 is "),
        "{text}"
    );
}

/// Two processes on one card: NCCL takes two ranks on a GPU for a mistake unless they say that they
/// are on different hosts.
#[test]
#[ignore = "needs a CUDA device"]
fn two_ranks_on_one_card_train_like_one_rank_with_two_micro_steps() {
    if std::env::var_os("RANK").is_some() {
        return one_of_two_ranks();
    }
    let _one = alone();
    let port = TcpListener::bind(("127.0.0.1", 0))
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let spawn = |rank: u32| -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "--nocapture",
                "two_ranks_on_one_card_train_like_one_rank_with_two_micro_steps",
            ])
            .envs([
                ("RANK", rank.to_string()),
                ("NCCL_HOSTID", format!("rank{rank}")),
                ("MASTER_PORT", port.to_string()),
            ])
            .envs([
                ("WORLD_SIZE", "2"),
                ("LOCAL_RANK", "0"),
                ("LOCAL_WORLD_SIZE", "1"),
                ("MASTER_ADDR", "127.0.0.1"),
            ])
            .envs([
                ("NCCL_MNNVL_ENABLE", "0"),
                // Both would listen on the same port for the status service.
                ("NCCL_RAS_ENABLE", "0"),
                ("NCCL_SOCKET_IFNAME", "lo"),
                ("NCCL_MAX_CTAS", "1"),
                ("GLOO_SOCKET_IFNAME", "lo"),
            ])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let outputs = [spawn(0), spawn(1)].map(|child| child.wait_with_output().unwrap());
    for (rank, output) in outputs.iter().enumerate() {
        let said = [&output.stdout[..], &output.stderr]
            .map(String::from_utf8_lossy)
            .concat();
        assert!(
            output.status.success(),
            "rank {rank}: {}\n{said}",
            output.status
        );
        assert!(
            said.contains("1 passed"),
            "rank {rank} ran nothing:\n{said}"
        );
    }
}

fn one_of_two_ranks() {
    const HALF: i64 = CLIPS / 2;
    let config = config(PrecisionMode::Fp32, None);
    let env = WorkerEnv::from_process().unwrap();
    let place = Place::new(&config, &env).unwrap();
    set_flags(Flags {
        cudnn_benchmark: false,
        deterministic: true,
        allow_tf32: false,
    })
    .unwrap();
    let mut ours = stepper(&config, &place);
    let own = clips(i64::from(env.rank) * HALF, HALF, place.device);
    // The same clips in one process, a rank's batch as a micro step: BatchNorm sees the same batches.
    let mut reference = stepper(&config, &exact(place.device));
    let micro = [0, HALF].map(|from| clips(from, HALF, place.device));
    for _ in 0..3 {
        ours.begin().unwrap();
        ours.micro_step(&own.0, &own.1, CLIPS as u64, true).unwrap();
        ours.update(0.02).unwrap();
        reference.begin().unwrap();
        for (i, (x, y)) in micro.iter().enumerate() {
            reference.micro_step(x, y, CLIPS as u64, i == 1).unwrap();
        }
        reference.update(0.02).unwrap();
    }
    let flat = |s: &Stepper| {
        let all: Vec<Tensor> = s
            .network
            .params()
            .iter()
            .map(|p| p.tensor.detach().reshape([-1]))
            .collect();
        Tensor::cat(&all, 0)
    };
    let all = place
        .peers
        .all_gather(&flat(&ours), "comparison of the parameters")
        .unwrap();
    assert!(
        all.len() == 2 && all[0].equal(&all[1]),
        "the ranks' parameters differ"
    );
    // Both sum two float32 gradients; an interrupted or doubled reduction is off by a factor.
    let worst = difference(&params(&ours), &params(&reference));
    eprintln!(
        "rank {}: two ranks and two micro steps differ by {worst:e}",
        env.rank
    );
    assert!(
        worst < 1e-3,
        "two ranks and two micro steps differ by {worst}"
    );
    let measured = measure(
        &place.peers,
        place.device,
        1 << 22,
        Duration::from_millis(100),
    )
    .unwrap();
    eprintln!("rank {}: {measured:?}", env.rank);
    assert_eq!(measured.wrong, None);
    place.peers.barrier(LIMIT, "barrier at the end").unwrap();
    place.peers.leave();
}
