//! How the other nodes find the first one: a port that it holds for rank 0, and which of its addresses they reach.

use anyhow::Context;
use std::net::IpAddr;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;

use crate::addresses::{self, ProbeListener};
use crate::cluster::key::Key;
use crate::cluster::message::FromAgent;
use crate::cluster::wire::{is_proof, prove};
use crate::port::Port;

/// How long a probe waits for the first answer, and after it for others.
const PROBE: Duration = Duration::from_secs(5);
const LINGER: Duration = Duration::from_millis(300);

/// Held on the first node until its ranks have ended.
pub struct Reserved {
    pub master: Port,
    /// `None` where there is one node only.
    pub probes: Option<ProbeListener>,
}

impl Reserved {
    /// # Errors
    /// When no port is free.
    pub fn new(key: Option<&Key>, generation: u32) -> anyhow::Result<Reserved> {
        let master = Port::reserve()?;
        let listen = |key: &Key| {
            let key = key.clone();
            ProbeListener::start(move |nonce| prove(&key, nonce, u64::from(generation)))
        };
        let probes = key.map(listen).transpose();
        let probes = probes.context("cannot listen for the other nodes' probes")?;
        Ok(Reserved { master, probes })
    }
}

/// Finds out which of these addresses of the first node can be reached, and says so to `found`.
pub fn probe(
    key: Option<Key>,
    generation: u32,
    attempt: u32,
    addresses: Vec<IpAddr>,
    port: u16,
    found: UnboundedSender<FromAgent>,
) {
    tokio::task::spawn_local(async move {
        let check = |nonce: [u8; 16], answer: [u8; 32]| {
            let of = u64::from(generation);
            key.as_ref()
                .is_some_and(|key| is_proof(key, nonce, of, &answer))
        };
        let by = addresses::reach(&addresses, port, check, PROBE, LINGER).await;
        let _ = found.send(FromAgent::Reached {
            generation,
            attempt,
            by,
        });
    });
}
