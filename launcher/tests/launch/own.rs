//! A job goes on with the launcher that began it, whatever becomes of its file.

use crate::harness::{FAKE, Scene, alive, finish, parent, start, until};
use std::path::Path;

/// Runs a job whose rank fails once, after `change` was done to the file of its launcher. The second start has to
/// come, and all that belongs to it has to look as before.
fn restart_after(change: impl FnOnce(&Path)) {
    let scene = Scene::new();
    let path = |name: &str| scene.path(name).display().to_string();
    let launcher = scene.own_launcher();
    let (ready, go, again, end) = (path("ready"), path("go"), path("again"), path("end"));
    let line = format!(
        "--cpus 1 --preflight off --max-restarts 1 --run-dir run -- {FAKE} \
         --when TSM_RESTART_COUNT=0 --touch {ready}{{rank}} --wait-for {go} --exit 3 --end \
         --touch {again}{{rank}} --wait-for {end} --exit 5"
    );
    let mut command = scene.command_of(launcher.to_str().unwrap());
    let running = start(command.args(line.split_whitespace()));
    scene.wait_for_pids("ready", 1);
    change(&launcher);
    fs_err::write(&go, "").unwrap();
    until("the second start", || {
        let is_there = scene.path("again0").exists() || !alive(running.pid());
        is_there.then_some(())
    });
    // In top, and for pgrep. A process has it a moment after it began.
    let command = until("a guard called tsm-launch", || {
        match guard_of(running.pid()) {
            Some((name, command)) if name == "tsm-launch" => Some(command),
            _ => (!alive(running.pid())).then(String::new),
        }
    });
    fs_err::write(&end, "").unwrap();
    let outcome = finish(running);
    assert_eq!(outcome.code, 5, "{}", outcome.err);
    let shown = format!("{} __guard ", launcher.display());
    assert!(command.starts_with(&shown), "{command}");
    scene.assert_nothing_survives();
}

/// Its name, and its command line.
fn guard_of(launcher: i32) -> Option<(String, String)> {
    let of = |pid: i32| {
        let read = |file| fs_err::read_to_string(format!("/proc/{pid}/{file}")).ok();
        let command = read("cmdline")?.replace('\0', " ");
        let is_guard = parent(pid) == Some(launcher) && command.contains(" __guard ");
        is_guard.then_some((read("comm")?.trim().into(), command))
    };
    let all = fs_err::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find_map(of)
}

#[test]
fn a_restart_needs_no_file_of_the_launcher() {
    restart_after(|launcher| fs_err::remove_file(launcher).unwrap());
}

/// What an upgrade or a build leaves there.
#[test]
fn a_restart_does_not_run_what_is_now_at_the_path_of_the_launcher() {
    restart_after(|launcher| {
        fs_err::remove_file(launcher).unwrap();
        fs_err::copy("/bin/true", launcher).unwrap();
    });
}
