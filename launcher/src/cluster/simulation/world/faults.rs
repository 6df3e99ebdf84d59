//! What goes wrong.

use super::*;
use crate::cluster::simulation::plan::How;

impl World {
    pub(super) fn pick_node(&self, pick: usize) -> Option<usize> {
        let here = |n: &usize| self.nodes[*n].agent.is_some() && !self.nodes[*n].local;
        let nodes: Vec<usize> = (0..self.nodes.len()).filter(here).collect();
        (!nodes.is_empty()).then(|| nodes[pick % nodes.len()])
    }

    pub(super) fn pick_rank(&self, pick: usize) -> Option<usize> {
        let ranks: Vec<usize> = (0..self.ranks.len())
            .filter(|&r| self.ranks[r].alive)
            .collect();
        (!ranks.is_empty()).then(|| ranks[pick % ranks.len()])
    }

    pub(super) fn expect(&mut self, expected: Expected) {
        let running = self.state.phase == Phase::Run;
        let whole = self.ranks.iter().filter(|r| r.alive).count() as u32;
        if running && self.expected.is_none() && whole == self.state.world_size() {
            self.expected = Some(expected);
        }
    }

    pub(super) fn expect_node(&mut self, n: usize) {
        if self.nodes[n].ranks.iter().any(|&r| self.ranks[r].alive) {
            let host = self.nodes[n].host.clone();
            self.expect(Expected::Node(host));
        }
    }

    pub(super) fn inject(&mut self, fault: Fault) {
        if !self.coordinator_up {
            return;
        }
        self.tell(format!("FAULT {fault:?}"));
        match fault {
            Fault::RankEnds(pick, how) => {
                let Some(r) = self.pick_rank(pick) else {
                    return;
                };
                let number = self.ranks[r].number;
                let code = match how {
                    How::Plain(end) | How::Left(_, end) => end.exit_code(),
                    How::Announced(code, ..) => code,
                };
                self.expect(Expected::Rank(number, code));
                match how {
                    How::Plain(end) => self.rank_does(r, Do::End(end)),
                    How::Announced(code, end) => {
                        self.rank_does(r, Do::Announce(code));
                        match end {
                            Some(after) => {
                                let end = End::Code(code);
                                self.at(self.now + after, What::Rank(r, Do::End(end)));
                            }
                            None => self.ranks[r].hung = true,
                        }
                    }
                    How::Left(after, end) => {
                        self.ranks[r].failed = true;
                        self.rank_does(r, Do::Leave);
                        let generation = self.ranks[r].generation;
                        self.ranks[r].dying = true;
                        self.peers_notice(generation);
                        self.at(self.now + after, What::Rank(r, Do::Gone(end)));
                    }
                }
            }
            Fault::RankSaves(pick) => {
                if let Some(r) = self.pick_rank(pick) {
                    self.expect(Expected::Saved);
                    self.rank_does(r, Do::End(End::Code(exit::REQUEUE)));
                }
            }
            Fault::RankHangs(pick) => {
                if let Some(r) = self.pick_rank(pick) {
                    let (number, step) = (self.ranks[r].number, self.ranks[r].step);
                    // Before its first step nobody can tell.
                    self.ranks[r].hung = step > 0;
                    // At its very end nobody waits for it any more.
                    if step > 0 && step + 3 < self.plan.steps {
                        self.expect(Expected::Late(number));
                    }
                }
            }
            Fault::AgentKilled(pick) => {
                if let Some(n) = self.pick_node(pick) {
                    self.expect_node(n);
                    self.end_agent(n);
                    self.will_notice(n);
                }
            }
            Fault::MachineDown(pick) => {
                if let Some(n) = self.pick_node(pick) {
                    self.expect_node(n);
                    self.nodes[n].agent = None;
                    self.kill_all(n);
                    self.nodes[n].up.cut();
                    self.nodes[n].down.cut();
                    self.will_notice(n);
                }
            }
            Fault::AgentStopped(pick, time) => {
                if let Some(n) = self.pick_node(pick) {
                    let until = self.now + time;
                    self.nodes[n].stopped_until = self.nodes[n].stopped_until.max(until);
                    self.at(self.now + time, What::AgentContinues(n));
                    if time > LEASE + MARGIN {
                        self.expect_node(n);
                        self.will_notice(n);
                    }
                }
            }
            Fault::Partition {
                node,
                up,
                down,
                time,
            } => {
                if let Some(n) = self.pick_node(node) {
                    let until = time.map_or(Duration::MAX, |t| self.now + t);
                    if up {
                        self.nodes[n].up.blocked_until = until;
                    }
                    if down {
                        self.nodes[n].down.blocked_until = until;
                    }
                    if time.is_none() && (up || down) {
                        self.expect_node(n);
                    }
                    if up && time.is_none_or(|t| t > LEASE + MARGIN) {
                        self.will_notice(n);
                    }
                }
            }
            Fault::Cut(pick) => {
                if let Some(n) = self.pick_node(pick) {
                    self.expect_node(n);
                    let node = n as u64 + 1;
                    self.nodes[n].up.cut();
                    self.nodes[n].down.cut();
                    let how = "connection reset".into();
                    self.coordinator(Event::Lost { node, how });
                    let at = self.now + self.random.ms(0, 10);
                    self.at(at, What::Input(n, Input::Closed));
                }
            }
            Fault::Slow(pick, delay) => {
                if let Some(n) = self.pick_node(pick) {
                    self.nodes[n].up.delay = (ZERO, delay);
                    self.nodes[n].down.delay = (ZERO, delay);
                }
            }
            Fault::CoordinatorStopped(time) => {
                self.coordinator_stopped_until = self.now + time;
                self.at(self.now + time, What::CoordinatorContinues);
                for n in 0..self.nodes.len() {
                    if self.nodes[n].local {
                        self.at(self.now + time, What::AgentContinues(n));
                    }
                }
            }
            Fault::CoordinatorKilled => self.stop_coordinator(),
            Fault::Signal(signal) => self.coordinator(Event::Signal(signal)),
            Fault::NodeSignal(pick, signal) => {
                if let Some(n) = self.pick_node(pick) {
                    self.wake(n, Input::Signal(signal));
                }
            }
            Fault::Arrives(again) => {
                let host = match again {
                    Some(pick) => self.nodes[pick % self.nodes.len()].host.clone(),
                    None => format!("n{}", self.nodes.len()),
                };
                self.add_node(&host, false, self.now);
            }
            Fault::Broken(pick) => {
                let n = pick % self.nodes.len();
                self.nodes[n].broken = true;
                if let Some(agent) = &mut self.nodes[n].agent {
                    agent.broken = true;
                }
            }
            Fault::Mute(pick) => {
                let n = pick % self.nodes.len();
                self.nodes[n].mute = true;
                if let Some(agent) = &mut self.nodes[n].agent {
                    agent.mute = true;
                }
            }
        }
    }

    pub(super) fn will_notice(&mut self, n: usize) {
        // One that has not joined yet is nobody's loss, and may join later.
        if !self.state.is_connected(n as u64 + 1) {
            return;
        }
        let up = &self.nodes[n].up;
        // What is held up on the way is heard later than it was said.
        let held = [up.blocked_until, up.last_arrival];
        let held = held.into_iter().filter(|at| *at < Duration::MAX).max();
        let last = held.unwrap_or_default().max(self.now);
        self.at(last + up.delay.1 + LEASE + MARGIN, What::Noticed(n));
    }
}
