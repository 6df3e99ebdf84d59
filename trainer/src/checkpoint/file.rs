//! The two files of a checkpoint: written so that a crash or a full disk leaves the old ones
//! whole, read only when size and digest are right.

use super::{FORMAT, Meta, Snapshot};
use anyhow::{Context, Result};
use safetensors::{Dtype, SafeTensors, tensor::Metadata, tensor::TensorInfo};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};
use tsm_job::exit::{self, Coded};

/// The JSON file that makes a tensor file a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    /// Name of the tensor file, in the same folder.
    pub file: String,
    pub bytes: u64,
    /// Of the whole tensor file, in hexadecimal.
    pub sha256: String,
    pub meta: Meta,
}

/// Prefix of files that are not finished.
pub(super) const TEMPORARY: &str = ".tmp-";

/// Where a file of this name is written before it is renamed.
pub(super) fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{TEMPORARY}{name}"))
}

/// The manifest's path of a tensor file, and the other way round.
pub(super) fn manifest_of(tensors: &Path) -> PathBuf {
    tensors.with_extension("json")
}

/// Writes the tensor file, then its manifest; each appears whole under its name or not at all.
pub(super) fn write(tensors: &Path, snapshot: &Snapshot) -> Result<Manifest> {
    let temporary = temporary(tensors);
    let written = write_tensors(&temporary, tensors, &snapshot.tensors);
    let (bytes, sha256) = match written {
        Ok(done) => done,
        Err(e) => {
            // Half a file must not take the space that the next attempt needs.
            let _ = fs_err::remove_file(&temporary);
            return Err(e);
        }
    };
    let manifest = Manifest {
        file: file_name(tensors),
        bytes,
        sha256,
        meta: snapshot.meta.clone(),
    };
    publish(&temporary, tensors, bytes)?;
    if let Err(e) = write_manifest(&manifest_of(tensors), &manifest) {
        let _ = fs_err::remove_file(tensors);
        return Err(e);
    }
    Ok(manifest)
}

/// Writes a manifest atomically.
pub(super) fn write_manifest(path: &Path, manifest: &Manifest) -> Result<()> {
    let text = serde_json::to_vec_pretty(manifest).context("cannot write a manifest as JSON")?;
    let temporary = temporary(path);
    let needed = text.len() as u64;
    let write = || -> std::io::Result<()> {
        let mut file = fs_err::File::create(&temporary)?;
        file.write_all(&text)?;
        file.sync_all()
    };
    if let Err(e) = write() {
        let _ = fs_err::remove_file(&temporary);
        return Err(cannot_write(path, needed, &e));
    }
    publish(&temporary, path, needed)
}

/// Renames a finished file and makes the rename durable.
pub(super) fn publish(temporary: &Path, path: &Path, bytes: u64) -> Result<()> {
    let publish = || -> std::io::Result<()> {
        fs_err::rename(temporary, path)?;
        fs_err::File::open(folder_of(path))?.sync_all()
    };
    publish().map_err(|e| cannot_write(path, bytes, &e))
}

fn write_tensors(
    temporary: &Path,
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<(u64, String)> {
    // Widest elements first keeps every tensor aligned to its element.
    let mut order: Vec<(&String, &Tensor, Dtype)> = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        order.push((name, tensor, dtype_of(name, tensor.kind())?));
    }
    order.sort_by_key(|(name, _, dtype)| (std::cmp::Reverse(dtype.bitsize()), *name));

    let mut offset = 0;
    let mut infos = Vec::with_capacity(order.len());
    for (name, tensor, dtype) in &order {
        let bytes = tensor.numel() * dtype.bitsize() / 8;
        infos.push((
            (*name).clone(),
            TensorInfo {
                dtype: *dtype,
                shape: tensor.size().iter().map(|&d| d as usize).collect(),
                data_offsets: (offset, offset + bytes),
            },
        ));
        offset += bytes;
    }
    let header = Metadata::new(None, infos).context("cannot describe the tensors")?;
    let mut header = serde_json::to_vec(&header).context("cannot describe the tensors")?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let total = 8 + header.len() as u64 + offset as u64;
    if let Some(free) = free_bytes(folder_of(path))
        && free < total
    {
        return Err(no_space(path, total, Some(free), "no space left"));
    }

    let failed = |e: std::io::Error| cannot_write(path, total, &e);
    let mut file = fs_err::File::create(temporary).map_err(failed)?;
    let mut digest = Sha256::new();
    let mut emit = |bytes: &[u8]| {
        digest.update(bytes);
        file.write_all(bytes).map_err(failed)
    };
    emit(&(header.len() as u64).to_le_bytes())?;
    emit(&header)?;
    let mut buffer = Vec::new();
    for (name, tensor, dtype) in &order {
        let tensor = tensor.detach().f_to_device(Device::Cpu)?.f_contiguous()?;
        let numel = tensor.numel();
        buffer.resize(numel * dtype.bitsize() / 8, 0u8);
        tensor
            .f_copy_data_u8(&mut buffer, numel)
            .with_context(|| format!("cannot read {name} back from its device"))?;
        emit(&buffer)?;
    }
    file.sync_all().map_err(failed)?;
    Ok((total, hex(&digest.finalize())))
}

