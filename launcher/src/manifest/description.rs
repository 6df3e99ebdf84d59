//! The part of a manifest that takes a moment to find out.

use serde::Serialize;
use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use super::files::{self, Binary};
use super::{Manifest, versions};

/// What the launcher runs on, and what it runs.
#[derive(Clone, Debug)]
pub struct Description {
    pub machine: Machine,
    pub commit: Option<Commit>,
    pub binaries: Vec<Binary>,
    pub versions: BTreeMap<String, String>,
}

/// State of the source tree in the current directory.
#[derive(Clone, Debug, Serialize)]
pub struct Commit {
    pub id: String,
    /// Tracked files differ from it.
    pub modified: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub num_cpus: usize,
    pub mem_bytes: u64,
    pub kernel: String,
}

impl Description {
    /// Asks programs and reads whole files: for a thread of its own, after the workers are started.
    pub fn find(command: &[String]) -> Description {
        Description {
            machine: machine(),
            commit: commit(),
            binaries: files::binaries(command),
            versions: versions::of_starters(),
        }
    }

    /// What is known of versions otherwise stays.
    pub fn write_into(&self, manifest: &mut Manifest) {
        let Description {
            machine,
            commit,
            binaries,
            versions,
        } = self.clone();
        (manifest.machine, manifest.commit, manifest.binaries) = (Some(machine), commit, binaries);
        for (name, version) in versions {
            manifest.versions.entry(name).or_insert(version);
        }
    }
}

fn machine() -> Machine {
    use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};
    let what = RefreshKind::nothing()
        .with_cpu(CpuRefreshKind::nothing())
        .with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(what);
    Machine {
        cpu: system
            .cpus()
            .first()
            .map_or("unknown".into(), |cpu| cpu.brand().trim().into()),
        num_cpus: system.cpus().len(),
        mem_bytes: system.total_memory(),
        kernel: System::kernel_version().unwrap_or_default(),
    }
}

fn commit() -> Option<Commit> {
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        let output = command
            .args(args)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_string();
        output.status.success().then_some(text)
    };
    let id = git(&["rev-parse", "HEAD"])?;
    let modified =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| !s.is_empty());
    Some(Commit { id, modified })
}
