//! This executable: how a process of it starts another one, and where other hosts find it.
//!
//! A job may run for weeks, and the file that it was started from be replaced or removed meanwhile. What this process
//! starts of itself must be the program that it is: a shim, a guard and the one who starts them have to agree on
//! their arguments. Only another host is told a path.

use rustix::thread::set_name;
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Leads each process to the program that it runs, whatever has become of its file.
const LINK: &str = "/proc/self/exe";
/// What the kernel puts behind the path of a file that is no longer there.
const DELETED: &[u8] = b" (deleted)";

/// The program to start again as a shim, a guard, or a launcher below this one.
#[derive(Clone, Debug, PartialEq)]
pub struct Executable {
    program: PathBuf,
    /// What `ps` shows, and errors name.
    name: PathBuf,
}

impl Executable {
    /// The one that this process runs.
    ///
    /// # Errors
    /// When there is no `/proc`.
    pub fn own() -> std::io::Result<Executable> {
        Ok(Executable {
            program: LINK.into(),
            name: path()?,
        })
    }

    /// That of a test, which is no launcher itself.
    pub fn at(path: &Path) -> Executable {
        Executable {
            program: path.into(),
            name: path.into(),
        }
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg0(&self.name);
        command
    }

    /// To be executed, under the name of [`arg0`], by a shim of this executable.
    pub fn program(&self) -> &Path {
        &self.program
    }

    pub fn name(&self) -> std::path::Display<'_> {
        self.name.display()
    }
}

/// The name by which this process executes `program`.
pub fn arg0(program: &OsStr) -> OsString {
    let own = || std::env::args_os().next();
    let own = (program == LINK).then(own).flatten();
    own.unwrap_or(program.into())
}

/// Where the file of this executable is, or was until it was replaced or removed.
///
/// # Errors
/// When there is no `/proc`.
pub fn path() -> std::io::Result<PathBuf> {
    std::env::current_exe().map(|path| without_mark(path, Path::exists))
}

fn without_mark(path: PathBuf, exists: impl Fn(&Path) -> bool) -> PathBuf {
    match path.as_os_str().as_bytes().strip_suffix(DELETED) {
        Some(plain) if !exists(&path) => OsString::from_vec(plain.into()).into(),
        _ => path,
    }
}

/// Gives this process the name that it has among its arguments. The kernel would call it `exe`, after [`LINK`].
pub fn take_name() {
    let arg0 = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&arg0).file_name().unwrap_or(&arg0);
    if let Ok(name) = CString::new(name.as_bytes()) {
        let _ = set_name(&name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_told_without_the_kernels_mark() {
        let told = |path: &str, exists| without_mark(path.into(), |_| exists);
        assert_eq!(told("/opt/tl (deleted)", false), Path::new("/opt/tl"));
        assert_eq!(
            told("/opt/tl (deleted)", true),
            Path::new("/opt/tl (deleted)"),
            "such a file may exist"
        );
        assert_eq!(told("/opt/tl", false), Path::new("/opt/tl"));
    }
}
