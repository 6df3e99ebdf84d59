//! An OpenSSH server of the tests' own, with its own keys, on loopback addresses that stand for hosts.

use fs_err::File;
use rustix::fs::{FlockOperation, flock};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use tsm_launch::port::Port;

use crate::harness::until;

const SSHD: &str = "/usr/sbin/sshd";
/// Where sshd wants a folder while it runs as root.
const PRIVSEP: &str = "/run/sshd";
/// In it, where it is not the system's.
const MADE: &str = "/run/sshd/made-by-tsm-tests";

pub struct Server {
    dir: tempfile::TempDir,
    sshd: Child,
    _privsep: Privsep,
}

/// sshd's folder. The servers of other test programs on this machine use it too: where one of them has made it, the
/// last removes it.
struct Privsep(File);

impl Privsep {
    fn new() -> Privsep {
        until("a lock on sshd's folder", || {
            if fs_err::create_dir(PRIVSEP).is_ok() {
                // The next turn may find it gone.
                let _ = File::create(MADE);
            }
            // It may be removed at any moment before it is locked.
            let folder = File::open(PRIVSEP).ok()?;
            flock(&folder, FlockOperation::LockShared).expect("a lock");
            let number = folder.metadata().expect("it is open").ino();
            let found = fs_err::metadata(PRIVSEP).ok()?;
            (found.ino() == number).then(|| {
                let mode = PermissionsExt::from_mode(0o755);
                fs_err::set_permissions(PRIVSEP, mode).expect("root may");
                Privsep(folder)
            })
        })
    }
}

impl Drop for Privsep {
    fn drop(&mut self) {
        let alone = flock(&self.0, FlockOperation::NonBlockingLockExclusive).is_ok();
        if alone && fs_err::remove_file(MADE).is_ok() {
            let _ = fs_err::remove_dir(PRIVSEP);
        }
    }
}

impl Server {
    /// The server that all tests of this program share, stopped behind the last of them; `None`, said on stderr,
    /// where none can run.
    pub fn shared() -> Option<Arc<Server>> {
        static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(server) = shared.upgrade() {
            return Some(server);
        }
        let missing = [SSHD, "/usr/bin/ssh", "/usr/bin/ssh-keygen"]
            .into_iter()
            .find(|p| !Path::new(p).exists());
        if let Some(missing) = missing {
            eprintln!("skipped: there is no {missing}");
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can run an ssh server that takes logins");
            return None;
        }
        let server = Arc::new(Server::start());
        if let Err(why) = server.takes_logins() {
            eprintln!("skipped: no login at an ssh server here, as where root is locked ({why})");
            return None;
        }
        *shared = Arc::downgrade(&server);
        Some(server)
    }

    fn start() -> Server {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| dir.path().join(name).display().to_string();
        for key in ["host_key", "user_key", "other_key"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f", &at(key)])
                .status();
            assert!(made.expect("ssh-keygen starts").success());
        }
        fs_err::copy(at("user_key.pub"), at("authorized_keys")).expect("a key");
        // Free on all addresses; held, so that it stays so until sshd listens.
        let held = Port::reserve().expect("a port");
        let port = held.number;
        // The third greets as a shell's start-up file does that thinks it talks to a person.
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\nListenAddress 127.0.0.2:{port}\nListenAddress 127.0.0.3:{port}\n\
             HostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\nUsePAM no\n\
             PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
             MaxStartups 200\nLogLevel QUIET\n\
             Match LocalAddress 127.0.0.3\n  ForceCommand echo Welcome to the cluster; echo tsm-launch; \
             echo Last login: never >&2; eval \"$SSH_ORIGINAL_COMMAND\"\n",
            at("host_key"),
            at("authorized_keys"),
        );
        fs_err::write(at("sshd_config"), config).expect("writable");
        let host_key = fs_err::read_to_string(at("host_key.pub")).expect("a key");
        let known: String = (1..=3)
            .map(|i| format!("[127.0.0.{i}]:{port} {host_key}"))
            .collect();
        fs_err::write(at("known_hosts"), known).expect("writable");
        let client = format!(
            "Host node-a stranger intruder\n  HostName 127.0.0.1\nHost node-b\n  HostName 127.0.0.2\n\
             Host greeter\n  HostName 127.0.0.3\n\
             Host intruder\n  IdentityFile {}\nHost * !intruder\n  IdentityFile {}\nHost stranger\n  UserKnownHostsFile /dev/null\n\
             Host *\n  Port {port}\n  User root\n  IdentitiesOnly yes\n  IdentityAgent none\n  \
             UserKnownHostsFile {}\n  GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n",
            at("other_key"),
            at("user_key"),
            at("known_hosts"),
        );
        fs_err::write(at("ssh_config"), client).expect("writable");
        let _privsep = Privsep::new();
        let sshd = Command::new(SSHD)
            .args(["-D", "-e", "-f", &at("sshd_config")])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sshd starts");
        let server = Server {
            dir,
            sshd,
            _privsep,
        };
        until("sshd to listen", || {
            (1..=3)
                .all(|i| std::net::TcpStream::connect(format!("127.0.0.{i}:{port}")).is_ok())
                .then_some(())
        });
        server
    }

    fn takes_logins(&self) -> Result<(), String> {
        let mut ssh = Command::new("ssh");
        ssh.arg("-F").arg(self.config()).args(["node-a", "true"]);
        let output = ssh.stdin(Stdio::null()).output();
        let output = output.map_err(|e| e.to_string())?;
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().into()),
        }
    }

    /// For `--ssh`.
    pub fn ssh(&self) -> String {
        format!("ssh -F {}", self.config().display())
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("ssh_config")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.sshd.kill();
        let _ = self.sshd.wait();
    }
}
