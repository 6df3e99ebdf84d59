//! Number formats of a training: float32, autocast to bfloat16 or float16, and o2 (float16
//! weights with float32 masters), with the loss scale the float16 modes need.
//!
//! Call order of a step: [`Precision::forward`] around the network, [`Precision::scale_loss`] on
//! the loss, backward, then `Sgd::step`, which unscales, skips the step where a gradient is not
//! finite, and updates the scale. Nothing here waits for the device but
//! [`LossScale::export`].

use crate::checkpoint::LossScaleState;
use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use tsm_job::config::{self, PrecisionMode};
use tsm_job::exit::{self, Coded};
use tsm_torch_ext::ops;

/// The number format of a training.
#[derive(Debug)]
pub struct Precision {
    mode: PrecisionMode,
    device: Device,
    scale: Option<LossScale>,
}

impl Precision {
    /// Checks that the device has the kernels of the mode, by running one of each.
    ///
    /// # Errors
    /// They are missing (exit code PREFLIGHT).
    pub fn new(config: &config::Precision, device: Device) -> Result<Precision> {
        let precision = Precision {
            mode: config.mode,
            device,
            scale: match config.mode {
                PrecisionMode::Fp32 | PrecisionMode::Bf16 => None,
                PrecisionMode::Fp16 => Some(LossScale::new(config.loss_scale, None, device)?),
                PrecisionMode::O2 => Some(LossScale::new(
                    config.loss_scale,
                    Some(O2_MAX_SCALE),
                    device,
                )?),
            },
        };
        precision.probe().map_err(|e| {
            Coded::new(
                exit::PREFLIGHT,
                format!(
                    "train.precision.mode {:?} does not work on {device:?}: {e:#}\n  hint: use bf16 or fp32",
                    config.mode
                ),
            )
        })?;
        Ok(precision)
    }

    pub fn mode(&self) -> PrecisionMode {
        self.mode
    }

    /// The kind the network's convolutions and classifier are cast to before
    /// [`crate::ddp::Ddp::new`], and its input: Half in o2, else `None`.
    pub fn weight_kind(&self) -> Option<Kind> {
        (self.mode == PrecisionMode::O2).then_some(Kind::Half)
    }

    /// Runs the network's forward pass, under autocast where the mode asks for it. The loss
    /// belongs outside, on logits cast to float32.
    pub fn forward<R>(&self, f: impl FnOnce() -> R) -> R {
        match self.mode {
            PrecisionMode::Fp32 | PrecisionMode::O2 => f(),
            PrecisionMode::Bf16 => ops::autocast(self.device, Kind::BFloat16, f),
            PrecisionMode::Fp16 => ops::autocast(self.device, Kind::Half, f),
        }
    }

    /// The loss to call backward on: `loss` times the loss scale, on the device.
    pub fn scale_loss(&self, loss: &Tensor) -> Tensor {
        match &self.scale {
            Some(scale) => loss * scale.scale.squeeze(),
            None => loss.shallow_clone(),
        }
    }

    /// The loss scale of fp16 and o2.
    pub fn scale(&self) -> Option<&LossScale> {
        self.scale.as_ref()
    }

    pub fn scale_mut(&mut self) -> Option<&mut LossScale> {
        self.scale.as_mut()
    }

