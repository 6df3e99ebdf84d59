use super::testing::config;
use super::*;
use tsm_job::config::{Arch, HeadOrder, Model, ShiftDirection, ShiftMode, ShiftPlace};
use tsm_torch_ext::ops;

const RESNETS: [Arch; 2] = [Arch::Resnet18, Arch::Resnet50];
const BOTH: [Arch; 2] = [Arch::Resnet50, Arch::Mobilenetv2];

/// A narrow network whose classifier is large enough to tell logits apart.
fn small(arch: Arch, mode: ShiftMode) -> Model {
    let mut cfg = Model {
        width: 0.25,
        ..config(arch, mode)
    };
    cfg.head.init_std = 0.1;
    cfg
}

fn build(cfg: &Model) -> Network {
    Network::new(cfg, Device::Cpu, 3).unwrap()
}

/// Two clips of 8 frames of 32 x 32 that change over time; equal in every run.
fn frames() -> Tensor {
    let ramp = Tensor::arange(16 * 3 * 32 * 32, (Kind::Float, Device::Cpu));
    ((&ramp * 0.37).sin() + (ramp * 0.0011).sin()).view([16, 3, 32, 32])
}

fn reversed(frames: &Tensor) -> Tensor {
    let size = frames.size();
    frames
        .view([-1, 8, size[1], size[2], size[3]])
        .flip([1])
        .view(size.as_slice())
}

fn logits(net: &Network, frames: &Tensor) -> Tensor {
    tch::no_grad(|| net.forward(frames, false))
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    f64::try_from((a - b).abs().max() / a.abs().max()).unwrap()
}

#[test]
fn shifted_blocks_and_their_folds() {
    // Counts of the original code; folds of ResNet-50 and MobileNetV2 with div 8.
    for (arch, count) in [
        (Arch::Resnet18, 8),
        (Arch::Resnet34, 16),
        (Arch::Resnet50, 16),
        (Arch::Resnet101, 18),
        (Arch::Resnet152, 26),
        (Arch::Mobilenetv2, 10),
    ] {
        let cfg = Model {
            width: 0.125,
            ..config(arch, ShiftMode::Bi)
        };
        assert_eq!(build(&cfg).summary(64).shifted.len(), count, "{arch:?}");
        let tsn = Model {
            width: 0.125,
            ..config(arch, ShiftMode::None)
        };
        assert_eq!(build(&tsn).summary(64).shifted.len(), 0, "{arch:?}");
    }
    let folds = |arch| {
        build(&config(arch, ShiftMode::Bi))
            .summary(64)
            .shifted
            .iter()
            .map(|l| l.fold)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        folds(Arch::Resnet50),
        [
            8, 32, 32, 32, 64, 64, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256
        ]
    );
    assert_eq!(folds(Arch::Mobilenetv2), [3, 4, 4, 8, 8, 8, 12, 12, 20, 20]);
    let mobilenet: Vec<String> = build(&config(Arch::Mobilenetv2, ShiftMode::Bi))
        .summary(64)
        .shifted
        .into_iter()
        .map(|l| l.name)
        .collect();
    let blocks = [3, 5, 6, 8, 9, 10, 12, 13, 15, 16];
    assert_eq!(mobilenet, blocks.map(|i| format!("features.{i}.conv.0.0")));
}

#[test]
fn n_round_shifts_every_nth_block_of_a_stage() {
    let mut cfg = small(Arch::Resnet34, ShiftMode::Bi);
    cfg.shift.n_round = Some(2);
    let names: Vec<String> = build(&cfg)
        .summary(64)
        .shifted
        .into_iter()
        .map(|l| l.name)
        .collect();
    // Stages of 3, 4, 6 and 3 blocks.
    let expected = [
        "1.0", "1.2", "2.0", "2.2", "3.0", "3.2", "3.4", "4.0", "4.2",
    ];
    assert_eq!(names, expected.map(|block| format!("layer{block}.conv1")));
}

