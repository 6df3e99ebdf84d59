//! How torchvision and the original TSM code name the same tensor.
//!
//! Ours are torchvision's. The original code numbers the modules of a MobileNetV2 block in one
//! list, wraps a shifted layer in `.net`, and calls the classifier `new_fc`, or with dropout 0
//! keeps the backbone's `fc` or `classifier`.

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
