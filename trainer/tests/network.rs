//! The whole network on the gradient engine: every number format, channels last, partial
//! BatchNorm, and a resume through a checkpoint file.

mod common;

use common::{formula, optim, precision, world};
use serde_json::Value;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use tsm_job::config::{self, Arch, BnBuffers, Groups, HeadOrder, PrecisionMode, ShiftMode};
use tsm_torch_ext::ops::backward;
use tsm_trainer::checkpoint::{Checkpoints, FORMAT, Meta, Snapshot, find, section};
use tsm_trainer::ddp::{Ddp, Peers};
use tsm_trainer::model::Network;
use tsm_trainer::optim::{ParamInfo, Sgd, groups};
use tsm_trainer::precision::Precision;

fn model(arch: Arch, width: f64, partial_bn: bool) -> config::Model {
    config::Model {
        arch,
        width,
        num_classes: 10,
        num_segments: 2,
        shift: config::Shift {
            mode: ShiftMode::Bi,
            direction: Default::default(),
            div: 8,
            place: Default::default(),
            n_round: None,
        },
        temporal_pool: false,
        head: config::Head {
            order: HeadOrder::DropoutFcMean,
            dropout: 0.0,
            init_std: 0.01,
        },
        partial_bn,
        weights: None,
        weights_min_coverage: 0.9,
    }
}

#[test]
fn groups_are_the_original_codes_policies() {
    let golden: Value = serde_json::from_str(include_str!("golden/official_tsm.json")).unwrap();
    for (case, arch) in [
        ("resnet18_T8_64_tsm", Arch::Resnet18),
        ("mobilenetv2_T8_64_tsm", Arch::Mobilenetv2),
    ] {
        let net = Network::new(&model(arch, 1.0, false), Device::Cpu, 0).unwrap();
        let mut got: Vec<_> = groups::split(Groups::Tsm, net.params().iter().map(|p| p.role))
            .into_iter()
            .map(|(g, members)| {
                let decay = g.decay.resolve(1.0);
                (g.name.to_string(), g.lr_mult, decay, members.len() as u64)
            })
            .collect();
        let mut want: Vec<_> = golden[case]["policies"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| {
                let number = |key: &str| p[key].as_f64().unwrap();
                let name = p["name"].as_str().unwrap().to_string();
                let n = p["n"].as_u64().unwrap();
                (name, number("lr_mult"), number("decay_mult"), n)
            })
            .filter(|(.., n)| *n > 0)
            .collect();
        got.sort_by(|a, b| a.0.cmp(&b.0));
        want.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(got, want, "{case}");
    }
}

struct Worker {
    net: Network,
    ddp: Ddp,
    sgd: Sgd,
    precision: Precision,
    peers: Arc<Peers>,
}

impl Worker {
    fn new(peers: Arc<Peers>, mode: PrecisionMode, partial_bn: bool) -> Worker {
        let config = model(Arch::Resnet18, 0.25, partial_bn);
        // Another seed on every rank: only the broadcast can make them equal.
        let seed = u64::from(peers.rank());
        let net = Network::new(&config, Device::Cpu, seed).unwrap();
        let precision = precision(mode);
        net.to_channels_last();
        if let Some(kind) = precision.weight_kind() {
            net.cast_half_except_bn(kind);
        }
        let all = net.params().iter().map(|p| (p.name.as_str(), &p.tensor));
        peers.verify_same_shapes(all, Device::Cpu).unwrap();
        let params = net.params().iter().map(|p| &p.tensor);
        let state: Vec<Tensor> = params
            .chain(net.buffers().iter().map(|b| &b.tensor))
            .map(Tensor::shallow_clone)
            .collect();
        peers
            .broadcast(&state, 0, "broadcast of the network")
            .unwrap();
        let infos = ParamInfo::of(&net);
        let ddp = Ddp::new(&infos, peers.clone(), 1).unwrap();
        let kept: Vec<Tensor> = net.buffers().iter().map(|b| b.tensor.copy()).collect();
        ddp.record_order(|| {
            let loss = precision.forward(|| net.forward(&clips(0).0, true));
            Ok(backward(&loss.to_kind(Kind::Float).sum(Kind::Float))?)
        })
        .unwrap();
        for (buffer, kept) in net.buffers().iter().zip(&kept) {
            buffer.tensor.shallow_clone().copy_(kept);
        }
        let sgd = Sgd::new(&infos, &ddp.buckets(), &optim()).unwrap();
        Worker {
            net,
            ddp,
            sgd,
            precision,
            peers,
        }
    }

    fn step(&mut self) -> f64 {
        let (frames, labels) = clips(i64::from(self.peers.rank()));
        self.ddp.zero().unwrap();
        self.ddp.begin(true);
        let logits = self.precision.forward(|| self.net.forward(&frames, true));
        let loss = logits
            .to_kind(Kind::Float)
            .cross_entropy_for_logits(&labels);
        backward(&self.precision.scale_loss(&loss)).unwrap();
        self.ddp.finish().unwrap();
        self.sgd.step(0.01, &mut self.precision).unwrap();
        f64::try_from(loss).unwrap()
    }

