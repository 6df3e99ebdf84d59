//! A port that nobody else takes between the launcher's choice and the moment rank 0 listens on it.

use anyhow::Context;
use rustix::net::{
    AddressFamily, SocketAddrAny, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt,
};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;

/// A bound socket that does not listen. With `SO_REUSEADDR` on both sides (torch's store, gloo and Rust's
/// listeners set it) rank 0 can bind the same port and listen, while the kernel gives it to no other
/// connection. It may therefore be held for the whole run.
pub struct Port {
    _held: OwnedFd,
    pub number: u16,
}

impl Port {
    /// Takes a free port of the loopback interface, or with `everywhere` one that is free on all of them.
    ///
    /// # Errors
    /// When there is none.
    pub fn reserve(everywhere: bool) -> anyhow::Result<Port> {
        let address = if everywhere {
            Ipv4Addr::UNSPECIFIED
        } else {
            Ipv4Addr::LOCALHOST
        };
        let what = "cannot reserve a port for MASTER_PORT";
        let socket = socket_with(
            AddressFamily::INET,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .context(what)?;
        sockopt::set_socket_reuseaddr(&socket, true).context(what)?;
        bind(&socket, &SocketAddrV4::new(address, 0)).context(what)?;
        let address: SocketAddrAny = getsockname(&socket).context(what)?;
        let address = SocketAddrV4::try_from(address).context(what)?;
        Ok(Port {
            _held: socket,
            number: address.port(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv6Addr, TcpListener};

    #[test]
    fn the_worker_can_listen_on_a_held_port() {
        for everywhere in [false, true] {
            let port = Port::reserve(everywhere).unwrap();
            drop(TcpListener::bind((Ipv4Addr::LOCALHOST, port.number)).unwrap());
            drop(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port.number)).unwrap());
            drop(TcpListener::bind((Ipv6Addr::UNSPECIFIED, port.number)).unwrap());
        }
    }

    #[test]
    fn held_ports_differ() {
        let ports: Vec<Port> = (0..64).map(|_| Port::reserve(false).unwrap()).collect();
        let numbers: std::collections::HashSet<u16> = ports.iter().map(|p| p.number).collect();
        assert_eq!(numbers.len(), ports.len());
    }
}
