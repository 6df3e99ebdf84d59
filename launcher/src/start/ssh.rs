//! Agents on other hosts by plain OpenSSH: its stdin and stdout are the connection, so that nothing listens and
//! an agent ends with its ssh, whichever of the two dies first.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use tsm_job::RunDir;
use tsm_job::exit::{self, Coded};

use super::agent::AGENT;
use super::children::Starter;
use super::hosts::{self, Host};
use crate::cli::{Args, Nodes, Preflight};
use crate::own;
use crate::plan::{self, Workers};
use crate::say::reading;
use crate::target::{Target, find_program};
use crate::text::count;

/// Behind the words of `--ssh`: for every option ssh takes the first value that it sees, so those win.
const OPTIONS: [&str; 12] = [
    "-T",
    "-x",
    // Nobody is there to answer a question.
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=30",
    // A host that is gone is found by the lease of its agent; these only end what is left of its session.
    "-o",
    "ServerAliveInterval=15",
    "-o",
    "ServerAliveCountMax=3",
    // A shared connection that this ssh opens would outlive it, and hold its stderr open.
    "-o",
    "ControlMaster=no",
];

/// Where restarts are wanted: tries in a row for a host on which no agent starts.
const RETRIES: u32 = 5;

/// Variables that mean something only on the host, or in the session, where they were set.
const OF_THE_HOST: [&str; 34] = [
    "HOME",
    "USER",
    "LOGNAME",
    "USERNAME",
    "SHELL",
    "PWD",
    "OLDPWD",
    "HOSTNAME",
    "HOST",
    "HOSTTYPE",
    "MAIL",
    "TMPDIR",
    "TMP",
    "TEMP",
    "TERM",
    "TERM_PROGRAM",
    "TERM_PROGRAM_VERSION",
    "COLORTERM",
    "COLUMNS",
    "LINES",
    "SHLVL",
    "_",
    "STY",
    "TMUX",
    "TMUX_PANE",
    "WINDOWID",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "XAUTHORITY",
    "KRB5CCNAME",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "NOTIFY_SOCKET",
    "CUDA_VISIBLE_DEVICES",
];
const OF_THE_HOST_PREFIXES: [&str; 14] = [
    "SSH_",
    "XDG_",
    "DBUS_",
    "LS_COLORS",
    "GPG_",
    "SUDO_",
    "SYSTEMD_",
    "SLURM",
    "PMI_",
    "PMIX_",
    "OMPI_",
    "PRTE_",
    "HYDRA_",
    "VTE_",
];

/// A job that is started by ssh.
pub struct Plan {
    hosts: Vec<(Host, Workers)>,
    /// The program, and options of its own.
    ssh: Vec<OsString>,
    launcher: PathBuf,
    /// How often a host that is lost is tried again.
    retries: u32,
    preflight: Preflight,
    pub nodes: Nodes,
}

impl Plan {
    /// `None` where the command line names no hosts. `target` gets the kind of its workers written into its config.
    ///
    /// # Errors
    /// [`exit::USAGE`] for hosts that cannot be read, [`exit::PREFLIGHT`] when there is no ssh.
    pub fn new(args: &Args, target: &mut Target) -> anyhow::Result<Option<Plan>> {
        let found = match (&args.hosts, &args.hostfile) {
            (Some(list), _) => hosts::parse_list(list)?,
            (None, Some(file)) => {
                let text = reading(file, || fs_err::read_to_string(file))
                    .map_err(|e| Coded::new(exit::USAGE, format!("--hostfile: {e}")))?;
                hosts::parse_file(&file.to_string_lossy(), &text)?
            }
            (None, None) => return Ok(None),
        };
        let launch = target.config().map(|config| &config.launch);
        let workers = |host: Host| {
            let workers = hosts::workers(&host, args.gpus.as_ref(), args.cpus, launch)?;
            Ok((host, workers))
        };
        let hosts = found
            .into_iter()
            .map(workers)
            .collect::<Result<Vec<_>, Coded>>()?;
        let nodes = nodes(args.nodes, hosts.len() as u32)?;
        let mut ssh: Vec<OsString> = args.ssh.split_whitespace().map(OsString::from).collect();
        let Some(program) = ssh.first_mut() else {
            let text = "--ssh is empty\n  hint: give a program and its options, such as --ssh \"ssh -p 2222\"";
            return Err(Coded::new(exit::USAGE, text).into());
        };
        *program = find_program(program)?.into();
        let launcher = match &args.remote_launcher {
            Some(path) => path.clone(),
            None => own::path()?,
        };
        let counts: Vec<Option<u32>> = hosts.iter().map(|(_, w)| w.count()).collect();
        target.settle_as(
            hosts[0].1.device(),
            counts[0].filter(|_| counts.iter().all(|c| *c == counts[0])),
        );
        let retries = if args.max_restarts > 0 { RETRIES } else { 0 };
        Ok(Some(Plan {
            hosts,
            ssh,
            launcher,
            retries,
            preflight: args.preflight,
            nodes,
        }))
    }

