//! Which frames of a video make a clip. Frames are counted from 0.
//!
//! Each function follows the code it is named after, oddities included, because published
//! accuracies were reached with them; arithmetic is in the same order and precision, so that a
//! truncation falls on the same frame. Sources: `ops/dataset.py` of mit-han-lab/
//! temporal-shift-module at 1f6a834; `SampleFrames` and `DenseSampleFrames` of open-mmlab/mmaction2
//! at f2dcc05 (0.x) and 4d6c934 (1.x), for one frame per segment; `Sampler` with
//! `select_left: True` of PaddlePaddle/PaddleVideo at ed245e9.
//!
//! Oddities kept:
//! - Training with T <= frames < 2T gives the first T frames; the tail is never seen (all four).
//! - `mit` and `paddle` give T copies of frame 0 for short videos: in training below T frames, in
//!   validation at T frames or fewer.
//! - `mit` validates dense sampling at a random start; [`Mode::DenseVal`] draws it from `rng`.
//! - MMAction2 trains on a video of fewer than T frames with the last segment wrapped to frame 0
//!   when it rounds up to the end (3 frames, T = 8).
//! - A dense start is drawn below P - 1 of P positions: the last is never used in training.

use crate::order::SplitMix64;
use tsm_job::config::Sampler;

/// What the clip is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// One clip, a random frame of each of T equal segments.
    Train,
    /// One clip, the middle frames of the segments.
    Val,
    /// One clip by the original's test rule.
    Test,
    /// Two clips: [`Mode::Test`], then the first frames of the segments.
    TestTwice,
    /// One clip of T frames, 64/T apart, from a random start.
    DenseTrain,
    /// As `DenseTrain` (`mit`), or as `DenseTest` (the others validate on ten clips).
    DenseVal,
    /// Ten dense clips at evenly spaced starts.
    DenseTest,
}

/// Frames that a dense clip spans.
const DENSE_RANGE: u64 = 64;
/// Clips of a dense test.
const DENSE_CLIPS: u64 = 10;

/// Clips that [`sample`] returns in this mode.
pub fn num_clips(sampler: Sampler, mode: Mode) -> usize {
    match (sampler, mode) {
        (_, Mode::TestTwice) => 2,
        (_, Mode::DenseTest) => DENSE_CLIPS as usize,
        (Sampler::Mm0 | Sampler::Mm1 | Sampler::Paddle, Mode::DenseVal) => DENSE_CLIPS as usize,
        _ => 1,
    }
}

/// The frames of a video of `num_frames`: [`num_clips`] clips of `num_segments`, one after the
/// other, each index below `num_frames`.
///
/// # Panics
/// If `num_frames` or `num_segments` is 0.
pub fn sample(
    sampler: Sampler,
    mode: Mode,
    num_frames: u64,
    num_segments: usize,
    rng: &mut SplitMix64,
) -> Vec<u64> {
    match sampler {
        Sampler::Mit => mit(num_frames, num_segments, mode, rng),
        Sampler::Mm0 => mm0(num_frames, num_segments, mode, rng),
        Sampler::Mm1 => mm1(num_frames, num_segments, mode, rng),
        Sampler::Paddle => paddle(num_frames, num_segments, mode, rng),
    }
}

/// The original code. `Test` has no rule for short videos, unlike `Val`.
pub fn mit(num_frames: u64, num_segments: usize, mode: Mode, rng: &mut SplitMix64) -> Vec<u64> {
    check(num_frames, num_segments);
    match mode {
        Mode::Train => random_in_segments(num_frames, num_segments, rng)
            .unwrap_or_else(|| vec![0; num_segments]),
        Mode::Val => middle_or_zeros(num_frames, num_segments),
        Mode::Test => middles(num_frames, num_segments),
        Mode::TestTwice => [
            middles(num_frames, num_segments),
            starts(num_frames, num_segments),
        ]
        .concat(),
        Mode::DenseTrain | Mode::DenseVal => {
            dense_random(num_frames, num_segments, DENSE_RANGE, rng)
        }
        Mode::DenseTest => dense_even(num_frames, num_segments, DENSE_RANGE),
    }
}

/// MMAction2 0.x with `clip_len=1, frame_interval=1, num_clips=T`; validation is its test mode.
pub fn mm0(num_frames: u64, num_segments: usize, mode: Mode, rng: &mut SplitMix64) -> Vec<u64> {
    check(num_frames, num_segments);
    match mode {
        Mode::Train => random_in_segments(num_frames, num_segments, rng)
            .unwrap_or_else(|| stretched(num_frames, num_segments)),
        Mode::Val | Mode::Test => middles(num_frames, num_segments),
        Mode::TestTwice => [
            middles(num_frames, num_segments),
            starts(num_frames, num_segments),
        ]
        .concat(),
        Mode::DenseTrain => dense_random(num_frames, num_segments, DENSE_RANGE, rng),
        Mode::DenseVal | Mode::DenseTest => dense_even(num_frames, num_segments, DENSE_RANGE),
    }
}

/// MMAction2 1.x. For one frame per segment its rules are those of [`mm0`]; they part for 3D
/// networks only. (It truncates after adding `start_index`, which no frame has been seen to notice.)
pub fn mm1(num_frames: u64, num_segments: usize, mode: Mode, rng: &mut SplitMix64) -> Vec<u64> {
    mm0(num_frames, num_segments, mode, rng)
}

