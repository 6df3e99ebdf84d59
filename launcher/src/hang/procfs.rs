//! A process as the kernel shows it in `/proc`: its threads, what they wait for, its children.

use std::collections::HashMap;

use super::process::{Process, Thread};
use super::syscalls;
use crate::stat::Stat;

/// Threads and children that are looked at; a process may have thousands.
const MAX_THREADS: usize = 512;
const MAX_CHILDREN: usize = 16;
/// Functions of the kernel that are shown.
const MAX_KERNEL_FRAMES: usize = 8;

/// Children of every process.
pub fn family() -> HashMap<i32, Vec<i32>> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    let entries = fs_err::read_dir("/proc").into_iter().flatten().flatten();
    for entry in entries {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        if let Some(stat) = Stat::read(pid) {
            children.entry(stat.parent).or_default().push(pid);
        }
    }
    children
}

/// What can be read without waiting. Takes what it follows out of `family`: read while numbers are used again, that can
/// have a process below itself.
pub fn from_kernel(pid: i32, family: &mut HashMap<i32, Vec<i32>>) -> Process {
    let tids = fs_err::read_dir(format!("/proc/{pid}/task"));
    let mut tids: Vec<i32> = (tids.into_iter().flatten().flatten())
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect();
    // The main thread has the number of the process; others have higher ones, until numbers start again.
    tids.sort_unstable_by_key(|&tid| (tid != pid, tid));
    let status = read(format!("/proc/{pid}/status")).unwrap_or_default();
    let rss_kib = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let rss_kib = rss_kib.and_then(|l| l.split_ascii_whitespace().next()?.parse().ok());
    let mut children = family.remove(&pid).unwrap_or_default();
    children.sort_unstable();
    let mut process = Process {
        pid,
        rss_bytes: rss_kib.unwrap_or(0u64) << 10,
        threads: (tids.iter().take(MAX_THREADS))
            .filter_map(|&tid| thread(pid, tid))
            .collect(),
        children: (children.iter().take(MAX_CHILDREN))
            .map(|&child| from_kernel(child, family))
            .collect(),
        ..Process::default()
    };
    for (all, most, what) in [
        (tids.len(), MAX_THREADS, "threads"),
        (children.len(), MAX_CHILDREN, "children"),
    ] {
        if all > most {
            process.notes.push(format!(
                "{most} of {all} {what} of process {pid} were looked at"
            ));
        }
    }
    process
}

fn thread(pid: i32, tid: i32) -> Option<Thread> {
    let of = |name: &str| read(format!("/proc/{pid}/task/{tid}/{name}"));
    let stat = Stat::of_thread(pid, tid)?;
    let wchan = of("wchan").filter(|w| !w.is_empty() && w != "0");
    let syscall = of("syscall").and_then(|line| parse_syscall(&line));
    // A running thread has no stack in the kernel that would mean anything.
    let kernel_stack = if stat.state == 'D' {
        of("stack").map(|s| parse_kernel_stack(&s))
    } else {
        None
    };
    Some(Thread {
        tid,
        name: stat.name,
        state: stat.state,
        wchan,
        syscall: syscall.map(|call| call.text(|fd| target(pid, fd))),
        kernel_stack: kernel_stack.unwrap_or_default(),
    })
}

fn read(path: String) -> Option<String> {
    let bytes = fs_err::read(path).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim_end().to_string())
}

/// Its arguments, in at most 300 characters.
pub fn command_line(pid: i32) -> Option<String> {
    let text = read(format!("/proc/{pid}/cmdline"))?;
    let words = text.trim_matches('\0').replace('\0', " ");
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let short: String = words.chars().map(printable).take(300).collect();
    (!short.is_empty()).then_some(short)
}

/// What a descriptor is: a path, a pipe, a socket and its ends.
fn target(pid: i32, fd: u64) -> Option<String> {
    let link = fs_err::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
    let link = link.to_string_lossy().into_owned();
    let inode = link
        .strip_prefix("socket:[")
        .map(|i| i.trim_end_matches(']'));
    let Some(inode) = inode else {
        return Some(link);
    };
    let ends = ["tcp", "tcp6"].iter().find_map(|table| {
        let table = read(format!("/proc/{pid}/net/{table}"))?;
        table.lines().find_map(|row| parse_tcp(row, inode))
    });
    Some(ends.unwrap_or_else(|| "a socket".into()))
}

pub fn is_python(pid: i32) -> bool {
    let exe = fs_err::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let named = |name: &str| name.starts_with("python") || name.starts_with("pypy");
    let embedded = || read(format!("/proc/{pid}/maps")).is_some_and(|m| m.contains("/libpython"));
    exe.file_name().is_some_and(|n| named(&n.to_string_lossy())) || embedded()
}

#[derive(Debug, PartialEq)]
struct Syscall {
    number: i64,
    first: u64,
}

