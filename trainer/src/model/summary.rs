//! What a network costs and where it shifts, without running it.

use std::fmt;

/// Size, cost and shifted layers of a network.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Layers whose input is shifted, in forward order.
    pub shifted: Vec<ShiftedLayer>,
    /// Parameters, frozen ones included; BatchNorm's running statistics are no parameters.
    pub params: u64,
    /// Multiply-accumulates of convolutions and classifier for one clip.
    pub macs: u64,
    /// Elements that BatchNorm normalises for one clip. Published counts often add 2 operations
    /// for each: ResNet-50's 32.88 G for 8 frames of 224 x 224 is `macs + 2 * bn_elements`.
    pub bn_elements: u64,
    /// Segments of the clip that was counted, and the side of its frames in pixels.
    pub num_segments: u32,
    pub size: u32,
}

/// A layer whose input is shifted in time.
#[derive(Clone, Debug, PartialEq)]
pub struct ShiftedLayer {
    /// The convolution's name (`layer1.0.conv1`), or the block's with `place: block`.
    pub name: String,
    /// Channels of its input.
    pub channels: i64,
    /// Channels moved each way.
    pub fold: i64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:.3} M parameters, {:.2} G MACs for a clip of {} x {} x {}, {} shifted layers",
            self.params as f64 / 1e6,
            self.macs as f64 / 1e9,
            self.num_segments,
            self.size,
            self.size,
            self.shifted.len()
        )?;
        let width = self.shifted.iter().map(|l| l.name.len()).max().unwrap_or(0);
        for layer in &self.shifted {
            writeln!(
                f,
                "  {:width$}  {:4} channels, fold {}",
                layer.name, layer.channels, layer.fold
            )?;
        }
        Ok(())
    }
}

/// Work counted so far while walking a network.
pub(super) struct Tally {
    /// Frames of the clip at this depth.
    pub(super) frames: u64,
    pub(super) macs: u64,
    pub(super) bn_elements: u64,
}
