//! Rules between values that the types cannot express.

use super::problem::Problem;
use super::tree::KeyPath;
use super::{Arch, Config, DataFormat, PrecisionMode, Schedule, ShiftMode, ShiftPlace, TrainCrop};
use std::path::Path;

/// A broken rule.
#[derive(Debug, PartialEq)]
pub(super) struct Finding {
    /// Every key the rule reads; the first is where it is shown.
    pub paths: Vec<&'static str>,
    pub message: String,
    pub hint: Option<String>,
}

#[derive(Default)]
struct Rules(Vec<Finding>);

impl Rules {
    /// `holds`, or the message: the key's path, then the text.
    fn require(&mut self, holds: bool, path: &'static str, text: String) {
        self.between(holds, &[path], format!("{path} {text}"), None);
    }

    fn between(
        &mut self,
        holds: bool,
        paths: &[&'static str],
        message: String,
        hint: Option<&str>,
    ) {
        if !holds {
            self.0.push(Finding {
                paths: paths.to_vec(),
                message,
                hint: hint.map(str::to_owned),
            });
        }
    }

    fn at_least(&mut self, path: &'static str, value: u64, least: u64) {
        let text = format!("is {value}, it must be at least {least}");
        self.require(value >= least, path, text);
    }

    fn positive(&mut self, path: &'static str, value: f64) {
        let text = format!("is {value}, it must be above 0");
        self.require(value > 0.0 && value.is_finite(), path, text);
    }

    fn not_negative(&mut self, path: &'static str, value: f64) {
        let text = format!("is {value}, it must be 0 or more");
        self.require(value >= 0.0 && value.is_finite(), path, text);
    }

    /// `value` lies in [0, 1).
    fn below_one(&mut self, path: &'static str, value: f64) {
        let text = format!("is {value}, it must be at least 0 and below 1");
        self.require((0.0..1.0).contains(&value), path, text);
    }

    /// `value` lies in [0, 1].
    fn share(&mut self, path: &'static str, value: f64) {
        let text = format!("is {value}, it must lie between 0 and 1");
        self.require((0.0..=1.0).contains(&value), path, text);
    }
}

impl Config {
    /// Every rule that this configuration breaks, without touching a file.
    pub fn validate(&self) -> Vec<Problem> {
        let problem = |finding: Finding| Problem {
            hint: finding.hint,
            ..Problem::new(&KeyPath::of(finding.paths[0]), finding.message)
        };
        self.findings().into_iter().map(problem).collect()
    }

    /// Every path of the configuration that does not lead to what it should, one problem a key.
    /// Relative paths start at the current directory.
    pub fn check_files(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut check = |key: &str, path: &Path, kind: &str, exists: bool, hint: &str| {
            if !exists {
                let message = format!("{key} is {}: no such {kind}", path.display());
                problems.push(Problem::new(&KeyPath::of(key), message).hint(hint));
            }
        };
        let from_here = "relative paths start at the directory that the program runs in";
        let data = &self.data;
        check(
            "data.root",
            &data.root,
            "folder",
            data.root.is_dir(),
            from_here,
        );
        let files = [
            ("data.train_list", Some(&data.train_list), from_here),
            ("data.val_list", Some(&data.val_list), from_here),
            ("data.class_names", data.class_names.as_ref(), from_here),
            (
                "model.weights",
                self.model.weights.as_ref(),
                "set model.weights=null to start from random weights",
            ),
        ];
        for (key, path, hint) in files {
            if let Some(path) = path {
                check(key, path, "file", path.is_file(), hint);
            }
        }
        problems
    }

    pub(super) fn findings(&self) -> Vec<Finding> {
        let mut rules = Rules::default();
        self.run_rules(&mut rules);
        self.model_rules(&mut rules);
        self.data_rules(&mut rules);
        self.augmentation_rules(&mut rules);
        self.train_rules(&mut rules);
        self.optim_rules(&mut rules);
        rules.0
    }

    fn run_rules(&self, rules: &mut Rules) {
        let name = &self.run.name;
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        rules.require(
            !name.is_empty() && !name.starts_with('.') && name.chars().all(plain),
            "run.name",
            format!("is {name:?}, it names a folder: use letters, digits, `-`, `_` and `.`"),
        );
        if let Some(n) = self.launch.nproc_per_node {
            rules.at_least("launch.nproc_per_node", n.into(), 1);
        }
        rules.positive(
            "launch.collective_timeout",
            self.launch.collective_timeout.as_secs_f64(),
        );
    }

