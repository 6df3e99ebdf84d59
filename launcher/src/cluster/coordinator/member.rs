//! A node that has joined, and its clock.

use std::time::Duration;

use crate::cluster::message::{AgentTime, Join};

/// What is known of a connected node.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub join: Join,
    /// Which of the agents of its host, from 0. One that comes back takes the number that became free.
    pub agent: u32,
    /// Its agent lives in the coordinator's own process.
    pub local: bool,
    /// When it was last heard.
    pub heard: Duration,
    pub clock: Clock,
    pub load: f32,
    pub mem_used_bytes: u64,
    /// Process ids of its ranks in this generation.
    pub pids: Vec<i32>,
}

impl Node {
    /// `gpu-01`; of a further agent of that host `gpu-01 (agent 2)`.
    pub fn name(&self) -> String {
        match self.agent {
            0 => self.join.host.clone(),
            n => format!("{} (agent {})", self.join.host, n + 1),
        }
    }
}

/// How an agent's clock stands to the coordinator's. Both count from a start of their own and run at the same rate.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Clock {
    /// Seconds to add to the agent's time.
    offset_s: f64,
    /// Half the shortest round trip seen; `None` before the first.
    error: Option<Duration>,
}

impl Clock {
    /// The clock of an agent in the same process.
    pub const SAME: Clock = Clock {
        offset_s: 0.0,
        error: Some(Duration::ZERO),
    };

    /// Takes in a message that was sent at `at` over a path with round trip `rtt`, and came in at `now`.
    /// The shortest round trip tells the most: then the message has travelled for half of it, give or take that half.
    pub fn learn(&mut self, at: AgentTime, rtt: Option<Duration>, now: Duration) {
        // Nothing travels for longer than there is somebody to come to.
        let travelled = rtt.filter(|r| *r <= now).map(|r| r / 2);
        let better = match (self.error, travelled) {
            (None, _) => true,
            (Some(old), Some(new)) => new < old,
            (Some(_), None) => false,
        };
        if better {
            let travelled_s = travelled.unwrap_or_default().as_secs_f64();
            self.offset_s = now.as_secs_f64() - travelled_s - at.as_secs_f64();
            self.error = travelled.or(self.error);
        }
    }

    /// A time of the agent by the coordinator's clock.
    pub fn map(&self, at: AgentTime) -> Duration {
        Duration::try_from_secs_f64(at.as_secs_f64() + self.offset_s).unwrap_or_default()
    }

    /// How far [`Clock::map`] may be off.
    pub fn error(&self) -> Duration {
        self.error.unwrap_or(Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn the_quickest_round_trip_sets_the_clock() {
        let mut clock = Clock::default();
        // The agent started 1 s after the coordinator.
        clock.learn(MS(0), None, MS(1030));
        clock.learn(MS(100), Some(MS(40)), MS(1135));
        assert_eq!((clock.map(MS(500)), clock.error()), (MS(1515), MS(20)));
        clock.learn(MS(200), Some(MS(2)), MS(1201));
        assert_eq!((clock.map(MS(500)), clock.error()), (MS(1500), MS(1)));
        clock.learn(MS(300), Some(MS(200)), MS(1500));
        assert_eq!(clock.map(MS(500)), MS(1500));
    }

    #[test]
    fn a_time_before_the_coordinator_s_start_is_its_start() {
        let mut clock = Clock::default();
        clock.learn(MS(5000), Some(MS(0)), MS(1000));
        assert_eq!(clock.map(MS(1000)), Duration::ZERO);
    }
}
