//! What differs between nodes.

use std::collections::BTreeMap;

use crate::cluster::message::{Finding, Join, Severity};

/// Compares the nodes of a job by what they said when they joined.
pub fn across(nodes: &[&Join]) -> Vec<Finding> {
    use Severity::{Ok as Note, Warning};
    let gpus = |node: &Join| match node.gpus.as_slice() {
        [] => "no GPU".to_string(),
        all => {
            let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
            for gpu in all {
                *kinds.entry(&gpu.name).or_default() += 1;
            }
            let kinds: Vec<String> = kinds
                .iter()
                .map(|(name, n)| format!("{n} x {name}"))
                .collect();
            kinds.join(" + ")
        }
    };
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    type Get<'a> = &'a dyn Fn(&Join) -> String;
    let versions = "install the same version on all nodes";
    let rules: [(Severity, &str, &str, Get, &str); 7] = [
        (
            Warning,
            "version",
            "tsm-launch",
            &|n| n.version.clone(),
            versions,
        ),
        (
            Warning,
            "gpu",
            "the GPUs",
            &gpus,
            "all ranks wait for the slowest; take nodes of one kind",
        ),
        (
            Warning,
            "gpu",
            "the NVIDIA driver",
            &|n| text(&n.facts.driver),
            versions,
        ),
        (
            Warning,
            "nccl",
            "NCCL",
            &|n| text(&n.facts.nccl),
            "mixed versions may hang or fail at the first collective; install the same one on all nodes",
        ),
        (Note, "cpu", "the CPU", &|n| n.facts.cpu.clone(), ""),
        (
            Note,
            "cpu",
            "the number of cores",
            &|n| n.facts.num_cpus.to_string(),
            "",
        ),
        (
            Note,
            "kernel",
            "the kernel",
            &|n| n.facts.kernel.clone(),
            "",
        ),
    ];
    let compare = |(severity, area, what, get, hint): (Severity, &str, &str, Get, &str)| {
        let groups = groups(nodes, get);
        (groups.len() > 1).then(|| {
            let text = format!("{what} differs: {}", groups.join("; "))
                .replace("GPUs differs", "GPUs differ");
            Finding::new(severity, area, text, hint)
        })
    };
    rules.into_iter().filter_map(compare).collect()
}

/// What harms a job on some of the nodes, each with the nodes of which it was said, unless there is only one.
pub fn of_nodes(nodes: &[&Join]) -> Vec<Finding> {
    let mut found: Vec<(&Finding, Vec<&str>)> = Vec::new();
    for node in nodes {
        let wrong = node.facts.findings.iter();
        for finding in wrong.filter(|f| f.severity > Severity::Ok) {
            match found.iter_mut().find(|(known, _)| *known == finding) {
                Some((_, hosts)) => hosts.push(&node.host),
                None => found.push((finding, vec![&node.host])),
            }
        }
    }
    let named = |(finding, hosts): (&Finding, Vec<&str>)| Finding {
        text: match nodes.len() {
            1 => finding.text.clone(),
            _ => format!("{}: {}", some(&hosts), finding.text),
        },
        ..finding.clone()
    };
    found.into_iter().map(named).collect()
}

/// The first few of many.
fn some(hosts: &[&str]) -> String {
    const SHOWN: usize = 6;
    match hosts.len() {
        n if n > SHOWN => format!("{} and {} more", hosts[..SHOWN].join(", "), n - SHOWN),
        _ => hosts.join(", "),
    }
}

/// `570.1 on a, c`, the most frequent first; nodes that do not know do not count.
fn groups(nodes: &[&Join], get: &dyn Fn(&Join) -> String) -> Vec<String> {
    let mut hosts: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for node in nodes {
        let value = get(node);
        if !value.is_empty() {
            hosts.entry(value).or_default().push(&node.host);
        }
    }
    let mut groups: Vec<_> = hosts.into_iter().collect();
    groups.sort_by_key(|(_, hosts)| std::cmp::Reverse(hosts.len()));
    let text = |(value, hosts): (String, Vec<&str>)| format!("{value} on {}", some(&hosts));
    groups.into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::message::Facts;
    use crate::gpus::Gpu;

    fn node(host: &str, driver: Option<&str>, num_gpus: usize) -> Join {
        let gpu = |i| Gpu {
            id: format!("{i}"),
            name: "H200".into(),
            uuid: format!("GPU-{host}{i}"),
        };
        Join {
            version: "0.1.0".into(),
            host: host.into(),
            order: None,
            pid: 1,
            devices: Vec::new(),
            gpus: (0..num_gpus).map(gpu).collect(),
            addresses: Vec::new(),
            job: None,
            received_ms: 0,
            facts: Facts {
                driver: driver.map(String::from),
                kernel: "6.1".into(),
                cpu: "EPYC".into(),
                num_cpus: 96,
                ..Facts::default()
            },
        }
    }

    #[test]
    fn equal_nodes_and_a_single_one_differ_in_nothing() {
        let (a, b) = (node("a", Some("570.1"), 8), node("b", Some("570.1"), 8));
        assert_eq!(across(&[&a, &b]), []);
        assert_eq!(across(&[&a]), []);
        let unknown = node("c", None, 8);
        assert_eq!(
            across(&[&a, &unknown]),
            [],
            "a node that does not know is no difference"
        );
    }

    #[test]
    fn the_odd_node_is_named() {
        let (a, b) = (node("a", Some("570.1"), 8), node("b", Some("570.1"), 8));
        let mut c = node("c", Some("550.9"), 7);
        c.facts.kernel = "5.15".into();
        let found = across(&[&c, &a, &b]);
        let texts: Vec<&str> = found.iter().map(|f| f.text.as_str()).collect();
        assert_eq!(
            texts,
            [
                "the GPUs differ: 8 x H200 on a, b; 7 x H200 on c",
                "the NVIDIA driver differs: 570.1 on a, b; 550.9 on c",
                "the kernel differs: 6.1 on a, b; 5.15 on c",
            ]
        );
        assert_eq!(found[2].severity, Severity::Ok);
    }
}
