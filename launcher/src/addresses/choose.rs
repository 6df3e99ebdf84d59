//! Which address of the first node the job uses.

use std::net::IpAddr;

use crate::text::few;

/// An address of the first node that every other node reached.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    pub address: IpAddr,
    /// The interface of each node that leads there; the first node's own first, then in the order of `others`.
    pub interfaces: Vec<String>,
}

/// Takes the first address of `listed` that all `others` reached.
///
/// `first` and `listed` are the first node and its addresses in order of preference; `others` are the
/// other nodes and what each of them reached. With no other node it is the first address listed.
///
/// # Errors
/// A text that names who cannot reach what, with a hint.
pub fn choose(
    first: &str,
    listed: &[(IpAddr, String)],
    others: &[(String, Vec<(IpAddr, String)>)],
) -> Result<Choice, String> {
    let through = |by: &[(IpAddr, String)], address: IpAddr| {
        by.iter()
            .find(|(a, _)| *a == address)
            .map(|(_, name)| name.clone())
    };
    for (address, own) in listed {
        let theirs = others.iter().map(|(_, by)| through(by, *address));
        if let Some(interfaces) = [Some(own.clone())].into_iter().chain(theirs).collect() {
            return Ok(Choice {
                address: *address,
                interfaces,
            });
        }
    }
    let hint = "hint: the nodes need a network in common without a firewall between them; see `ip addr` and `ip route` on both";
    if listed.is_empty() {
        return Err(format!(
            "{first} has no network interface that is up besides loopback\n  {hint}"
        ));
    }
    let cut_off: Vec<&str> = others
        .iter()
        .filter(|(_, by)| {
            !listed
                .iter()
                .any(|(address, _)| through(by, *address).is_some())
        })
        .map(|(host, _)| host.as_str())
        .collect();
    if !cut_off.is_empty() {
        let addresses: Vec<String> = listed
            .iter()
            .map(|(a, name)| format!("{a} ({name})"))
            .collect();
        let (hosts, addresses) = (few(&cut_off), addresses.join(", "));
        return Err(format!(
            "{hosts} cannot reach {first} at any of its addresses: {addresses}\n  {hint}"
        ));
    }
    let missing: Vec<String> = listed
        .iter()
        .map(|(address, name)| {
            let without = others
                .iter()
                .filter(|(_, by)| through(by, *address).is_none());
            let hosts: Vec<&str> = without.map(|(host, _)| host.as_str()).collect();
            format!("{address} ({name}) not by {}", few(&hosts))
        })
        .collect();
    let missing = missing.join("; ");
    Err(format!(
        "no address of {first} is reached by all nodes: {missing}\n  {hint}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(list: &[(&str, &str)]) -> Vec<(IpAddr, String)> {
        let parse = |(address, name): &(&str, &str)| (address.parse().unwrap(), name.to_string());
        list.iter().map(parse).collect()
    }

    #[test]
    fn the_preferred_of_the_addresses_that_all_reached() {
        let listed = at(&[
            ("10.9.0.1", "ib0"),
            ("10.0.0.1", "eth0"),
            ("10.1.0.1", "eth1"),
        ]);
        let others = [
            (
                "b".to_string(),
                at(&[
                    ("10.1.0.1", "eth1"),
                    ("10.0.0.1", "eth0"),
                    ("10.9.0.1", "ib0"),
                ]),
            ),
            (
                "c".to_string(),
                at(&[("10.1.0.1", "eno2"), ("10.0.0.1", "eno1")]),
            ),
        ];
        let choice = choose("a", &listed, &others).unwrap();
        assert_eq!(choice.address, listed[1].0);
        assert_eq!(choice.interfaces, ["eth0", "eth0", "eno1"]);
        assert_eq!(choose("a", &listed, &[]).unwrap().interfaces, ["ib0"]);
    }

    #[test]
    fn the_text_says_who_cannot_reach_what() {
        let listed = at(&[("10.0.0.1", "eth0"), ("10.1.0.1", "eth1")]);
        let (b, c) = (at(&[("10.0.0.1", "eth0")]), at(&[("10.1.0.1", "eth0")]));
        let error = choose("a", &listed, &[("b".into(), b.clone()), ("c".into(), c)]).unwrap_err();
        assert!(
            error.starts_with(
                "no address of a is reached by all nodes: 10.0.0.1 (eth0) not by c; 10.1.0.1 (eth1) not by b\n"
            ),
            "{error}"
        );
        let many: Vec<_> = (0..10)
            .map(|i| (format!("n{i}"), Vec::new()))
            .chain([("b".into(), b)])
            .collect();
        let error = choose("a", &listed, &many).unwrap_err();
        assert!(
            error.starts_with("n0, n1, n2, n3, n4, n5, n6, n7 and 2 more cannot reach a at any of its addresses: 10.0.0.1 (eth0), 10.1.0.1 (eth1)\n"),
            "{error}"
        );
        assert!(
            choose("a", &[], &[])
                .unwrap_err()
                .starts_with("a has no network interface")
        );
    }
}
