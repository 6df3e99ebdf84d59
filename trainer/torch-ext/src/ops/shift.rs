//! The temporal shift as one differentiable operation.

use std::ffi::c_int;

use tch::Tensor;

use super::{Ptr, ptr};
use crate::error::{Result, check};

/// Which channels a [`temporal_shift`] moves, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ShiftPattern {
    /// One fold from each neighbouring segment (offline recognition).
    Bi,
    /// Only channels `[0, fold)`, from the previous segment: causal, for online recognition.
    Uni,
}

impl ShiftPattern {
    /// The segment offsets that feed channels `[0, fold)` and `[fold, 2 * fold)`.
    fn directions(self, paddle: bool) -> (i64, i64) {
        match (self, paddle) {
            (ShiftPattern::Bi, false) => (1, -1),
            (ShiftPattern::Bi, true) => (-1, 1),
            (ShiftPattern::Uni, _) => (-1, 0),
        }
    }
}

#[expect(unsafe_code, reason = "declarations of csrc/core.cpp")]
unsafe extern "C" {
    fn tsm_temporal_shift(
        x: Ptr,
        segments: i64,
        fold: i64,
        dir_a: i64,
        dir_b: i64,
        out: *mut Ptr,
    ) -> c_int;
}

/// Moves `fold` channels one segment earlier and `fold` one segment later; what is left empty is 0.
///
/// `x` is `[n * num_segments, c, h, w]`, the segments of a clip adjacent, of any dtype, on CPU or
/// CUDA. With [`ShiftPattern::Bi`] channels `[0, fold)` of segment t come from t + 1 and
/// `[fold, 2 * fold)` from t - 1, as in the MIT and MMAction implementations; `paddle` swaps the
/// two, as in PaddleVideo. `Uni` takes `[0, fold)` from t - 1 either way. The result has the shape,
/// dtype and memory format of `x`. Differentiable: forward and backward are one pass each.
///
/// Not for tracing: `torch.jit` cannot record a C++ autograd function.
///
/// # Errors
/// If `x` is not 4-dimensional, its first dimension is not a multiple of `num_segments`, two folds
/// exceed `c`, or `x` is on CUDA and the CUDA part is not loaded.
pub fn temporal_shift(
    x: &Tensor,
    num_segments: i64,
    fold: i64,
    pattern: ShiftPattern,
    paddle: bool,
) -> Result<Tensor> {
    let (a, b) = pattern.directions(paddle);
    let mut out = std::ptr::null_mut();
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: `x` is a live tensor; on success `out` is a new tensor that we own.
    unsafe {
        check(tsm_temporal_shift(
            ptr(x),
            num_segments,
            fold,
            a,
            b,
            &mut out,
        ))?;
        Ok(Tensor::from_ptr(out))
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::ops::{is_channels_last, to_channels_last};

    /// The textbook form: slices copied into zeros, with aten's own gradients.
    fn naive(x: &Tensor, t: i64, fold: i64, pattern: ShiftPattern, paddle: bool) -> Tensor {
        let size = x.size();
        let x = x.reshape([size[0] / t, t, size[1], size[2], size[3]]);
        let channels = |a: i64, b: i64| x.slice(2, a, b, 1);
        let moved = |g: &Tensor, dir: i64| {
            let zero = g.narrow(1, 0, 1).zeros_like();
            match dir {
                1 => Tensor::cat(&[g.narrow(1, 1, t - 1), zero], 1),
                -1 => Tensor::cat(&[zero, g.narrow(1, 0, t - 1)], 1),
                _ => g.shallow_clone(),
            }
        };
        let (a, b) = pattern.directions(paddle);
        Tensor::cat(
            &[
                moved(&channels(0, fold), a),
                moved(&channels(fold, 2 * fold), b),
                channels(2 * fold, size[1]),
            ],
            2,
        )
        .reshape(&size)
    }

    fn value_and_grad(x: &Tensor, weight: &Tensor, f: impl Fn(&Tensor) -> Tensor) -> [Tensor; 2] {
        let x = x.detach().set_requires_grad(true);
        let y = f(&x);
        (&y * weight).sum(y.kind()).backward();
        [y.detach(), x.grad()]
    }

    fn agrees_with_naive(device: Device, kinds: &[Kind]) {
        let shapes = [
            (2, 8, 16, 5, 7),
            (1, 1, 8, 3, 3),
            (3, 3, 9, 1, 1),
            (2, 4, 24, 6, 2),
            (2, 2, 3, 4, 4),
        ];
        for &kind in kinds {
            for (n, t, c, h, w) in shapes {
                for div in [3, 8] {
                    let fold = c / div;
                    for pattern in [ShiftPattern::Bi, ShiftPattern::Uni] {
                        for paddle in [false, true] {
                            for channels_last in [false, true] {
                                let plain = Tensor::randn([n * t, c, h, w], (kind, device));
                                let x = if channels_last {
                                    to_channels_last(&plain).unwrap()
                                } else {
                                    plain
                                };
                                let weight = Tensor::randn_like(&x);
                                let case = format!(
                                    "{kind:?} {:?} t {t} fold {fold} {pattern:?} paddle {paddle} nhwc {channels_last}",
                                    x.size()
                                );
                                let ours = value_and_grad(&x, &weight, |x| {
                                    temporal_shift(x, t, fold, pattern, paddle).unwrap()
                                });
                                let reference = value_and_grad(&x, &weight, |x| {
                                    naive(x, t, fold, pattern, paddle)
                                });
                                assert!(ours[0].equal(&reference[0]), "forward, {case}");
                                assert!(ours[1].equal(&reference[1]), "backward, {case}");
                                assert_eq!(ours[0].stride(), x.stride(), "strides, {case}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn forward_and_backward_equal_the_naive_form() {
        agrees_with_naive(
            Device::Cpu,
            &[Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half],
        );
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn cuda_forward_and_backward_equal_the_naive_form() {
        crate::cuda::load_cuda().unwrap();
        agrees_with_naive(Device::Cuda(0), &[Kind::Float, Kind::BFloat16, Kind::Half]);
    }

    #[test]
    fn channel_0_comes_from_the_next_segment_and_channel_1_from_the_previous() {
        let x = Tensor::from_slice(&[1f32, 10., 100., 2., 20., 200., 3., 30., 300.])
            .reshape([3, 3, 1, 1]);
        let rows = |t: &Tensor| Vec::<f32>::try_from(t.reshape([-1])).unwrap();
        let y = temporal_shift(&x, 3, 1, ShiftPattern::Bi, false).unwrap();
        assert_eq!(rows(&y), [2., 0., 100., 3., 10., 200., 0., 20., 300.]);
        let y = temporal_shift(&x, 3, 1, ShiftPattern::Bi, true).unwrap();
        assert_eq!(rows(&y), [0., 20., 100., 1., 30., 200., 2., 0., 300.]);
        let y = temporal_shift(&x, 3, 1, ShiftPattern::Uni, false).unwrap();
        assert_eq!(rows(&y), [0., 10., 100., 1., 20., 200., 2., 30., 300.]);
    }

    #[test]
    fn infinities_do_not_leak_into_the_empty_segments() {
        let x = Tensor::full([4, 4, 2, 2], f64::INFINITY, (Kind::Half, Device::Cpu));
        let y = temporal_shift(&x, 4, 1, ShiftPattern::Bi, false).unwrap();
        assert_eq!(f64::try_from(y.isnan().sum(Kind::Float)).unwrap(), 0.0);
        assert_eq!(y.double_value(&[3, 0, 0, 0]), 0.0);
    }

    #[test]
    fn a_strided_view_is_shifted_by_value_and_keeps_its_format() {
        let wide =
            to_channels_last(&Tensor::randn([4, 8, 6, 6], (Kind::Float, Device::Cpu))).unwrap();
        let x = wide.narrow(2, 1, 3);
        let y = temporal_shift(&x, 4, 2, ShiftPattern::Bi, false).unwrap();
        assert!(y.equal(&naive(&x, 4, 2, ShiftPattern::Bi, false)));
        assert!(is_channels_last(&y));
    }

    #[test]
    fn an_empty_batch_stays_empty() {
        let x = Tensor::zeros([0, 8, 2, 2], (Kind::Float, Device::Cpu));
        assert_eq!(
            temporal_shift(&x, 4, 1, ShiftPattern::Bi, false)
                .unwrap()
                .size(),
            [0, 8, 2, 2]
        );
    }

    #[test]
    fn bad_shapes_are_named() {
        let x = Tensor::zeros([6, 4, 2, 2], (Kind::Float, Device::Cpu));
        let message = |x: &Tensor, t, fold| {
            temporal_shift(x, t, fold, ShiftPattern::Bi, false)
                .unwrap_err()
                .to_string()
        };
        assert!(
            message(&x, 4, 1).contains("[6, 4, 2, 2]")
                && message(&x, 4, 1).contains("num_segments = 4")
        );
        assert!(message(&x, 0, 1).contains("num_segments = 0"));
        assert!(message(&x, 3, 3).contains("two folds of 3"));
        assert!(message(&x.view([6, 4, 4]), 3, 1).contains("[n * t, c, h, w]"));
    }
}
