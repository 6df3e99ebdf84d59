//! One YAML per job. [`Config::load`] parses, applies dotted overrides and validates.

mod explain;
mod load;
mod overrides;
mod problem;
mod template;
#[cfg(test)]
mod tests;
mod tree;
mod validate;

pub use problem::{ConfigError, Problem};

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Everything a job needs to know. What changes the numbers has no default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub run: Run,
    #[serde(default)]
    pub launch: Launch,
    pub model: Model,
    pub data: Data,
    pub train: Train,
    pub optim: Optim,
}

/// Name, place and seed of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Run folders are named `<name>-<UTC time>`.
    pub name: String,
    /// Folder in which run folders are made.
    #[serde(default = "default_run_root")]
    pub dir: PathBuf,
    /// Seeds initialisation, dropout, the order of the samples and their augmentation.
    pub seed: u64,
    /// Which published row the recipe reproduces, as free text for the report.
    #[serde(default)]
    pub reference: Option<String>,
}

/// Operational knobs of the launcher; the command line overrides them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Launch {
    /// Where the workers run when neither `--gpus` nor `--cpus` is given.
    pub device: DeviceKind,
    /// Workers on this node when the command line names no number; `null`: every GPU.
    pub nproc_per_node: Option<u32>,
    /// How long a worker may take to end after its first signal.
    #[serde(with = "duration")]
    pub grace: Duration,
    /// A collective that takes longer than this is an error that names the missing ranks.
    #[serde(with = "duration")]
    pub collective_timeout: Duration,
    /// What carries gradients and counts between the ranks.
    pub collectives: Collectives,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    Gpu,
    Cpu,
}

/// The transport between the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Collectives {
    /// NCCL on GPUs, Gloo on the CPU.
    Auto,
    /// Gloo or an error; CPU only.
    Gloo,
    /// NCCL or an error; GPUs only.
    Nccl,
    /// MPI, which must have started the ranks (`mpirun -n 4 tsm-trainer --config FILE`). Needs a
    /// trainer built with `--features mpi`. Gradients on GPUs pass through host memory.
    Mpi,
}

/// The network. One `num_segments` serves data, backbone and head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub arch: Arch,
    /// Multiplies every channel count but the input's; 1.0 is the published network.
    #[serde(default = "one")]
    pub width: f64,
    pub num_classes: u32,
    /// T: frames of a clip that go through the network together.
    pub num_segments: u32,
    pub shift: Shift,
    /// Halves the number of segments before layer2 by a max pool over time (ResNet only).
    #[serde(default)]
    pub temporal_pool: bool,
    pub head: Head,
    /// Keep every BatchNorm but the first in evaluation mode, its weight and bias frozen.
    pub partial_bn: bool,
    /// Pretrained weights to start from (safetensors); `null`: random initialisation.
    #[serde(default)]
    pub weights: Option<PathBuf>,
    /// Fail when a smaller share of the backbone's tensors is found in `weights`.
    #[serde(default = "default_coverage")]
    pub weights_min_coverage: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    Resnet18,
    Resnet34,
    Resnet50,
    Resnet101,
    Resnet152,
    Mobilenetv2,
}

