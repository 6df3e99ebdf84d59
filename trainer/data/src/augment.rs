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
mod tests;
