//! Processes of Open MPI's mpirun.

use tsm_job::exit::{self, Coded};

use super::{Adopted, Kind, check_order, read};
use crate::cli::Nodes;

/// Where `OMPI_COMM_WORLD_SIZE` is set.
pub(super) fn adopt(
    get: impl Fn(&str) -> Option<String>,
    share_host: bool,
) -> Result<Option<Adopted>, Coded> {
    let beside = "OMPI_COMM_WORLD_SIZE";
    let size: u32 = read(&get, "OMPI_COMM_WORLD_SIZE", "")?;
    if size == 1 {
        return Ok(None);
    }
    let here: u32 = read(&get, "OMPI_COMM_WORLD_LOCAL_SIZE", beside)?;
    if here > 1 && !share_host {
        let text = format!(
            "mpirun starts tsm-launch {here} times on this node\n  \
             hint: start it once on each node with mpirun -N 1; it starts a worker for each GPU itself"
        );
        return Err(Coded::new(exit::USAGE, text));
    }
    let order = read(&get, "OMPI_COMM_WORLD_RANK", beside)?;
    let nodes = Nodes::exactly(size);
    check_order(order, nodes, "OMPI_COMM_WORLD_RANK")?;
    let names = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"];
    let id = names.iter().find_map(|name| get(name));
    let id = match id {
        Some(id) => id,
        None => read(&get, "PMIX_NAMESPACE", beside)?,
    };
    Ok(Some(Adopted {
        order,
        nodes,
        kind: Kind::File {
            by: "mpirun",
            id: format!("mpi-{}", plain(&id)),
        },
    }))
}

/// A name that is fit for a file.
fn plain(id: &str) -> String {
    let fit = |c: char| {
        if c.is_ascii_alphanumeric() || "._-".contains(c) {
            c
        } else {
            '-'
        }
    };
    id.chars().map(fit).collect()
}

/// Why the workers of this node would be slow: mpirun binds each process that it starts to a core, and so us.
pub fn too_few_cores(by: &str, allowed: &[usize], online: Option<usize>) -> Option<String> {
    let (have, of) = (allowed.len(), online?);
    (by == "mpirun" && have > 0 && have * 2 <= of).then(|| {
        format!("mpirun has bound this node to {have} of its {of} cores\n  hint: give mpirun --bind-to none")
    })
}

/// Variables by which a program would take itself for this process in the eyes of mpirun: its workers are no
/// ranks of that MPI job, and could only disturb it. Empty outside one.
pub fn identity(names: impl Iterator<Item = String>) -> Vec<String> {
    let names: Vec<String> = names
        .filter(|name| {
            ["OMPI_", "PMIX_", "PMI_", "PRTE_", "ORTE_"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        })
        .collect();
    // A user's own settings for MPI, such as OMPI_MCA_btl, are none.
    let is_rank = |name: &String| {
        matches!(
            name.as_str(),
            "OMPI_COMM_WORLD_RANK" | "PMIX_RANK" | "PMI_RANK"
        )
    };
    if names.iter().any(is_rank) {
        names
    } else {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{MPI, found, of, refused};
    use super::*;

    #[test]
    fn a_process_of_mpirun_is_a_node() {
        let adopted = found(MPI).unwrap();
        assert_eq!((adopted.order, adopted.nodes), (2, Nodes::exactly(4)));
        let kind = Kind::File {
            by: "mpirun",
            id: "mpi-prterun-n1-77-1".into(),
        };
        assert_eq!(adopted.kind, kind);
        assert_eq!(found("OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_RANK=0"), None);
        let many = MPI.replace("LOCAL_SIZE=1", "LOCAL_SIZE=2");
        assert!(refused(&many).contains("mpirun -N 1"));
        assert!(
            crate::start::adopt::adopt(of(&many), true)
                .unwrap()
                .is_some()
        );
        assert!(refused(&MPI.replace("WORLD_RANK=2", "WORLD_RANK=4")).contains("there are 4"));
        assert!(refused(&MPI.replace("WORLD_RANK=2", "X=")).contains("WORLD_RANK is not set"));
    }

    #[test]
    fn a_node_that_mpirun_has_bound_to_a_core_is_warned() {
        let told = too_few_cores("mpirun", &[0], Some(96)).unwrap();
        assert!(told.contains("1 of its 96 cores") && told.contains("--bind-to none"));
        let all: Vec<usize> = (0..96).collect();
        assert_eq!(too_few_cores("mpirun", &all, Some(96)), None);
        assert_eq!(
            too_few_cores("srun", &[0], Some(96)),
            None,
            "SLURM's own limit"
        );
        assert_eq!(too_few_cores("mpirun", &[0], None), None);
    }

    #[test]
    fn a_rank_of_mpi_is_known_by_its_variables() {
        let of = |names: &str| identity(names.split(' ').map(String::from)).join(" ");
        assert_eq!(of("PATH OMPI_MCA_btl"), "");
        assert_eq!(
            of("PATH OMPI_MCA_btl PMIX_RANK PMIX_SERVER_URI4"),
            "OMPI_MCA_btl PMIX_RANK PMIX_SERVER_URI4"
        );
    }
}
