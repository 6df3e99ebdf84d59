//! SGD with momentum on the gradients of the buckets, one fused call per parameter group.

use super::ParamInfo;
use super::groups::{Group, split};
use crate::checkpoint::{copy_by_name, section};
use crate::ddp::Bucket;
use crate::precision::Precision;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};
use tsm_job::config;
use tsm_torch_ext::ops::fused_sgd;

/// What a step leaves on the device; reading a value back waits for the device, so do it only
/// when logging.
#[derive(Debug)]
pub struct StepTensors {
    /// Global L2 norm of the mean gradient before clipping, float32 scalar.
    pub grad_norm: Tensor,
    /// `[1]`, float32: 1 where the step was skipped because a gradient, or the norm of all, is not
    /// finite. Valid until the next step.
    pub found_inf: Tensor,
}

/// SGD with momentum, weight decay added to the gradient after clipping, as PyTorch's.
#[derive(Debug)]
pub struct Sgd {
    config: config::Optim,
    groups: Vec<GroupState>,
    /// Every gradient once, float32: the buckets, or float32 copies of the half ones.
    flats: Vec<Tensor>,
    /// Half bucket and its float32 copy.
    widen: Vec<(Tensor, Tensor)>,
    /// Half weight and its float32 master.
    narrow: Vec<(Tensor, Tensor)>,
    momenta: BTreeMap<String, Tensor>,
    masters: BTreeMap<String, Tensor>,
}

#[derive(Debug, Default)]
struct Lists {
    params: Vec<Tensor>,
    grads: Vec<Tensor>,
    momenta: Vec<Tensor>,
}

#[derive(Debug)]
struct GroupState {
    group: Group,
    lists: Lists,
}

impl Sgd {
    /// `params` as given to [`crate::ddp::Ddp::new`], `buckets` from [`crate::ddp::Ddp::buckets`].
    /// Half parameters get float32 master weights.
    ///
    /// # Errors
    /// A parameter without a place in the buckets, or no memory.
    pub fn new(params: &[ParamInfo], buckets: &[Bucket], config: &config::Optim) -> Result<Sgd> {
        let _guard = tch::no_grad_guard();
        let mut flats = Vec::new();
        let mut widen = Vec::new();
        let mut grads: Vec<Option<Tensor>> = params.iter().map(|_| None).collect();
        for bucket in buckets {
            let views = if bucket.flat.kind() == Kind::Float {
                flats.push(bucket.flat.shallow_clone());
                bucket
                    .members
                    .iter()
                    .map(|m| m.view.shallow_clone())
                    .collect()
            } else {
                let (flat, views) = bucket.like(Kind::Float)?;
                widen.push((bucket.flat.shallow_clone(), flat.shallow_clone()));
                flats.push(flat);
                views
            };
            for (member, view) in bucket.members.iter().zip(views) {
                grads[member.param] = Some(view);
            }
        }
        let mut narrow = Vec::new();
        let mut momenta = BTreeMap::new();
        let mut masters = BTreeMap::new();
        let mut groups = Vec::new();
        for (group, members) in split(config.groups, params.iter().map(|p| p.role)) {
            let mut lists = Lists::default();
            for i in members {
                let ParamInfo { name, tensor, .. } = &params[i];
                let grad = grads[i]
                    .take()
                    .with_context(|| format!("{name} has no place in the gradient buckets"))?;
                // f_to_kind and zeros_like keep the strides, which the fused kernel needs alike.
                let weight = if tensor.kind() == Kind::Float {
                    tensor.shallow_clone()
                } else {
                    let master = tensor.detach().f_to_kind(Kind::Float)?;
                    narrow.push((tensor.shallow_clone(), master.shallow_clone()));
                    masters.insert(name.clone(), master.shallow_clone());
                    master
                };
                let momentum = weight.detach().f_zeros_like()?;
                momenta.insert(name.clone(), momentum.shallow_clone());
                lists.params.push(weight);
                lists.grads.push(grad);
                lists.momenta.push(momentum);
            }
            groups.push(GroupState { group, lists });
        }
        Ok(Sgd {
            config: config.clone(),
            groups,
            flats,
            widen,
            narrow,
            momenta,
            masters,
        })
    }