    fn model_rules(&self, rules: &mut Rules) {
        let model = &self.model;
        rules.positive("model.width", model.width);
        rules.at_least("model.num_classes", model.num_classes.into(), 2);
        rules.at_least("model.num_segments", model.num_segments.into(), 1);
        rules.below_one("model.head.dropout", model.head.dropout);
        rules.not_negative("model.head.init_std", model.head.init_std);
        rules.share("model.weights_min_coverage", model.weights_min_coverage);
        self.shift_rules(rules);
        self.place_rules(rules);
        if model.temporal_pool {
            let (t, arch) = (model.num_segments, model.arch);
            rules.between(
                arch != Arch::Mobilenetv2,
                &["model.temporal_pool", "model.arch"],
                "model.temporal_pool needs a ResNet, model.arch is mobilenetv2".into(),
                Some("set model.temporal_pool to false"),
            );
            rules.between(
                t.is_multiple_of(2),
                &["model.num_segments", "model.temporal_pool"],
                format!(
                    "model.num_segments is {t}, model.temporal_pool halves it: use an even number"
                ),
                None,
            );
        }
    }

    /// fold = channels / div: both groups must fit, and a fold of 0 would shift nothing.
    fn shift_rules(&self, rules: &mut Rules) {
        let shift = &self.model.shift;
        let (least, why) = match shift.mode {
            ShiftMode::Bi | ShiftMode::Uni => (2, "the channels hold two groups"),
            ShiftMode::None => (1, "it divides the channels"),
        };
        rules.between(
            shift.div >= least,
            &["model.shift.div", "model.shift.mode"],
            format!(
                "model.shift.div is {}, it must be at least {least}: {why}",
                shift.div
            ),
            None,
        );
        // The narrowest input of a shifted convolution, by the networks' own rounding.
        let width = self.model.width;
        let narrowest = match self.model.arch {
            Arch::Mobilenetv2 => 8.0 * (24.0 * width / 8.0).ceil(),
            _ => (64.0 * width).round(),
        }
        .max(8.0);
        rules.between(
            shift.mode == ShiftMode::None
                || width <= 0.0
                || f64::from(shift.div) <= narrowest,
            &["model.shift.div", "model.shift.mode", "model.width", "model.arch"],
            format!(
                "model.shift.div is {}, but the narrowest shifted layer has {narrowest} channels: nothing would be shifted",
                shift.div
            ),
            Some("use a smaller model.shift.div or a larger model.width"),
        );
    }

    /// Where the original code shifts: MobileNetV2 has one way, and skipping blocks is a matter of
    /// a ResNet's branches.
    fn place_rules(&self, rules: &mut Rules) {
        let (arch, shift) = (self.model.arch, &self.model.shift);
        let resnet = arch != Arch::Mobilenetv2;
        rules.between(
            resnet || shift.place == ShiftPlace::Blockres,
            &["model.shift.place", "model.arch"],
            "model.shift.place is block, which needs a ResNet, model.arch is mobilenetv2".into(),
            Some("set model.shift.place to blockres"),
        );
        let Some(n) = shift.n_round else { return };
        rules.at_least("model.shift.n_round", n.into(), 1);
        rules.between(
            n <= 1 || resnet,
            &["model.shift.n_round", "model.arch"],
            format!("model.shift.n_round is {n}, which needs a ResNet, model.arch is mobilenetv2"),
            Some("set model.shift.n_round to null"),
        );
        rules.between(
            n <= 1 || !resnet || shift.place == ShiftPlace::Blockres,
            &["model.shift.n_round", "model.shift.place"],
            format!("model.shift.n_round is {n}, but model.shift.place block shifts every block"),
            Some("set model.shift.n_round to null, or model.shift.place to blockres"),
        );
    }

