//! The one error of this crate: what a C++ exception of libtorch said.

use std::ffi::{CStr, c_char, c_int};

/// The message of a C++ exception, without its backtrace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TorchError(pub(crate) String);

/// What the fallible functions of this crate return.
pub type Result<T> = std::result::Result<T, TorchError>;

#[expect(unsafe_code, reason = "the C++ side's message")]
mod ffi {
    use super::{CStr, c_char};

    unsafe extern "C" {
        fn tsm_last_error() -> *const c_char;
    }

    pub fn last_error() -> String {
        // SAFETY: the pointer is a thread-local, NUL-terminated string, copied before anything of
        // this thread can change it.
        let message = unsafe { CStr::from_ptr(tsm_last_error()) };
        message.to_string_lossy().trim_end().to_owned()
    }
}

/// Turns the status of a C function into a result.
pub(crate) fn check(status: c_int) -> Result<()> {
    if status == 0 {
        Ok(())
    } else {
        Err(TorchError(ffi::last_error()))
    }
}
