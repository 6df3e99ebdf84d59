//! The embedded shared object that links FFmpeg: loaded from memory when the first video comes.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::OnceLock;

use super::DecodeError;

/// Empty where FFmpeg's headers were missing at build time.
static OBJECT: &[u8] = include_bytes!(env!("TSM_VIDEO_OBJECT"));

/// `struct tsm_info` of `csrc/video.c`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Info {
    pub width: i32,
    pub height: i32,
    pub frames: i64,
    pub present: i64,
    pub codec: [c_char; 32],
}

/// The functions of `csrc/video.c`, documented there.
struct Api {
    new: unsafe extern "C" fn() -> *mut c_void,
    free: unsafe extern "C" fn(*mut c_void),
    open: unsafe extern "C" fn(*mut c_void, *const c_char, *mut Info) -> c_int,
    close: unsafe extern "C" fn(*mut c_void),
    frames: unsafe extern "C" fn(
        *mut c_void,
        *const i64,
        *const *mut u8,
        usize,
        c_int,
        *mut i64,
    ) -> c_int,
    error: unsafe extern "C" fn(*const c_void) -> *const c_char,
}

static API: OnceLock<Result<Api, String>> = OnceLock::new();

/// What went wrong inside the shared object.
pub(super) struct Failure {
    /// The file or this FFmpeg lacks support, as opposed to the data being broken.
    pub unsupported: bool,
    pub reason: String,
    pub at: i64,
}

const UNSUPPORTED: c_int = -2;

/// A decoder of the shared object: its conversion context and buffers, and the video open in it.
pub(super) struct Handle {
    api: &'static Api,
    raw: NonNull<c_void>,
}

#[expect(unsafe_code, reason = "the decoder lives behind a C pointer")]
// SAFETY: FFmpeg's contexts belong to no thread, and all access goes through `&mut Handle`.
unsafe impl Send for Handle {}

impl Handle {
    pub(super) fn new() -> Result<Handle, DecodeError> {
        let api = API.get_or_init(load);
        let api = api.as_ref().map_err(|reason| DecodeError::NoVideoSupport {
            reason: reason.clone(),
        })?;
        #[expect(unsafe_code, reason = "calls the shared object")]
        // SAFETY: takes no arguments; null means that memory ran out.
        let raw = unsafe { (api.new)() };
        Ok(Handle {
            api,
            raw: NonNull::new(raw).expect("memory for a decoder"),
        })
    }

    pub(super) fn open(&mut self, path: &Path) -> Result<Info, Failure> {
        let mut info = Info {
            width: 0,
            height: 0,
            frames: 0,
            present: 0,
            codec: [0; 32],
        };
        let failed = |reason: &str| Failure {
            unsupported: false,
            reason: reason.to_owned(),
            at: 0,
        };
        // "file:" keeps FFmpeg from reading a protocol into a name with a colon.
        let name = [b"file:", path.as_os_str().as_bytes()].concat();
        let name = CString::new(name).map_err(|_| failed("its name holds a zero byte"))?;
        #[expect(unsafe_code, reason = "calls the shared object")]
        // SAFETY: `raw` is a live decoder, `name` a C string and `info` a struct of the C layout.
        let code = unsafe { (self.api.open)(self.raw.as_ptr(), name.as_ptr(), &mut info) };
        self.check(code, 0).map(|()| info)
    }

    /// Writes the frames at `index` (ascending, distinct, all present) through `buffers`, one per
    /// index and each `width * height * 3` bytes. With `plain`, counts every picture instead of
    /// looking for the wanted ones, and returns how many there are.
    pub(super) fn frames(
        &mut self,
        index: &[i64],
        buffers: &mut [&mut [u8]],
        plain: bool,
    ) -> Result<i64, Failure> {
        assert_eq!(index.len(), buffers.len(), "one buffer per frame");
        let pointers: Vec<*mut u8> = buffers.iter_mut().map(|b| b.as_mut_ptr()).collect();
        let (raw, mut at) = (self.raw.as_ptr(), 0);
        #[expect(unsafe_code, reason = "calls the shared object")]
        // SAFETY: `raw` is a live decoder, both arrays have `index.len()` entries, and the caller
        // sized every buffer for the size that `open` gave.
        let code = unsafe {
            (self.api.frames)(
                raw,
                index.as_ptr(),
                pointers.as_ptr(),
                index.len(),
                plain.into(),
                &mut at,
            )
        };
        self.check(code, at).map(|()| at)
    }

