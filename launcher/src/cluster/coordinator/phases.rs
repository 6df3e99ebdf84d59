//! From phase to phase.

use serde_json::json;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use tsm_job::config::duration::format;
use tsm_job::exit;

use super::{
    Action, Cause, Clock, FENCE, FORM, INSPECT, Inspection, LEAVE, LOOK, Launched, LostNode, Node,
    Phase, REPORT, State, nodes, record, send,
};
use crate::addresses;
use crate::cluster::message::{Beat, Join, NodeReport, Severity, Start, ToAgent};
use crate::cluster::policy::LeftOut;
use crate::cluster::topology::{Candidate, Member, NodeId, assign};
use crate::doctor::{self, ClockSample};
use crate::end::{End, signal_name};
use crate::hang::progress::{Event as Pace, Tracker};
use crate::hang::ras::Answer;
use crate::hang::report::{Inspection as Look, report};
use crate::manifest::environment::Change;
use crate::supervisor::count;

impl State {
    pub(super) fn join(
        &mut self,
        id: NodeId,
        local: bool,
        join: Join,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let host = join.host.clone();
        let mut refuse = |message: String| {
            actions.push(Action::Notice(format!("{host} was sent away: {message}")));
            let message = Some(message);
            actions.push(send(
                id,
                ToAgent::Exit {
                    code: exit::PREFLIGHT,
                    message,
                },
            ));
        };
        if join.version != env!("CARGO_PKG_VERSION") {
            let text = "is tsm-launch {theirs}, the coordinator is {ours}: install the same version on all nodes";
            let text = text
                .replace("{theirs}", &join.version)
                .replace("{ours}", env!("CARGO_PKG_VERSION"));
            return refuse(format!("{host} {text}"));
        }
        if join
            .job
            .as_ref()
            .is_some_and(|job| *job != self.settings.job.digest)
        {
            return refuse(format!(
                "{host} was started with another config or program than the first node: give the same command on every node"
            ));
        }
        if let Some(out) = self.left_out.iter().find(|l| l.host == host && l.must) {
            return refuse(format!("{host} is left out: {}", out.why));
        }
        let fields =
            json!({"node": id, "host": join.host, "pid": join.pid, "devices": join.devices});
        actions.push(record("join", fields));
        actions.push(send(
            id,
            ToAgent::Welcome {
                lease: self.settings.lease,
            },
        ));
        let clock = if local { Clock::SAME } else { Clock::default() };
        let node = Node {
            local,
            heard: now,
            clock,
            load: 0.0,
            mem_used_bytes: 0,
            pids: Vec::new(),
            join,
        };
        let here = self.nodes.len() + 1;
        self.nodes.insert(id, node);
        if self.settings.max_nodes > 1 && matches!(self.phase, Phase::Gather { .. }) {
            let (min, max) = (self.settings.min_nodes, self.settings.max_nodes);
            let of = if min == max {
                max.to_string()
            } else {
                format!("{min} to {max}")
            };
            actions.push(Action::Notice(format!(
                "{host} joined: {here} of {of} nodes"
            )));
        } else if self.settings.max_nodes > 1 {
            actions.push(Action::Notice(format!(
                "{host} joined: a spare until it is needed"
            )));
        }
        if let Phase::Leave { code, .. } = self.phase {
            actions.push(send(
                id,
                ToAgent::Exit {
                    code,
                    message: None,
                },
            ));
        }
    }

    pub(super) fn unfit(
        &mut self,
        id: NodeId,
        host: &str,
        code: i32,
        message: &str,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        actions.push(record(
            "unfit",
            json!({"host": host, "code": code, "message": message}),
        ));
        actions.push(send(
            id,
            ToAgent::Exit {
                code,
                message: None,
            },
        ));
        let exact = self.settings.min_nodes == self.settings.max_nodes && !self.settings.open;
        let starting =
            matches!(self.phase, Phase::Gather { .. } | Phase::Form { .. }) && self.generation == 0;
        if starting && (exact || self.settings.max_nodes == 1) {
            actions.push(Action::Notice(format!(
                "{host} cannot run the job: {message}"
            )));
            self.leave(code, None, now, actions);
        } else {
            actions.push(Action::Notice(format!(
                "{host} cannot take part: {message}"
            )));
        }
    }

