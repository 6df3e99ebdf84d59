//! Fused optimizer step and loss scaling over lists of tensors, without reading back to the host.

use std::ffi::c_int;

use tch::Tensor;

use super::{Ptr, ptr, ptrs};
use crate::error::{Result, TorchError, check};

#[expect(unsafe_code, reason = "declarations of csrc/core.cpp")]
unsafe extern "C" {
    fn tsm_fused_sgd(
        params: *const Ptr,
        grads: *const Ptr,
        momenta: *const Ptr,
        count: usize,
        num_momenta: usize,
        lr: f64,
        momentum: f64,
        weight_decay: f64,
        nesterov: c_int,
        first: c_int,
        grad_scale: Ptr,
        found_inf: Ptr,
    ) -> c_int;
    fn tsm_unscale_and_check(
        grads: *const Ptr,
        count: usize,
        found_inf: Ptr,
        inv_scale: Ptr,
    ) -> c_int;
    fn tsm_update_scale(
        scale: Ptr,
        growth_tracker: Ptr,
        found_inf: Ptr,
        growth: f64,
        backoff: f64,
        interval: i64,
    ) -> c_int;
}

fn optional(t: Option<&Tensor>) -> Ptr {
    t.map_or(std::ptr::null_mut(), ptr)
}

/// One SGD step on all `params` in place, in a single kernel per device and dtype.
///
/// PyTorch's rule without dampening: `d = g + weight_decay * p`; `buf = momentum * buf + d` (on the
/// `first` step `buf = d`, whatever it held); `p -= lr * buf`, or `p -= lr * (d + momentum * buf)`
/// with `nesterov`. `first` with zeroed buffers and not `first` are the same step.
///
/// `momenta` is empty when `momentum` is 0. `grad_scale` and `found_inf` are fp32 scalars on the
/// device of the parameters: gradients are divided by the one (they are left divided), and
/// nothing happens where the other is 1, buffers included.
///
/// # Errors
/// If the lists differ in length, or a gradient or buffer differs from its parameter in shape,
/// strides, dtype or device: the kernels walk the memory of all three together.
#[expect(clippy::too_many_arguments, reason = "the hyperparameters of one rule")]
pub fn fused_sgd(
    params: &[Tensor],
    grads: &[Tensor],
    momenta: &[Tensor],
    lr: f64,
    momentum: f64,
    weight_decay: f64,
    nesterov: bool,
    first: bool,
    grad_scale: Option<&Tensor>,
    found_inf: Option<&Tensor>,
) -> Result<()> {
    let buffers_fit = momenta.len() == params.len() || (momenta.is_empty() && momentum == 0.0);
    if grads.len() != params.len() || !buffers_fit {
        return Err(TorchError(format!(
            "fused_sgd: {} parameters, {} gradients, {} momentum buffers (momentum {momentum})",
            params.len(),
            grads.len(),
            momenta.len()
        )));
    }
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: the lists hold `params.len()` live tensors each (the last one `momenta.len()`), and
    // the scalars are live tensors or null.
    check(unsafe {
        tsm_fused_sgd(
            ptrs(params).as_ptr(),
            ptrs(grads).as_ptr(),
            ptrs(momenta).as_ptr(),
            params.len(),
            momenta.len(),
            lr,
            momentum,
            weight_decay,
            c_int::from(nesterov),
            c_int::from(first),
            optional(grad_scale),
            optional(found_inf),
        )
    })
}

/// Multiplies all `grads` by `inv_scale` in place; sets `found_inf` to 1 if any value is not finite.
///
/// `found_inf` and `inv_scale` are fp32 tensors of one element on the device of the gradients.
/// `found_inf` is never cleared: zero it once a step.
///
/// # Errors
/// If a tensor has the wrong dtype, device or layout.
pub fn unscale_and_check(grads: &[Tensor], found_inf: &Tensor, inv_scale: &Tensor) -> Result<()> {
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: a list of `grads.len()` live tensors and two more.
    check(unsafe {
        tsm_unscale_and_check(
            ptrs(grads).as_ptr(),
            grads.len(),
            ptr(found_inf),
            ptr(inv_scale),
        )
    })
}

