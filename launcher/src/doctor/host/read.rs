//! The machine as the kernel tells of it.

use rustix::process::{Resource, getrlimit, getuid};
use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};

use super::Host;
use crate::cores;

pub fn read() -> Host {
    let memory = text("/proc/meminfo");
    let kib = |name: &str| field(&memory, name).map_or(0, |kib| kib * 1024);
    let groups = text("/proc/self/cgroup");
    let smallest = |files: Vec<PathBuf>| files.iter().filter_map(|path| number(path)).min();
    let mem_bytes = kib("MemTotal");
    Host {
        kernel: text("/proc/sys/kernel/osrelease").trim().into(),
        cpu: cpu(&text("/proc/cpuinfo")),
        num_cpus: cores::allowed().len() as u32,
        quota: quota(&groups),
        mem_bytes,
        mem_available: kib("MemAvailable"),
        // Version 1 writes a huge number for no limit.
        mem_limit: smallest(limit_files(
            &groups,
            "memory",
            "memory.limit_in_bytes",
            "memory.max",
        ))
        .filter(|limit| *limit < mem_bytes),
        swap_used: kib("SwapTotal").saturating_sub(kib("SwapFree")),
        shm_bytes: rustix::fs::statvfs("/dev/shm").map_or(0, |fs| fs.f_blocks * fs.f_frsize),
        open_files: getrlimit(Resource::Nofile).maximum,
        threads_left: threads_left(&groups),
        file_bytes: getrlimit(Resource::Fsize).current,
        locked_bytes: getrlimit(Resource::Memlock).current,
        core_bytes: getrlimit(Resource::Core).current,
        rdma: fs_err::read_dir("/sys/class/infiniband").is_ok_and(|mut all| all.next().is_some()),
        ports: pair(&text("/proc/sys/net/ipv4/ip_local_port_range")),
        backlog: number(Path::new("/proc/sys/net/core/somaxconn")),
        ptrace_scope: number(Path::new("/proc/sys/kernel/yama/ptrace_scope")),
        clock_synchronised: clock_synchronised(),
    }
}

fn text(path: impl AsRef<Path>) -> String {
    fs_err::read_to_string(path.as_ref()).unwrap_or_default()
}

/// The number that a file consists of; none where it says `max`.
fn number(path: &Path) -> Option<u64> {
    text(path).trim().parse().ok()
}

/// `MemTotal:   123 kB`
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

