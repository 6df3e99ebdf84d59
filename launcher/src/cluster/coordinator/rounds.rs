//! Measuring nodes before their ranks are started: who is asked what next, and what is known in the end. Pure.
//!
//! ```text
//! round 0: each node measures itself    round 1, 2, ..: groups measure the network, until all bad ones are found
//!                                        (open a place in a ring -> all of a group are open -> measure)
//! ```

use serde::Serialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tsm_job::config::duration::format;

use super::{Action, nodes, record, send};
use crate::cluster::message::{Finding, Round, Severity, ToAgent};
use crate::cluster::policy::LeftOut;
use crate::cluster::topology::NodeId;
use crate::doctor::preflight::{
    self, Measured, Outcome, OwnNode, Scale, Task, Verdict, conviction, judge, judge_memory, link,
    range,
};

/// An agent answers this long after a measurement must be over.
pub const MARGIN: Duration = Duration::from_secs(10);

/// A node that is measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    pub id: NodeId,
    pub host: String,
    /// Where the others of a group find it.
    pub address: Option<IpAddr>,
    /// Which interface that is on.
    pub interface: String,
    /// What it measured of itself, where that is known already.
    pub own: Option<OwnNode>,
}

/// What a node of the current round has answered.
#[derive(Clone, Debug, PartialEq)]
enum Answer {
    None,
    Open(u16),
    Done(Result<Measured, String>),
}

#[derive(Clone, Debug, PartialEq)]
struct Group {
    members: Vec<usize>,
    is_complete: bool,
}

/// Measurements that are under way.
#[derive(Clone, Debug, PartialEq)]
pub struct Measuring {
    scale: Scale,
    round: Round,
    places: Vec<Place>,
    numbers: BTreeMap<NodeId, usize>,
    /// By number of the node.
    answers: Vec<Answer>,
    /// Of this round; none in round 0.
    groups: Vec<Group>,
    done: Vec<Vec<Outcome>>,
    /// Nodes that have not measured themselves, or groups that are not complete.
    waiting: usize,
    began: Duration,
    /// Who has not answered by then has failed.
    pub deadline: Duration,
}

/// What is known in the end; it stands like this in manifest.json and events.jsonl.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    pub generation: u32,
    pub seconds: f64,
    pub nodes: Vec<NodeFigures>,
    /// Groups of nodes, by round.
    pub groups: Vec<Vec<GroupFigures>>,
    pub findings: Vec<Finding>,
    /// Nodes that get no ranks for it.
    pub left_out: Vec<LeftOut>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NodeFigures {
    pub host: String,
    pub memory_gbyte_s: Option<f64>,
    pub loopback_gbit_s: Option<f64>,
    pub all_reduce_gb_s: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupFigures {
    pub hosts: Vec<String>,
    pub gbit_s: Option<f64>,
    pub round_trip_us: Option<f64>,
    /// Why it failed, or computed wrong.
    pub failure: Option<String>,
}

/// What to make of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judgement {
    pub report: Report,
    /// Nodes that are well, with what they measured of themselves.
    pub good: Vec<(NodeId, OwnNode)>,
    /// Nodes that are not, and what is wrong with them.
    pub bad: Vec<(NodeId, Finding)>,
    /// What is wrong, and no single node is to blame.
    pub errors: Vec<Finding>,
}

