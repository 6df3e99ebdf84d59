//! A question that only a node of this job can answer, asked of every address at once.

use anyhow::Context;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout, timeout_at};

/// Connections answered at the same time; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 256;
/// All nodes of a job may dial every address in the same moment.
const BACKLOG: i32 = 16_384;
/// A client that has not asked by then is disconnected.
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers probes on all addresses of this node until it is dropped.
pub struct ProbeListener {
    pub port: u16,
    task: JoinHandle<()>,
}

impl ProbeListener {
    /// Call inside the tokio runtime. `prove` answers a nonce.
    ///
    /// # Errors
    /// When no port is free.
    pub fn start(
        prove: impl Fn([u8; 16]) -> [u8; 32] + Send + Sync + 'static,
    ) -> anyhow::Result<ProbeListener> {
        let listen = || TcpListener::from_std(listen_on_all()?);
        let listener = listen().context("cannot listen for probes of other nodes")?;
        let port = listener.local_addr()?.port();
        let task = tokio::spawn(serve(listener, Arc::new(prove)));
        Ok(ProbeListener { port, task })
    }
}

impl Drop for ProbeListener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A listener on a free port of all addresses, IPv4 and IPv6; it does not block.
///
/// # Errors
/// When no port is free.
pub fn listen_on_all() -> std::io::Result<StdListener> {
    let open = |family, address: IpAddr| -> std::io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        if family == AddressFamily::INET6 {
            // net.ipv6.bindv6only may be set.
            sockopt::set_ipv6_v6only(&socket, false)?;
        }
        bind(&socket, &SocketAddr::new(address, 0))?;
        listen(&socket, BACKLOG)?;
        Ok(socket)
    };
    // A kernel without IPv6 has only the second.
    let socket = open(AddressFamily::INET6, Ipv6Addr::UNSPECIFIED.into())
        .or_else(|_| open(AddressFamily::INET, Ipv4Addr::UNSPECIFIED.into()))?;
    Ok(socket.into())
}

