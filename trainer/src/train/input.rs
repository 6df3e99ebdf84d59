//! From the loader's u8 slabs to normalised frames on the device.

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use tsm_job::config;

/// A reusable host buffer for one batch: u8 `[n, t, h, w, c]`, page-locked when a GPU reads it.
pub struct Slab {
    tensor: Tensor,
}

impl Slab {
    /// `bytes` of host memory, pinned for `device`.
    pub fn new(bytes: usize, device: Device) -> Result<Slab> {
        let tensor = if device.is_cuda() {
            tsm_torch_ext::pinned(bytes)?
        } else {
            Tensor::zeros([bytes as i64], (Kind::Uint8, Device::Cpu))
        };
        Ok(Slab { tensor })
    }
}

impl AsMut<[u8]> for Slab {
    #[expect(unsafe_code, reason = "the loader writes pixels straight into the tensor")]
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: a contiguous u8 host tensor of `numel` bytes; `&mut self` makes the view exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr().cast(), self.tensor.numel()) }
    }
}

/// Turns slabs into network input.
pub struct Input {
    device: Device,
    channels_last: bool,
    num_segments: i64,
    /// On 0..255, `[1, 3, 1, 1]`.
    mean: Tensor,
    inv_std: Tensor,
}

impl Input {
    pub fn new(config: &config::Config, device: Device) -> Input {
        let row = |v: [f64; 3]| Tensor::from_slice(&v).to_kind(Kind::Float).view([1, 3, 1, 1]).to_device(device);
        Input {
            device,
            channels_last: config.train.channels_last,
            num_segments: i64::from(config.model.num_segments),
            mean: row(config.data.mean.map(|m| m * 255.0)),
            inv_std: row(config.data.std.map(|s| 1.0 / (s * 255.0))),
        }
    }

    /// The first `n` clips of `slab` as float32 `[n * t, 3, size, size]`, normalised on the device.
    /// On a GPU the copy is asynchronous: the slab must rest until the stream has passed it.
    pub fn frames(&self, slab: &Slab, n: usize, size: u32) -> Tensor {
        let (nt, size) = (n as i64 * self.num_segments, i64::from(size));
        let pixels = slab.tensor.narrow(0, 0, nt * size * size * 3).view([nt, size, size, 3]);
        let pixels = if self.device.is_cuda() { pixels.to_device_(self.device, Kind::Uint8, true, false) } else { pixels };
        // Interleaved pixels seen as NCHW are already channels_last.
        let x = pixels.permute([0, 3, 1, 2]).to_kind(Kind::Float);
        let x = (x - &self.mean) * &self.inv_std;
        if self.channels_last { x } else { x.contiguous() }
    }

    pub fn labels(&self, labels: &[i64]) -> Tensor {
        Tensor::from_slice(labels).to_device(self.device)
    }
}
