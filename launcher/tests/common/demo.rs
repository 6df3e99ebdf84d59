//! The demo's config, its lists without videos, and programs to stand in for its trainer and others.

use fs_err::os::unix::fs::OpenOptionsExt;
use std::io::Write;
use std::path::Path;

pub const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/demo.yaml");

/// Makes empty lists in `folder` where [`DEMO`] looks for its own.
pub fn write_lists(folder: &Path) {
    let data = folder.join("data/demo");
    fs_err::create_dir_all(&data).expect("a folder for a test");
    for name in ["train.txt", "val.txt", "classes.txt"] {
        fs_err::write(data.join(name), "").expect("a folder for a test");
    }
}

/// Writes a script that can be executed.
pub fn write_program(path: &Path, script: &str) {
    let mut options = fs_err::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o755);
    let written = file.open(path).map(|mut f| f.write_all(script.as_bytes()));
    written.flatten().expect("a folder for a test");
}
