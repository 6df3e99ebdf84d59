//! A connection after its handshake: messages both ways.

use std::io::{self, ErrorKind};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::frame::{OVERHEAD, Opened, Opener, Sealer};
use super::handshake::{Binding, Role, Why, shake};
use crate::cluster::key::Key;

/// At most this much is made ready for a frame at a time, whatever its length says; and kept afterwards.
const CHUNK: usize = 64 << 10;

/// Both directions, each for an owner of its own. The stream closes when both are gone.
pub struct Connection {
    pub sender: Sender,
    pub receiver: Receiver,
}

/// A connection that does not go on, and with whom. Only of [`Fault::TooLong`] in sending and
/// [`Fault::Malformed`] is the connection itself still good.
#[derive(Debug, thiserror::Error)]
#[error("{peer} {fault}")]
pub struct WireError {
    pub peer: String,
    pub fault: Fault,
}

/// Continues a sentence that begins with the name of the other side.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Ended without a good-bye: the other side died, or was killed.
    #[error("broke off the connection")]
    Cut,
    #[error("is lost: {0}")]
    Lost(io::Error),
    #[error("and this side exchange messages of up to {max} bytes, this one has {len}")]
    TooLong { len: usize, max: usize },
    /// Changed, repeated, left out or put in by somebody without the key. `frame` counts from 0.
    #[error("did not send frame {frame} of the connection, or not in this form")]
    Forged { frame: u64 },
    /// From somebody who has the key; `start` is how it begins.
    #[error("sent a message that this tsm-launch does not know: {problem}, in \"{start}\"")]
    Malformed { problem: String, start: String },
    #[error("cannot be sent a message: {0}")]
    Unencodable(serde_json::Error),
}

impl From<io::Error> for Fault {
    fn from(e: io::Error) -> Fault {
        match e.kind() {
            // TLS's own word for an end without a good-bye.
            ErrorKind::UnexpectedEof => Fault::Cut,
            _ => Fault::Lost(e),
        }
    }
}

pub(in crate::cluster) async fn open<S>(
    mut stream: S,
    peer: &str,
    key: &Key,
    role: Role,
    binding: &Binding,
) -> Result<Connection, Why>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sealer, opener) = shake(&mut stream, key, role, binding).await?;
    let (read, write) = tokio::io::split(stream);
    Ok(Connection {
        sender: Sender {
            peer: peer.to_string(),
            sealer,
            out: Vec::new(),
            sent: 0,
            stream: Box::new(write),
        },
        receiver: Receiver::new(peer, opener, Box::new(read)),
    })
}

pub struct Sender {
    peer: String,
    sealer: Sealer,
    /// Frames, of which the first `sent` bytes are gone.
    out: Vec<u8>,
    sent: usize,
    stream: Box<dyn AsyncWrite + Send + Unpin>,
}

impl Sender {
    /// Queues a message and sends all that is queued. Dropped half way, it loses nothing: the rest goes
    /// first the next time.
    ///
    /// # Errors
    /// When the message is too long, which leaves the connection as it was, or the connection is lost.
    pub async fn send(&mut self, message: &impl Serialize) -> Result<(), WireError> {
        self.queue(message)?;
        self.flush().await
    }

    /// Makes the message a part of what [`Self::flush`] sends.
    ///
    /// # Errors
    /// When the message is too long, which leaves the connection as it was.
    pub fn queue(&mut self, message: &impl Serialize) -> Result<(), WireError> {
        let body = serde_json::to_vec(message).map_err(Fault::Unencodable);
        let sealed = body.and_then(|body| self.sealer.seal(&body, &mut self.out));
        sealed.map_err(|fault| self.error(fault))
    }

