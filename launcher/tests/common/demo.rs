//! The demo's config, and its lists without videos.

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
