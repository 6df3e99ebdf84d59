//! Global and thread-wide state of libtorch: autocast, numeric flags, which library is loaded.

use std::ffi::{CStr, OsStr, c_int};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use tch::{Device, Kind};

use crate::error::{Result, check};

/// This thread's autocast state for one kind of device.
#[repr(C)]
struct Autocast {
    enabled: i32,
    dtype: i32,
}

#[expect(unsafe_code, reason = "declarations of csrc/core.cpp")]
unsafe extern "C" {
    fn tsm_autocast_enter(cuda: c_int, dtype: c_int, previous: *mut Autocast) -> c_int;
    fn tsm_autocast_leave(cuda: c_int, previous: *const Autocast) -> c_int;
    fn tsm_set_flags(cudnn_benchmark: c_int, deterministic: c_int, allow_tf32: c_int) -> c_int;
    fn tsm_torch_abi_version() -> u64;
}

/// Runs `f` with matrix products and convolutions on `device` in `dtype`, which libtorch chooses
/// per operation; parameters stay as they are.
///
/// Holds for this thread. The former state comes back even if `f` panics, and the cache of cast
/// weights is dropped: updating the weights in the next step must not meet stale copies.
///
/// # Panics
/// If `dtype` is neither `Half` nor `BFloat16`, or `device` neither CPU nor CUDA.
pub fn autocast<R>(device: Device, dtype: Kind, f: impl FnOnce() -> R) -> R {
    // c10::ScalarType, c10/core/ScalarType.h.
    let scalar_type = match dtype {
        Kind::Half => 5,
        Kind::BFloat16 => 15,
        other => panic!("autocast: the dtype must be Half or BFloat16, not {other:?}"),
    };
    let cuda = match device {
        Device::Cpu => 0,
        Device::Cuda(_) => 1,
        other => panic!("autocast: no implementation for device {other:?}"),
    };
    let mut previous = Autocast {
        enabled: 0,
        dtype: 0,
    };
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: `previous` outlives the call.
    let entered = check(unsafe { tsm_autocast_enter(cuda, scalar_type, &mut previous) });
    if let Err(e) = entered {
        panic!("autocast: {e}");
    }
    let _restore = Restore { cuda, previous };
    f()
}

struct Restore {
    cuda: c_int,
    previous: Autocast,
}

impl Drop for Restore {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
        // SAFETY: the state was filled by tsm_autocast_enter of this thread.
        let _ = unsafe { tsm_autocast_leave(self.cuda, &self.previous) };
    }
}

/// Process-wide choices between speed and repeatability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flags {
    /// Time cuDNN's algorithms on the first step of each shape and keep the fastest.
    pub cudnn_benchmark: bool,
    /// Only deterministic algorithms; operations that have none fail.
    pub deterministic: bool,
    /// fp32 matrix products and convolutions with TF32's 10-bit mantissa (Ampere and later).
    pub allow_tf32: bool,
}

/// Sets the flags of libtorch's global context.
///
/// # Errors
/// If libtorch refuses a value.
pub fn set_flags(flags: Flags) -> Result<()> {
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: plain values.
    check(unsafe {
        tsm_set_flags(
            c_int::from(flags.cudnn_benchmark),
            c_int::from(flags.deterministic),
            c_int::from(flags.allow_tf32),
        )
    })
}

/// The version of the libtorch that was loaded, e.g. `2.11.0`.
pub fn libtorch_version() -> String {
    #[expect(unsafe_code, reason = "call into csrc/core.cpp")]
    // SAFETY: reads a constant.
    let v = unsafe { tsm_torch_abi_version() };
    format!("{}.{}.{}", v >> 56, v >> 48 & 0xff, v >> 40 & 0xff)
}

/// The folder from which the dynamic linker took libtorch_cpu.so.
pub fn libtorch_dir() -> PathBuf {
    // A symbol by name: the address of a C++ function seen from here may be a stub in this program.
    let file =
        library_of(c"_ZN2at13globalContextEv").expect("this program is linked to libtorch_cpu");
    file.parent().map(Path::to_owned).unwrap_or_default()
}

/// The file of the loaded library that defines `symbol`.
pub(crate) fn library_of(symbol: &CStr) -> Option<PathBuf> {
    #[expect(unsafe_code, reason = "asks the dynamic linker")]
    // SAFETY: `symbol` is NUL-terminated, `info` is filled before it is read, and dli_fname lives
    // as long as its library, which is not unloaded here.
    unsafe {
        let address = libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr());
        if address.is_null() {
            return None;
        }
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(address, &mut info) == 0 || info.dli_fname.is_null() {
            return None;
        }
        let name = CStr::from_ptr(info.dli_fname);
        Some(PathBuf::from(OsStr::from_bytes(name.to_bytes())))
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    fn product_kind() -> Kind {
        let x = Tensor::ones([4, 4], (Kind::Float, Device::Cpu));
        x.matmul(&x).kind()
    }

    #[test]
    fn autocast_lowers_products_inside_and_nests() {
        let inner = autocast(Device::Cpu, Kind::BFloat16, || {
            assert_eq!(product_kind(), Kind::BFloat16);
            let half = autocast(Device::Cpu, Kind::Half, product_kind);
            (half, product_kind())
        });
        assert_eq!(inner, (Kind::Half, Kind::BFloat16));
        assert_eq!(product_kind(), Kind::Float);
    }

    #[test]
    fn autocast_ends_when_the_closure_panics() {
        let caught = std::panic::catch_unwind(|| {
            autocast(Device::Cpu, Kind::BFloat16, || panic!("step failed"))
        });
        assert!(caught.is_err());
        assert_eq!(product_kind(), Kind::Float);
    }

    #[test]
    fn autocast_forgets_cast_weights() {
        let w = Tensor::ones([2, 2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let x = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
        let product = || {
            autocast(Device::Cpu, Kind::BFloat16, || {
                x.matmul(&w).double_value(&[0, 0])
            })
        };
        assert_eq!(product(), 2.0);
        let _ = tch::no_grad(|| w.shallow_clone().fill_(3.0));
        assert_eq!(product(), 6.0);
    }

    #[test]
    fn flags_are_accepted_in_every_combination() {
        for bits in 0..8 {
            let flags = Flags {
                cudnn_benchmark: bits & 1 != 0,
                deterministic: bits & 2 != 0,
                allow_tf32: bits & 4 != 0,
            };
            set_flags(flags).unwrap();
            assert_eq!(product_kind(), Kind::Float);
        }
        set_flags(Flags {
            cudnn_benchmark: false,
            deterministic: false,
            allow_tf32: false,
        })
        .unwrap();
    }

    #[test]
    fn the_loaded_library_is_the_one_tch_was_made_for() {
        assert!(
            libtorch_version().starts_with("2.11."),
            "{}",
            libtorch_version()
        );
        assert!(
            libtorch_dir().join("libtorch_cpu.so").exists(),
            "{:?}",
            libtorch_dir()
        );
    }
}
