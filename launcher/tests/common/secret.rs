//! Whether a process shows a key to whoever may look.

use std::path::Path;

const DIGITS: usize = 64;

/// Processes that have something like a key, so many hexadecimal digits on end, in their command line or environment,
/// where one of both has `marker` too (a path of one test). What this process has itself is of no account.
pub fn exposed(marker: &Path) -> Vec<String> {
    let marker = marker.to_string_lossy().into_owned();
    let own = keys(&text("self"));
    let entries = fs_err::read_dir("/proc").expect("/proc").flatten();
    let names = entries.filter_map(|e| Some(e.file_name().to_str()?.to_string()));
    let pids = names.filter(|name| name.bytes().all(|b| b.is_ascii_digit()));
    pids.filter_map(|pid| {
        let text = text(&pid);
        let found = keys(&text).into_iter().find(|key| !own.contains(key))?;
        text.contains(&marker).then(|| format!("{pid}: {found}"))
    })
    .collect()
}

/// Fails unless a key in a process of a test is found, and none is found without one.
pub fn assert_would_be_seen(marker: &Path) {
    assert_eq!(exposed(marker), [""; 0]);
    let key = tsm_launch::cluster::key::Key::random().to_line();
    let wait = "read line";
    for in_environment in [false, true] {
        let mut command = std::process::Command::new("sh");
        command
            .args(["-c", wait])
            .arg(marker)
            .stdin(std::process::Stdio::piped());
        match in_environment {
            true => command.env("SECRET", key.trim()),
            false => command.arg(key.trim()),
        };
        let mut child = command.spawn().expect("sh");
        let found = crate::harness::until("sh to be itself", || {
            Some(exposed(marker)).filter(|found| !found.is_empty())
        });
        let _ = child.kill();
        let _ = child.wait();
        assert_eq!(found, [format!("{}: {}", child.id(), key.trim())]);
    }
}

/// Command line and environment, as far as they may be read.
fn text(pid: &str) -> String {
    let read = |name| fs_err::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    String::from_utf8_lossy(&[read("cmdline"), read("environ")].join(&0)).into_owned()
}

fn keys(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_ascii_hexdigit());
    words
        .filter(|word| word.len() >= DIGITS)
        .map(str::to_string)
        .collect()
}
