//! Network interfaces of this node, and which of them reach the other nodes.
//!
//! A list of addresses does not tell which of them other nodes can use: 172.17.0.1 of docker exists on every
//! host. So each node dials all addresses of the first one, and only an answer that proves knowledge of
//! the job's key counts (`probe`); [`choose()`] then takes an address that everybody reached.

mod choose;
mod probe;
#[cfg(test)]
pub(crate) mod scene;

pub use choose::{Choice, choose};
pub use probe::{ProbeListener, listen_on_all, reach};

use if_addrs::get_if_addrs;
use std::cmp::Reverse;
use std::net::IpAddr;

/// Interfaces that lead to containers and virtual machines of this host, by the beginning of their names.
const VIRTUAL: [&str; 13] = [
    "docker", "veth", "br-", "virbr", "vnet", "cni", "flannel", "cali", "cilium", "kube", "lxc",
    "lxd", "podman",
];

/// Addresses of the interfaces that are up, without loopback and link-local IPv6, the most likely fast
/// private network first. The name is as `NCCL_SOCKET_IFNAME` and `GLOO_SOCKET_IFNAME` want it.
pub fn list() -> Vec<(IpAddr, String)> {
    let all = get_if_addrs().unwrap_or_default();
    let mut found: Vec<Interface> = all
        .into_iter()
        .filter(|i| i.is_oper_up() && !i.is_loopback() && i.name != "lo")
        .map(|i| Interface {
            speed_mbit_s: speed(&i.name),
            address: i.ip(),
            name: i.name,
        })
        .collect();
    found.sort_by(|a, b| a.order().cmp(&b.order()));
    found.into_iter().map(|i| (i.address, i.name)).collect()
}

/// All addresses of this node, also those of interfaces that are down, and of `lo`, where networks that route to
/// every host put its only address.
pub fn own() -> Vec<IpAddr> {
    let all = get_if_addrs().unwrap_or_default();
    all.into_iter().map(|i| i.ip()).collect()
}

/// The interface of this node with the address `local`, whatever its state.
fn interface(local: IpAddr) -> Option<String> {
    let all = get_if_addrs().unwrap_or_default();
    all.into_iter().find(|i| i.ip() == local).map(|i| i.name)
}

/// One address of an interface.
#[derive(Clone, Debug)]
struct Interface {
    name: String,
    address: IpAddr,
    /// 0: not known.
    speed_mbit_s: u32,
}

impl Interface {
    /// What is smaller comes first.
    fn order(&self) -> impl Ord + use<'_> {
        let is_virtual = VIRTUAL.iter().any(|start| self.name.starts_with(start));
        let link_local = matches!(self.address, IpAddr::V4(v4) if v4.is_link_local());
        (
            is_virtual || link_local,
            self.address.is_ipv6(),
            !self.name.starts_with("ib"),
            Reverse(self.speed_mbit_s),
            // eth2 before eth10.
            (self.name.len(), self.name.as_str()),
            self.address,
        )
    }
}

/// `eth0:1` is a further address of `eth0`. A virtual machine's interface says -1, one without carrier nothing.
fn speed(name: &str) -> u32 {
    let device = name.split(':').next().unwrap_or(name);
    fs_err::read_to_string(format!("/sys/class/net/{device}/speed"))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fast_private_network_comes_first_and_containers_last() {
        let mut all: Vec<Interface> = [
            ("docker0", "172.17.0.1", 10_000),
            ("eth10", "10.0.10.5", 25_000),
            ("eth1", "169.254.3.4", 400_000),
            ("eth2", "fd00::5", 25_000),
            ("eth2", "10.0.2.5", 25_000),
            ("ib0", "10.9.0.5", 0),
            ("eno1", "192.168.1.5", 1_000),
            ("ib1", "fd09::5", 0),
            ("br-12ab", "172.18.0.1", 0),
            ("eth3", "10.0.3.5", 100_000),
        ]
        .into_iter()
        .map(|(name, address, speed_mbit_s)| Interface {
            name: name.into(),
            address: address.parse().unwrap(),
            speed_mbit_s,
        })
        .collect();
        all.sort_by(|a, b| a.order().cmp(&b.order()));
        let order: Vec<String> = all.iter().map(|i| i.address.to_string()).collect();
        assert_eq!(
            order,
            [
                "10.9.0.5",
                "10.0.3.5",
                "10.0.2.5",
                "10.0.10.5",
                "192.168.1.5",
                "fd09::5",
                "fd00::5",
                "169.254.3.4",
                "172.17.0.1",
                "172.18.0.1",
            ]
        );
    }

    #[test]
    fn only_what_is_up_and_no_loopback_is_listed() {
        let found = scene::in_namespace(|net| {
            net.ip("link set lo up");
            net.ip("link add up0 type veth peer name up1");
            net.ip("link add down0 type veth peer name down1");
            net.ip("addr add 10.0.0.1/24 dev up0");
            net.ip("addr add 10.0.1.1/24 dev down0");
            net.ip("link add docker0 type veth peer name docker1");
            net.ip("addr add 172.17.0.1/16 dev docker0");
            for name in ["up0", "up1", "docker0", "docker1"] {
                net.ip(&format!("link set {name} up"));
            }
            // The kernel notices the carrier of a virtual cable with a delay.
            scene::until(|| Some(list()).filter(|found| found.len() == 2))
        });
        let Some(found) = found else { return };
        let expected = [("10.0.0.1", "up0"), ("172.17.0.1", "docker0")];
        assert_eq!(
            found,
            expected.map(|(address, name)| (address.parse().unwrap(), name.to_string()))
        );
    }
}
