//! Finding and loading libtorch_cuda and the plugin.

use std::sync::OnceLock;

use super::CudaInfo;

static LOADED: OnceLock<Result<CudaInfo, String>> = OnceLock::new();

/// Loads libtorch_cuda from the folder of libtorch_cpu, then the CUDA plugin out of this program.
///
/// Call it before anything that asks libtorch for CUDA (`tch::Cuda::is_available` too): libtorch
/// remembers the first answer. Later calls return what the first one found. Without a driver or
/// a device it succeeds with `device_count` 0.
///
/// # Errors
/// Why there is no CUDA: the caller prints it and goes on on the CPU.
pub fn load_cuda() -> Result<CudaInfo, String> {
    LOADED
        .get_or_init(|| {
            load()?;
            CudaInfo::read().map_err(|e| e.to_string())
        })
        .clone()
}

/// What the first [`load_cuda`] found, if it was called.
pub(super) fn loaded() -> Option<&'static CudaInfo> {
    LOADED.get().and_then(|r| r.as_ref().ok())
}

#[cfg(not(cuda_plugin))]
fn load() -> Result<(), String> {
    Err("this program was built without CUDA: its headers were not found".to_owned())
}

#[cfg(cuda_plugin)]
fn load() -> Result<(), String> {
    use std::ffi::{CStr, CString, c_void};
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    static PLUGIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tsm_cuda.so"));

    #[expect(unsafe_code, reason = "csrc/cuda_calls.cpp")]
    unsafe extern "C" {
        fn tsm_cuda_register(api: *const c_void);
    }

    fn open(path: &Path) -> Result<*mut c_void, String> {
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| format!("{path:?} has a NUL byte"))?;
        #[expect(unsafe_code, reason = "asks the dynamic linker")]
        // SAFETY: loading runs the static constructors of libraries that belong to libtorch or to
        // us; dlerror's string is copied before another call of this thread.
        unsafe {
            let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL);
            if handle.is_null() {
                let why = CStr::from_ptr(libc::dlerror());
                return Err(why.to_string_lossy().into_owned());
            }
            Ok(handle)
        }
    }

    let library = crate::ops::libtorch_dir().join("libtorch_cuda.so");
    if !library.exists() {
        return Err(format!(
            "there is no {}: this libtorch is without CUDA",
            library.display()
        ));
    }
    open(&library)?;

    #[expect(unsafe_code, reason = "a file in memory")]
    // SAFETY: the name is NUL-terminated.
    let fd = unsafe { libc::memfd_create(c"tsm_cuda".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        let why = std::io::Error::last_os_error();
        return Err(format!(
            "cannot make a file in memory for the CUDA plugin: {why}"
        ));
    }
    #[expect(unsafe_code, reason = "takes the descriptor over")]
    // SAFETY: the descriptor is new and nobody else's.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(PLUGIN)
        .map_err(|e| format!("cannot write the CUDA plugin to memory: {e}"))?;
    let plugin = open(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())))
        .map_err(|e| format!("the CUDA plugin does not fit {}: {e}", library.display()))?;

    #[expect(unsafe_code, reason = "looks up and calls the plugin's one function")]
    // SAFETY: the plugin was built together with this program, so that the function exists and has
    // this type; the table it returns is static in a library that is never unloaded.
    unsafe {
        let symbol = libc::dlsym(plugin, c"tsm_cuda_plugin".as_ptr());
        assert!(!symbol.is_null(), "the plugin exports tsm_cuda_plugin");
        let table: extern "C" fn() -> *const c_void = std::mem::transmute(symbol);
        tsm_cuda_register(table());
    }
    Ok(())
}
