//! Cores, memory, limits, ports, name and clock of this machine: whether they do for a job.

mod read;

use crate::cluster::message::Finding;
use crate::text::{count, size};
pub use read::{name_resolves, read};

/// Shared memory in which a rank's loader processes hand over their batches.
const SHM_PER_RANK: u64 = 64 << 20;
const MEM_PER_RANK: u64 = 1 << 30;
/// Threads of a rank: CUDA's, NCCL's, the loaders' and a pool or two.
const THREADS_PER_RANK: u64 = 256;
const PORTS_PER_RANK: u64 = 64;
const MIN_PORTS: u64 = 1000;
/// Ports for connections that leave enough to those who listen.
const WIDE: (u64, u64) = (10_240, 65_535);
const MIN_FILES: u64 = 4096;
/// A checkpoint of a large model, or the output of a rank over weeks.
const MIN_FILE: u64 = 16 << 30;
const MIN_BACKLOG: u64 = 128;
const SWAPPED: u64 = 1 << 30;

/// The machine as this process sees it. A limit that is `None` does not exist.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Host {
    pub kernel: String,
    pub cpu: String,
    /// Cores that this process may use.
    pub num_cpus: u32,
    /// Share of the CPUs that its control group gets, in cores.
    pub quota: Option<f64>,
    pub mem_bytes: u64,
    pub mem_available: u64,
    /// Of the control group.
    pub mem_limit: Option<u64>,
    pub swap_used: u64,
    /// 0: there is no /dev/shm.
    pub shm_bytes: u64,
    /// The hard limit; the soft one is raised when workers start.
    pub open_files: Option<u64>,
    /// Further processes and threads that may be started.
    pub threads_left: Option<u64>,
    /// That a file may have.
    pub file_bytes: Option<u64>,
    pub locked_bytes: Option<u64>,
    pub core_bytes: Option<u64>,
    /// There are InfiniBand or RoCE devices.
    pub rdma: bool,
    pub ports: Option<(u64, u64)>,
    pub backlog: Option<u64>,
    /// Of the Yama security module; 0: a user may trace all own processes.
    pub ptrace_scope: Option<u64>,
    pub clock_synchronised: Option<bool>,
}

pub fn judge_name(name: &str, resolves: bool) -> Vec<Finding> {
    let text = match resolves {
        true => format!("this machine's name, {name}, leads to an address"),
        false => format!(
            "this machine's name, {name}, leads to no address; nothing here needs it, other programs may"
        ),
    };
    vec![Finding::ok("network", text)]
}

/// Judges by what `num_ranks` workers need.
pub fn judge(host: &Host, num_ranks: u32) -> Vec<Finding> {
    let ranks = count(num_ranks, "rank");
    let num_ranks = u64::from(num_ranks.max(1));
    let mut found = Vec::new();
    cpu_and_memory(host, num_ranks, &ranks, &mut found);
    limits(host, num_ranks, &ranks, &mut found);
    network_and_clock(host, num_ranks, &ranks, &mut found);
    found
}

fn cpu_and_memory(host: &Host, num_ranks: u64, ranks: &str, found: &mut Vec<Finding>) {
    let own = count(host.num_cpus, "core");
    match host.quota {
        Some(quota) if quota < num_ranks as f64 => found.push(Finding::warning(
            "cpu",
            format!("this control group gets {quota:.1} of {own} for {ranks}"),
            "ask the scheduler or the container for more (--cpus-per-task, --cpus)",
        )),
        _ if u64::from(host.num_cpus) < num_ranks => found.push(Finding::warning(
            "cpu",
            format!("{own} for {ranks}; they will wait for each other"),
            "start fewer, or ask the scheduler for more cores (--cpus-per-task)",
        )),
        Some(quota) => found.push(Finding::ok(
            "cpu",
            format!("{own} of {}, at most {quota:.1} at a time", host.cpu),
        )),
        None => found.push(Finding::ok("cpu", format!("{own} of {}", host.cpu))),
    }
    let available = host
        .mem_limit
        .map_or(host.mem_available, |limit| limit.min(host.mem_available));
    let (free, all) = (size(available), size(host.mem_bytes));
    let limit = host.mem_limit.map_or(String::new(), |limit| {
        format!(", this control group may use {}", size(limit))
    });
    if available < num_ranks * MEM_PER_RANK {
        let text = format!("{free} of {all} memory are available for {ranks}{limit}");
        found.push(Finding::warning(
            "memory",
            text,
            "end other programs or ask for more (--mem), or the kernel will end a rank",
        ));
    } else {
        found.push(Finding::ok(
            "memory",
            format!("{free} of {all} available{limit}"),
        ));
    }
    if host.swap_used > SWAPPED {
        let text = format!("{} of memory are swapped out", size(host.swap_used));
        found.push(Finding::warning(
            "memory",
            text,
            "ranks stall when their memory is swapped; end other programs",
        ));
    }
    let shm = size(host.shm_bytes);
    if host.shm_bytes < num_ranks * SHM_PER_RANK {
        let text = format!("/dev/shm has {shm} for {ranks}");
        let hint = "PyTorch's DataLoader workers end with a bus error when it is full: mount it larger (docker run --shm-size=8g, or --ipc=host)";
        found.push(Finding::warning("shm", text, hint));
    } else {
        found.push(Finding::ok("shm", format!("/dev/shm has {shm}")));
    }
}

