//! How torchvision, the original TSM code and MMAction2 name the same tensor.
//!
//! Ours are torchvision's. The original code numbers the modules of a MobileNetV2 block in one
//! list, wraps a shifted layer in `.net`, and calls the classifier `new_fc`, or with dropout 0
//! keeps the backbone's `fc` or `classifier`. MMAction2 puts a convolution and its BatchNorm into
//! one module, and numbers MobileNetV2's blocks by stage.

/// A convention for naming the tensors of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    Torchvision,
    Original,
    MmAction,
}

impl Layout {
    pub(super) const ALL: [Layout; 3] = [Layout::Torchvision, Layout::Original, Layout::MmAction];

    /// The [`canonical`] keys under which our `name` may stand, the likeliest first.
    pub(super) fn keys(self, name: &str) -> Vec<String> {
        let key = match self {
            Layout::Torchvision => name.to_string(),
            Layout::Original => original_name(name, false),
            Layout::MmAction => mmaction_name(name),
        };
        let classifier = ["fc.", "classifier.1."]
            .iter()
            .find_map(|head| name.strip_prefix(head));
        let renamed = classifier.map(|tensor| format!("new_fc.{tensor}"));
        [Some(key), renamed].into_iter().flatten().collect()
    }
}

/// `key` without the prefixes of wrappers: DataParallel's `module.`, the original code's
/// `base_model.`, MMAction2's `backbone.`, and the `.net` of a shifted layer or pooled stage.
pub(super) fn canonical(key: &str) -> String {
    let key = key.strip_prefix("module.").unwrap_or(key);
    let key = ["base_model.", "backbone."]
        .iter()
        .find_map(|p| key.strip_prefix(p))
        .unwrap_or(key);
    key.replace(".net.", ".")
}

/// BatchNorm's count of batches, which matters only to a BatchNorm without momentum.
pub(super) fn is_counter(key: &str) -> bool {
    key.ends_with(".num_batches_tracked")
}

/// The original code's key of our `name`, without its `base_model.` prefix. `shifted`: the layer
/// carries the shift, so its key has `.net`.
pub fn original_name(name: &str, shifted: bool) -> String {
    let key = to_flat_blocks(name).unwrap_or_else(|| name.replace("classifier.1.", "classifier."));
    match key.strip_suffix(".weight") {
        Some(layer) if shifted => format!("{layer}.net.weight"),
        _ => key,
    }
}

/// `features.2.conv.1.0.weight` to `features.2.conv.3.weight`; `None` for any other name.
fn to_flat_blocks(name: &str) -> Option<String> {
    let rest = name.strip_prefix("features.")?;
    let (block, rest) = rest.split_once(".conv.")?;
    let (position, tensor) = rest.rsplit_once('.')?;
    // A block without expansion starts at its depthwise convolution.
    let expands = block != "1";
    let flat = match (position, expands) {
        ("0.0", _) => 0,
        ("0.1", _) => 1,
        ("1.0", true) => 3,
        ("1.1", true) => 4,
        ("2", true) => 6,
        ("3", true) => 7,
        ("1", false) => 3,
        ("2", false) => 4,
        _ => return None,
    };
    Some(format!("features.{block}.conv.{flat}.{tensor}"))
}

/// MMAction2's key of our `name` (0.x and 1.x), without `backbone.` and a shifted layer's `.net`.
fn mmaction_name(name: &str) -> String {
    let Some((layer, tensor)) = name.rsplit_once('.') else {
        return name.to_string();
    };
    let layer = match layer {
        "fc" | "classifier.1" => "cls_head.fc_cls".to_string(),
        "features.0.0" => "conv1.conv".to_string(),
        "features.0.1" => "conv1.bn".to_string(),
        "features.18.0" => "conv2.conv".to_string(),
        "features.18.1" => "conv2.bn".to_string(),
        _ => mmaction_block(layer).unwrap_or_else(|| mmaction_resnet(layer)),
    };
    format!("{layer}.{tensor}")
}

/// `layer1.0.conv2` to `layer1.0.conv2.conv`, `layer1.0.bn2` to `layer1.0.conv2.bn`.
fn mmaction_resnet(layer: &str) -> String {
    let (block, module) = layer.rsplit_once('.').map_or(("", layer), |_| {
        let start = layer
            .find(".downsample")
            .or_else(|| layer.rfind('.'))
            .unwrap_or(0);
        (&layer[..=start], &layer[start + 1..])
    });
    let module = match module {
        "downsample.0" => "downsample.conv".to_string(),
        "downsample.1" => "downsample.bn".to_string(),
        _ => match module.strip_prefix("bn") {
            Some(number) => format!("conv{number}.bn"),
            None => format!("{module}.conv"),
        },
    };
    format!("{block}{module}")
}