/// PaddleVideo. Its test is its validation; it has no second clip, so `TestTwice` adds that of
/// [`mit`].
pub fn paddle(num_frames: u64, num_segments: usize, mode: Mode, rng: &mut SplitMix64) -> Vec<u64> {
    check(num_frames, num_segments);
    match mode {
        Mode::Train => mit(num_frames, num_segments, Mode::Train, rng),
        Mode::Val | Mode::Test => middle_or_zeros(num_frames, num_segments),
        Mode::TestTwice => [
            middle_or_zeros(num_frames, num_segments),
            starts(num_frames, num_segments),
        ]
        .concat(),
        Mode::DenseTrain => dense_random(num_frames, num_segments, DENSE_RANGE, rng),
        Mode::DenseVal | Mode::DenseTest => dense_even(num_frames, num_segments, DENSE_RANGE),
    }
}

/// PaddleVideo's prediction tool, which does not sample as its own evaluation does
/// (`ppTSM_Inference_helper`, `PD/tools/utils.py`); videos below T frames give frames `0..T`
/// modulo the length.
pub fn paddle_predict(num_frames: u64, num_segments: usize) -> Vec<u64> {
    check(num_frames, num_segments);
    let per_segment = num_frames / num_segments as u64;
    (0..num_segments as u64)
        .map(|i| match per_segment {
            0 => i % num_frames,
            d => (d - 1) / 2 + i * d,
        })
        .collect()
}

/// The original's private `--only_even_indice`, for folders that keep only the frames with an even
/// number (1-based): the timeline is halved, a dense clip spans 32 of its frames. Uniform tests
/// ignore it. In no public commit of the original; after StanfordVL/RubiksNet,
/// `rubiksnet/dataset/core.py`.
///
/// # Panics
/// If `num_frames` is below 2 or `num_segments` is 0.
pub fn mit_even_only(
    num_frames: u64,
    num_segments: usize,
    mode: Mode,
    rng: &mut SplitMix64,
) -> Vec<u64> {
    let half = num_frames / 2;
    check(half, num_segments);
    let halved = match mode {
        Mode::Test | Mode::TestTwice => return mit(num_frames, num_segments, mode, rng),
        Mode::Train | Mode::Val => mit(half, num_segments, mode, rng),
        Mode::DenseTrain | Mode::DenseVal => dense_random(half, num_segments, DENSE_RANGE / 2, rng),
        Mode::DenseTest => dense_even(half, num_segments, DENSE_RANGE / 2),
    };
    halved.into_iter().map(|i| 2 * i + 1).collect()
}

fn check(num_frames: u64, num_segments: usize) {
    assert!(
        num_frames > 0 && num_segments > 0,
        "cannot sample {num_segments} segments from {num_frames} frames"
    );
}

/// A random frame of each of T whole segments; `None` when a segment has no whole frame.
fn random_in_segments(
    num_frames: u64,
    num_segments: usize,
    rng: &mut SplitMix64,
) -> Option<Vec<u64>> {
    let per_segment = num_frames / num_segments as u64;
    (per_segment > 0).then(|| {
        (0..num_segments as u64)
            .map(|i| i * per_segment + rng.below(per_segment))
            .collect()
    })
}

/// T frames spread over a video of fewer, rounded half to even as numpy does. The last may round
/// up to the video's length; MMAction2 then starts over (`out_of_bound_opt='loop'`).
fn stretched(num_frames: u64, num_segments: usize) -> Vec<u64> {
    let ratio = num_frames as f64 / num_segments as f64;
    (0..num_segments)
        .map(|i| (i as f64 * ratio).round_ties_even() as u64 % num_frames)
        .collect()
}

fn middle_or_zeros(num_frames: u64, num_segments: usize) -> Vec<u64> {
    if num_frames > num_segments as u64 {
        middles(num_frames, num_segments)
    } else {
        vec![0; num_segments]
    }
}

fn middles(num_frames: u64, num_segments: usize) -> Vec<u64> {
    let tick = num_frames as f64 / num_segments as f64;
    (0..num_segments)
        .map(|i| (tick / 2.0 + tick * i as f64) as u64)
        .collect()
}

fn starts(num_frames: u64, num_segments: usize) -> Vec<u64> {
    let tick = num_frames as f64 / num_segments as f64;
    (0..num_segments)
        .map(|i| (tick * i as f64) as u64)
        .collect()
}

fn dense_random(
    num_frames: u64,
    num_segments: usize,
    range: u64,
    rng: &mut SplitMix64,
) -> Vec<u64> {
    let num_positions = dense_positions(num_frames, range);
    let start = if num_positions == 1 {
        0
    } else {
        rng.below(num_positions - 1)
    };
    dense_clip(num_frames, num_segments, range, start).collect()
}

fn dense_even(num_frames: u64, num_segments: usize, range: u64) -> Vec<u64> {
    let last = (dense_positions(num_frames, range) - 1) as f64;
    let step = last / (DENSE_CLIPS - 1) as f64;
    (0..DENSE_CLIPS)
        .flat_map(|k| {
            // numpy.linspace sets its last element to the end itself.
            let start = if k + 1 == DENSE_CLIPS {
                last
            } else {
                k as f64 * step
            };
            dense_clip(num_frames, num_segments, range, start as u64)
        })
        .collect()
}

fn dense_positions(num_frames: u64, range: u64) -> u64 {
    1 + num_frames.saturating_sub(range)
}

/// T frames, `range / T` apart, wrapping at the end of the video.
fn dense_clip(
    num_frames: u64,
    num_segments: usize,
    range: u64,
    start: u64,
) -> impl Iterator<Item = u64> {
    let stride = range / num_segments as u64;
    (0..num_segments as u64).map(move |i| (start + i * stride) % num_frames)
}

#[cfg(test)]
mod tests;
