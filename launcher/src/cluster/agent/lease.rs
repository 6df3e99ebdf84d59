//! How long an agent may let its ranks run. Pure.
//!
//! A lease counts from when the answered beat was *sent*: the coordinator heard it later, so it waits longer for a
//! silent node than that node's ranks can live.

use std::collections::VecDeque;
use std::time::Duration;

use crate::cluster::coordinator::FENCE;
use crate::cluster::message::{AgentTime, BEATS_PER_LEASE, LEASE};

/// The coordinator's first words may take so many leases; its socket tells whether it lives.
const FIRST: u32 = 10;

#[derive(Clone, Debug)]
pub struct Lease {
    length: Duration,
    /// Without another answer, nothing may run from then on.
    pub until: AgentTime,
    pub next_beat: AgentTime,
    /// Round trip of the last answered beat.
    pub rtt: Option<Duration>,
    seq: u64,
    /// Beats that are not answered yet: number and time.
    unanswered: VecDeque<(u64, AgentTime)>,
}

impl Lease {
    pub fn new(now: AgentTime) -> Lease {
        Lease {
            length: LEASE,
            until: now + FIRST * LEASE,
            next_beat: now,
            rtt: None,
            seq: 0,
            unanswered: VecDeque::new(),
        }
    }

    /// The coordinator takes this agent in, and will not start ranks here before it has heard from it again.
    pub fn begin(&mut self, length: Duration, now: AgentTime) {
        (self.length, self.until, self.next_beat) = (length, now + length, now);
    }

    /// Number of the beat that is sent now.
    pub fn beat(&mut self, now: AgentTime) -> u64 {
        self.seq += 1;
        self.next_beat = now + self.length / BEATS_PER_LEASE;
        self.unanswered.push_back((self.seq, now));
        self.seq
    }

    pub fn answered(&mut self, seq: u64, now: AgentTime) {
        while let Some(&(number, sent)) = self.unanswered.front()
            && number <= seq
        {
            self.unanswered.pop_front();
            if number == seq {
                self.rtt = Some(now.saturating_sub(sent));
                self.until = self.until.max(sent + self.length);
            }
        }
    }

    pub fn length(&self) -> Duration {
        self.length
    }

    pub fn is_over(&self, now: AgentTime) -> bool {
        now >= self.until
    }

    /// After what time the guard kills the ranks, should the agent not do so itself.
    pub fn guard(&self, now: AgentTime) -> Duration {
        self.until.saturating_sub(now) + FENCE / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn a_lease_counts_from_the_beat_and_not_from_its_answer() {
        let mut lease = Lease::new(MS(0));
        lease.begin(MS(1500), MS(100));
        assert_eq!((lease.until, lease.next_beat), (MS(1600), MS(100)));
        let (first, second) = (lease.beat(MS(200)), lease.beat(MS(450)));
        lease.answered(second, MS(1500));
        assert_eq!((lease.until, lease.rtt), (MS(1950), Some(MS(1050))));
        // An answer that comes late, or twice, takes nothing back and gives nothing.
        lease.answered(first, MS(1600));
        lease.answered(second, MS(1600));
        assert_eq!(lease.until, MS(1950));
        assert!(!lease.is_over(MS(1949)) && lease.is_over(MS(1950)));
    }

    #[test]
    fn the_guard_waits_longer_than_the_agent_and_less_than_the_coordinator() {
        let mut lease = Lease::new(MS(0));
        lease.begin(LEASE, MS(0));
        let seq = lease.beat(MS(100));
        lease.answered(seq, MS(300));
        let killed = MS(300) + lease.guard(MS(300));
        assert!(killed > lease.until && killed < MS(100) + LEASE + FENCE);
    }
}
