//! A rank that the kernel's out-of-memory killer ends.

use crate::harness::{Scene, finish, start};
use std::path::{Path, PathBuf};
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
        let path = own.join(format!("tsm-test-memory-{}", std::process::id()));
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

#[test]
fn the_out_of_memory_killer_is_named() {
    let Some(small) = Small::new() else { return };
    let scene = Scene::new();
    // `tail` keeps all that it reads, since no line of it ends.
    let script = format!(
        "[ $RANK = 1 ] || exec sleep 1000; echo $$ > {}/cgroup.procs && exec tail /dev/zero",
        small.0.display()
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
    let killer = "the kernel's out-of-memory killer ended ";
    for part in ["rank 1 failed first: signal 9 (SIGKILL)", killer] {
        assert!(outcome.err.contains(part), "{part}\n{}", outcome.err);
    }
    assert_eq!(scene.json("failure.json")["class"], "out_of_memory");
}
