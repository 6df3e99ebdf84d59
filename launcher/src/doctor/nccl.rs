//! Which NCCL the workers will load, without loading it: its version stands in the file as text.

use elf::ElfStream;
use elf::abi::{DT_RPATH, DT_RUNPATH};
use elf::endian::NativeEndian;
use fs_err::File;
use std::path::{Path, PathBuf};

use crate::cluster::message::Finding;

const NAME: &str = "libnccl.so.2";
/// The constant data of 2.28 is 220 KB long; device code lies elsewhere.
const MAX_DATA: u64 = 64 << 20;

/// A library and its version, such as `2.28.9+cuda13.0`.
#[derive(Clone, Debug, PartialEq)]
pub struct Nccl {
    pub path: PathBuf,
    pub version: String,
}

/// The first in the order in which `trainer`, or a program of the active Python environment, would find one.
pub fn find(trainer: Option<&Path>) -> Option<Nccl> {
    let variable = |name| std::env::var_os(name);
    let mut folders: Vec<PathBuf> = Vec::new();
    folders.extend(
        variable("LD_LIBRARY_PATH")
            .iter()
            .flat_map(std::env::split_paths),
    );
    for folder in trainer.map(run_path).unwrap_or_default() {
        // PyTorch's wheel finds NCCL in the wheel beside it.
        folders.push(folder.join("../../nvidia/nccl/lib"));
        folders.push(folder);
    }
    for environment in ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .into_iter()
        .filter_map(variable)
    {
        let lib = Path::new(&environment).join("lib");
        let pythons = fs_err::read_dir(&lib).into_iter().flatten().flatten();
        let pythons = pythons.filter(|e| e.file_name().to_string_lossy().starts_with("python"));
        folders.extend(pythons.map(|e| e.path().join("site-packages/nvidia/nccl/lib")));
        folders.push(lib);
    }
    let system = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/local/lib",
        "/usr/lib",
    ];
    folders.extend(system.map(PathBuf::from));
    folders.into_iter().find_map(|folder| {
        // The wheels are often linked to, and the link's target has the neighbours.
        let path = fs_err::canonicalize(folder.join(NAME)).ok()?;
        version(&path).map(|version| Nccl { path, version })
    })
}

/// Folders that a program names for its libraries, `$ORIGIN` replaced.
fn run_path(program: &Path) -> Vec<PathBuf> {
    let read = || {
        let mut file = ElfStream::<NativeEndian, _>::open_stream(File::open(program).ok()?).ok()?;
        let entries = file.dynamic().ok()??;
        let offsets: Vec<u64> = entries
            .iter()
            .filter(|e| [DT_RPATH, DT_RUNPATH].contains(&e.d_tag))
            .map(|e| e.d_val())
            .collect();
        let (_, strings) = file.dynamic_symbol_table().ok()??;
        let lists = offsets
            .iter()
            .filter_map(|&offset| strings.get(offset as usize).ok());
        Some(lists.map(String::from).collect::<Vec<_>>())
    };
    let origin = fs_err::canonicalize(program)
        .ok()
        .and_then(|p| Some(p.parent()?.to_path_buf()));
    let origin = origin.unwrap_or_default();
    let lists = read().unwrap_or_default();
    let folders = lists
        .iter()
        .flat_map(|list| list.split(':'))
        .filter(|folder| !folder.is_empty());
    let absolute =
        folders.map(|folder| PathBuf::from(folder.replace("$ORIGIN", &origin.to_string_lossy())));
    // `..` counts from where a link leads, as for the loader of libtorch itself.
    absolute
        .filter_map(|folder| fs_err::canonicalize(folder).ok())
        .collect()
}

fn version(library: &Path) -> Option<String> {
    let mut file = ElfStream::<NativeEndian, _>::open_stream(File::open(library).ok()?).ok()?;
    let data = *file.section_header_by_name(".rodata").ok()??;
    if data.sh_size > MAX_DATA {
        return None;
    }
    in_text(file.section_data(&data).ok()?.0)
}

/// `NCCL version 2.28.9+cuda13.0`, among other texts that begin like it.
fn in_text(data: &[u8]) -> Option<String> {
    const START: &[u8] = b"NCCL version ";
    let starts = data
        .windows(START.len())
        .enumerate()
        .filter(|(_, w)| *w == START);
    starts
        .filter_map(|(at, _)| {
            let text = data[at + START.len()..]
                .split(|b| b.is_ascii_control() || *b == b' ')
                .next()?;
            let text = std::str::from_utf8(text).ok()?;
            text.starts_with(|c: char| c.is_ascii_digit())
                .then(|| text.to_string())
        })
        .max_by_key(String::len)
}

pub fn judge(found: Option<&Nccl>, wanted: bool) -> Vec<Finding> {
    match found {
        Some(Nccl { path, version }) => vec![Finding::ok(
            "nccl",
            format!("NCCL {version} in {}", path.display()),
        )],
        None if wanted => vec![Finding::ok(
            "nccl",
            format!(
                "no {NAME} beside the trainer, in LD_LIBRARY_PATH, or in an active Python environment; its version is not compared"
            ),
        )],
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_told_from_texts_that_begin_like_it() {
        let data = b"\0NCCL version mismatch with peer\0NCCL version 2.28.9 compiled with CUDA\n\0NCCL version 2.28.9+cuda13.0\0Mismatched NCCL version detected\0";
        assert_eq!(in_text(data).as_deref(), Some("2.28.9+cuda13.0"));
        assert_eq!(in_text(b"NCCL version "), None);
        assert_eq!(in_text(b"NCCL version mismatch with peer\0"), None);
        assert_eq!(in_text(b"nothing"), None);
    }

    #[test]
    fn files_without_nccl_have_no_version() {
        assert_eq!(version(Path::new("/bin/sh")), None);
        assert_eq!(version(Path::new("/etc/passwd")), None);
        assert_eq!(run_path(Path::new("/nonexistent")), Vec::<PathBuf>::new());
    }

    #[test]
    fn the_library_of_this_machine_names_its_version() {
        let Some(found) = find(None) else {
            eprintln!("skipped: no {NAME} in LD_LIBRARY_PATH or an active Python environment");
            return;
        };
        assert!(found.version.starts_with("2."), "{found:?}");
    }

    #[test]
    fn where_a_program_looks_for_its_libraries() {
        let dir = tempfile::tempdir().unwrap();
        let lib = dir.path().join("lib");
        fs_err::create_dir(&lib).unwrap();
        let source = dir.path().join("a.c");
        fs_err::write(&source, "int main(void) { return 0; }").unwrap();
        let program = dir.path().join("a");
        let linked = std::process::Command::new("cc")
            .args([
                source.as_os_str(),
                "-o".as_ref(),
                program.as_os_str(),
                "-Wl,-rpath,$ORIGIN/lib:/nonexistent".as_ref(),
            ])
            .status();
        if !linked.is_ok_and(|status| status.success()) {
            eprintln!("skipped: no C compiler");
            return;
        }
        assert_eq!(run_path(&program), [fs_err::canonicalize(lib).unwrap()]);
    }
}
