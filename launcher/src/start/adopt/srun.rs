//! Tasks of a step that SLURM's srun has started.

use tsm_job::exit::Coded;

use super::{Adopted, Kind, check_order};
use crate::cli::Nodes;
use crate::start::slurm::{Allocation, Place};

/// Where `SLURM_STEP_ID` is set. A batch script is a step too, and none of these.
pub(super) fn adopt(get: impl Fn(&str) -> Option<String>) -> Result<Option<Adopted>, Coded> {
    // An error where it is not one task on each node.
    let Some(allocation) = Allocation::from_env(&get)? else {
        return Ok(None);
    };
    let Place::Step { id, node } = allocation.place else {
        return Ok(None);
    };
    let size = allocation.nodes.len() as u32;
    if size == 1 {
        return Ok(None);
    }
    let nodes = Nodes::exactly(size);
    check_order(node, nodes, "SLURM_NODEID")?;
    // A job that is queued again has the same number, and so have its steps.
    let (job, start) = (allocation.job.id, allocation.restart_count);
    Ok(Some(Adopted {
        order: node,
        nodes,
        kind: Kind::File {
            by: "srun",
            id: format!("slurm-{job}.{id}.{start}"),
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{MPI, found, refused};
    use super::*;

    const SRUN: &str = "SLURM_JOB_ID=7 SLURM_STEP_ID=3 SLURM_NODEID=1 SLURM_STEP_NODELIST=n[1-3] \
        SLURM_STEP_TASKS_PER_NODE=1(x3) SLURM_RESTART_COUNT=2";

    #[test]
    fn a_task_of_srun_is_a_node_and_a_batch_script_is_none() {
        let adopted = found(SRUN).unwrap();
        assert_eq!((adopted.order, adopted.nodes.max), (1, 3));
        let kind = Kind::File {
            by: "srun",
            id: "slurm-7.3.2".into(),
        };
        assert_eq!(adopted.kind, kind);
        let batch = SRUN.replace("STEP_ID=3", "STEP_ID=4294967291");
        assert_eq!(found(&format!("{batch} SLURM_JOB_NODELIST=n[1-3]")), None);
        assert!(refused(&SRUN.replace("1(x3)", "8(x3)")).contains("--ntasks-per-node=1"));
        assert_eq!(
            found(&SRUN.replace("n[1-3]", "n1").replace("1(x3)", "1")),
            None
        );
        // mpirun inside an allocation starts its daemons by srun, which is not what starts us.
        let both = found(&format!("{SRUN} {MPI}")).unwrap();
        assert_eq!(both.order, 2);
    }
}