    /// The groups in use with their number of parameters, for the report.
    pub fn groups(&self) -> impl Iterator<Item = (Group, usize)> {
        self.groups.iter().map(|g| (g.group, g.lists.params.len()))
    }

    /// One update from the gradients now in the buckets; where one of them is not finite, weights
    /// and momentum stay as they are, in every number format. `lr` is [`super::lr_at`]'s, before the
    /// groups' multipliers. The host never waits for the device.
    ///
    /// The gradients in the buckets are spent: they may come back unscaled and clipped.
    ///
    /// # Errors
    /// Only what libtorch reports, e.g. a lost device.
    pub fn step(&mut self, lr: f64, precision: &mut Precision) -> Result<StepTensors> {
        let _guard = tch::no_grad_guard();
        for (half, full) in &mut self.widen {
            full.f_copy_(half)?;
        }
        let overflow = match precision.scale_mut() {
            Some(scale) => Some(scale.unscale(&self.flats)?),
            None => None,
        };
        let grad_norm = global_norm(&self.flats)?;
        let found_inf = match overflow {
            Some(found_inf) => found_inf,
            // Without a loss scale nobody has looked yet; reduced gradients make the ranks agree.
            None => not_finite(&grad_norm)?,
        };
        let divisor = match self.config.max_grad_norm {
            Some(max) => Some(clip_divisor(&grad_norm, max)?),
            None => None,
        };
        for GroupState { group, lists } in &self.groups {
            // Momentum starts at zero, which makes the first step the gradient itself: PyTorch's
            // special first step needs no state, even if that step is skipped.
            fused_sgd(
                &lists.params,
                &lists.grads,
                &lists.momenta,
                lr * group.lr_mult,
                self.config.momentum,
                group.decay.resolve(self.config.weight_decay),
                self.config.nesterov,
                false,
                divisor.as_ref(),
                Some(&found_inf),
            )
            .with_context(|| format!("cannot update parameter group {}", group.name))?;
        }
        self.copy_masters()?;
        if let Some(scale) = precision.scale_mut() {
            scale.update()?;
        }
        Ok(StepTensors {
            grad_norm,
            found_inf,
        })
    }

    fn copy_masters(&mut self) -> Result<()> {
        for (half, master) in &mut self.narrow {
            half.f_copy_(master)?;
        }
        Ok(())
    }

    /// Momentum by parameter name, for a checkpoint; shared, not copied.
    pub fn momenta(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.momenta.iter().map(|(n, t)| (n.as_str(), t))
    }

    /// float32 master weights by parameter name; empty but in o2.
    pub fn masters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.masters.iter().map(|(n, t)| (n.as_str(), t))
    }

    /// Takes over a checkpoint's momentum and master weights, and writes the masters' values to
    /// the half weights. Nothing is written unless the names and shapes of a section fit.
    ///
    /// # Errors
    /// What does not fit, by name (exit code DATA).
    pub fn import(
        &mut self,
        momenta: &BTreeMap<String, Tensor>,
        masters: &BTreeMap<String, Tensor>,
    ) -> Result<()> {
        copy_by_name(section::MOMENTUM, momenta, self.momenta())?;
        copy_by_name(section::MASTER, masters, self.masters())?;
        let _guard = tch::no_grad_guard();
        self.copy_masters()
    }
}

/// L2 norm over all tensors, on their device.
fn global_norm(flats: &[Tensor]) -> Result<Tensor> {
    let norms: Vec<Tensor> = flats
        .iter()
        .map(|flat| flat.f_norm())
        .collect::<Result<_, _>>()?;
    Ok(Tensor::f_stack(&norms, 0)?.f_norm()?)
}

/// `[1]`, float32: 1 if `norm` is infinite or NaN, else 0.
fn not_finite(norm: &Tensor) -> Result<Tensor> {
    let bad = norm.f_isfinite()?.f_logical_not()?;
    Ok(bad.f_to_kind(Kind::Float)?.f_reshape([1])?)
}

