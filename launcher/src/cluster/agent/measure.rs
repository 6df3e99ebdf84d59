//! Measuring before a start. It is done on threads: the agent beats on meanwhile, and can be told to leave.

use std::sync::Arc;
use tokio::task::JoinHandle;

use super::Agent;
use crate::cluster::key::Key;
use crate::cluster::message::{FromAgent, Round};
use crate::cluster::wire::prove_member;
use crate::doctor::preflight::{GpuTask, OwnNode, Ring, Scale, Task, own_gpus, own_node};

/// The measurement of this node that is under way. What is dropped ends.
#[derive(Default)]
pub struct Measuring {
    /// A place whose neighbours are not known yet.
    ring: Option<(Round, Ring)>,
    work: Option<Work>,
    /// Held as long as somebody waits for what this node measures of itself.
    _own: Option<Arc<()>>,
}

/// Waits for a result; without it the thread that has the other end gives up.
struct Work(JoinHandle<()>);

impl Drop for Work {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Agent {
    pub(super) fn measure_node(&mut self, round: Round, scale: Scale) {
        let found = self.found.0.clone();
        let gpus = self.gpu_task(Task::new(Vec::new(), 0, &scale), Key::random());
        let wanted = Arc::new(());
        let is_wanted = Arc::downgrade(&wanted);
        self.measuring = Measuring {
            _own: Some(wanted),
            ..Measuring::default()
        };
        let measure = move || {
            let mut own = own_node(&scale);
            if scale.trainer.is_some() {
                let cancelled = || is_wanted.strong_count() == 0;
                let gpus = own_gpus(&gpus, cancelled);
                own.all_reduce_gb_s = gpus.all_reduce_gb_s;
                own.findings.extend(gpus.findings);
            }
            // The agent may have left.
            let _ = found.send(FromAgent::NodeMeasured { round, own });
        };
        let thread = std::thread::Builder::new().name("measure".into());
        if let Err(e) = thread.spawn(measure) {
            let own = OwnNode::failed(format!("no thread can be started: {e}"));
            let _ = self.found.0.send(FromAgent::NodeMeasured { round, own });
        }
    }

    fn gpu_task(&self, task: Task, key: Key) -> GpuTask {
        GpuTask {
            task,
            key,
            devices: self.setup.devices.clone(),
            launcher: self.setup.shim.clone(),
        }
    }

    /// The port of this node's place.
    pub(super) fn open_ring(&mut self, round: Round) -> Result<u16, String> {
        self.measuring = Measuring::default();
        let ring = Ring::open().map_err(|e| e.to_string())?;
        let port = ring.port;
        self.measuring.ring = Some((round, ring));
        Ok(port)
    }

    /// Starts what a group of nodes measures together.
    pub(super) fn measure_group(&mut self, round: Round, task: Task) {
        let place = self.measuring.ring.take().filter(|(of, _)| *of == round);
        let (Some((_, ring)), Some(key)) = (place, self.setup.key.clone()) else {
            return;
        };
        let result = match task.trainer {
            // The first member's launcher listens where its ring did.
            Some(_) => {
                drop(ring);
                let group = format!("{round:?} {:?}", task.members);
                self.gpu_task(task, key.derive(group.as_bytes())).start()
            }
            None => ring.start(task, move |nonce| prove_member(&key, nonce, round)),
        };
        let found = self.found.0.clone();
        let wait = async move {
            let ended = Err("the measuring thread ended".into());
            let result = result.await.unwrap_or(ended);
            let _ = found.send(FromAgent::Measured { round, result });
        };
        self.measuring.work = Some(Work(tokio::task::spawn_local(wait)));
    }
}
