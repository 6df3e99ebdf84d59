//! How nodes meet that have nothing in common but a name and a file system: the first writes a file with where it
//! listens and the key of the job, and the others wait for it.
//!
//! A file may be old: left by a job that was killed, and whose name came up again. So it is never taken for more than
//! a hint: who cannot join by it reads it again.

use serde::{Deserialize, Serialize};
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tsm_job::config::duration;
use tsm_job::exit::{self, Coded};

use crate::addresses;
use crate::cluster::key::{self, Key};
use crate::cluster::wire::{self, Connection};
use crate::replace::{beside, replace};

/// Between two looks at the file.
const AGAIN: Duration = Duration::from_millis(200);
/// For one address.
const TRY: Duration = Duration::from_secs(2);
/// A file is a key, a port, and the addresses of a node.
const MAX_BYTES: u64 = 1 << 20;
/// When to tell what is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
struct Meeting {
    addresses: Vec<IpAddr>,
    port: u16,
    key: String,
}

fn file(dir: &Path, id: &str) -> PathBuf {
    dir.join(format!(".tsm-launch-{id}"))
}

/// The file of a meeting. Dropped, it is gone.
pub struct Announced {
    path: PathBuf,
    text: String,
}

impl Drop for Announced {
    fn drop(&mut self) {
        // Another job of the same name may have put its own there, or do so at any moment: so it is taken away from
        // there first, and looked at when nobody else can replace it.
        let is_own = |path: &Path| fs_err::read_to_string(path).is_ok_and(|t| t == self.text);
        let own = beside(&self.path);
        if !is_own(&self.path) || fs_err::rename(&self.path, &own).is_err() {
            return;
        }
        if !is_own(&own) {
            // Unless there is a still newer one.
            let _ = fs_err::hard_link(&own, &self.path);
        }
        let _ = fs_err::remove_file(&own);
    }
}

/// Tells the other nodes where this one listens.
///
/// # Errors
/// [`exit::CANNOT_WRITE`].
pub fn announce(dir: &Path, id: &str, port: u16, key: &Key) -> Result<Announced, Coded> {
    let mut addresses: Vec<IpAddr> = addresses::list().into_iter().map(|(ip, _)| ip).collect();
    // For a node on the same machine; others find nobody there, or somebody without the key.
    addresses.push(IpAddr::from([127, 0, 0, 1]));
    let meeting = Meeting {
        addresses,
        port,
        key: key.to_line(),
    };
    let path = file(dir, id);
    let text = serde_json::to_string(&meeting).expect("plain data");
    let write = || fs_err::create_dir_all(dir).and_then(|()| replace(&path, &text, 0o600));
    write().map_err(|e| {
        let text = format!(
            "cannot tell the other nodes where to meet: {e}\n  hint: give --rendezvous-dir a folder that all nodes can write to"
        );
        Coded::new(exit::CANNOT_WRITE, text)
    })?;
    Ok(Announced { path, text })
}

