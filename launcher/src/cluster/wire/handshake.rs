//! Who is there: both sides prove that they have the key before a byte of anything else is read.

use std::fmt;
use std::io::{self, ErrorKind};
use std::time::Duration;

use hmac::Mac;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tsm_job::config::duration;
use tsm_job::exit::{self, Coded};

use super::connection::Fault;
use super::frame::{MAX_FROM_AGENT, MAX_TO_AGENT, Opener, Sealer};
use crate::cluster::key::{self, Key};

/// Of the protocol. Every version begins with the magic and its own number, whatever follows.
pub const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"tsm-wire";
pub(super) const NONCE_LEN: usize = 32;
pub(super) const HELLO_LEN: usize = MAGIC.len() + 4 + NONCE_LEN;
pub(super) const PROOF_LEN: usize = 32;

/// All that is ever read of somebody who has proven nothing.
const _: () = assert!(HELLO_LEN + PROOF_LEN <= 256);

/// What ties the handshake to the channel that it runs in: the exporter of a TLS session, so that nobody
/// in the middle who has a certificate can pass it on.
pub(in crate::cluster) type Binding = [u8; 32];
pub(in crate::cluster) const NOT_BOUND: Binding = [0; 32];

/// Which side of a connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Coordinator,
    Agent,
}

impl Role {
    pub(super) fn other(self) -> Role {
        match self {
            Role::Coordinator => Role::Agent,
            Role::Agent => Role::Coordinator,
        }
    }

    pub(super) fn byte(self) -> u8 {
        match self {
            Role::Coordinator => b'C',
            Role::Agent => b'A',
        }
    }

    /// Length of the longest body that this side sends.
    pub(super) fn max_body(self) -> usize {
        match self {
            Role::Coordinator => MAX_TO_AGENT,
            Role::Agent => MAX_FROM_AGENT,
        }
    }
}

/// A connection that was not made, and with whom.
#[derive(Debug, thiserror::Error)]
#[error("{peer} {why}")]
pub struct Refusal {
    pub peer: String,
    pub why: Why,
}

/// Continues a sentence that begins with the name of the other side.
#[derive(Debug, thiserror::Error)]
pub enum Why {
    /// It may not listen yet.
    #[error("cannot be reached: {0}")]
    Unreachable(io::Error),
    #[error("does not speak tsm-launch's protocol: {0}")]
    NotOurs(Stranger),
    #[error(
        "speaks version {theirs} of the protocol, this tsm-launch speaks version {VERSION}\n  \
         hint: use the same tsm-launch on all nodes"
    )]
    Version { theirs: u32 },
    #[error("does not have this job's key\n  hint: give every agent the key of its coordinator")]
    WrongKey,
    #[error("did not prove within {} that it has the key", duration::format(*.0))]
    TooSlow(Duration),
    #[error("closed the connection before it proved that it has the key")]
    Closed,
    /// It has the key, and what it sent first was no greeting.
    #[error("{0}\n  hint: use the same tsm-launch on all nodes")]
    Misspoke(Fault),
    /// From [`crate::cluster::tls`].
    #[error("{0}")]
    Tls(String),
    #[error("cannot be talked to: {0}")]
    Io(io::Error),
}

impl Refusal {
    pub(in crate::cluster) fn new(peer: &str, why: Why) -> Refusal {
        let peer = peer.to_string();
        Refusal { peer, why }
    }
}

/// For an agent that gives up.
impl From<Refusal> for Coded {
    fn from(refusal: Refusal) -> Coded {
        let code = match refusal.why {
            Why::TooSlow(_) | Why::Closed | Why::Io(_) => exit::PEER,
            _ => exit::PREFLIGHT,
        };
        Coded::new(code, refusal.to_string())
    }
}

impl From<io::Error> for Why {
    fn from(e: io::Error) -> Why {
        match e.kind() {
            ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe => Why::Closed,
            _ => Why::Io(e),
        }
    }
}

/// The first bytes of somebody else's protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stranger(Vec<u8>);

