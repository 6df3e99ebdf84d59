//! Pods of Kubernetes: those of Kubeflow's trainer, in the variables that it sets for torchrun, and of any indexed job.

use tsm_job::config::{DeviceKind, Launch};
use tsm_job::exit::Coded;

use super::{Adopted, Kind, check_order, read};
use crate::cli::{Gpus, Nodes};
use crate::plan::Workers;

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

/// Where `PET_NNODES` is set.
pub(super) fn adopt(get: impl Fn(&str) -> Option<String>) -> Result<Option<Adopted>, Coded> {
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

#[cfg(test)]
mod tests {
    use super::super::tests::{PET, found, of, refused};
    use super::*;

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
    fn pods_of_kubernetes() {
        assert_eq!(completion_index(of("JOB_COMPLETION_INDEX=3")), Some(3));
        assert_eq!(completion_index(of("")), None);
        assert!(names_come_late(of("KUBERNETES_SERVICE_HOST=10.0.0.1")));
        assert!(!names_come_late(of("")));
    }
}
