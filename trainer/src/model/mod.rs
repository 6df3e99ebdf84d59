//! TSM and TSN on ResNet and MobileNetV2.
//!
//! ```text
//! frames [n * t, 3, h, w] -> backbone, shifting in time -> [n * t, c] -> head -> logits [n, k]
//! ```
//! Parameters carry torchvision's names (`layer1.0.conv1.weight`, `features.2.conv.0.0.weight`,
//! `fc.weight`, `classifier.1.weight`), so pretrained weights load as they are.

mod head;
mod init;
mod layers;
mod mobilenet;
mod resnet;
mod shift;
mod summary;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use summary::{ShiftedLayer, Summary};

use anyhow::Result;
use head::Head;
use layers::Builder;
use mobilenet::MobileNet;
use resnet::ResNet;
use summary::Tally;
use tch::{Device, Kind, Tensor};
use tsm_job::config;
use tsm_job::exit::{self, Coded};
use tsm_torch_ext::ops;

/// A video network with its parameters on one device.
pub struct Network {
    backbone: Backbone,
    head: Head,
    params: Vec<Param>,
    buffers: Vec<Buffer>,
    num_segments: u32,
}

enum Backbone {
    ResNet(ResNet),
    MobileNet(MobileNet),
}

/// A tensor the optimizer changes, unless it is frozen.
pub struct Param {
    /// torchvision's key, e.g. `layer1.0.conv1.weight`.
    pub name: String,
    /// Shares its storage with the network.
    pub tensor: Tensor,
    pub role: ParamRole,
    /// Takes no gradient: BatchNorm's weight and bias under partial BN.
    pub frozen: bool,
}

/// Which of the original code's optimizer groups a parameter belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamRole {
    FirstConvWeight,
    FirstConvBias,
    /// Weight of any other convolution.
    Weight,
    /// Bias of any other convolution.
    Bias,
    BnWeight,
    BnBias,
    FcWeight,
    FcBias,
}

/// BatchNorm's running mean or variance, always float32.
///
/// There is no `num_batches_tracked`: the momentum is fixed, so nothing would read it, and readers
/// of checkpoints accept its absence.
pub struct Buffer {
    /// torchvision's key, e.g. `bn1.running_mean`.
    pub name: String,
    /// Shares its storage with the network.
    pub tensor: Tensor,
}

impl Network {
    /// Builds the network with random weights: convolutions by Kaiming's rule (fan out), BatchNorm
    /// weight 1 and bias 0, classifier N(0, `head.init_std`) and bias 0. Equal seeds give equal
    /// weights on every device. `cfg.weights` is not read here.
    ///
    /// # Errors
    /// With exit code [`exit::CONFIG`] when the values of `cfg` do not fit each other.
    pub fn new(cfg: &config::Model, device: Device, seed: u64) -> Result<Network> {
        Self::build(cfg, device, seed).map_err(|message| Coded::new(exit::CONFIG, message).into())
    }

    fn build(cfg: &config::Model, device: Device, seed: u64) -> Result<Network, String> {
        if !(cfg.width > 0.0 && cfg.width.is_finite()) {
            return Err(format!(
                "model.width is {}; set a positive number, 1.0 for the published network",
                cfg.width
            ));
        }
        if cfg.num_segments == 0 || cfg.num_classes == 0 {
            return Err(format!(
                "model.num_segments is {} and model.num_classes is {}; both must be at least 1",
                cfg.num_segments, cfg.num_classes
            ));
        }
        let mut b = Builder::new(device, seed, cfg.partial_bn);
        let (backbone, head) = match ResNet::new(&mut b, cfg)? {
            Some(net) => {
                let head = Head::new(&mut b, cfg, "fc", net.features, net.num_segments);
                (Backbone::ResNet(net), head)
            }
            None => {
                let net = MobileNet::new(&mut b, cfg)?;
                let head = Head::new(
                    &mut b,
                    cfg,
                    "classifier.1",
                    net.features,
                    i64::from(cfg.num_segments),
                );
                (Backbone::MobileNet(net), head)
            }
        };
        Ok(Network {
            backbone,
            head,
            params: b.params,
            buffers: b.buffers,
            num_segments: cfg.num_segments,
        })
    }

