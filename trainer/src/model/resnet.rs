//! ResNet-18/34/50/101/152 with the temporal shift at its blocks.
//!
//! Deep Residual Learning (He et al., CVPR 2016) with the stride in the 3 x 3 convolution, as in
//! torchvision; shift placement as in the original TSM code (Lin et al., ICCV 2019).

use super::layers::{Builder, ConvBn, ConvShape};
use super::shift::{Shift, temporal_max_pool};
use super::summary::{ShiftedLayer, Tally};
use tch::{Kind, Tensor};
use tsm_job::config::{self, Arch, ShiftPlace};

/// Blocks per stage and whether they are bottlenecks.
fn layout(arch: Arch) -> Option<([usize; 4], bool)> {
    match arch {
        Arch::Resnet18 => Some(([2, 2, 2, 2], false)),
        Arch::Resnet34 => Some(([3, 4, 6, 3], false)),
        Arch::Resnet50 => Some(([3, 4, 6, 3], true)),
        Arch::Resnet101 => Some(([3, 4, 23, 3], true)),
        Arch::Resnet152 => Some(([3, 8, 36, 3], true)),
        Arch::Mobilenetv2 => None,
    }
}

pub(super) struct ResNet {
    stem: ConvBn,
    stages: Vec<Vec<Block>>,
    /// Segments before a pool over time in front of the second stage; `None`: no pool.
    pool_segments: Option<i64>,
    pub(super) features: i64,
    /// Segments that reach the head.
    pub(super) num_segments: i64,
}

struct Block {
    shift: Option<Shift>,
    /// What carries the shift, for the summary.
    shifted: Option<ShiftedLayer>,
    /// The shortcut sees the shifted input too.
    shift_shortcut: bool,
    /// Two (basic) or three (bottleneck) convolutions.
    branch: Vec<ConvBn>,
    downsample: Option<ConvBn>,
}

impl ResNet {
    /// `None` when `cfg.arch` is no ResNet.
    ///
    /// `width` scales the 64 channels of the stem to the nearest whole number, at least 8; later
    /// stages double it as usual.
    pub(super) fn new(b: &mut Builder, cfg: &config::Model) -> Result<Option<ResNet>, String> {
        let Some((depths, bottleneck)) = layout(cfg.arch) else {
            return Ok(None);
        };
        let n_round = n_round(cfg, depths[2])?;
        let mut num_segments = i64::from(cfg.num_segments);
        if cfg.temporal_pool && num_segments % 2 != 0 {
            return Err(format!(
                "model.temporal_pool halves the segments, but model.num_segments is {num_segments}; set an even number"
            ));
        }
        let pool_segments = cfg.temporal_pool.then_some(num_segments);
        let base = ((64.0 * cfg.width).round() as i64).max(8);
        let stem = b.conv_bn("conv1", "bn1", ConvShape::new(3, base, 7, 2));
        let mut inputs = base;
        let mut stages = Vec::new();
        for (stage, &depth) in depths.iter().enumerate() {
            if stage == 1 && cfg.temporal_pool {
                num_segments /= 2;
            }
            let planes = base << stage;
            let mut blocks = Vec::new();
            for i in 0..depth {
                let spec = BlockSpec {
                    name: format!("layer{}.{i}", stage + 1),
                    inputs,
                    planes,
                    stride: if i == 0 && stage > 0 { 2 } else { 1 },
                    bottleneck,
                };
                let shift = if i % n_round == 0 {
                    Shift::new(&cfg.shift, num_segments, inputs, &spec.name)?
                } else {
                    None
                };
                inputs = spec.outputs();
                blocks.push(Block::new(b, &spec, shift, cfg.shift.place));
            }
            stages.push(blocks);
        }
        Ok(Some(ResNet {
            stem,
            stages,
            pool_segments,
            features: inputs,
            num_segments,
        }))
    }

