//! Compiles `csrc/video.c` into a shared object that links FFmpeg and is embedded in the library,
//! so that no binary links FFmpeg itself. Without FFmpeg's headers an empty file is embedded.

use std::env;
use std::path::PathBuf;
use std::process::Command;

const LIBRARIES: [&str; 4] = ["libavformat", "libavcodec", "libswscale", "libavutil"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_PATH");
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_LIBDIR");
    let object =
        PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("video.so");
    match ffmpeg_flags() {
        Ok(flags) => compile(&flags, &object),
        Err(reason) => {
            println!("cargo:warning=tsm-data is built without video support: {reason}");
            println!("cargo:rustc-env=TSM_NO_VIDEO={reason}");
            embed_nothing(&object);
        }
    }
    println!("cargo:rustc-env=TSM_VIDEO_OBJECT={}", object.display());
}

/// Compiler and linker flags for FFmpeg's libraries, or why there are none.
fn ffmpeg_flags() -> Result<Vec<String>, String> {
    let output = Command::new("pkg-config")
        .args(["--cflags", "--libs"])
        .args(LIBRARIES)
        .output();
    match output {
        Ok(o) if o.status.success() => Ok(String::from_utf8_lossy(&o.stdout)
            .split_whitespace()
            .map(str::to_owned)
            .collect()),
        Ok(o) => Err(format!(
            "pkg-config found no {}: {}",
            LIBRARIES.join(", "),
            String::from_utf8_lossy(&o.stderr)
                .lines()
                .next()
                .unwrap_or("no message")
        )),
        Err(e) => Err(format!("cannot run pkg-config: {e}")),
    }
}

fn compile(flags: &[String], object: &PathBuf) {
    let mut command = cc::Build::new().opt_level(2).get_compiler().to_command();
    command
        .args([
            "-std=gnu11",
            "-Wall",
            "-Wextra",
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
            "-Wl,--no-undefined",
        ])
        .arg("csrc/video.c")
        .args(flags)
        .arg("-o")
        .arg(object);
    let status = command.status().expect("the C compiler starts");
    assert!(
        status.success(),
        "csrc/video.c does not compile against the installed FFmpeg: {command:?}"
    );
}

#[expect(
    clippy::disallowed_methods,
    reason = "a build script without dependencies"
)]
fn embed_nothing(object: &PathBuf) {
    std::fs::write(object, []).expect("OUT_DIR is writable");
}