    pub(super) fn close(&mut self) {
        #[expect(unsafe_code, reason = "calls the shared object")]
        // SAFETY: `raw` is a live decoder; closing twice is allowed.
        unsafe {
            (self.api.close)(self.raw.as_ptr())
        }
    }

    fn check(&self, code: c_int, at: i64) -> Result<(), Failure> {
        if code >= 0 {
            return Ok(());
        }
        #[expect(unsafe_code, reason = "reads the shared object's message")]
        // SAFETY: the message is a C string inside the decoder, which is alive.
        let reason = unsafe { CStr::from_ptr((self.api.error)(self.raw.as_ptr())) };
        Err(Failure {
            unsupported: code == UNSUPPORTED,
            reason: reason.to_string_lossy().into_owned(),
            at,
        })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "calls the shared object")]
        // SAFETY: `raw` came from `new` and is not used again.
        unsafe {
            (self.api.free)(self.raw.as_ptr())
        }
    }
}

fn load() -> Result<Api, String> {
    if OBJECT.is_empty() {
        return Err(format!(
            "this build has none ({}); install pkg-config, libavformat-dev, libavcodec-dev, libswscale-dev and \
             libavutil-dev and build again, or extract the frames to JPEG",
            option_env!("TSM_NO_VIDEO").unwrap_or("FFmpeg's headers were missing")
        ));
    }
    let fd = memory_file()
        .map_err(|e| format!("cannot write {} bytes to a memory file: {e}", OBJECT.len()))?;
    let path = CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("no zero byte");
    #[expect(unsafe_code, reason = "loads the embedded object")]
    // SAFETY: the object is our own build of csrc/video.c, whose initialisers only load FFmpeg. It
    // stays loaded, so its functions live as long as the process.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        if library.is_null() {
            return Err(missing_library(
                &CStr::from_ptr(libc::dlerror()).to_string_lossy(),
            ));
        }
        let symbol = |name: &CStr| {
            let address = libc::dlsym(library, name.as_ptr());
            assert!(!address.is_null(), "csrc/video.c exports {name:?}");
            address
        };
        use std::mem::transmute;
        Ok(Api {
            new: transmute::<*mut c_void, unsafe extern "C" fn() -> *mut c_void>(symbol(
                c"tsm_decoder_new",
            )),
            free: transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void)>(symbol(
                c"tsm_decoder_free",
            )),
            open: transmute::<
                *mut c_void,
                unsafe extern "C" fn(*mut c_void, *const c_char, *mut Info) -> c_int,
            >(symbol(c"tsm_open")),
            close: transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void)>(symbol(
                c"tsm_close",
            )),
            frames: transmute::<
                *mut c_void,
                unsafe extern "C" fn(
                    *mut c_void,
                    *const i64,
                    *const *mut u8,
                    usize,
                    c_int,
                    *mut i64,
                ) -> c_int,
            >(symbol(c"tsm_frames")),
            error: transmute::<*mut c_void, unsafe extern "C" fn(*const c_void) -> *const c_char>(
                symbol(c"tsm_error"),
            ),
        })
    }
}

fn memory_file() -> std::io::Result<OwnedFd> {
    #[expect(unsafe_code, reason = "std has no memory files")]
    // SAFETY: the name is a C string; the descriptor is new and owned from here on.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"tsm-video".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        std::fs::File::from_raw_fd(fd)
    };
    file.write_all(OBJECT)?;
    Ok(file.into())
}

/// The dynamic linker's message with the next step, e.g. for
/// `libavformat.so.59: cannot open shared object file: No such file or directory`.
fn missing_library(message: &str) -> String {
    let library = message
        .split(": cannot open shared object")
        .next()
        .filter(|l| *l != message && l.contains(".so."));
    match library.map(|l| l.rsplit(' ').next().unwrap_or(l)) {
        Some(library) => {
            let package = library.replace(".so.", "");
            format!(
                "{library} of FFmpeg is not installed; install {package} (or ffmpeg), or extract the frames to JPEG"
            )
        }
        None => {
            format!("cannot load FFmpeg: {message}; install the FFmpeg this program was built with")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_its_package() {
        let text = missing_library(
            "libavformat.so.59: cannot open shared object file: No such file or directory",
        );
        assert!(
            text.starts_with(
                "libavformat.so.59 of FFmpeg is not installed; install libavformat59 "
            ),
            "{text}"
        );
        let other = missing_library("/proc/self/fd/3: undefined symbol: av_read_frame");
        assert!(other.contains("undefined symbol: av_read_frame"), "{other}");
    }
}