    /// A convolution, a BatchNorm and a matrix product, forward and backward.
    fn probe(&self) -> Result<()> {
        let options = (Kind::Float, self.device);
        let kind = self.weight_kind().unwrap_or(Kind::Float);
        let input = Tensor::f_ones([2, 3, 4, 4], options)?.f_to_kind(kind)?;
        let conv = Tensor::f_ones([4, 3, 3, 3], options)?
            .f_to_kind(kind)?
            .set_requires_grad(true);
        let gamma = Tensor::f_ones([4], options)?.set_requires_grad(true);
        let fc = Tensor::f_ones([5, 4], options)?
            .f_to_kind(kind)?
            .set_requires_grad(true);
        let run = || -> Result<Tensor, tch::TchError> {
            let none = None::<Tensor>;
            let y = input.f_conv2d(&conv, none.as_ref(), 1, 1, 1, 1)?;
            let y = y.f_batch_norm(
                Some(&gamma),
                none.as_ref(),
                none.as_ref(),
                none.as_ref(),
                true,
                0.1,
                1e-5,
                false,
            )?;
            let y = y.f_mean_dim([2i64, 3].as_slice(), false, None)?;
            y.f_linear(&fc, none.as_ref())
        };
        let loss = self
            .forward(run)?
            .f_to_kind(Kind::Float)?
            .f_sum(Kind::Float)?;
        ops::backward(&self.scale_loss(&loss))?;
        Ok(())
    }
}

/// apex's ceiling for the dynamic scale.
const O2_MAX_SCALE: f64 = 16_777_216.0;
/// First dynamic scale (torch's GradScaler, apex).
const FIRST_SCALE: f64 = 65_536.0;
const GROWTH: f64 = 2.0;
const BACKOFF: f64 = 0.5;
/// Steps without an infinity after which the scale grows.
const GROWTH_INTERVAL: i64 = 2000;

/// The factor on the loss that keeps small float16 gradients from vanishing, kept on the device.
#[derive(Debug)]
pub struct LossScale {
    /// `[1]` float32
    scale: Tensor,
    /// `[1]` int32: steps since the last change.
    good_steps: Tensor,
    /// `[1]` float32: 1 where a gradient of this step is not finite.
    found_inf: Tensor,
    dynamic: bool,
    max: Option<f64>,
}

impl LossScale {
    /// `fixed`: a scale that never changes; else dynamic from 65536: x2 after 2000 good steps,
    /// x0.5 after a step with an infinity, never above `max`.
    pub fn new(fixed: Option<f64>, max: Option<f64>, device: Device) -> Result<LossScale> {
        Ok(LossScale {
            scale: Tensor::f_full([1], fixed.unwrap_or(FIRST_SCALE), (Kind::Float, device))?,
            good_steps: Tensor::f_zeros([1], (Kind::Int, device))?,
            found_inf: Tensor::f_zeros([1], (Kind::Float, device))?,
            dynamic: fixed.is_none(),
            max,
        })
    }

    /// Divides the gradients by the scale in place and looks for values that are not finite.
    ///
    /// Give it reduced gradients: an infinity on any rank is then one on every rank, so all
    /// ranks skip the same step without asking each other. The result, `[1]`, 1 or 0, is
    /// overwritten by the next call.
    pub fn unscale(&mut self, grads: &[Tensor]) -> Result<Tensor> {
        let _ = self.found_inf.f_zero_()?;
        let inverse = self
            .scale
            .f_to_kind(Kind::Double)?
            .f_reciprocal()?
            .f_to_kind(Kind::Float)?;
        ops::unscale_and_check(grads, &self.found_inf, &inverse)?;
        Ok(self.found_inf.shallow_clone())
    }

    /// After the optimizer: lowers the scale if the step was skipped, raises it when due.
    pub fn update(&mut self) -> Result<()> {
        if !self.dynamic {
            return Ok(());
        }
        ops::update_scale(
            &self.scale,
            &self.good_steps,
            &self.found_inf,
            GROWTH,
            BACKOFF,
            GROWTH_INTERVAL,
        )?;
        if let Some(max) = self.max {
            let _ = self.scale.f_clamp_max_(max)?;
        }
        Ok(())
    }

    /// The scale of the coming step, `[1]` float32: a copy, so that the next update leaves it alone.
    pub fn value(&self) -> Tensor {
        self.scale.copy()
    }

    /// The state for a checkpoint. Waits for the device.
    pub fn export(&self) -> Result<LossScaleState> {
        Ok(LossScaleState {
            scale: self.scale.f_double_value(&[0])?,
            good_steps: self.good_steps.f_int64_value(&[0])? as i32,
        })
    }