#[test]
fn published_parameters_and_macs() {
    let mut cfg = config(Arch::Resnet50, ShiftMode::Bi);
    cfg.num_classes = 400;
    let resnet = build(&cfg).summary(224);
    assert_eq!(resnet.params, 24_327_632);
    let with_bn = resnet.macs + 2 * resnet.bn_elements;
    assert_eq!(
        (with_bn as f64 / 1e7).round(),
        3288.0,
        "32.88 G as MMAction2 counts, ours {with_bn}"
    );
    cfg.arch = Arch::Mobilenetv2;
    let mobilenet = build(&cfg).summary(224);
    assert_eq!(mobilenet.params, 2_736_272);
    assert_eq!(
        (mobilenet.macs as f64 / 1e6).round(),
        2400.0,
        "{}",
        mobilenet.macs
    );
    let text = mobilenet.to_string();
    assert!(
        text.starts_with("2.736 M parameters, 2.40 G MACs"),
        "{text}"
    );
    assert!(
        text.contains("features.16.conv.0.0   160 channels, fold 20"),
        "{text}"
    );
}

#[test]
fn tsn_is_blind_to_order_and_tsm_is_not() {
    let x = frames();
    for arch in BOTH {
        let tsn = build(&small(arch, ShiftMode::None));
        assert!(
            distance(&logits(&tsn, &x), &logits(&tsn, &reversed(&x))) < 1e-5,
            "{arch:?}"
        );
        let tsm = build(&small(arch, ShiftMode::Bi));
        assert!(
            distance(&logits(&tsm, &x), &logits(&tsm, &reversed(&x))) > 1e-2,
            "{arch:?}"
        );
    }
}

#[test]
fn paddle_shift_of_the_reversed_clip_is_mit_shift_of_the_clip() {
    for arch in BOTH {
        let mit = small(arch, ShiftMode::Bi);
        let mut paddle = mit.clone();
        paddle.shift.direction = ShiftDirection::Paddle;
        let (mit, paddle, x) = (build(&mit), build(&paddle), frames());
        assert!(
            distance(&logits(&mit, &x), &logits(&paddle, &reversed(&x))) < 1e-5,
            "{arch:?}"
        );
        assert!(
            distance(&logits(&mit, &x), &logits(&paddle, &x)) > 1e-2,
            "{arch:?}"
        );
    }
}

#[test]
fn one_way_shift_takes_nothing_from_the_future() {
    let later = |x: &Tensor| {
        let y = x.copy();
        let _ = y.narrow(0, 5, 3).zero_();
        y
    };
    let clip = frames().narrow(0, 0, 8).copy();
    for (mode, causal) in [(ShiftMode::Uni, true), (ShiftMode::Bi, false)] {
        for arch in BOTH {
            let net = build(&small(arch, mode));
            let last_map = |x: &Tensor| {
                let mut seen = None;
                let _ = tch::no_grad(|| {
                    net.forward_visiting(x, false, &mut |_, y| seen = Some(y.copy()))
                });
                seen.unwrap().narrow(0, 0, 5)
            };
            let moved = distance(&last_map(&clip), &last_map(&later(&clip)));
            assert_eq!(
                moved < 1e-6,
                causal,
                "{arch:?} {mode:?}: earlier frames moved by {moved}"
            );
        }
    }
}

#[test]
fn block_placement_shifts_the_shortcut_too() {
    for arch in RESNETS {
        let residual = small(arch, ShiftMode::Bi);
        let mut whole = residual.clone();
        whole.shift.place = ShiftPlace::Block;
        let (residual, whole, x) = (build(&residual), build(&whole), frames());
        assert!(
            distance(&logits(&residual, &x), &logits(&whole, &x)) > 1e-2,
            "{arch:?}"
        );
        assert_eq!(whole.summary(64).shifted[0].name, "layer1.0");
    }
    // With the branch silenced only the shortcut is left: the identity, or the shift itself.
    let mut cfg = small(Arch::Resnet18, ShiftMode::Bi);
    cfg.shift.place = ShiftPlace::Block;
    let net = build(&cfg);
    for param in net
        .params()
        .iter()
        .filter(|p| p.name.starts_with("layer1.") && p.name.contains("bn2."))
    {
        let _ = tch::no_grad(|| param.tensor.shallow_clone().zero_());
    }
    let mut maps = Vec::new();
    let _ =
        tch::no_grad(|| net.forward_visiting(&frames(), false, &mut |_, y| maps.push(y.copy())));
    let stem = (&maps[0] / (1.0f64 + 1e-5).sqrt()).relu().max_pool2d(
        [3, 3],
        [2, 2],
        [1, 1],
        [1, 1],
        false,
    );
    let shift = |x: &Tensor| ops::temporal_shift(x, 8, 2, ops::ShiftPattern::Bi, false).unwrap();
    assert!(distance(&shift(&shift(&stem)), &maps[1]) < 1e-5);
}