impl fmt::Display for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it sent \"{}\"", self.0.escape_ascii())?;
        let http = [
            "GET ",
            "HEAD ",
            "POST ",
            "PUT ",
            "OPTIONS ",
            "PRI * HTTP",
            "HTTP/",
        ];
        // A handshake or an alert, of any version.
        let tls = self.0.len() > 1 && matches!(self.0[0], 21 | 22) && self.0[1] == 3;
        if http
            .iter()
            .any(|start| self.0.starts_with(start.as_bytes()))
        {
            f.write_str(", which is HTTP")
        } else if self.0.starts_with(b"SSH-") {
            f.write_str(", which is ssh")
        } else if tls {
            f.write_str(", which is TLS\n  hint: give the TLS files to all nodes, or to none")
        } else {
            Ok(())
        }
    }
}

fn hello(nonce: &[u8; NONCE_LEN]) -> [u8; HELLO_LEN] {
    let mut hello = [0; HELLO_LEN];
    let (magic, rest) = hello.split_at_mut(MAGIC.len());
    magic.copy_from_slice(&MAGIC);
    rest[..4].copy_from_slice(&VERSION.to_be_bytes());
    rest[4..].copy_from_slice(nonce);
    hello
}

/// The nonce of a hello; `None` while all is well and more must come. Says no at the first wrong byte, since
/// a stranger may never send as many as a hello has.
pub(super) fn read_hello(bytes: &[u8]) -> Result<Option<[u8; NONCE_LEN]>, Why> {
    let begun = bytes.len().min(MAGIC.len());
    if bytes[..begun] != MAGIC[..begun] {
        return Err(Why::NotOurs(Stranger(bytes.to_vec())));
    }
    let Some((version, nonce)) = bytes[begun..].split_first_chunk() else {
        return Ok(None);
    };
    let theirs = u32::from_be_bytes(*version);
    if theirs != VERSION {
        return Err(Why::Version { theirs });
    }
    Ok(nonce.first_chunk().copied())
}

/// The codes of one connection, before the key is known to be the same.
struct Transcript<'a> {
    key: &'a Key,
    coordinator: [u8; NONCE_LEN],
    agent: [u8; NONCE_LEN],
    binding: &'a Binding,
}

impl Transcript<'_> {
    fn mac(&self, label: &[u8]) -> key::HmacSha256 {
        let mac = self.key.mac(label).chain_update(VERSION.to_be_bytes());
        let mac = mac.chain_update(self.coordinator).chain_update(self.agent);
        mac.chain_update(self.binding)
    }

    fn proof(&self, role: Role) -> key::HmacSha256 {
        self.mac(b"tsm-wire proof\0").chain_update([role.byte()])
    }

    fn session(&self) -> [u8; 32] {
        let mac = self.mac(b"tsm-wire session\0");
        mac.finalize().into_bytes().into()
    }
}

/// Proves this side and checks the other; what frames of this connection are made and checked with.
pub(super) async fn shake<S>(
    stream: &mut S,
    key: &Key,
    role: Role,
    binding: &Binding,
) -> Result<(Sealer, Opener), Why>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let ours = key::random();
    // Before the other's hello is judged, so that both sides can say which version the other has.
    stream.write_all(&hello(&ours)).await?;
    stream.flush().await?;
    let mut buffer = [0; HELLO_LEN];
    let mut filled = 0;
    let theirs = loop {
        filled += match stream.read(&mut buffer[filled..]).await? {
            0 => return Err(Why::Closed),
            more => more,
        };
        if let Some(theirs) = read_hello(&buffer[..filled])? {
            break theirs;
        }
    };

    let (coordinator, agent) = match role {
        Role::Coordinator => (ours, theirs),
        Role::Agent => (theirs, ours),
    };
    let transcript = Transcript {
        key,
        coordinator,
        agent,
        binding,
    };
    // Before the other's proof is judged, so that both sides hear of a wrong key.
    let proof = transcript.proof(role).finalize().into_bytes();
    stream.write_all(&proof).await?;
    stream.flush().await?;
    let mut proof = [0; PROOF_LEN];
    stream.read_exact(&mut proof).await?;
    let expected = transcript.proof(role.other());
    expected.verify_slice(&proof).map_err(|_| Why::WrongKey)?;

    let session = transcript.session();
    Ok((
        Sealer::new(&session, role),
        Opener::new(&session, role.other()),
    ))
}
