//! The environment contract between the launcher and a worker: torch's names, and ours as `TSM_*`.

use crate::exit::{self, Coded};
use std::net::IpAddr;
use std::path::PathBuf;

/// What a worker reads from its environment.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerEnv {
    /// `RANK`: 0 to `world_size - 1` over the whole job.
    pub rank: u32,
    /// `LOCAL_RANK`: 0 to `local_world_size - 1` on this node; also the device's index.
    pub local_rank: u32,
    /// `WORLD_SIZE`
    pub world_size: u32,
    /// `LOCAL_WORLD_SIZE`
    pub local_world_size: u32,
    /// `GROUP_RANK` and `NODE_RANK`
    pub node_rank: u32,
    /// `MASTER_ADDR`, a literal address.
    pub master_addr: IpAddr,
    /// `MASTER_PORT`
    pub master_port: u16,
    /// `TSM_RUN_DIR`; `None` for a program started without our launcher.
    pub run_dir: Option<PathBuf>,
    /// `TSM_RUN_ID`, also `TORCHELASTIC_RUN_ID`.
    pub run_id: String,
    /// `TSM_RESTART_COUNT`, also `TORCHELASTIC_RESTART_COUNT`.
    pub restart_count: u32,
    /// `TSM_RESUME_FROM`: a checkpoint, or a run folder whose last valid checkpoint to take.
    pub resume_from: Option<PathBuf>,
    /// `TSM_AGENT_FD`: a Unix stream socket to the launcher, see [`crate::message`].
    pub agent_fd: Option<i32>,
}

impl WorkerEnv {
    /// Reads the process environment; one rank alone where `RANK` is not set.
    ///
    /// # Errors
    /// A variable that is missing while `RANK` is set, or cannot be read, by name.
    pub fn from_process() -> anyhow::Result<WorkerEnv> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// As [`Self::from_process`], from any source of variables.
    pub fn from_lookup(get: impl Fn(&str) -> Option<String>) -> anyhow::Result<WorkerEnv> {
        fn parsed<T: std::str::FromStr>(
            name: &str,
            value: Option<String>,
            alone: Option<T>,
        ) -> anyhow::Result<T> {
            match (value, alone) {
                (Some(text), _) => text.parse().map_err(|_| {
                    Coded::new(exit::USAGE, format!("environment variable {name} is {text:?}, which cannot be read")).into()
                }),
                (None, Some(default)) => Ok(default),
                (None, None) => Err(Coded::new(
                    exit::USAGE,
                    format!("RANK is set but {name} is not: start the trainer through tsm-launch, or set every variable of torch's contract"),
                )
                .into()),
            }
        }
        let ranked = get("RANK").is_some();
        let alone = |v: u32| if ranked { None } else { Some(v) };
        let rank = parsed("RANK", get("RANK"), Some(0))?;
        let world_size = parsed("WORLD_SIZE", get("WORLD_SIZE"), alone(1))?;
        let env = WorkerEnv {
            rank,
            local_rank: parsed("LOCAL_RANK", get("LOCAL_RANK"), Some(rank))?,
            world_size,
            local_world_size: parsed(
                "LOCAL_WORLD_SIZE",
                get("LOCAL_WORLD_SIZE"),
                Some(world_size),
            )?,
            node_rank: parsed("GROUP_RANK", get("GROUP_RANK"), Some(0))?,
            master_addr: parsed(
                "MASTER_ADDR",
                get("MASTER_ADDR"),
                if ranked {
                    None
                } else {
                    Some(IpAddr::from([127, 0, 0, 1]))
                },
            )?,
            master_port: parsed(
                "MASTER_PORT",
                get("MASTER_PORT"),
                if ranked { None } else { Some(0) },
            )?,
            run_dir: get("TSM_RUN_DIR").map(PathBuf::from),
            run_id: get("TSM_RUN_ID")
                .or_else(|| get("TORCHELASTIC_RUN_ID"))
                .unwrap_or_else(|| "alone".into()),
            restart_count: parsed("TSM_RESTART_COUNT", get("TSM_RESTART_COUNT"), Some(0))?,
            resume_from: get("TSM_RESUME_FROM")
                .filter(|s| !s.is_empty())
                .map(PathBuf::from),
            agent_fd: match get("TSM_AGENT_FD") {
                Some(text) => Some(parsed("TSM_AGENT_FD", Some(text), None)?),
                None => None,
            },
        };
        env.check()?;
        Ok(env)
    }

