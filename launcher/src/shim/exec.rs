//! Becoming another program, as a shell finds it.

use rustix::fs::{Access, access};
use std::ffi::{CString, OsStr, OsString};
use std::io::{Error, ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::own;

/// Becomes the program; why not, if it returns.
pub fn exec(program: &OsStr, args: Vec<OsString>) -> Error {
    let name = own::arg0(program);
    match find(program).filter(|path| is_elf(path)) {
        Some(path) => exec_binary(&path, &name, &args),
        None => Command::new(program).arg0(name).args(args).exec(),
    }
}

/// Where the program is.
fn find(program: &OsStr) -> Option<PathBuf> {
    if program.as_bytes().contains(&b'/') {
        return Some(program.into());
    }
    let folders = std::env::var_os("PATH")?;
    let mut paths = std::env::split_paths(&folders).map(|folder| folder.join(program));
    paths.find(|path| access(path, Access::EXEC_OK).is_ok() && path.is_file())
}

fn is_elf(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = fs_err::File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && magic == *b"\x7fELF"
}

/// libc would take a binary that the kernel cannot execute for a script, and have `sh` read it.
#[expect(unsafe_code, reason = "std executes by way of execvp alone")]
fn exec_binary(path: &Path, name: &OsStr, args: &[OsString]) -> Error {
    let words = std::iter::once(name).chain(args.iter().map(OsString::as_os_str));
    let words: Result<Vec<CString>, _> = words.map(|word| CString::new(word.as_bytes())).collect();
    let (Ok(words), Ok(path)) = (words, CString::new(path.as_os_str().as_bytes())) else {
        return ErrorKind::InvalidInput.into();
    };
    let mut argv: Vec<_> = words.iter().map(|word| word.as_ptr()).collect();
    argv.push(std::ptr::null());
    // SAFETY: both are what execv asks for, and live until it returns; no other thread changes the environment. What
    // std's start-up did to signals is undone, as it does itself before an exec.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::execv(path.as_ptr(), argv.as_ptr());
    }
    Error::last_os_error()
}