/// The temporal shift. `mode: none` makes the network a TSN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shift {
    pub mode: ShiftMode,
    /// Which of the two shifted channel groups comes from the future.
    #[serde(default)]
    pub direction: ShiftDirection,
    /// fold = channels / div channels are shifted each way.
    #[serde(default = "eight")]
    pub div: u32,
    #[serde(default)]
    pub place: ShiftPlace,
    /// Shift every n-th block; `null`: 2 if layer3 has 23 blocks or more, else 1.
    #[serde(default)]
    pub n_round: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShiftMode {
    /// One group from the next segment, one from the previous.
    Bi,
    /// One group from the previous segment only: usable on a live stream.
    Uni,
    /// No shift: TSN.
    None,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShiftDirection {
    /// Channels `[0, fold)` come from the next segment (original code, MMAction2).
    #[default]
    Mit,
    /// Channels `[0, fold)` come from the previous segment (PaddleVideo).
    Paddle,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShiftPlace {
    /// Only the residual branch sees the shifted input.
    #[default]
    Blockres,
    /// The whole block, shortcut included, sees it.
    Block,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    pub order: HeadOrder,
    /// Probability of zeroing a feature; 0 switches dropout off.
    pub dropout: f64,
    /// Standard deviation of the classifier's initial weights; its bias starts at 0.
    pub init_std: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadOrder {
    /// Dropout and classifier per frame, then the mean over segments (TSM).
    DropoutFcMean,
    /// The mean over segments, then dropout and classifier (TSN of MMAction2 and PaddleVideo).
    MeanDropoutFc,
}

/// Lists, sampling and augmentation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    pub format: DataFormat,
    /// Joined in front of every relative path of the lists.
    pub root: PathBuf,
    /// `path frames label` (rawframes) or `path label` (video) a line.
    pub train_list: PathBuf,
    pub val_list: PathBuf,
    /// One class name a line, in label order; travels with the checkpoints.
    #[serde(default)]
    pub class_names: Option<PathBuf>,
    /// File name of a frame; `{:05}` is its number. Rawframes only.
    #[serde(default = "default_frame_template")]
    pub frame_template: String,
    /// Number of the first frame's file. Rawframes only.
    #[serde(default = "one_u32")]
    pub start_index: u32,
    /// Whose temporal sampling rules to follow.
    pub sampler: Sampler,
    /// Sample T frames 64/T apart from one random start instead of T even segments.
    #[serde(default)]
    pub dense: bool,
    pub train: TrainAug,
    pub val: ValAug,
    #[serde(default = "imagenet_mean")]
    pub mean: [f64; 3],
    #[serde(default = "imagenet_std")]
    pub std: [f64; 3],
    /// Decoder threads per rank; `null`: the cores of the rank.
    #[serde(default)]
    pub workers: Option<u32>,
    /// Batches decoded ahead of the training step.
    #[serde(default = "default_prefetch")]
    pub prefetch: u32,
    #[serde(default)]
    pub on_error: OnError,
    /// With `on_error: skip`, more bad samples than this in an epoch stop the run.
    #[serde(default = "default_max_bad")]
    pub max_bad_videos: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    Rawframes,
    Video,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampler {
    /// The original TSM code.
    Mit,
    /// MMAction2 0.x.
    Mm0,
    /// MMAction2 1.x.
    Mm1,
    /// PaddleVideo.
    Paddle,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// Stop the run at the first file that cannot be read.
    #[default]
    Fail,
    /// Leave the sample out, name it, count it.
    Skip,
}

/// Training augmentation: the same parameters for all frames of a clip.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainAug {
    /// Resize the short side to this before cropping, in pixels; `null`: crop the stored frame.
    #[serde(default)]
    pub short_side: Option<u32>,
    pub crop: TrainCrop,
    /// Side of the square that enters the network, in pixels.
    pub size: u32,
    /// Probability of a horizontal flip; 0 switches it off.
    pub flip: f64,
    /// Class names whose labels change places when a clip is flipped.
    #[serde(default)]
    pub flip_swap: Vec<(String, String)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum TrainCrop {
    /// One of 13 grid positions and neighbouring scales (TSN, TSM).
    MultiScale { scales: Vec<f64> },
    /// torchvision's random-resized crop: area share and aspect ratio drawn from ranges.
    RandomResized { area: (f64, f64), ratio: (f64, f64) },
    /// The middle of the frame.
    Center {},
}

/// Validation: one clip, short side resized, centre crop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValAug {
    pub short_side: u32,
    pub size: u32,
    /// Clips per rank that go through the network together; `null`: `train.batch_per_rank`.
    #[serde(default)]
    pub batch_per_rank: Option<u32>,
}

/// Length, batch, precision and rhythm of the training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    pub epochs: u32,
    /// Clips a rank trains on in one micro step.
    pub batch_per_rank: u32,
    /// Micro steps whose gradients make one step.
    #[serde(default = "one_u32")]
    pub accumulation: u32,
    /// Leave out the last step of an epoch when it is not full.
    #[serde(default = "yes")]
    pub drop_last: bool,
    pub precision: Precision,
    /// NHWC activations and weights.
    #[serde(default)]
    pub channels_last: bool,
    /// Validate after every n-th epoch, and always after the last.
    #[serde(default = "one_u32")]
    pub eval_every: u32,
    /// Save after every n-th epoch, and always after the last.
    #[serde(default = "one_u32")]
    pub checkpoint_every: u32,
    /// Also save every n steps; `null`: only at epoch ends.
    #[serde(default)]
    pub checkpoint_steps: Option<u64>,
    /// Checkpoints kept besides the best.
    #[serde(default = "three")]
    pub keep_last: u32,
    /// Steps between two log lines. The loss is read back from the device only then.
    #[serde(default = "twenty")]
    pub log_every: u32,
    /// How BatchNorm's running statistics agree before a validation.
    #[serde(default)]
    pub bn_buffers: BnBuffers,
    /// Gradient bucket size, in MiB; the first bucket is 1 MiB.
    #[serde(default = "default_bucket")]
    pub bucket_mib: u32,
    /// Choose only deterministic kernels. On CPU runs are repeatable either way.
    #[serde(default)]
    pub deterministic: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BnBuffers {
    /// The mean over ranks (MMAction2 1.x).
    #[default]
    Mean,
    /// Those of rank 0 (MMAction2 0.x).
    Rank0,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Precision {
    pub mode: PrecisionMode,
    /// Loss scale of fp16 and o2: a fixed number; `null`: dynamic.
    #[serde(default)]
    pub loss_scale: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrecisionMode {
    Fp32,
    /// Autocast to bfloat16.
    Bf16,
    /// Autocast to float16 with loss scaling.
    Fp16,
    /// float16 weights, float32 BatchNorm and master weights (apex O2).
    O2,
}

/// SGD and its schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optim {
    /// Learning rate for `base_batch` clips a step.
    pub lr: f64,
    /// Clips per step for which `lr` was chosen.
    pub base_batch: u32,
    /// Linear scaling rule: lr x (global batch) / base_batch.
    #[serde(default = "yes")]
    pub scale_lr: bool,
    pub momentum: f64,
    #[serde(default)]
    pub nesterov: bool,
    pub weight_decay: f64,
    pub groups: Groups,
    /// Limit of the global L2 norm of the gradients; `null`: no limit.
    // Serde takes a missing Option for null; with a named function the key has to be there.
    #[serde(deserialize_with = "Option::deserialize")]
    pub max_grad_norm: Option<f64>,
    pub schedule: Schedule,
    #[serde(default)]
    pub warmup: Option<Warmup>,
    #[serde(default)]
    pub label_smoothing: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Groups {
    /// TSM's groups, classifier at 5x (weight) and 10x (bias, no decay).
    TsmFcLr5,
    /// TSM's groups, classifier like the other layers.
    Tsm,
    /// PaddleVideo's groups: classifier at 5x with decay fixed at 1e-4 and 10x.
    Paddle,
    /// One group.
    Flat,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// lr x gamma at each milestone, in epochs.
    Step { milestones: Vec<f64>, gamma: f64 },
    /// Half a cosine from lr to 0 over all epochs, stepped per epoch.
    Cosine { per_step: bool },
    /// No change.
    Constant {},
}

/// lr grows from `start_factor` x lr to lr.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Warmup {
    pub epochs: f64,
    pub start_factor: f64,
    /// Change at every step instead of every epoch.
    #[serde(default = "yes")]
    pub per_step: bool,
}

impl Config {
    /// Clips in one optimizer step over all ranks.
    pub fn global_batch(&self, world_size: u32) -> u64 {
        u64::from(world_size)
            * u64::from(self.train.batch_per_rank)
            * u64::from(self.train.accumulation)
    }

    /// The learning rate used: the linear scaling rule applied to [`Optim::lr`].
    pub fn scaled_lr(&self, world_size: u32) -> f64 {
        if self.optim.scale_lr {
            self.optim.lr * self.global_batch(world_size) as f64 / f64::from(self.optim.base_batch)
        } else {
            self.optim.lr
        }
    }
}

impl Default for Launch {
    fn default() -> Self {
        Launch {
            device: DeviceKind::Gpu,
            nproc_per_node: None,
            grace: Duration::from_secs(30),
            collective_timeout: Duration::from_secs(600),
            collectives: Collectives::Auto,
        }
    }
}

fn default_run_root() -> PathBuf {
    "runs".into()
}
fn default_coverage() -> f64 {
    0.9
}
fn default_frame_template() -> String {
    "img_{:05}.jpg".into()
}
fn default_prefetch() -> u32 {
    4
}
fn default_max_bad() -> u64 {
    100
}
fn default_bucket() -> u32 {
    25
}
fn imagenet_mean() -> [f64; 3] {
    [0.485, 0.456, 0.406]
}
fn imagenet_std() -> [f64; 3] {
    [0.229, 0.224, 0.225]
}
fn one() -> f64 {
    1.0
}
fn one_u32() -> u32 {
    1
}
fn three() -> u32 {
    3
}
fn eight() -> u32 {
    8
}
fn twenty() -> u32 {
    20
}
fn yes() -> bool {
    true
}

/// Durations written as `500ms`, `30s`, `10m`, `2h`, up to `9999h`.
pub mod duration {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use std::time::Duration;

    /// Reads `500ms`, `30s`, `10m` or `2h`.
    pub fn parse(text: &str) -> Result<Duration, String> {
        let text = text.trim();
        let split = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let seconds = match unit {
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => {
                return Err(format!(
                    "`{text}` is not a duration; write it like 500ms, 30s, 10m or 2h"
                ));
            }
        };
        let number: f64 = number.parse().map_err(|_| {
            format!("`{text}` is not a duration; write it like 500ms, 30s, 10m or 2h")
        })?;
        // More than a year; sums of such times stay far from where a clock ends.
        const MAX: Duration = Duration::from_secs(9999 * 3600);
        let time = Duration::try_from_secs_f64(number * seconds);
        let time = time.ok().filter(|time| *time <= MAX);
        time.ok_or_else(|| format!("`{text}` is too long; 9999h is the most"))
    }

    /// The shortest form that [`parse`] reads back.
    pub fn format(d: Duration) -> String {
        let ms = d.as_millis();
        match ms {
            0 => "0s".into(),
            _ if ms.is_multiple_of(3_600_000) => format!("{}h", ms / 3_600_000),
            _ if ms.is_multiple_of(60_000) => format!("{}m", ms / 60_000),
            _ if ms.is_multiple_of(1000) => format!("{}s", ms / 1000),
            _ => format!("{ms}ms"),
        }
    }

    pub fn serialize<S: Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&format(*d))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        parse(&String::deserialize(d)?).map_err(D::Error::custom)
    }
}
