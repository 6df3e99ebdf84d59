//! Which nodes a generation gets, and how they find each other: to the start of its ranks.

use serde_json::json;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use tsm_job::config::duration::format;

use super::{Action, FORM, LOOK, Launched, Node, Phase, State, nodes, record, send};
use crate::addresses;
use crate::cluster::message::{Finding, Start, ToAgent};
use crate::cluster::topology::{Candidate, Member, NodeId, assign};
use crate::hang::progress::Tracker;
use crate::text::ranks_named;

impl State {
    /// Nodes that can take ranks, in the order in which they joined; of those that are left out only as many as it
    /// takes to have enough.
    pub(super) fn candidates(&self, now: Duration) -> Vec<Candidate> {
        let candidate = |(id, node): (&NodeId, &Node)| Candidate {
            id: *id,
            order: node.join.order,
            num_ranks: node.join.devices.len() as u32,
        };
        let (mut good, mut poor) = (Vec::new(), Vec::new());
        for (id, node) in &self.nodes {
            match self.is_out(node, now) {
                None => good.push((id, node)),
                Some(left) if !left.must => poor.push((id, node)),
                Some(_) => {}
            }
        }
        let missing = (self.settings.min_nodes as usize).saturating_sub(good.len());
        good.extend(poor.into_iter().take(missing));
        good.sort_by_key(|(id, _)| **id);
        good.into_iter().map(candidate).collect()
    }

    pub(super) fn try_to_form(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Phase::Gather {
            deadline,
            last_call,
        } = &mut self.phase
        else {
            return;
        };
        let (deadline, called) = (*deadline, *last_call);
        // Asked at every word of every node, and while thousands join the answer is no.
        let too_few = self.nodes.len() < self.settings.min_nodes as usize;
        if too_few && now < deadline && (self.settings.open || self.generation == 0) {
            *last_call = None;
            return;
        }
        let candidates = self.candidates(now);
        let here = candidates.len() as u32;
        let (min, max) = (self.settings.min_nodes, self.settings.max_nodes);
        // Whoever has survived does not wait for others: they are taken in later.
        let enough = if self.generation > 0 { min } else { max };
        if here >= min && called.is_none() {
            let call = if here >= enough {
                now
            } else {
                (now + self.settings.last_call).min(deadline)
            };
            self.phase = Phase::Gather {
                deadline,
                last_call: Some(call),
            };
        }
        let Phase::Gather { last_call, .. } = self.phase else {
            return;
        };
        if here < min {
            if now >= deadline || (!self.settings.open && self.generation > 0) {
                let hosts: Vec<&str> = candidates.iter().map(|c| self.host(c.id)).collect();
                let hosts = if hosts.is_empty() {
                    String::new()
                } else {
                    format!(" ({})", hosts.join(", "))
                };
                let have = nodes(here as usize);
                let why = match (self.generation, here) {
                    (0, _) => format!("joined within {}", format(self.settings.join)),
                    (_, 1) => "is left".into(),
                    _ => "are left".into(),
                };
                let mut text = format!("{have}{hosts} {why}, {min} are needed");
                if let Some(who) = self.name_missing() {
                    let hint = "see whether tsm-launch starts there when you log in by hand, or give a longer --join-timeout";
                    text = format!("{text}; {who}\n  hint: {hint}");
                }
                self.give_up(text, now, actions);
            } else {
                self.phase = Phase::Gather {
                    deadline,
                    last_call: None,
                };
            }
            return;
        }
        let ready = here >= enough || last_call.is_some_and(|call| now >= call);
        if !ready || now < self.fence {
            return;
        }
        let max = if self.is_wide { u32::MAX } else { max };
        self.members = assign(&self.places, &candidates, max);
        if self.compared.is_empty() && !self.compare_nodes(now, actions) {
            return;
        }
        let join = |m: &Member| self.nodes.get(&m.id).map(|n| n.join.clone());
        self.compared = self.members.iter().filter_map(join).collect();
        self.places = self.members.iter().map(|m| m.id).collect();
        (self.cause, self.inspection) = (None, None);
        self.passing = Default::default();
        self.interrupted.clear();
        self.reports.clear();
        self.parts.clear();
        self.lost.clear();
        self.gone.clear();
        self.attempt += 1;
        self.progress.clear();
        self.goes_on_from = self.goes_on_from.max(self.checkpoint_step);
        (self.checkpoint_step, self.steps) = (None, None);
        // Another node answers first: it may be heard for the last time before it learns of its lease, which then
        // ends later than anybody here would think.
        let here = |m: &Member| self.nodes.get(&m.id).is_some_and(|n| n.local);
        let alone = self.members.len() == 1 && self.members.iter().all(here);
        let ports = alone.then_some((0, 0));
        self.phase = Phase::Form {
            deadline: now + FORM,
            ports,
        };
        if ports.is_none() {
            let (generation, attempt) = (self.generation, self.attempt);
            let reserve = ToAgent::Reserve {
                generation,
                attempt,
            };
            actions.push(send(self.members[0].id, reserve));
        }
        self.try_to_start(now, actions);
    }

