//! A rank that SIGKILL does not end.

use crate::harness::{Scene, finish, until};
use std::path::{Path, PathBuf};

/// A control group of version 1 whose processes stand still in state D, and hear of no signal, while it is frozen.
/// (One of version 2 lets SIGKILL through.) Thawed and removed when dropped.
struct Freezer(PathBuf);

impl Freezer {
    /// `None`, said on stderr, where there is none.
    fn new() -> Option<Freezer> {
        let groups = fs_err::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = groups.lines().find_map(|line| line.split_once(":freezer:"));
        let own = own.map_or("/", |(_, own)| own).trim_start_matches('/');
        let path = Path::new("/sys/fs/cgroup/freezer").join(own);
        let path = path.join(format!("tsm-test-{}", std::process::id()));
        match fs_err::create_dir(&path) {
            Ok(()) => Some(Freezer(path)),
            Err(e) => {
                eprintln!("skipped: no freezer of version 1 ({e}); nothing else makes such a rank");
                None
            }
        }
    }

    fn freeze(&self, pid: i32) {
        fs_err::write(self.0.join("cgroup.procs"), pid.to_string()).expect("it runs");
        let state = self.0.join("freezer.state");
        fs_err::write(&state, "FROZEN").expect("a group");
        until("the rank to stand still", || {
            let text = fs_err::read_to_string(&state).expect("a group");
            (text.trim() == "FROZEN").then_some(())
        });
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _ = fs_err::write(self.0.join("freezer.state"), "THAWED");
        for _ in 0..1000 {
            if fs_err::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

#[test]
fn a_rank_in_state_d_is_named_and_not_waited_for() {
    let Some(freezer) = Freezer::new() else {
        return;
    };
    let scene = Scene::new();
    let path = |name| scene.path(name).display().to_string();
    let (ready, go) = (path("ready"), path("go"));
    let actions = format!("--touch {ready}{{rank}} --wait-for {go} --on-rank 0 --exit 7");
    let running = scene.start("--cpus 2 --grace 1s", &actions);
    let pids = scene.wait_for_pids("ready", 2);
    freezer.freeze(pids[1]);
    fs_err::write(&go, "").unwrap();
    // It ends while the rank is frozen.
    let outcome = finish(running);
    let err = &outcome.err;
    assert_eq!(outcome.code, 7, "{err}");
    assert!(err.contains("rank 0 failed first: exit code 7"), "{err}");
    for part in [
        format!(
            "processes that SIGKILL did not end: {} fake-worker, state D (in ",
            pids[1]
        ),
        "  rank 1: did not end after SIGKILL, state D (in ".into(),
    ] {
        assert!(err.contains(&part), "{part}\n{err}");
    }
    assert!(!err.contains("not known as one of this job's"), "{err}");
    let other = &scene.json("failure.json")["others"][0];
    let stuck = other["stuck_in"].as_str().expect("where it stands");
    assert!(other["rank"] == 1 && stuck.contains("state D"), "{other:#}");
    // It had its SIGKILL.
    drop(freezer);
    scene.assert_nothing_survives();
}
