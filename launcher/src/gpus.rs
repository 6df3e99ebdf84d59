//! Which NVIDIA GPUs there are, found without linking anything of NVIDIA's.
//!
//! The driver's management library is loaded at run time; where it is missing, the kernel
//! module's `/proc/driver/nvidia/gpus` is read. `CUDA_VISIBLE_DEVICES` then selects, as CUDA does.

use serde::{Deserialize, Serialize};

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
    let all = nvml::list().unwrap_or_else(|| from_proc("/proc/driver/nvidia/gpus"));
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
fn from_proc(root: &str) -> Vec<(String, String)> {
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

mod nvml {
    //! The five functions of libnvidia-ml.so.1 that are needed, from its public header nvml.h.

    use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

    type Status = c_int;
    type Device = *mut c_void;
    /// `NVML_DEVICE_UUID_V2_BUFFER_SIZE` and `NVML_DEVICE_NAME_V2_BUFFER_SIZE` of nvml.h.
    const TEXT: usize = 96;

    /// Name and UUID of every GPU of this machine; `None` without a working driver.
    #[expect(
        unsafe_code,
        reason = "calls into a library that is loaded at run time"
    )]
    pub fn list() -> Option<Vec<(String, String)>> {
        // SAFETY: a constant, null-terminated name; the library's constructors have no preconditions.
        let lib = unsafe {
            libc::dlopen(
                c"libnvidia-ml.so.1".as_ptr(),
                libc::RTLD_NOW | libc::RTLD_LOCAL,
            )
        };
        if lib.is_null() {
            return None;
        }
        // SAFETY: each symbol is cast to the signature that nvml.h declares for it, and `lib` is
        // never closed, so the pointers stay valid.
        unsafe {
            let init: extern "C" fn() -> Status = std::mem::transmute(symbol(lib, c"nvmlInit_v2")?);
            let shutdown: extern "C" fn() -> Status =
                std::mem::transmute(symbol(lib, c"nvmlShutdown")?);
            let count: extern "C" fn(*mut c_uint) -> Status =
                std::mem::transmute(symbol(lib, c"nvmlDeviceGetCount_v2")?);
            let handle: extern "C" fn(c_uint, *mut Device) -> Status =
                std::mem::transmute(symbol(lib, c"nvmlDeviceGetHandleByIndex_v2")?);
            let name: TextFn = std::mem::transmute(symbol(lib, c"nvmlDeviceGetName")?);
            let uuid: TextFn = std::mem::transmute(symbol(lib, c"nvmlDeviceGetUUID")?);

            if init() != 0 {
                return None;
            }
            let mut num: c_uint = 0;
            let counted = count(&mut num) == 0;
            let mut gpus = Vec::new();
            for index in 0..if counted { num } else { 0 } {
                let mut device: Device = std::ptr::null_mut();
                // A GPU that fell off the bus is not one that a worker can use.
                if handle(index, &mut device) == 0 {
                    gpus.push((text(name, device), text(uuid, device)));
                }
            }
            shutdown();
            counted.then_some(gpus)
        }
    }

    type TextFn = extern "C" fn(Device, *mut c_char, c_uint) -> Status;

    #[expect(unsafe_code, reason = "looks a symbol up")]
    fn symbol(lib: *mut c_void, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: `lib` comes from a dlopen that succeeded and is never closed.
        let found = unsafe { libc::dlsym(lib, name.as_ptr()) };
        (!found.is_null()).then_some(found)
    }

    fn text(get: TextFn, device: Device) -> String {
        let mut buffer = [0u8; TEXT];
        if get(device, buffer.as_mut_ptr().cast(), TEXT as c_uint) != 0 {
            return "unknown".into();
        }
        CStr::from_bytes_until_nul(&buffer)
            .map_or("unknown".into(), |s| s.to_string_lossy().into_owned())
    }
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
