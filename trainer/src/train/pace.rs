//! How far the host may run ahead of a GPU.

use anyhow::Result;
use std::collections::VecDeque;
use tch::Device;
use tsm_torch_ext::cuda::Event;

/// Keeps the host at most two steps ahead of a GPU, so that step times are the device's and the
/// memory of queued steps is bounded.
pub struct Pace {
    device: Device,
    ahead: VecDeque<Event>,
}

impl Pace {
    pub fn new(device: Device) -> Pace {
        Pace {
            device,
            ahead: VecDeque::new(),
        }
    }

    /// Call at the end of every step.
    pub fn step(&mut self) -> Result<()> {
        let Device::Cuda(index) = self.device else {
            return Ok(());
        };
        let event = Event::new(index)?;
        event.record()?;
        self.ahead.push_back(event);
        if self.ahead.len() > 2
            && let Some(event) = self.ahead.pop_front()
        {
            event.synchronize()?;
        }
        Ok(())
    }
}
