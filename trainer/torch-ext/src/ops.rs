//! Tensor operations, autograd hooks and switches that tch does not have.

use tch::Tensor;

mod autograd;
mod optim;
pub(crate) mod runtime;
mod shift;
mod tensor;

pub use autograd::{backward, on_grad_ready};
pub use optim::{fused_sgd, unscale_and_check, update_scale};
pub use runtime::{Flags, autocast, libtorch_dir, libtorch_version, set_flags};
pub use shift::{ShiftPattern, temporal_shift};
pub use tensor::{is_channels_last, set_data, set_grad, to_channels_last};

pub(crate) type Ptr = *mut torch_sys::C_tensor;

pub(crate) fn ptr(t: &Tensor) -> Ptr {
    t.as_ptr().cast_mut()
}

/// The pointers of a list of tensors, valid as long as the tensors are.
pub(crate) fn ptrs(list: &[Tensor]) -> Vec<Ptr> {
    list.iter().map(ptr).collect()
}
