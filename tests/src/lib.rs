//! What the system tests share: where the reference material lies, and data sets made from it.

pub mod weizmann;

use std::path::{Path, PathBuf};

/// The folder of reference clips and weights: `TSM_SHARED`, else `shared` beside the checkout.
/// `None`, with a word on stderr, where there is none.
pub fn shared(what: &str) -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let folder = std::env::var_os("TSM_SHARED").map_or(beside, PathBuf::from);
    let path = folder.join(what);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is missing", path.display());
    None
}