    fn data_rules(&self, rules: &mut Rules) {
        let data = &self.data;
        if data.format == DataFormat::Rawframes {
            let template = &data.frame_template;
            rules.between(
                is_frame_template(template),
                &["data.frame_template"],
                format!(
                    "data.frame_template is {template:?}, it needs one number: {{}} or {{:05}}"
                ),
                Some("write it like \"img_{:05}.jpg\""),
            );
        }
        let t = self.model.num_segments;
        rules.between(
            !data.dense || t <= 64,
            &["data.dense", "model.num_segments"],
            format!("data.dense spreads the segments over 64 frames, model.num_segments is {t}"),
            Some("use at most 64 segments, or set data.dense to false"),
        );
        rules.require(
            data.mean.iter().all(|m| m.is_finite()),
            "data.mean",
            format!("is {:?}, its values must be finite", data.mean),
        );
        rules.require(
            data.std.iter().all(|s| *s > 0.0 && s.is_finite()),
            "data.std",
            format!("is {:?}, its values must be above 0", data.std),
        );
        if let Some(n) = data.workers {
            rules.at_least("data.workers", n.into(), 1);
        }
        rules.at_least("data.prefetch", data.prefetch.into(), 1);
    }

    fn augmentation_rules(&self, rules: &mut Rules) {
        let (train, val) = (&self.data.train, &self.data.val);
        rules.at_least("data.train.size", train.size.into(), 1);
        if let Some(side) = train.short_side {
            rules.at_least("data.train.short_side", side.into(), 1);
        }
        rules.share("data.train.flip", train.flip);
        rules.between(
            train.flip_swap.is_empty() || self.data.class_names.is_some(),
            &["data.train.flip_swap", "data.class_names"],
            "data.train.flip_swap names classes, data.class_names is not set".into(),
            Some("point data.class_names at the list of class names"),
        );
        for (a, b) in &train.flip_swap {
            let uses = train
                .flip_swap
                .iter()
                .filter(|(c, d)| [c, d].iter().any(|n| *n == a || *n == b));
            let text =
                format!("pairs {a:?} with {b:?}: a class has one partner, and it is another class");
            rules.require(a != b && uses.count() == 1, "data.train.flip_swap", text);
        }
        let ordered = |(low, high): (f64, f64)| low > 0.0 && low <= high && high.is_finite();
        match &train.crop {
            TrainCrop::MultiScale { scales } => rules.require(
                !scales.is_empty() && scales.iter().all(|s| *s > 0.0 && *s <= 1.0),
                "data.train.crop.multi_scale.scales",
                format!("is {scales:?}, it needs scales above 0 and up to 1"),
            ),
            TrainCrop::RandomResized { area, ratio } => {
                rules.require(
                    ordered(*area) && area.1 <= 1.0,
                    "data.train.crop.random_resized.area",
                    format!("is {area:?}, it must be a range of shares, like [0.08, 1.0]"),
                );
                rules.require(
                    ordered(*ratio),
                    "data.train.crop.random_resized.ratio",
                    format!("is {ratio:?}, it must be a range of ratios, like [0.75, 1.333]"),
                );
            }
            TrainCrop::Center {} => {}
        }
        rules.at_least("data.val.size", val.size.into(), 1);
        rules.between(
            val.size <= val.short_side,
            &["data.val.size", "data.val.short_side"],
            format!(
                "data.val.size is {}, larger than data.val.short_side {}",
                val.size, val.short_side
            ),
            Some("the crop is cut out of the resized frame"),
        );
        if let Some(n) = val.batch_per_rank {
            rules.at_least("data.val.batch_per_rank", n.into(), 1);
        }
    }

    fn train_rules(&self, rules: &mut Rules) {
        let train = &self.train;
        for (path, value) in [
            ("train.epochs", train.epochs),
            ("train.batch_per_rank", train.batch_per_rank),
            ("train.accumulation", train.accumulation),
            ("train.eval_every", train.eval_every),
            ("train.checkpoint_every", train.checkpoint_every),
            ("train.keep_last", train.keep_last),
            ("train.log_every", train.log_every),
            ("train.bucket_mib", train.bucket_mib),
        ] {
            rules.at_least(path, value.into(), 1);
        }
        if let Some(steps) = train.checkpoint_steps {
            rules.at_least("train.checkpoint_steps", steps, 1);
        }
        if let Some(scale) = train.precision.loss_scale {
            rules.positive("train.precision.loss_scale", scale);
            rules.between(
                matches!(train.precision.mode, PrecisionMode::Fp16 | PrecisionMode::O2),
                &["train.precision.loss_scale", "train.precision.mode"],
                format!(
                    "train.precision.loss_scale is {scale}, but only the modes fp16 and o2 scale the loss"
                ),
                Some("set train.precision.loss_scale to null"),
            );
        }
    }

