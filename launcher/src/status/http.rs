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

use anyhow::Context;
use std::net::{Ipv4Addr, SocketAddr};
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

use super::{Snapshot, metrics};
use crate::manifest::write_json;

/// Request line and headers together.
const MAX_HEAD: usize = 8 << 10;
const MAX_HEADERS: usize = 64;
/// From the connection to the last byte of the answer.
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
    pub address: SocketAddr,
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
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let file = address_file(run_dir);
        let thread = std::thread::Builder::new()
            .name("status".into())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = stopped => {}
                        _ = serve(listener, snapshots) => {}
                    }
                });
            })
            .context("cannot start the thread that serves the status")?;
        let server = Server {
            address,
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

/// One request, one answer.
async fn converse(
    mut stream: TcpStream,
    snapshots: &watch::Receiver<Arc<Snapshot>>,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    let path = loop {
        let mut chunk = [0; 1024];
        let n = stream.read(&mut chunk).await?;
        if n == 0 {
            // Nobody is there to be answered.
            return Ok(());
        }
        head.extend_from_slice(&chunk[..n]);
        match parse(&head) {
            Ok(None) if head.len() < MAX_HEAD => {}
            Ok(None) => break Err(Refusal::bad("the request line and headers exceed 8 KiB")),
            Ok(Some(path)) => break Ok(path),
            Err(refusal) => break Err(refusal),
        }
    };
    let answer = match path {
        Ok(path) => {
            // Cloned, so that the one who sends does not wait.
            let snapshot = Arc::clone(&snapshots.borrow());
            answer(path, &snapshot)
        }
        Err(refusal) => refusal.answer(),
    };
    stream.write_all(&answer).await?;
    stream.shutdown().await?;
    // Closing while something is unread would reset the connection, and the answer could be lost.
    let mut rest = [0; 1024];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Index,
    Status,
    Metrics,
}

#[derive(Debug, PartialEq)]
struct Refusal {
    status: &'static str,
    why: &'static str,
}

impl Refusal {
    fn bad(why: &'static str) -> Refusal {
        let status = "400 Bad Request";
        Refusal { status, why }
    }

    fn answer(&self) -> Vec<u8> {
        let body = format!("{}: {}\n", self.status, self.why);
        respond(self.status, "text/plain; charset=utf-8", body.as_bytes())
    }
}

/// Which page `head`, all that came so far, asks for; `None` while it is not complete. Pure.
fn parse(head: &[u8]) -> Result<Option<Page>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => return Ok(None),
        Ok(httparse::Status::Complete(length)) if length > MAX_HEAD => {
            return Err(Refusal::bad("the request line and headers exceed 8 KiB"));
        }
        Ok(httparse::Status::Complete(_)) => {}
        Err(_) => return Err(Refusal::bad("this is not an HTTP request")),
    }
    let values = |name: &'static str| {
        let headers = request.headers.iter();
        headers
            .filter(move |h| h.name.eq_ignore_ascii_case(name))
            .map(|h| h.value)
    };
    // A page of some other site may make a browser ask under the site's own name (DNS rebinding).
    let mut hosts = values("host");
    if !matches!((hosts.next(), hosts.next()), (Some(host), None) if is_loopback(host)) {
        return Err(Refusal::bad(
            "the Host header has to be localhost, 127.0.0.1 or [::1]",
        ));
    }
    if values("transfer-encoding").next().is_some() || values("content-length").any(|v| v != b"0") {
        return Err(Refusal::bad("a request has no body here"));
    }
    let path = request.path.unwrap_or_default();
    let page = match path.split_once('?').map_or(path, |(path, _)| path) {
        "/" => Page::Index,
        "/status.json" => Page::Status,
        "/metrics" => Page::Metrics,
        _ => {
            return Err(Refusal {
                status: "404 Not Found",
                why: "there are / and /status.json and /metrics",
            });
        }
    };
    if request.method != Some("GET") {
        return Err(Refusal {
            status: "405 Method Not Allowed",
            why: "only GET is allowed",
        });
    }
    Ok(Some(page))
}

fn is_loopback(host: &[u8]) -> bool {
    ["localhost", "127.0.0.1", "[::1]"].iter().any(|name| {
        let Some((own, port)) = host.split_at_checked(name.len()) else {
            return false;
        };
        let digits = |port: &[u8]| port.len() <= 5 && port.iter().all(u8::is_ascii_digit);
        own.eq_ignore_ascii_case(name.as_bytes())
            && (port.is_empty() || port.strip_prefix(b":").is_some_and(digits))
    })
}

fn answer(page: Page, snapshot: &Snapshot) -> Vec<u8> {
    const OK: &str = "200 OK";
    match page {
        Page::Index => {
            let text = format!(
                "tsm-launch: {}\n\n/status.json  the whole status\n/metrics      for Prometheus\n",
                snapshot.run_id
            );
            respond(OK, "text/plain; charset=utf-8", text.as_bytes())
        }
        Page::Status => match serde_json::to_vec(snapshot) {
            Ok(body) => respond(OK, "application/json", &body),
            // A path that is no UTF-8.
            Err(e) => {
                let body = format!("the status has no form as JSON: {e}\n");
                let kind = "text/plain; charset=utf-8";
                respond("500 Internal Server Error", kind, body.as_bytes())
            }
        },
        Page::Metrics => respond(
            OK,
            metrics::CONTENT_TYPE,
            metrics::render(snapshot).as_bytes(),
        ),
    }
}

