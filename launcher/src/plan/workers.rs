//! What the workers of a node are to run on, before anybody has looked at that node. Pure.

use tsm_job::config::{DeviceKind, Launch};

use crate::cli::Gpus;

#[derive(Clone, Debug, PartialEq)]
pub enum Workers {
    Gpus(Gpus),
    Cpus(u32),
}

impl Workers {
    /// By the command line, or else by the config's `launch`; `None` where neither says.
    pub fn asked_for(
        gpus: Option<&Gpus>,
        cpus: Option<u32>,
        launch: Option<&Launch>,
    ) -> Option<Workers> {
        if let Some(n) = cpus {
            return Some(Workers::Cpus(n));
        }
        if let Some(gpus) = gpus {
            return Some(Workers::Gpus(gpus.clone()));
        }
        let launch = launch?;
        Some(match (launch.device, launch.nproc_per_node) {
            (DeviceKind::Cpu, n) => Workers::Cpus(n.unwrap_or(1)),
            (DeviceKind::Gpu, n) => Workers::Gpus(n.map_or(Gpus::Auto, Gpus::Count)),
        })
    }

    /// By which an agent, or another launcher, is told.
    pub fn flag(&self) -> [String; 2] {
        match self {
            Workers::Gpus(gpus) => ["--gpus".into(), gpus.to_string()],
            Workers::Cpus(n) => ["--cpus".into(), n.to_string()],
        }
    }

    pub fn device(&self) -> DeviceKind {
        match self {
            Workers::Gpus(_) => DeviceKind::Gpu,
            Workers::Cpus(_) => DeviceKind::Cpu,
        }
    }

    /// `None` where only the node itself knows.
    pub fn count(&self) -> Option<u32> {
        match self {
            Workers::Gpus(gpus) => gpus.count(),
            Workers::Cpus(n) => Some(*n),
        }
    }
}