    fn optim_rules(&self, rules: &mut Rules) {
        let optim = &self.optim;
        rules.positive("optim.lr", optim.lr);
        rules.at_least("optim.base_batch", optim.base_batch.into(), 1);
        rules.below_one("optim.momentum", optim.momentum);
        rules.between(
            !optim.nesterov || optim.momentum > 0.0,
            &["optim.nesterov", "optim.momentum"],
            "optim.nesterov needs momentum, optim.momentum is 0".into(),
            None,
        );
        rules.not_negative("optim.weight_decay", optim.weight_decay);
        if let Some(limit) = optim.max_grad_norm {
            rules.positive("optim.max_grad_norm", limit);
        }
        rules.below_one("optim.label_smoothing", optim.label_smoothing);
        // Milestones after the last epoch are legal: recipes are shortened by `train.epochs=1`.
        if let Schedule::Step { milestones, gamma } = &optim.schedule {
            rules.require(
                milestones.iter().all(|m| *m > 0.0 && m.is_finite())
                    && milestones.windows(2).all(|pair| pair[0] < pair[1]),
                "optim.schedule.step.milestones",
                format!("is {milestones:?}, it must be epochs above 0 in increasing order"),
            );
            rules.positive("optim.schedule.step.gamma", *gamma);
        }
        if let Some(warmup) = &optim.warmup {
            rules.positive("optim.warmup.epochs", warmup.epochs);
            rules.share("optim.warmup.start_factor", warmup.start_factor);
        }
    }
}

/// A file name with exactly one `{}`, `{:0N}` or `{:0Nd}`.
fn is_frame_template(template: &str) -> bool {
    let Some((before, rest)) = template.split_once('{') else {
        return false;
    };
    let Some((spec, after)) = rest.split_once('}') else {
        return false;
    };
    let width = spec
        .strip_prefix(":0")
        .map(|w| w.strip_suffix('d').unwrap_or(w));
    let known = match width {
        Some(width) => !width.is_empty() && width.bytes().all(|b| b.is_ascii_digit()),
        None => spec.is_empty(),
    };
    known && !before.contains('}') && !after.contains(['{', '}'])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path as FilePath;

    /// The messages for the template with `overrides`.
    fn messages(overrides: &[&str]) -> Vec<String> {
        let text = Config::template().to_yaml();
        let overrides: Vec<_> = overrides.iter().map(|o| o.to_string()).collect();
        match Config::from_yaml(&text, FilePath::new("job.yaml"), &overrides) {
            Ok(_) => Vec::new(),
            Err(error) => error.problems.into_iter().map(|p| p.message).collect(),
        }
    }

    fn check(cases: &[(&[&str], &str)]) {
        for (overrides, message) in cases {
            let expected: &[&str] = if message.is_empty() { &[] } else { &[message] };
            assert_eq!(messages(overrides), expected, "{overrides:?}");
        }
    }

    #[test]
    fn the_template_breaks_no_rule() {
        assert_eq!(Config::template().validate(), []);
    }

    #[test]
    fn counts_are_at_least_one() {
        for key in [
            "launch.nproc_per_node",
            "model.num_segments",
            "model.shift.n_round",
            "data.workers",
            "data.prefetch",
            "data.train.size",
            "data.train.short_side",
            "data.val.size",
            "data.val.batch_per_rank",
            "train.epochs",
            "train.batch_per_rank",
            "train.accumulation",
            "train.eval_every",
            "train.checkpoint_every",
            "train.checkpoint_steps",
            "train.keep_last",
            "train.log_every",
            "train.bucket_mib",
            "optim.base_batch",
        ] {
            assert_eq!(
                messages(&[&format!("{key}=0")]),
                [format!("{key} is 0, it must be at least 1")]
            );
            assert_eq!(messages(&[&format!("{key}=1")]), [""; 0], "{key}");
        }
        check(&[(
            &["model.num_classes=1"],
            "model.num_classes is 1, it must be at least 2",
        )]);
    }

    #[test]
    fn numbers_stay_in_their_ranges() {
        check(&[
            (&["optim.lr=0"], "optim.lr is 0, it must be above 0"),
            (&["model.width=0"], "model.width is 0, it must be above 0"),
            (
                &["optim.max_grad_norm=0"],
                "optim.max_grad_norm is 0, it must be above 0",
            ),
            (
                &["launch.collective_timeout=0s"],
                "launch.collective_timeout is 0, it must be above 0",
            ),
            (
                &["optim.weight_decay=-1"],
                "optim.weight_decay is -1, it must be 0 or more",
            ),
            (
                &["model.head.init_std=-1"],
                "model.head.init_std is -1, it must be 0 or more",
            ),
            (
                &["model.head.dropout=1"],
                "model.head.dropout is 1, it must be at least 0 and below 1",
            ),
            (
                &["optim.momentum=1"],
                "optim.momentum is 1, it must be at least 0 and below 1",
            ),
            (
                &["optim.label_smoothing=1"],
                "optim.label_smoothing is 1, it must be at least 0 and below 1",
            ),
            (
                &["data.train.flip=1.1"],
                "data.train.flip is 1.1, it must lie between 0 and 1",
            ),
            (
                &["model.weights_min_coverage=90"],
                "model.weights_min_coverage is 90, it must lie between 0 and 1",
            ),
            (
                &["optim.warmup={epochs: 0, start_factor: 0.1}"],
                "optim.warmup.epochs is 0, it must be above 0",
            ),
            (
                &["optim.warmup={epochs: 1, start_factor: 2}"],
                "optim.warmup.start_factor is 2, it must lie between 0 and 1",
            ),
            (
                &["data.std=[1, 0, 1]"],
                "data.std is [1.0, 0.0, 1.0], its values must be above 0",
            ),
        ]);
    }

    #[test]
    fn the_run_name_is_a_folder_name() {
        for name in ["a/b", "..", "a b", "\"\""] {
            let found = messages(&[&format!("run.name={name}")]);
            assert!(
                found.len() == 1 && found[0].contains("it names a folder"),
                "{name}: {found:?}"
            );
        }
    }

    #[test]
    fn the_shifted_groups_fit_into_the_channels() {
        check(&[
            (
                &["model.shift.div=1"],
                "model.shift.div is 1, it must be at least 2: the channels hold two groups",
            ),
            (
                &["model.shift.div=1", "model.shift.mode=uni"],
                "model.shift.div is 1, it must be at least 2: the channels hold two groups",
            ),
            (&["model.shift.div=1", "model.shift.mode=none"], ""),
            (
                &["model.shift.div=0", "model.shift.mode=none"],
                "model.shift.div is 0, it must be at least 1: it divides the channels",
            ),
            (&["model.width=0.1"], ""),
            (&["model.width=0.25", "model.shift.div=16"], ""),
            (
                &["model.width=0.2", "model.shift.div=16"],
                "model.shift.div is 16, but the narrowest shifted layer has 13 channels: nothing would be shifted",
            ),
            (
                &[
                    "model.width=0.2",
                    "model.shift.div=16",
                    "model.shift.mode=none",
                ],
                "",
            ),
            (
                &[
                    "model.width=0.4",
                    "model.shift.div=16",
                    "model.arch=mobilenetv2",
                ],
                "",
            ),
            (
                &[
                    "model.width=0.1",
                    "model.shift.div=16",
                    "model.arch=mobilenetv2",
                ],
                "model.shift.div is 16, but the narrowest shifted layer has 8 channels: nothing would be shifted",
            ),
        ]);
    }

    #[test]
    fn temporal_pool_halves_the_segments_of_a_resnet() {
        check(&[
            (&["model.temporal_pool=true"], ""),
            (
                &["model.temporal_pool=true", "model.num_segments=7"],
                "model.num_segments is 7, model.temporal_pool halves it: use an even number",
            ),
            (
                &["model.temporal_pool=true", "model.arch=mobilenetv2"],
                "model.temporal_pool needs a ResNet, model.arch is mobilenetv2",
            ),
        ]);
    }

    #[test]
    fn only_branches_of_a_resnet_may_skip_the_shift() {
        check(&[
            (&["model.shift.n_round=2"], ""),
            (&["model.shift.place=block"], ""),
            (&["model.shift.place=block", "model.shift.n_round=1"], ""),
            (
                &["model.shift.place=block", "model.shift.n_round=2"],
                "model.shift.n_round is 2, but model.shift.place block shifts every block",
            ),
            (&["model.arch=mobilenetv2", "model.shift.n_round=1"], ""),
            (
                &["model.arch=mobilenetv2", "model.shift.n_round=2"],
                "model.shift.n_round is 2, which needs a ResNet, model.arch is mobilenetv2",
            ),
            (
                &["model.arch=mobilenetv2", "model.shift.place=block"],
                "model.shift.place is block, which needs a ResNet, model.arch is mobilenetv2",
            ),
        ]);
    }

    #[test]
    fn a_frame_template_holds_one_number() {
        for good in ["img_{:05}.jpg", "{:06d}.png", "{}.jpg"] {
            assert!(is_frame_template(good), "{good}");
        }
        for bad in [
            "img.jpg", "{}{}", "{:5}", "{:0}", "{:0d}", "{:0xd}", "{", "}{}", "{}}", "{:02", "{n}",
        ] {
            assert!(!is_frame_template(bad), "{bad}");
        }
        check(&[
            (
                &["data.frame_template=img.jpg"],
                "data.frame_template is \"img.jpg\", it needs one number: {} or {:05}",
            ),
            (&["data.frame_template=img.jpg", "data.format=video"], ""),
        ]);
    }

    #[test]
    fn crops_and_flips_are_possible() {
        check(&[
            (
                &["data.val.size=257"],
                "data.val.size is 257, larger than data.val.short_side 256",
            ),
            (
                &["data.train.crop.multi_scale.scales=[]"],
                "data.train.crop.multi_scale.scales is [], it needs scales above 0 and up to 1",
            ),
            (
                &["data.train.crop={random_resized: {area: [0.5, 2], ratio: [1, 1]}}"],
                "data.train.crop.random_resized.area is (0.5, 2.0), it must be a range of shares, like [0.08, 1.0]",
            ),
            (
                &["data.train.crop={random_resized: {area: [0.5, 1], ratio: [2, 1]}}"],
                "data.train.crop.random_resized.ratio is (2.0, 1.0), it must be a range of ratios, like [0.75, 1.333]",
            ),
            (
                &["data.train.flip_swap=[[l, r]]"],
                "data.train.flip_swap names classes, data.class_names is not set",
            ),
            (
                &["data.train.flip_swap=[[l, r]]", "data.class_names=c.txt"],
                "",
            ),
            (
                &["data.train.flip_swap=[[l, l]]", "data.class_names=c.txt"],
                "data.train.flip_swap pairs \"l\" with \"l\": a class has one partner, and it is another class",
            ),
        ]);
        let twice = messages(&[
            "data.train.flip_swap=[[l, r], [r, x]]",
            "data.class_names=c.txt",
        ]);
        assert_eq!(twice.len(), 2, "{twice:?}");
    }

    #[test]
    fn dense_sampling_has_64_frames() {
        check(&[
            (&["data.dense=true", "model.num_segments=64"], ""),
            (
                &["data.dense=true", "model.num_segments=65"],
                "data.dense spreads the segments over 64 frames, model.num_segments is 65",
            ),
        ]);
    }

    #[test]
    fn only_float16_scales_the_loss() {
        check(&[
            (
                &["train.precision.loss_scale=128"],
                "train.precision.loss_scale is 128, but only the modes fp16 and o2 scale the loss",
            ),
            (&["train.precision={mode: o2, loss_scale: 128}"], ""),
            (
                &["train.precision={mode: fp16, loss_scale: 0}"],
                "train.precision.loss_scale is 0, it must be above 0",
            ),
        ]);
    }

    #[test]
    fn milestones_increase_and_may_lie_behind_the_end() {
        check(&[
            (&["train.epochs=1"], ""),
            (
                &["optim.schedule.step.milestones=[40, 20]"],
                "optim.schedule.step.milestones is [40.0, 20.0], it must be epochs above 0 in increasing order",
            ),
            (
                &["optim.schedule.step.gamma=0"],
                "optim.schedule.step.gamma is 0, it must be above 0",
            ),
            (
                &["optim.nesterov=true", "optim.momentum=0"],
                "optim.nesterov needs momentum, optim.momentum is 0",
            ),
        ]);
    }

    #[test]
    fn every_path_that_leads_nowhere_is_named_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::template();
        config.data.root = dir.path().into();
        config.data.train_list = dir.path().join("train.txt");
        fs_err::write(&config.data.train_list, "").unwrap();
        config.data.val_list = "none/val.txt".into();
        config.model.weights = Some(dir.path().into());
        let problems = config.check_files();
        let paths: Vec<_> = problems.iter().map(|p| p.path.as_str()).collect();
        assert_eq!(paths, ["data.val_list", "model.weights"]);
        assert_eq!(
            problems[0].to_string(),
            "data.val_list is none/val.txt: no such file\n  hint: relative paths start at the \
             directory that the program runs in"
        );
    }
}
