//! Authenticated, size-capped, versioned frames over any byte stream.
//!
//! ```text
//! both sides   "tsm-wire" version:u32 nonce:32           at once
//!              HMAC(key, role, version, both nonces)     as soon as the other's nonce is there
//! then         length:u32 body:JSON code:16              code: HMAC(session, direction, number, body)
//! at the end   a frame without a body                    so that a death does not look like a good-bye
//! ```
//! Numbers are big-endian. Nothing is encrypted; [`super::tls`] does that around it.

use std::future::Future;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hmac::Mac;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tsm_job::exit::{self, Coded};

use super::key::Key;
use super::message::Round;
use super::tls::Tls;

mod connection;
mod frame;
mod fuzz;
mod handshake;

pub use connection::{Connection, Fault, Receiver, Sender, WireError};
pub use frame::{MAX_FROM_AGENT, MAX_TO_AGENT};
pub use fuzz::fuzz_one;
pub use handshake::{Refusal, Role, VERSION, Why};

pub(super) use connection::open;

use handshake::NOT_BOUND;

/// What [`serve`] gives a connection to prove itself, so that one that says nothing costs little.
pub const PROOF_DEADLINE: Duration = Duration::from_secs(2);
/// How many connections [`serve`] has in hand before they have proven themselves; more wait in the backlog.
pub const MAX_UNPROVEN: usize = 1024;
/// The kernel takes what it allows (`net.core.somaxconn`). With the usual 1,024 some of 1,024 agents that
/// come at once have to try again, which takes a second.
const BACKLOG: u32 = 16384;

/// The handshake over a stream of any kind, as the side that `role` says. `peer` names the other side in errors.
///
/// # Errors
/// When the other side does not prove within `deadline` that it has the key.
pub async fn authenticate<S>(
    role: Role,
    stream: S,
    peer: &str,
    key: &Key,
    deadline: Duration,
) -> Result<Connection, Refusal>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    within(deadline, peer, open(stream, peer, key, role, &NOT_BOUND)).await
}

/// An agent's way to a coordinator that listens: TCP, TLS where it is wanted, the handshake; one try, all
/// within `deadline`. [`Why::Unreachable`] is the one that may pass, while the coordinator starts.
///
/// # Errors
/// When any of it fails.
pub async fn dial(
    host: &str,
    port: u16,
    key: &Key,
    tls: Option<&Tls>,
    deadline: Duration,
) -> Result<Connection, Refusal> {
    let peer = match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    };
    let work = async {
        let stream = TcpStream::connect((host, port)).await;
        let stream = stream.map_err(Why::Unreachable)?;
        stream.set_nodelay(true).map_err(Why::Io)?;
        match tls {
            None => open(stream, &peer, key, Role::Agent, &NOT_BOUND).await,
            Some(tls) => tls.connect(stream, host, &peer, key).await,
        }
    };
    within(deadline, &peer, work).await
}

/// A socket at which a whole cluster may knock at once. Needs a runtime.
///
/// # Errors
/// [`exit::PREFLIGHT`] when the address cannot be used.
pub fn listen(address: SocketAddr) -> Result<TcpListener, Coded> {
    let open = || {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    open().map_err(|e: io::Error| {
        let hint = match e.kind() {
            ErrorKind::AddrInUse => "\n  hint: another program listens there; give another port",
            ErrorKind::AddrNotAvailable => "\n  hint: give an address of this machine",
            _ => "",
        };
        let text = format!("cannot listen for agents at {address}: {e}{hint}");
        Coded::new(exit::PREFLIGHT, text)
    })
}

/// Accepts connections until nobody receives `arrivals` any more: each that has proven itself, and why the
/// others were sent away. A full channel stops it, so that the coordinator sets the pace. Dropped, it
/// closes what has not arrived.
pub async fn serve(
    listener: TcpListener,
    key: Key,
    tls: Option<Tls>,
    arrivals: mpsc::Sender<Result<Connection, Refusal>>,
) {
    serve_at_most(MAX_UNPROVEN, listener, key, tls, arrivals).await;
}

async fn serve_at_most(
    max_unproven: usize,
    listener: TcpListener,
    key: Key,
    tls: Option<Tls>,
    arrivals: mpsc::Sender<Result<Connection, Refusal>>,
) {
    let slots = Arc::new(Semaphore::new(max_unproven));
    let mut handshakes = JoinSet::new();
    let mut failing = false;
    loop {
        let next = async {
            let slot = Arc::clone(&slots).acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            next = next => next,
            () = arrivals.closed() => return,
        };
        while handshakes.try_join_next().is_some() {}
        match accepted {
            Ok((stream, address)) => {
                failing = false;
                let (key, tls, arrivals) = (key.clone(), tls.clone(), arrivals.clone());
                handshakes.spawn(async move {
                    let arrival = admit(stream, &address.to_string(), &key, tls.as_ref()).await;
                    let _ = arrivals.send(arrival).await;
                    drop(slot);
                });
            }
            // The other side was quicker; or there are no descriptors left, and some may come back.
            Err(e) if e.kind() == ErrorKind::ConnectionAborted => {}
            Err(e) => {
                if !std::mem::replace(&mut failing, true) {
                    let peer = match listener.local_addr() {
                        Ok(address) => format!("the listener at {address}"),
                        Err(_) => "the listener".into(),
                    };
                    let _ = arrivals.try_send(Err(Refusal::new(&peer, Why::Io(e))));
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn admit(
    stream: TcpStream,
    peer: &str,
    key: &Key,
    tls: Option<&Tls>,
) -> Result<Connection, Refusal> {
    let work = async {
        stream.set_nodelay(true).map_err(Why::Io)?;
        match tls {
            None => open(stream, peer, key, Role::Coordinator, &NOT_BOUND).await,
            Some(tls) => tls.accept(stream, peer, key).await,
        }
    };
    within(PROOF_DEADLINE, peer, work).await
}

async fn within<T>(
    deadline: Duration,
    peer: &str,
    work: impl Future<Output = Result<T, Why>>,
) -> Result<T, Refusal> {
    let done = timeout(deadline, work).await;
    done.unwrap_or_else(|_| Err(Why::TooSlow(deadline)))
        .map_err(|why| Refusal::new(peer, why))
}

/// How the first node answers a probe: proof to `node`, which chose `nonce`, that it is a node of this job.
pub fn prove(key: &Key, nonce: [u8; 16], node: u64) -> [u8; 32] {
    probe_mac(key, nonce, node).finalize().into_bytes().into()
}

/// Whether `answer` is what [`prove`] gives, in a time that does not depend on where it differs.
pub fn is_proof(key: &Key, nonce: [u8; 16], node: u64, answer: &[u8]) -> bool {
    probe_mac(key, nonce, node).verify_slice(answer).is_ok()
}

/// How a member of a ring answers its neighbour, which chose `nonce`. No answer to a probe is one.
pub fn prove_member(key: &Key, nonce: [u8; 16], round: Round) -> [u8; 32] {
    let mut mac = key.mac(b"tsm-wire ring\0").chain_update(nonce);
    for number in [round.generation, round.attempt, round.number] {
        mac = mac.chain_update(number.to_be_bytes());
    }
    mac.finalize().into_bytes().into()
}

fn probe_mac(key: &Key, nonce: [u8; 16], node: u64) -> super::key::HmacSha256 {
    let mac = key.mac(b"tsm-wire probe\0");
    mac.chain_update(nonce).chain_update(node.to_be_bytes())
}

#[cfg(test)]
mod tests;