    pub(super) fn lost_connection(
        &mut self,
        id: NodeId,
        how: &str,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(node) = self.nodes.remove(&id) else {
            return;
        };
        let host = node.join.host.clone();
        if matches!(self.phase, Phase::Leave { .. }) {
            return;
        }
        let how = match self.stalled {
            Some((at, time)) if now < at + self.settings.lease => {
                let time = time.as_secs_f64();
                format!("{how}, after the coordinator itself had not run for {time:.1} s")
            }
            _ => how.to_string(),
        };
        if self.member(id).is_some() {
            self.gone.insert(id, node.clone());
        }
        actions.push(record(
            "lost",
            json!({"node": id, "host": host, "how": how}),
        ));
        let member = self.member(id).cloned();
        let busy = matches!(self.phase, Phase::Run | Phase::Stop { .. });
        match member {
            Some(member) if busy && !self.reports.contains_key(&id) => {
                // It may have been heard long ago, but only its silence since then is sure.
                self.fence = self.fence.max(node.heard + self.settings.lease + FENCE);
                actions.push(Action::Notice(format!("{host} is lost: {how}")));
                let devices = node.join.devices.clone();
                self.lost.push(LostNode {
                    member,
                    host,
                    how,
                    heard: node.heard,
                    at: now,
                    devices,
                });
                let ranks = self.lost[self.lost.len() - 1].member.ranks.clone();
                ranks.for_each(|rank| self.watch.ended(rank, now));
                if self.cause.is_none() {
                    self.stop(Cause::NodeLost, libc::SIGTERM, now, actions);
                }
            }
            // Before its ranks were started, or after it was clean.
            Some(_) if matches!(self.phase, Phase::Form { .. }) => {
                actions.push(Action::Notice(format!("{host} is lost: {how}")));
                self.gather(now);
            }
            _ if self.settings.max_nodes > 1 => {
                actions.push(Action::Notice(format!("{host} left: {how}")));
            }
            _ => {}
        }
    }

    /// The coordinator was stopped itself, or its machine overloaded or suspended.
    pub(super) fn stalled(&mut self, time: Duration, now: Duration, actions: &mut Vec<Action>) {
        self.stalled = Some((now, time));
        actions.push(record("stalled", json!({"ms": time.as_millis() as u64})));
        let (time, lease) = (time.as_secs_f64(), format(self.settings.lease));
        if self.settings.max_nodes > 1 {
            actions.push(Action::Notice(format!(
                "warning: the coordinator did not run for {time:.1} s; nodes that hear nothing of it for {lease} end their ranks"
            )));
        }
    }