/// What to divide the gradients by so that their norm is at most `max`:
/// `max((norm + 1e-6) / max, 1)`, the reciprocal of `clip_grad_norm_`'s factor. `[1]`, float32.
fn clip_divisor(norm: &Tensor, max: f64) -> Result<Tensor> {
    Ok(norm
        .f_add_scalar(1e-6)?
        .f_div_scalar(max)?
        .f_clamp_min(1.0)?
        .f_reshape([1])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ddp::{Ddp, Peers};
    use crate::model::ParamRole;
    use std::sync::Arc;
    use tch::Device;
    use tsm_job::config::{Groups, PrecisionMode, Schedule};
    use tsm_torch_ext::ops::backward;

    fn config(max_grad_norm: Option<f64>) -> config::Optim {
        config::Optim {
            lr: 0.1,
            base_batch: 1,
            scale_lr: false,
            momentum: 0.9,
            nesterov: false,
            weight_decay: 0.01,
            groups: Groups::TsmFcLr5,
            max_grad_norm,
            schedule: Schedule::Constant {},
            warmup: None,
            label_smoothing: 0.0,
        }
    }

    fn fp32() -> Precision {
        let config = config::Precision {
            mode: PrecisionMode::Fp32,
            loss_scale: None,
        };
        Precision::new(&config, Device::Cpu).unwrap()
    }

    struct Setup {
        params: Vec<ParamInfo>,
        ddp: Ddp,
        sgd: Sgd,
    }

    /// Three parameters of different groups; the loss is sum(c * p^2) / 2, so the gradient is c * p.
    fn setup(max_grad_norm: Option<f64>) -> Setup {
        let param = |name: &str, role, values: &[f32]| ParamInfo {
            name: name.into(),
            role,
            tensor: Tensor::from_slice(values).set_requires_grad(true),
        };
        let params = vec![
            param("conv1.weight", ParamRole::FirstConvWeight, &[1.0, -2.0]),
            param("bn1.bias", ParamRole::BnBias, &[0.5]),
            param("fc.bias", ParamRole::FcBias, &[3.0, 4.0, 5.0]),
        ];
        let ddp = Ddp::new(&params, Arc::new(Peers::alone()), 25).unwrap();
        ddp.record_order(|| Ok(backward(&loss(&params))?)).unwrap();
        let sgd = Sgd::new(&params, &ddp.buckets(), &config(max_grad_norm)).unwrap();
        Setup { params, ddp, sgd }
    }

    const C: [f64; 3] = [1.0, 2.0, 0.5];

    fn loss(params: &[ParamInfo]) -> Tensor {
        let terms: Vec<Tensor> = params
            .iter()
            .zip(C)
            .map(|(p, c)| p.tensor.square().sum(Kind::Float) * (c / 2.0))
            .collect();
        Tensor::stack(&terms, 0).sum(Kind::Float)
    }

    fn step(s: &mut Setup, lr: f64) -> f64 {
        s.ddp.zero().unwrap();
        s.ddp.begin(true);
        backward(&loss(&s.params)).unwrap();
        s.ddp.finish().unwrap();
        f64::try_from(s.sgd.step(lr, &mut fp32()).unwrap().grad_norm).unwrap()
    }

    /// PyTorch's SGD after clip_grad_norm_, in float64.
    fn by_hand(steps: &[f64], max: Option<f64>) -> (Vec<Vec<f64>>, Vec<f64>) {
        let mut p = vec![vec![1.0, -2.0], vec![0.5], vec![3.0, 4.0, 5.0]];
        let mut m: Vec<Vec<f64>> = p.iter().map(|v| vec![0.0; v.len()]).collect();
        let (lr_mult, decay) = ([1.0, 1.0, 10.0], [0.01, 0.0, 0.0]);
        let mut norms = Vec::new();
        for &lr in steps {
            let norm = p
                .iter()
                .zip(C)
                .flat_map(|(v, c)| v.iter().map(move |x| (c * x).powi(2)))
                .sum::<f64>()
                .sqrt();
            norms.push(norm);
            let factor = max.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
            for k in 0..3 {
                for i in 0..p[k].len() {
                    let g = C[k] * p[k][i] * factor + decay[k] * p[k][i];
                    m[k][i] = 0.9 * m[k][i] + g;
                    p[k][i] -= lr * lr_mult[k] * m[k][i];
                }
            }
        }
        (p, norms)
    }

    #[test]
    fn steps_equal_pytorchs_sgd_with_groups_and_clipping() {
        let lrs = [0.1, 0.05, 0.02, 0.02];
        for max in [None, Some(2.0), Some(1e6)] {
            let mut s = setup(max);
            let norms: Vec<f64> = lrs.iter().map(|&lr| step(&mut s, lr)).collect();
            let (want, want_norms) = by_hand(&lrs, max);
            for (p, want) in s.params.iter().zip(&want) {
                let got: Vec<f32> = Vec::try_from(&p.tensor.detach()).unwrap();
                for (g, w) in got.iter().zip(want) {
                    assert!(
                        (f64::from(*g) - w).abs() < 1e-5 * w.abs().max(1.0),
                        "{max:?} {}: {got:?} is not {want:?}",
                        p.name
                    );
                }
            }
            for (g, w) in norms.iter().zip(&want_norms) {
                assert!(
                    (g - w).abs() < 1e-5 * w,
                    "{max:?}: {norms:?} is not {want_norms:?}"
                );
            }
        }
        let clipped = by_hand(&lrs, Some(2.0)).0;
        assert_ne!(clipped, by_hand(&lrs, None).0, "2.0 must clip");
    }

    #[test]
    fn a_gradient_that_is_not_finite_leaves_weights_and_momentum_alone() {
        let state = |s: &Setup| -> Vec<Vec<u32>> {
            let params = s.params.iter().map(|p| p.tensor.detach());
            let momenta = s.sgd.momenta().map(|(_, t)| t.shallow_clone());
            let bits = |t: Tensor| {
                Vec::<f32>::try_from(t)
                    .unwrap()
                    .into_iter()
                    .map(f32::to_bits)
            };
            params.chain(momenta).map(|t| bits(t).collect()).collect()
        };
        for max in [None, Some(2.0)] {
            for bad in [f64::NAN, f64::INFINITY] {
                let mut s = setup(max);
                step(&mut s, 0.1);
                let before = state(&s);
                s.ddp.zero().unwrap();
                s.ddp.begin(true);
                backward(&loss(&s.params)).unwrap();
                s.ddp.finish().unwrap();
                let _ = s.ddp.buckets()[0].members[0]
                    .view
                    .shallow_clone()
                    .fill_(bad);
                let done = s.sgd.step(0.1, &mut fp32()).unwrap();
                assert_eq!(f64::try_from(&done.found_inf).unwrap(), 1.0);
                assert!(!f64::try_from(&done.grad_norm).unwrap().is_finite());
                assert_eq!(state(&s), before, "{max:?} {bad}");
                step(&mut s, 0.1);
                assert_ne!(state(&s), before, "the next good step moves the weights");
            }
        }
    }

    #[test]
    fn a_state_that_does_not_fit_is_named_and_changes_nothing() {
        let mut s = setup(None);
        step(&mut s, 0.1);
        let keep = |s: &Setup| -> BTreeMap<String, Tensor> {
            s.sgd
                .momenta()
                .map(|(n, t)| (n.to_string(), t.copy()))
                .collect()
        };
        let before = keep(&s);
        let mut state = keep(&s);
        state.remove("bn1.bias");
        let e = s.sgd.import(&state, &BTreeMap::new()).unwrap_err();
        assert!(
            e.to_string().contains("momentum/bn1.bias is missing"),
            "{e}"
        );
        assert_eq!(keep(&s), before);
    }

    #[test]
    fn a_parameter_outside_the_buckets_is_named() {
        let s = setup(None);
        let e = Sgd::new(&s.params, &s.ddp.buckets()[..0], &config(None)).unwrap_err();
        assert!(e.to_string().contains("conv1.weight has no place"), "{e}");
    }
}
