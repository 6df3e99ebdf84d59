//! A complete configuration to learn the keys from: what stands in for broken values while the
//! rest of a file is checked, and where hints take their examples.

use super::tree::{KeyPath, Segment, get};
use super::*;
use serde_json::Value;

impl Config {
    /// A small, valid and complete configuration: ResNet-18 TSM, 8 segments, on raw frames below
    /// `data/`. A start for tests and for programs that build a configuration themselves; what
    /// it says about training is not a recipe.
    pub fn template() -> Config {
        Config {
            run: Run {
                name: "example".into(),
                dir: default_run_root(),
                seed: 0,
                reference: None,
            },
            launch: Launch::default(),
            model: Model {
                arch: Arch::Resnet18,
                width: 1.0,
                num_classes: 8,
                num_segments: 8,
                shift: Shift {
                    mode: ShiftMode::Bi,
                    direction: ShiftDirection::Mit,
                    div: 8,
                    place: ShiftPlace::Blockres,
                    n_round: None,
                },
                temporal_pool: false,
                head: Head {
                    order: HeadOrder::DropoutFcMean,
                    dropout: 0.5,
                    init_std: 0.001,
                },
                partial_bn: false,
                weights: None,
                weights_min_coverage: default_coverage(),
            },
            data: Data {
                format: DataFormat::Rawframes,
                root: "data".into(),
                train_list: "data/train.txt".into(),
                val_list: "data/val.txt".into(),
                class_names: None,
                frame_template: default_frame_template(),
                start_index: 1,
                sampler: Sampler::Mm0,
                dense: false,
                train: TrainAug {
                    short_side: Some(256),
                    crop: TrainCrop::MultiScale {
                        scales: vec![1.0, 0.875, 0.75, 0.66],
                    },
                    size: 224,
                    flip: 0.0,
                    flip_swap: Vec::new(),
                },
                val: ValAug {
                    short_side: 256,
                    size: 224,
                    batch_per_rank: None,
                },
                mean: imagenet_mean(),
                std: imagenet_std(),
                workers: None,
                prefetch: default_prefetch(),
                on_error: OnError::Fail,
                max_bad_videos: default_max_bad(),
            },
            train: Train {
                epochs: 50,
                batch_per_rank: 8,
                accumulation: 1,
                drop_last: true,
                precision: Precision {
                    mode: PrecisionMode::Fp32,
                    loss_scale: None,
                },
                channels_last: false,
                eval_every: 1,
                checkpoint_every: 1,
                checkpoint_steps: None,
                keep_last: 3,
                log_every: 20,
                bn_buffers: BnBuffers::Mean,
                bucket_mib: default_bucket(),
                deterministic: false,
            },
            optim: Optim {
                lr: 0.01,
                base_batch: 64,
                scale_lr: true,
                momentum: 0.9,
                nesterov: false,
                weight_decay: 1e-4,
                groups: Groups::TsmFcLr5,
                max_grad_norm: Some(20.0),
                schedule: Schedule::Step {
                    milestones: vec![20.0, 40.0],
                    gamma: 0.1,
                },
                warmup: None,
                label_smoothing: 0.0,
            },
        }
    }
}

/// An example of every value a configuration can hold: one tree cannot show all variants of an
/// enum, so there are several, looked through in order.
pub(super) struct Examples(Vec<Value>);

impl Examples {
    pub fn new() -> Examples {
        let mut full = Config::template();
        full.run.reference = Some("published row".into());
        full.launch.nproc_per_node = Some(8);
        full.model.shift.n_round = Some(1);
        full.model.weights = Some("weights.safetensors".into());
        full.data.class_names = Some("classes.txt".into());
        full.data.train.flip_swap = vec![("left".into(), "right".into())];
        full.data.val.batch_per_rank = Some(8);
        full.data.workers = Some(4);
        full.train.checkpoint_steps = Some(1000);
        full.train.precision = Precision {
            mode: PrecisionMode::O2,
            loss_scale: Some(128.0),
        };
        full.optim.warmup = Some(Warmup {
            epochs: 5.0,
            start_factor: 0.1,
            per_step: true,
        });
        let mut second = full.clone();
        second.data.train.crop = TrainCrop::RandomResized {
            area: (0.08, 1.0),
            ratio: (0.75, 4.0 / 3.0),
        };
        second.optim.schedule = Schedule::Cosine { per_step: true };
        let mut third = full.clone();
        third.data.train.crop = TrainCrop::Center {};
        third.optim.schedule = Schedule::Constant {};
        let json =
            |config: &Config| serde_json::to_value(config).expect("a config always serialises");
        Examples([full, second, third].iter().map(json).collect())
    }

    /// The example for `path`; all elements of a list but the first few share the last one's.
    pub fn get(&self, path: &KeyPath) -> Option<&Value> {
        let found = |root, path: &KeyPath| get(root, path).filter(|value| !value.is_null());
        self.0.iter().find_map(|root| {
            found(root, path).or_else(|| {
                let zeros = path.0.iter().map(|segment| match segment {
                    Segment::Index(_) => Segment::Index(0),
                    key => key.clone(),
                });
                found(root, &KeyPath(zeros.collect()))
            })
        })
    }

    /// The section that has a key of this name, if only one has.
    pub fn section_with(&self, key: &str) -> Option<KeyPath> {
        fn walk(node: &Value, key: &str, at: &KeyPath, found: &mut Vec<KeyPath>) {
            let Value::Object(map) = node else { return };
            for (name, value) in map {
                if name == key {
                    found.push(at.clone());
                }
                walk(value, key, &at.key(name), found);
            }
        }
        let mut found = Vec::new();
        walk(&self.0[0], key, &KeyPath::default(), &mut found);
        match <[KeyPath; 1]>::try_from(found) {
            Ok([only]) => Some(only),
            Err(_) => None,
        }
    }
}
