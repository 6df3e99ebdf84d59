//! Frames as bytes; no input and output here.

use hmac::Mac;

use super::connection::Fault;
use super::handshake::Role;
use crate::cluster::key::{self, HmacSha256};

/// Longest message of an agent in bytes; a coordinator has thousands of them to listen to.
pub const MAX_FROM_AGENT: usize = 1 << 20;
/// Longest message to an agent: it may hold a whole command line and environment (2 MiB on Linux), which
/// are four times as long in JSON where they are not UTF-8.
pub const MAX_TO_AGENT: usize = 16 << 20;

const LENGTH_LEN: usize = 4;
const CODE_LEN: usize = 16;
/// What a frame has beside its body.
pub(super) const OVERHEAD: usize = LENGTH_LEN + CODE_LEN;

/// Makes the frames of one direction of one connection.
pub(super) struct Sealer(Direction);

/// Checks them on the other side.
pub(super) struct Opener(Direction);

struct Direction {
    mac: HmacSha256,
    from: Role,
    /// Number of the next frame.
    next: u64,
}

impl Direction {
    fn new(session: &[u8; 32], from: Role) -> Direction {
        let mac = key::hmac(session).chain_update([from.byte()]);
        Direction { mac, from, next: 0 }
    }

    fn code(&self, body: &[u8]) -> HmacSha256 {
        let mac = self.mac.clone().chain_update(self.next.to_be_bytes());
        mac.chain_update(body)
    }
}

/// What there is at the beginning of the bytes that have arrived.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opened<'a> {
    /// Part of a frame, which needs this many bytes more at least.
    Missing(usize),
    /// The body of a frame, which is [`OVERHEAD`] longer.
    Body(&'a [u8]),
}

impl Sealer {
    pub(super) fn new(session: &[u8; 32], from: Role) -> Sealer {
        Sealer(Direction::new(session, from))
    }

    /// Appends a frame to `out`, or leaves it as it is.
    pub(super) fn seal(&mut self, body: &[u8], out: &mut Vec<u8>) -> Result<(), Fault> {
        let max = self.0.from.max_body();
        if body.len() > max {
            let len = body.len();
            return Err(Fault::TooLong { len, max });
        }
        let code = self.0.code(body).finalize().into_bytes();
        out.reserve(body.len() + OVERHEAD);
        out.extend_from_slice(&(body.len() as u32).to_be_bytes());
        out.extend_from_slice(body);
        out.extend_from_slice(&code[..CODE_LEN]);
        self.0.next += 1;
        Ok(())
    }
}

impl Opener {
    pub(super) fn new(session: &[u8; 32], from: Role) -> Opener {
        Opener(Direction::new(session, from))
    }

    /// Reads the frame at the beginning of `input`. After an error the same input gives the same error.
    pub(super) fn open<'a>(&mut self, input: &'a [u8]) -> Result<Opened<'a>, Fault> {
        let Some((len, rest)) = input.split_first_chunk::<LENGTH_LEN>() else {
            return Ok(Opened::Missing(OVERHEAD - input.len()));
        };
        let len = u32::from_be_bytes(*len) as usize;
        let max = self.0.from.max_body();
        if len > max {
            return Err(Fault::TooLong { len, max });
        }
        let Some((body, rest)) = rest.split_at_checked(len) else {
            return Ok(Opened::Missing(len + CODE_LEN - rest.len()));
        };
        let Some(code) = rest.first_chunk::<CODE_LEN>() else {
            return Ok(Opened::Missing(CODE_LEN - rest.len()));
        };
        let expected = self.0.code(body);
        let frame = self.0.next;
        expected
            .verify_truncated_left(code)
            .map_err(|_| Fault::Forged { frame })?;
        self.0.next += 1;
        Ok(Opened::Body(body))
    }

    /// Frames opened so far.
    pub(super) fn count(&self) -> u64 {
        self.0.next
    }
}