/// Dynamic loss scaling: `scale *= backoff` where `found_inf` is 1, `scale *= growth` after
/// `interval` clean steps in a row. `scale` is fp32, `growth_tracker` int32, one element each.
///
/// # Errors
/// If a tensor has the wrong dtype, device or size.
pub fn update_scale(
    scale: &Tensor,
    growth_tracker: &Tensor,
    found_inf: &Tensor,
    growth: f64,
    backoff: f64,
    interval: i64,
) -> Result<()> {
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: three live tensors.
    check(unsafe {
        tsm_update_scale(
            ptr(scale),
            ptr(growth_tracker),
            ptr(found_inf),
            growth,
            backoff,
            interval,
        )
    })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::ops::to_channels_last;

    const F64: (Kind, Device) = (Kind::Double, Device::Cpu);
    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn values(t: &Tensor) -> Vec<f64> {
        Vec::try_from(t.contiguous().view([-1])).unwrap()
    }

    /// The rule in the documentation, one number at a time.
    fn sgd_by_hand(p: &mut f64, g: f64, buf: &mut f64, lr: f64, mom: f64, wd: f64, nesterov: bool) {
        let d = g + wd * *p;
        *buf = mom * *buf + d;
        *p -= lr * if nesterov { d + mom * *buf } else { *buf };
    }

    #[test]
    fn three_steps_equal_sgd_by_hand() {
        for nesterov in [false, true] {
            let params = [
                Tensor::randn([3, 2], F64),
                to_channels_last(&Tensor::randn([2, 3, 4, 4], F64)).unwrap(),
            ];
            let momenta = [params[0].zeros_like(), params[1].zeros_like()];
            let mut expected: Vec<Vec<(f64, f64)>> = params
                .iter()
                .map(|p| values(p).into_iter().map(|v| (v, 0.0)).collect())
                .collect();
            for step in 0..3 {
                let grads = [params[0].randn_like(), params[1].randn_like()];
                let lr = 0.1 / f64::from(step + 1);
                fused_sgd(
                    &params,
                    &grads,
                    &momenta,
                    lr,
                    0.9,
                    0.01,
                    nesterov,
                    step == 0,
                    None,
                    None,
                )
                .unwrap();
                for (list, g) in expected.iter_mut().zip(&grads) {
                    for ((p, buf), g) in list.iter_mut().zip(values(g)) {
                        sgd_by_hand(p, g, buf, lr, 0.9, 0.01, nesterov);
                    }
                }
            }
            for (list, p) in expected.iter().zip(&params) {
                for ((e, _), p) in list.iter().zip(values(p)) {
                    assert!(
                        (e - p).abs() < 1e-12,
                        "nesterov {nesterov}: {p}, by hand {e}"
                    );
                }
            }
        }
    }

    #[test]
    fn no_momentum_needs_no_buffers() {
        let (p, g) = (Tensor::ones([4], F32), Tensor::full([4], 2.0, F32));
        fused_sgd(
            &[p.shallow_clone()],
            &[g],
            &[],
            0.25,
            0.0,
            0.0,
            false,
            true,
            None,
            None,
        )
        .unwrap();
        assert_eq!(values(&p), [0.5; 4]);
    }

    #[test]
    fn grad_scale_divides_and_found_inf_skips() {
        let p = [Tensor::ones([4], F32)];
        let m = [Tensor::zeros([4], F32)];
        let scale = Tensor::from(8f32);
        let step = |g: f64, found: f32| {
            let g = [Tensor::full([4], g, F32)];
            let found = Tensor::from(found);
            fused_sgd(
                &p,
                &g,
                &m,
                0.5,
                0.9,
                0.0,
                false,
                false,
                Some(&scale),
                Some(&found),
            )
            .unwrap();
        };
        step(f64::INFINITY, 1.0);
        assert_eq!((values(&p[0]), values(&m[0])), (vec![1.0; 4], vec![0.0; 4]));
        step(8.0, 0.0);
        assert_eq!((values(&p[0]), values(&m[0])), (vec![0.5; 4], vec![1.0; 4]));
    }

    #[test]
    fn a_gradient_in_another_layout_is_refused() {
        let p = [to_channels_last(&Tensor::zeros([2, 3, 4, 4], F32)).unwrap()];
        let m = [p[0].zeros_like()];
        let sgd = |g: Tensor| fused_sgd(&p, &[g], &m, 0.1, 0.9, 0.0, false, false, None, None);
        let message = sgd(Tensor::zeros([2, 3, 4, 4], F32))
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("gradient 0") && message.contains("strides [48, 16, 4, 1]"),
            "{message}"
        );
        assert!(sgd(p[0].zeros_like().to_kind(Kind::Half)).is_err());
        let lengths = fused_sgd(&p, &[], &m, 0.1, 0.9, 0.0, false, false, None, None);
        assert!(
            lengths
                .unwrap_err()
                .to_string()
                .contains("1 parameters, 0 gradients")
        );
    }

    #[test]
    fn unscale_finds_one_bad_value_among_many_tensors() {
        let grads: Vec<_> = (0..5).map(|_| Tensor::full([7], 4.0, F32)).collect();
        let found = Tensor::from(0f32);
        unscale_and_check(&grads, &found, &Tensor::from(0.25f32)).unwrap();
        assert_eq!(
            (values(&grads[4]), values(&found)),
            (vec![1.0; 7], vec![0.0])
        );
        let _ = grads[3].get(2).fill_(f64::NAN);
        unscale_and_check(&grads, &found, &Tensor::from(1f32)).unwrap();
        assert_eq!(values(&found), [1.0]);
        unscale_and_check(&[], &found, &Tensor::from(1f32)).unwrap();
    }

    #[test]
    fn the_scale_backs_off_at_once_and_grows_after_the_interval() {
        let (scale, tracker) = (Tensor::from(1024f32), Tensor::from(0i32));
        let update = |bad: f32| {
            update_scale(&scale, &tracker, &Tensor::from(bad), 2.0, 0.5, 3).unwrap();
            f64::try_from(&scale).unwrap()
        };
        assert_eq!([update(0.0), update(1.0)], [1024.0, 512.0]);
        assert_eq!(
            [update(0.0), update(0.0), update(0.0)],
            [512.0, 512.0, 1024.0]
        );
    }
}