    fn sync(&self) {
        let buffers = self.net.buffers().iter().map(|b| &b.tensor);
        self.peers.sync_buffers(buffers, BnBuffers::Mean).unwrap();
    }

    fn snapshot(&self) -> Snapshot {
        let mut s = Snapshot::new(Meta {
            format: FORMAT,
            run_id: "test".into(),
            epoch: 0,
            step: 5,
            step_in_epoch: 5,
            clips_in_epoch: Some(20),
            num_clips: Some(96),
            samples_seen: 20,
            global_batch: 4,
            world_size: 2,
            seed: 0,
            loss_scale: self.precision.scale().map(|l| l.export().unwrap()),
            best_top1: None,
            best_epoch: 0,
            class_names: Vec::new(),
            model: model(Arch::Resnet18, 0.25, false),
            torch: tsm_torch_ext::ops::libtorch_version(),
        });
        let params = self.net.params().iter();
        s.put(section::MODEL, params.map(|p| (p.name.as_str(), &p.tensor)));
        let buffers = self.net.buffers().iter();
        s.put(
            section::BUFFER,
            buffers.map(|b| (b.name.as_str(), &b.tensor)),
        );
        s.put(section::MOMENTUM, self.sgd.momenta());
        s.put(section::MASTER, self.sgd.masters());
        s
    }

    fn resume(&mut self, s: &Snapshot) {
        let params = self.net.params().iter();
        s.restore(section::MODEL, params.map(|p| (p.name.as_str(), &p.tensor)))
            .unwrap();
        let buffers = self.net.buffers().iter();
        s.restore(
            section::BUFFER,
            buffers.map(|b| (b.name.as_str(), &b.tensor)),
        )
        .unwrap();
        self.sgd
            .import(&s.section(section::MOMENTUM), &s.section(section::MASTER))
            .unwrap();
        if let (Some(scale), Some(state)) = (self.precision.scale_mut(), s.meta.loss_scale) {
            scale.import(state).unwrap();
        }
    }
}

/// Two clips of two 32 x 32 frames.
fn clips(i: i64) -> (Tensor, Tensor) {
    let frames = tsm_torch_ext::ops::to_channels_last(&formula(&[4, 3, 32, 32], i as f64)).unwrap();
    (frames, Tensor::from_slice(&[i % 10, (i + 5) % 10]))
}

fn bits(s: &Snapshot) -> Vec<(String, Vec<u8>)> {
    s.tensors
        .iter()
        .map(|(name, t)| {
            let t = t.contiguous();
            let mut bytes = vec![0; t.numel() * t.kind().elt_size_in_bytes()];
            t.copy_data_u8(&mut bytes, t.numel());
            (name.clone(), bytes)
        })
        .collect()
}

fn learns_and_resumes(mode: PrecisionMode, partial_bn: bool) {
    let dir = tempfile::tempdir().unwrap();
    let outcome = world(2, common::TIMEOUT, |peers| {
        let mut whole = Worker::new(peers.clone(), mode, partial_bn);
        let mut losses: Vec<f64> = (0..5).map(|_| whole.step()).collect();
        whole.sync();
        if peers.rank() == 0 {
            let c = Checkpoints::open(dir.path(), 3).unwrap();
            c.save(&whole.snapshot(), true).unwrap();
        }
        peers
            .barrier(common::TIMEOUT, "barrier after the checkpoint")
            .unwrap();
        let mut second = Worker::new(peers.clone(), mode, partial_bn);
        second.resume(&find(dir.path()).unwrap().snapshot);
        for _ in 5..10 {
            losses.push(whole.step());
            second.step();
        }
        whole.sync();
        second.sync();
        peers.leave();
        (losses, bits(&whole.snapshot()), bits(&second.snapshot()))
    });
    for (losses, whole, second) in &outcome {
        eprintln!("{mode:?}: loss {:.4} -> {:.4}", losses[0], losses[9]);
        assert!(losses[9] < 0.7 * losses[0], "{mode:?}: {losses:?}");
        assert!(whole == second, "{mode:?}: the resumed run differs");
        assert!(*whole == outcome[0].1, "{mode:?}: the ranks differ");
    }
}

#[test]
fn float32_learns_and_resumes_bit_for_bit() {
    learns_and_resumes(PrecisionMode::Fp32, false);
}

#[test]
fn partial_batch_norm_learns_and_resumes_bit_for_bit() {
    learns_and_resumes(PrecisionMode::Fp32, true);
}

#[test]
fn bfloat16_autocast_learns_and_resumes_bit_for_bit() {
    learns_and_resumes(PrecisionMode::Bf16, false);
}

#[test]
fn float16_autocast_learns_and_resumes_bit_for_bit() {
    learns_and_resumes(PrecisionMode::Fp16, false);
}

#[test]
fn o2_learns_and_resumes_bit_for_bit() {
    learns_and_resumes(PrecisionMode::O2, false);
}
