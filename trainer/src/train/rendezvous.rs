//! How ranks that `mpirun` or `srun` started find rank 0 when nobody told them where it is: through a
//! file in the folder of the runs, which all of them know.

use super::interfaces;
use anyhow::Result;
use fs_err::os::unix::fs::OpenOptionsExt;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use tsm_job::WorkerEnv;
use tsm_job::exit::{self, Coded};
use tsm_torch_ext::dist::Store;

/// How often a rank looks for the file.
const LOOK: Duration = Duration::from_millis(50);
/// How long an address may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// Holds [`Notice::nonce`], so that nobody takes another job's store on the same port for this one.
const NONCE: &str = "tsm/nonce";

/// What rank 0 writes into the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Notice {
    job: String,
    pid: u32,
    host: String,
    nonce: String,
    /// Of rank 0's host, to be tried in this order.
    addresses: Vec<IpAddr>,
    port: u16,
}

/// A store that all ranks have joined.
pub struct Met {
    pub store: Store,
    /// The network interface between the ranks; empty: unknown.
    pub interface: String,
}

/// Meets the other ranks through a file in `folder`.
///
/// # Errors
/// Nothing tells this job from others (exit code USAGE), the file cannot be written (CANNOT_WRITE),
/// or a rank does not come within `timeout` (PEER).
pub fn meet(env: &WorkerEnv, folder: &Path, timeout: Duration) -> Result<Met> {
    let job = job_name(env)?;
    let file = file_name(folder, &job);
    let apart = |why: String| -> anyhow::Error {
        let text = format!(
            "rank {} could not meet the other {} ranks through {}: {why}\n  hint: run.dir ({}) has to be one folder for all ranks; or set MASTER_ADDR and MASTER_PORT for all of them",
            env.rank,
            env.world_size - 1,
            file.display(),
            folder.display()
        );
        Coded::new(exit::PEER, text).into()
    };
    let interfaces = interfaces::list().map_err(|e| apart(e.to_string()))?;
    let reached = if env.rank == 0 {
        serve(env, job, &file, &interfaces, timeout).map_err(|e| match e.downcast::<Coded>() {
            Ok(coded) => coded.into(),
            Err(e) => apart(format!("{e:#}")),
        })
    } else {
        let deadline = Instant::now() + timeout;
        join(env, &job, &file, deadline, timeout).map_err(apart)
    };
    let (store, address) = reached?;
    let interface = match interfaces.iter().find(|(_, a)| *a == address) {
        Some((name, _)) => name.clone(),
        None if address.is_loopback() => "lo".into(),
        None => String::new(),
    };
    Ok(Met { store, interface })
}

/// Rank 0: makes the store, tells the others, and waits until all have joined. Returns the address
/// at which another host reached it.
fn serve(
    env: &WorkerEnv,
    job: String,
    file: &Path,
    interfaces: &[(String, IpAddr)],
    timeout: Duration,
) -> Result<(Store, IpAddr)> {
    let loopback = IpAddr::from([127, 0, 0, 1]);
    let world = env.world_size as usize;
    let store = Store::tcp("127.0.0.1", 0, world, true, timeout)?;
    let mut addresses = Vec::new();
    if !env.one_host() {
        addresses.extend(interfaces.iter().map(|(_, address)| *address));
    }
    if addresses.is_empty() {
        addresses.push(loopback);
    }
    let notice = Notice {
        job,
        pid: std::process::id(),
        host: host(),
        nonce: nonce(),
        addresses,
        port: store.port(),
    };
    store.set(NONCE, notice.nonce.as_bytes())?;
    let posted = Posted::write(file, &notice)?;
    let keys: Vec<String> = (1..env.world_size).map(joined).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    store.wait(&keys, timeout)?;
    drop(posted);
    let mut own = notice.addresses.first().copied().unwrap_or(loopback);
    for key in keys {
        let text = String::from_utf8_lossy(&store.get(key)?).into_owned();
        if let Some((address, from)) = text.split_once(' ')
            && from != notice.host
            && let Ok(address) = address.parse()
        {
            own = address;
            break;
        }
    }
    Ok((store, own))
}

/// The other ranks: look for the file and connect to what it says, until that is this job's store.
/// Returns this host's address on the way there.
fn join(
    env: &WorkerEnv,
    job: &str,
    file: &Path,
    deadline: Instant,
    timeout: Duration,
) -> std::result::Result<(Store, IpAddr), String> {
    let mut why = "it does not exist".to_string();
    while Instant::now() < deadline {
        match read(file, job).and_then(|notice| connect(env, &notice, timeout)) {
            Ok(met) => return Ok(met),
            Err(e) => why = e,
        }
        std::thread::sleep(LOOK);
    }
    Err(why)
}

fn connect(
    env: &WorkerEnv,
    notice: &Notice,
    timeout: Duration,
) -> std::result::Result<(Store, IpAddr), String> {
    let Notice {
        host, pid, port, ..
    } = notice;
    let reach = |address: &IpAddr| {
        let stream = TcpStream::connect_timeout(&SocketAddr::new(*address, *port), ANSWER).ok()?;
        Some((*address, stream.local_addr().ok()?.ip()))
    };
    let Some((address, own)) = notice.addresses.iter().find_map(reach) else {
        return Err(format!(
            "rank 0 (process {pid} on {host}) does not answer on port {port} of {:?}",
            notice.addresses
        ));
    };
    let world = env.world_size as usize;
    let other = |e: tsm_torch_ext::TorchError| format!("{address}:{port}: {e}");
    let store = Store::tcp(&address.to_string(), *port, world, false, timeout).map_err(other)?;
    let same = store.check(&[NONCE]).map_err(other)?
        && store.get(NONCE).map_err(other)? == notice.nonce.as_bytes();
    if !same {
        return Err(format!("{address}:{port} belongs to another job"));
    }
    let from = format!("{address} {}", self::host());
    store
        .set(&joined(env.rank), from.as_bytes())
        .map_err(other)?;
    Ok((store, own))
}