    /// Continues from a checkpoint. A fixed scale of this run's configuration wins.
    pub fn import(&mut self, state: LossScaleState) -> Result<()> {
        if self.dynamic {
            let _ = self.scale.f_fill_(state.scale).context("loss scale")?;
            let _ = self.good_steps.f_fill_(i64::from(state.good_steps))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grads(values: &[f32]) -> Vec<Tensor> {
        vec![Tensor::from_slice(values)]
    }

    fn values(t: &Tensor) -> Vec<f32> {
        Vec::try_from(t).unwrap()
    }

    fn precision(mode: PrecisionMode) -> config::Precision {
        config::Precision {
            mode,
            loss_scale: None,
        }
    }

    #[test]
    fn an_infinity_is_seen_and_halves_the_scale() {
        let mut s = LossScale::new(None, None, Device::Cpu).unwrap();
        let g = grads(&[65536.0, -131072.0]);
        assert_eq!(values(&s.unscale(&g).unwrap()), [0.0]);
        assert_eq!(values(&g[0]), [1.0, -2.0]);
        s.update().unwrap();
        assert_eq!(
            s.export().unwrap(),
            LossScaleState {
                scale: 65536.0,
                good_steps: 1
            }
        );
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let before = s.export().unwrap().scale;
            assert_eq!(values(&s.unscale(&grads(&[1.0, bad])).unwrap()), [1.0]);
            s.update().unwrap();
            assert_eq!(
                s.export().unwrap(),
                LossScaleState {
                    scale: before / 2.0,
                    good_steps: 0
                }
            );
        }
    }

    #[test]
    fn two_thousand_good_steps_double_it_up_to_the_ceiling() {
        let mut s = LossScale::new(None, Some(O2_MAX_SCALE), Device::Cpu).unwrap();
        let near = LossScaleState {
            scale: O2_MAX_SCALE / 2.0,
            good_steps: 1998,
        };
        s.import(near).unwrap();
        s.update().unwrap();
        assert_eq!(s.export().unwrap().scale, O2_MAX_SCALE / 2.0);
        s.update().unwrap();
        assert_eq!(s.export().unwrap().scale, O2_MAX_SCALE);
        s.import(LossScaleState {
            scale: O2_MAX_SCALE,
            good_steps: 1999,
        })
        .unwrap();
        s.update().unwrap();
        assert_eq!(
            s.export().unwrap(),
            LossScaleState {
                scale: O2_MAX_SCALE,
                good_steps: 0
            }
        );
    }

    #[test]
    fn a_fixed_scale_stays() {
        let mut s = LossScale::new(Some(128.0), None, Device::Cpu).unwrap();
        assert_eq!(values(&s.unscale(&grads(&[f32::NAN])).unwrap()), [1.0]);
        s.update().unwrap();
        s.import(LossScaleState {
            scale: 4.0,
            good_steps: 9,
        })
        .unwrap();
        assert_eq!(s.export().unwrap().scale, 128.0);
    }

    #[test]
    fn autocast_only_where_asked_and_loss_scaled_only_in_half() {
        for (mode, kind, scale) in [
            (PrecisionMode::Fp32, Kind::Float, 1.0),
            (PrecisionMode::Bf16, Kind::BFloat16, 1.0),
            (PrecisionMode::Fp16, Kind::Half, 65536.0),
            (PrecisionMode::O2, Kind::Float, 65536.0),
        ] {
            let p = Precision::new(&precision(mode), Device::Cpu).unwrap();
            let x = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
            assert_eq!(p.forward(|| x.matmul(&x)).kind(), kind, "{mode:?}");
            assert_eq!(x.matmul(&x).kind(), Kind::Float);
            let loss = p.scale_loss(&Tensor::from(0.5f32));
            assert_eq!(loss.size(), [0i64; 0]);
            assert_eq!(f64::try_from(loss).unwrap(), 0.5 * scale, "{mode:?}");
        }
    }
}
