//! Compiles csrc/ against libtorch's headers: core.cpp and dist.cpp into this crate.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=csrc");
    let lib =
        PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys is a direct dependency"));
    let torch = lib
        .parent()
        .expect("libtorch's lib folder has a parent")
        .to_owned();

    // Each takes most of a minute, nearly all of it in libtorch's headers.
    std::thread::scope(|scope| {
        scope.spawn(|| compiler(&torch).file("csrc/core.cpp").compile("tsm_core"));
        scope.spawn(|| compiler(&torch).file("csrc/dist.cpp").compile("tsm_dist"));
    });

    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
    println!("cargo:rustc-link-lib=dylib=c10");
    // at::parallel_for is an inline OpenMP region; libtorch brings the same libgomp.so.1.
    println!("cargo:rustc-link-lib=dylib=gomp");
    println!("cargo:rustc-link-arg=-Wl,--enable-new-dtags");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}

fn compiler(torch: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        // libtorch's headers warn in ways that are not ours to mend.
        .warnings(false)
        .pic(true)
        .include("csrc")
        .include("csrc/stub")
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .define("USE_DISTRIBUTED", None)
        .define("USE_C10D_GLOO", None)
        .flag("-fopenmp");
    build
}
