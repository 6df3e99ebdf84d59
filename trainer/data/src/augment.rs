//! From a decoded frame to the square that enters the network, in one pass.
//!
//! Short-side resize, crop and resize compose to one source rectangle, chosen once per clip
//! ([`View`]), and each frame is cropped, resized and mirrored in one go ([`Renderer`]). Where a
//! resize precedes the crop, the crop's rectangle is mapped back to the stored frame: when the
//! crop keeps its size (validation) this is the same picture up to rounding to 8 bits, because a
//! filter looks at the pixels beyond the rectangle as it does in the resized frame; when the
//! crop is resized again (training) one filter replaces two, which is slightly sharper.
//!
//! Rounding and filter follow the code that the sampler is named after: `mit` and `paddle` use
//! PIL's bilinear filter, which widens when shrinking (antialiases); MMAction2 uses OpenCV's,
//! which does not. Sources: `ops/transforms.py` of temporal-shift-module at 1f6a834, torchvision's
//! transforms, `processing.py` of MMAction2 at 4d6c934, `augmentations.py` of PaddleVideo at ed245e9.

use crate::order::SplitMix64;
use anyhow::Result;
use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use tsm_job::Config;
use tsm_job::config::{Sampler, TrainAug, TrainCrop, ValAug};
use tsm_job::exit::{self, Coded};

/// Whose arithmetic to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// Short side as torchvision, centre rounded half to even.
    Mit,
    /// Short side to the nearest pixel, centre rounded down.
    Mm,
    /// As `Mit`; the crop grid has fractional steps.
    Paddle,
}

impl From<Sampler> for Rules {
    fn from(sampler: Sampler) -> Self {
        match sampler {
            Sampler::Mit => Rules::Mit,
            Sampler::Mm0 | Sampler::Mm1 => Rules::Mm,
            Sampler::Paddle => Rules::Paddle,
        }
    }
}

/// A rectangle in pixels of the stored frame; edges may lie between pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rect {
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
}

/// What becomes of every frame of a clip.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct View {
    pub rect: Rect,
    /// Side of the square it is resized to, in pixels.
    pub size: u32,
    /// Mirrored left to right; the label may change with it ([`flip_label_map`]).
    pub flip: bool,
}

/// Width and height after the short side became `short`.
pub fn short_side_size(rules: Rules, width: u32, height: u32, short: u32) -> (u32, u32) {
    let (w, h, s) = (f64::from(width), f64::from(height), f64::from(short));
    match rules {
        Rules::Mit | Rules::Paddle if width <= height => (short, (s * h / w) as u32),
        Rules::Mit | Rules::Paddle => ((s * w / h) as u32, short),
        Rules::Mm => {
            let scale = s / w.min(h);
            ((w * scale + 0.5) as u32, (h * scale + 0.5) as u32)
        }
    }
}

/// Left and top of the centred square of `size`.
fn center(rules: Rules, width: u32, height: u32, size: u32) -> (f64, f64) {
    let offset = |side: u32| {
        let half = f64::from(side - size) / 2.0;
        match rules {
            Rules::Mit | Rules::Paddle => half.round_ties_even(),
            Rules::Mm => half.floor(),
        }
    };
    (offset(width), offset(height))
}

/// The view of a validation clip whose frames are `width` x `height`.
///
/// # Errors
/// If the centre crop is larger than the resized frame.
pub fn val_view(rules: Rules, aug: &ValAug, width: u32, height: u32) -> Result<View, String> {
    let resized = short_side_size(rules, width, height, aug.short_side);
    let rect = center_rect(rules, resized, aug.size)
        .ok_or_else(|| too_small(width, height, aug.size, "data.val.short_side"))?;
    Ok(View {
        rect: map_back(rect, resized, (width, height)),
        size: aug.size,
        flip: false,
    })
}

/// The view of a training clip whose frames are `width` x `height`.
///
/// # Errors
/// If a centre crop is larger than the frame.
pub fn train_view(
    rules: Rules,
    aug: &TrainAug,
    width: u32,
    height: u32,
    rng: &mut SplitMix64,
) -> Result<View, String> {
    let resized = match aug.short_side {
        Some(short) => short_side_size(rules, width, height, short),
        None => (width, height),
    };
    let rect = match &aug.crop {
        TrainCrop::MultiScale { scales } => multi_scale(rules, scales, aug.size, resized, rng),
        TrainCrop::RandomResized { area, ratio } => {
            random_resized(rules, *area, *ratio, resized, rng)
        }
        TrainCrop::Center {} => center_rect(rules, resized, aug.size)
            .ok_or_else(|| too_small(width, height, aug.size, "data.train.short_side"))?,
    };
    Ok(View {
        rect: map_back(rect, resized, (width, height)),
        size: aug.size,
        flip: rng.unit() < aug.flip,
    })
}