fn respond(status: &str, kind: &str, body: &[u8]) -> Vec<u8> {
    let allow = if status.starts_with("405") {
        "Allow: GET\r\n"
    } else {
        ""
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{allow}\
         Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    fn get(path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nHost: localhost:80\r\n\r\n")
    }

    fn status(head: &str) -> &'static str {
        match parse(head.as_bytes()) {
            Ok(Some(_)) => "200 OK",
            Ok(None) => "incomplete",
            Err(refusal) => refusal.status,
        }
    }

    #[test]
    fn three_pages_and_nothing_else() {
        assert_eq!(parse(get("/").as_bytes()), Ok(Some(Page::Index)));
        assert_eq!(
            parse(get("/status.json").as_bytes()),
            Ok(Some(Page::Status))
        );
        assert_eq!(
            parse(get("/metrics?a=b").as_bytes()),
            Ok(Some(Page::Metrics))
        );
        for path in [
            "/metrics/",
            "//",
            "/../etc/passwd",
            "http://localhost/",
            "*",
        ] {
            assert_eq!(status(&get(path)), "404 Not Found", "{path}");
        }
        for method in ["POST", "HEAD", "DELETE", "OPTIONS"] {
            let head = get("/metrics").replacen("GET", method, 1);
            assert_eq!(status(&head), "405 Method Not Allowed");
        }
        let answer = Refusal {
            status: "405 Method Not Allowed",
            why: "",
        };
        assert!(String::from_utf8_lossy(&answer.answer()).contains("\r\nAllow: GET\r\n"));
    }

    #[test]
    fn a_browser_on_another_site_s_page_is_refused() {
        for host in [
            "localhost",
            "LOCALHOST:9",
            "127.0.0.1",
            "127.0.0.1:65535",
            "[::1]:80",
        ] {
            let head = get("/").replace("localhost:80", host);
            assert_eq!(status(&head), "200 OK", "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "localhost:80.evil.example",
            "127.0.0.1.nip.io",
            "127.0.0.2",
            "",
            "::1",
            "localhost\r\nHost: localhost",
        ] {
            let head = get("/").replace("localhost:80", host);
            assert_eq!(status(&head), "400 Bad Request", "{host}");
        }
        assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), "400 Bad Request");
    }

    #[test]
    fn what_is_no_plain_request_is_refused() {
        for head in [
            "GET / HTTP/3.7\r\n\r\n",
            "\x16\x03\x01\x02\x00\x01\x00",
            "SSH-2.0-OpenSSH_9.6\r\n",
            "GET /\r\n\r\n",
            &get("/").replace("\r\n\r\n", "\r\nContent-Length: 5\r\n\r\nhello"),
            &get("/").replace("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n"),
            &get("/").replace("\r\n\r\n", &"\r\na: b".repeat(MAX_HEADERS + 1)),
        ] {
            assert_eq!(status(head), "400 Bad Request", "{head}");
        }
        let long = get(&format!("/?{}", "x".repeat(MAX_HEAD)));
        assert_eq!(status(&long), "400 Bad Request");
        assert_eq!(status("GET / HTTP/1.1\r\nHost: loc"), "incomplete");
    }

    proptest! {
        #[test]
        fn no_garbage_panics(head in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&head);
        }

        /// As a stream brings it: what a beginning says, the whole does not take back.
        #[test]
        fn a_request_may_come_in_pieces(method in "[A-Z]{1,7}", path in "/[a-z.]{0,12}", host in "[a-z0-9.:]{0,12}", end in "\\PC{0,20}") {
            let head = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nX: {end}\r\n\r\n");
            let whole = parse(head.as_bytes());
            for cut in 0..head.len() {
                let part = parse(&head.as_bytes()[..cut]);
                prop_assert!(part == Ok(None) || part.is_err() && part == whole, "{cut}: {part:?}");
            }
        }
    }

    struct Scene {
        dir: tempfile::TempDir,
        sender: watch::Sender<Arc<Snapshot>>,
        server: Server,
    }

    fn scene() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let (sender, receiver) = watch::channel(Arc::new(Snapshot::default()));
        let run_dir = RunDir::new(dir.path());
        let server = Server::start(Port::default(), &run_dir, receiver)
            .unwrap()
            .unwrap();
        Scene {
            dir,
            sender,
            server,
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
        let found: serde_json::Value =
            serde_json::from_slice(&fs_err::read(&file).unwrap()).unwrap();
        assert_eq!(found["url"], format!("http://{}/", scene.server.address));
        assert!(scene.server.address.ip().is_loopback());
        let address = scene.server.address;
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
            .map(|_| TcpStream::connect(scene.server.address).unwrap())
            .collect();
        let text = ask(scene.server.address, get("/").as_bytes());
        assert!(text.starts_with("HTTP/1.1 200 OK"));
        drop(idle);
    }

    #[test]
    fn a_port_that_is_taken_is_refused_with_a_way_out() {
        let scene = scene();
        let port = Port::Number(scene.server.address.port());
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