    /// Says it, unless it was said before.
    pub(super) fn warn(&mut self, finding: &Finding, actions: &mut Vec<Action>) {
        if self.warned.insert(finding.text.clone()) {
            actions.push(Action::Notice(format!("warning: {finding}")));
        }
    }

    /// How many ranks there are is known only when the nodes have come.
    fn look_for_shown_ranks(&mut self, actions: &mut Vec<Action>) {
        let world_size = self.world_size();
        let shown = self.settings.job.show.iter().flatten();
        let missing: Vec<usize> = shown
            .filter(|&&rank| rank >= world_size)
            .map(|&rank| rank as usize)
            .collect();
        if !missing.is_empty() {
            let missing = ranks_named(&missing);
            let text = format!("--show-ranks names {missing}, this start has {world_size}");
            if self.warned.insert(text.clone()) {
                actions.push(Action::Notice(format!("warning: {text}")));
            }
        }
    }

    pub(super) fn reserved(
        &mut self,
        id: NodeId,
        master_port: u16,
        probe_port: u16,
        actions: &mut Vec<Action>,
    ) {
        let Phase::Form { ports, .. } = &mut self.phase else {
            return;
        };
        if self.members.first().is_none_or(|m| m.id != id) || ports.is_some() {
            return;
        }
        *ports = Some((master_port, probe_port));
        let (generation, attempt) = (self.generation, self.attempt);
        let addresses: Vec<IpAddr> = self
            .first_addresses()
            .into_iter()
            .map(|(address, _)| address)
            .collect();
        for member in &self.members[1..] {
            if !self.reach.contains_key(&(id, member.id)) {
                let (addresses, port) = (addresses.clone(), probe_port);
                actions.push(send(
                    member.id,
                    ToAgent::Probe {
                        generation,
                        attempt,
                        addresses,
                        port,
                    },
                ));
            }
        }
    }

    /// Where the first node may be reached. Loopback comes last: the probe tells whether it is the same machine.
    pub(super) fn first_addresses(&self) -> Vec<(IpAddr, String)> {
        let first = self.members.first().and_then(|m| self.nodes.get(&m.id));
        let own = first
            .into_iter()
            .flat_map(|n| n.join.addresses.iter().cloned());
        own.chain([(IpAddr::V4(Ipv4Addr::LOCALHOST), "lo".into())])
            .collect()
    }

    pub(super) fn reached(&mut self, id: NodeId, by: Vec<(IpAddr, String)>) {
        if let Some(first) = self.members.first() {
            self.reach.insert((first.id, id), by);
        }
    }

    pub(super) fn has_formed(&self, id: NodeId) -> bool {
        let Phase::Form { ports, .. } = self.phase else {
            return true;
        };
        match self.members.first() {
            Some(first) if first.id == id => ports.is_some(),
            Some(first) => self.reach.contains_key(&(first.id, id)),
            None => true,
        }
    }

