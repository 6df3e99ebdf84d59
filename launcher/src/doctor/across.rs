//! What differs between nodes.

use std::collections::BTreeMap;

use crate::cluster::message::{Finding, Join, Severity};
use crate::text::few;

/// Something in which nodes should not differ.
struct Rule {
    severity: Severity,
    area: &'static str,
    what: &'static str,
    /// Empty where the node does not know.
    get: fn(&Join) -> String,
    hint: &'static str,
}

const VERSIONS: &str = "install the same version on all nodes";

fn rule(
    severity: Severity,
    area: &'static str,
    what: &'static str,
    get: fn(&Join) -> String,
    hint: &'static str,
) -> Rule {
    Rule {
        severity,
        area,
        what,
        get,
        hint,
    }
}

fn rules() -> [Rule; 7] {
    use Severity::{Ok as Note, Warning};
    let (one_kind, mixed) = (
        "all ranks wait for the slowest; take nodes of one kind",
        "mixed versions may hang or fail at the first collective; install the same one on all nodes",
    );
    [
        rule(
            Warning,
            "version",
            "tsm-launch",
            |n| n.version.clone(),
            VERSIONS,
        ),
        rule(Warning, "gpu", "the GPUs", gpus, one_kind),
        rule(Warning, "gpu", "the NVIDIA driver", driver, VERSIONS),
        rule(Warning, "nccl", "NCCL", nccl, mixed),
        rule(Note, "cpu", "the CPU", |n| n.facts.cpu.clone(), ""),
        rule(
            Note,
            "cpu",
            "the number of cores",
            |n| n.facts.num_cpus.to_string(),
            "",
        ),
        rule(Note, "kernel", "the kernel", |n| n.facts.kernel.clone(), ""),
    ]
}

fn driver(node: &Join) -> String {
    node.facts.driver.clone().unwrap_or_default()
}

fn nccl(node: &Join) -> String {
    node.facts.nccl.clone().unwrap_or_default()
}

fn gpus(node: &Join) -> String {
    if node.gpus.is_empty() {
        return "no GPU".into();
    }
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for gpu in &node.gpus {
        *kinds.entry(&gpu.name).or_default() += 1;
    }
    let kinds = kinds.iter().map(|(name, n)| format!("{n} x {name}"));
    kinds.collect::<Vec<_>>().join(" + ")
}

impl Rule {
    fn finding(&self, severity: Severity, groups: &[String]) -> Finding {
        let text = format!("{} differs: {}", self.what, groups.join("; "))
            .replace("GPUs differs", "GPUs differ");
        Finding::new(severity, self.area, text, self.hint)
    }
}

/// Compares the nodes of a job by what they said when they joined.
pub fn across(nodes: &[&Join]) -> Vec<Finding> {
    let compare = |rule: Rule| {
        let groups = groups(nodes, rule.get);
        (groups.len() > 1).then(|| rule.finding(rule.severity, &groups))
    };
    let mut findings: Vec<Finding> = rules().into_iter().filter_map(compare).collect();
    findings.extend(unknown_nccl(nodes, nodes));
    findings
}

/// Compares a node that comes later with those that run already: how it differs from all of them. What makes NCCL refuse
/// to connect ranks is an error: it would end a job that runs well.
pub fn late(running: &[&Join], node: &Join) -> Vec<Finding> {
    let all: Vec<&Join> = running.iter().copied().chain([node]).collect();
    let compare = |rule: Rule| {
        let (own, known) = ((rule.get)(node), groups(running, rule.get));
        let alike = running.iter().any(|r| (rule.get)(r) == own);
        let differs = !own.is_empty() && !known.is_empty() && !alike;
        let severity = match rule.area {
            "nccl" => Severity::Error,
            _ => rule.severity,
        };
        differs.then(|| rule.finding(severity, &groups(&all, rule.get)))
    };
    let mut findings: Vec<Finding> = rules().into_iter().filter_map(compare).collect();
    findings.extend(unknown_nccl(&all, &[node]));
    findings
}

/// `these` of the nodes do not say which NCCL they have, and others do.
fn unknown_nccl(all: &[&Join], these: &[&Join]) -> Option<Finding> {
    let known = groups(all, nccl);
    let silent = these
        .iter()
        .filter(|n| !n.gpus.is_empty() && nccl(n).is_empty());
    let silent: Vec<&str> = silent.map(|n| n.host.as_str()).collect();
    (!known.is_empty() && !silent.is_empty()).then(|| {
        let text = format!(
            "NCCL was not found on {}, so it may differ: {}",
            few(&silent),
            known.join("; ")
        );
        let hint = "see that all nodes have the same libraries; a program may bring its own NCCL";
        Finding::warning("nccl", text, hint)
    })
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
            _ => format!("{}: {}", few(&hosts), finding.text),
        },
        ..finding.clone()
    };
    found.into_iter().map(named).collect()
}

/// `570.1 on a, c`, the most frequent first; nodes that do not know do not count.
fn groups(nodes: &[&Join], get: fn(&Join) -> String) -> Vec<String> {
    let mut hosts: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for node in nodes {
        let value = get(node);
        if !value.is_empty() {
            hosts.entry(value).or_default().push(&node.host);
        }
    }
    let mut groups: Vec<_> = hosts.into_iter().collect();
    groups.sort_by_key(|(_, hosts)| std::cmp::Reverse(hosts.len()));
    let text = |(value, hosts): (String, Vec<&str>)| format!("{value} on {}", few(&hosts));
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
            options: Vec::new(),
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

    #[test]
    fn a_later_node_is_compared_with_those_that_run() {
        let with = |host, nccl: Option<&str>| {
            let mut join = node(host, Some("570.1"), 8);
            join.facts.nccl = nccl.map(String::from);
            join
        };
        let (a, b) = (with("a", Some("2.27.3")), with("b", Some("2.28.9")));
        // What one of them has is not new.
        assert_eq!(late(&[&a, &b], &with("c", Some("2.28.9"))), []);
        let found = late(&[&a], &with("c", Some("2.28.9")));
        let told = |f: &Finding| (f.severity, f.text.clone());
        let text = "NCCL differs: 2.27.3 on a; 2.28.9 on c";
        assert_eq!(
            found.iter().map(told).collect::<Vec<_>>(),
            [(Severity::Error, text.into())]
        );
        // Among those that start together nobody can say whose is right.
        let found = across(&[&a, &b]);
        assert_eq!((found.len(), found[0].severity), (1, Severity::Warning));
        // One that does not know its own may differ.
        let found = late(&[&a], &with("c", None));
        let text = "NCCL was not found on c, so it may differ: 2.27.3 on a";
        assert_eq!(
            found.iter().map(told).collect::<Vec<_>>(),
            [(Severity::Warning, text.into())]
        );
        assert_eq!(across(&[&a, &with("c", None)])[0].text, text);
        assert_eq!(late(&[&with("a", None)], &with("c", None)), []);
        let mut driver = with("c", Some("2.27.3"));
        driver.facts.driver = Some("550.9".into());
        let text = "the NVIDIA driver differs: 550.9 on c; 570.1 on a";
        let found = late(&[&a], &driver);
        assert_eq!(
            found.iter().map(told).collect::<Vec<_>>(),
            [(Severity::Warning, text.into())]
        );
    }
}