fn pair(text: &str) -> Option<(u64, u64)> {
    let mut numbers = text.split_whitespace().map_while(|word| word.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

fn cpu(info: &str) -> String {
    let named = |key: &str| {
        let line = info.lines().find(|line| line.starts_with(key))?;
        line.split_once(':')
            .map(|(_, value)| value.trim().to_string())
    };
    // ARM has no name there, only the numbers of maker and part.
    let part = || {
        Some(format!(
            "{} implementer {} part {}",
            std::env::consts::ARCH,
            named("CPU implementer")?,
            named("CPU part")?
        ))
    };
    named("model name")
        .or_else(part)
        .unwrap_or_else(|| std::env::consts::ARCH.into())
}

/// The files that may limit the control group described by `/proc/self/cgroup`: its own and those of all groups
/// above it. In a container the path may be the host's, and only the root is there.
fn limit_files(groups: &str, controller: &str, v1: &str, v2: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (root, file) = match controllers {
            "" => (PathBuf::from("/sys/fs/cgroup"), v2),
            list if list.split(',').any(|name| name == controller) => {
                (Path::new("/sys/fs/cgroup").join(list), v1)
            }
            _ => continue,
        };
        let own = root.join(path.trim_start_matches('/'));
        let above = own
            .ancestors()
            .take_while(|folder| folder.starts_with(&root));
        files.extend(above.map(|folder| folder.join(file)));
    }
    files
}

fn quota(groups: &str) -> Option<f64> {
    let share = |path: &PathBuf| {
        let (quota, period) = match path.file_name()?.to_str()? {
            "cpu.max" => pair(&text(path))?,
            // -1 for none.
            _ => (
                number(path)?,
                number(&path.with_file_name("cpu.cfs_period_us"))?,
            ),
        };
        (period > 0).then(|| quota as f64 / period as f64)
    };
    let files = limit_files(groups, "cpu", "cpu.cfs_quota_us", "cpu.max");
    files.iter().filter_map(share).min_by(f64::total_cmp)
}

fn threads_left(groups: &str) -> Option<u64> {
    // `0.10 0.20 0.30 2/512 1234`: 512 of all users.
    let load = text("/proc/loadavg");
    let all = load
        .split('/')
        .nth(1)
        .and_then(|rest| rest.split(' ').next()?.parse().ok())
        .unwrap_or(0u64);
    let of_machine = ["pid_max", "threads-max"].map(|name| {
        let limit = number(&Path::new("/proc/sys/kernel").join(name))?;
        Some(limit.saturating_sub(all))
    });
    let of_group = limit_files(groups, "pids", "pids.max", "pids.max")
        .into_iter()
        .map(|path| {
            let used = number(&path.with_file_name("pids.current")).unwrap_or(0);
            Some(number(&path)?.saturating_sub(used))
        });
    // The limit of a user; what that user already runs elsewhere is not known without looking at all processes.
    let of_user = if getuid().is_root() {
        None
    } else {
        getrlimit(Resource::Nproc).current
    };
    of_machine
        .into_iter()
        .chain(of_group)
        .chain([of_user])
        .flatten()
        .min()
}

/// What the kernel was told by chrony, ntpd or systemd-timesyncd.
#[expect(unsafe_code, reason = "no safe crate here has adjtimex")]
fn clock_synchronised() -> Option<bool> {
    // SAFETY: all-zero bytes are a valid `timex`, whose `modes` then asks to change nothing; the kernel fills it in.
    let (state, time) = unsafe {
        let mut time: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&mut time), time)
    };
    (state >= 0).then_some(time.status & libc::STA_UNSYNC == 0)
}

/// Whether this machine's name leads to an address; may wait for a name server.
pub fn name_resolves() -> bool {
    let name = crate::manifest::host();
    (name.as_str(), 0)
        .to_socket_addrs()
        .is_ok_and(|mut found| found.next().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_a_control_group_and_those_above_it() {
        let files = |groups: &str| -> Vec<String> {
            let files = limit_files(groups, "cpu", "v1", "v2");
            files
                .iter()
                .map(|path| path.to_string_lossy().into_owned())
                .collect()
        };
        assert_eq!(
            files("0::/system.slice/job\n"),
            [
                "/sys/fs/cgroup/system.slice/job/v2",
                "/sys/fs/cgroup/system.slice/v2",
                "/sys/fs/cgroup/v2"
            ]
        );
        assert_eq!(
            files("3:cpu,cpuacct:/docker/1\n2:cpuset:/\n"),
            [
                "/sys/fs/cgroup/cpu,cpuacct/docker/1/v1",
                "/sys/fs/cgroup/cpu,cpuacct/docker/v1",
                "/sys/fs/cgroup/cpu,cpuacct/v1"
            ]
        );
        assert_eq!(files(""), [""; 0]);
    }

    #[test]
    fn the_kernels_files_are_read() {
        assert_eq!(
            field("MemTotal:  1024 kB\nMemFree: 7 kB\n", "MemFree"),
            Some(7)
        );
        assert_eq!(field("MemTotal:  1024 kB\n", "Mem"), None);
        assert_eq!(pair("32768\t60999\n"), Some((32_768, 60_999)));
        assert_eq!(pair("max 100000"), None);
        assert_eq!(
            cpu("processor : 0\nmodel name\t: AMD EPYC\nmodel name : x\n"),
            "AMD EPYC"
        );
        assert!(
            cpu("CPU implementer\t: 0x41\nCPU part\t: 0xd40\n")
                .ends_with("implementer 0x41 part 0xd40")
        );
    }
}