/// A line of `/proc/<pid>/syscall`: `running`, `-1 sp pc`, or the number, six arguments, sp and pc.
fn parse_syscall(line: &str) -> Option<Syscall> {
    let mut words = line.split_ascii_whitespace();
    let number = words.next()?.parse().ok().filter(|n| *n >= 0)?;
    let first = words.next()?.strip_prefix("0x")?;
    Some(Syscall {
        number,
        first: u64::from_str_radix(first, 16).ok()?,
    })
}

impl Syscall {
    /// `futex`, or `read of fd 5 (/data/clip.avi)`.
    fn text(&self, target: impl Fn(u64) -> Option<String>) -> String {
        let Some((name, has_fd)) = syscalls::name(self.number) else {
            return format!("system call {}", self.number);
        };
        if !has_fd {
            return name.into();
        }
        match target(self.first) {
            Some(what) => format!("{name} of fd {} ({what})", self.first),
            None => format!("{name} of fd {}", self.first),
        }
    }
}

/// Names of functions from lines such as `[<0>] nfs_wait_bit_killable+0x1e/0x90`.
fn parse_kernel_stack(text: &str) -> Vec<String> {
    let name = |line: &str| {
        let function = line.split_ascii_whitespace().nth(1)?;
        Some(function.split('+').next()?.to_string())
    };
    text.lines()
        .filter_map(name)
        .take(MAX_KERNEL_FRAMES)
        .collect()
}

/// `TCP 10.0.0.1:4242 to 10.0.0.2:5353` from a row of `/proc/net/tcp` or `tcp6` with this inode.
fn parse_tcp(row: &str, inode: &str) -> Option<String> {
    let fields: Vec<&str> = row.split_ascii_whitespace().collect();
    if fields.get(9) != Some(&inode) {
        return None;
    }
    let address = |text: &str| {
        let (address, port) = text.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        // Words of four bytes in the order of this machine.
        let words = (0..address.len() / 8)
            .map(|i| u32::from_str_radix(&address[i * 8..i * 8 + 8], 16).map(u32::to_ne_bytes));
        let bytes: Vec<u8> = words.collect::<Result<Vec<_>, _>>().ok()?.concat();
        let address: std::net::IpAddr = match <[u8; 16]>::try_from(bytes.as_slice()) {
            Ok(bytes) => std::net::Ipv6Addr::from(bytes).to_canonical(),
            Err(_) => <[u8; 4]>::try_from(bytes.as_slice()).ok()?.into(),
        };
        Some(std::net::SocketAddr::from((address, port)).to_string())
    };
    let (local, peer) = (address(fields[1])?, address(fields[2])?);
    Some(match fields[3] {
        "0A" => format!("TCP, listens on {local}"),
        "01" => format!("TCP {local} to {peer}"),
        "02" => format!("TCP {local} to {peer}, which has not accepted"),
        "08" => format!("TCP {local} to {peer}, which has closed it"),
        _ => format!("TCP {local} to {peer}, being closed"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_below_itself_is_looked_at_once_more_and_no_further() {
        let me = std::process::id() as i32;
        let mut family = HashMap::from([(me, vec![me])]);
        let process = from_kernel(me, &mut family);
        let below = process.children.iter().map(|p| (p.pid, p.children.len()));
        assert_eq!(below.collect::<Vec<_>>(), [(me, 0)]);
    }

    #[test]
    fn the_kernels_lines_are_read() {
        assert_eq!(parse_syscall("running"), None);
        assert_eq!(parse_syscall("-1 0x7ffc 0x7f3a"), None);
        let line = format!(
            "{} 0x5 0x7f 0x20000 0x0 0x0 0x0 0x7ffe 0x7fbe",
            libc::SYS_read
        );
        let read = parse_syscall(&line).unwrap();
        let file = |_| Some("/data/clip.avi".to_string());
        assert_eq!(read.text(file), "read of fd 5 (/data/clip.avi)");
        assert_eq!(read.text(|_| None), "read of fd 5");
        let futex = Syscall {
            number: libc::SYS_futex,
            first: 5,
        };
        assert_eq!(futex.text(file), "futex");
        let unknown = Syscall {
            number: 9999,
            first: 5,
        };
        assert_eq!(unknown.text(file), "system call 9999");
        let stack = "[<0>] nfs_wait_bit_killable+0x1e/0x90\n[<0>] nfs_read+0x1/0x2\n";
        assert_eq!(
            parse_kernel_stack(stack),
            ["nfs_wait_bit_killable", "nfs_read"]
        );
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_socket_is_its_two_ends() {
        let v4 = "  12: 0100007F:1092 0200000A:14E9 01 00000000:00000000 00:00000000 00000000  0 0 4711 1 0";
        let text = parse_tcp(v4, "4711").unwrap();
        assert_eq!(text, "TCP 127.0.0.1:4242 to 10.0.0.2:5353");
        assert_eq!(parse_tcp(v4, "4712"), None);
        let v6 = "   0: 00000000000000000000000001000000:6D7C 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 9 1";
        assert_eq!(parse_tcp(v6, "9").unwrap(), "TCP, listens on [::1]:28028");
        assert_eq!(parse_tcp("  sl  local_address", "9"), None);
    }
}
