//! Batches of the loader as normalised frames on the device.

use super::place::Place;
use anyhow::Result;
use tch::{Device, Kind, Tensor};
use tsm_data::loader::{Batch, Loader, LoaderSpec};
use tsm_job::Config;
use tsm_torch_ext::cuda::{self, Event};

/// A reusable host buffer for one batch: u8 `[n, t, h, w, c]`, page-locked when a GPU reads it.
pub struct Slab(Tensor);

impl Slab {
    fn new(bytes: usize, device: Device) -> Result<Slab> {
        Ok(Slab(match device {
            Device::Cuda(_) => cuda::pinned(bytes)?,
            _ => Tensor::f_zeros([bytes as i64], (Kind::Uint8, Device::Cpu))?,
        }))
    }
}

impl AsMut<[u8]> for Slab {
    #[expect(unsafe_code, reason = "the loader writes pixels straight into the tensor")]
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: a contiguous u8 host tensor of `numel` bytes, which nothing else refers to while
        // the loader has it; `&mut self` makes the view exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.0.data_ptr().cast(), self.0.numel()) }
    }
}

/// Runs loaders one after the other over the same buffers.
pub struct Feed {
    device: Device,
    threads: usize,
    channels_last: bool,
    num_segments: i64,
    /// On 0..255, `[1, 3, 1, 1]`.
    mean: Tensor,
    inv_std: Tensor,
    pool: Vec<Slab>,
    loader: Option<Loader<Slab>>,
    /// The batch whose pixels the device may still be reading, and when it will have read them.
    held: Option<(Batch<Slab>, Event)>,
}

impl Feed {
    pub fn new(config: &Config, place: &Place) -> Feed {
        let device = place.device;
        let row = |v: [f64; 3]| Tensor::from_slice(&v).to_kind(Kind::Float).view([1, 3, 1, 1]).to_device(device);
        Feed {
            device,
            threads: config.data.workers.map_or(place.threads, |n| n as usize),
            channels_last: config.train.channels_last,
            num_segments: i64::from(config.model.num_segments),
            mean: row(config.data.mean.map(|m| m * 255.0)),
            inv_std: row(config.data.std.map(|s| 1.0 / (s * 255.0))),
            pool: Vec::new(),
            loader: None,
            held: None,
        }
    }

    /// Starts decoding. One loader at a time: [`Self::end`] comes before the next start.
    pub fn start(&mut self, mut spec: LoaderSpec) -> Result<()> {
        spec.threads = self.threads;
        let bytes = spec.batch_bytes();
        self.pool.retain_mut(|slab| slab.as_mut().len() >= bytes);
        while self.pool.len() < spec.prefetch + 2 {
            self.pool.push(Slab::new(bytes, self.device)?);
        }
        let pool = &mut self.pool;
        self.loader = Some(Loader::start(spec, |_| pool.pop().expect("prefetch + 2 buffers are enough by Loader's contract"))?);
        Ok(())
    }

    /// The next batch; `None` after the last.
    pub fn next(&mut self) -> Result<Option<Batch<Slab>>> {
        self.loader.as_mut().and_then(Iterator::next).transpose()
    }

    /// float32 frames `[n * num_clips * t, 3, size, size]`, normalised, and int64 labels `[n]` on the device.
    /// On a GPU the copy is asynchronous: give the batch to [`Self::hold`] afterwards.
    pub fn input(&self, batch: &Batch<Slab>, num_clips: i64, size: u32) -> Result<(Tensor, Tensor)> {
        let (nt, size) = (batch.n as i64 * num_clips * self.num_segments, i64::from(size));
        let pixels = batch.buffer.0.f_narrow(0, 0, nt * size * size * 3)?.f_view([nt, size, size, 3])?;
        let pixels = match self.device {
            Device::Cuda(_) => pixels.f_to_device_(self.device, Kind::Uint8, true, false)?,
            _ => pixels,
        };
        // Interleaved pixels seen as NCHW are already channels_last.
        let mut x = pixels.f_permute([0, 3, 1, 2])?.f_to_kind(Kind::Float)?;
        let x = x.f_sub_(&self.mean)?.f_mul_(&self.inv_std)?;
        let x = if self.channels_last { x } else { x.f_contiguous()? };
        // Not blocking: a blocking copy would wait for every step queued so far. The labels are in
        // the driver's hands when the call returns, as they are not page-locked.
        let labels_n = Tensor::from_slice(&batch.labels).f_to_device_(self.device, Kind::Int64, true, false)?;
        Ok((x, labels_n))
    }

    /// Gives a batch's buffer back as soon as the device has read it.
    pub fn hold(&mut self, batch: Batch<Slab>) -> Result<()> {
        if let Device::Cuda(index) = self.device {
            let read = Event::new(index)?;
            read.record()?;
            if let Some((_, before)) = self.held.replace((batch, read)) {
                before.synchronize()?;
            }
        }
        Ok(())
    }

    /// Ends the loader and keeps its buffers. Returns the samples that could not be read.
    pub fn end(&mut self) -> Result<u64> {
        if let Some((batch, read)) = self.held.take() {
            read.synchronize()?;
            drop(batch);
        }
        let Some(loader) = self.loader.take() else { return Ok(0) };
        let num_bad = loader.num_bad();
        self.pool.extend(loader.into_buffers());
        Ok(num_bad)
    }
}