    /// A signal to the coordinator, or to the agent `place` (` on gpu-02`).
    pub(super) fn signal(
        &mut self,
        signal: i32,
        place: &str,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let name = signal_name(signal);
        actions.push(record(
            "signal",
            json!({"signal": name, "place": place.trim_start_matches(" on ")}),
        ));
        let ranks = count(self.world_size() as usize, "worker");
        match self.phase {
            Phase::Run if signal == libc::SIGUSR1 => {
                self.to_members(|generation| ToAgent::Signal { generation, signal }, actions)
            }
            Phase::Run if signal == libc::SIGUSR2 && self.settings.job.saves => {
                self.preempt(&format!("{name}{place}"), now, actions)
            }
            Phase::Run if signal == libc::SIGUSR2 => {
                self.to_members(|generation| ToAgent::Signal { generation, signal }, actions)
            }
            Phase::Stop { .. } if matches!(signal, libc::SIGUSR1 | libc::SIGUSR2) => {}
            Phase::Run => {
                let again = if signal == libc::SIGINT {
                    "; Ctrl-C again kills them"
                } else {
                    ""
                };
                actions.push(Action::Notice(format!(
                    "{name}{place}: stopping {ranks}{again}"
                )));
                self.interrupted = vec![place.into()];
                self.stop(Cause::Signal(signal), signal, now, actions);
            }
            // The same key, pressed once, reaches an agent with a terminal of its own as well.
            Phase::Stop { .. }
                if signal == libc::SIGINT
                    && self.cause == Some(Cause::Signal(signal))
                    && !self.interrupted.iter().any(|p| p == place) =>
            {
                self.interrupted.push(place.into());
                self.end_by(Cause::Signal(signal));
            }
            Phase::Stop { .. } if signal == libc::SIGINT => {
                actions.push(Action::Notice("killing the workers".into()));
                self.end_by(Cause::Signal(signal));
                self.to_members(|generation| ToAgent::Kill { generation }, actions);
            }
            // What was begun goes on, but nothing is started after it.
            Phase::Stop { .. } => self.end_by(Cause::Signal(signal)),
            Phase::Gather { .. } | Phase::Form { .. } | Phase::Pause { .. } => {
                let code = match signal {
                    libc::SIGUSR1 => return,
                    // Nothing runs, so nothing is lost: it asks to be started again.
                    libc::SIGUSR2 if self.settings.job.saves && self.generation > 0 => {
                        exit::REQUEUE
                    }
                    _ => exit::SIGNAL_BASE + signal,
                };
                actions.push(Action::Notice(format!(
                    "{name}{place}: leaving, no worker runs"
                )));
                self.leave(code, None, now, actions);
            }
            Phase::Leave { .. } | Phase::Finished { .. } => {}
        }
    }

    /// Keeps a stop that was begun for another reason from being followed by a new start.
    fn end_by(&mut self, cause: Cause) {
        let killed = cause == Cause::Signal(libc::SIGINT);
        if matches!(self.cause, Some(Cause::Grow | Cause::Hang { .. }))
            || (killed && self.cause == Some(Cause::Preempt))
        {
            self.cause = Some(cause);
        }
        self.last = true;
    }

    fn preempt(&mut self, why: &str, now: Duration, actions: &mut Vec<Action>) {
        let grace = format(self.settings.job.grace);
        actions.push(Action::Notice(format!(
            "{why}: the workers save and end, grace {grace}"
        )));
        // Whatever comes of it, the nodes are wanted back.
        self.last = true;
        self.stop(Cause::Preempt, libc::SIGUSR2, now, actions);
    }

    pub(super) fn expired(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let silent: Vec<NodeId> = self
            .nodes
            .iter()
            .filter(|(_, n)| !n.local && now >= n.heard + self.settings.lease)
            .map(|(id, _)| *id)
            .collect();
        for id in silent {
            actions.push(Action::Drop { node: id });
            let how = format!("silent for {}", format(self.settings.lease));
            self.lost_connection(id, &how, now, actions);
        }
        match self.phase {
            Phase::Run => {
                if self.settings.save_at.is_some_and(|at| now >= at) {
                    self.settings.save_at = None;
                    if self.settings.job.saves {
                        self.preempt("the allocation ends soon", now, actions);
                    }
                } else {
                    self.look_for_hangs(now, actions);
                }
            }
            Phase::Form { deadline, .. } if now >= deadline => {
                let late = self
                    .members
                    .iter()
                    .filter(|m| !self.has_formed(m.id))
                    .map(|m| self.host(m.id).to_string());
                let late = late.collect::<Vec<_>>().join(", ");
                let text = format!(
                    "no address of the first node was found within {}: no answer from {late}",
                    format(FORM)
                );
                self.give_up(text, now, actions);
            }
            Phase::Stop { deadline } if now >= deadline => {
                // An agent that lives but does not get its ranks to an end is cut off; its lease does the rest.
                let late: Vec<NodeId> = self
                    .members
                    .iter()
                    .map(|m| m.id)
                    .filter(|id| self.is_awaited(*id))
                    .collect();
                for id in late {
                    actions.push(Action::Drop { node: id });
                    self.lost_connection(
                        id,
                        "its agent did not end the ranks in time",
                        now,
                        actions,
                    );
                }
            }
            Phase::Leave { code, deadline } if now >= deadline => {
                self.phase = Phase::Finished { code }
            }
            _ => {}
        }
    }