fn limits(host: &Host, num_ranks: u64, ranks: &str, found: &mut Vec<Finding>) {
    let before = found.len();
    if let Some(n) = host.open_files.filter(|n| *n < MIN_FILES) {
        let text = format!("a process may open {n} files");
        found.push(Finding::warning("limits", text, "raise the hard limit: nofile in /etc/security/limits.conf, LimitNOFILE= of systemd, docker run --ulimit nofile=65536"));
    }
    if let Some(n) = host
        .threads_left
        .filter(|n| *n < num_ranks * THREADS_PER_RANK)
    {
        let text = format!("{n} further processes and threads may be started for {ranks}");
        found.push(Finding::warning("limits", text, "raise nproc in /etc/security/limits.conf, TasksMax= of systemd, or docker run --pids-limit"));
    }
    if let Some(bytes) = host.file_bytes.filter(|bytes| *bytes < MIN_FILE) {
        let text = format!("a file may have {} at most", size(bytes));
        found.push(Finding::warning("limits", text, "a program that writes a larger checkpoint or log ends by SIGXFSZ: raise ulimit -f, fsize in /etc/security/limits.conf, or LimitFSIZE= of systemd"));
    }
    if let Some(bytes) = host.locked_bytes.filter(|_| host.rdma) {
        let text = format!(
            "there are RDMA devices, and only {} of memory may be locked",
            size(bytes)
        );
        found.push(Finding::warning("limits", text, "NCCL cannot register its buffers then: memlock unlimited in /etc/security/limits.conf, LimitMEMLOCK=infinity, or docker run --ulimit memlock=-1"));
    }
    if found.len() == before {
        let files = host
            .open_files
            .map_or("any number of".into(), |n| n.to_string());
        let cores = if host.core_bytes == Some(0) {
            "no core dumps"
        } else {
            "core dumps are on"
        };
        found.push(Finding::ok(
            "limits",
            format!("{files} open files, {cores}"),
        ));
    }
    if let Some(scope @ 1..) = host.ptrace_scope {
        let who = if scope == 1 { "a parent" } else { "root" };
        found.push(Finding::ok("limits", format!("only {who} may look into another process (ptrace_scope is {scope}): no stacks of a hung rank for py-spy and gdb")));
    }
}

