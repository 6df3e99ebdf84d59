//! Where a measurement was made.

use std::process::{Command, Stdio};

pub fn cpu_model() -> String {
    fs_err::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            text.lines().find_map(|l| {
                l.strip_prefix("model name")
                    .map(|m| m.trim_start_matches([' ', '\t', ':']).to_owned())
            })
        })
        .unwrap_or_else(|| "unknown CPU".into())
}

/// Its release.
pub fn kernel() -> String {
    let text = fs_err::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    text.trim().to_owned()
}

/// Of the source tree that this program was built from, with `+` where that differs from the commit.
pub fn commit() -> Option<String> {
    let output = Command::new("git")
        .args(["describe", "--always", "--exclude=*", "--dirty=+"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The one-minute load average.
pub fn load() -> f64 {
    let text = fs_err::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split(' ').next();
    first.and_then(|load| load.parse().ok()).unwrap_or(f64::NAN)
}
