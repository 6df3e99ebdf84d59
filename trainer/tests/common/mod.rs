//! Ranks as threads on loopback, and a small network whose numbers come from formulas.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};
use tsm_job::config::{self, Groups, PrecisionMode, Schedule};
use tsm_torch_ext::dist::{ProcessGroup, Store};
use tsm_torch_ext::ops::backward;
use tsm_trainer::ddp::{Ddp, Link, Peers};
use tsm_trainer::model::ParamRole;
use tsm_trainer::optim::{ParamInfo, Sgd};
use tsm_trainer::precision::Precision;

pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Runs `f` on `n` ranks, each with its own store connection and gloo group; results by rank.
pub fn world<R: Send>(n: u32, timeout: Duration, f: impl Fn(Arc<Peers>) -> R + Sync) -> Vec<R> {
    groups(n, timeout, |_, peers| f(peers))
}

/// As [`world`], for those who need the process group too.
pub fn groups<R: Send>(
    n: u32,
    timeout: Duration,
    f: impl Fn(Arc<ProcessGroup>, Arc<Peers>) -> R + Sync,
) -> Vec<R> {
    stores(n, timeout, |store, group| {
        let link = Link {
            store,
            group: group.clone(),
        };
        f(group, Arc::new(Peers::join(link).unwrap()))
    })
}

/// As [`world`], before the ranks become peers.
pub fn stores<R: Send>(
    n: u32,
    timeout: Duration,
    f: impl Fn(Arc<Store>, Arc<ProcessGroup>) -> R + Sync,
) -> Vec<R> {
    let n = n as usize;
    let (f, (ports, port)) = (&f, mpsc::channel());
    let connect = move |rank: usize, store: Store| {
        let group = ProcessGroup::gloo(&store, rank, n, "lo", timeout, 2).unwrap();
        f(Arc::new(store), Arc::new(group))
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(move || {
            let store = Store::tcp("127.0.0.1", 0, n, true, TIMEOUT).unwrap();
            ports.send(store.port()).unwrap();
            connect(0, store)
        });
        let port = port.recv().unwrap();
        let others: Vec<_> = (1..n)
            .map(|rank| {
                scope.spawn(move || {
                    let store = Store::tcp("127.0.0.1", port, n, false, TIMEOUT).unwrap();
                    connect(rank, store)
                })
            })
            .collect();
        std::iter::once(first)
            .chain(others)
            .map(|t| t.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
            .collect()
    })
}

/// Values in [-1, 1] that look random and are the same everywhere.
pub fn formula(size: &[i64], seed: f64) -> Tensor {
    let n: i64 = size.iter().product();
    let i = Tensor::arange(n, (Kind::Double, Device::Cpu));
    ((i * 12.9898 + seed * 78.233).sin() * 437.585)
        .sin()
        .reshape(size)
        .to_kind(Kind::Float)
}

/// Convolution, BatchNorm in evaluation mode, three linear layers: 1.5 MB, so two buckets.
pub struct Net {
    pub params: Vec<ParamInfo>,
    mean: Tensor,
    var: Tensor,
}

impl Net {
    pub fn new() -> Net {
        let specs: [(&str, ParamRole, &[i64], f64); 9] = [
            (
                "conv1.weight",
                ParamRole::FirstConvWeight,
                &[8, 3, 3, 3],
                0.3,
            ),
            ("bn1.weight", ParamRole::BnWeight, &[8], 1.0),
            ("bn1.bias", ParamRole::BnBias, &[8], 0.1),
            ("fc1.weight", ParamRole::Weight, &[600, 8], 0.3),
            ("fc1.bias", ParamRole::Bias, &[600], 0.1),
            ("fc2.weight", ParamRole::Weight, &[600, 600], 0.05),
            ("fc2.bias", ParamRole::Bias, &[600], 0.1),
            ("fc.weight", ParamRole::FcWeight, &[5, 600], 0.05),
            ("fc.bias", ParamRole::FcBias, &[5], 0.1),
        ];
        let params = specs
            .into_iter()
            .enumerate()
            .map(|(i, (name, role, size, gain))| ParamInfo {
                name: name.into(),
                role,
                tensor: (formula(size, i as f64) * gain).set_requires_grad(true),
            })
            .collect();
        Net {
            params,
            mean: formula(&[8], 20.0) * 0.1,
            var: formula(&[8], 21.0) * 0.2 + 1.0,
        }
    }

    /// As o2 wants it: everything but BatchNorm in float16.
    pub fn half() -> Net {
        let mut net = Net::new();
        for p in &mut net.params {
            if !matches!(p.role, ParamRole::BnWeight | ParamRole::BnBias) {
                p.tensor = p
                    .tensor
                    .detach()
                    .to_kind(Kind::Half)
                    .set_requires_grad(true);
            }
        }
        net
    }

