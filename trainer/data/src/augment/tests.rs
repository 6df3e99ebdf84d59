//! Tests of its parent module.

use super::*;
use std::collections::BTreeSet;

const RULES: [Rules; 3] = [Rules::Mit, Rules::Mm, Rules::Paddle];
const SCALES: [f64; 4] = [1.0, 0.875, 0.75, 0.66];

fn train(crop: TrainCrop, short_side: Option<u32>, flip: f64) -> TrainAug {
    TrainAug {
        short_side,
        crop,
        size: 224,
        flip,
        flip_swap: vec![],
    }
}

fn noise(width: u32, height: u32) -> Vec<u8> {
    let mut rng = SplitMix64::new(1);
    // Smooth enough to resemble a photograph, with an edge in every block.
    let (w, h) = (width as usize, height as usize);
    let coarse: Vec<u64> = (0..(w / 8 + 1) * (h / 8 + 1) * 3)
        .map(|_| rng.below(256))
        .collect();
    (0..w * h * 3)
        .map(|i| {
            let (c, x, y) = (i % 3, i / 3 % w, i / 3 / w);
            coarse[((y / 8) * (w / 8 + 1) + x / 8) * 3 + c] as u8
        })
        .collect()
}

#[test]
fn short_side_conventions() {
    assert_eq!(short_side_size(Rules::Mit, 320, 240, 256), (341, 256));
    assert_eq!(short_side_size(Rules::Paddle, 240, 320, 256), (256, 341));
    assert_eq!(short_side_size(Rules::Mm, 320, 240, 256), (341, 256));
    // 256 * 454 / 340 = 341.8: cut off by torchvision, rounded by MMAction2.
    assert_eq!(short_side_size(Rules::Mit, 454, 340, 256), (341, 256));
    assert_eq!(short_side_size(Rules::Mm, 454, 340, 256), (342, 256));
    for rules in RULES {
        assert_eq!(short_side_size(rules, 340, 256, 256), (340, 256));
    }
}

#[test]
fn centre_conventions() {
    // (341 - 224) / 2 = 58.5, (343 - 224) / 2 = 59.5.
    assert_eq!(center(Rules::Mit, 341, 343, 224), (58.0, 60.0));
    assert_eq!(center(Rules::Paddle, 341, 343, 224), (58.0, 60.0));
    assert_eq!(center(Rules::Mm, 341, 343, 224), (58.0, 59.0));
}

#[test]
fn multi_scale_sizes_equal_the_originals() {
    let sides = |base: u32| {
        let sizes = multi_scale_sizes(&SCALES, 224, (base, base + 100));
        assert_eq!(sizes.len(), 10);
        let mut sides: Vec<u32> = sizes.iter().map(|s| s.0).collect();
        sides.dedup();
        sides
            .into_iter()
            .collect::<BTreeSet<_>>()
            .into_iter()
            .rev()
            .collect::<Vec<_>>()
    };
    assert_eq!(sides(256), [256, 224, 192, 168]);
    assert_eq!(sides(240), [240, 210, 180, 158]);
    assert_eq!(sides(100), [100, 87, 75, 66]);
    // Snapped to 224, as 226 x 1.0 is less than 3 pixels away; 227 is not.
    assert_eq!(sides(226)[0], 224);
    assert_eq!(sides(227)[0], 227);
    // The original would ask for 224 pixels of 223.
    assert_eq!(sides(223)[0], 223);
    let sizes = multi_scale_sizes(&SCALES, 224, (340, 256));
    assert!(sizes.contains(&(224, 256)) && !sizes.contains(&(192, 256)));
}

#[test]
fn multi_scale_crops_lie_on_the_thirteen_points() {
    for rules in [Rules::Mit, Rules::Mm] {
        let mut places = BTreeSet::new();
        for seed in 0..4000 {
            let r = multi_scale(rules, &SCALES, 224, (340, 256), &mut SplitMix64::new(seed));
            if (r.width, r.height) == (192.0, 168.0) {
                // Steps of (340 - 192) / 4 = 37 and (256 - 168) / 4 = 22 pixels.
                places.insert((r.left as u32 / 37, r.top as u32 / 22));
                assert_eq!((r.left % 37.0, r.top % 22.0), (0.0, 0.0));
            }
        }
        assert_eq!(places, GRID.into_iter().collect());
    }
}

