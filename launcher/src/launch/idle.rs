//! Options that could have no effect here: whoever gives one believes that it has. Refused, unless the same command
//! line means something where a scheduler starts it: nothing is refused there that counts for more nodes or ranks.
//!
//! What does not depend on where the launcher runs is left to [`crate::cli`].

use tsm_job::exit::{self, Coded};

use crate::cli::{Args, Show};
use crate::start::adopt::{Adopted, Kind};
use crate::start::slurm::{Allocation, Place};

/// # Errors
/// [`exit::USAGE`] with what the first such option needs.
pub(super) fn refuse(
    args: &Args,
    adopted: Option<&Adopted>,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<(), Coded> {
    let is_set = |name: &str| lookup(name).is_some_and(|value| !value.is_empty());
    let is_met =
        args.rendezvous.is_some() || adopted.is_some_and(|a| matches!(a.kind, Kind::Point { .. }));
    let key = match args.key_file {
        Some(_) => Some("--key-file"),
        None => args.key_fd.map(|_| "--key-fd"),
    };
    if let Some(option) = key.filter(|_| !is_met) {
        return Err(without_effect(
            option,
            "no node of this job is met with a key",
            "give --rendezvous HOST:PORT too, or leave it out; --hosts, SLURM and mpirun need no key",
        ));
    }
    let by_mpirun = is_set("OMPI_COMM_WORLD_SIZE") && !args.ignore_env;
    if args.share_host && !by_mpirun {
        return Err(without_effect(
            "--share-host",
            "mpirun has not started this",
            "leave it out",
        ));
    }
    let by_srun = || -> Result<bool, Coded> {
        let allocation = Allocation::from_env(&lookup)?;
        let is_step = allocation.is_some_and(|a| matches!(a.place, Place::Step { .. }));
        Ok(is_step && !args.ignore_env)
    };
    if args.rendezvous_dir.is_some() && (is_set("PET_NNODES") || !(by_mpirun || by_srun()?)) {
        return Err(without_effect(
            "--rendezvous-dir",
            "neither mpirun nor srun has started this",
            "leave it out, or start one tsm-launch on each node: mpirun -N 1, srun --ntasks-per-node=1",
        ));
    }
    Ok(())
}

/// # Errors
/// [`exit::USAGE`] for a rank that the job cannot have, however many of its nodes take part.
pub(super) fn refuse_ranks(show: Option<&Show>, max_world_size: usize) -> Result<(), Coded> {
    let Some(Show::Ranks(ranks)) = show else {
        return Ok(());
    };
    let Some(rank) = ranks.iter().find(|&&rank| rank as usize >= max_world_size) else {
        return Ok(());
    };
    let has = match max_world_size {
        1 => "rank 0 alone".into(),
        n => format!("ranks 0 to {}", n - 1),
    };
    Err(Coded::new(
        exit::USAGE,
        format!(
            "--show-ranks names rank {rank}, the job has {has}\n  hint: name ranks that it has, or `all`, or `none`"
        ),
    ))
}

fn without_effect(option: &str, why: &str, hint: &str) -> Coded {
    let text = format!("{option} would have no effect: {why}\n  hint: {hint}");
    Coded::new(exit::USAGE, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::start::adopt::adopt;
    use clap::Parser;

    const MPI: &str = "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=1 PMIX_NAMESPACE=a";
    const STEP: &str = "SLURM_JOB_ID=7 SLURM_STEP_ID=3 SLURM_NODEID=0 SLURM_STEP_NODELIST=n[1-2] \
        SLURM_STEP_TASKS_PER_NODE=1(x2)";
    const BATCH: &str = "SLURM_JOB_ID=7 SLURM_STEP_ID=4294967291 SLURM_JOB_NODELIST=n[1-2]";
    const PET: &str =
        "PET_NNODES=2 PET_NODE_RANK=0 PET_MASTER_ADDR=a PET_MASTER_PORT=1 PET_NPROC_PER_NODE=1";

    fn check(line: &str, env: &str) -> Result<(), Coded> {
        let words = format!("tsm-launch {line} --cpus 1 -- x");
        let args = Args::try_parse_from(words.split_whitespace()).unwrap();
        let lookup = |name: &str| {
            let mut pairs = env.split_whitespace().filter_map(|p| p.split_once('='));
            pairs
                .find(|(n, _)| *n == name)
                .map(|(_, value)| value.into())
        };
        let told = args.ignore_env || args.rendezvous.is_some() || args.hosts.is_some();
        let adopted = (!told).then(|| adopt(lookup, true).unwrap()).flatten();
        refuse(&args, adopted.as_ref(), lookup)
    }

    #[test]
    fn what_counts_where_a_scheduler_starts_it_is_refused_elsewhere() {
        for (line, env, ok) in [
            ("--key-file k", "", false),
            ("--key-file k --hosts a", "", false),
            ("--key-file k --nodes 1 --rendezvous a:1", "", true),
            ("--key-file k", PET, true),
            ("--key-file k", "PET_NNODES=1", true),
            ("--key-fd 0", "", false),
            ("--key-fd 0 --nodes 1 --rendezvous a:1", "", true),
            ("--key-file k --ignore-env", PET, false),
            ("--key-file k", MPI, false),
            ("--share-host", "", false),
            ("--share-host", STEP, false),
            ("--share-host", MPI, true),
            ("--share-host", "OMPI_COMM_WORLD_SIZE=1", true),
            ("--share-host --ignore-env", MPI, false),
            ("--rendezvous-dir d", "", false),
            ("--rendezvous-dir d", MPI, true),
            ("--rendezvous-dir d", "OMPI_COMM_WORLD_SIZE=1", true),
            ("--rendezvous-dir d", STEP, true),
            (
                "--rendezvous-dir d",
                &STEP.replace("[1-2]", "1").replace("(x2)", ""),
                true,
            ),
            ("--rendezvous-dir d", BATCH, false),
            ("--rendezvous-dir d", PET, false),
        ] {
            let found = check(line, env);
            assert_eq!(found.is_ok(), ok, "{line} {env}: {found:?}");
            if let Err(error) = found {
                let option = line.split(' ').next().unwrap();
                assert_eq!(error.code, exit::USAGE);
                assert!(error.message.starts_with(option), "{error}");
                assert!(error.message.contains("\n  hint: "), "{error}");
            }
        }
    }

    #[test]
    fn a_rank_to_show_has_to_be_one() {
        let show = |text: &str| Some(text.parse::<Show>().unwrap());
        for good in ["all", "none", "0", "3,1"] {
            refuse_ranks(show(good).as_ref(), 4).unwrap();
        }
        refuse_ranks(None, 1).unwrap();
        let error = |text: &str, n| refuse_ranks(show(text).as_ref(), n).unwrap_err().message;
        assert!(
            error("0,4", 4).starts_with("--show-ranks names rank 4, the job has ranks 0 to 3\n")
        );
        assert!(error("1", 1).contains("has rank 0 alone\n"));
    }
}