fn too_small(width: u32, height: u32, size: u32, key: &str) -> String {
    format!(
        "frames are {width}x{height}, too small for a centre crop of {size}; set {key} = {size} \
         or more"
    )
}

fn center_rect(rules: Rules, (width, height): (u32, u32), size: u32) -> Option<Rect> {
    (size <= width.min(height)).then(|| {
        let (left, top) = center(rules, width, height, size);
        let side = f64::from(size);
        Rect {
            left,
            top,
            width: side,
            height: side,
        }
    })
}

fn map_back(rect: Rect, from: (u32, u32), to: (u32, u32)) -> Rect {
    let sx = f64::from(to.0) / f64::from(from.0);
    let sy = f64::from(to.1) / f64::from(from.1);
    let (left, top) = (rect.left * sx, rect.top * sy);
    Rect {
        left,
        top,
        // Rounding must not push an edge out of the frame.
        width: (rect.width * sx).min(f64::from(to.0) - left),
        height: (rect.height * sy).min(f64::from(to.1) - top),
    }
}

/// The 13 places of a crop on a grid of quarters, as (x, y).
const GRID: [(u32, u32); 13] = [
    (0, 0),
    (4, 0),
    (0, 4),
    (4, 4),
    (2, 2),
    (0, 2),
    (4, 2),
    (2, 4),
    (2, 0),
    (1, 1),
    (3, 1),
    (1, 3),
    (3, 3),
];

/// Widths and heights that a multi-scale crop chooses from: shares of the short side, at most one
/// scale apart. A side within 3 pixels of the network's is that side.
///
/// The original may thereby ask for more pixels than the frame has (a short side of 222 or 223
/// for 224) and fills with black; here the crop ends at the frame.
fn multi_scale_sizes(scales: &[f64], size: u32, (width, height): (u32, u32)) -> Vec<(u32, u32)> {
    let base = width.min(height);
    let sides: Vec<u32> = scales
        .iter()
        .map(|scale| {
            let side = (f64::from(base) * scale) as u32;
            let side = if side.abs_diff(size) < 3 { size } else { side };
            side.clamp(1, base)
        })
        .collect();
    let mut pairs = Vec::new();
    for (i, &h) in sides.iter().enumerate() {
        for (j, &w) in sides.iter().enumerate() {
            if i.abs_diff(j) <= 1 {
                pairs.push((w, h));
            }
        }
    }
    pairs
}

fn multi_scale(
    rules: Rules,
    scales: &[f64],
    size: u32,
    frame: (u32, u32),
    rng: &mut SplitMix64,
) -> Rect {
    let sizes = multi_scale_sizes(scales, size, frame);
    let (w, h) = sizes[rng.below(sizes.len() as u64) as usize];
    let (gx, gy) = GRID[rng.below(GRID.len() as u64) as usize];
    let edges = |steps: u32, side: u32, crop: u32| match rules {
        Rules::Mit | Rules::Mm => {
            let low = f64::from(steps * ((side - crop) / 4));
            (low, low + f64::from(crop))
        }
        // PIL rounds both edges of a fractional box.
        Rules::Paddle => {
            let low = f64::from(steps) * (f64::from(side - crop) / 4.0);
            let high = (low + f64::from(crop)).round_ties_even();
            (low.round_ties_even(), high.min(f64::from(side)))
        }
    };
    let (left, right) = edges(gx, frame.0, w);
    let (top, bottom) = edges(gy, frame.1, h);
    Rect {
        left,
        top,
        width: right - left,
        height: bottom - top,
    }
}

/// Ten tries at an area share and a log-uniform aspect ratio, then the largest centred crop:
/// within the ratio's range (torchvision) or square (MMAction2).
fn random_resized(
    rules: Rules,
    area: (f64, f64),
    ratio: (f64, f64),
    (width, height): (u32, u32),
    rng: &mut SplitMix64,
) -> Rect {
    let (w, h) = (f64::from(width), f64::from(height));
    for _ in 0..10 {
        let target = w * h * rng.range(area.0, area.1);
        let aspect = rng.range(ratio.0.ln(), ratio.1.ln()).exp();
        let cw = (target * aspect).sqrt().round_ties_even();
        let ch = (target / aspect).sqrt().round_ties_even();
        if (1.0..=w).contains(&cw) && (1.0..=h).contains(&ch) {
            let top = rng.below((h - ch) as u64 + 1) as f64;
            let left = rng.below((w - cw) as u64 + 1) as f64;
            return Rect {
                left,
                top,
                width: cw,
                height: ch,
            };
        }
    }
    let (cw, ch) = match rules {
        Rules::Mm => (w.min(h), w.min(h)),
        Rules::Mit | Rules::Paddle if w / h < ratio.0 => {
            (w, (w / ratio.0).round_ties_even().min(h))
        }
        Rules::Mit | Rules::Paddle if w / h > ratio.1 => {
            ((h * ratio.1).round_ties_even().min(w), h)
        }
        Rules::Mit | Rules::Paddle => (w, h),
    };
    Rect {
        left: ((w - cw) / 2.0).floor(),
        top: ((h - ch) / 2.0).floor(),
        width: cw,
        height: ch,
    }
}

