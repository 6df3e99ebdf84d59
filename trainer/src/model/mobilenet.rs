//! MobileNetV2 with the temporal shift in its residual blocks.
//!
//! MobileNetV2 (Sandler et al., CVPR 2018); the shift stands before the expansion of blocks that
//! expand and have a shortcut, as in the original TSM code.

use super::layers::{Builder, ConvBn, ConvShape};
use super::shift::Shift;
use super::summary::{ShiftedLayer, Tally};
use tch::{Kind, Tensor};
use tsm_job::config::{self, ShiftPlace};

/// Expansion, channels, repeats, stride of the first (table 2 of the paper).
const STAGES: [(i64, f64, usize, i64); 7] = [
    (1, 16.0, 1, 1),
    (6, 24.0, 2, 2),
    (6, 32.0, 3, 2),
    (6, 64.0, 4, 2),
    (6, 96.0, 3, 1),
    (6, 160.0, 3, 2),
    (6, 320.0, 1, 1),
];

pub(super) struct MobileNet {
    stem: ConvBn,
    blocks: Vec<Block>,
    last: ConvBn,
    pub(super) features: i64,
}

struct Block {
    shift: Option<Shift>,
    shifted: Option<ShiftedLayer>,
    expand: Option<ConvBn>,
    depthwise: ConvBn,
    project: ConvBn,
    residual: bool,
}

impl MobileNet {
    /// `width` scales every channel count, rounded up to a multiple of 8 as in the original code.
    /// Unlike there, it also scales the stem, the first block and, below 1, the last convolution.
    pub(super) fn new(b: &mut Builder, cfg: &config::Model) -> Result<MobileNet, String> {
        if cfg.shift.place == ShiftPlace::Block {
            return Err(
                "model.shift.place is `block`, which mobilenetv2 does not have; set it to blockres"
                    .into(),
            );
        }
        if cfg.shift.n_round.is_some_and(|n| n != 1) {
            return Err("model.shift.n_round is for resnets; leave it out with mobilenetv2".into());
        }
        if cfg.temporal_pool {
            return Err(
                "model.temporal_pool is for resnets; set it to false with mobilenetv2".into(),
            );
        }
        let scaled = |channels: f64| (channels * cfg.width / 8.0).ceil().max(1.0) as i64 * 8;
        let num_segments = i64::from(cfg.num_segments);
        let mut inputs = scaled(32.0);
        let stem = b.conv_bn(
            "features.0.0",
            "features.0.1",
            ConvShape::new(3, inputs, 3, 2),
        );
        let mut blocks = Vec::new();
        for (expansion, channels, repeats, stride) in STAGES {
            for i in 0..repeats {
                let spec = BlockSpec {
                    name: format!("features.{}.conv", blocks.len() + 1),
                    inputs,
                    outputs: scaled(channels),
                    stride: if i == 0 { stride } else { 1 },
                    expansion,
                };
                let shift = if spec.residual() && expansion != 1 {
                    Shift::new(&cfg.shift, num_segments, inputs, &spec.name)?
                } else {
                    None
                };
                blocks.push(Block::new(b, &spec, shift));
                inputs = spec.outputs;
            }
        }
        let features = scaled(1280.0);
        let name = format!("features.{}", blocks.len() + 1);
        let last = b.conv_bn(
            &format!("{name}.0"),
            &format!("{name}.1"),
            ConvShape::new(inputs, features, 1, 1),
        );
        Ok(MobileNet {
            stem,
            blocks,
            last,
            features,
        })
    }

    /// `[n * t, 3, h, w]` to `[n * t, c]`; `visit` sees the map before the global mean.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        train: bool,
        visit: &mut dyn FnMut(&str, &Tensor),
    ) -> Tensor {
        let mut y = self.stem.forward(x, train).relu6_();
        for block in &self.blocks {
            y = block.forward(&y, train);
        }
        let y = self.last.forward(&y, train).relu6_();
        visit("features", &y);
        y.mean_dim([2i64, 3].as_slice(), false, None::<Kind>)
    }

    pub(super) fn input_kind(&self) -> Kind {
        self.stem.conv.kind()
    }

    pub(super) fn shifted(&self) -> Vec<ShiftedLayer> {
        self.blocks
            .iter()
            .filter_map(|block| block.shifted.clone())
            .collect()
    }

    pub(super) fn count(&self, tally: &mut Tally, side: u64) {
        let mut side = self.stem.count(tally, side);
        for block in &self.blocks {
            for layer in block
                .expand
                .iter()
                .chain([&block.depthwise, &block.project])
            {
                side = layer.count(tally, side);
            }
        }
        self.last.count(tally, side);
    }
}

struct BlockSpec {
    name: String,
    inputs: i64,
    outputs: i64,
    stride: i64,
    expansion: i64,
}

impl BlockSpec {
    fn residual(&self) -> bool {
        self.stride == 1 && self.inputs == self.outputs
    }
}

impl Block {
    fn new(b: &mut Builder, spec: &BlockSpec, shift: Option<Shift>) -> Block {
        let BlockSpec {
            name,
            inputs,
            outputs,
            stride,
            expansion,
        } = spec;
        let hidden = inputs * expansion;
        let expand = (*expansion != 1).then(|| {
            b.conv_bn(
                &format!("{name}.0.0"),
                &format!("{name}.0.1"),
                ConvShape::new(*inputs, hidden, 1, 1),
            )
        });
        // torchvision numbers the modules of a block from its first one.
        let first = usize::from(expand.is_some());
        let depthwise = b.conv_bn(
            &format!("{name}.{first}.0"),
            &format!("{name}.{first}.1"),
            ConvShape::depthwise(hidden, 3, *stride),
        );
        let project = b.conv_bn(
            &format!("{name}.{}", first + 1),
            &format!("{name}.{}", first + 2),
            ConvShape::new(hidden, *outputs, 1, 1),
        );
        let shifted = shift.map(|s| ShiftedLayer {
            name: format!("{name}.0.0"),
            channels: *inputs,
            fold: s.fold,
        });
        Block {
            shift,
            shifted,
            expand,
            depthwise,
            project,
            residual: spec.residual(),
        }
    }

    fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        let hidden = self.expand.as_ref().map(|layer| {
            let shifted = self.shift.map(|shift| shift.apply(x));
            layer.forward(shifted.as_ref().unwrap_or(x), train).relu6_()
        });
        let y = self
            .depthwise
            .forward(hidden.as_ref().unwrap_or(x), train)
            .relu6_();
        let mut y = self.project.forward(&y, train);
        if self.residual {
            y += x;
        }
        y
    }
}
