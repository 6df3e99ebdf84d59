//! Which NVIDIA GPUs there are, found without linking anything of NVIDIA's.
//!
//! The driver's management library is loaded at run time; where it is missing, the kernel
//! module's `/proc/driver/nvidia/gpus` is read. `CUDA_VISIBLE_DEVICES` then selects, as CUDA does.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use serde::{Deserialize, Serialize};

/// Where the kernel module lists its GPUs.
pub const PROC: &str = "/proc/driver/nvidia/gpus";

/// A GPU that the workers may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// What goes into a worker's `CUDA_VISIBLE_DEVICES`: an index or a UUID.
    pub id: String,
    pub name: String,
    pub uuid: String,
}

/// The visible GPUs, in the order in which `LOCAL_RANK` counts them.
pub fn visible() -> Vec<Gpu> {
    let all = list().unwrap_or_else(|| from_proc(PROC));
    select(&all, std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref())
}

/// Applies `CUDA_VISIBLE_DEVICES`: indices, or the beginnings of UUIDs; the list ends at the
/// first entry that names no GPU (CUDA C++ Programming Guide, environment variables).
fn select(all: &[(String, String)], visible: Option<&str>) -> Vec<Gpu> {
    let gpu = |id: String, (name, uuid): &(String, String)| Gpu {
        id,
        name: name.clone(),
        uuid: uuid.clone(),
    };
    let Some(list) = visible else {
        return all
            .iter()
            .enumerate()
            .map(|(i, found)| gpu(i.to_string(), found))
            .collect();
    };
    list.split(',')
        .map(str::trim)
        .map_while(|entry| {
            if let Ok(index) = entry.parse::<usize>() {
                return all.get(index).map(|found| gpu(index.to_string(), found));
            }
            // The management library counts whole GPUs; a slice of one is known to CUDA by its own name.
            if entry.starts_with("MIG-") {
                return Some(Gpu {
                    id: entry.into(),
                    name: "MIG device".into(),
                    uuid: entry.into(),
                });
            }
            let found = all
                .iter()
                .find(|(_, uuid)| entry.starts_with("GPU-") && uuid.starts_with(entry))?;
            Some(gpu(entry.into(), found))
        })
        .collect()
}

/// Name and UUID of every GPU below `root`, in the order of their bus addresses.
pub fn from_proc(root: &str) -> Vec<(String, String)> {
    let Ok(entries) = fs_err::read_dir(root) else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries
        .flatten()
        .map(|e| e.path().join("information"))
        .collect();
    paths.sort();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|l| l.split_once(':'))
            .map_or("unknown", |(_, v)| v.trim())
            .to_string()
    };
    let read = |path| fs_err::read_to_string(path).ok();
    paths
        .into_iter()
        .filter_map(read)
        .map(|text| (field(&text, "Model"), field(&text, "GPU UUID")))
        .collect()
}

/// Opens the driver's management library.
///
/// # Errors
/// Without a working driver.
pub fn nvml() -> Result<Nvml, NvmlError> {
    // The name without a version, the crate's default, comes only with development packages.
    Nvml::builder()
        .lib_path("libnvidia-ml.so.1".as_ref())
        .init()
}

/// Name and UUID of every GPU of this machine; `None` without a working driver.
fn list() -> Option<Vec<(String, String)>> {
    let nvml = nvml().ok()?;
    let unknown = |text: Result<String, NvmlError>| text.unwrap_or_else(|_| "unknown".into());
    let gpus = (0..nvml.device_count().ok()?)
        // A GPU that fell off the bus is not one that a worker can use.
        .filter_map(|index| nvml.device_by_index(index).ok())
        .map(|device| (unknown(device.name()), unknown(device.uuid())));
    Some(gpus.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Vec<(String, String)> {
        (0..4)
            .map(|i| (format!("H200 #{i}"), format!("GPU-{i}{i}{i}-abc")))
            .collect()
    }

    fn ids(visible: Option<&str>) -> Vec<String> {
        select(&machine(), visible)
            .into_iter()
            .map(|g| g.id)
            .collect()
    }

    #[test]
    fn cuda_visible_devices_selects_and_orders() {
        assert_eq!(ids(None), ["0", "1", "2", "3"]);
        assert_eq!(ids(Some("2,0")), ["2", "0"]);
        assert_eq!(select(&machine(), Some("2,0"))[0].name, "H200 #2");
        assert_eq!(ids(Some("GPU-111,GPU-333-abc")), ["GPU-111", "GPU-333-abc"]);
        assert_eq!(ids(Some("MIG-a/b")), ["MIG-a/b"]);
    }

    #[test]
    fn the_list_ends_at_the_first_entry_that_names_no_gpu() {
        assert_eq!(ids(Some("1,9,0")), ["1"]);
        assert!(ids(Some("")).is_empty());
        assert!(ids(Some("-1")).is_empty());
    }

    #[test]
    fn proc_files_give_model_and_uuid() {
        let root = tempfile::tempdir().unwrap();
        for (bus, model) in [("0000:81:00.0", "B"), ("0000:01:00.0", "A")] {
            let dir = root.path().join(bus);
            fs_err::create_dir(&dir).unwrap();
            let text = format!("Model: \t\t {model}\nIRQ:   \t\t 42\nGPU UUID: \t GPU-{model}\n");
            fs_err::write(dir.join("information"), text).unwrap();
        }
        let found = from_proc(root.path().to_str().unwrap());
        assert_eq!(
            found,
            [
                ("A".into(), "GPU-A".into()),
                ("B".to_string(), "GPU-B".to_string())
            ]
        );
        assert!(from_proc("/nonexistent").is_empty());
    }
}