/// The file, if it is this job's.
fn read(file: &Path, job: &str) -> std::result::Result<Notice, String> {
    let text = fs_err::read_to_string(file).map_err(|e| e.to_string())?;
    let notice: Notice =
        serde_json::from_str(&text).map_err(|e| format!("it cannot be read: {e}"))?;
    if notice.job != job {
        return Err(format!("it belongs to another job, {}", notice.job));
    }
    Ok(notice)
}

/// The file while it is there. Replaces what a job that ended badly has left.
struct Posted(PathBuf);

impl Posted {
    fn write(file: &Path, notice: &Notice) -> Result<Posted> {
        let write = || -> std::io::Result<()> {
            if let Some(folder) = file.parent() {
                fs_err::create_dir_all(folder)?;
            }
            let temporary = file.with_extension(format!("{}.tmp", notice.pid));
            let mut out = fs_err::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            out.write_all(serde_json::to_string(notice)?.as_bytes())?;
            out.sync_all()?;
            fs_err::rename(&temporary, file)
        };
        write().map_err(|e| {
            let text = format!("cannot tell the other ranks where rank 0 is: {e}");
            Coded::new(exit::CANNOT_WRITE, text)
        })?;
        Ok(Posted(file.to_path_buf()))
    }
}

impl Drop for Posted {
    fn drop(&mut self) {
        let _ = fs_err::remove_file(&self.0);
    }
}

/// What tells this job from all others, past ones included. On one host that is also the process
/// that started all ranks, with the time at which it began.
fn job_name(env: &WorkerEnv) -> Result<String> {
    let parent = || {
        let pid = std::os::unix::process::parent_id();
        let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(format!("{}-{pid}-{}", host(), started(&stat)?))
    };
    let parent = if env.one_host() { parent() } else { None };
    let parts: Vec<String> = env.job_id.iter().cloned().chain(parent).collect();
    if parts.is_empty() {
        let text = format!(
            "rank {} of {} has no word of where rank 0 is, and no name for this job by which to find out\n  hint: set MASTER_ADDR and MASTER_PORT for all ranks, or TSM_RUN_ID to a name that no other job has",
            env.rank, env.world_size
        );
        return Err(Coded::new(exit::USAGE, text).into());
    }
    Ok(parts.join("."))
}

/// Field 22 of `/proc/<pid>/stat`; the name in field 2 may hold blanks and brackets.
fn started(stat: &str) -> Option<&str> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)
}

fn file_name(folder: &Path, job: &str) -> PathBuf {
    let digest = Sha256::digest(job.as_bytes());
    let hex: String = digest.iter().take(8).map(|b| format!("{b:02x}")).collect();
    folder.join(format!(".rendezvous-{hex}"))
}

fn joined(rank: u32) -> String {
    format!("tsm/joined/{rank}")
}

fn nonce() -> String {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos());
    format!("{}-{}-{now}", host(), std::process::id())
}

fn host() -> String {
    let name = fs_err::read_to_string("/proc/sys/kernel/hostname");
    name.map_or("unknown".into(), |n| n.trim().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn notice(job: &str) -> Notice {
        Notice {
            job: job.into(),
            pid: 7,
            host: "a".into(),
            nonce: "n".into(),
            addresses: vec![IpAddr::from([127, 0, 0, 1])],
            port: 1,
        }
    }

    #[test]
    fn the_file_is_private_replaces_an_old_one_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let file = file_name(dir.path(), "job");
        fs_err::write(&file, "half a fi").unwrap();
        assert!(read(&file, "job").unwrap_err().contains("cannot be read"));
        let posted = Posted::write(&file, &notice("job")).unwrap();
        assert_eq!(read(&file, "job").unwrap(), notice("job"));
        let mode = fs_err::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = read(&file, "another").unwrap_err();
        assert!(error.contains("belongs to another job, job"), "{error}");
        drop(posted);
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 0);
        assert_ne!(file, file_name(dir.path(), "another"));
    }

    #[test]
    fn a_process_has_its_start_time_behind_any_name() {
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 9876 1 2";
        assert_eq!(started(stat), Some("9876"));
    }

    #[test]
    fn several_hosts_need_a_name_for_the_job() {
        let vars = [
            ("PMI_RANK", "0"),
            ("PMI_SIZE", "4"),
            ("MPI_LOCALRANKID", "0"),
        ];
        let env = |local: &str, id: Option<&str>| {
            let get = |name: &str| match name {
                "MPI_LOCALNRANKS" => Some(local.to_string()),
                "TSM_RUN_ID" => id.map(String::from),
                _ => vars.iter().find(|v| v.0 == name).map(|v| v.1.to_string()),
            };
            WorkerEnv::from_lookup(get).unwrap()
        };
        let error = job_name(&env("2", None)).unwrap_err();
        assert!(error.to_string().contains("set MASTER_ADDR"), "{error}");
        assert_eq!(exit::code_of(&error), exit::USAGE);
        assert_eq!(job_name(&env("2", Some("mine"))).unwrap(), "mine");
        let pid = std::os::unix::process::parent_id().to_string();
        assert!(job_name(&env("4", None)).unwrap().contains(&pid));
    }
}
