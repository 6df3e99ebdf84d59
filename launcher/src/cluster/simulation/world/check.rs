//! What must hold in the end.

use super::*;
use crate::cluster::simulation::agent::Network;

impl World {
    /// Nobody is convicted for nothing: by a bad network, or since it did not answer.
    pub(super) fn judged(&mut self, report: &Report) {
        self.saw("measured");
        for out in &report.left_out {
            self.saw("left out");
            self.convicted.push(out.host.clone());
            let mut of_host = (0..self.nodes.len()).filter(|&n| self.nodes[n].host == out.host);
            let is_bad = of_host.any(|n| self.network(n) != Network::Good || self.nodes[n].mute);
            if !is_bad && self.plan.faults.is_empty() {
                self.fault(format!("{} is convicted: {}", out.host, out.why));
            }
        }
    }

    fn network(&self, n: usize) -> Network {
        let networks = self.plan.measure.as_deref().unwrap_or_default();
        networks.get(n).copied().unwrap_or(Network::Good)
    }

    pub(super) fn check_start(&mut self, launched: &Launched) {
        let bad = |host: &str| self.convicted.iter().any(|c| c == host);
        let hosts = launched.members.iter().map(|(_, node)| &node.join.host);
        if let Some(host) = hosts.into_iter().find(|host| bad(host)) {
            self.fault(format!("{host} has ranks though it was found bad"));
        }
        // A pair of nodes, of which one is bad, fails, and a node that fails gets no ranks.
        let members = launched.members.iter();
        let dead = |id: u64| self.network(id as usize - 1) == Network::Dead;
        if members.len() > 1 && members.into_iter().any(|(m, _)| dead(m.id)) {
            self.fault("ranks are started on a node whose network is dead".into());
        }
    }

    pub(super) fn check_end(&mut self) {
        let agents = (0..self.nodes.len()).find(|&n| self.nodes[n].agent.is_some());
        if let Some(n) = agents {
            self.fault(format!("the agent of node {n} does not end"));
        }
        if let Some(rank) = self.ranks.iter().find(|r| r.alive) {
            let text = format!("rank {} on node {} does not end", rank.number, rank.node);
            self.fault(text);
        }
        let Some(code) = self.code else {
            if self.coordinator_up {
                let text = format!("the coordinator does not finish: {:?}", self.state.phase);
                self.fault(text);
            }
            return;
        };
        self.check_code(code);
        self.check_restarts();
        self.check_blame(code);
    }

    pub(super) fn check_code(&mut self, code: i32) {
        let signals = [1, 2, 15, libc::SIGUSR2].map(|s| exit::SIGNAL_BASE + s);
        let of_rank = |e: &Ending| e.ends.iter().flatten().any(|end| end.exit_code() == code);
        let known = [
            exit::OK,
            exit::PREFLIGHT,
            exit::REQUEUE,
            exit::PEER,
            exit::DO_NOT_REQUEUE,
        ];
        let announced = self.plan.announces(code);
        if !known.contains(&code)
            && !signals.contains(&code)
            && !announced
            && !self.endings.iter().any(of_rank)
        {
            self.fault(format!(
                "exit code {code} is none of a rank, and not documented"
            ));
        }
        let is_well = self.plan.faults.is_empty() && !self.plan.has_bad_network();
        if is_well && code != exit::OK {
            self.fault(format!("nothing went wrong, and the exit code is {code}"));
        }
        let succeeded = self
            .endings
            .last()
            .is_some_and(|e| e.ends.iter().all(|end| *end == Some(End::Code(0))));
        if code == exit::OK && !succeeded {
            self.fault("exit code 0 without success".into());
        }
    }

    pub(super) fn check_restarts(&mut self) {
        let (mut left, mut newest) = (self.plan.restarts, 0);
        for ending in self.endings.clone() {
            if ending.checkpoint_step.is_some_and(|step| step > newest) {
                newest = ending.checkpoint_step.unwrap_or(0);
                left = self.plan.restarts;
            }
            if ending.again && ending.outcome == "failed" {
                match left.checked_sub(1) {
                    Some(less) => left = less,
                    None => return self.fault("more restarts than were allowed".into()),
                }
            }
        }
        if self.starts as usize != self.endings.len() {
            let text = format!("{} starts, {} ends", self.starts, self.endings.len());
            self.fault(text);
        }
    }

    /// Nobody is blamed where a rank saved by itself, and nothing is started after it. Not where a node was being taken in
    /// at that moment: all saved for that.
    fn check_saved(&mut self, code: i32) {
        let grown = self.endings.iter().any(|e| e.outcome == "grown");
        let blamed = self.endings.iter().any(|e| e.failure.is_some());
        let again = self.endings.last().is_some_and(|e| e.again);
        if !grown && (blamed || again || code != exit::REQUEUE) {
            let text = format!("a rank saved by itself: code {code}, blamed {blamed}");
            self.fault(text);
        }
        self.saw("saved by itself");
    }

    /// Where only one thing went wrong, that is the first failure.
    pub(super) fn check_blame(&mut self, code: i32) {
        let alone = self.plan.is_single() && !self.plan.has_bad_network();
        let Some(expected) = self.expected.clone().filter(|_| alone) else {
            return;
        };
        if expected == Expected::Saved {
            return self.check_saved(code);
        }
        let failure = self.endings.iter().find_map(|e| e.failure.as_ref());
        let failure = failure.map(|f| (f.rank, f.host.clone(), f.late.clone()));
        let right = match (&expected, &failure) {
            (Expected::Rank(number, _), Some((rank, _, late))) => {
                *rank == Some(*number as usize) && late.is_empty()
            }
            (Expected::Node(host), Some((rank, named, _))) => rank.is_none() && named == host,
            (Expected::Late(number), Some((_, _, late))) => *late == [*number as usize],
            // The work was done before anybody had to notice.
            (Expected::Node(_) | Expected::Late(_), None) if code == exit::OK => return,
            (Expected::Saved, _) | (_, None) => false,
        };
        if !right {
            self.fault(format!(
                "{expected:?} was the first failure, {failure:?} is named"
            ));
        }
        let own = match expected {
            Expected::Rank(_, code) => code,
            Expected::Node(_) | Expected::Late(_) | Expected::Saved => exit::PEER,
        };
        if self.plan.restarts == 0 && code != own {
            self.fault(format!("the exit code is {code}, not {own}"));
        }
    }
}
