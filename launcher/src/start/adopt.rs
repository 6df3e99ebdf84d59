//! Nodes that another program has started, one process each: what its environment says about them. Pure.
//!
//! | by | known by | how the nodes meet |
//! |---|---|---|
//! | Kubeflow's trainer | `PET_NNODES`, as torchrun reads it | at `PET_MASTER_ADDR:PET_MASTER_PORT` |
//! | Open MPI's mpirun | `OMPI_COMM_WORLD_SIZE` | through a file, see [`super::meet`] |
//! | SLURM's srun | `SLURM_STEP_ID` | through a file |

pub mod kubernetes;
pub mod mpi;
mod srun;

use tsm_job::config::Launch;
use tsm_job::exit::{self, Coded};

use crate::cli::{Args, Nodes};
use crate::plan::Workers;
use kubernetes::PerNode;

/// The place of this process among those that were started with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Adopted {
    /// The first coordinates.
    pub order: u32,
    pub nodes: Nodes,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// They have nothing in common but `id` and a file system.
    File { by: &'static str, id: String },
    /// The first can be reached there.
    Point {
        host: String,
        port: u16,
        workers: Option<PerNode>,
    },
}

impl Adopted {
    /// The command line with what the environment adds to it.
    ///
    /// # Errors
    /// [`exit::USAGE`] when it asks for another number of nodes.
    pub fn applied_to(
        &self,
        args: &Args,
        launch: Option<&Launch>,
        num_gpus: impl FnOnce() -> usize,
    ) -> Result<Args, Coded> {
        let mut args = args.clone();
        if let Some(asked) = args.nodes.filter(|asked| asked.max != self.nodes.max) {
            let (asked, started) = (asked.max, self.nodes.max);
            let by = match &self.kind {
                Kind::File { by, .. } => format!("{by} has started {started}"),
                Kind::Point { .. } => format!("PET_NNODES is {started}"),
            };
            let text = format!("--nodes asks for {asked}, {by}\n  hint: leave out --nodes");
            return Err(Coded::new(exit::USAGE, text));
        }
        args.nodes.get_or_insert(self.nodes);
        if let Kind::Point {
            workers: Some(workers),
            ..
        } = self.kind
            && args.gpus.is_none()
            && args.cpus.is_none()
        {
            let num_cpus = std::thread::available_parallelism().map_or(1, usize::from);
            match workers.workers(launch, num_gpus(), num_cpus) {
                Workers::Gpus(gpus) => args.gpus = Some(gpus),
                Workers::Cpus(n) => args.cpus = Some(n),
            }
        }
        Ok(args)
    }
}

/// Where this process was started as one of several nodes; `None` where it is alone. With `share_host` several
/// processes of mpirun on one machine are as many nodes.
///
/// # Errors
/// [`exit::USAGE`] where the environment cannot be adopted, with what to do instead.
pub fn adopt(
    lookup: impl Fn(&str) -> Option<String>,
    share_host: bool,
) -> Result<Option<Adopted>, Coded> {
    let get = |name: &str| lookup(name).filter(|value| !value.is_empty());
    if get("PET_NNODES").is_some() {
        return kubernetes::adopt(get);
    }
    if get("OMPI_COMM_WORLD_SIZE").is_some() {
        return mpi::adopt(get, share_host);
    }
    if get("SLURM_STEP_ID").is_some() {
        return srun::adopt(get);
    }
    if let Some(size) = get("PMI_SIZE").filter(|size| size != "1") {
        let text = format!(
            "PMI_SIZE is {size}: this was started by an MPI that gives its processes no common name\n  \
             hint: use Open MPI's mpirun, or give --nodes {size} --rendezvous HOST:PORT --key-file FILE; \
             --ignore-env starts a job of its own in each process"
        );
        return Err(Coded::new(exit::USAGE, text));
    }
    Ok(None)
}

/// The value of a variable, and why it cannot be read.
fn read<T: std::str::FromStr>(
    get: &impl Fn(&str) -> Option<String>,
    name: &str,
    beside: &str,
) -> Result<T, Coded> {
    let hint = "start this as the other nodes, or give --ignore-env to start a job of its own here";
    let problem = match get(name) {
        None => format!("{name} is not set, but {beside} is"),
        Some(text) => match text.parse() {
            Ok(value) => return Ok(value),
            Err(_) => format!("{name} is {text:?}, which cannot be read"),
        },
    };
    Err(Coded::new(
        exit::USAGE,
        format!("{problem}\n  hint: {hint}"),
    ))
}

fn check_order(order: u32, nodes: Nodes, name: &str) -> Result<(), Coded> {
    if order < nodes.max {
        return Ok(());
    }
    let text = format!(
        "{name} is {order}, there are {} nodes\n  hint: --ignore-env starts a job of its own here",
        nodes.max
    );
    Err(Coded::new(exit::USAGE, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Gpus;

    pub(super) const MPI: &str = "OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_LOCAL_SIZE=1 \
        PMIX_NAMESPACE=prterun-n1-77@1 OMPI_MCA_ess_base_jobid=12";
    pub(super) const PET: &str = "PET_NNODES=2 PET_NODE_RANK=1 PET_MASTER_ADDR=job-node-0-0.job PET_MASTER_PORT=29500 \
        PET_NPROC_PER_NODE=4 RANK=1 WORLD_SIZE=2 MASTER_ADDR=other";

    pub(super) fn of(text: &str) -> impl Fn(&str) -> Option<String> + '_ {
        move |name| {
            let mut pairs = text.split_whitespace().filter_map(|p| p.split_once('='));
            pairs
                .find(|(n, _)| *n == name)
                .map(|(_, value)| value.into())
        }
    }

    pub(super) fn found(text: &str) -> Option<Adopted> {
        adopt(of(text), false).unwrap()
    }

    pub(super) fn refused(text: &str) -> String {
        let error = adopt(of(text), false).unwrap_err();
        assert_eq!(error.code, exit::USAGE);
        assert!(error.message.contains("hint: "), "{error}");
        error.message
    }

    #[test]
    fn an_mpi_that_gives_no_common_name_is_refused_and_no_launcher_is_none() {
        assert!(refused("PMI_SIZE=2 PMI_RANK=0").contains("Open MPI's mpirun"));
        assert_eq!(found("PMI_SIZE=1 PMI_RANK=0"), None);
        assert_eq!(found("PATH=/bin"), None);
    }

    #[test]
    fn the_command_line_adds_to_what_is_adopted_but_cannot_contradict_it() {
        let args = |line: &str| <Args as clap::Parser>::try_parse_from(line.split(' ')).unwrap();
        let adopted = found(PET).unwrap();
        let applied = |line| adopted.applied_to(&args(line), None, || 8);
        let all = applied("tsm-launch -- x").unwrap();
        assert_eq!(
            (all.nodes.unwrap().max, all.gpus),
            (2, Some(Gpus::Count(4)))
        );
        let own = applied("tsm-launch --cpus 1 --nodes 1:2 -- x").unwrap();
        assert_eq!(
            (own.nodes.unwrap().min, own.gpus, own.cpus),
            (1, None, Some(1))
        );
        let error = applied("tsm-launch --nodes 3 -- x").unwrap_err();
        assert_eq!(error.code, exit::USAGE);
        assert!(error.message.contains("PET_NNODES is 2"), "{error}");
    }
}