fn network_and_clock(host: &Host, num_ranks: u64, ranks: &str, found: &mut Vec<Finding>) {
    if let Some((low, high)) = host.ports {
        let number = (high + 1).saturating_sub(low);
        if number < MIN_PORTS.max(num_ranks * PORTS_PER_RANK) {
            let text = format!("{number} ports ({low}-{high}) for the connections of {ranks}");
            let hint = if number < WIDE.1 - WIDE.0 + 1 {
                let (low, high) = WIDE;
                format!(
                    "widen the range, e.g. sysctl -w net.ipv4.ip_local_port_range='{low} {high}'"
                )
            } else {
                "the range is as wide as it should be: start fewer ranks on this machine".into()
            };
            found.push(Finding::warning("network", text, hint));
        } else {
            found.push(Finding::ok(
                "network",
                format!("{number} ports for connections"),
            ));
        }
    }
    if let Some(n) = host.backlog.filter(|n| *n < MIN_BACKLOG) {
        let text = format!("{n} connections may wait to be accepted (net.core.somaxconn)");
        found.push(Finding::warning(
            "network",
            text,
            "sysctl -w net.core.somaxconn=4096",
        ));
    }
    let clock = match host.clock_synchronised {
        Some(true) => "the clock is kept right over the network",
        Some(false) => {
            "nothing (chrony, ntpd, systemd-timesyncd) keeps the clock right; those of other nodes may drift from it"
        }
        None => "whether the clock is kept right is not known",
    };
    found.push(Finding::ok("clock", clock.to_string()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::message::Severity;

    fn good() -> Host {
        Host {
            kernel: "6.1".into(),
            cpu: "EPYC".into(),
            num_cpus: 96,
            mem_bytes: 512 << 30,
            mem_available: 400 << 30,
            shm_bytes: 256 << 30,
            open_files: Some(1 << 20),
            threads_left: Some(100_000),
            locked_bytes: Some(64 << 10),
            core_bytes: Some(0),
            ports: Some((32_768, 60_999)),
            backlog: Some(4096),
            ptrace_scope: Some(0),
            clock_synchronised: Some(true),
            ..Host::default()
        }
    }

    /// The area of what is not well with 8 ranks.
    fn bad(change: impl Fn(&mut Host)) -> Vec<String> {
        let mut host = good();
        change(&mut host);
        let found = judge(&host, 8).into_iter();
        found
            .filter(|f| f.severity > Severity::Ok)
            .map(|f| f.area)
            .collect()
    }

    /// Linux's own range is too small for many ranks on one machine.
    #[test]
    fn a_range_of_ports_is_widened_as_far_as_is_right() {
        let hint = |ports, num_ranks| {
            let host = Host {
                ports: Some(ports),
                ..good()
            };
            let found = judge(&host, num_ranks).into_iter();
            let mut found = found.filter(|f| f.area == "network" && f.severity > Severity::Ok);
            found.next().map(|f| f.hint)
        };
        assert_eq!(hint((32_768, 60_999), 8), None);
        let widened = hint((32_768, 60_999), 1000).unwrap();
        assert!(widened.ends_with("'10240 65535'"), "{widened}");
        for ports in [(10_240, 65_535), (1024, 60_999)] {
            let fewer = hint(ports, 1000).unwrap();
            assert!(fewer.ends_with("fewer ranks on this machine"), "{fewer}");
        }
    }

    #[test]
    fn what_eight_ranks_need() {
        assert_eq!(bad(|_| {}), [""; 0]);
        assert_eq!(bad(|h| h.num_cpus = 7), ["cpu"]);
        assert_eq!(bad(|h| h.quota = Some(7.5)), ["cpu"]);
        assert_eq!(bad(|h| h.quota = Some(8.0)), [""; 0]);
        assert_eq!(bad(|h| h.mem_available = 7 << 30), ["memory"]);
        assert_eq!(bad(|h| h.mem_limit = Some(4 << 30)), ["memory"]);
        assert_eq!(bad(|h| h.swap_used = 2 << 30), ["memory"]);
        assert_eq!(bad(|h| h.shm_bytes = 64 << 20), ["shm"]);
        assert_eq!(bad(|h| h.open_files = Some(1024)), ["limits"]);
        assert_eq!(bad(|h| h.open_files = None), [""; 0]);
        assert_eq!(bad(|h| h.threads_left = Some(2047)), ["limits"]);
        assert_eq!(bad(|h| h.file_bytes = Some(4 << 10)), ["limits"]);
        assert_eq!(bad(|h| h.file_bytes = Some(1 << 40)), [""; 0]);
        assert_eq!(bad(|h| h.rdma = true), ["limits"]);
        assert_eq!(bad(|h| (h.rdma, h.locked_bytes) = (true, None)), [""; 0]);
        assert_eq!(bad(|h| h.ports = Some((40_000, 40_998))), ["network"]);
        assert_eq!(bad(|h| h.backlog = Some(64)), ["network"]);
        assert_eq!(
            bad(|h| h.clock_synchronised = Some(false)),
            [""; 0],
            "only a note"
        );
        assert_eq!(bad(|h| h.ptrace_scope = Some(3)), [""; 0], "only a note");
    }
}