    /// What they are called, in node order.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        self.hosts.iter().map(|(host, _)| host.name())
    }

    /// One program for each host, in node order.
    pub fn starters(&self) -> impl Iterator<Item = Starter> {
        (0..)
            .zip(&self.hosts)
            .map(|(order, (host, workers))| Starter {
                host: host.name().into(),
                argv: self.argv(order, host, workers),
                env_remove: &[],
                is_wire: true,
                code_meaning: meaning,
                retries: self.retries,
            })
    }

    fn argv(&self, order: u32, host: &Host, workers: &Workers) -> Vec<OsString> {
        // ssh begins in the home folder, where a path without `~/` leads as well.
        let launcher = self.launcher.strip_prefix("~").unwrap_or(&self.launcher);
        let mut agent: Vec<OsString> = vec![launcher.into(), AGENT.into(), "--stdio".into()];
        agent.extend(workers.flag().map(OsString::from));
        let (order, name) = (order.to_string(), host.name());
        agent.extend(["--order", &order, "--host", name].map(OsString::from));
        if self.preflight == Preflight::Off {
            agent.push("--no-preflight".into());
        }
        let mut argv = self.ssh.clone();
        argv.extend(OPTIONS.map(OsString::from));
        argv.push("--".into());
        argv.push((&host.destination).into());
        // No shell stays between sshd and the agent.
        argv.push(format!("exec {}", plan::shell(&agent)).into());
        argv
    }

    /// What `--dry-run` prints.
    pub fn describe(&self, target: &Target, run_dir: &Path) -> String {
        use std::fmt::Write;
        let command = plan::shell(&target.command(&RunDir::new(run_dir).config()));
        let mut text = format!("run folder  {}\ncommand     {command}\n", run_dir.display());
        let mut first = Some(0);
        for ((host, workers), starter) in self.hosts.iter().zip(self.starters()) {
            let ranks = match (first, workers.count()) {
                (Some(from), Some(1)) => format!("rank {from}"),
                (Some(from), Some(n)) => format!("ranks {from} to {}", from + n - 1),
                (_, Some(n)) => count(n, "rank"),
                (_, None) => "one rank on each of its GPUs".into(),
            };
            first = first.zip(workers.count()).map(|(from, n)| from + n);
            let _ = writeln!(
                text,
                "{}: {ranks}\n  {}",
                host.name(),
                plan::shell(&starter.argv)
            );
        }
        text
    }
}

/// With hosts there are as many nodes, unless fewer are asked for.
fn nodes(given: Option<Nodes>, hosts: u32) -> Result<Nodes, Coded> {
    let nodes = given.unwrap_or(Nodes::exactly(hosts));
    if nodes.max > hosts {
        let text = format!(
            "--nodes asks for {}, {} named\n  hint: name as many hosts, or leave out --nodes",
            count(nodes.max, "node"),
            if hosts == 1 {
                "1 host is".into()
            } else {
                format!("{hosts} hosts are")
            },
        );
        return Err(Coded::new(exit::USAGE, text));
    }
    Ok(nodes)
}

/// What the exit code of ssh says; the agent's own codes speak for themselves.
fn meaning(starter: &Starter, code: i32) -> Option<String> {
    let text = match code {
        255 => {
            let trial = plan::shell(&trial(&starter.argv));
            return Some(format!(
                "no connection; see whether `{trial}` works, and connect once by hand where the host is new"
            ));
        }
        127 => {
            "tsm-launch is not there; install it at the same path on every host, \
             or name it with --remote-launcher PATH"
        }
        126 => "tsm-launch cannot be executed there; it may be built for another machine",
        _ => return None,
    };
    Some(text.into())
}

