//! How far the host may run ahead of a GPU, and what it learns of the steps behind it on the way.

use anyhow::Result;
use std::collections::VecDeque;
use std::time::Duration;
use tch::{Device, Tensor};
use tsm_torch_ext::cuda::Event;

/// Keeps the host at most two steps ahead of a GPU, so that step times are the device's and the
/// memory of queued steps is bounded. What a step leaves on the device is read once its event is
/// done, so that nothing waits for it.
pub struct Pace {
    device: Device,
    started: Option<Event>,
    ahead: VecDeque<Step>,
}

struct Step {
    votes: Tensor,
    /// Start of the step, all its gradients there, end of the step; `None` on the CPU.
    events: Option<[Event; 3]>,
}

/// What is known of steps that the device has finished.
#[derive(Debug, Default, PartialEq)]
pub struct Finished {
    /// Some rank has voted to stop. The same steps on all ranks.
    pub stop: bool,
    /// On a GPU: from the step's start to its last gradient, the wait for data included, the wait
    /// for other ranks not.
    pub work: Option<Duration>,
}

impl Pace {
    pub fn new(device: Device) -> Pace {
        Pace {
            device,
            started: None,
            ahead: VecDeque::new(),
        }
    }

    /// An event behind all that is queued; `None` on the CPU.
    pub fn event(device: Device) -> Result<Option<Event>> {
        let Device::Cuda(index) = device else {
            return Ok(None);
        };
        let event = Event::new(index)?;
        event.record()?;
        Ok(Some(event))
    }

    /// Call at the start of every step, before waiting for its data.
    pub fn begin(&mut self) -> Result<()> {
        self.started = Self::event(self.device)?;
        Ok(())
    }

    /// Call at the end of every step: when its gradients were there (see [`super::MicroStep`]), and
    /// the ranks' votes. Returns what is known of the step that the host waited for: this one on the
    /// CPU, the one two steps before on a GPU.
    pub fn end(&mut self, gradients: Option<Event>, votes: Tensor) -> Result<Finished> {
        let ended = Self::event(self.device)?;
        let events = match (self.started.take(), gradients, ended) {
            (Some(started), Some(gradients), Some(ended)) => Some([started, gradients, ended]),
            _ => None,
        };
        let ahead = if events.is_some() { 2 } else { 0 };
        self.ahead.push_back(Step { votes, events });
        if self.ahead.len() <= ahead {
            return Ok(Finished::default());
        }
        self.ahead.pop_front().map_or(Ok(Finished::default()), read)
    }

    /// Waits for all steps; whether one of those not returned yet has a vote.
    pub fn drain(&mut self) -> Result<bool> {
        let mut stop = false;
        for step in self.ahead.drain(..) {
            stop |= read(step)?.stop;
        }
        Ok(stop)
    }
}

fn read(step: Step) -> Result<Finished> {
    let mut work = None;
    if let Some([started, gradients, ended]) = &step.events {
        ended.synchronize()?;
        let ms = gradients.elapsed_ms(started)?;
        work = Some(Duration::from_secs_f32(ms.max(0.0) / 1e3));
    }
    Ok(Finished {
        stop: step.votes.f_double_value(&[])? > 0.0,
        work,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_cpu_a_vote_is_known_at_once() {
        let mut pace = Pace::new(Device::Cpu);
        let mut end = |votes: f32| {
            pace.begin().unwrap();
            pace.end(None, Tensor::from(votes)).unwrap().stop
        };
        assert_eq!([end(0.0), end(0.25), end(0.0)], [false, true, false]);
        assert!(!pace.drain().unwrap());
    }
}
