//! `tsm-launch doctor` and the preflight: whether this machine can run a job.
//!
//! Every part reads the machine into plain data at one place, and judges that data in a pure function. What may
//! hang on a broken machine (a driver, a network file system, a name server) is read on a thread of its own and
//! given up after a while.

mod across;
pub mod cli;
mod clock;
mod disk;
mod gpu;
mod host;
pub mod kmsg;
mod nccl;
pub mod preflight;
mod show;

pub use across::{across, late, of_nodes};
pub use clock::{ClockSample, clock_findings, now_ms};
pub use show::print;

use std::fmt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::cluster::message::{Facts, Finding, Severity};
use crate::gpus::Gpu;
use crate::limits;

/// A driver that starts up takes seconds where persistence mode is off; a broken one takes forever.
const PATIENCE: Duration = Duration::from_secs(15);
/// For what is only worth a note.
const SHORT_PATIENCE: Duration = Duration::from_millis(300);

/// What the job wants of this node.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// The GPUs that it will use; none: it runs on the CPU.
    pub gpus: Vec<Gpu>,
    /// Workers on this node.
    pub num_ranks: u32,
    /// Folders that it writes to; they need not exist yet.
    pub folders: Vec<PathBuf>,
    /// Its program, whose libraries are looked at.
    pub trainer: Option<PathBuf>,
}

/// Looks at this node: less than a second, unless something hangs.
pub fn facts(context: &Context) -> Facts {
    let gpu = background({
        let gpus = context.gpus.clone();
        move || gpu::read(&gpus)
    });
    let disks: Vec<_> = disk::distinct(&context.folders)
        .into_iter()
        .map(|folder| {
            let what = folder.clone();
            (folder, background(move || disk::read(&what)))
        })
        .collect();
    let nccl = background({
        let (trainer, wanted) = (context.trainer.clone(), !context.gpus.is_empty());
        move || wanted.then(|| nccl::find(trainer.as_deref()))?
    });
    let name = background(host::name_resolves);
    let host = host::read();

    let deadline = Instant::now() + PATIENCE;
    let gpu = answer(&gpu, deadline);
    let nccl = answer(&nccl, deadline).flatten();
    let mut findings = match &gpu {
        Some(reading) => gpu::judge(reading),
        None => vec![Finding::error(
            "gpu",
            format!("the NVIDIA driver does not answer within {PATIENCE:?}"),
            "look at the kernel log (dmesg | grep NVRM); the machine may need a restart",
        )],
    };
    findings.extend(nccl::judge(nccl.as_ref(), !context.gpus.is_empty()));
    for (folder, disk) in disks {
        findings.extend(match answer(&disk, deadline) {
            Some(disk) => disk::judge(&folder, &disk),
            None => vec![Finding::error(
                "disk",
                format!("{} does not answer within {PATIENCE:?}", folder.display()),
                "its file system hangs; look at its server, or take another folder with --run-dir",
            )],
        });
    }
    findings.extend(host::judge(&host, context.num_ranks));
    findings.push(crate::contain::finding());
    let resolved = answer(&name, Instant::now() + SHORT_PATIENCE).unwrap_or(false);
    findings.extend(host::judge_name(&crate::manifest::host(), resolved));
    Facts {
        driver: gpu.and_then(|reading| reading.driver),
        nccl: nccl.map(|nccl| nccl.version),
        kernel: host.kernel,
        cpu: host.cpu,
        num_cpus: host.num_cpus,
        mem_bytes: host.mem_bytes,
        clock_ms: clock::now_ms(),
        findings,
    }
}

impl Finding {
    pub fn ok(area: &str, text: impl Into<String>) -> Finding {
        Finding::new(Severity::Ok, area, text, "")
    }

    pub fn warning(area: &str, text: impl Into<String>, hint: impl Into<String>) -> Finding {
        Finding::new(Severity::Warning, area, text, hint)
    }

    pub fn error(area: &str, text: impl Into<String>, hint: impl Into<String>) -> Finding {
        Finding::new(Severity::Error, area, text, hint)
    }

    fn new(
        severity: Severity,
        area: &str,
        text: impl Into<String>,
        hint: impl Into<String>,
    ) -> Finding {
        let (area, text, hint) = (area.into(), text.into(), hint.into());
        Finding {
            severity,
            area,
            text,
            hint,
        }
    }
}

impl fmt::Display for Finding {
    /// With its hint on a line of its own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  hint: {}", self.text, self.hint)
    }
}

/// Runs `work` on a thread that is left behind if it hangs.
fn background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (done, result) = channel();
    limits::beside("doctor", move || drop(done.send(work())));
    result
}

fn answer<T>(result: &Receiver<T>, deadline: Instant) -> Option<T> {
    let left = deadline.saturating_duration_since(Instant::now());
    result.recv_timeout(left).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_described() {
        let folder = tempfile::tempdir().unwrap();
        let context = Context {
            num_ranks: 1,
            folders: vec![folder.path().join("runs/a")],
            ..Context::default()
        };
        let facts = facts(&context);
        assert!(facts.num_cpus > 0 && facts.mem_bytes > 0, "{facts:?}");
        assert!(
            !facts.kernel.is_empty() && !facts.cpu.is_empty(),
            "{facts:?}"
        );
        for area in ["disk", "limits", "memory", "cpu", "network", "clock"] {
            assert!(
                facts.findings.iter().any(|f| f.area == area),
                "{area}: {facts:?}"
            );
        }
        for finding in &facts.findings {
            assert_eq!(
                finding.severity == Severity::Ok,
                finding.hint.is_empty(),
                "{finding:?}"
            );
        }
        assert_eq!(
            fs_err::read_dir(folder.path()).unwrap().count(),
            0,
            "nothing is left behind"
        );
    }
}
