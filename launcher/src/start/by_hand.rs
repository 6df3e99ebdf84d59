//! The same command on every node: whoever can listen at the meeting point coordinates.

use anyhow::bail;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tsm_job::config::duration;
use tsm_job::exit::{self, Coded};

use crate::addresses;
use crate::cluster::key::Key;
use crate::cluster::tls::Tls;
use crate::cluster::wire::{self, Connection, Why};
use crate::say::say;

/// Between two tries to reach the coordinator.
const AGAIN: Duration = Duration::from_millis(200);
/// Between two tries to find a name.
const LOOK_UP: Duration = Duration::from_secs(1);
/// One try.
const TRY: Duration = Duration::from_secs(5);

/// What this node is.
pub enum Part {
    Coordinator(TcpListener),
    Agent,
}

/// Of `HOST:PORT`, with brackets around an IPv6 address.
pub(super) fn host_and_port(point: &str) -> Option<(&str, u16)> {
    let (host, port) = point.rsplit_once(':')?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Some((host, port.parse().ok()?))
}

/// The parts of `HOST:PORT`, and its addresses. A name that leads nowhere is looked up again for as long as
/// `patience`. Blocks.
///
/// # Errors
/// [`exit::USAGE`] when it is not that, [`exit::PREFLIGHT`] when the name leads nowhere.
pub fn resolve(point: &str, patience: Duration) -> anyhow::Result<(String, u16, Vec<SocketAddr>)> {
    let Some((host, port)) = host_and_port(point) else {
        let text =
            format!("--rendezvous is {point:?}\n  hint: write HOST:PORT, such as gpu-01:29400");
        bail!(Coded::new(exit::USAGE, text));
    };
    if host.is_empty() {
        let hint = "write HOST:PORT, such as gpu-01:29400";
        let text = format!("--rendezvous is {point:?}, which names no host\n  hint: {hint}");
        bail!(Coded::new(exit::USAGE, text));
    }
    if port == 0 {
        bail!(Coded::new(
            exit::USAGE,
            "--rendezvous needs a port of its own, all nodes have to know it"
        ));
    }
    if host.parse().is_ok_and(|ip: IpAddr| ip.is_unspecified()) {
        let hint = "give the address of the first node, as the others reach it";
        let text = format!("--rendezvous is {point:?}, which is on every node\n  hint: {hint}");
        bail!(Coded::new(exit::USAGE, text));
    }
    let until = Instant::now() + patience;
    let mut is_said = false;
    loop {
        let e = match (host, port).to_socket_addrs() {
            Ok(found) => {
                let found = found.map(|a| reachable(host, a)).collect();
                return Ok((host.into(), port, found));
            }
            Err(e) => e,
        };
        if Instant::now() + LOOK_UP >= until {
            let text = format!(
                "--rendezvous: {host} cannot be found: {e}\n  hint: give the address of the first node"
            );
            bail!(Coded::new(exit::PREFLIGHT, text));
        }
        if !is_said {
            is_said = true;
            let wait = duration::format(patience);
            say(format_args!(
                "waiting up to {wait} for {host} to have an address: {e}"
            ));
        }
        std::thread::sleep(LOOK_UP);
    }
}

/// Listens at `port` on all addresses: the first of several nodes, whose own name may not be known here yet. Call
/// inside the tokio runtime.
///
/// # Errors
/// [`exit::PREFLIGHT`] when the port is taken.
pub fn listen(port: u16) -> Result<TcpListener, Coded> {
    // A kernel without IPv6 has only the second.
    wire::listen((Ipv6Addr::UNSPECIFIED, port).into())
        .or_else(|_| wire::listen((Ipv4Addr::UNSPECIFIED, port).into()))
}

/// Where to listen so that the other nodes can come: a host often has its own name for a loopback address (127.0.1.1
/// in Debian's /etc/hosts), while the others know its real one.
fn reachable(host: &str, address: SocketAddr) -> SocketAddr {
    let is_meant = host == "localhost" || host.parse::<IpAddr>().is_ok();
    match address {
        SocketAddr::V4(a) if a.ip().is_loopback() && !is_meant => {
            (Ipv4Addr::UNSPECIFIED, a.port()).into()
        }
        SocketAddr::V6(a) if a.ip().is_loopback() && !is_meant => {
            (Ipv6Addr::UNSPECIFIED, a.port()).into()
        }
        address => address,
    }
}

