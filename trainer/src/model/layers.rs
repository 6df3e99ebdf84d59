//! Convolution, BatchNorm and linear layer, and the [`Builder`] that names and initialises them.
//!
//! Not `tch::nn`: its `VarStore` rejects names with dots, and its BatchNorm draws gamma from
//! U(0, 1). Parameters carry torchvision's names here, and gamma starts at 1.

use super::init;
use super::summary::Tally;
use super::{Buffer, Param, ParamRole};
use tch::{Device, Kind, Tensor};

const BN_MOMENTUM: f64 = 0.1;
const BN_EPS: f64 = 1e-5;

/// Makes layers in forward order and collects their tensors under torchvision's names.
pub(super) struct Builder {
    seed: u64,
    device: Device,
    partial_bn: bool,
    num_bn: usize,
    pub(super) params: Vec<Param>,
    pub(super) buffers: Vec<Buffer>,
}

impl Builder {
    pub(super) fn new(device: Device, seed: u64, partial_bn: bool) -> Builder {
        Builder {
            seed,
            device,
            partial_bn,
            num_bn: 0,
            params: Vec::new(),
            buffers: Vec::new(),
        }
    }

    fn param(&mut self, name: String, value: Tensor, role: ParamRole, frozen: bool) -> Tensor {
        let tensor = value.to_device(self.device).set_requires_grad(!frozen);
        let handle = tensor.shallow_clone();
        self.params.push(Param {
            name,
            tensor,
            role,
            frozen,
        });
        handle
    }

    fn buffer(&mut self, name: String, value: f64, size: i64) -> Tensor {
        let tensor = Tensor::full([size], value, (Kind::Float, self.device));
        let handle = tensor.shallow_clone();
        self.buffers.push(Buffer { name, tensor });
        handle
    }

    /// A convolution without bias, "same" padding for odd `kernel`; weight N(0, sqrt(2 / fan_out)),
    /// Kaiming's initialisation for ReLU as in torchvision's ResNet and MobileNetV2.
    pub(super) fn conv(&mut self, name: &str, shape: ConvShape) -> Conv {
        let ConvShape {
            inputs,
            outputs,
            kernel,
            groups,
            ..
        } = shape;
        let size = [outputs, inputs / groups, kernel, kernel];
        let std = (2.0 / (outputs * kernel * kernel) as f64).sqrt();
        let key = format!("{name}.weight");
        let value = init::normal(&key, self.seed, &size, std);
        let role = if self.params.is_empty() {
            ParamRole::FirstConvWeight
        } else {
            ParamRole::Weight
        };
        Conv {
            weight: self.param(key, value, role, false),
            shape,
        }
    }

    /// A BatchNorm over `channels`: weight 1, bias 0, running mean 0 and variance 1.
    ///
    /// Under partial BN all but the first keep to their running statistics and are frozen.
    pub(super) fn bn(&mut self, name: &str, channels: i64) -> BatchNorm {
        let frozen = self.partial_bn && self.num_bn > 0;
        self.num_bn += 1;
        let cpu = (Kind::Float, Device::Cpu);
        let weight = Tensor::ones([channels], cpu);
        let bias = Tensor::zeros([channels], cpu);
        BatchNorm {
            weight: self.param(
                format!("{name}.weight"),
                weight,
                ParamRole::BnWeight,
                frozen,
            ),
            bias: self.param(format!("{name}.bias"), bias, ParamRole::BnBias, frozen),
            running_mean: self.buffer(format!("{name}.running_mean"), 0.0, channels),
            running_var: self.buffer(format!("{name}.running_var"), 1.0, channels),
            frozen,
        }
    }

    pub(super) fn conv_bn(&mut self, conv: &str, bn: &str, shape: ConvShape) -> ConvBn {
        ConvBn {
            conv: self.conv(conv, shape),
            bn: self.bn(bn, shape.outputs),
        }
    }

    /// The classifier: weight N(0, std), bias 0.
    pub(super) fn classifier(&mut self, name: &str, inputs: i64, outputs: i64, std: f64) -> Linear {
        let key = format!("{name}.weight");
        let value = init::normal(&key, self.seed, &[outputs, inputs], std);
        let bias = Tensor::zeros([outputs], (Kind::Float, Device::Cpu));
        Linear {
            weight: self.param(key, value, ParamRole::FcWeight, false),
            bias: self.param(format!("{name}.bias"), bias, ParamRole::FcBias, false),
        }
    }
}

/// What a convolution does to `[n, inputs, h, w]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct ConvShape {
    pub(super) inputs: i64,
    pub(super) outputs: i64,
    pub(super) kernel: i64,
    pub(super) stride: i64,
    pub(super) groups: i64,
}

impl ConvShape {
    pub(super) fn new(inputs: i64, outputs: i64, kernel: i64, stride: i64) -> ConvShape {
        ConvShape {
            inputs,
            outputs,
            kernel,
            stride,
            groups: 1,
        }
    }

    /// One filter per channel.
    pub(super) fn depthwise(channels: i64, kernel: i64, stride: i64) -> ConvShape {
        ConvShape {
            groups: channels,
            ..ConvShape::new(channels, channels, kernel, stride)
        }
    }
}

pub(super) struct Conv {
    weight: Tensor,
    shape: ConvShape,
}

impl Conv {
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let ConvShape {
            kernel,
            stride,
            groups,
            ..
        } = self.shape;
        x.conv2d(
            &self.weight,
            None::<&Tensor>,
            [stride; 2],
            [kernel / 2; 2],
            [1, 1],
            groups,
        )
    }

    pub(super) fn kind(&self) -> Kind {
        self.weight.kind()
    }
}

pub(super) struct BatchNorm {
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    frozen: bool,
}

impl BatchNorm {
    pub(super) fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        x.batch_norm(
            Some(&self.weight),
            Some(&self.bias),
            Some(&self.running_mean),
            Some(&self.running_var),
            train && !self.frozen,
            BN_MOMENTUM,
            BN_EPS,
            true,
        )
    }
}

/// A convolution and the BatchNorm that follows it.
pub(super) struct ConvBn {
    pub(super) conv: Conv,
    pub(super) bn: BatchNorm,
}

impl ConvBn {
    pub(super) fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        self.bn.forward(&self.conv.forward(x), train)
    }

    /// Counts one frame's work on a map of `side` x `side` and returns the side of the output.
    pub(super) fn count(&self, tally: &mut Tally, side: u64) -> u64 {
        let ConvShape {
            inputs,
            outputs,
            kernel,
            stride,
            groups,
        } = self.conv.shape;
        let side = side.div_ceil(stride as u64);
        let positions = side * side;
        tally.macs +=
            tally.frames * positions * (outputs * (inputs / groups) * kernel * kernel) as u64;
        tally.bn_elements += tally.frames * positions * outputs as u64;
        side
    }
}

pub(super) struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Some(&self.bias))
    }

    pub(super) fn macs(&self) -> u64 {
        self.weight.numel() as u64
    }
}