    /// Sends all that is queued. Dropped half way, it loses nothing.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn flush(&mut self) -> Result<(), WireError> {
        while self.sent < self.out.len() {
            match self.stream.write(&self.out[self.sent..]).await {
                Ok(0) => return Err(self.error(Fault::Cut)),
                Ok(written) => self.sent += written,
                Err(e) => return Err(self.error(e.into())),
            }
        }
        self.sent = 0;
        self.out.clear();
        self.out.shrink_to(CHUNK);
        let flushed = self.stream.flush().await;
        flushed.map_err(|e| self.error(e.into()))
    }

    /// Says good-bye: the other side's [`Receiver::recv`] then ends with `None`. Without it, it ends with
    /// [`Fault::Cut`].
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn close(mut self) -> Result<(), WireError> {
        let sealed = self.sealer.seal(&[], &mut self.out);
        sealed.map_err(|fault| self.error(fault))?;
        self.flush().await?;
        let shut = self.stream.shutdown().await;
        shut.map_err(|e| self.error(e.into()))
    }

    #[cfg(test)]
    pub(super) fn queued(&self) -> &[u8] {
        &self.out[self.sent..]
    }

    fn error(&self, fault: Fault) -> WireError {
        let peer = self.peer.clone();
        WireError { peer, fault }
    }
}

pub struct Receiver {
    peer: String,
    opener: Opener,
    /// What has arrived, of which the first `taken` bytes have been given out.
    arrived: Vec<u8>,
    taken: usize,
    /// The good-bye was read.
    over: bool,
    stream: Box<dyn AsyncRead + Send + Unpin>,
}

impl Receiver {
    pub(super) fn new(
        peer: &str,
        opener: Opener,
        stream: Box<dyn AsyncRead + Send + Unpin>,
    ) -> Receiver {
        Receiver {
            peer: peer.to_string(),
            opener,
            arrived: Vec::new(),
            taken: 0,
            over: false,
            stream,
        }
    }

    /// The next message; `None` once the other side has said good-bye. Dropped half way, as `select!` does,
    /// it loses nothing.
    ///
    /// # Errors
    /// When the connection ends without a good-bye, or what arrives is not what the other side sent, or is no `T`.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>, WireError> {
        loop {
            if self.over {
                return Ok(None);
            }
            let missing = match self.opener.open(&self.arrived[self.taken..]) {
                Ok(Opened::Missing(missing)) => missing,
                Ok(Opened::Body(body)) => {
                    self.taken += body.len() + OVERHEAD;
                    if body.is_empty() {
                        self.over = true;
                        continue;
                    }
                    let message = serde_json::from_slice(body).map_err(|e| malformed(body, &e));
                    return message.map(Some).map_err(|fault| self.error(fault));
                }
                Err(fault) => return Err(self.error(fault)),
            };
            self.make_room(missing);
            match self.stream.read_buf(&mut self.arrived).await {
                Ok(0) => return Err(self.error(Fault::Cut)),
                Ok(_) => {}
                Err(e) => return Err(self.error(e.into())),
            }
        }
    }

    /// Room for what comes next, and none left over from a message that was long.
    fn make_room(&mut self, missing: usize) {
        self.arrived.drain(..self.taken);
        self.taken = 0;
        if self.arrived.is_empty() {
            self.arrived.shrink_to(CHUNK);
        }
        self.arrived.reserve(missing.clamp(CHUNK / 16, CHUNK));
    }

    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// What errors call the other side from now on, instead of its address.
    pub fn name_peer(&mut self, name: &str) {
        self.peer = name.to_string();
    }

    /// Memory that is held for what arrives.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.arrived.capacity()
    }

    #[cfg(test)]
    pub(super) fn read_from(&mut self, stream: Box<dyn AsyncRead + Send + Unpin>) {
        self.stream = stream;
    }

    pub(super) fn frames(&self) -> u64 {
        self.opener.count()
    }

    fn error(&self, fault: Fault) -> WireError {
        let peer = self.peer.clone();
        WireError { peer, fault }
    }
}

fn malformed(body: &[u8], problem: &serde_json::Error) -> Fault {
    let shown = &body[..body.len().min(100)];
    let mut start = String::from_utf8_lossy(shown).escape_debug().to_string();
    if shown.len() < body.len() {
        start.push_str("...");
    }
    Fault::Malformed {
        problem: problem.to_string(),
        start,
    }
}
