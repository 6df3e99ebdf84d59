//! One rank of `tsm-bench step`: the trainer's own step on synthetic clips.

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};
use std::time::Instant;
use tch::{Device, Kind, Tensor};
use tsm_job::config::{Arch, DeviceKind, PrecisionMode, ShiftMode};
use tsm_job::{Config, WorkerEnv};
use tsm_torch_ext::cuda::{self, Event};
use tsm_torch_ext::ops;
use tsm_trainer::model::Network;
use tsm_trainer::train::{Place, Stepper};

/// What a step computes.
#[derive(Parser, Clone, Debug)]
pub struct Args {
    #[arg(long, default_value = "resnet50")]
    pub arch: ArchName,
    /// Side of the frames in pixels.
    #[arg(long, default_value_t = 224)]
    pub size: u32,
    /// Clips a rank trains on in a step.
    #[arg(long, default_value_t = 1)]
    pub clips: u32,
    /// Frames of a clip.
    #[arg(long, default_value_t = 8)]
    pub segments: u32,
    #[arg(long, default_value = "bf16")]
    pub precision: PrecisionName,
    #[arg(long, default_value = "nhwc")]
    pub layout: Layout,
    #[arg(long, default_value = "cpu")]
    pub device: DeviceName,
    /// Steps that are not counted, in every process.
    #[arg(long, default_value_t = 2)]
    pub warmup: usize,
    /// Steps that are counted, in every process.
    #[arg(long, default_value_t = 5)]
    pub steps: usize,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ArchName {
    Resnet18,
    Resnet50,
    Mobilenetv2,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum PrecisionName {
    Fp32,
    Bf16,
    Fp16,
    O2,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Layout {
    Nchw,
    Nhwc,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum DeviceName {
    Cpu,
    Gpu,
}

/// The word that the command line uses for a value.
pub fn word(value: &impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map_or_else(String::new, |v| v.get_name().to_owned())
}

impl Args {
    fn config(&self) -> Config {
        let mut config = Config::template();
        config.launch.device = match self.device {
            DeviceName::Cpu => DeviceKind::Cpu,
            DeviceName::Gpu => DeviceKind::Gpu,
        };
        config.model.arch = match self.arch {
            ArchName::Resnet18 => Arch::Resnet18,
            ArchName::Resnet50 => Arch::Resnet50,
            ArchName::Mobilenetv2 => Arch::Mobilenetv2,
        };
        config.model.width = 1.0;
        config.model.num_classes = 174;
        config.model.num_segments = self.segments;
        config.model.shift.mode = ShiftMode::Bi;
        config.model.head.dropout = 0.0;
        config.model.partial_bn = false;
        config.data.train.size = self.size;
        config.train.batch_per_rank = self.clips;
        config.train.channels_last = self.layout == Layout::Nhwc;
        config.train.deterministic = false;
        config.train.precision.mode = match self.precision {
            PrecisionName::Fp32 => PrecisionMode::Fp32,
            PrecisionName::Bf16 => PrecisionMode::Bf16,
            PrecisionName::Fp16 => PrecisionMode::Fp16,
            PrecisionName::O2 => PrecisionMode::O2,
        };
        // As in the PyTorch script: one group, no clipping.
        config.optim.groups = tsm_job::config::Groups::Flat;
        config.optim.max_grad_norm = None;
        config.optim.momentum = 0.9;
        config.optim.weight_decay = 1e-4;
        config
    }

    /// The same flags again, for a child process.
    pub fn to_flags(&self) -> Vec<String> {
        let flag = |name: &str, value: String| [format!("--{name}"), value];
        [
            flag("arch", word(&self.arch)),
            flag("size", self.size.to_string()),
            flag("clips", self.clips.to_string()),
            flag("segments", self.segments.to_string()),
            flag("precision", word(&self.precision)),
            flag("layout", word(&self.layout)),
            flag("device", word(&self.device)),
            flag("warmup", self.warmup.to_string()),
            flag("steps", self.steps.to_string()),
        ]
        .concat()
    }
}

/// What one rank measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Timed {
    /// Of every counted step.
    pub step_ms: Vec<f64>,
    /// On a GPU the most memory in tensors during the counted steps, else the most this process had.
    pub peak_bytes: u64,
    /// The GPU's name.
    pub gpu: Option<String>,
}

/// Measures and, on rank 0, prints a [`Timed`] as JSON.
pub fn run(args: &Args) -> Result<()> {
    let config = args.config();
    let env = WorkerEnv::from_process()?;
    let place = Place::new(&config, &env)?;
    tch::manual_seed(i64::from(env.rank));
    let network = Network::new(&config.model, place.device, 0)?;
    let mut stepper = Stepper::new(&config, &place, network)?;
    let (size, frames) = (i64::from(args.size), i64::from(args.clips * args.segments));
    let x = Tensor::f_randn([frames, 3, size, size], (Kind::Float, place.device))?;
    let x = if config.train.channels_last {
        ops::to_channels_last(&x)?
    } else {
        x
    };
    let y = Tensor::f_randint(
        i64::from(config.model.num_classes),
        [i64::from(args.clips)],
        (Kind::Int64, place.device),
    )?;
    let step_samples = u64::from(env.world_size) * u64::from(args.clips);
    let mut loss = None;
    let mut step = || -> Result<()> {
        stepper.begin()?;
        loss = Some(stepper.micro_step(&x, &y, step_samples, true)?.loss);
        stepper.update(1e-3)?;
        Ok(())
    };
    for _ in 0..args.warmup {
        step()?;
    }
    let barrier = || {
        place.peers.barrier(
            config.launch.collective_timeout,
            "barrier before timed steps",
        )
    };
    let timed = match place.device {
        Device::Cuda(index) => {
            barrier()?;
            cuda::synchronize(place.device)?;
            cuda::reset_peak_memory(index)?;
            Timed {
                step_ms: by_events(index, args.steps, &mut step)?,
                peak_bytes: cuda::memory_stats(index)?.peak_bytes,
                gpu: Some(cuda::device(index)?.0),
            }
        }
        _ => {
            let mut step_ms = Vec::with_capacity(args.steps);
            for _ in 0..args.steps {
                barrier()?;
                let started = Instant::now();
                step()?;
                step_ms.push(started.elapsed().as_secs_f64() * 1e3);
            }
            Timed {
                step_ms,
                peak_bytes: most_resident()?,
                gpu: None,
            }
        }
    };
    let loss = loss.context("no step was taken")?.double_value(&[]);
    anyhow::ensure!(loss.is_finite(), "the loss of the measured step is {loss}");
    if env.rank == 0 {
        println!("{}", serde_json::to_string(&timed)?);
    }
    place.peers.leave();
    Ok(())
}

/// Milliseconds between marks that the GPU passes: the host runs ahead, as in training, and its
/// time counts only where the GPU waits for it.
fn by_events(
    index: usize,
    steps: usize,
    step: &mut impl FnMut() -> Result<()>,
) -> Result<Vec<f64>> {
    let mark = || -> Result<Event> {
        let event = Event::new(index)?;
        event.record()?;
        Ok(event)
    };
    let mut marks = vec![mark()?];
    for _ in 0..steps {
        step()?;
        marks.push(mark()?);
    }
    cuda::synchronize(Device::Cuda(index))?;
    marks
        .windows(2)
        .map(|pair| Ok(f64::from(pair[1].elapsed_ms(&pair[0])?)))
        .collect()
}

/// The most memory this process had resident (`VmHWM` of proc(5)).
fn most_resident() -> Result<u64> {
    let status = fs_err::read_to_string("/proc/self/status")?;
    let kib = status.lines().find_map(|l| {
        l.strip_prefix("VmHWM:")?
            .trim()
            .strip_suffix(" kB")?
            .parse::<u64>()
            .ok()
    });
    Ok(kib.context("/proc/self/status has no VmHWM")? * 1024)
}
