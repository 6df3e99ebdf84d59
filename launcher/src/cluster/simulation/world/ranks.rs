//! The ranks of a job that trains data parallel.

use super::*;
use crate::blame::LOST_PEER;
use crate::cluster::message::Start;
use crate::supervisor::Event as Seen;
use tsm_job::message::FailureRecord;

impl World {
    pub(super) fn rank_of(&self, n: usize, local: usize) -> Option<usize> {
        self.nodes[n]
            .ranks
            .iter()
            .copied()
            .find(|&r| self.ranks[r].local == local)
    }

    pub(super) fn spawn(&mut self, n: usize, start: &Start) {
        let generation = start.generation;
        let other = self
            .ranks
            .iter()
            .find(|r| r.alive && !r.dying && r.generation != generation);
        if let Some(other) = other {
            let text = format!(
                "rank {} of generation {} runs on node {} when generation {generation} starts on node {n}",
                other.number, other.generation, other.node
            );
            self.fault(text);
        }
        self.tell(format!("node {n} starts ranks of generation {generation}"));
        self.nodes[n].ranks.clear();
        for local in 0..start.num_ranks as usize {
            let r = self.ranks.len();
            let grace = self.plan.grace;
            let stubborn = self.plan.stubborn && self.random.chance(20);
            let in_time = |random: &mut Random| random.between(ZERO, grace.mul_f32(0.9));
            let (ends_in, saves_in) = (in_time(&mut self.random), in_time(&mut self.random));
            self.ranks.push(Rank {
                node: n,
                local,
                number: start.first_rank + local as u32,
                generation,
                alive: true,
                hung: false,
                step: 0,
                ends_in: (!stubborn).then_some(ends_in),
                saves_in: (!stubborn).then_some(saves_in),
                failed: false,
                dying: false,
            });
            self.nodes[n].ranks.push(r);
            let at = self.now + self.random.ms(10, 200);
            self.at(at, What::Rank(r, Do::Step(1)));
        }
    }

    pub(super) fn signal_rank(&mut self, n: usize, local: usize, signal: i32) {
        let Some(r) = self.rank_of(n, local) else {
            return;
        };
        let (rank, saves) = (&self.ranks[r], self.plan.saves);
        let (wait, end) = match signal {
            libc::SIGUSR1 => return,
            libc::SIGUSR2 if !saves => return,
            libc::SIGUSR2 => (rank.saves_in, End::Code(exit::REQUEUE)),
            _ => (rank.ends_in, End::Signal(signal)),
        };
        // One that hangs does not get to its next step, where it would save.
        let wait = wait.filter(|_| signal != libc::SIGUSR2 || !rank.hung);
        if let Some(wait) = wait {
            self.at(self.now + wait, What::Rank(r, Do::End(end)));
        }
    }

    pub(super) fn rank_does(&mut self, r: usize, what: Do) {
        if !self.ranks[r].alive {
            return;
        }
        let (n, local, generation) = (
            self.ranks[r].node,
            self.ranks[r].local,
            self.ranks[r].generation,
        );
        match what {
            Do::Step(step) => self.step(r, step),
            Do::Leave => self.wake(
                n,
                Input::Ranks(Seen::Left {
                    rank: local,
                    is_exiting: true,
                }),
            ),
            Do::Announce(code) => {
                let record = FailureRecord {
                    rank: local as u32,
                    step: None,
                    code,
                    cause: "error".into(),
                    message: "no such file".into(),
                    backtrace: None,
                };
                let rank = local;
                self.wake(n, Input::Ranks(Seen::Failing { rank, record }));
                self.ranks[r].failed = true;
                self.peers_notice(generation);
            }
            Do::Notice if self.ranks[r].failed => {}
            Do::End(_) if self.ranks[r].dying => {}
            Do::Gone(end) => self.end_rank(r, end),
            Do::Notice => {
                let words = LOST_PEER[self.random.below(LOST_PEER.len())];
                let end = match self.random.below(5) {
                    0 => {
                        let text = format!("[3] {words} 10.0.0.2");
                        self.wake(n, Input::Words { local, text });
                        End::Signal(libc::SIGABRT)
                    }
                    // Some programs tell nothing.
                    1 => End::Code(1),
                    _ => End::Code(exit::PEER),
                };
                self.end_rank(r, end);
            }
            Do::End(end) => self.end_rank(r, end),
        }
    }

    pub(super) fn end_rank(&mut self, r: usize, end: End) {
        let rank = &mut self.ranks[r];
        rank.alive = false;
        rank.failed |= !end.is_success() && end != End::Code(exit::REQUEUE);
        let (n, local, generation, failed) = (rank.node, rank.local, rank.generation, rank.failed);
        self.tell(format!("rank {} on node {n}: {end}", self.ranks[r].number));
        if failed {
            self.peers_notice(generation);
        }
        // Its sockets are closed before its end can be seen.
        if !self.ranks[r].dying {
            self.wake(
                n,
                Input::Ranks(Seen::Left {
                    rank: local,
                    is_exiting: true,
                }),
            );
        }
        let ended = Seen::Ended { rank: local, end };
        let at = self.now + self.random.ms(0, 5);
        self.at(at, What::Input(n, Input::Ranks(ended)));
    }

    /// Others lose a connection to it, if they happen to use it.
    pub(super) fn peers_notice(&mut self, generation: u32) {
        for r in 0..self.ranks.len() {
            if self.ranks[r].generation == generation && self.ranks[r].alive && !self.ranks[r].hung
            {
                let at = self.now + self.random.ms(40, 400);
                if self.random.chance(50) {
                    self.at(at, What::Rank(r, Do::Notice));
                }
            }
        }
    }

    pub(super) fn step(&mut self, r: usize, step: u64) {
        let (generation, n) = (self.ranks[r].generation, self.ranks[r].node);
        let world_size = self.state.world_size() as usize;
        let of = || self.ranks.iter().filter(|x| x.generation == generation);
        // Data parallel: nobody is more than a step ahead.
        let together = of().count() >= world_size
            && of().all(|x| !x.failed && (x.step + 1 >= step || !x.alive));
        let waits = self.ranks[r].hung || self.ranks[r].dying;
        if waits || !together {
            let at = self.now + MS(50);
            // A rank that is alone waits until it is told to end.
            if at < END {
                self.at(at, What::Rank(r, Do::Step(step)));
            }
            return;
        }
        self.ranks[r].step = step;
        let saved = self.ranks[r].number == 0 && step.is_multiple_of(10);
        let local = self.ranks[r].local;
        // Every start goes on where the last one stopped.
        let step = step + 1000 * u64::from(generation);
        self.wake(n, Input::Stepped { local, step, saved });
        let next = self.ranks[r].step + 1;
        if next > self.plan.steps {
            let at = self.now + self.random.ms(0, 30);
            self.at(at, What::Rank(r, Do::End(End::Code(0))));
        } else {
            let at = self.now + self.random.between(self.plan.period / 2, self.plan.period);
            self.at(at, What::Rank(r, Do::Step(next)));
        }
    }
}
