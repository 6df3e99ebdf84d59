//! One rank of `tsm-bench step`: the trainer's own step on synthetic clips.

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use std::time::Instant;
use tch::{Device, Kind, Tensor};
use tsm_job::config::{Arch, DeviceKind, PrecisionMode, ShiftMode};
use tsm_job::{Config, WorkerEnv};
use tsm_torch_ext::{cuda, ops};
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
    value.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned())
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

/// Measures and, on rank 0, prints the milliseconds of every counted step as a JSON array.
pub fn run(args: &Args) -> Result<()> {
    let config = args.config();
    let env = WorkerEnv::from_process()?;
    let place = Place::new(&config, &env)?;
    tch::manual_seed(i64::from(env.rank));
    let network = Network::new(&config.model, place.device, 0)?;
    let mut stepper = Stepper::new(&config, &place, network)?;
    let (size, frames) = (i64::from(args.size), i64::from(args.clips * args.segments));
    let x = Tensor::f_randn([frames, 3, size, size], (Kind::Float, place.device))?;
    let x = if config.train.channels_last { ops::to_channels_last(&x)? } else { x };
    let y = Tensor::f_randint(i64::from(config.model.num_classes), [i64::from(args.clips)], (Kind::Int64, place.device))?;
    let step_samples = u64::from(env.world_size) * u64::from(args.clips);
    let mut times = Vec::with_capacity(args.steps);
    let mut loss = None;
    for i in 0..args.warmup + args.steps {
        place.peers.barrier(config.launch.collective_timeout, "barrier before a timed step")?;
        wait(place.device)?;
        let started = Instant::now();
        stepper.begin()?;
        loss = Some(stepper.micro_step(&x, &y, step_samples, true)?.loss);
        stepper.update(1e-3)?;
        wait(place.device)?;
        if i >= args.warmup {
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    let loss = loss.context("no step was taken")?.double_value(&[]);
    anyhow::ensure!(loss.is_finite(), "the loss of the measured step is {loss}");
    if env.rank == 0 {
        println!("{}", serde_json::to_string(&times)?);
    }
    Ok(())
}

fn wait(device: Device) -> Result<()> {
    if device.is_cuda() {
        cuda::synchronize(device)?;
    }
    Ok(())
}