    fn p(&self, i: usize) -> &Tensor {
        &self.params[i].tensor
    }

    pub fn logits(&self, x: &Tensor) -> Tensor {
        let none = None::<&Tensor>;
        x.to_kind(self.p(0).kind())
            .conv2d(self.p(0), none, 2, 1, 1, 1)
            .batch_norm(
                Some(self.p(1)),
                Some(self.p(2)),
                Some(&self.mean),
                Some(&self.var),
                false,
                0.1,
                1e-5,
                false,
            )
            .relu()
            .mean_dim([2i64, 3].as_slice(), false, None)
            .linear(self.p(3), Some(self.p(4)))
            .relu()
            .linear(self.p(5), Some(self.p(6)))
            .relu()
            .linear(self.p(7), Some(self.p(8)))
    }

    pub fn loss(&self, batch: &(Tensor, Tensor)) -> Tensor {
        self.logits(&batch.0)
            .to_kind(Kind::Float)
            .cross_entropy_for_logits(&batch.1)
    }

    pub fn tensors(&self) -> Vec<Tensor> {
        self.params
            .iter()
            .map(|p| p.tensor.shallow_clone())
            .collect()
    }

    /// Every parameter's exact bytes.
    pub fn bits(&self) -> Vec<Vec<u8>> {
        self.params
            .iter()
            .map(|p| {
                let t = p.tensor.detach();
                let mut bytes = vec![0; t.numel() * t.kind().elt_size_in_bytes()];
                t.copy_data_u8(&mut bytes, t.numel());
                bytes
            })
            .collect()
    }
}

/// Clips `from..from + n` of an endless list: images and labels.
pub fn batch(from: i64, n: i64) -> (Tensor, Tensor) {
    let x: Vec<Tensor> = (from..from + n)
        .map(|i| formula(&[1, 3, 8, 8], 100.0 + i as f64))
        .collect();
    let y: Vec<i64> = (from..from + n).map(|i| (i * 7 + i / 3) % 5).collect();
    (Tensor::cat(&x, 0), Tensor::from_slice(&y))
}

pub fn optim() -> config::Optim {
    config::Optim {
        lr: 0.1,
        base_batch: 4,
        scale_lr: false,
        momentum: 0.9,
        nesterov: false,
        weight_decay: 1e-3,
        groups: Groups::TsmFcLr5,
        max_grad_norm: Some(0.5),
        schedule: Schedule::Constant {},
        warmup: None,
        label_smoothing: 0.0,
    }
}

pub fn precision(mode: PrecisionMode) -> Precision {
    let config = config::Precision {
        mode,
        loss_scale: None,
    };
    Precision::new(&config, Device::Cpu).unwrap()
}

/// Network, engine and optimizer of one rank, ready for the first step.
pub struct Rank {
    pub net: Net,
    pub ddp: Ddp,
    pub sgd: Sgd,
    pub precision: Precision,
}

impl Rank {
    pub fn new(peers: Arc<Peers>, mode: PrecisionMode) -> Rank {
        let net = match mode {
            PrecisionMode::O2 => Net::half(),
            _ => Net::new(),
        };
        let precision = precision(mode);
        let ddp = Ddp::new(&net.params, peers, 25).unwrap();
        ddp.record_order(|| {
            let loss = precision.forward(|| net.loss(&batch(0, 2)));
            Ok(backward(&loss)?)
        })
        .unwrap();
        let sgd = Sgd::new(&net.params, &ddp.buckets(), &optim()).unwrap();
        Rank {
            net,
            ddp,
            sgd,
            precision,
        }
    }

    /// Mean gradients of the micro batches; the mean loss of this rank.
    pub fn gradients(&self, micro: &[(Tensor, Tensor)]) -> anyhow::Result<f64> {
        self.ddp.zero()?;
        let mut mean = 0.0;
        for (i, batch) in micro.iter().enumerate() {
            self.ddp.begin(i + 1 == micro.len());
            let loss = self.precision.forward(|| self.net.loss(batch)) / micro.len() as f64;
            backward(&self.precision.scale_loss(&loss))?;
            self.ddp.finish()?;
            mean += f64::try_from(loss)?;
        }
        Ok(mean)
    }

    pub fn step(&mut self, micro: &[(Tensor, Tensor)], lr: f64) -> anyhow::Result<f64> {
        let loss = self.gradients(micro)?;
        self.sgd.step(lr, &mut self.precision)?;
        Ok(loss)
    }
}

/// Largest difference of two lists of tensors, relative to each tensor's largest value.
pub fn difference(got: &[Tensor], want: &[Tensor]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter()
        .zip(want)
        .map(|(a, b)| f64::try_from((a - b).abs().max() / (b.abs().max() + 1e-12)).unwrap())
        .fold(0.0, f64::max)
}
