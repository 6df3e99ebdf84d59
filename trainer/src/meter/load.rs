//! What the process, its host and its device are busy with, sampled now and then.

use super::nvml::Gpu;
use std::time::{Duration, Instant};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

/// One sample. `None`: not known here, or (for CPU shares, which compare two samples) not yet.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Resident memory of this process.
    pub mem_bytes: Option<u64>,
    /// Of this process since the last sample, in percent of one core.
    pub cpu_percent: Option<f64>,
    /// Of all cores of the host since the last sample, 0 to 100.
    pub host_cpu_percent: Option<f64>,
    /// Memory in use on the host.
    pub host_mem_bytes: Option<u64>,
    /// Mean number of runnable processes over the last minute.
    pub host_load: Option<f64>,
    /// Percent of the last second in which a kernel ran on the device.
    pub gpu_util_percent: Option<f64>,
    /// Memory in use on the device, by all processes.
    pub gpu_mem_bytes: Option<u64>,
}

/// Samples on the caller's thread, at most once an interval: a few files of `/proc`, under a millisecond.
#[derive(Debug)]
pub struct LoadMeter {
    system: System,
    pid: Option<Pid>,
    gpu: Option<Gpu>,
    every: Duration,
    last: Option<(Instant, Load)>,
}

impl LoadMeter {
    /// `cuda_index` is the device's number in this process, `None` on CPU.
    pub fn new(cuda_index: Option<u32>, every: Duration) -> LoadMeter {
        let visible_devices = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        LoadMeter {
            system: System::new(),
            pid: sysinfo::get_current_pid().ok(),
            gpu: cuda_index.and_then(|index| Gpu::open(index, visible_devices.as_deref())),
            every,
            last: None,
        }
    }

    /// The newest sample, taken now if the last one is older than the interval.
    pub fn load(&mut self, now: Instant) -> Load {
        match self.last {
            Some((taken, load)) if now.saturating_duration_since(taken) < self.every => load,
            _ => {
                let load = self.sample();
                self.last = Some((now, load));
                load
            }
        }
    }

    fn sample(&mut self) -> Load {
        let first = self.last.is_none();
        self.system.refresh_cpu_usage();
        self.system.refresh_memory();
        let process = self.pid.and_then(|pid| {
            let what = ProcessRefreshKind::nothing()
                .with_cpu()
                .with_memory()
                .without_tasks();
            self.system
                .refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, what);
            self.system.process(pid)
        });
        Load {
            mem_bytes: process.map(|p| p.memory()),
            cpu_percent: process.map(|p| f64::from(p.cpu_usage())).filter(|_| !first),
            host_cpu_percent: Some(f64::from(self.system.global_cpu_usage())).filter(|_| !first),
            host_mem_bytes: Some(self.system.used_memory()),
            host_load: Some(System::load_average().one),
            gpu_util_percent: self.gpu.as_ref().and_then(Gpu::utilization_percent),
            gpu_mem_bytes: self.gpu.as_ref().and_then(Gpu::mem_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_this_process_and_keeps_a_sample_for_the_interval() {
        let every = Duration::from_secs(5);
        let mut meter = LoadMeter::new(None, every);
        let start = Instant::now();
        let first = meter.load(start);
        assert!(first.mem_bytes.unwrap() > 1 << 20);
        assert_eq!(
            (first.cpu_percent, first.host_cpu_percent),
            (None, None),
            "shares need two samples"
        );
        assert_eq!((first.gpu_util_percent, first.gpu_mem_bytes), (None, None));
        assert_eq!(meter.load(start + every / 2), first);
        assert!(meter.load(start + every).cpu_percent.unwrap() >= 0.0);
    }
}
