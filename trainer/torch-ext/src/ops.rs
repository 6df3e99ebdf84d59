//! Tensor operations and autograd hooks that tch does not have.

use tch::Tensor;

mod shift;
mod tensor;

pub use shift::{ShiftPattern, temporal_shift};
pub use tensor::{is_channels_last, set_data, set_grad, to_channels_last};

pub(crate) type Ptr = *mut torch_sys::C_tensor;

pub(crate) fn ptr(t: &Tensor) -> Ptr {
    t.as_ptr().cast_mut()
}
