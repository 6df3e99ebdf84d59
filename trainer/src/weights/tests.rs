use super::*;
use crate::model::testing::config;
use safetensors::tensor::{Dtype, TensorView};
use std::path::PathBuf;
use tch::{Device, Kind};
use tsm_job::config::{Arch, ShiftMode};

fn network(arch: Arch, num_classes: u32, seed: u64) -> Network {
    let cfg = tsm_job::config::Model {
        width: 0.25,
        num_classes,
        ..config(arch, ShiftMode::Bi)
    };
    Network::new(&cfg, Device::Cpu, seed).unwrap()
}

fn tensors(net: &Network) -> Vec<(String, &Tensor)> {
    let params = net.params().iter().map(|p| (p.name.clone(), &p.tensor));
    params
        .chain(net.buffers().iter().map(|b| (b.name.clone(), &b.tensor)))
        .collect()
}

/// Writes `net` with its names changed by `rename`; a name that becomes empty is left out.
fn save(net: &Network, rename: impl Fn(&str) -> String) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.safetensors");
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = tensors(net)
        .into_iter()
        .map(|(name, t)| {
            let values = Vec::<f32>::try_from(t.detach().reshape([-1])).unwrap();
            let size = t.size().iter().map(|&d| d as usize).collect();
            (
                rename(&name),
                size,
                values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            )
        })
        .filter(|(name, _, _)| !name.is_empty())
        .collect();
    let views = data.iter().map(|(name, size, bytes)| {
        (
            name,
            TensorView::new(Dtype::F32, size.clone(), bytes).unwrap(),
        )
    });
    safetensors::serialize_to_file(views, None, &path).unwrap();
    (dir, path)
}

fn assert_equal_weights(a: &Network, b: &Network, but_classifier: bool) {
    for ((name, x), (_, y)) in tensors(a).into_iter().zip(tensors(b)) {
        if !(but_classifier && (name.starts_with("fc.") || name.starts_with("classifier."))) {
            assert!(x.equal(y), "{name} differs");
        }
    }
}

#[test]
fn names_of_every_code_base_load_whole() {
    for arch in [Arch::Resnet50, Arch::Mobilenetv2] {
        let source = network(arch, 5, 1);
        let shifted = source.summary(64).shifted;
        let is_shifted = |n: &str| {
            shifted
                .iter()
                .any(|l| n.strip_suffix(".weight") == Some(&l.name))
        };
        let original = |n: &str| match n.strip_prefix("fc.").or(n.strip_prefix("classifier.1.")) {
            Some(tensor) => format!("module.new_fc.{tensor}"),
            None => format!("module.base_model.{}", original_name(n, is_shifted(n))),
        };
        let mmaction = |n: &str| match &Layout::MmAction.keys(n)[0] {
            head if head.starts_with("cls_head.") => head.clone(),
            key => format!("backbone.{key}"),
        };
        let renames: [&dyn Fn(&str) -> String; 3] = [&str::to_string, &original, &mmaction];
        for rename in renames {
            let (_dir, path) = save(&source, rename);
            let target = network(arch, 5, 2);
            let report = load_pretrained(&target, &path, 1.0).unwrap();
            assert_eq!(report.loaded, tensors(&source).len());
            assert_eq!((report.skipped.len(), report.missing.len()), (0, 0));
            assert_equal_weights(&source, &target, false);
        }
    }
}

#[test]
fn the_classifier_stays_when_the_number_of_classes_differs() {
    let source = network(Arch::Resnet18, 400, 1);
    let target = network(Arch::Resnet18, 5, 2);
    let (_dir, path) = save(&source, str::to_string);
    let report = load_pretrained(&target, &path, 1.0).unwrap();
    assert_equal_weights(&source, &target, true);
    assert_eq!(report.missing, ["fc.weight", "fc.bias"]);
    let (name, why) = &report.skipped[0];
    assert!(
        name.starts_with("fc.") && why.contains("400") && why.contains('5'),
        "{name}: {why}"
    );
}

