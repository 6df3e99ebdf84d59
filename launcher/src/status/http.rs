//! The status of a running job over HTTP, read-only, for this machine alone.
//!
//! ```text
//! GET /             what there is
//! GET /status.json  the [`Snapshot`]
//! GET /metrics      for Prometheus
//! ```
//!
//! A thread of its own serves, so that no request delays the supervision. The address is written to
//! `status.json` in the run folder as `{"url": ..., "pid": ...}`, and the file removed at the end.

mod reply;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot, watch};
use tsm_job::RunDir;
use tsm_job::exit::{self, Coded};

use super::Snapshot;
use crate::limits;
use crate::manifest::write_json;
use reply::reply;

/// From the connection to the last byte of the reply.
const DEADLINE: Duration = Duration::from_secs(2);
/// At a time; more wait.
const MAX_CONNECTIONS: usize = 16;

/// `--status-port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Off,
    /// 0: any free one.
    Number(u16),
}

impl Default for Port {
    fn default() -> Port {
        Port::Number(0)
    }
}

impl FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Port, String> {
        match text.parse() {
            Ok(number) => Ok(Port::Number(number)),
            Err(_) if text == "off" => Ok(Port::Off),
            Err(_) => Err(format!(
                "`{text}` is no port; write a number up to 65535, 0 for any free one, or `off`"
            )),
        }
    }
}

/// The file in the run folder that holds the address while the job runs.
pub fn address_file(run_dir: &RunDir) -> PathBuf {
    run_dir.path().join("status.json")
}

/// Serves until it is dropped.
pub struct Server {
    file: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on 127.0.0.1; `None` for [`Port::Off`].
    ///
    /// # Errors
    /// [`exit::PREFLIGHT`] when the port is taken.
    pub fn start(
        port: Port,
        run_dir: &RunDir,
        snapshots: watch::Receiver<Arc<Snapshot>>,
    ) -> anyhow::Result<Option<Server>> {
        let Port::Number(number) = port else {
            return Ok(None);
        };
        let refuse = |e: std::io::Error| {
            let text = format!(
                "cannot serve the status on 127.0.0.1:{number}: {e}\n  hint: give --status-port 0 for any free port, or off"
            );
            Coded::new(exit::PREFLIGHT, text)
        };
        let listener =
            std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, number)).map_err(refuse)?;
        listener.set_nonblocking(true).map_err(refuse)?;
        let address = listener.local_addr().map_err(refuse)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let file = address_file(run_dir);
        let (ready, is_ready) = std::sync::mpsc::channel();
        // The runtime is made on its thread: where that cannot be started, it could not be dropped on this one.
        let thread = limits::thread("status", "serves the status", move || {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            let runtime = builder.enable_io().enable_time().build();
            let serving = runtime.map(|runtime| {
                let _ = ready.send(Ok(()));
                runtime.block_on(async {
                    tokio::select! {
                        _ = stopped => {}
                        _ = serve(listener, snapshots) => {}
                    }
                });
            });
            if let Err(e) = serving {
                let _ = ready.send(Err(e));
            }
        })?;
        if let Ok(Err(e)) = is_ready.recv() {
            return Err(refuse(e).into());
        }
        let server = Server {
            file,
            stop: Some(stop),
            thread: Some(thread),
        };
        let url = format!("http://{address}/");
        write_json(
            &server.file,
            &serde_json::json!({"url": url, "pid": std::process::id()}),
        )
        .map_err(|e| {
            let hint = "free some space there, or give another --run-dir";
            let text = format!("cannot write to the run folder: {e}\n  hint: {hint}");
            Coded::new(exit::CANNOT_WRITE, text)
        })?;
        Ok(Some(server))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = fs_err::remove_file(&self.file);
    }
}

async fn serve(
    listener: std::net::TcpListener,
    snapshots: watch::Receiver<Arc<Snapshot>>,
) -> std::io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return Ok(());
        };
        let Ok((stream, _)) = listener.accept().await else {
            // No descriptors left, most likely: asking again at once would only burn CPU.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let snapshots = snapshots.clone();
        tokio::spawn(async move {
            let _ = tokio::time::timeout(DEADLINE, converse(stream, &snapshots)).await;
            drop(place);
        });
    }
}

