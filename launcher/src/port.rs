//! A port that nobody else takes between the launcher's choice and the moment rank 0 listens on it.

use anyhow::Context;
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

/// A bound socket that does not listen. With `SO_REUSEADDR` on both sides (torch's store, gloo and Rust's
/// listeners set it) rank 0 can bind the same port and listen, while the kernel gives it to no other
/// connection. It may therefore be held for the whole run.
pub struct Port {
    _held: OwnedFd,
    pub number: u16,
}

impl Port {
    /// Takes a port that is free on all interfaces, also for a job of one node: torch's store listens on all of them,
    /// and NCCL of another job may have the same number on one.
    ///
    /// # Errors
    /// When there is none.
    pub fn reserve() -> anyhow::Result<Port> {
        // A kernel without IPv6 has only the second.
        Port::bind(AddressFamily::INET6, Ipv6Addr::UNSPECIFIED.into())
            .or_else(|_| Port::bind(AddressFamily::INET, Ipv4Addr::UNSPECIFIED.into()))
            .context("cannot reserve a port for MASTER_PORT")
    }

    fn bind(family: AddressFamily, address: IpAddr) -> rustix::io::Result<Port> {
        let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        if family == AddressFamily::INET6 {
            // net.ipv6.bindv6only may be set.
            sockopt::set_ipv6_v6only(&socket, false)?;
        }
        sockopt::set_socket_reuseaddr(&socket, true)?;
        bind(&socket, &SocketAddr::new(address, 0))?;
        let bound = SocketAddr::try_from(getsockname(&socket)?)?;
        Ok(Port {
            _held: socket,
            number: bound.port(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use std::net::TcpListener;

    #[test]
    fn the_worker_can_listen_on_a_held_port() {
        let port = Port::reserve().unwrap();
        drop(TcpListener::bind((Ipv4Addr::LOCALHOST, port.number)).unwrap());
        drop(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port.number)).unwrap());
        match TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)) {
            Ok(_) => drop(TcpListener::bind((Ipv6Addr::UNSPECIFIED, port.number)).unwrap()),
            Err(e) => eprintln!("skipped in part: no IPv6 ({e})"),
        }
    }

    #[test]
    fn held_ports_differ() {
        let ports: Vec<Port> = (0..64).map(|_| Port::reserve().unwrap()).collect();
        let numbers: std::collections::HashSet<u16> = ports.iter().map(|p| p.number).collect();
        assert_eq!(numbers.len(), ports.len());
    }

    /// As NCCL and gloo, which listen on one address, and do not share a port.
    #[test]
    fn nobody_else_gets_a_held_port_on_any_address() {
        let port = Port::reserve().unwrap();
        for address in ["127.0.0.1", "127.0.0.2", "::1"] {
            let address: IpAddr = address.parse().unwrap();
            let family = match address {
                IpAddr::V4(_) => AddressFamily::INET,
                IpAddr::V6(_) => AddressFamily::INET6,
            };
            let flags = SocketFlags::CLOEXEC;
            let Ok(socket) = socket_with(family, SocketType::STREAM, flags, None) else {
                continue;
            };
            let taken = bind(&socket, &SocketAddr::new(address, port.number)).unwrap_err();
            let expected = match TcpListener::bind((address, 0)) {
                Ok(_) => ErrorKind::AddrInUse,
                // No such address on this machine.
                Err(e) => e.kind(),
            };
            assert_eq!(taken.kind(), expected, "{address}");
        }
    }
}
