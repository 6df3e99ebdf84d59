//! The agents of the nodes, their guards, and what they do to their ranks.

use super::*;

impl World {
    pub(super) fn start_agent(&mut self, n: usize) {
        let (host, local) = (self.nodes[n].host.clone(), self.nodes[n].local);
        let (mut agent, effects) = Agent::new(&host, local, self.plan.workers, ZERO);
        (agent.broken, agent.mute) = (self.nodes[n].broken, self.nodes[n].mute);
        agent.network = (n as u16, self.plan.measure.clone().unwrap_or_default());
        self.nodes[n].agent = Some(agent);
        self.effect(n, effects);
        self.wake(n, Input::Time);
    }

    pub(super) fn wake(&mut self, n: usize, input: Input) {
        let node = &mut self.nodes[n];
        if node.agent.is_none() {
            return;
        }
        let process_stops = node.local && self.now < self.coordinator_stopped_until;
        if self.now < node.stopped_until || process_stops {
            if !matches!(input, Input::Time) {
                node.inbox.push_back(input);
            }
            return;
        }
        let now = self.now - node.born;
        let Some(agent) = &mut node.agent else {
            return;
        };
        let effects = agent.wake(input, now);
        self.effect(n, effects);
        let node = &self.nodes[n];
        if let Some(at) = node.agent.as_ref().and_then(Agent::deadline) {
            let at = node.born + at;
            self.at(at, What::AgentTimer(n));
        }
    }

    pub(super) fn agent_continues(&mut self, n: usize) {
        if self.now < self.nodes[n].stopped_until {
            return;
        }
        let inbox = std::mem::take(&mut self.nodes[n].inbox);
        // As its loop does: first its ranks, then what it is told, then the time.
        let is_message = |i: &Input| matches!(i, Input::Message(_) | Input::Closed);
        let (messages, own): (Vec<Input>, Vec<Input>) = inbox.into_iter().partition(is_message);
        for input in own.into_iter().chain(messages).chain([Input::Time]) {
            self.wake(n, input);
        }
    }

    pub(super) fn effect(&mut self, n: usize, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Say(message) => self.send_up(n, Packet::Message(Box::new(message))),
                Effect::Spawn(start) => self.spawn(n, &start),
                Effect::Signal { local, signal } => self.signal_rank(n, local, signal),
                Effect::Kill { local } => {
                    if self.plan.is_polite() {
                        self.fault(format!("node {n} kills a rank within its grace"));
                    }
                    if let Some(r) = self.rank_of(n, local) {
                        let at = self.now + self.random.ms(0, 1);
                        self.at(at, What::Rank(r, Do::End(End::Signal(libc::SIGKILL))));
                    }
                }
                Effect::Guard(time) => {
                    let at = self.now + time;
                    self.nodes[n].guard = Some(at);
                    // It is a process as others are.
                    let at = at + self.random.ms(0, 100);
                    self.at(at, What::GuardTimer(n));
                }
                Effect::Dismiss => self.nodes[n].guard = None,
                Effect::Drain => {
                    let at = self.now + self.random.ms(0, 20);
                    self.at(at, What::Input(n, Input::Drained));
                }
                Effect::Measure(result) => {
                    let at = self.now + self.random.ms(50, 2500);
                    self.at(at, What::Input(n, Input::Measured(result)));
                }
                Effect::Exit(code) => {
                    self.tell(format!("the agent of node {n} leaves with {code}"));
                    self.end_agent(n);
                }
            }
        }
    }

    pub(super) fn end_agent(&mut self, n: usize) {
        self.nodes[n].agent = None;
        self.send_up(n, Packet::Closed);
        self.nodes[n].up.closed = true;
        // They die with the process that started them.
        self.kill_all(n);
    }

    pub(super) fn kill_all(&mut self, n: usize) {
        self.nodes[n].guard = None;
        for r in self.nodes[n].ranks.clone() {
            self.rank_does(r, Do::End(End::Signal(libc::SIGKILL)));
        }
    }
}