/// The words of `--ssh` that brought no connection, for a connection by hand. `argv` is one of [`Plan::argv`].
fn trial(argv: &[OsString]) -> Vec<OsString> {
    let (own, rest) = argv.split_at(argv.len().saturating_sub(OPTIONS.len() + 3));
    let host = rest.iter().rev().nth(1);
    let quiet = ["-o", "BatchMode=yes"].map(OsString::from);
    let own = own.iter().cloned().chain(quiet);
    own.chain(host.cloned()).chain(["true".into()]).collect()
}

/// The part of an environment that is as good on another host.
pub fn environment(all: impl Iterator<Item = (OsString, OsString)>) -> Vec<(OsString, OsString)> {
    let travels = |name: &OsString| {
        let Some(name) = name.to_str() else {
            return true;
        };
        !OF_THE_HOST.contains(&name)
            && !OF_THE_HOST_PREFIXES
                .iter()
                .any(|prefix| name.starts_with(prefix))
    };
    all.filter(|(name, _)| travels(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Gpus;

    fn plan(launcher: &str, preflight: Preflight) -> Plan {
        Plan {
            hosts: Vec::new(),
            ssh: ["ssh", "-p", "2222"].map(OsString::from).into(),
            launcher: launcher.into(),
            retries: 0,
            preflight,
            nodes: Nodes::ONE,
        }
    }

    fn words(plan: &Plan, host: &Host, workers: &Workers) -> Vec<String> {
        let argv = plan.argv(3, host, workers).into_iter();
        argv.map(|word| word.into_string().unwrap()).collect()
    }

    #[test]
    fn one_remote_command_without_a_shell_left_behind() {
        let host = Host {
            destination: "me@gpu-01".into(),
            num_workers: None,
        };
        let ours = plan("/opt/my apps/tsm-launch", Preflight::Quick);
        let found = words(&ours, &host, &Workers::Cpus(2));
        assert_eq!(found[..4], ["ssh", "-p", "2222", "-T"]);
        assert_eq!(found[found.len() - 3..][..2], ["--", "me@gpu-01"]);
        assert_eq!(
            found[found.len() - 1],
            "exec '/opt/my apps/tsm-launch' __agent --stdio --cpus 2 --order 3 --host gpu-01"
        );
        let argv = ours.argv(3, &host, &Workers::Cpus(2));
        let by_hand = plan::shell(&trial(&argv));
        assert_eq!(by_hand, "ssh -p 2222 -o BatchMode=yes me@gpu-01 true");
        let gpus = Workers::Gpus(Gpus::List(vec![0, 2]));
        let at_home = plan("~/bin/tsm-launch", Preflight::Off);
        assert_eq!(
            words(&at_home, &host, &gpus).pop().unwrap(),
            "exec bin/tsm-launch __agent --stdio --gpus 0,2 --order 3 --host gpu-01 --no-preflight"
        );
    }

    #[test]
    fn what_belongs_to_a_host_stays_there() {
        let of = |names: &[&str]| {
            let pairs = names
                .iter()
                .map(|name| (OsString::from(name), OsString::from("x")));
            environment(pairs)
                .into_iter()
                .map(|(name, _)| name.into_string().unwrap())
                .collect::<Vec<_>>()
        };
        let stays = [
            "HOME",
            "_",
            "SSH_AUTH_SOCK",
            "XDG_RUNTIME_DIR",
            "SLURM_JOB_ID",
            "SLURMD_NODENAME",
            "PMIX_RANK",
            "TMPDIR",
        ];
        assert_eq!(of(&stays), [""; 0]);
        let travels = [
            "PATH",
            "LD_LIBRARY_PATH",
            "NCCL_DEBUG",
            "HOMEBREW",
            "PYTHONPATH",
            "LANG",
        ];
        assert_eq!(of(&travels), travels);
    }

    #[test]
    fn hosts_are_the_most_nodes_there_can_be() {
        let given = |min, max| Some(Nodes { min, max });
        assert_eq!(nodes(None, 4).unwrap(), Nodes { min: 4, max: 4 });
        assert_eq!(nodes(given(2, 4), 4).unwrap(), Nodes { min: 2, max: 4 });
        assert_eq!(
            nodes(given(2, 2), 3).unwrap().max,
            2,
            "the third is a spare"
        );
        assert_eq!(nodes(given(5, 5), 4).unwrap_err().code, exit::USAGE);
    }
}
