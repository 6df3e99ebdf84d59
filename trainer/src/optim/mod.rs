//! SGD over the buckets of [`crate::ddp`]: groups, schedule, clipping, master weights.

pub mod groups;
pub mod schedule;
mod sgd;

pub use groups::{Decay, Group};
pub use schedule::lr_at;
pub use sgd::{Sgd, StepTensors};

use crate::model::{Network, ParamRole};
use tch::Tensor;

/// A trainable parameter, as the gradient engine and the optimizer see it.
#[derive(Debug)]
pub struct ParamInfo {
    /// PyTorch's key, e.g. `layer1.0.conv1.weight`.
    pub name: String,
    pub role: ParamRole,
    /// The parameter itself, shared with the network.
    pub tensor: Tensor,
}

impl ParamInfo {
    /// The trainable parameters of a network, in its order; frozen ones have no gradient.
    pub fn of(net: &Network) -> Vec<ParamInfo> {
        net.params()
            .iter()
            .filter(|p| !p.frozen)
            .map(|p| ParamInfo {
                name: p.name.clone(),
                role: p.role,
                tensor: p.tensor.shallow_clone(),
            })
            .collect()
    }
}