    /// Ranks count from 0 to below their sizes.
    fn check(&self) -> anyhow::Result<()> {
        for (name, value, size_name, size) in [
            ("RANK", self.rank, "WORLD_SIZE", self.world_size),
            (
                "LOCAL_RANK",
                self.local_rank,
                "LOCAL_WORLD_SIZE",
                self.local_world_size,
            ),
        ] {
            if value >= size {
                let message = format!(
                    "environment variable {name} is {value}, it must be below {size_name}, which is {size}"
                );
                return Err(Coded::new(exit::USAGE, message).into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn read(vars: &[(&str, &str)]) -> anyhow::Result<WorkerEnv> {
        WorkerEnv::from_lookup(|name| {
            vars.iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| v.to_string())
        })
    }

    const RANKED: [(&str, &str); 6] = [
        ("RANK", "5"),
        ("LOCAL_RANK", "1"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_WORLD_SIZE", "4"),
        ("MASTER_ADDR", "10.0.0.1"),
        ("MASTER_PORT", "29500"),
    ];

    fn ranked(more: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
        more.iter().chain(&RANKED).copied().collect()
    }

    #[test]
    fn an_empty_environment_is_one_rank_alone() {
        let env = read(&[]).unwrap();
        assert_eq!((env.rank, env.world_size), (0, 1));
        assert_eq!((env.local_rank, env.local_world_size), (0, 1));
        assert_eq!(env.master_addr, IpAddr::from([127, 0, 0, 1]));
        assert_eq!(
            (env.run_dir, env.agent_fd, env.resume_from),
            (None, None, None)
        );
    }

    #[test]
    fn our_launcher_s_variables_are_read() {
        let env = read(&ranked(&[
            ("GROUP_RANK", "1"),
            ("TSM_RUN_DIR", "runs/a"),
            ("TSM_RUN_ID", "a"),
            ("TSM_RESTART_COUNT", "2"),
            ("TSM_RESUME_FROM", "runs/b"),
            ("TSM_AGENT_FD", "7"),
        ]))
        .unwrap();
        assert_eq!((env.rank, env.world_size), (5, 8));
        assert_eq!((env.local_rank, env.local_world_size), (1, 4));
        assert_eq!((env.node_rank, env.restart_count), (1, 2));
        assert_eq!(env.master_addr, IpAddr::from([10, 0, 0, 1]));
        assert_eq!(env.master_port, 29500);
        assert_eq!(env.run_dir.as_deref(), Some(Path::new("runs/a")));
        assert_eq!(env.run_id, "a");
        assert_eq!(env.resume_from.as_deref(), Some(Path::new("runs/b")));
        assert_eq!(env.agent_fd, Some(7));
    }

    #[test]
    fn torch_s_names_stand_in_for_ours() {
        let env = read(&ranked(&[
            ("TORCHELASTIC_RUN_ID", "t"),
            ("TSM_RESUME_FROM", ""),
        ]))
        .unwrap();
        assert_eq!((env.run_id.as_str(), env.resume_from), ("t", None));
    }

    #[test]
    fn a_missing_or_unreadable_variable_is_named() {
        for (vars, message) in [
            (vec![("RANK", "0")], "RANK is set but WORLD_SIZE is not"),
            (
                ranked(&[("MASTER_ADDR", "gpu-03")]),
                "environment variable MASTER_ADDR is \"gpu-03\", which cannot be read",
            ),
            (
                ranked(&[("RANK", "-1")]),
                "environment variable RANK is \"-1\"",
            ),
            (
                ranked(&[("RANK", "8")]),
                "environment variable RANK is 8, it must be below WORLD_SIZE, which is 8",
            ),
            (
                ranked(&[("LOCAL_RANK", "4")]),
                "LOCAL_RANK is 4, it must be below LOCAL_WORLD_SIZE, which is 4",
            ),
            (
                ranked(&[("WORLD_SIZE", "0")]),
                "RANK is 5, it must be below WORLD_SIZE, which is 0",
            ),
        ] {
            let error = read(&vars).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert_eq!(exit::code_of(&error), exit::USAGE);
        }
    }
}