    /// All that follows from the state alone.
    pub(super) fn advance(&mut self, now: Duration, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Gather { .. } => self.try_to_form(now, actions),
            Phase::Pause { until } if now >= until => {
                self.gather(now);
                let missing = self
                    .settings
                    .min_nodes
                    .saturating_sub(self.candidates(now).len() as u32);
                if missing > 0 && self.settings.open {
                    let (missing, join) = (nodes(missing as usize), format(self.settings.join));
                    actions.push(Action::Notice(format!(
                        "waiting up to {join} for {missing} to join"
                    )));
                }
                self.try_to_form(now, actions);
            }
            Phase::Form { .. } => self.try_to_start(now, actions),
            Phase::Run | Phase::Stop { .. }
                if self.members.iter().all(|m| !self.is_awaited(m.id)) =>
            {
                self.settle(now, actions)
            }
            Phase::Leave { code, .. } if self.nodes.values().all(|n| n.local) => {
                self.phase = Phase::Finished { code }
            }
            _ => {}
        }
    }

    /// Whether the generation cannot end without a word from this node.
    fn is_awaited(&self, id: NodeId) -> bool {
        self.nodes.contains_key(&id) && !self.reports.contains_key(&id)
    }

    pub(super) fn gather(&mut self, now: Duration) {
        self.members.clear();
        self.phase = Phase::Gather {
            deadline: now + self.settings.join,
            last_call: None,
        };
    }

    /// Nodes that can take ranks, in the order in which they joined; of those that are left out only as many as it
    /// takes to have enough.
    fn candidates(&self, now: Duration) -> Vec<Candidate> {
        let candidate = |(id, node): (&NodeId, &Node)| Candidate {
            id: *id,
            order: node.join.order,
            num_ranks: node.join.devices.len() as u32,
        };
        let out = |node: &Node| {
            let is =
                |l: &&LeftOut| l.host == node.join.host && l.until.is_none_or(|until| now < until);
            self.left_out.iter().find(is)
        };
        let (mut good, mut poor) = (Vec::new(), Vec::new());
        for (id, node) in &self.nodes {
            match out(node) {
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

    fn try_to_form(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Phase::Gather {
            deadline,
            last_call,
        } = &mut self.phase
        else {
            return;
        };
        let (deadline, called) = (*deadline, *last_call);
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
                let hosts: Vec<&str> = self.nodes.values().map(|n| n.join.host.as_str()).collect();
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
                let text = format!("{have}{hosts} {why}, {min} are needed");
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
        self.members = assign(&self.places, &candidates, max);
        if self.generation == 0 && !self.compare_nodes(now, actions) {
            return;
        }
        self.places = self.members.iter().map(|m| m.id).collect();
        (self.cause, self.inspection) = (None, None);
        self.interrupted.clear();
        self.reports.clear();
        self.lost.clear();
        self.gone.clear();
        self.attempt += 1;
        self.progress.clear();
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

    /// Tells what differs between the nodes; false when the job would fail of it.
    fn compare_nodes(&mut self, now: Duration, actions: &mut Vec<Action>) -> bool {
        let joined: Vec<&Node> = self
            .members
            .iter()
            .filter_map(|m| self.nodes.get(&m.id))
            .collect();
        if joined.len() < 2 {
            return true;
        }
        let joins: Vec<&Join> = joined.iter().map(|n| &n.join).collect();
        let looked: Vec<&Join> = joins
            .iter()
            .copied()
            .filter(|j| j.facts.clock_ms > 0)
            .collect();
        let clock = |join: &&Join| ClockSample {
            host: join.host.clone(),
            sent_ms: join.facts.clock_ms,
            received_ms: join.received_ms,
            rtt: Duration::ZERO,
        };
        let mut findings = doctor::across(&joins);
        findings.extend(doctor::clock_findings(
            &looked.iter().map(clock).collect::<Vec<_>>(),
        ));
        let of = |severity| findings.iter().filter(move |f| f.severity == severity);
        for finding in of(Severity::Warning) {
            actions.push(Action::Notice(format!(
                "warning: {}\n  hint: {}",
                finding.text, finding.hint
            )));
        }
        let Some(finding) = of(Severity::Error).next() else {
            return true;
        };
        let text = format!(
            "{}\n  hint: {}; --preflight off starts all the same",
            finding.text, finding.hint
        );
        self.give_up(text, now, actions);
        false
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
    fn first_addresses(&self) -> Vec<(IpAddr, String)> {
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

    fn has_formed(&self, id: NodeId) -> bool {
        let Phase::Form { ports, .. } = self.phase else {
            return true;
        };
        match self.members.first() {
            Some(first) if first.id == id => ports.is_some(),
            Some(first) => self.reach.contains_key(&(first.id, id)),
            None => true,
        }
    }

    /// Starts the ranks when port and addresses are known.
    fn try_to_start(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Phase::Form {
            ports: Some((master_port, _)),
            ..
        } = self.phase
        else {
            return;
        };
        if !self.members.iter().all(|m| self.has_formed(m.id)) {
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
        let job = &self.settings.job;
        let resume_from = if self.generation > 0 && job.saves {
            Some(job.run_dir.clone())
        } else {
            job.resume_from.clone()
        };
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
        let member = |m: &Member| self.nodes.get(&m.id).map(|n| (m.clone(), n.clone()));
        let launched = Launched {
            generation: self.generation,
            world_size: self.world_size(),
            members: self.members.iter().filter_map(member).collect(),
            resumed_from: resume_from.map(|path| path.to_string_lossy().into_owned()),
        };
        let (generation, world_size) = (self.generation, self.world_size());
        let hosts: Vec<&str> = self.members.iter().map(|m| self.host(m.id)).collect();
        let fields = json!({"generation": generation, "world_size": world_size, "hosts": hosts, "master": master_addr.to_string()});
        actions.push(record("start", fields));
        actions.push(Action::Started(Box::new(launched)));
    }

    /// The first node's address that all reach, and the interface to it on every node.
    fn choose_address(&self) -> Result<(IpAddr, Vec<String>), String> {
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

    pub(super) fn started(
        &mut self,
        id: NodeId,
        pids: &[i32],
        at: Duration,
        environment: Vec<Change>,
        actions: &mut Vec<Action>,
    ) {
        let Some(member) = self.member(id).cloned() else {
            return;
        };
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        node.pids = pids.to_vec();
        let (host, at) = (node.join.host.clone(), node.clock.map(at));
        for (rank, pid) in member.ranks.zip(pids) {
            let fields = json!({"generation": self.generation, "rank": rank, "pid": pid, "host": host,
                "at_ms": at.as_secs_f64() * 1e3});
            actions.push(record("spawn", fields));
        }
        if !environment.is_empty() {
            actions.push(Action::Environment(environment));
        }
    }

    pub(super) fn cannot_start(
        &mut self,
        id: NodeId,
        code: i32,
        message: &str,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if self.member(id).is_none() {
            return;
        }
        let host = self.host(id).to_string();
        let text = format!("the workers on {host} cannot be started: {message}");
        actions.push(Action::Notice(text.clone()));
        if let Phase::Form { .. } = self.phase {
            // Nowhere else were any started.
            return self.leave(code, Some(&text), now, actions);
        }
        self.reports.insert(
            id,
            NodeReport {
                ranks: Vec::new(),
                started_at: Duration::ZERO,
                oom_kills: 0,
                xids: Vec::new(),
                warnings: Vec::new(),
            },
        );
        // It would fail again, here and elsewhere.
        self.last = true;
        if self.cause.is_none() {
            self.refusal = Some((code, text));
            self.stop(Cause::Failure, libc::SIGTERM, now, actions);
        }
    }

    pub(super) fn failing(
        &mut self,
        id: NodeId,
        local_rank: u32,
        end: Option<End>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if self.cause.is_some() {
            return;
        }
        let Some(rank) = self.member(id).and_then(|m| rank_of(m, local_rank)) else {
            return;
        };
        let others = self.world_size().saturating_sub(1) as usize;
        if others > 0 {
            let end = end.map_or("says that it fails".into(), |end| {
                format!("ended with {end}")
            });
            let at = if self.members.len() > 1 {
                format!(" on {}", self.host(id))
            } else {
                String::new()
            };
            let (others, grace) = (count(others, "other"), format(self.settings.job.grace));
            actions.push(Action::Notice(format!(
                "rank {rank}{at} {end}: stopping {others}, grace {grace}"
            )));
        }
        self.stop(Cause::Failure, libc::SIGTERM, now, actions);
    }

    pub(super) fn clean(
        &mut self,
        id: NodeId,
        report: NodeReport,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(member) = self.member(id).cloned() else {
            return;
        };
        let host = self.host(id).to_string();
        for (number, (rank, _)) in member.ranks.clone().zip(&report.ranks) {
            let fields = json!({"generation": self.generation, "rank": number, "host": host,
                "end": rank.end, "order": rank.order});
            actions.push(record("exit", fields));
        }
        for warning in &report.warnings {
            let at = if self.members.len() > 1 {
                format!("{host}: ")
            } else {
                String::new()
            };
            actions.push(Action::Notice(format!("warning: {at}{warning}")));
        }
        let well = |end: End| end.is_success() || end == End::Code(exit::REQUEUE);
        let failed = report
            .ranks
            .iter()
            .any(|(rank, _)| !rank.end.is_some_and(well));
        self.reports.insert(id, report);
        // It was not said before where a rank that saved by itself was not followed by the others in time.
        if failed && self.cause.is_none() {
            self.stop(Cause::Failure, libc::SIGTERM, now, actions);
        }
        member.ranks.for_each(|rank| self.watch.ended(rank, now));
    }

    pub(super) fn beat(
        &mut self,
        id: NodeId,
        beat: Beat,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        if !node.local {
            node.clock.learn(beat.at, beat.rtt, now);
        }
        (node.load, node.mem_used_bytes) = (beat.load, beat.mem_used_bytes);
        if beat.generation != self.generation
            || !matches!(self.phase, Phase::Run | Phase::Stop { .. })
        {
            return;
        }
        let Some(member) = self.member(id).cloned() else {
            return;
        };
        for progress in beat.ranks {
            let Some(number) = rank_of(&member, progress.local_rank) else {
                continue;
            };
            let rank = self.progress.entry(number).or_default();
            rank.take(&progress, now);
            if let Some(step) = progress.step {
                let (low, high) = self.steps.unwrap_or((step, step));
                self.steps = Some((low.min(step), high.max(step)));
            }
            self.watch.feed(
                number,
                rank.step,
                &progress.work_ms,
                rank.section.as_deref(),
                now,
            );
            if progress.checkpoint.is_some() {
                self.checkpoint_step = progress.checkpoint;
                self.grow(now, actions);
            }
        }
        self.metrics.extend(beat.metrics);
    }

    /// Takes in a waiting node, now that little is lost by a new start.
    fn grow(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let spare = self
            .candidates(now)
            .into_iter()
            .find(|c| self.member(c.id).is_none());
        let Some(spare) = spare else { return };
        if self.cause.is_some()
            || self.members.len() as u32 >= self.settings.max_nodes
            || !self.settings.job.saves
        {
            return;
        }
        let host = self.host(spare.id);
        actions.push(Action::Notice(format!(
            "{host} is taken in: the workers save and start again"
        )));
        self.stop(Cause::Grow, libc::SIGUSR2, now, actions);
    }

    fn look_for_hangs(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if let Some(inspection) = &self.inspection {
            if now >= inspection.deadline || inspection.waiting.is_empty() {
                let inspection = self.inspection.take().unwrap_or_default();
                let report = report(&self.watch, &inspection.looks, inspection.ras.as_ref(), now);
                let late = if report.late.is_empty() {
                    inspection.late
                } else {
                    report.late
                };
                let (text, at) = (report.text, inspection.found);
                self.stop(Cause::Hang { late, text, at }, libc::SIGTERM, now, actions);
            }
            return;
        }
        if now < self.next_look {
            return;
        }
        self.next_look = now + LOOK;
        for event in self.watch.check(now) {
            let text = event.describe(|rank| self.name(rank));
            actions.push(record("pace", json!({"text": text})));
            actions.push(Action::Notice(text));
            if let Pace::Hang(hang) = event {
                let late = if hang.late.is_empty() {
                    (0..self.world_size()).collect()
                } else {
                    hang.late
                };
                self.inspect(late, now, actions);
            }
        }
    }

    /// `rank 5 on gpu-02`, or `rank 5` on one node.
    fn name(&self, rank: u32) -> String {
        let member = self.members.iter().find(|m| m.ranks.contains(&rank));
        match member {
            Some(member) if self.members.len() > 1 => {
                format!("rank {rank} on {}", self.host(member.id))
            }
            _ => format!("rank {rank}"),
        }
    }

    /// Asks all nodes what their ranks are doing: the late ones are understood beside the others.
    fn inspect(&mut self, late: Vec<u32>, now: Duration, actions: &mut Vec<Action>) {
        self.to_members(|generation| ToAgent::Inspect { generation }, actions);
        self.inspection = Some(Inspection {
            late,
            looks: Vec::new(),
            ras: None,
            waiting: self
                .members
                .iter()
                .map(|m| m.id)
                .filter(|id| self.is_awaited(*id))
                .collect(),
            found: now,
            deadline: now + INSPECT,
        });
    }

    pub(super) fn inspected(&mut self, id: NodeId, looks: Vec<Look>, ras: Option<Answer>) {
        if let Some(inspection) = &mut self.inspection {
            inspection.waiting.retain(|&node| node != id);
            inspection.looks.extend(looks);
            let knows = |answer: &Answer| answer.status.nccl.is_some();
            if inspection.ras.is_none() || ras.as_ref().is_some_and(knows) {
                inspection.ras = ras.or(inspection.ras.take());
            }
            if inspection.waiting.is_empty() {
                // The next look finds it due.
                inspection.deadline = Duration::ZERO;
            }
        }
    }

    /// Stops all ranks that still run.
    pub(super) fn stop(
        &mut self,
        cause: Cause,
        signal: i32,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        self.cause = Some(cause);
        self.inspection = None;
        let grace = self.settings.job.grace;
        self.phase = Phase::Stop {
            deadline: now + 2 * grace + REPORT,
        };
        self.to_members(
            |generation| ToAgent::Stop {
                generation,
                signal,
                grace,
            },
            actions,
        );
    }

    fn to_members(&self, message: impl Fn(u32) -> ToAgent, actions: &mut Vec<Action>) {
        for member in self.members.iter().filter(|m| self.is_awaited(m.id)) {
            actions.push(send(member.id, message(self.generation)));
        }
    }

    /// The job cannot be started, and why.
    fn give_up(&mut self, why: String, now: Duration, actions: &mut Vec<Action>) {
        actions.push(Action::Notice(why.clone()));
        self.leave(exit::PREFLIGHT, Some(&why), now, actions);
    }

    /// Tells everybody to go. `why` is for nodes where somebody has started the launcher by hand, and sees no report.
    pub(super) fn leave(
        &mut self,
        code: i32,
        why: Option<&str>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        for (id, node) in &self.nodes {
            let message = why.filter(|_| self.settings.open && !node.local);
            let message = message.map(str::to_owned);
            actions.push(send(*id, ToAgent::Exit { code, message }));
        }
        self.phase = Phase::Leave {
            code,
            deadline: now + LEAVE,
        };
        self.advance(now, actions);
    }

    pub(super) fn host(&self, id: NodeId) -> &str {
        self.known(id).map_or("a lost node", |n| &n.join.host)
    }
}

/// Number in the job of a node's rank; `None` for one that the node does not have.
fn rank_of(member: &Member, local_rank: u32) -> Option<u32> {
    let rank = member.ranks.start.checked_add(local_rank)?;
    member.ranks.contains(&rank).then_some(rank)
}