#[test]
fn temporal_pool_halves_the_segments_before_layer2() {
    for segments in [8, 2] {
        let mut cfg = small(Arch::Resnet18, ShiftMode::Bi);
        cfg.temporal_pool = true;
        cfg.num_segments = segments;
        let net = build(&cfg);
        let x = frames();
        let mut counts = Vec::new();
        let y = net.forward_visiting(&x, false, &mut |stage, y| {
            counts.push((stage.to_string(), y.size()[0]))
        });
        let expected = [
            ("conv1", 16),
            ("layer1", 16),
            ("layer2", 8),
            ("layer3", 8),
            ("layer4", 8),
        ];
        assert_eq!(counts, expected.map(|(stage, n)| (stage.to_string(), n)));
        assert_eq!(y.size(), [i64::from(16 / segments), 10]);
        let nhwc = ops::to_channels_last(&x).unwrap();
        assert!(distance(&y, &net.forward(&nhwc, false)) < 1e-5);
    }
    let mut cfg = small(Arch::Resnet18, ShiftMode::Bi);
    let whole = build(&cfg).summary(64).macs;
    cfg.temporal_pool = true;
    let pooled = build(&cfg).summary(64).macs;
    assert!(
        pooled > whole / 2 && pooled < whole * 3 / 4,
        "{pooled} of {whole}"
    );
}

#[test]
fn temporal_max_pool_equals_max_pool3d() {
    for segments in [2, 4, 8] {
        let x = frames().narrow(1, 0, 2).copy();
        let expected = x
            .view([-1, segments, 2, 32, 32])
            .transpose(1, 2)
            .max_pool3d([3, 1, 1], [2, 1, 1], [1, 0, 0], [1, 1, 1], false)
            .transpose(1, 2)
            .reshape([-1, 2, 32, 32]);
        for nhwc in [false, true] {
            let input = if nhwc {
                ops::to_channels_last(&x).unwrap()
            } else {
                x.shallow_clone()
            };
            let y = shift::temporal_max_pool(&input, segments);
            assert!(y.equal(&expected));
            assert_eq!(ops::is_channels_last(&y), nhwc);
        }
    }
}

#[test]
fn channels_last_holds_through_the_network_and_changes_nothing() {
    let x = frames();
    for arch in BOTH {
        let net = build(&small(arch, ShiftMode::Bi));
        let plain = logits(&net, &x);
        net.to_channels_last();
        let mut maps = 0;
        let nhwc = tch::no_grad(|| {
            net.forward_visiting(
                &ops::to_channels_last(&x).unwrap(),
                true,
                &mut |stage, y| {
                    assert!(
                        ops::is_channels_last(y),
                        "{stage} {:?} {:?}",
                        y.size(),
                        y.stride()
                    );
                    maps += 1;
                },
            )
        });
        assert!(maps >= 1 && nhwc.size() == [2, 10]);
        let fresh = build(&small(arch, ShiftMode::Bi));
        fresh.to_channels_last();
        assert!(distance(&plain, &logits(&fresh, &ops::to_channels_last(&x).unwrap())) < 1e-5);
    }
}

#[test]
fn partial_bn_freezes_all_but_the_first() {
    for arch in BOTH {
        let mut cfg = small(arch, ShiftMode::Bi);
        cfg.partial_bn = true;
        let net = build(&cfg);
        let bn = |p: &&Param| matches!(p.role, ParamRole::BnWeight | ParamRole::BnBias);
        assert_eq!(
            net.params().iter().filter(bn).filter(|p| !p.frozen).count(),
            2
        );
        assert!(
            net.params()
                .iter()
                .all(|p| p.tensor.requires_grad() != p.frozen)
        );
        assert!(net.params().iter().filter(|p| !bn(p)).all(|p| !p.frozen));
        let before: Vec<Tensor> = net.buffers().iter().map(|b| b.tensor.copy()).collect();
        net.forward(&frames(), true).sum(Kind::Float).backward();
        for (i, (buffer, old)) in net.buffers().iter().zip(&before).enumerate() {
            assert_eq!(buffer.tensor.equal(old), i >= 2, "{}", buffer.name);
        }
    }
}

