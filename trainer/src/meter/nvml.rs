//! GPU use and memory through NVIDIA's management library, opened at run time where it exists.
//!
//! Names and structures: `nvml.h` (`nvmlUtilization_t`, `nvmlMemory_t`).

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};

const SUCCESS: c_int = 0;

#[repr(C)]
#[derive(Default)]
struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

#[repr(C)]
#[derive(Default)]
struct Memory {
    total: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

type Device = *mut c_void;
type Init = unsafe extern "C" fn() -> c_int;
type ByIndex = unsafe extern "C" fn(c_uint, *mut Device) -> c_int;
type ByUuid = unsafe extern "C" fn(*const c_char, *mut Device) -> c_int;
type UtilizationRates = unsafe extern "C" fn(Device, *mut Utilization) -> c_int;
type MemoryInfo = unsafe extern "C" fn(Device, *mut Memory) -> c_int;

/// One device. The library stays loaded until the process ends.
#[derive(Debug)]
pub(crate) struct Gpu {
    device: Device,
    utilization: UtilizationRates,
    memory: MemoryInfo,
}

/// How NVML finds a device.
#[derive(Debug, PartialEq)]
enum Name {
    Index(c_uint),
    Uuid(CString),
}

/// Which device CUDA's number `cuda_index` is. NVML does not heed `CUDA_VISIBLE_DEVICES`; CUDA stops
/// reading it at the first entry it cannot use, which here gives `None`.
fn name_of(cuda_index: u32, visible_devices: Option<&str>) -> Option<Name> {
    let Some(list) = visible_devices else {
        return Some(Name::Index(cuda_index));
    };
    let entry = list
        .split(',')
        .nth(usize::try_from(cuda_index).ok()?)?
        .trim();
    match entry.parse() {
        Ok(index) => Some(Name::Index(index)),
        Err(_) if entry.starts_with("GPU-") || entry.starts_with("MIG-") => {
            CString::new(entry).ok().map(Name::Uuid)
        }
        Err(_) => None,
    }
}

impl Gpu {
    /// Device `cuda_index` as CUDA counts in this process; `None` without the library, the driver or
    /// the device. Where GPUs of a node differ, set `CUDA_DEVICE_ORDER=PCI_BUS_ID`: NVML counts so.
    #[expect(unsafe_code, reason = "NVML is a C library found at run time")]
    pub fn open(cuda_index: u32, visible_devices: Option<&str>) -> Option<Gpu> {
        let name = name_of(cuda_index, visible_devices)?;
        // SAFETY: a constant NUL-terminated name; the handle is never closed, so symbols stay valid.
        let library = unsafe {
            libc::dlopen(
                c"libnvidia-ml.so.1".as_ptr(),
                libc::RTLD_NOW | libc::RTLD_LOCAL,
            )
        };
        if library.is_null() {
            return None;
        }
        let init = symbol(library, c"nvmlInit_v2")?;
        let by_index = symbol(library, c"nvmlDeviceGetHandleByIndex_v2")?;
        let by_uuid = symbol(library, c"nvmlDeviceGetHandleByUUID")?;
        let utilization = symbol(library, c"nvmlDeviceGetUtilizationRates")?;
        let memory = symbol(library, c"nvmlDeviceGetMemoryInfo")?;
        let mut device: Device = std::ptr::null_mut();
        // SAFETY: each symbol has the type nvml.h declares for its name; pointers are to live values;
        // nvmlInit_v2 comes first and may be called any number of times.
        let found = unsafe {
            let init = std::mem::transmute::<*mut c_void, Init>(init);
            let by_index = std::mem::transmute::<*mut c_void, ByIndex>(by_index);
            let by_uuid = std::mem::transmute::<*mut c_void, ByUuid>(by_uuid);
            init() == SUCCESS
                && SUCCESS
                    == match &name {
                        Name::Index(index) => by_index(*index, &mut device),
                        Name::Uuid(uuid) => by_uuid(uuid.as_ptr(), &mut device),
                    }
        };
        // SAFETY: as above, the types are those of nvml.h.
        let (utilization, memory) = unsafe {
            (
                std::mem::transmute::<*mut c_void, UtilizationRates>(utilization),
                std::mem::transmute::<*mut c_void, MemoryInfo>(memory),
            )
        };
        found.then_some(Gpu {
            device,
            utilization,
            memory,
        })
    }

    /// Percent of the last sample period (up to 1 s) in which a kernel ran; `None` if the device does not say.
    #[expect(unsafe_code, reason = "NVML is a C library found at run time")]
    pub fn utilization_percent(&self) -> Option<f64> {
        let mut rates = Utilization::default();
        // SAFETY: `device` came from this library; `rates` has the layout of nvmlUtilization_t.
        let status = unsafe { (self.utilization)(self.device, &mut rates) };
        (status == SUCCESS).then_some(f64::from(rates.gpu))
    }

    /// Memory in use on the device by all processes; `None` if the device does not say.
    #[expect(unsafe_code, reason = "NVML is a C library found at run time")]
    pub fn mem_bytes(&self) -> Option<u64> {
        let mut memory = Memory::default();
        // SAFETY: `device` came from this library; `memory` has the layout of nvmlMemory_t.
        let status = unsafe { (self.memory)(self.device, &mut memory) };
        (status == SUCCESS).then_some(memory.used)
    }
}

#[expect(unsafe_code, reason = "NVML is a C library found at run time")]
fn symbol(library: *mut c_void, name: &CStr) -> Option<*mut c_void> {
    // SAFETY: `library` is a handle that dlopen returned and nothing closes; the name ends with NUL.
    let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
    (!symbol.is_null()).then_some(symbol)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_numbers_go_through_visible_devices() {
        assert_eq!(name_of(2, None), Some(Name::Index(2)));
        assert_eq!(name_of(1, Some("4, 6")), Some(Name::Index(6)));
        assert_eq!(
            name_of(0, Some("GPU-ab,3")),
            Some(Name::Uuid(c"GPU-ab".into()))
        );
        assert_eq!(name_of(2, Some("4,6")), None);
        assert_eq!(name_of(0, Some("")), None);
        assert_eq!(name_of(0, Some("-1")), None);
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_device_reports_its_memory() {
        let gpu = Gpu::open(0, None).expect("libnvidia-ml.so.1 and a device");
        assert!(gpu.mem_bytes().unwrap() > 0);
        assert!(gpu.utilization_percent().unwrap() <= 100.0);
    }
}
