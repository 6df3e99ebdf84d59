//! The environment contract between the launcher and a worker: torch's names, and ours as `TSM_*`.
//!
//! A worker that was started without `RANK`, by `mpirun` or `srun` itself, takes its rank from them.

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
    /// `MASTER_PORT`. 0 with several ranks: nobody said where rank 0 is, and the ranks have to find it
    /// out by [`WorkerEnv::job_id`].
    pub master_port: u16,
    pub started_by: Starter,
    /// What `mpirun` or `srun` calls this job, the same on all its ranks and no other's.
    pub job_id: Option<String>,
    /// `TSM_RUN_DIR`; `None` for a program started without our launcher.
    pub run_dir: Option<PathBuf>,
    /// `TSM_RUN_ID`, also `TORCHELASTIC_RUN_ID`.
    pub run_id: String,
    /// `TSM_RESTART_COUNT`, also `TORCHELASTIC_RESTART_COUNT`.
    pub restart_count: u32,
    /// `TSM_RESUME_FROM`: a checkpoint, or a run folder whose last valid checkpoint to take.
    pub resume_from: Option<PathBuf>,
    /// `TSM_START_FROM`: what the run began from, where `resume_from` is its own folder, which may hold no checkpoint yet.
    pub start_from: Option<PathBuf>,
    /// `TSM_AGENT_FD`: a Unix stream socket to the launcher, see [`crate::message`].
    pub agent_fd: Option<i32>,
}

/// Who gave this process its rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    /// Nobody: one rank alone.
    Nobody,
    /// Whoever set `RANK`: tsm-launch, or torchrun.
    Launcher,
    /// Open MPI's `mpirun`: `OMPI_COMM_WORLD_*`.
    OpenMpi,
    /// MPICH's or Intel's `mpirun`: `PMI_*`.
    Pmi,
    /// `srun`: `SLURM_PROCID`.
    Slurm,
}

