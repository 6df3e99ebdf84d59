//! Nodes that another program has started, one process each: what its environment says about them. Pure.
//!
//! | by | known by | how the nodes meet |
//! |---|---|---|
//! | Kubeflow's trainer | `PET_NNODES`, as torchrun reads it | at `PET_MASTER_ADDR:PET_MASTER_PORT` |
//! | Open MPI's mpirun | `OMPI_COMM_WORLD_SIZE` | through a file, see [`super::meet`] |
//! | SLURM's srun | `SLURM_STEP_ID` | through a file |

use tsm_job::config::{DeviceKind, Launch};
use tsm_job::exit::{self, Coded};

use super::slurm::{Allocation, Place};
use crate::cli::{Args, Gpus, Nodes};
use crate::plan::Workers;

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

/// Workers on each node, as torchrun's `--nproc-per-node` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PerNode {
    Auto,
    Gpu,
    Cpu,
    Count(u32),
}

impl PerNode {
    /// What that means on this node.
    pub fn workers(self, launch: Option<&Launch>, num_gpus: usize, num_cpus: usize) -> Workers {
        let has_gpus = match launch {
            Some(launch) => launch.device == DeviceKind::Gpu,
            None => num_gpus > 0,
        };
        match self {
            PerNode::Gpu => Workers::Gpus(Gpus::Auto),
            PerNode::Auto if has_gpus => Workers::Gpus(Gpus::Auto),
            PerNode::Count(n) if has_gpus => Workers::Gpus(Gpus::Count(n)),
            PerNode::Count(n) => Workers::Cpus(n),
            PerNode::Auto | PerNode::Cpu => Workers::Cpus(num_cpus as u32),
        }
    }
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

/// Why the workers of this node would be slow: mpirun binds each process that it starts to a core, and so us.
pub fn too_few_cores(by: &str, allowed: &[usize], online: Option<usize>) -> Option<String> {
    let (have, of) = (allowed.len(), online?);
    (by == "mpirun" && have > 0 && have * 2 <= of).then(|| {
        format!("mpirun has bound this node to {have} of its {of} cores\n  hint: give mpirun --bind-to none")
    })
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
        return kubeflow(get);
    }
    if get("OMPI_COMM_WORLD_SIZE").is_some() {
        return open_mpi(get, share_host);
    }
    if get("SLURM_STEP_ID").is_some() {
        return step(get);
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

fn kubeflow(get: impl Fn(&str) -> Option<String>) -> Result<Option<Adopted>, Coded> {
    let beside = "PET_NNODES";
    let nodes: Nodes = read(&get, "PET_NNODES", "")?;
    let workers = match get("PET_NPROC_PER_NODE").as_deref() {
        None => None,
        Some("auto") => Some(PerNode::Auto),
        Some("gpu") => Some(PerNode::Gpu),
        Some("cpu") => Some(PerNode::Cpu),
        Some(_) => Some(PerNode::Count(read(&get, "PET_NPROC_PER_NODE", beside)?)),
    };
    // A node alone meets nobody; what else is set is of no use to it.
    let (order, host, port) = if nodes.max == 1 {
        (0, String::new(), 0)
    } else {
        (
            read(&get, "PET_NODE_RANK", beside)?,
            read(&get, "PET_MASTER_ADDR", beside)?,
            read(&get, "PET_MASTER_PORT", beside)?,
        )
    };
    check_order(order, nodes, "PET_NODE_RANK")?;
    Ok(Some(Adopted {
        order,
        nodes,
        kind: Kind::Point {
            host,
            port,
            workers,
        },
    }))
}

fn open_mpi(
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
    let nodes = Nodes {
        min: size,
        max: size,
    };
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

fn step(get: impl Fn(&str) -> Option<String>) -> Result<Option<Adopted>, Coded> {
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
    let nodes = Nodes {
        min: size,
        max: size,
    };
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

/// The place of this node where only that is known: in an indexed job of Kubernetes.
pub fn completion_index(lookup: impl Fn(&str) -> Option<String>) -> Option<u32> {
    lookup("JOB_COMPLETION_INDEX")?.parse().ok()
}

/// Whether a name that leads nowhere may only be late: a headless service names its pods as they start.
pub fn names_come_late(lookup: impl Fn(&str) -> Option<String>) -> bool {
    ["JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"]
        .iter()
        .any(|name| lookup(name).is_some())
}

/// Variables by which a program would take itself for this process in the eyes of mpirun: its workers are no
/// ranks of that MPI job, and could only disturb it. Empty outside one.
pub fn identity_in_mpi(names: impl Iterator<Item = String>) -> Vec<String> {
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
    use super::*;

    fn of(text: &str) -> impl Fn(&str) -> Option<String> + '_ {
        move |name| {
            let mut pairs = text.split_whitespace().filter_map(|p| p.split_once('='));
            pairs
                .find(|(n, _)| *n == name)
                .map(|(_, value)| value.into())
        }
    }

    fn found(text: &str) -> Option<Adopted> {
        adopt(of(text), false).unwrap()
    }

    fn refused(text: &str) -> String {
        let error = adopt(of(text), false).unwrap_err();
        assert_eq!(error.code, exit::USAGE);
        assert!(error.message.contains("hint: "), "{error}");
        error.message
    }

    const MPI: &str = "OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_LOCAL_SIZE=1 \
        PMIX_NAMESPACE=prterun-n1-77@1 OMPI_MCA_ess_base_jobid=12";
    const SRUN: &str = "SLURM_JOB_ID=7 SLURM_STEP_ID=3 SLURM_NODEID=1 SLURM_STEP_NODELIST=n[1-3] \
        SLURM_STEP_TASKS_PER_NODE=1(x3) SLURM_RESTART_COUNT=2";
    const PET: &str = "PET_NNODES=2 PET_NODE_RANK=1 PET_MASTER_ADDR=job-node-0-0.job PET_MASTER_PORT=29500 \
        PET_NPROC_PER_NODE=4 RANK=1 WORLD_SIZE=2 MASTER_ADDR=other";

    #[test]
    fn a_process_of_mpirun_is_a_node() {
        let adopted = found(MPI).unwrap();
        let four = Nodes { min: 4, max: 4 };
        assert_eq!((adopted.order, adopted.nodes), (2, four));
        let kind = Kind::File {
            by: "mpirun",
            id: "mpi-prterun-n1-77-1".into(),
        };
        assert_eq!(adopted.kind, kind);
        assert_eq!(found("OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_RANK=0"), None);
        assert_eq!(found("PATH=/bin"), None);
        let many = MPI.replace("LOCAL_SIZE=1", "LOCAL_SIZE=2");
        assert!(refused(&many).contains("mpirun -N 1"));
        assert!(adopt(of(&many), true).unwrap().is_some());
        assert!(refused(&MPI.replace("WORLD_RANK=2", "WORLD_RANK=4")).contains("there are 4"));
        assert!(refused(&MPI.replace("WORLD_RANK=2", "X=")).contains("WORLD_RANK is not set"));
        assert!(refused("PMI_SIZE=2 PMI_RANK=0").contains("Open MPI's mpirun"));
        assert_eq!(found("PMI_SIZE=1 PMI_RANK=0"), None);
    }

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

    #[test]
    fn kubeflow_says_where_to_meet() {
        let adopted = found(PET).unwrap();
        let kind = Kind::Point {
            host: "job-node-0-0.job".into(),
            port: 29500,
            workers: Some(PerNode::Count(4)),
        };
        assert_eq!(
            (adopted.order, adopted.nodes.max, adopted.kind),
            (1, 2, kind)
        );
        let elastic = found(&PET.replace("NNODES=2", "NNODES=1:2")).unwrap();
        assert_eq!(elastic.nodes, Nodes { min: 1, max: 2 });
        assert_eq!(found("PET_NNODES=1").unwrap().nodes.max, 1);
        assert!(
            refused(&PET.replace("PET_MASTER_PORT", "X")).contains("PET_MASTER_PORT is not set")
        );
        assert!(refused(&PET.replace("RANK=1", "RANK=2")).contains("PET_NODE_RANK is 2"));
        assert!(refused(&PET.replace("NODE=4", "NODE=xpu")).contains("\"xpu\""));
    }

    #[test]
    fn workers_of_a_node_as_torchrun_counts_them() {
        let of = |per: PerNode, gpus| per.workers(None, gpus, 16);
        assert_eq!(of(PerNode::Auto, 8), Workers::Gpus(Gpus::Auto));
        assert_eq!(of(PerNode::Auto, 0), Workers::Cpus(16));
        assert_eq!(of(PerNode::Count(2), 8), Workers::Gpus(Gpus::Count(2)));
        assert_eq!(of(PerNode::Count(2), 0), Workers::Cpus(2));
        assert_eq!(of(PerNode::Gpu, 0), Workers::Gpus(Gpus::Auto));
        assert_eq!(of(PerNode::Cpu, 8), Workers::Cpus(16));
        let cpu = Launch {
            device: DeviceKind::Cpu,
            ..Launch::default()
        };
        assert_eq!(
            PerNode::Count(2).workers(Some(&cpu), 8, 16),
            Workers::Cpus(2)
        );
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
        let of = |names: &str| identity_in_mpi(names.split(' ').map(String::from)).join(" ");
        assert_eq!(of("PATH OMPI_MCA_btl"), "");
        assert_eq!(
            of("PATH OMPI_MCA_btl PMIX_RANK PMIX_SERVER_URI4"),
            "OMPI_MCA_btl PMIX_RANK PMIX_SERVER_URI4"
        );
    }

    #[test]
    fn pods_of_kubernetes() {
        assert_eq!(completion_index(of("JOB_COMPLETION_INDEX=3")), Some(3));
        assert_eq!(completion_index(of("")), None);
        assert!(names_come_late(of("KUBERNETES_SERVICE_HOST=10.0.0.1")));
        assert!(!names_come_late(of("")));
    }
}