impl Measuring {
    /// Asks the nodes that have not done it to measure themselves; then call [`Measuring::advance`].
    pub fn begin(
        scale: Scale,
        (generation, attempt): (u32, u32),
        places: Vec<Place>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> Measuring {
        let round = Round {
            generation,
            attempt,
            number: 0,
        };
        let ask = |place: &&Place| place.own.is_none();
        for place in places.iter().filter(ask) {
            let scale = scale.clone();
            actions.push(send(place.id, ToAgent::MeasureNode { round, scale }));
        }
        Measuring {
            round,
            waiting: places.iter().filter(ask).count(),
            numbers: places.iter().map(|p| p.id).zip(0..).collect(),
            answers: vec![Answer::None; places.len()],
            groups: Vec::new(),
            done: Vec::new(),
            began: now,
            deadline: now + scale.patience() + MARGIN,
            places,
            scale,
        }
    }

    /// Number of a node that was asked something in this round.
    fn number(&self, id: NodeId, round: Round) -> Option<usize> {
        let number = self.numbers.get(&id).filter(|_| round == self.round);
        number.copied()
    }

    pub fn node_measured(&mut self, id: NodeId, round: Round, own: OwnNode) {
        let Some(number) = self.number(id, round).filter(|_| round.number == 0) else {
            return;
        };
        if self.places[number].own.replace(own).is_none() {
            self.waiting -= 1;
        }
    }

    /// A place is open; the group begins when all its places are.
    pub fn ring_open(
        &mut self,
        id: NodeId,
        round: Round,
        port: Result<u16, String>,
        actions: &mut Vec<Action>,
    ) {
        let Some((number, group)) = self.awaited(id, round) else {
            return;
        };
        if self.answers[number] != Answer::None {
            return;
        }
        match port {
            Ok(port) => self.answers[number] = Answer::Open(port),
            // The others of its group wait in vain, and their places end with the round.
            Err(e) => return self.fail(group, number, format!("cannot listen: {e}")),
        }
        let members = self.groups[group].members.clone();
        let mut addresses = Vec::new();
        for &member in &members {
            let Answer::Open(port) = self.answers[member] else {
                return;
            };
            match self.places[member].address {
                Some(address) => addresses.push(SocketAddr::new(address, port)),
                None => {
                    let why = "it has no address of the kind that the first node has";
                    return self.fail(group, member, why.into());
                }
            }
        }
        for (me, &member) in members.iter().enumerate() {
            let (round, id) = (self.round, self.places[member].id);
            let task = Task::new(addresses.clone(), me, &self.scale);
            actions.push(send(id, ToAgent::Measure { round, task }));
        }
    }

    pub fn measured(&mut self, id: NodeId, round: Round, result: Result<Measured, String>) {
        let Some((number, group)) = self.awaited(id, round) else {
            return;
        };
        if let Answer::Open(_) = self.answers[number] {
            self.answers[number] = Answer::Done(result);
            let is_done = |&m: &usize| matches!(self.answers[m], Answer::Done(_));
            if self.groups[group].members.iter().all(is_done) {
                self.complete(group);
            }
        }
    }

    /// The node and its group, where that is not complete.
    fn awaited(&self, id: NodeId, round: Round) -> Option<(usize, usize)> {
        let number = self.number(id, round)?;
        let of = |g: &Group| g.members.contains(&number) && !g.is_complete;
        Some((number, self.groups.iter().position(of)?))
    }

    fn fail(&mut self, group: usize, number: usize, why: String) {
        let host = &self.places[number].host;
        self.answers[number] = Answer::Done(Err(format!("{host}: {why}")));
        self.complete(group);
    }

    fn complete(&mut self, group: usize) {
        self.groups[group].is_complete = true;
        self.waiting -= 1;
    }

    /// Goes on to the next round when this one is over; true when all is known.
    pub fn advance(&mut self, now: Duration, actions: &mut Vec<Action>) -> bool {
        loop {
            if self.waiting > 0 && now < self.deadline {
                return false;
            }
            self.conclude_round();
            let groups = preflight::next_round(self.places.len(), &self.done);
            if groups.is_empty() {
                return true;
            }
            self.round.number += 1;
            self.deadline = now + self.scale.patience() + MARGIN;
            self.waiting = groups.len();
            self.answers.fill(Answer::None);
            actions.push(self.record(&groups));
            for &member in groups.iter().flatten() {
                let (round, id) = (self.round, self.places[member].id);
                actions.push(send(id, ToAgent::OpenRing { round }));
            }
            let group = |members| Group {
                members,
                is_complete: false,
            };
            self.groups = groups.into_iter().map(group).collect();
        }
    }

    /// A round that begins.
    fn record(&self, groups: &[Vec<usize>]) -> Action {
        let hosts = |group: &Vec<usize>| -> Vec<&str> {
            let host = |&member: &usize| self.places[member].host.as_str();
            group.iter().map(host).collect()
        };
        let groups: Vec<Vec<&str>> = groups.iter().map(hosts).collect();
        let (generation, number) = (self.round.generation, self.round.number);
        let fields = json!({"generation": generation, "number": number, "groups": groups});
        record("preflight_round", fields)
    }

    fn conclude_round(&mut self) {
        let wait = format(self.scale.patience() + MARGIN);
        for place in self.places.iter_mut().filter(|p| p.own.is_none()) {
            place.own = Some(OwnNode::failed(format!(
                "it did not measure itself within {wait}"
            )));
        }
        let outcome = |group: Group| {
            let answer = |&member: &usize| match &self.answers[member] {
                Answer::Done(result) => Some(result.clone()),
                // It was never asked, since another one of the group could not be.
                _ if group.is_complete => None,
                _ => {
                    let host = &self.places[member].host;
                    Some(Err(format!("{host} did not answer within {wait}")))
                }
            };
            let answers = group.members.iter().filter_map(answer).collect();
            Outcome::new(group.members.clone(), answers)
        };
        let groups = std::mem::take(&mut self.groups);
        if !groups.is_empty() {
            self.done.push(groups.into_iter().map(outcome).collect());
        }
        self.waiting = 0;
    }

    /// When [`Measuring::advance`] says so.
    pub fn judge(&self, now: Duration) -> Judgement {
        let mut judgement = Judgement::default();
        let hosts: Vec<String> = self.places.iter().map(|p| p.host.clone()).collect();
        let network = judge(hosts.len(), &self.done);
        let mut findings = Vec::new();
        for (place, verdict) in self.places.iter().zip(&network) {
            let own = place.own.clone().unwrap_or_default();
            let said = own.findings.iter().map(|finding| Finding {
                text: format!("{}: {}", place.host, finding.text),
                ..finding.clone()
            });
            let said = said.chain(conviction(&place.host, verdict));
            let (errors, others): (Vec<_>, Vec<_>) =
                said.partition(|f| f.severity == Severity::Error);
            findings.extend(others.into_iter().filter(|f| f.severity > Severity::Ok));
            match errors.first() {
                Some(error) => judgement.bad.push((place.id, error.clone())),
                None if *verdict == Verdict::Good => judgement.good.push((place.id, own)),
                None => {}
            }
            findings.extend(errors);
        }
        let memory = |p: &Place| Some((p.host.clone(), p.own.as_ref()?.memory_gbyte_s?));
        findings.extend(judge_memory(
            &self.places.iter().filter_map(memory).collect::<Vec<_>>(),
        ));
        let between = preflight::findings(&hosts, &self.done);
        judgement.errors = between.clone();
        judgement.errors.retain(|f| f.severity == Severity::Error);
        findings.extend(between);
        // What NCCL reaches is not bound to one interface, nor to TCP.
        if self.scale.trainer.is_none() {
            let ends: Vec<link::End> = self.places.iter().map(link::End::from).collect();
            let told = |o: &&Outcome| !o.members.iter().any(|&m| network[m].is_conviction());
            findings.extend(link::findings(
                &ends,
                self.done.iter().flatten().filter(told),
            ));
        }
        findings.splice(0..0, self.figures());
        judgement.report = Report {
            generation: self.round.generation,
            seconds: now.saturating_sub(self.began).as_secs_f64(),
            nodes: self.places.iter().map(NodeFigures::from).collect(),
            groups: self.groups_of(&hosts),
            findings,
            left_out: Vec::new(),
        };
        judgement
    }

    /// What the nodes measured of themselves, in a line for each kind.
    fn figures(&self) -> Vec<Finding> {
        let all = |get: fn(&OwnNode) -> Option<f64>| -> Vec<f64> {
            let own = self.places.iter().filter_map(|p| p.own.as_ref());
            own.filter_map(get).collect()
        };
        let memory = all(|own| own.memory_gbyte_s);
        let loopback = all(|own| own.loopback_gbit_s);
        let mut found = Vec::new();
        if !memory.is_empty() {
            let (figures, on) = (range(memory.iter().copied()), nodes(memory.len()));
            let text = format!("memory copies {figures} GB/s on {on}");
            found.push(Finding::ok("memory", text));
        }
        if !loopback.is_empty() {
            let figures = range(loopback.into_iter());
            let text = format!("loopback {figures} Gbit/s");
            found.push(Finding::ok("network", text));
        }
        let together = all(|own| own.all_reduce_gb_s);
        if !together.is_empty() {
            let (figures, on) = (range(together.iter().copied()), nodes(together.len()));
            let text = format!("all-reduce within a node {figures} GB/s bus bandwidth on {on}");
            found.push(Finding::ok("all-reduce", text));
        }
        found
    }

    fn groups_of(&self, hosts: &[String]) -> Vec<Vec<GroupFigures>> {
        let figures = |outcome: &Outcome| {
            let measured = outcome.result.as_ref().ok();
            GroupFigures {
                hosts: outcome.members.iter().map(|&m| hosts[m].clone()).collect(),
                gbit_s: measured.map(|m| m.gbit_s),
                round_trip_us: measured
                    .filter(|m| !m.round_trip.is_zero())
                    .map(|m| m.round_trip.as_secs_f64() * 1e6),
                failure: outcome.failure().map(String::from),
            }
        };
        let round = |outcomes: &Vec<Outcome>| outcomes.iter().map(figures).collect();
        self.done.iter().map(round).collect()
    }
}

impl From<&Place> for link::End {
    fn from(place: &Place) -> link::End {
        let own = place.own.as_ref();
        let stated = own.and_then(|o| o.links.get(&place.interface));
        link::End {
            host: place.host.clone(),
            interface: place.interface.clone(),
            stated_gbit_s: stated.map(|mbit_s| f64::from(*mbit_s) / 1e3),
            loopback_gbit_s: own.and_then(|o| o.loopback_gbit_s),
        }
    }
}

impl From<&Place> for NodeFigures {
    fn from(place: &Place) -> NodeFigures {
        let own = place.own.as_ref();
        NodeFigures {
            host: place.host.clone(),
            memory_gbyte_s: own.and_then(|o| o.memory_gbyte_s),
            loopback_gbit_s: own.and_then(|o| o.loopback_gbit_s),
            all_reduce_gb_s: own.and_then(|o| o.all_reduce_gb_s),
        }
    }
}
