//! Tests of its parent module.

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
