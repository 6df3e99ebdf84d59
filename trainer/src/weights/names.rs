//! How torchvision and the original TSM code name the same tensor.
//!
//! Ours are torchvision's. The original code numbers the modules of a MobileNetV2 block in one
//! list, wraps a shifted layer in `.net`, and calls the classifier `new_fc`, or with dropout 0
//! keeps the backbone's `fc` or `classifier`.

/// A convention for naming the tensors of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    Torchvision,
    Original,
}

impl Layout {
    pub(super) const ALL: [Layout; 2] = [Layout::Torchvision, Layout::Original];

    /// The [`canonical`] keys under which our `name` may stand, the likeliest first.
    pub(super) fn keys(self, name: &str) -> Vec<String> {
        let key = match self {
            Layout::Torchvision => name.to_string(),
            Layout::Original => original_name(name, false),
        };
        let classifier = ["fc.", "classifier.1."]
            .iter()
            .find_map(|head| name.strip_prefix(head));
        let renamed = classifier.map(|tensor| format!("new_fc.{tensor}"));
        [Some(key), renamed].into_iter().flatten().collect()
    }
}

/// `key` without the prefixes of wrappers: DataParallel's `module.`, the original code's
/// `base_model.` and the `.net` of a shifted layer or pooled stage.
pub(super) fn canonical(key: &str) -> String {
    let key = key.strip_prefix("module.").unwrap_or(key);
    let key = key.strip_prefix("base_model.").unwrap_or(key);
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
            ("conv1.weight", "conv1.weight"),
        ] {
            assert_eq!(canonical(key), bare);
        }
    }
}