/// Waits for the file and for the coordinator that wrote it. `say` gets what is waited for, where that takes long.
///
/// # Errors
/// [`exit::PREFLIGHT`] when that does not come within `wait`.
pub async fn join(
    dir: &Path,
    id: &str,
    wait: Duration,
    say: impl Fn(&str),
) -> Result<(Connection, Key), Coded> {
    let path = file(dir, id);
    let start = tokio::time::Instant::now();
    let mut is_said = false;
    loop {
        let problem = match look(dir, &path) {
            Ok(Some((meeting, key))) => match dial(&meeting, &key).await {
                Ok(connection) => return Ok((connection, key)),
                Err(problem) => format!("nobody to join by {}: {problem}", path.display()),
            },
            Ok(None) => format!(
                "{} is not visible on this node: is {} on a file system that all nodes share?",
                path.display(),
                dir.display()
            ),
            Err(e) => e.message,
        };
        let waited = start.elapsed();
        if waited + AGAIN >= wait {
            let text = format!(
                "cannot join the job within {}: {problem}\n  hint: see whether the first node has started, or give --rendezvous-dir another folder",
                duration::format(wait)
            );
            return Err(Coded::new(exit::PREFLIGHT, text));
        }
        if waited >= PATIENCE && !is_said {
            is_said = true;
            say(&format!("waiting for the first node: {problem}"));
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// What the file says; `None` while there is none.
fn look(dir: &Path, path: &Path) -> Result<Option<(Meeting, Key)>, Coded> {
    // NFS remembers for a while that there was no file; a look at the whole folder asks the server.
    if let Ok(entries) = fs_err::read_dir(dir) {
        entries.for_each(drop);
    }
    if fs_err::symlink_metadata(path).is_err() {
        return Ok(None);
    }
    let file = key::open_private(path, "meeting file")?;
    let unreadable = |e: &dyn std::fmt::Display| {
        let path = path.display();
        Coded::new(exit::PREFLIGHT, format!("{path} cannot be read: {e}"))
    };
    let mut text = String::new();
    let read = file.take(MAX_BYTES).read_to_string(&mut text);
    read.map_err(|e| unreadable(&e))?;
    let meeting: Meeting = serde_json::from_str(&text).map_err(|e| unreadable(&e))?;
    let key = key::parse(meeting.key.as_bytes()).map_err(|e| unreadable(&e))?;
    Ok(Some((meeting, key)))
}

async fn dial(meeting: &Meeting, key: &Key) -> Result<Connection, String> {
    let mut problems = Vec::new();
    for address in &meeting.addresses {
        match wire::dial(&address.to_string(), meeting.port, key, None, TRY).await {
            Ok(connection) => return Ok(connection),
            Err(refusal) => problems.push(refusal.to_string()),
        }
    }
    Err(problems.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;

    async fn listen(key: &Key) -> (u16, mpsc::Receiver<Result<Connection, wire::Refusal>>) {
        let listener = TcpListener::from_std(addresses::listen_on_all().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (arrivals, arrived) = mpsc::channel(8);
        tokio::spawn(wire::serve(listener, key.clone(), None, arrivals));
        (port, arrived)
    }

    #[tokio::test]
    async fn a_node_joins_by_the_file_which_is_private_and_goes_with_the_job() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("runs");
        let key = Key::random();
        let (port, mut arrived) = listen(&key).await;
        let announced = announce(&root, "mpi-7", port, &key).unwrap();
        let path = root.join(".tsm-launch-mpi-7");
        let mode = fs_err::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let wait = Duration::from_secs(60);
        join(&root, "mpi-7", wait, |_| ()).await.unwrap();
        arrived.recv().await.unwrap().unwrap();
        drop(announced);
        assert_eq!(fs_err::read_dir(&root).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn an_old_file_does_no_harm_and_a_newer_one_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key::random();
        let (port, mut arrived) = listen(&key).await;
        // Of a job that was killed: the port is another's now, who has another key.
        let old = announce(dir.path(), "mpi-7", port, &Key::random()).unwrap();
        let waiting = async {
            let wait = Duration::from_secs(60);
            // Where it fails, nobody else knocks.
            join(dir.path(), "mpi-7", wait, |_| ()).await.unwrap();
        };
        let replace = async {
            // Somebody with the old key has knocked.
            assert!(arrived.recv().await.unwrap().is_err());
            let new = announce(dir.path(), "mpi-7", port, &key).unwrap();
            drop(old);
            while arrived.recv().await.unwrap().is_err() {}
            new
        };
        let ((), new) = tokio::join!(waiting, replace);
        assert!(dir.path().join(".tsm-launch-mpi-7").exists());
        drop(new);
    }

    #[test]
    fn the_file_of_a_job_that_begins_stays_while_an_old_one_of_its_name_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), "mpi-7");
        for i in 0..300 {
            let text = |name: &str| format!("{name} {i}");
            let announced = |text: String| {
                replace(&path, &text, 0o600).unwrap();
                let path = path.clone();
                Announced { path, text }
            };
            let old = announced(text("old"));
            let new = std::thread::scope(|scope| {
                let new = scope.spawn(|| announced(text("new")));
                drop(old);
                new.join().unwrap()
            });
            assert_eq!(fs_err::read_to_string(&path).unwrap(), text("new"));
            drop(new);
            assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[tokio::test]
    async fn a_file_that_does_not_come_or_is_no_one_s_own_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let wait = Duration::from_millis(1);
        let code = |e: Coded| (e.code, e.message);
        let (number, text) = code(join(dir.path(), "x", wait, |_| ()).await.err().unwrap());
        assert_eq!(number, exit::PREFLIGHT);
        assert!(text.contains("is not visible on this node"), "{text}");
        let path = dir.path().join(".tsm-launch-x");
        fs_err::write(&path, "{}").unwrap();
        fs_err::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        let (_, text) = code(join(dir.path(), "x", wait, |_| ()).await.err().unwrap());
        assert!(text.contains("0644"), "{text}");
    }
}
