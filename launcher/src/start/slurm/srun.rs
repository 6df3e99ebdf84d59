//! The command that starts one agent on every node of a job.

use std::ffi::OsString;

use super::allocation::Allocation;
use super::nodelist::compress;

/// Variables of the job, or of the site, by which srun would start something else than what is asked
/// for here; srun has no option that takes precedence over each.
const REMOVED: [&str; 20] = [
    // They come from the sbatch options of a script that was meant for one task per GPU.
    "SLURM_GPUS",
    "SLURM_GPUS_PER_TASK",
    "SLURM_GPU_BIND",
    "SLURM_NTASKS_PER_GPU",
    "SLURM_NTASKS_PER_SOCKET",
    "SLURM_NTASKS_PER_CORE",
    "SLURM_TRES_PER_TASK",
    "SLURM_TRES_BIND",
    "SLURM_ARBITRARY_NODELIST",
    "SLURM_DISTRIBUTION",
    "SLURM_HINT",
    // They imply --exact: as many cores as tasks.
    "SLURM_CPUS_PER_TASK",
    "SRUN_CPUS_PER_TASK",
    "SLURM_EXACT",
    // Input to all agents, their output to us.
    "SLURM_STDINMODE",
    "SLURM_STDOUTMODE",
    "SLURM_STDERRMODE",
    "SLURM_LABELIO",
    // Would end the agents early, or take their command line for a file of commands.
    "SLURM_TIMELIMIT",
    "SLURM_MULTI_PROG",
];

/// A command line and its environment.
#[derive(Clone, Debug, PartialEq)]
pub struct Srun {
    pub argv: Vec<OsString>,
    /// To be removed from the inherited environment.
    pub env_remove: &'static [&'static str],
}

/// Starts `agent` once on each of `nodes`, which are nodes of `job`, with `gpus` of each node (`None`: all).
///
/// What is written to srun's stdin goes to every agent. An agent gets SIGKILL when srun gets SIGTERM or
/// is killed; SIGINT is passed on. So srun belongs in a process group that a Ctrl-C does not reach, and
/// agents are asked to end over their connection.
pub fn srun(job: &Allocation, nodes: &[String], gpus: Option<u32>, agent: &[OsString]) -> Srun {
    let count = nodes.len();
    let mut argv: Vec<OsString> = vec!["srun".into()];
    let mut flag = |text: String| argv.push(text.into());
    flag(format!("--nodes={count}"));
    flag(format!("--ntasks={count}"));
    flag("--ntasks-per-node=1".into());
    flag(format!("--nodelist={}", compress(nodes)));
    flag("--job-name=tsm-agents".into());
    // Never wait for another step: also srun, by hand, to look at a run may hold cores of the job.
    flag("--overlap".into());
    // All memory and, without --exact, all cores of the job on a node; an agent binds its ranks itself.
    flag("--mem=0".into());
    flag("--cpu-bind=none".into());
    // By node: a job that asked for GPUs by task or in all would give a step one task's share, or refuse
    // it. No --gpu-bind: NCCL needs every GPU of the node visible to every rank for peer access.
    if let Some(all @ 1..) = job.gpus_per_node {
        flag(format!("--gpus-per-node={}", gpus.unwrap_or(all)));
    }
    // An agent that ends, well or not, is the coordinator's business, and so is a node that is lost.
    flag("--kill-on-bad-exit=0".into());
    flag("--wait=0".into());
    flag("--no-kill".into());
    // Agents are no MPI ranks; a default of pmix would set variables that torch programs react to.
    flag("--mpi=none".into());
    // A job submitted with --export=NONE passes it on to its steps.
    flag("--export=ALL".into());
    flag("--unbuffered".into());
    argv.extend(agent.iter().cloned());
    Srun {
        argv,
        env_remove: &REMOVED,
    }
}

#[cfg(test)]
mod tests {
    use super::super::allocation::Place;
    use super::super::job::JobId;
    use super::*;

    #[test]
    fn one_agent_on_each_node() {
        let nodes: Vec<String> = ["n1", "n2", "n4"].map(String::from).into();
        let mut job = Allocation {
            job: JobId { id: 1, array: None },
            nodes: nodes.clone(),
            gpus_per_node: Some(8),
            cpus: Vec::new(),
            end: None,
            restart_count: 0,
            place: Place::Batch,
        };
        let agent: Vec<OsString> = vec!["/opt/my apps/tsm-launch".into(), "__agent".into()];
        let words = |job: &Allocation, gpus| {
            let argv = srun(job, &nodes, gpus, &agent).argv;
            argv.into_iter()
                .map(|w| w.into_string().unwrap())
                .collect::<Vec<_>>()
        };
        let argv = words(&job, None);
        assert_eq!(
            argv[..5],
            [
                "srun",
                "--nodes=3",
                "--ntasks=3",
                "--ntasks-per-node=1",
                "--nodelist=n[1-2,4]"
            ]
        );
        assert_eq!(
            argv[argv.len() - 2..],
            ["/opt/my apps/tsm-launch", "__agent"]
        );
        assert!(argv.contains(&"--gpus-per-node=8".into()), "{argv:?}");
        assert!(words(&job, Some(4)).contains(&"--gpus-per-node=4".into()));
        for without in [None, Some(0)] {
            job.gpus_per_node = without;
            assert!(
                !words(&job, Some(4)).iter().any(|w| w.starts_with("--gpu")),
                "SLURM knows of no GPU"
            );
        }
    }
}
