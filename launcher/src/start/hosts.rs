//! The hosts of a job as a user lists them: `--hosts a:8,b:8`, or a file. Pure.

use tsm_job::config::Launch;
use tsm_job::exit::{self, Coded};

use crate::cli::Gpus;
use crate::plan::Workers;

/// One host to start an agent on.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// As ssh takes it: a name of ssh_config or DNS, or an address; behind `user@` where one was given.
    pub destination: String,
    /// `None`: as many as `--gpus` or `--cpus` says.
    pub num_workers: Option<u32>,
}

impl Host {
    /// What it is called in logs and errors.
    pub fn name(&self) -> &str {
        self.destination
            .rsplit_once('@')
            .map_or(&self.destination, |(_, name)| name)
    }
}

/// The value of `--hosts`.
///
/// # Errors
/// [`exit::USAGE`].
pub fn parse_list(text: &str) -> Result<Vec<Host>, Coded> {
    let refuse = |problem: String| {
        let hint = "write --hosts gpu-01:8,gpu-02:8, where :8 is the number of workers";
        Coded::new(
            exit::USAGE,
            format!("--hosts is {text:?}: {problem}\n  hint: {hint}"),
        )
    };
    let hosts = text.split(',').map(|word| parse_host(word.trim()));
    let hosts = hosts.collect::<Result<Vec<_>, _>>().map_err(refuse)?;
    for (i, host) in hosts.iter().enumerate() {
        if hosts[..i].iter().any(|other| other.name() == host.name()) {
            return Err(refuse(format!("{} is named twice", host.name())));
        }
    }
    Ok(hosts)
}

/// A file of hosts, one a line: `gpu-01`, `gpu-01:8`, or `gpu-01 slots=8` as Open MPI and DeepSpeed write it.
/// What follows a `#` is a comment. `name` is that of the file.
///
/// # Errors
/// [`exit::USAGE`], with the line.
pub fn parse_file(name: &str, text: &str) -> Result<Vec<Host>, Coded> {
    let mut hosts: Vec<(usize, Host)> = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        let refuse = |problem: String| {
            let hint = "write one host a line: gpu-01 slots=8, or gpu-01:8";
            let text = format!("{name}, line {line}: {problem}\n  hint: {hint}");
            Coded::new(exit::USAGE, text)
        };
        let mut words = text
            .split('#')
            .next()
            .unwrap_or_default()
            .split_whitespace();
        let Some(first) = words.next() else { continue };
        let mut host = parse_host(first).map_err(refuse)?;
        for word in words {
            match word.split_once('=') {
                Some(("slots", count)) => {
                    let given = host.num_workers.replace(number(count).map_err(refuse)?);
                    if given.is_some() {
                        return Err(refuse(format!(
                            "the workers of {} are given twice",
                            host.name()
                        )));
                    }
                }
                // A bound on how many mpirun may oversubscribe to, which does not happen here.
                Some(("max_slots" | "max-slots", _)) => {}
                _ => return Err(refuse(format!("{word:?} means nothing here"))),
            }
        }
        if let Some((other, _)) = hosts.iter().find(|(_, h)| h.name() == host.name()) {
            return Err(refuse(format!(
                "{} is named on line {other} already",
                host.name()
            )));
        }
        hosts.push((line, host));
    }
    if hosts.is_empty() {
        return Err(Coded::new(
            exit::USAGE,
            format!("{name} names no host\n  hint: write one a line: gpu-01 slots=8, or gpu-01:8"),
        ));
    }
    Ok(hosts.into_iter().map(|(_, host)| host).collect())
}

/// `host`, `user@host`, `[::1]`, each with or without `:8`.
fn parse_host(word: &str) -> Result<Host, String> {
    let (user, rest) = match word.rsplit_once('@') {
        Some((user, rest)) => (Some(user), rest),
        None => (None, word),
    };
    let (host, count) = match rest.strip_prefix('[') {
        Some(inner) => {
            let Some((address, after)) = inner.split_once(']') else {
                return Err(format!("{word:?} has no closing bracket"));
            };
            if address.parse::<std::net::Ipv6Addr>().is_err() && !address.contains('%') {
                return Err(format!("{address:?} is no IPv6 address"));
            }
            match (after, after.strip_prefix(':')) {
                ("", _) => (address, None),
                (_, Some(count)) => (address, Some(count)),
                _ => return Err(format!("{after:?} follows the bracket of {word:?}")),
            }
        }
        None => match rest.split_once(':') {
            Some((_, count)) if count.contains(':') => {
                return Err(format!(
                    "{rest:?} is an IPv6 address without brackets: write [{rest}]"
                ));
            }
            Some((host, count)) => (host, Some(count)),
            None => (rest, None),
        },
    };
    let is_plain = |c: char| c.is_alphanumeric() || "._-:%".contains(c);
    for part in user.into_iter().chain([host]) {
        // ssh would take it for an option, a shell for something else.
        if part.is_empty() || part.starts_with('-') || !part.chars().all(is_plain) {
            return Err(match part {
                "" => format!("{word:?} names no host"),
                part => format!("{part:?} is no name of a host"),
            });
        }
    }
    Ok(Host {
        destination: user.map_or(host.into(), |user| format!("{user}@{host}")),
        num_workers: count.map(number).transpose()?,
    })
}

fn number(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(n @ 1..=4096) => Ok(n),
        _ => Err(format!("{text:?} is not a number of workers (1 to 4096)")),
    }
}