#[test]
fn paddle_rounds_a_fractional_grid() {
    let mut lefts = BTreeSet::new();
    for seed in 0..2000 {
        let r = multi_scale(
            Rules::Paddle,
            &[1.0],
            224,
            (102, 100),
            &mut SplitMix64::new(seed),
        );
        lefts.insert(r.left as u32);
        assert!(r.left + r.width <= 102.0 && (r.width - 100.0).abs() <= 1.0);
    }
    // Quarters of 2 pixels: 0, 0.5, 1, 1.5, 2, rounded half to even.
    assert_eq!(lefts, BTreeSet::from([0, 1, 2]));
    let r = multi_scale(Rules::Mit, &[1.0], 224, (102, 100), &mut SplitMix64::new(1));
    assert_eq!(r.left, 0.0);
}

#[test]
fn every_view_stays_within_the_frame() {
    let crops = [
        TrainCrop::MultiScale {
            scales: SCALES.to_vec(),
        },
        TrainCrop::RandomResized {
            area: (0.08, 1.0),
            ratio: (0.75, 4.0 / 3.0),
        },
        TrainCrop::Center {},
    ];
    for rules in RULES {
        for (k, crop) in crops.iter().enumerate() {
            for short_side in [None, Some(256)] {
                let aug = train(crop.clone(), short_side, 0.5);
                for (w, h) in [(340, 256), (223, 500), (176, 100), (1920, 1080), (17, 900)] {
                    for seed in 0..100 {
                        let view = train_view(rules, &aug, w, h, &mut SplitMix64::new(seed));
                        let Ok(View { rect: r, .. }) = view else {
                            assert!(k == 2 && short_side.is_none() && w.min(h) < 224);
                            continue;
                        };
                        assert!(
                            r.left >= 0.0
                                && r.top >= 0.0
                                && r.width > 0.0
                                && r.height > 0.0
                                && r.left + r.width <= f64::from(w)
                                && r.top + r.height <= f64::from(h),
                            "{rules:?} {aug:?} {w}x{h}: {r:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn random_resized_crops_keep_to_area_and_ratio() {
    for seed in 0..500 {
        let mut rng = SplitMix64::new(seed);
        let r = random_resized(
            Rules::Mit,
            (0.08, 1.0),
            (0.75, 4.0 / 3.0),
            (340, 256),
            &mut rng,
        );
        let (share, aspect) = (r.width * r.height / (340.0 * 256.0), r.width / r.height);
        assert!((0.075..=1.0).contains(&share), "{r:?}");
        assert!((0.74..1.35).contains(&aspect), "{r:?}");
    }
    // No crop of a whole 900x30 frame has such a ratio: the largest centred one.
    let fall = |rules| {
        random_resized(
            rules,
            (1.0, 1.0),
            (0.75, 4.0 / 3.0),
            (900, 30),
            &mut SplitMix64::new(0),
        )
    };
    assert_eq!(
        fall(Rules::Mit),
        Rect {
            left: 430.0,
            top: 0.0,
            width: 40.0,
            height: 30.0
        }
    );
    assert_eq!(
        fall(Rules::Mm),
        Rect {
            left: 435.0,
            top: 0.0,
            width: 30.0,
            height: 30.0
        }
    );
}

#[test]
fn a_centre_crop_of_a_small_frame_names_the_remedy() {
    let aug = train(TrainCrop::Center {}, None, 0.0);
    let reason = train_view(Rules::Mit, &aug, 176, 100, &mut SplitMix64::new(0)).unwrap_err();
    assert!(
        reason.contains("176x100") && reason.contains("data.train.short_side = 224"),
        "{reason}"
    );
}

#[test]
fn flips_as_often_as_asked() {
    let flips = |p: f64| {
        let aug = train(TrainCrop::Center {}, Some(256), p);
        (0..1000)
            .filter(|&s| {
                train_view(Rules::Mit, &aug, 340, 256, &mut SplitMix64::new(s))
                    .unwrap()
                    .flip
            })
            .count()
    };
    assert_eq!((flips(0.0), flips(1.0)), (0, 1000));
    assert!((430..570).contains(&flips(0.5)), "{}", flips(0.5));
}

#[test]
fn an_exact_crop_is_a_copy_and_a_flip_mirrors_it() {
    let (w, h) = (20, 12);
    let rgb = noise(w, h);
    let rect = Rect {
        left: 5.0,
        top: 2.0,
        width: 8.0,
        height: 8.0,
    };
    for rules in RULES {
        let mut out = vec![0; 8 * 8 * 3];
        let mut renderer = Renderer::new(rules);
        renderer.render(
            &rgb,
            w,
            h,
            &View {
                rect,
                size: 8,
                flip: false,
            },
            &mut out,
        );
        let mut mirrored = vec![0; 8 * 8 * 3];
        renderer.render(
            &rgb,
            w,
            h,
            &View {
                rect,
                size: 8,
                flip: true,
            },
            &mut mirrored,
        );
        for y in 0..8 {
            for x in 0..8 {
                let source = ((y + 2) * 20 + x + 5) * 3;
                assert_eq!(out[(y * 8 + x) * 3..][..3], rgb[source..][..3]);
                assert_eq!(mirrored[(y * 8 + 7 - x) * 3..][..3], rgb[source..][..3]);
            }
        }
    }
}

#[test]
fn one_pass_equals_resize_then_crop() {
    for rules in RULES {
        for (w, h) in [(320, 240), (455, 341), (171, 128)] {
            let rgb = noise(w, h);
            let aug = ValAug {
                short_side: 256,
                size: 224,
                batch_per_rank: None,
            };
            let view = val_view(rules, &aug, w, h).unwrap();
            let mut one_pass = vec![0; 224 * 224 * 3];
            let mut renderer = Renderer::new(rules);
            renderer.render(&rgb, w, h, &view, &mut one_pass);

            let (rw, rh) = short_side_size(rules, w, h, 256);
            let mut resized = Image::new(rw, rh, PixelType::U8x3);
            let options = ResizeOptions::new().resize_alg(renderer.algorithm);
            let source = ImageRef::new(w, h, &rgb, PixelType::U8x3).unwrap();
            Resizer::new()
                .resize(&source, &mut resized, &options)
                .unwrap();
            let (left, top) = center(rules, rw, rh, 224);
            let mut worst = 0;
            for y in 0..224 {
                for x in 0..224 * 3 {
                    let two = resized.buffer()
                        [((y + top as usize) * rw as usize + left as usize) * 3 + x];
                    worst = worst.max(two.abs_diff(one_pass[y * 224 * 3 + x]));
                }
            }
            assert!(worst <= 1, "{rules:?} {w}x{h}: {worst}");
        }
    }
}

// Made by parity/resize.py; the picture has an edge at every pixel, so that a filter of another
// width or another centre is off by tens.
#[test]
fn validation_pictures_equal_those_of_pil_and_opencv() {
    let parity: serde_json::Value =
        serde_json::from_str(include_str!("../../parity/resize.json")).unwrap();
    let cases = parity["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 3);
    for case in cases {
        let number = |key: &str| case[key].as_u64().unwrap() as u32;
        let (w, h, size) = (number("width"), number("height"), number("size"));
        let rgb: Vec<u8> = (0..w * h * 3)
            .map(|i| {
                let (c, x, y) = (i % 3, i / 3 % w, i / 3 / w);
                ((x * 37 + y * 91 + x * y * 13 + c * 50) % 256) as u8
            })
            .collect();
        let aug = ValAug {
            short_side: number("short_side"),
            size,
            batch_per_rank: None,
        };
        for (rules, key) in [
            (Rules::Mit, "pil"),
            (Rules::Paddle, "pil"),
            (Rules::Mm, "opencv"),
        ] {
            let view = val_view(rules, &aug, w, h).unwrap();
            let mut out = vec![0u8; (size * size * 3) as usize];
            Renderer::new(rules).render(&rgb, w, h, &view, &mut out);
            let expected = case[key].as_array().unwrap();
            assert_eq!(out.len(), expected.len());
            let worst = out
                .iter()
                .zip(expected)
                .map(|(&a, b)| u64::from(a).abs_diff(b.as_u64().unwrap()))
                .max();
            // Both round their weights to fixed point, each in its own way.
            assert!(worst <= Some(1), "{rules:?} {w}x{h}: {worst:?}");
        }
    }
}

#[test]
fn flip_swap_exchanges_labels_by_name() {
    let mut config = crate::testing::config(std::path::Path::new("/"));
    let names: Vec<String> = ["left", "up", "right", "down"].map(String::from).into();
    assert_eq!(flip_label_map(&config, &[]).unwrap(), [0, 1, 2, 3]);
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    config.data.train.flip_swap = vec![pair("right", "left")];
    assert_eq!(flip_label_map(&config, &names).unwrap(), [2, 1, 0, 3]);
    let text = flip_label_map(&config, &[]).unwrap_err().to_string();
    assert!(text.contains("set data.class_names"), "{text}");
    config.data.train.flip_swap = vec![
        pair("right", "left"),
        pair("left", "up"),
        pair("down", "down"),
        pair("lift", "rihgt"),
    ];
    let error = flip_label_map(&config, &names).unwrap_err();
    assert_eq!(exit::code_of(&error), exit::CONFIG);
    let text = error.to_string();
    for part in [
        "[`left`, `up`] repeats",
        "[`down`, `down`] repeats",
        "`lift`",
        "`rihgt`",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}