    /// Normalised frames `[n * t, 3, h, w]`, segments of a clip adjacent, of any float kind and
    /// memory format, to logits `[n, k]` in float32.
    ///
    /// `train` switches dropout on (libtorch's generator) and lets every BatchNorm that is not
    /// frozen use and update batch statistics.
    ///
    /// # Panics
    /// If the first dimension is not a multiple of `num_segments`, or the second is not 3.
    pub fn forward(&self, frames: &Tensor, train: bool) -> Tensor {
        self.forward_visiting(frames, train, &mut |_, _| {})
    }

    /// [`Network::forward`] that shows `visit` the output of `conv1` and `layer1` to `layer4`, or
    /// of `features`, as `[n * t, c, h, w]`.
    pub fn forward_visiting(
        &self,
        frames: &Tensor,
        train: bool,
        visit: &mut dyn FnMut(&str, &Tensor),
    ) -> Tensor {
        let size = frames.size();
        assert!(
            size.len() == 4 && size[0] % i64::from(self.num_segments) == 0 && size[1] == 3,
            "frames are {size:?}, the network takes [n * {}, 3, h, w]",
            self.num_segments
        );
        let features = match &self.backbone {
            Backbone::ResNet(net) => net.forward(&frames.to_kind(net.input_kind()), train, visit),
            Backbone::MobileNet(net) => {
                net.forward(&frames.to_kind(net.input_kind()), train, visit)
            }
        };
        self.head.forward(&features, train)
    }

    /// All parameters in torchvision's order, frozen ones included; classifier weight and bias last.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// Running mean and variance of every BatchNorm, in torchvision's order.
    pub fn buffers(&self) -> &[Buffer] {
        &self.buffers
    }

    /// The parameters by name.
    pub fn named_params(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.params.iter().map(|p| (p.name.as_str(), &p.tensor))
    }

    /// The buffers by name.
    pub fn named_buffers(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.buffers.iter().map(|b| (b.name.as_str(), &b.tensor))
    }

    /// Lays the convolutions' weights out as NHWC. Call it before gradients or hooks exist.
    pub fn to_channels_last(&self) {
        let _guard = tch::no_grad_guard();
        for param in self.params.iter().filter(|p| p.tensor.dim() == 4) {
            let nhwc =
                ops::to_channels_last(&param.tensor).expect("the weight has four dimensions");
            replace(&param.tensor, &nhwc);
        }
    }

    /// Turns all weights but BatchNorm's into `kind` (apex O2). Call it before gradients or hooks
    /// exist.
    pub fn cast_half_except_bn(&self, kind: Kind) {
        let _guard = tch::no_grad_guard();
        for param in &self.params {
            if !matches!(param.role, ParamRole::BnWeight | ParamRole::BnBias) {
                replace(&param.tensor, &param.tensor.to_kind(kind));
            }
        }
    }

    /// What the network costs for a clip of `size` x `size` frames, and where it shifts.
    pub fn summary(&self, size: u32) -> Summary {
        let mut tally = Tally {
            frames: u64::from(self.num_segments),
            macs: 0,
            bn_elements: 0,
        };
        let shifted = match &self.backbone {
            Backbone::ResNet(net) => {
                net.count(&mut tally, u64::from(size));
                net.shifted()
            }
            Backbone::MobileNet(net) => {
                net.count(&mut tally, u64::from(size));
                net.shifted()
            }
        };
        Summary {
            shifted,
            params: self.params.iter().map(|p| p.tensor.numel() as u64).sum(),
            macs: tally.macs + self.head.macs(),
            bn_elements: tally.bn_elements,
            num_segments: self.num_segments,
            size,
        }
    }
}

/// Makes every handle of `old` the tensor `new`.
fn replace(old: &Tensor, new: &Tensor) {
    ops::set_data(old, new).unwrap_or_else(|e| {
        panic!(
            "{:?} {:?} cannot become {:?}: {e}",
            old.size(),
            old.kind(),
            new.kind()
        )
    });
}