    /// Measures the nodes, or starts the ranks, when port and addresses are known.
    pub(super) fn try_to_start(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Phase::Form {
            ports: Some((master_port, _)),
            ..
        } = self.phase
        else {
            return;
        };
        let enough = self.reach.len() + 1 >= self.members.len();
        if !enough || !self.members.iter().all(|m| self.has_formed(m.id)) {
            return;
        }
        let (master_addr, interfaces) = match self.choose_address() {
            Ok(chosen) => chosen,
            Err(text) => {
                // What was found may be better the next time.
                self.reach.clear();
                return self.give_up(text, now, actions);
            }
        };
        if self.must_measure() || self.is_wide {
            let master = (master_addr, master_port);
            return self.measure(master, &interfaces, now, actions);
        }
        self.start(master_port, now, actions);
    }

    /// Starts the ranks.
    pub(super) fn start(&mut self, master_port: u16, now: Duration, actions: &mut Vec<Action>) {
        let (master_addr, interfaces) = match self.choose_address() {
            Ok(chosen) => chosen,
            Err(text) => return self.give_up(text, now, actions),
        };
        self.was_wide = false;
        let job = &self.settings.job;
        let resume_from = if self.generation > 0 && job.saves {
            Some(job.run_dir.clone())
        } else {
            job.resume_from.clone()
        };
        let is_in_place = resume_from.as_ref() == Some(&job.run_dir);
        let start_from = job.start_from.clone().filter(|_| is_in_place);
        let common = Start {
            generation: self.generation,
            run_id: job.run_id.clone(),
            run_dir: job.run_dir.clone(),
            config: job.config.clone(),
            command: job.command.clone(),
            directory: job.directory.clone(),
            base_env: job.base_env.clone(),
            env: job.env.clone(),
            node_rank: 0,
            num_nodes: self.members.len() as u32,
            first_rank: 0,
            num_ranks: 0,
            world_size: self.world_size(),
            master_addr,
            master_port,
            interface: None,
            restart_count: self.generation,
            max_restarts: self.settings.policy.max_restarts,
            resume_from: resume_from.clone(),
            start_from,
            grace: job.grace,
            show: job.show.clone(),
            affinity: job.affinity,
            saves: job.saves,
            shielded: job.shielded,
        };
        for (node_rank, (member, interface)) in self.members.iter().zip(interfaces).enumerate() {
            let start = Start {
                node_rank: node_rank as u32,
                first_rank: member.ranks.start,
                num_ranks: member.ranks.len() as u32,
                interface: Some(interface),
                ..common.clone()
            };
            actions.push(send(member.id, ToAgent::Start(Box::new(start))));
        }
        self.phase = Phase::Run;
        self.started_at = now;
        self.watch = Tracker::new(self.world_size(), self.settings.hang.clone(), now);
        self.next_look = now + LOOK;
        for node in self.nodes.values_mut() {
            node.pids.clear();
        }
        let told = resume_from.filter(|_| !self.settings.job.saves);
        let member = |m: &Member| self.nodes.get(&m.id).map(|n| (m.clone(), n.clone()));
        let launched = Launched {
            generation: self.generation,
            world_size: self.world_size(),
            members: self.members.iter().filter_map(member).collect(),
            resumed_from: told.map(|path| path.to_string_lossy().into_owned()),
        };
        let (generation, world_size) = (self.generation, self.world_size());
        let hosts: Vec<&str> = self.members.iter().map(|m| self.host(m.id)).collect();
        let fields = json!({"generation": generation, "world_size": world_size, "hosts": hosts, "master": master_addr.to_string()});
        actions.push(record("start", fields));
        self.tell_places(actions);
        self.look_for_shown_ranks(actions);
        actions.push(Action::Started(Box::new(launched)));
    }

    /// The first node's address that all reach, and the interface to it on every node.
    pub(super) fn choose_address(&self) -> Result<(IpAddr, Vec<String>), String> {
        let Some(first) = self.members.first() else {
            return Err("no node".into());
        };
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        if self.members.len() == 1 {
            return Ok((loopback, vec!["lo".into()]));
        }
        let others: Vec<(String, Vec<(IpAddr, String)>)> = self.members[1..]
            .iter()
            .map(|m| {
                (
                    self.host(m.id).to_string(),
                    self.reach[&(first.id, m.id)].clone(),
                )
            })
            .collect();
        let choice = addresses::choose(self.host(first.id), &self.first_addresses(), &others)?;
        Ok((choice.address, choice.interfaces))
    }
}