/// `features.5.conv.1.0` to `layer3.1.conv.1.conv`; `None` for a layer of a ResNet.
fn mmaction_block(layer: &str) -> Option<String> {
    // Blocks of the seven stages.
    const REPEATS: [usize; 7] = [1, 2, 3, 4, 3, 3, 1];
    let (block, position) = layer.strip_prefix("features.")?.split_once(".conv.")?;
    let mut index = block.parse::<usize>().ok()?.checked_sub(1)?;
    let mut stage = 0;
    while index >= *REPEATS.get(stage)? {
        index -= REPEATS[stage];
        stage += 1;
    }
    let project = if block == "1" { 1 } else { 2 };
    let module = match position.split_once('.') {
        Some((number, "0")) => format!("{number}.conv"),
        Some((number, _)) => format!("{number}.bn"),
        None if position == project.to_string() => format!("{project}.conv"),
        None => format!("{project}.bn"),
    };
    Some(format!("layer{}.{index}.conv.{module}", stage + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn original_names_of_mobilenet_blocks() {
        for (ours, theirs) in [
            ("features.0.0.weight", "features.0.0.weight"),
            ("features.1.conv.0.0.weight", "features.1.conv.0.weight"),
            (
                "features.1.conv.0.1.running_var",
                "features.1.conv.1.running_var",
            ),
            ("features.1.conv.1.weight", "features.1.conv.3.weight"),
            ("features.1.conv.2.bias", "features.1.conv.4.bias"),
            ("features.2.conv.0.0.weight", "features.2.conv.0.weight"),
            ("features.2.conv.1.1.bias", "features.2.conv.4.bias"),
            ("features.17.conv.2.weight", "features.17.conv.6.weight"),
            (
                "features.17.conv.3.running_mean",
                "features.17.conv.7.running_mean",
            ),
            ("classifier.1.weight", "classifier.weight"),
            ("layer1.0.downsample.1.bias", "layer1.0.downsample.1.bias"),
        ] {
            assert_eq!(original_name(ours, false), theirs);
        }
        assert_eq!(
            original_name("features.3.conv.0.0.weight", true),
            "features.3.conv.0.net.weight"
        );
    }

    #[test]
    fn names_of_mmaction() {
        for (ours, theirs) in [
            ("conv1.weight", "conv1.conv.weight"),
            ("bn1.running_mean", "conv1.bn.running_mean"),
            ("layer1.0.conv1.weight", "layer1.0.conv1.conv.weight"),
            ("layer3.22.bn3.bias", "layer3.22.conv3.bn.bias"),
            (
                "layer2.0.downsample.0.weight",
                "layer2.0.downsample.conv.weight",
            ),
            (
                "layer2.0.downsample.1.running_var",
                "layer2.0.downsample.bn.running_var",
            ),
            ("fc.bias", "cls_head.fc_cls.bias"),
            ("features.0.1.weight", "conv1.bn.weight"),
            ("features.1.conv.0.0.weight", "layer1.0.conv.0.conv.weight"),
            ("features.1.conv.1.weight", "layer1.0.conv.1.conv.weight"),
            ("features.1.conv.2.bias", "layer1.0.conv.1.bn.bias"),
            ("features.3.conv.0.0.weight", "layer2.1.conv.0.conv.weight"),
            ("features.7.conv.1.1.bias", "layer4.0.conv.1.bn.bias"),
            ("features.13.conv.2.weight", "layer5.2.conv.2.conv.weight"),
            ("features.17.conv.3.weight", "layer7.0.conv.2.bn.weight"),
            ("features.18.0.weight", "conv2.conv.weight"),
            ("classifier.1.weight", "cls_head.fc_cls.weight"),
        ] {
            assert_eq!(mmaction_name(ours), theirs);
        }
    }

    #[test]
    fn wrappers_leave_no_trace() {
        for (key, bare) in [
            (
                "module.base_model.layer1.0.conv1.net.weight",
                "layer1.0.conv1.weight",
            ),
            (
                "module.base_model.layer2.net.0.bn1.bias",
                "layer2.0.bn1.bias",
            ),
            ("layer1.0.net.conv1.weight", "layer1.0.conv1.weight"),
            ("module.new_fc.weight", "new_fc.weight"),
            (
                "backbone.layer1.0.conv1.conv.net.weight",
                "layer1.0.conv1.conv.weight",
            ),
            (
                "backbone.layer2.1.conv.0.net.conv.weight",
                "layer2.1.conv.0.conv.weight",
            ),
            ("conv1.weight", "conv1.weight"),
        ] {
            assert_eq!(canonical(key), bare);
        }
    }
}