/// The label of a mirrored clip for each label, from `data.train.flip_swap`.
///
/// # Errors
/// With exit code [`exit::CONFIG`], all at once: pairs without a class names file, names that
/// are not classes, names in two pairs or paired with themselves.
pub fn flip_label_map(config: &Config, class_names: &[String]) -> Result<Vec<u32>> {
    let pairs = &config.data.train.flip_swap;
    let mut map: Vec<u32> = (0..config.model.num_classes).collect();
    let mut problems = Vec::new();
    if !pairs.is_empty() && class_names.is_empty() {
        problems.push(
            "data.train.flip_swap names classes, but there are no class names; set data.class_names"
                .to_owned(),
        );
    } else {
        for (a, b) in pairs {
            let label = |name: &String| class_names.iter().position(|n| n == name);
            let missing: Vec<String> = [a, b]
                .into_iter()
                .filter(|name| label(name).is_none())
                .map(|name| {
                    format!(
                        "data.train.flip_swap: `{name}` is not among the {} names of \
                         data.class_names",
                        class_names.len()
                    )
                })
                .collect();
            problems.extend(missing);
            let (Some(la), Some(lb)) = (label(a), label(b)) else {
                continue;
            };
            let fresh = |l: usize| map.get(l).is_some_and(|&to| to as usize == l);
            if la == lb || !fresh(la) || !fresh(lb) {
                problems.push(format!(
                    "data.train.flip_swap: [`{a}`, `{b}`] repeats a class; each class changes \
                     places with one other"
                ));
                continue;
            }
            map[la] = lb as u32;
            map[lb] = la as u32;
        }
    }
    if problems.is_empty() {
        Ok(map)
    } else {
        Err(Coded::new(exit::CONFIG, problems.join("\n")).into())
    }
}

/// Draws frames through a [`View`], one per thread; its buffers are kept between frames.
pub struct Renderer {
    resizer: Resizer,
    algorithm: ResizeAlg,
}

impl Renderer {
    pub fn new(rules: Rules) -> Self {
        Renderer {
            resizer: Resizer::new(),
            algorithm: match rules {
                Rules::Mit | Rules::Paddle => ResizeAlg::Convolution(FilterType::Bilinear),
                Rules::Mm => ResizeAlg::Interpolation(FilterType::Bilinear),
            },
        }
    }

    /// Fills `out`, `[size, size, 3]`, from `rgb`, `[height, width, 3]`.
    ///
    /// # Panics
    /// If a buffer's length does not fit its size, or the view reaches out of the frame.
    pub fn render(&mut self, rgb: &[u8], width: u32, height: u32, view: &View, out: &mut [u8]) {
        let size = view.size;
        assert_eq!(
            rgb.len(),
            width as usize * height as usize * 3,
            "frame {width}x{height}"
        );
        assert_eq!(
            out.len(),
            size as usize * size as usize * 3,
            "output {size}x{size}"
        );
        let Rect {
            left,
            top,
            width: w,
            height: h,
        } = view.rect;
        let options = ResizeOptions::new()
            .resize_alg(self.algorithm)
            .crop(left, top, w, h);
        let drawn = ImageRef::new(width, height, rgb, PixelType::U8x3)
            .map_err(|e| e.to_string())
            .and_then(|source| {
                let mut target = Image::from_slice_u8(size, size, out, PixelType::U8x3)
                    .map_err(|e| e.to_string())?;
                self.resizer
                    .resize(&source, &mut target, &options)
                    .map_err(|e| e.to_string())
            });
        if let Err(reason) = drawn {
            panic!("{:?} of a {width}x{height} frame: {reason}", view.rect);
        }
        if view.flip {
            mirror(out, size as usize);
        }
    }
}

/// Mirrors each row in place, while the picture is still in the cache.
fn mirror(rgb: &mut [u8], width: usize) {
    for row in rgb.chunks_exact_mut(width * 3) {
        let (pixels, _) = row.as_chunks_mut::<3>();
        pixels.reverse();
    }
}

#[cfg(test)]
mod tests {
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
            serde_json::from_str(include_str!("../parity/resize.json")).unwrap();
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
}