/// Reads and checks a manifest, without its tensors.
pub(super) fn read_manifest(path: &Path) -> Result<Manifest> {
    let text = fs_err::read_to_string(path)
        .map_err(|e| broken(path, &format!("its manifest cannot be read: {e}")))?;
    parse_manifest(path, &text)
}

/// As [`read_manifest`], from the file's text.
pub(super) fn parse_manifest(path: &Path, text: &str) -> Result<Manifest> {
    // Other formats may have other fields, so the version is looked at before the rest.
    let value: serde_json::Value = serde_json::from_str(text)
        .map_err(|e| broken(path, &format!("its manifest is not valid JSON: {e}")))?;
    let format = value.pointer("/meta/format").and_then(|f| f.as_u64());
    if format.is_some_and(|f| f != u64::from(FORMAT)) {
        return Err(broken(
            path,
            &format!(
                "it has format {}, this program reads format {FORMAT}",
                format.unwrap_or_default()
            ),
        ));
    }
    serde_json::from_value(value).map_err(|e| {
        broken(
            path,
            &format!("its manifest does not describe a checkpoint: {e}"),
        )
    })
}

/// Reads a checkpoint by its manifest and verifies size, digest and layout. Returns the digest too.
pub(super) fn read(manifest_path: &Path) -> Result<(Snapshot, String)> {
    let manifest = read_manifest(manifest_path)?;
    let path = folder_of(manifest_path).join(&manifest.file);
    let data = fs_err::read(&path).map_err(|e| broken(&path, &e.to_string()))?;
    let sha256 = manifest.sha256.clone();
    Ok((parse(manifest, &path, &data)?, sha256))
}

/// A checkpoint from the contents of its two files; `path` is that of the tensors.
pub(super) fn parse(manifest: Manifest, path: &Path, data: &[u8]) -> Result<Snapshot> {
    if data.len() as u64 != manifest.bytes {
        return Err(broken(
            path,
            &format!(
                "it has {} bytes, its manifest says {}",
                data.len(),
                manifest.bytes
            ),
        ));
    }
    let digest = hex(&Sha256::digest(data));
    if digest != manifest.sha256 {
        return Err(broken(
            path,
            &format!(
                "its SHA-256 is {digest}, its manifest says {}",
                manifest.sha256
            ),
        ));
    }
    let file = SafeTensors::deserialize(data).map_err(|e| broken(path, &e.to_string()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let Some(kind) = kind_of(view.dtype()) else {
            return Err(broken(
                path,
                &format!("{name} has element type {:?}", view.dtype()),
            ));
        };
        let size: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
        tensors.insert(
            name.to_string(),
            Tensor::f_from_data_size(view.data(), &size, kind)?,
        );
    }
    Ok(Snapshot {
        tensors,
        meta: manifest.meta,
    })
}

const KINDS: [(Kind, Dtype); 9] = [
    (Kind::Float, Dtype::F32),
    (Kind::Half, Dtype::F16),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Double, Dtype::F64),
    (Kind::Int64, Dtype::I64),
    (Kind::Int, Dtype::I32),
    (Kind::Int16, Dtype::I16),
    (Kind::Uint8, Dtype::U8),
    (Kind::Bool, Dtype::BOOL),
];

fn dtype_of(name: &str, kind: Kind) -> Result<Dtype> {
    KINDS
        .iter()
        .find(|(k, _)| *k == kind)
        .map(|(_, d)| *d)
        .with_context(|| {
            format!("cannot save {name}: element type {kind:?} has no safetensors name")
        })
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    KINDS.iter().find(|(_, d)| *d == dtype).map(|(k, _)| *k)
}

/// A checkpoint that cannot be used (exit code DATA).
pub(super) fn broken(path: &Path, why: &str) -> anyhow::Error {
    Coded::new(
        exit::DATA,
        format!("checkpoint {} is not usable: {why}", path.display()),
    )
    .into()
}

/// A failed write, with what it needed and what there was (exit code CANNOT_WRITE).
pub(super) fn cannot_write(path: &Path, needed: u64, error: &std::io::Error) -> anyhow::Error {
    no_space(
        path,
        needed,
        free_bytes(folder_of(path)),
        &error.to_string(),
    )
}

fn no_space(path: &Path, needed: u64, free: Option<u64>, why: &str) -> anyhow::Error {
    let free = free.map_or("an unknown number of".into(), |f| f.to_string());
    Coded::new(
        exit::CANNOT_WRITE,
        format!(
            "cannot write checkpoint {}: {why}: {needed} bytes needed, {free} bytes free on its file system\n  hint: free some space or lower train.keep_last; the earlier checkpoints are untouched",
            path.display()
        ),
    )
    .into()
}

fn free_bytes(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

pub(super) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

pub(super) fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