/// What the workers of `host` run on, by its own count and the command line, or else the config's `launch`.
///
/// # Errors
/// [`exit::USAGE`] when a list of GPUs does not have as many as the host's count.
pub fn workers(
    host: &Host,
    gpus: Option<&Gpus>,
    cpus: Option<u32>,
    launch: Option<&Launch>,
) -> Result<Workers, Coded> {
    let all = Workers::asked_for(gpus, cpus, launch).unwrap_or(Workers::Gpus(Gpus::Auto));
    match (all, host.num_workers) {
        (all, None) => Ok(all),
        (Workers::Cpus(_), Some(n)) => Ok(Workers::Cpus(n)),
        (Workers::Gpus(Gpus::List(list)), Some(n)) if list.len() as u32 != n => {
            let name = host.name();
            let text = format!(
                "{name} is to have {n} workers, --gpus lists {} GPUs\n  hint: leave out the `:{n}` of {name}, or give --gpus auto",
                list.len()
            );
            Err(Coded::new(exit::USAGE, text))
        }
        (list @ Workers::Gpus(Gpus::List(_)), Some(_)) => Ok(list),
        (Workers::Gpus(_), Some(n)) => Ok(Workers::Gpus(Gpus::Count(n))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tsm_job::config::DeviceKind;

    fn host(destination: &str, num_workers: Option<u32>) -> Host {
        Host {
            destination: destination.into(),
            num_workers,
        }
    }

    #[test]
    fn a_list_of_hosts() {
        let found =
            parse_list("gpu-01:8, me@gpu-02, [::1]:2,[fe80::1%eth0],me@[fd00::2],10.0.0.1:4");
        let expected = [
            host("gpu-01", Some(8)),
            host("me@gpu-02", None),
            host("::1", Some(2)),
            host("fe80::1%eth0", None),
            host("me@fd00::2", None),
            host("10.0.0.1", Some(4)),
        ];
        assert_eq!(found.unwrap(), expected);
        assert_eq!(
            (expected[1].name(), expected[4].name()),
            ("gpu-02", "fd00::2")
        );
        for (bad, why) in [
            ("", "names no host"),
            ("a,,b", "names no host"),
            ("a:0", "number of workers"),
            ("a:", "number of workers"),
            ("a:x", "number of workers"),
            ("fe80::1:8", "write [fe80::1:8]"),
            ("[::1", "closing bracket"),
            ("[::1]8", "follows the bracket"),
            ("[gpu]", "no IPv6 address"),
            ("-oProxyCommand=x", "no name of a host"),
            ("me@-x", "no name of a host"),
            ("@a", "names no host"),
            ("a b", "no name of a host"),
            ("a;b", "no name of a host"),
            ("a,b,me@a:4", "a is named twice"),
        ] {
            let error = parse_list(bad).expect_err(bad);
            assert_eq!(error.code, exit::USAGE);
            assert!(
                error.message.contains(why) && error.message.contains("hint"),
                "{bad}: {error}"
            );
        }
    }

    #[test]
    fn files_of_other_launchers() {
        let text = "# the cluster\n\ngpu-01 slots=8  # new\n  gpu-02:4\ngpu-03 slots=2 max_slots=4\nme@gpu-04\n";
        let expected = [
            host("gpu-01", Some(8)),
            host("gpu-02", Some(4)),
            host("gpu-03", Some(2)),
            host("me@gpu-04", None),
        ];
        assert_eq!(parse_file("hosts", text).unwrap(), expected);
        for (bad, line, why) in [
            ("a\n\nb slot=8\n", 3, "\"slot=8\" means nothing"),
            ("a:8 slots=8", 1, "given twice"),
            ("a slots=8\n# b\na", 3, "named on line 1"),
            ("a slots=many", 1, "number of workers"),
            ("a\n[::1", 2, "closing bracket"),
        ] {
            let message = parse_file("hosts", bad).expect_err(bad).message;
            assert!(
                message.starts_with(&format!("hosts, line {line}: ")) && message.contains(why),
                "{message}"
            );
        }
        let none = parse_file("hosts", "# nobody\n").unwrap_err();
        assert!(none.message.starts_with("hosts names no host"));
    }

    #[test]
    fn the_kind_of_workers_is_the_command_line_s_and_their_number_the_host_s() {
        let (with, without) = (host("a", Some(4)), host("a", None));
        let of = |host, gpus: Option<&Gpus>, cpus| workers(host, gpus, cpus, None).unwrap();
        assert_eq!(of(&with, None, Some(2)), Workers::Cpus(4));
        assert_eq!(of(&without, None, Some(2)), Workers::Cpus(2));
        assert_eq!(of(&with, None, None), Workers::Gpus(Gpus::Count(4)));
        assert_eq!(of(&without, None, None), Workers::Gpus(Gpus::Auto));
        let list = Gpus::List(vec![0, 1, 2, 3]);
        assert_eq!(of(&with, Some(&list), None), Workers::Gpus(list.clone()));
        let two = Gpus::List(vec![0, 2]);
        let error = workers(&with, Some(&two), None, None).unwrap_err();
        assert_eq!(error.code, exit::USAGE);
        let launch = Launch {
            device: DeviceKind::Cpu,
            nproc_per_node: Some(3),
            ..Launch::default()
        };
        let by_config = |host| workers(host, None, None, Some(&launch)).unwrap();
        assert_eq!(by_config(&without), Workers::Cpus(3));
        assert_eq!(by_config(&with), Workers::Cpus(4));
    }
}