#[test]
fn roles_count_as_in_the_original_groups() {
    let count = |net: &Network, role| net.params().iter().filter(|p| p.role == role).count();
    use ParamRole::*;
    // ResNet-50: 1, 0, 52, 0, 106, 1, 1; MobileNetV2 has 52 convolutions, one BatchNorm each.
    for (arch, weights, bn) in [(Arch::Resnet50, 52, 53), (Arch::Mobilenetv2, 51, 52)] {
        let net = build(&small(arch, ShiftMode::Bi));
        let counts = [
            FirstConvWeight,
            FirstConvBias,
            Weight,
            Bias,
            BnWeight,
            BnBias,
            FcWeight,
            FcBias,
        ]
        .map(|r| count(&net, r));
        assert_eq!(counts, [1, 0, weights, 0, bn, bn, 1, 1], "{arch:?}");
    }
}

#[test]
fn heads_average_before_or_after_the_classifier() {
    let x = frames();
    let mut cfg = small(Arch::Resnet18, ShiftMode::Bi);
    let tsm = build(&cfg);
    cfg.head.order = HeadOrder::MeanDropoutFc;
    let tsn = build(&cfg);
    // Without dropout both are linear and equal; with it only the order differs.
    assert!(distance(&logits(&tsm, &x), &logits(&tsn, &x)) < 1e-5);
    cfg.head.dropout = 0.5;
    let dropped = build(&cfg);
    assert!(
        logits(&dropped, &x).equal(&logits(&tsn, &x)),
        "dropout acts only in training"
    );
    cfg.partial_bn = true;
    let train = |seed| {
        tch::manual_seed(seed);
        tch::no_grad(|| build(&cfg).forward(&x, true))
    };
    assert!(!train(1).equal(&train(2)));
}

#[test]
fn equal_seeds_give_equal_networks() {
    let cfg = small(Arch::Resnet18, ShiftMode::Bi);
    let nets = [7, 7, 8].map(|seed| Network::new(&cfg, Device::Cpu, seed).unwrap());
    let conv = |i: usize| &nets[i].params()[0].tensor;
    assert!(conv(0).equal(conv(1)) && !conv(0).equal(conv(2)));
}

#[test]
fn half_weights_keep_float_norms_and_logits() {
    for arch in BOTH {
        let net = build(&small(arch, ShiftMode::Bi));
        let exact = logits(&net, &frames());
        net.cast_half_except_bn(Kind::BFloat16);
        for param in net.params() {
            let bn = matches!(param.role, ParamRole::BnWeight | ParamRole::BnBias);
            assert_eq!(
                param.tensor.kind(),
                if bn { Kind::Float } else { Kind::BFloat16 },
                "{}",
                param.name
            );
        }
        assert!(net.buffers().iter().all(|b| b.tensor.kind() == Kind::Float));
        let y = net.forward(&frames(), false);
        assert_eq!(y.kind(), Kind::Float);
        let error = distance(&exact, &y);
        assert!(error < 0.1, "{arch:?}: {error}");
        net.forward(&frames(), true).sum(Kind::Float).backward();
        assert!(
            net.params()
                .iter()
                .all(|p| p.tensor.grad().kind() == p.tensor.kind())
        );
    }
}

#[test]
fn values_that_do_not_fit_are_named() {
    let ok = config(Arch::Mobilenetv2, ShiftMode::Bi);
    let with = |change: &dyn Fn(&mut Model)| {
        let mut cfg = ok.clone();
        change(&mut cfg);
        let error = Network::new(&cfg, Device::Cpu, 0)
            .err()
            .expect("the values do not fit");
        assert_eq!(exit::code_of(&error), exit::CONFIG);
        error.to_string()
    };
    assert!(with(&|c| c.temporal_pool = true).contains("model.temporal_pool"));
    assert!(with(&|c| c.shift.place = ShiftPlace::Block).contains("model.shift.place"));
    assert!(with(&|c| c.shift.n_round = Some(2)).contains("model.shift.n_round"));
    assert!(with(&|c| c.shift.div = 400).contains("model.shift.div is 400"));
    assert!(with(&|c| c.shift.div = 0).contains("model.shift.div is 0"));
    assert!(with(&|c| c.width = f64::NAN).contains("model.width"));
    assert!(with(&|c| c.num_classes = 0).contains("model.num_classes"));
    let odd = with(&|c| {
        c.arch = Arch::Resnet18;
        c.temporal_pool = true;
        c.num_segments = 7;
    });
    assert!(odd.contains("model.num_segments is 7"), "{odd}");
}