/// Listens at the meeting point if it is here and nobody else does. Call inside the tokio runtime.
///
/// # Errors
/// When the point is on this node, but none of its addresses can be used for another reason than that it is taken.
pub fn part(at: &[SocketAddr]) -> anyhow::Result<Part> {
    let own = addresses::own();
    let is_here = |address: &&SocketAddr| {
        let ip = address.ip();
        ip.is_loopback() || ip.is_unspecified() || own.contains(&ip)
    };
    let mut problem = None;
    for address in at.iter().filter(is_here) {
        match wire::listen(*address) {
            Ok(listener) => return Ok(Part::Coordinator(listener)),
            // Another agent of this machine was first; the key tells whether it is one.
            Err(_) if is_taken(address) => return Ok(Part::Agent),
            // Such as an IPv6 address that is still being checked; the name may have others.
            Err(e) => problem = Some(e),
        }
    }
    match problem {
        Some(e) => bail!(e),
        None => Ok(Part::Agent),
    }
}

fn is_taken(address: &SocketAddr) -> bool {
    std::net::TcpListener::bind(address).is_err_and(|e| e.kind() == std::io::ErrorKind::AddrInUse)
}

/// Dials until the coordinator answers.
///
/// # Errors
/// When it cannot be reached within `wait`, or at once when it refuses.
pub async fn dial(
    host: &str,
    port: u16,
    key: &Key,
    tls: Option<&Tls>,
    wait: Duration,
) -> anyhow::Result<Connection> {
    let until = tokio::time::Instant::now() + wait;
    loop {
        match wire::dial(host, port, key, tls, TRY).await {
            Ok(connection) => return Ok(connection),
            Err(refusal) => {
                let passes = matches!(
                    refusal.why,
                    Why::Unreachable(_) | Why::TooSlow(_) | Why::Closed | Why::Io(_)
                );
                if !passes || tokio::time::Instant::now() + AGAIN >= until {
                    let hint = match refusal.why {
                        Why::Unreachable(_) => {
                            "\n  hint: start the first node, on the host that --rendezvous names, and see whether a \
                             firewall lets this port through"
                        }
                        Why::TooSlow(_) | Why::Closed => {
                            "\n  hint: see which program listens there: it may be another one; then give another port"
                        }
                        _ => "",
                    };
                    let coded: Coded = refusal.into();
                    let text = format!("cannot join the job: {}{hint}", coded.message);
                    bail!(Coded::new(coded.code, text));
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meeting_point_is_a_host_and_a_port() {
        assert_eq!(
            resolve("127.0.0.1:29400", Duration::ZERO).unwrap().2,
            ["127.0.0.1:29400".parse().unwrap()]
        );
        assert_eq!(resolve("[::1]:1", Duration::ZERO).unwrap().0, "::1");
        for bad in [
            "gpu-01",
            "gpu-01:",
            ":x",
            "127.0.0.1:0",
            "127.0.0.1:99999",
            "0.0.0.0:1",
            "[::]:1",
        ] {
            assert_eq!(
                exit::code_of(&resolve(bad, Duration::ZERO).err().unwrap()),
                exit::USAGE,
                "{bad}"
            );
        }
        // The dot at its end keeps it from being looked for in a domain of this machine's.
        let none = resolve("no-such-host.invalid.:1", Duration::ZERO)
            .err()
            .unwrap();
        assert_eq!(exit::code_of(&none), exit::PREFLIGHT);
    }

    #[test]
    fn a_host_s_own_name_for_loopback_is_all_its_addresses() {
        let debian = "127.0.1.1:7".parse().unwrap();
        assert_eq!(reachable("gpu-01", debian), "0.0.0.0:7".parse().unwrap());
        assert_eq!(reachable("127.0.1.1", debian), debian);
        assert_eq!(reachable("localhost", debian), debian);
        let v6 = "[::1]:7".parse().unwrap();
        assert_eq!(reachable("gpu-01", v6), "[::]:7".parse().unwrap());
        let real = "10.0.0.1:7".parse().unwrap();
        assert_eq!(reachable("gpu-01", real), real);
    }

    #[tokio::test]
    async fn the_first_listens_and_the_second_does_not() {
        let held = crate::port::Port::reserve().unwrap();
        let point = SocketAddr::from((Ipv4Addr::LOCALHOST, held.number));
        let first = part(&[point]).unwrap();
        assert!(matches!(first, Part::Coordinator(_)));
        assert!(matches!(part(&[point]).unwrap(), Part::Agent));
        // TEST-NET-1 is nobody's.
        assert!(matches!(
            part(&["192.0.2.1:1".parse().unwrap()]).unwrap(),
            Part::Agent
        ));
    }
}
