//! Versions of what a job was run with.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use crate::cluster::message::Join;

/// Of the nodes' own parts. Where they differ, each with its hosts.
pub fn of_nodes(joins: &[&Join]) -> BTreeMap<String, String> {
    type Get = fn(&Join) -> Option<String>;
    let parts: [(&str, Get); 4] = [
        ("tsm-launch", |n| Some(n.version.clone())),
        ("driver", |n| n.facts.driver.clone()),
        // Which the workers are expected to load; they know better, and may say so.
        ("nccl", |n| n.facts.nccl.clone()),
        ("kernel", |n| Some(n.facts.kernel.clone())),
    ];
    let version = |(name, get): &(&str, Get)| {
        let known = |n: &&Join| Some((get(n).filter(|v| !v.is_empty())?, n.host.clone()));
        let mut hosts: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (version, host) in joins.iter().filter_map(known) {
            hosts.entry(version).or_default().push(host);
        }
        let text = match hosts.len() {
            0 => return None,
            1 => hosts.into_keys().next()?,
            _ => {
                let on = |(version, hosts): (_, Vec<String>)| {
                    format!("{version} on {}", hosts.join(", "))
                };
                hosts.into_iter().map(on).collect::<Vec<_>>().join("; ")
            }
        };
        Some((name.to_string(), text))
    };
    parts.iter().filter_map(version).collect()
}

/// Of what has started the launcher. Asks programs, which may take a moment.
pub fn of_starters() -> BTreeMap<String, String> {
    let mut versions = BTreeMap::new();
    type Read = fn(&str) -> Option<String>;
    let starters: [(_, _, _, Read); 2] = [
        ("slurm", "SLURM_JOB_ID", "scontrol", slurm),
        ("open mpi", "OMPI_COMM_WORLD_SIZE", "mpirun", open_mpi),
    ];
    for (name, variable, program, read) in starters {
        if std::env::var_os(variable).is_some()
            && let Some(version) = ask(program).and_then(|text| read(&text))
        {
            versions.insert(name.into(), version);
        }
    }
    versions
}

/// What `program --version` prints.
fn ask(program: &str) -> Option<String> {
    let mut command = Command::new(program);
    command
        .arg("--version")
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    let output = command.output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Distributions add to the name: Debian's is `slurm-wlm`.
fn slurm(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with("slurm"))?;
    line.split_whitespace().nth(1).map(String::from)
}

fn open_mpi(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("(Open MPI) ")?;
    rest.split_whitespace().next().map(String::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::coordinator::tests::join_of;

    #[test]
    fn a_version_stands_alone_where_all_nodes_have_it_and_else_with_its_hosts() {
        let node = |host: &str, driver: Option<&str>| {
            let mut join = join_of(host, 1);
            join.version = "0.1.0".into();
            join.facts.driver = driver.map(String::from);
            join.facts.kernel = "6.1".into();
            join
        };
        let (a, b, c) = (
            node("a", Some("570.1")),
            node("b", Some("550.9")),
            node("c", None),
        );
        let found = of_nodes(&[&a, &c]);
        let expected = [
            ("driver", "570.1"),
            ("kernel", "6.1"),
            ("tsm-launch", "0.1.0"),
        ];
        assert!(
            found
                .iter()
                .map(|(n, v)| (n.as_str(), v.as_str()))
                .eq(expected),
            "{found:?}"
        );
        assert_eq!(of_nodes(&[&a, &b, &c])["driver"], "550.9 on b; 570.1 on a");
    }

    #[test]
    fn the_starters_print_their_versions_like_this() {
        assert_eq!(slurm("slurm 23.11.4\n").as_deref(), Some("23.11.4"));
        assert_eq!(slurm("slurm-wlm 22.05.8\n").as_deref(), Some("22.05.8"));
        assert_eq!(slurm("scontrol: error: no slurm.conf\n"), None);
        let mpi =
            "mpirun (Open MPI) 4.1.6\n\nReport bugs to http://www.open-mpi.org/community/help/\n";
        assert_eq!(open_mpi(mpi).as_deref(), Some("4.1.6"));
        assert_eq!(open_mpi("mpirun (PRRTE) 3.0"), None);
    }
}
