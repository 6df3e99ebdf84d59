//! Storage and memory format of a tensor.

use std::ffi::c_int;

use tch::Tensor;

use super::{Ptr, ptr};
use crate::error::{Result, check};

#[expect(unsafe_code, reason = "declarations of csrc/core.cpp")]
unsafe extern "C" {
    fn tsm_to_channels_last(x: Ptr, out: *mut Ptr) -> c_int;
    fn tsm_is_channels_last(x: Ptr) -> c_int;
    fn tsm_set_data(dst: Ptr, src: Ptr) -> c_int;
    fn tsm_set_grad(p: Ptr, grad: Ptr) -> c_int;
}

/// `t` (`[n, c, h, w]`) with the channels of a pixel adjacent in memory; the same tensor if they are.
///
/// # Errors
/// If `t` is not 4-dimensional.
pub fn to_channels_last(t: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: `t` is a live tensor; on success `out` is a new tensor that we own.
    unsafe {
        check(tsm_to_channels_last(ptr(t), &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// Whether the memory of `t` is dense in the order n, h, w, c.
///
/// Where c or h * w is 1 a tensor can be both this and contiguous.
pub fn is_channels_last(t: &Tensor) -> bool {
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: `t` is a live tensor; the function only reads its strides.
    unsafe {
        tsm_is_channels_last(ptr(t)) != 0
    }
}

/// Makes `dst` the tensor `src` in place: storage, shape and strides, as `dst.data = src` in Python.
///
/// # Errors
/// If the kinds of tensor (dtype, device type) are incompatible.
pub fn set_data(dst: &Tensor, src: &Tensor) -> Result<()> {
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: both are live tensors.
    check(unsafe { tsm_set_data(ptr(dst), ptr(src)) })
}

/// Makes `g` the gradient of the leaf `p`, without a copy; `None` removes it.
///
/// # Errors
/// If the shape, dtype or device of `g` is not that of `p`.
pub fn set_grad(p: &Tensor, g: Option<&Tensor>) -> Result<()> {
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: `p` is a live tensor, `g` one or null.
    check(unsafe { tsm_set_grad(ptr(p), g.map_or(std::ptr::null_mut(), ptr)) })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    #[test]
    fn channels_last_changes_the_strides_only() {
        let x = Tensor::randn([2, 3, 4, 5], F32);
        let y = to_channels_last(&x).unwrap();
        assert_eq!(y.stride(), [60, 1, 15, 3]);
        assert!(y.equal(&x));
        assert!(is_channels_last(&y) && !is_channels_last(&x));
        assert_eq!(to_channels_last(&y).unwrap().data_ptr(), y.data_ptr());
        assert!(to_channels_last(&Tensor::zeros([2, 2], F32)).is_err());
    }

    #[test]
    fn set_data_moves_a_parameter_onto_another_storage() {
        let p = Tensor::zeros([2, 2], F32).set_requires_grad(true);
        let src = Tensor::ones([2, 2], F32);
        set_data(&p, &src).unwrap();
        assert_eq!(p.data_ptr(), src.data_ptr());
        assert!(p.requires_grad() && p.is_leaf());
    }

    #[test]
    fn set_grad_shares_checks_and_removes() {
        let p = Tensor::zeros([2, 2], F32).set_requires_grad(true);
        let g = Tensor::ones([2, 2], F32);
        set_grad(&p, Some(&g)).unwrap();
        assert_eq!(p.grad().data_ptr(), g.data_ptr());
        let wrong = set_grad(&p, Some(&Tensor::ones([3], F32))).unwrap_err();
        assert!(wrong.to_string().contains("[3]"), "{wrong}");
        set_grad(&p, None).unwrap();
        assert!(!p.grad().defined());
    }
}
