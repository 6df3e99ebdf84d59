//! Reading the files in which others keep weights.

use super::torch_file;
use anyhow::{Context, Result, bail};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;
use tch::{Kind, Tensor};

/// Every tensor of `path` with its name, on the CPU, in the file's kind.
pub(super) fn read(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let extension = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default();
    match extension {
        "safetensors" => safetensors(path),
        "pth" | "pt" | "tar" | "bin" | "ckpt" => {
            let bytes = fs_err::read(path)?;
            torch_file::tensors(&bytes).with_context(|| {
                format!(
                    "{} ({} bytes) as a file of torch.save",
                    path.display(),
                    bytes.len()
                )
            })
        }
        _ => bail!(
            "{} has the extension `{extension}`; weights are read from .safetensors and from torch.save's .pth, .pt, \
             .tar, .bin and .ckpt; convert other files to one of these",
            path.display()
        ),
    }
}

fn safetensors(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let bytes = fs_err::read(path)?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| {
        format!(
            "{} ({} bytes) is no whole safetensors file",
            path.display(),
            bytes.len()
        )
    })?;
    file.iter()
        .map(|(name, view)| {
            let kind = match view.dtype() {
                Dtype::F32 => Kind::Float,
                Dtype::F64 => Kind::Double,
                Dtype::F16 => Kind::Half,
                Dtype::BF16 => Kind::BFloat16,
                Dtype::I64 => Kind::Int64,
                Dtype::I32 => Kind::Int,
                other => bail!(
                    "{name} in {} is {other:?}, weights are floating point",
                    path.display()
                ),
            };
            let size: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
            let tensor = Tensor::f_from_data_size(view.data(), &size, kind)
                .with_context(|| format!("{name} in {}", path.display()))?;
            Ok((name.to_string(), tensor))
        })
        .collect()
}