#[test]
fn foreign_names_are_refused_and_change_nothing() {
    let source = network(Arch::Resnet18, 5, 1);
    let target = network(Arch::Resnet18, 5, 2);
    let (_dir, path) = save(&source, |name| format!("encoder.{name}"));
    let error = load_pretrained(&target, &path, 0.9).unwrap_err();
    assert_eq!(exit::code_of(&error), exit::CONFIG);
    let text = error.to_string();
    for part in [
        "0 of 100 backbone tensors",
        "conv1.weight",
        "encoder.",
        "90.0 %",
    ] {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
    assert_equal_weights(&network(Arch::Resnet18, 5, 2), &target, false);
    assert!(
        load_pretrained(&target, &path, 0.0).is_err(),
        "a file that fills nothing is never right"
    );
}

#[test]
fn coverage_counts_the_backbone_only() {
    let source = network(Arch::Resnet18, 5, 1);
    let (_dir, path) = save(&source, |n| {
        if n.starts_with("layer4.") {
            String::new()
        } else {
            n.into()
        }
    });
    // layer4 of ResNet-18 has 5 convolutions and 5 BatchNorms: 25 of the backbone's 100 tensors.
    let report = load_pretrained(&network(Arch::Resnet18, 5, 2), &path, 0.75).unwrap();
    assert_eq!(report.backbone, (75, 100));
    assert!(load_pretrained(&network(Arch::Resnet18, 5, 2), &path, 0.76).is_err());
}

#[test]
fn other_and_broken_files_are_named() {
    let net = network(Arch::Resnet18, 5, 1);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("broken.safetensors");
    fs_err::write(&path, b"not a header").unwrap();
    for path in [
        path,
        dir.path().join("absent.safetensors"),
        dir.path().join("model.pdparams"),
    ] {
        let error = load_pretrained(&net, &path, 0.9).unwrap_err();
        assert_eq!(exit::code_of(&error), exit::DATA);
        assert!(
            error.to_string().contains(path.to_str().unwrap()),
            "{error}"
        );
    }
}

/// A file of test material that is not part of the repository; `None`, with a note, when absent.
fn shared(path: &str) -> Option<PathBuf> {
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared");
    let path = std::env::var_os("TSM_SHARED")
        .map_or_else(|| PathBuf::from(beside), PathBuf::from)
        .join(path);
    if !path.exists() {
        eprintln!("skipped: {} is missing", path.display());
        return None;
    }
    Some(path)
}

#[test]
fn imagenet_mobilenet_loads_whole() {
    let Some(path) = shared("weights/mobilenetv2_imagenet_features.safetensors") else {
        return;
    };
    let net = Network::new(&config(Arch::Mobilenetv2, ShiftMode::Bi), Device::Cpu, 0).unwrap();
    let report = load_pretrained(&net, &path, 1.0).unwrap();
    assert_eq!(report.backbone, (260, 260));
    assert_eq!(report.skipped, []);
    assert_eq!(report.missing, ["classifier.1.weight", "classifier.1.bias"]);

    let ramp = Tensor::arange(8 * 3 * 64 * 64, (Kind::Float, Device::Cpu)).view([8, 3, 64, 64]);
    let mut seen = None;
    let _ = tch::no_grad(|| {
        net.forward_visiting(&(ramp * 0.01).sin(), false, &mut |_, x| {
            seen = Some(x.copy())
        })
    });
    let features = seen.unwrap();
    assert!(bool::try_from(features.isfinite().all()).unwrap());
    assert!(f64::try_from(features.std(true)).unwrap() > 0.01);
}

#[test]
fn a_file_of_torch_save_equals_its_safetensors() {
    let names = ["pt", "safetensors"]
        .map(|e| shared(&format!("weights/mobilenetv2_imagenet_features.{e}")));
    let [Some(pickled), Some(plain)] = names else {
        return;
    };
    let pickled = read::read(&pickled).unwrap();
    let plain: HashMap<String, Tensor> = read::read(&plain).unwrap().into_iter().collect();
    assert_eq!((pickled.len(), plain.len()), (312, 312));
    for (name, tensor) in &pickled {
        let other = &plain[name];
        assert_eq!(
            (tensor.size(), tensor.kind()),
            (other.size(), other.kind()),
            "{name}"
        );
        assert!(tensor.equal(other), "{name}");
    }
}