    /// `[n * t, 3, h, w]` to `[n * t', c]`; `visit` sees conv1 and the output of each stage.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        train: bool,
        visit: &mut dyn FnMut(&str, &Tensor),
    ) -> Tensor {
        let y = self.stem.conv.forward(x);
        visit("conv1", &y);
        let mut y = self.stem.bn.forward(&y, train).relu_().max_pool2d(
            [3, 3],
            [2, 2],
            [1, 1],
            [1, 1],
            false,
        );
        for (stage, blocks) in self.stages.iter().enumerate() {
            if let (1, Some(segments)) = (stage, self.pool_segments) {
                y = temporal_max_pool(&y, segments);
            }
            for block in blocks {
                y = block.forward(&y, train);
            }
            visit(&format!("layer{}", stage + 1), &y);
        }
        y.mean_dim([2i64, 3].as_slice(), false, None::<Kind>)
    }

    pub(super) fn input_kind(&self) -> Kind {
        self.stem.conv.kind()
    }

    pub(super) fn shifted(&self) -> Vec<ShiftedLayer> {
        self.stages
            .iter()
            .flatten()
            .filter_map(|block| block.shifted.clone())
            .collect()
    }

    pub(super) fn count(&self, tally: &mut Tally, side: u64) {
        let mut side = self.stem.count(tally, side).div_ceil(2);
        for (stage, blocks) in self.stages.iter().enumerate() {
            if stage == 1 && self.pool_segments.is_some() {
                tally.frames /= 2;
            }
            for block in blocks {
                if let Some(shortcut) = &block.downsample {
                    shortcut.count(tally, side);
                }
                side = block
                    .branch
                    .iter()
                    .fold(side, |side, layer| layer.count(tally, side));
            }
        }
    }
}

/// Every how many blocks a shift stands: 2 for the deep networks of 23 and more blocks in layer3.
fn n_round(cfg: &config::Model, layer3_depth: usize) -> Result<usize, String> {
    match (cfg.shift.place, cfg.shift.n_round) {
        (_, Some(0)) => Err(
            "model.shift.n_round is 0; set it to 1 to shift every block, 2 for every second".into(),
        ),
        (ShiftPlace::Block, Some(n)) if n > 1 => Err(format!(
            "model.shift.n_round is {n}, but `place: block` shifts every block; leave it out, or use `place: blockres`"
        )),
        (ShiftPlace::Block, _) => Ok(1),
        (ShiftPlace::Blockres, Some(n)) => Ok(n as usize),
        (ShiftPlace::Blockres, None) => Ok(if layer3_depth >= 23 { 2 } else { 1 }),
    }
}

struct BlockSpec {
    name: String,
    inputs: i64,
    planes: i64,
    stride: i64,
    bottleneck: bool,
}

impl BlockSpec {
    fn outputs(&self) -> i64 {
        if self.bottleneck {
            4 * self.planes
        } else {
            self.planes
        }
    }
}

impl Block {
    fn new(b: &mut Builder, spec: &BlockSpec, shift: Option<Shift>, place: ShiftPlace) -> Block {
        let BlockSpec {
            name,
            inputs,
            planes,
            stride,
            bottleneck,
        } = spec;
        let shapes = if *bottleneck {
            vec![
                ConvShape::new(*inputs, *planes, 1, 1),
                ConvShape::new(*planes, *planes, 3, *stride),
                ConvShape::new(*planes, spec.outputs(), 1, 1),
            ]
        } else {
            vec![
                ConvShape::new(*inputs, *planes, 3, *stride),
                ConvShape::new(*planes, *planes, 3, 1),
            ]
        };
        let branch = shapes
            .into_iter()
            .enumerate()
            .map(|(i, shape)| {
                b.conv_bn(
                    &format!("{name}.conv{}", i + 1),
                    &format!("{name}.bn{}", i + 1),
                    shape,
                )
            })
            .collect();
        let downsample = (*stride != 1 || *inputs != spec.outputs()).then(|| {
            let shape = ConvShape::new(*inputs, spec.outputs(), 1, *stride);
            b.conv_bn(
                &format!("{name}.downsample.0"),
                &format!("{name}.downsample.1"),
                shape,
            )
        });
        let shift_shortcut = place == ShiftPlace::Block;
        let shifted = shift.map(|s| ShiftedLayer {
            name: if shift_shortcut {
                name.clone()
            } else {
                format!("{name}.conv1")
            },
            channels: *inputs,
            fold: s.fold,
        });
        Block {
            shift,
            shifted,
            shift_shortcut,
            branch,
            downsample,
        }
    }

    fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        let shifted = self.shift.map(|shift| shift.apply(x));
        let input = shifted.as_ref().unwrap_or(x);
        let mut y = self.branch[0].forward(input, train);
        for layer in &self.branch[1..] {
            y = layer.forward(&y.relu_(), train);
        }
        let shortcut = if self.shift_shortcut { input } else { x };
        y += match &self.downsample {
            Some(layer) => layer.forward(shortcut, train),
            None => shortcut.shallow_clone(),
        };
        y.relu_()
    }
}
