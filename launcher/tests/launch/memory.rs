//! A rank that the kernel's out-of-memory killer ends.

use crate::harness::{Scene, finish, start};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use tsm_launch::contain;

const LIMIT: &str = "33554432";

/// A control group that holds no more than [`LIMIT`] bytes; removed when dropped.
struct Small(PathBuf);

impl Small {
    /// `None`, said on stderr, where none can be made.
    fn new() -> Option<Small> {
        let made = Small::second().or_else(|why| Small::first().map_err(|e| format!("{why}; {e}")));
        match made {
            Ok(group) => Some(group),
            Err(why) => {
                eprintln!("skipped: no control group with a limit of memory can be made ({why})");
                None
            }
        }
    }

    /// Version 2.
    fn second() -> Result<Small, String> {
        let own = contain::own_group()?;
        let small = Small::make(&own)?;
        small.write("memory.max").map(|()| {
            let _ = fs_err::write(small.0.join("memory.swap.max"), "0");
            small
        })
    }

    /// Version 1, where systems of both versions have the controller.
    fn first() -> Result<Small, String> {
        let groups = fs_err::read_to_string("/proc/self/cgroup").map_err(|e| e.to_string())?;
        let own = groups.lines().find_map(|line| line.split_once(":memory:"));
        let (_, own) = own.ok_or("version 1 has no memory controller")?;
        let small =
            Small::make(&Path::new("/sys/fs/cgroup/memory").join(own.trim_start_matches('/')))?;
        small.write("memory.limit_in_bytes").map(|()| {
            let _ = fs_err::write(small.0.join("memory.memsw.limit_in_bytes"), LIMIT);
            small
        })
    }

    fn make(own: &Path) -> Result<Small, String> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let path = own.join(format!("tsm-test-memory-{}-{number}", std::process::id()));
        fs_err::create_dir(&path).map_err(|e| e.to_string())?;
        Ok(Small(path))
    }

    fn write(&self, name: &str) -> Result<(), String> {
        let file = self.0.join(name);
        if !file.exists() {
            return Err(format!("there is no {}", file.display()));
        }
        fs_err::write(file, LIMIT).map_err(|e| e.to_string())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        for _ in 0..1000 {
            if fs_err::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

/// Of a program whose rank 1 does as `script` says.
fn report(small: &Small, script: &str) -> (String, String) {
    let scene = Scene::new();
    let script = format!(
        "[ $RANK = 1 ] || exec sleep 1000; {}",
        script.replace("SMALL", &format!("{}/cgroup.procs", small.0.display()))
    );
    let words = [
        "--cpus=2",
        "--grace=5s",
        "--run-dir=run",
        "--",
        "sh",
        "-c",
        &script,
    ];
    let outcome = finish(start(&mut scene.command(&words)));
    assert_eq!(outcome.code, 137, "{}", outcome.err);
    let named = "rank 1 failed first: signal 9 (SIGKILL)";
    assert!(outcome.err.contains(named), "{}", outcome.err);
    let class = scene.json("failure.json")["class"].to_string();
    (outcome.err, class)
}

/// Whether the kernel's log can be read, and names processes as they are numbered here.
fn is_log_ours() -> bool {
    let namespace = fs_err::read_link("/proc/self/ns/pid").unwrap();
    namespace.as_os_str() == "pid:[4026531836]" && fs_err::File::open("/dev/kmsg").is_ok()
}

#[test]
fn the_out_of_memory_killer_is_named() {
    let Some(small) = Small::new() else { return };
    let (err, class) = report(&small, "echo $$ > SMALL && exec tail /dev/zero");
    let killer = match is_log_ours() {
        true => "meaning: the kernel logged: Memory cgroup out of memory: Killed process ",
        false => "the kernel's out-of-memory killer ended ",
    };
    assert!(err.contains(killer), "{err}");
    assert_eq!(class, "\"out_of_memory\"", "{err}");
}

#[test]
fn a_rank_is_not_taken_for_another_that_ran_out_of_memory() {
    let Some(small) = Small::new() else { return };
    if !is_log_ours() {
        eprintln!("skipped: the kernel's log cannot be read, or numbers processes otherwise");
        return;
    }
    let other = "sh -c 'echo $$ > SMALL && exec tail /dev/zero'; kill -9 $$";
    let (err, class) = report(&small, other);
    let cleared = "meaning: killed from outside; the out-of-memory killer ended ";
    assert!(err.contains(cleared), "{err}");
    assert_eq!(class, "\"killed\"", "{err}");
}