async fn serve(
    listener: TcpListener,
    prove: Arc<impl Fn([u8; 16]) -> [u8; 32] + Send + Sync + 'static>,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Dropped with this task, it ends the connections too.
    let mut open = JoinSet::new();
    while let Ok(place) = places.clone().acquire_owned().await {
        while open.try_join_next().is_some() {}
        let Ok((mut stream, _)) = listener.accept().await else {
            // No descriptor is left; those of other connections come back.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let prove = prove.clone();
        open.spawn(async move {
            let _place = place;
            let answer = async {
                let mut nonce = [0; 16];
                stream.read_exact(&mut nonce).await?;
                stream.write_all(&prove(nonce)).await
            };
            let _ = timeout(PATIENCE, answer).await;
        });
    }
}

/// Which of `addresses` lead to the node that listens on `port`, and through which interface of this node;
/// the quickest first. All are dialled at once. What has not answered `linger` after the first answer is left out,
/// and everything that has not after `wait`: an address behind a firewall never answers.
///
/// `check` tells whether an answer belongs to a nonce.
pub async fn reach(
    addresses: &[IpAddr],
    port: u16,
    check: impl Fn([u8; 16], [u8; 32]) -> bool,
    wait: Duration,
    linger: Duration,
) -> Vec<(IpAddr, String)> {
    let mut end = Instant::now() + wait;
    let mut dials = JoinSet::new();
    for &address in addresses {
        let mut nonce = [0; 16];
        if !matches!(
            rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty()),
            Ok(16)
        ) {
            continue;
        }
        dials.spawn(async move {
            let mut stream = TcpStream::connect((address, port)).await.ok()?;
            let local = stream.local_addr().ok()?.ip();
            stream.write_all(&nonce).await.ok()?;
            let mut answer = [0; 32];
            stream.read_exact(&mut answer).await.ok()?;
            Some((address, local, nonce, answer))
        });
    }
    let mut reached = Vec::new();
    while let Ok(Some(done)) = timeout_at(end, dials.join_next()).await {
        if let Ok(Some((address, local, nonce, answer))) = done
            && check(nonce, answer)
        {
            reached.extend(super::interface(local).map(|name| (address, name)));
            end = end.min(Instant::now() + linger);
        }
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::scene::{self, Net};

    const LONG: Duration = Duration::from_secs(60);

    /// Enough of a proof for a test: the key, and the nonce.
    fn prove(key: u8) -> impl Fn([u8; 16]) -> [u8; 32] + Send + Sync + 'static {
        move |nonce| {
            let mut answer = [key; 32];
            answer[..16].copy_from_slice(&nonce);
            answer
        }
    }

    fn check(key: u8) -> impl Fn([u8; 16], [u8; 32]) -> bool {
        move |nonce, answer| prove(key)(nonce) == answer
    }

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(work)
    }

    #[test]
    fn an_answer_with_another_key_does_not_count() {
        block_on(async {
            let listener = ProbeListener::start(prove(1)).unwrap();
            let both = [IpAddr::from([127, 0, 0, 1]), IpAddr::from([127, 0, 0, 2])];
            let wait = LONG;
            let mut reached = reach(&both, listener.port, check(1), wait, wait).await;
            reached.sort();
            assert_eq!(reached, both.map(|address| (address, "lo".to_string())));
            assert_eq!(reach(&both, listener.port, check(2), wait, wait).await, []);
            let port = listener.port;
            drop(listener);
            assert_eq!(reach(&both, port, check(1), wait, wait).await, []);
        });
    }

    #[test]
    fn a_client_that_says_nothing_does_not_keep_others_out() {
        block_on(async {
            let listener = ProbeListener::start(prove(1)).unwrap();
            let address = IpAddr::from([127, 0, 0, 1]);
            let mut silent = Vec::new();
            for _ in 0..MAX_CONNECTIONS - 1 {
                silent.push(TcpStream::connect((address, listener.port)).await.unwrap());
            }
            let reached = reach(&[address], listener.port, check(1), LONG, LONG).await;
            assert_eq!(reached.len(), 1);
        });
    }

    #[test]
    fn an_address_that_never_answers_does_not_hold_up_the_others() {
        block_on(async {
            let all = ["127.0.0.1", "127.0.0.2"].map(|a| a.parse::<IpAddr>().unwrap());
            let listener = TcpListener::bind((all[0], 0)).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let _silent = TcpListener::bind((all[1], port)).await.unwrap();
            let task = tokio::spawn(serve(listener, Arc::new(prove(1))));
            let start = Instant::now();
            let reached = reach(&all, port, check(1), LONG, Duration::from_millis(1)).await;
            assert_eq!(reached, [(all[0], "lo".to_string())]);
            assert!(start.elapsed() < LONG);
            task.abort();
        });
    }

    /// Two nodes, two cables; the second cable is cut, and both have a docker bridge of the same address.
    #[test]
    fn the_cable_that_works_is_found() {
        const KEY: u8 = 7;
        let (tell, told) = std::sync::mpsc::channel::<u16>();
        let addresses =
            ["10.0.1.1", "172.17.0.1", "10.0.2.1"].map(|a| a.parse::<IpAddr>().unwrap());
        let wire = |a: &Net, b: &Net| {
            a.cable("a1", b, "b1");
            a.cable("a2", b, "b2");
            for (net, own) in [(a, 1), (b, 2)] {
                let side = if own == 1 { "a" } else { "b" };
                net.ip(&format!("addr add 10.0.1.{own}/24 dev {side}1"));
                net.ip(&format!("addr add 10.0.2.{own}/24 dev {side}2"));
                net.ip("link add docker0 type veth peer name docker1");
                net.ip("addr add 172.17.0.1/16 dev docker0");
                net.ip(&format!("link set {side}1 up"));
                net.ip("link set lo up");
                net.ip("link set docker0 up");
                net.ip("link set docker1 up");
            }
        };
        let (end, mut ended) = tokio::sync::mpsc::channel::<()>(1);
        let first = move || {
            block_on(async {
                let listener = ProbeListener::start(prove(KEY)).unwrap();
                tell.send(listener.port).unwrap();
                ended.recv().await
            })
        };
        let second = move || {
            let port = told.recv().unwrap();
            // Whoever answers at the docker address on this side is not a node of the job.
            let reached = block_on(async {
                let bind = format!("172.17.0.1:{port}");
                let stranger = TcpListener::bind(&bind).await.unwrap();
                let stranger = tokio::spawn(serve(stranger, Arc::new(prove(KEY + 1))));
                let reached = reach(&addresses, port, check(KEY), LONG, LONG).await;
                stranger.abort();
                reached
            });
            drop(end);
            reached
        };
        let Some((_, reached)) = scene::two_nodes(wire, first, second) else {
            return;
        };
        assert_eq!(reached, [("10.0.1.1".parse().unwrap(), "b1".to_string())]);
    }
}