/// One request, one reply.
async fn converse(
    mut stream: TcpStream,
    snapshots: &watch::Receiver<Arc<Snapshot>>,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    let reply = loop {
        let mut chunk = [0; 1024];
        let n = stream.read(&mut chunk).await?;
        if n == 0 {
            // Nobody is there to be answered.
            return Ok(());
        }
        head.extend_from_slice(&chunk[..n]);
        // Cloned, so that the one who sends does not wait.
        let snapshot = Arc::clone(&snapshots.borrow());
        if let Some(reply) = reply(&head, &snapshot) {
            break reply;
        }
    };
    stream.write_all(&reply).await?;
    stream.shutdown().await?;
    // Closing while something is unread would reset the connection, and the reply could be lost.
    let mut rest = [0; 1024];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};

    fn get(path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nHost: localhost:80\r\n\r\n")
    }

    struct Scene {
        dir: tempfile::TempDir,
        sender: watch::Sender<Arc<Snapshot>>,
        server: Server,
        address: SocketAddr,
    }

    fn scene() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let (sender, receiver) = watch::channel(Arc::new(Snapshot::default()));
        let run_dir = RunDir::new(dir.path());
        let server = Server::start(Port::default(), &run_dir, receiver)
            .unwrap()
            .unwrap();
        let found: serde_json::Value =
            serde_json::from_slice(&fs_err::read(address_file(&run_dir)).unwrap()).unwrap();
        assert_eq!(found["pid"], std::process::id());
        let url = found["url"].as_str().unwrap();
        let address = url.strip_prefix("http://").unwrap().strip_suffix('/');
        Scene {
            dir,
            sender,
            server,
            address: address.unwrap().parse().unwrap(),
        }
    }

    fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    }

    #[test]
    fn the_newest_status_is_served_at_the_address_in_the_run_folder() {
        let scene = scene();
        let file = address_file(&RunDir::new(scene.dir.path()));
        let address = scene.address;
        assert!(address.ip().is_loopback());
        scene.sender.send_replace(Arc::new(Snapshot {
            run_id: "demo".into(),
            world_size: 64,
            ..Snapshot::default()
        }));
        let json = ask(address, get("/status.json").as_bytes());
        let (head, body) = json.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"));
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["run_id"], "demo");
        assert!(ask(address, get("/metrics").as_bytes()).contains("\ntsm_world_size 64\n"));
        assert!(ask(address, get("/").as_bytes()).contains("/metrics"));
        assert!(ask(address, &vec![b'x'; 64 << 10]).starts_with("HTTP/1.1 400 "));
        assert!(ask(address, b"").is_empty());
        drop(scene.server);
        assert!(!file.exists());
        assert!(TcpStream::connect(address).is_err());
    }

    #[test]
    fn those_who_say_nothing_keep_nobody_out_for_long() {
        let scene = scene();
        let idle: Vec<_> = (0..MAX_CONNECTIONS)
            .map(|_| TcpStream::connect(scene.address).unwrap())
            .collect();
        let text = ask(scene.address, get("/").as_bytes());
        assert!(text.starts_with("HTTP/1.1 200 OK"));
        drop(idle);
    }

    #[test]
    fn a_port_that_is_taken_is_refused_with_a_way_out() {
        let scene = scene();
        let port = Port::Number(scene.address.port());
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(dir.path());
        let again = Server::start(port, &run_dir, scene.sender.subscribe());
        let error = again.map(|_| ()).unwrap_err();
        assert_eq!(exit::code_of(&error), exit::PREFLIGHT);
        assert!(format!("{error:#}").contains("--status-port 0"));
        assert!(
            Server::start(Port::Off, &run_dir, scene.sender.subscribe())
                .unwrap()
                .is_none()
        );
        assert_eq!("off".parse(), Ok(Port::Off));
        assert_eq!("8080".parse(), Ok(Port::Number(8080)));
        assert!("65536".parse::<Port>().is_err());
    }
}
