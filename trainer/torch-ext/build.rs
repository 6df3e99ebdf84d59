//! Compiles csrc/ against libtorch's headers: the part every program links, and, where CUDA's headers
//! are found, the plugin that src/cuda.rs loads at run time.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rustc-check-cfg=cfg(cuda_plugin)");
    let lib =
        PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys is a direct dependency"));
    let torch = lib
        .parent()
        .expect("libtorch's lib folder has a parent")
        .to_owned();
    let cuda = cuda_headers(&torch);

    // Nearly all the time goes into libtorch's headers: three compilers at once.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            compiler(&torch)
                .file("csrc/core.cpp")
                .file("csrc/cuda_calls.cpp")
                .compile("tsm_core");
        });
        scope.spawn(|| compiler(&torch).file("csrc/dist.cpp").compile("tsm_dist"));
        if let Some(cuda) = &cuda {
            scope.spawn(|| build_plugin(&torch, cuda));
        }
    });
    match cuda {
        Some(_) => println!("cargo:rustc-cfg=cuda_plugin"),
        None => println!(
            "cargo:warning=cuda_runtime_api.h was not found beside libtorch, in CUDA_HOME or in \
             /usr/local/cuda: building without CUDA"
        ),
    }

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

/// The folder of cuda_runtime_api.h: NVIDIA's wheel in the site-packages where torch's wheel is, or a
/// toolkit. The wheels crt and runtime must both be there.
fn cuda_headers(torch: &Path) -> Option<PathBuf> {
    let mut candidates = Vec::new();
    if let Ok(torch) = torch.canonicalize() {
        candidates.extend(torch.parent().map(|site| site.join("nvidia/cu13/include")));
    }
    candidates.extend(env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("include")));
    candidates.push(PathBuf::from("/usr/local/cuda/include"));
    candidates.into_iter().find(|dir| {
        dir.join("cuda_runtime_api.h").exists() && dir.join("crt/host_config.h").exists()
    })
}

/// `tsm_cuda.so` in OUT_DIR, its symbols of libtorch and CUDA left for the loader.
fn build_plugin(torch: &Path, cuda: &Path) {
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut build = compiler(torch);
    build
        // Before the machine's headers: see csrc/stub/cuda/nccl.h.
        .include("csrc/stub/cuda")
        .include(cuda)
        .define("USE_C10D_NCCL", None)
        .flag("-fvisibility=hidden")
        .file("csrc/cuda.cpp")
        .file("csrc/cuda_shift.cpp")
        .cargo_metadata(false);
    let objects = build.compile_intermediates();
    let mut link: Command = build.get_compiler().to_command();
    link.arg("-shared")
        .args(objects)
        .args(["-Wl,--gc-sections", "-Wl,-s", "-o"])
        .arg(out.join("tsm_cuda.so"));
    let status = link
        .status()
        .unwrap_or_else(|e| panic!("cannot run {link:?}: {e}"));
    assert!(status.success(), "{link:?} failed: {status}");
}