/// A rank in the words of whoever started it: the names of variables and their values.
struct Given {
    by: Starter,
    rank: (&'static str, Option<String>),
    world_size: (&'static str, Option<String>),
    local_rank: (&'static str, Option<String>),
    local_world_size: (&'static str, Option<String>),
    node_rank: (&'static str, Option<String>),
    job_id: Option<String>,
}

impl Given {
    fn find(get: &impl Fn(&str) -> Option<String>) -> Given {
        let var = |name: &'static str| (name, get(name));
        let has = |name: &str| get(name).is_some();
        let joined = |names: &[&str]| {
            let parts: Vec<String> = names.iter().filter_map(|n| get(n)).collect();
            (!parts.is_empty()).then(|| parts.join("."))
        };
        if has("OMPI_COMM_WORLD_RANK") && !has("RANK") {
            return Given {
                by: Starter::OpenMpi,
                rank: var("OMPI_COMM_WORLD_RANK"),
                world_size: var("OMPI_COMM_WORLD_SIZE"),
                local_rank: var("OMPI_COMM_WORLD_LOCAL_RANK"),
                local_world_size: var("OMPI_COMM_WORLD_LOCAL_SIZE"),
                node_rank: ("GROUP_RANK", None),
                // The second is random; Open MPI 5 has only the first.
                job_id: joined(&["PMIX_NAMESPACE", "OMPI_MCA_orte_precondition_transports"]),
            };
        }
        // A batch script has SLURM_PROCID too, but is not what srun started.
        let step = has("SLURM_STEP_ID") && has("SLURM_PROCID");
        let hydra = has("MPI_LOCALRANKID");
        // MPICH starts its ranks below a task of srun, and has the last word on them.
        if has("PMI_RANK") && !has("RANK") && (hydra || !step) {
            return Given {
                by: Starter::Pmi,
                rank: var("PMI_RANK"),
                world_size: var("PMI_SIZE"),
                local_rank: var("MPI_LOCALRANKID"),
                local_world_size: var("MPI_LOCALNRANKS"),
                node_rank: ("GROUP_RANK", None),
                job_id: joined(&["PMI_JOBID", "SLURM_JOB_ID", "SLURM_STEP_ID"]),
            };
        }
        if step && !has("RANK") {
            let on_node = get("SLURM_STEP_TASKS_PER_NODE").and_then(|list| {
                let node = get("SLURM_NODEID")?.parse().ok()?;
                Some(tasks_on_node(&list, node)?.to_string())
            });
            return Given {
                by: Starter::Slurm,
                rank: var("SLURM_PROCID"),
                world_size: if has("SLURM_STEP_NUM_TASKS") {
                    var("SLURM_STEP_NUM_TASKS")
                } else {
                    var("SLURM_NTASKS")
                },
                local_rank: var("SLURM_LOCALID"),
                local_world_size: ("SLURM_STEP_TASKS_PER_NODE", on_node),
                node_rank: var("SLURM_NODEID"),
                // A job that is requeued keeps its id, and counts its steps from 0 again.
                job_id: joined(&["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]),
            };
        }
        let rank = var("RANK");
        Given {
            by: match &rank.1 {
                Some(_) => Starter::Launcher,
                None => Starter::Nobody,
            },
            local_rank: ("LOCAL_RANK", get("LOCAL_RANK").or(rank.1.clone())),
            local_world_size: (
                "LOCAL_WORLD_SIZE",
                get("LOCAL_WORLD_SIZE").or(get("WORLD_SIZE")),
            ),
            rank,
            world_size: var("WORLD_SIZE"),
            node_rank: var("GROUP_RANK"),
            job_id: None,
        }
    }
}

/// Tasks on a node by Slurm's short form: `2(x3),1` is two on each of three nodes, one on the fourth.
fn tasks_on_node(list: &str, node: usize) -> Option<u32> {
    let mut first = 0;
    for part in list.split(',') {
        let (tasks, nodes) = match part.split_once("(x") {
            Some((tasks, nodes)) => (tasks, nodes.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        first += nodes;
        if node < first {
            return tasks.parse().ok();
        }
    }
    None
}

impl WorkerEnv {
    /// Reads the process environment; one rank alone where nobody gave this process a rank.
    ///
    /// # Errors
    /// A variable that is missing while `RANK` is set, or cannot be read, by name.
    pub fn from_process() -> anyhow::Result<WorkerEnv> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// As [`Self::from_process`], from any source of variables.
    pub fn from_lookup(get: impl Fn(&str) -> Option<String>) -> anyhow::Result<WorkerEnv> {
        fn parsed<T: std::str::FromStr>(name: &str, text: &str) -> anyhow::Result<T> {
            text.parse().map_err(|_| {
                Coded::new(
                    exit::USAGE,
                    format!("environment variable {name} is {text:?}, which cannot be read"),
                )
                .into()
            })
        }
        fn optional<T: std::str::FromStr>(
            (name, value): &(&'static str, Option<String>),
            default: T,
        ) -> anyhow::Result<T> {
            value
                .as_deref()
                .map_or(Ok(default), |text| parsed(name, text))
        }
        let given = Given::find(&get);
        // `needed` while somebody gave a rank, `alone` while nobody did.
        let needed =
            |(name, value): &(&'static str, Option<String>), alone: u32| -> anyhow::Result<u32> {
                match (value, given.by) {
                    (Some(text), _) => parsed(name, text),
                    (None, Starter::Nobody) => Ok(alone),
                    (None, _) => Err(missing(given.rank.0, name)),
                }
            };
        let rank = needed(&given.rank, 0)?;
        let world_size = needed(&given.world_size, 1)?;
        // torch's contract lets these two be missing, the others always set them.
        let local_rank = needed(&given.local_rank, rank)?;
        let local_world_size = needed(&given.local_world_size, world_size)?;
        let (addr, port) = (
            ("MASTER_ADDR", get("MASTER_ADDR")),
            ("MASTER_PORT", get("MASTER_PORT")),
        );
        match (given.by, &addr.1, &port.1) {
            (Starter::Nobody, ..) if world_size > 1 => return Err(missing("WORLD_SIZE", "RANK")),
            (Starter::Launcher, None, _) => return Err(missing("RANK", "MASTER_ADDR")),
            (Starter::Launcher, _, None) => return Err(missing("RANK", "MASTER_PORT")),
            (Starter::OpenMpi | Starter::Pmi | Starter::Slurm, Some(_), None) => {
                return Err(missing("MASTER_ADDR", "MASTER_PORT"));
            }
            (Starter::OpenMpi | Starter::Pmi | Starter::Slurm, None, Some(_))
                if local_world_size < world_size =>
            {
                return Err(missing("MASTER_PORT", "MASTER_ADDR"));
            }
            _ => {}
        }
        let path = |name: &str| get(name).filter(|s| !s.is_empty()).map(PathBuf::from);
        let env = WorkerEnv {
            rank,
            local_rank,
            world_size,
            local_world_size,
            node_rank: optional(&given.node_rank, 0)?,
            master_addr: optional(&addr, IpAddr::from([127, 0, 0, 1]))?,
            master_port: optional(&port, 0)?,
            started_by: given.by,
            run_dir: get("TSM_RUN_DIR").map(PathBuf::from),
            run_id: get("TSM_RUN_ID")
                .or_else(|| get("TORCHELASTIC_RUN_ID"))
                .or_else(|| given.job_id.clone())
                .unwrap_or_else(|| "alone".into()),
            // A name that the user gave to all ranks serves where there is none.
            job_id: given.job_id.clone().or_else(|| get("TSM_RUN_ID")),
            restart_count: optional(&("TSM_RESTART_COUNT", get("TSM_RESTART_COUNT")), 0)?,
            resume_from: path("TSM_RESUME_FROM"),
            start_from: path("TSM_START_FROM"),
            agent_fd: match get("TSM_AGENT_FD") {
                Some(text) => Some(parsed("TSM_AGENT_FD", &text)?),
                None => None,
            },
        };
        env.check(&given)?;
        Ok(env)
    }

    /// Ranks count from 0 to below their sizes.
    fn check(&self, given: &Given) -> anyhow::Result<()> {
        for (name, value, size_name, size) in [
            (given.rank.0, self.rank, given.world_size.0, self.world_size),
            (
                given.local_rank.0,
                self.local_rank,
                given.local_world_size.0,
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

    /// All ranks are on one host.
    pub fn one_host(&self) -> bool {
        self.local_world_size == self.world_size
    }
}

fn missing(set: &str, name: &str) -> anyhow::Error {
    let message = format!(
        "{set} is set but {name} is not: start the trainer through tsm-launch, or set every variable of torch's contract (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT)"
    );
    Coded::new(exit::USAGE, message).into()
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
            ("TSM_START_FROM", "runs/c"),
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
        assert_eq!(env.start_from.as_deref(), Some(Path::new("runs/c")));
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
                vec![("WORLD_SIZE", "2")],
                "WORLD_SIZE is set but RANK is not",
            ),
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

    const OPEN_MPI: [(&str, &str); 6] = [
        ("OMPI_COMM_WORLD_RANK", "5"),
        ("OMPI_COMM_WORLD_SIZE", "16"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ("PMIX_NAMESPACE", "605618177"),
        ("OMPI_MCA_orte_precondition_transports", "b3c5-5808"),
    ];
    const HYDRA: [(&str, &str); 4] = [
        ("PMI_RANK", "5"),
        ("PMI_SIZE", "16"),
        ("MPI_LOCALRANKID", "1"),
        ("MPI_LOCALNRANKS", "4"),
    ];
    const SRUN: [(&str, &str); 8] = [
        ("SLURM_JOB_ID", "71"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "5"),
        ("SLURM_NTASKS", "99"),
        ("SLURM_STEP_NUM_TASKS", "16"),
        ("SLURM_STEP_TASKS_PER_NODE", "4(x4)"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODEID", "1"),
    ];

    #[test]
    fn ranks_are_taken_from_whoever_started_them() {
        for (vars, by, job_id) in [
            (&OPEN_MPI[..], Starter::OpenMpi, Some("605618177.b3c5-5808")),
            (&HYDRA, Starter::Pmi, None),
            (&SRUN, Starter::Slurm, Some("71.0")),
        ] {
            let env = read(vars).unwrap();
            assert_eq!(env.started_by, by);
            assert_eq!((env.rank, env.world_size), (5, 16));
            assert_eq!((env.local_rank, env.local_world_size), (1, 4));
            assert_eq!((env.master_port, env.job_id.as_deref()), (0, job_id));
            assert!(!env.one_host());
            // The launcher's word counts more.
            let ours = read(&[&RANKED, vars].concat()).unwrap();
            assert_eq!((ours.started_by, ours.world_size), (Starter::Launcher, 8));
        }
        // MPICH's ranks below a task of srun, and a batch script, which srun did not start.
        let both = [&HYDRA[..], &SRUN].concat();
        assert_eq!(read(&both).unwrap().started_by, Starter::Pmi);
        let batch = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")];
        let env = read(&batch).unwrap();
        assert_eq!((env.started_by, env.world_size), (Starter::Nobody, 1));
        let requeued = [&SRUN[..], &[("SLURM_RESTART_COUNT", "2")]].concat();
        assert_eq!(read(&requeued).unwrap().job_id.as_deref(), Some("71.0.2"));
    }

    #[test]
    fn an_adopted_rank_may_be_told_where_rank_0_is() {
        let with = |more: &[(&'static str, &'static str)]| read(&[&OPEN_MPI[..], more].concat());
        let env = with(&[("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500")]).unwrap();
        assert_eq!(env.master_addr, IpAddr::from([10, 0, 0, 1]));
        assert_eq!(env.master_port, 29500);
        for (half, message) in [
            (
                ("MASTER_ADDR", "10.0.0.1"),
                "MASTER_ADDR is set but MASTER_PORT is not",
            ),
            (
                ("MASTER_PORT", "29500"),
                "MASTER_PORT is set but MASTER_ADDR is not",
            ),
        ] {
            let error = with(&[half]).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert_eq!(exit::code_of(&error), exit::USAGE);
        }
        let error = read(&OPEN_MPI[..1]).unwrap_err().to_string();
        let part = "OMPI_COMM_WORLD_RANK is set but OMPI_COMM_WORLD_SIZE is not";
        assert!(error.contains(part), "{error}");
        let named = [&HYDRA[..], &[("TSM_RUN_ID", "mine")]].concat();
        assert_eq!(read(&named).unwrap().job_id.as_deref(), Some("mine"));
    }

    #[test]
    fn slurm_s_short_form_is_read() {
        let tasks: Vec<_> = (0..5).map(|node| tasks_on_node("2(x3),1", node)).collect();
        assert_eq!(tasks, [Some(2), Some(2), Some(2), Some(1), None]);
        assert_eq!(tasks_on_node("8", 0), Some(8));
        assert_eq!(tasks_on_node("x", 0), None);
    }
}
