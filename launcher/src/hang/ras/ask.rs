//! The connection to NCCL: one question, one answer, within a limit of time and of size.

use anyhow::{Context, bail, ensure};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// An answer is cut after so many bytes; one of 1,000 ranks as JSON is a third of it.
pub const MAX_BYTES: usize = 2 << 20;

/// How long one process may take to greet. Several listen on one port of a node, the kernel picks one, and that
/// may be the one that hangs: then another try is worth more than patience.
const GREETING: Duration = Duration::from_secs(1);
/// What NCCL adds to the timeout it is given, and the way there and back.
const EXTRA: Duration = Duration::from_secs(6);

/// Asks the process that listens on `address`, such as `localhost:28028`, and returns its answer: JSON, with the counts
/// of every rank, or text where NCCL is older than 2.28.7. Waits, so call it on a thread of its own; `patience` is for
/// everything.
///
/// # Errors
/// When nobody answers there in time, or not as NCCL does.
pub fn ask(address: &str, patience: Duration) -> anyhow::Result<String> {
    let deadline = Instant::now() + patience;
    let mut session = loop {
        match greet(address, deadline) {
            Ok(session) => break session,
            Err(e) if e.again && Instant::now() + GREETING < deadline => {}
            Err(e) => {
                return Err(e.error).with_context(|| format!("cannot ask NCCL at {address}"));
            }
        }
    };
    session
        .status(patience)
        .with_context(|| format!("no answer of NCCL at {address}"))
}

/// Why there is no connection, and whether another process on the same port may do better.
struct NotGreeted {
    again: bool,
    error: anyhow::Error,
}

fn greet(address: &str, deadline: Instant) -> Result<Session, NotGreeted> {
    let never = |error: anyhow::Error| NotGreeted {
        again: false,
        error,
    };
    let addresses: Vec<SocketAddr> = (address.to_socket_addrs())
        .context("not an address of the form host:port; see NCCL_RAS_ADDR")
        .map_err(never)?
        .collect();
    let patience = GREETING.min(left(deadline).map_err(never)?);
    let mut refused = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => {
                let mut session = Session {
                    stream,
                    pending: Vec::new(),
                    deadline: Instant::now() + patience,
                };
                let hello = session.command("CLIENT PROTOCOL 2");
                session.deadline = deadline;
                return match hello {
                    Ok(line) if line.starts_with("SERVER PROTOCOL") => Ok(session),
                    Ok(line) => Err(never(anyhow::anyhow!(
                        "{line:?} is not how NCCL greets: something else listens there"
                    ))),
                    Err(error) => Err(NotGreeted { again: true, error }),
                };
            }
            Err(e) => refused = Some(e),
        }
    }
    let refused = refused.map_or_else(|| anyhow::anyhow!("it has no address"), Into::into);
    Err(never(refused.context(
        "is it NCCL 2.24 or newer, and NCCL_RAS_ENABLE not 0?",
    )))
}

fn left(deadline: Instant) -> anyhow::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    ensure!(!left.is_zero(), "it takes too long");
    Ok(left)
}

struct Session {
    stream: TcpStream,
    /// Read, but not yet used.
    pending: Vec<u8>,
    deadline: Instant,
}

impl Session {
    fn status(&mut self, patience: Duration) -> anyhow::Result<String> {
        let seconds = patience.saturating_sub(EXTRA).as_secs().clamp(1, 5);
        // Neither is known to every version; the answer then says so, and is given all the same.
        self.command(&format!("TIMEOUT {seconds}"))?;
        self.command("SET FORMAT json")?;
        self.send("VERBOSE STATUS")?;
        while self.pending.len() < MAX_BYTES {
            match self.read() {
                Ok(0) => break,
                Ok(_) => {}
                // Half an answer is better than none.
                Err(_) if !self.pending.is_empty() => {
                    self.pending
                        .extend_from_slice(b"\n[the answer breaks off here]\n");
                    break;
                }
                Err(e) => return Err(e),
            }
        }
        if self.pending.len() >= MAX_BYTES {
            self.pending.truncate(MAX_BYTES);
            self.pending
                .extend_from_slice(b"\n[the answer is cut here]\n");
        }
        ensure!(!self.pending.is_empty(), "it closed the connection");
        Ok(String::from_utf8_lossy(&self.pending).into_owned())
    }

    fn send(&mut self, command: &str) -> anyhow::Result<()> {
        self.stream.set_write_timeout(Some(left(self.deadline)?))?;
        self.stream.write_all(format!("{command}\n").as_bytes())?;
        Ok(())
    }

    /// Sends a command and returns the line that answers it.
    fn command(&mut self, command: &str) -> anyhow::Result<String> {
        self.send(command)?;
        loop {
            if let Some(end) = self.pending.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim().to_string());
            }
            if self.pending.len() > 4096 || self.read()? == 0 {
                bail!("no line answers {command:?}");
            }
        }
    }

    fn read(&mut self) -> anyhow::Result<usize> {
        let mut buffer = [0u8; 16 << 10];
        self.stream.set_read_timeout(Some(left(self.deadline)?))?;
        match self.stream.read(&mut buffer) {
            Ok(n) => {
                self.pending.extend_from_slice(&buffer[..n]);
                Ok(n)
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => bail!("it takes too long"),
            Err(e) => Err(e.into()),
        }
    }
}
