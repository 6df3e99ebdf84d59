//! From phase to phase.

use serde_json::json;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tsm_job::config::duration::format;
use tsm_job::exit;

use super::left_out::words;
use super::running::refusal;
use super::{
    Action, Cause, Clock, FENCE, FORM, LEAVE, LostNode, MOMENT, NOT_RUNNING, Node, Phase, REPORT,
    Reason, State, record, send,
};
use crate::cluster::message::{Finding, Join, Severity, ToAgent};
use crate::cluster::topology::NodeId;
use crate::end::signal_name;
use crate::text::count;

/// Of one node.
const MAX_WORKERS: usize = 4096;

/// A name that can be shown, whoever gave it.
fn tidy(host: &str) -> String {
    host.chars().filter(|c| !c.is_control()).take(255).collect()
}

impl State {
    pub(super) fn join(
        &mut self,
        id: NodeId,
        local: bool,
        mut join: Join,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let host = tidy(&join.host);
        join.host.clone_from(&host);
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
        if !(1..=MAX_WORKERS).contains(&join.devices.len()) {
            let workers = count(join.devices.len(), "worker");
            return refuse(format!(
                "{host} has room for {workers}: it has to be 1 to {MAX_WORKERS}"
            ));
        }
        let agent = self.free_agent_number(&host);
        let out = self.why_out(&host, agent, now).cloned();
        if let Some(out) = out.as_ref().filter(|out| out.must) {
            return refuse(format!("{host} is left out: {}", out.why));
        }
        let found = join.facts.findings.iter();
        let found: Vec<&Finding> = found.filter(|f| f.severity > Severity::Ok).collect();
        if let Some(error) = found.iter().find(|f| f.severity == Severity::Error) {
            let why = error.to_string() + "; --preflight off starts all the same";
            let message = Some(format!("{host} cannot run the job: {why}"));
            let code = exit::PREFLIGHT;
            actions.push(send(id, ToAgent::Exit { code, message }));
            return self.unfit(id, &host, code, &why, now, actions);
        }
        if !self.fits(id, &join, agent, now, actions) {
            return;
        }
        let fields = json!({"node": id, "host": join.host, "pid": join.pid, "devices": join.devices, "found": found});
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
            agent,
            load: 0.0,
            mem_used_bytes: 0,
            pids: Vec::new(),
            join,
        };
        self.waiting.arrived(&host);
        let here = self.nodes.len() + 1;
        self.nodes.insert(id, node);
        if !local {
            self.next_lease.get_or_insert(now + self.settings.lease);
        }
        if let Some(out) = out {
            let text = words(&out, now);
            actions.push(Action::Notice(format!("{host} joined, and {text}")));
            if self.settings.open && !local {
                let text = format!("this node {text}");
                actions.push(send(id, ToAgent::Tell { text }));
            }
        } else if self.settings.max_nodes > 1 && matches!(self.phase, Phase::Gather { .. }) {
            self.tell_joined(id, "", actions);
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
            self.tell_joined(id, " as a spare, until it is needed", actions);
            actions.push(Action::Notice(format!(
                "{host} joined: a spare until it is needed"
            )));
            self.try_next(now, actions);
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

    /// The first that no connected agent of `host` has.
    fn free_agent_number(&self, host: &str) -> u32 {
        let of_host = self.nodes.values().filter(|n| n.join.host == host);
        let taken: Vec<u32> = of_host.map(|n| n.agent).collect();
        (0..).find(|n| !taken.contains(n)).unwrap_or(0)
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
        let (code, host) = (refusal(code), tidy(host));
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
        let starting = self.generation == 0
            && matches!(
                self.phase,
                Phase::Gather { .. } | Phase::Form { .. } | Phase::Measure { .. }
            );
        if starting && (exact || self.settings.max_nodes == 1) {
            let text = format!("{host} cannot run the job: {message}");
            actions.push(Action::Notice(text.clone()));
            self.leave(code, Some(Reason::Text(text)), None, now, actions);
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
        self.trying.forget(id);
        let host = node.join.host.clone();
        if matches!(self.phase, Phase::Leave { .. }) {
            return;
        }
        if self.member(id).is_some() {
            self.gone.insert(id, node.clone());
        }
        let how = match &self.stalled {
            Some((at, of)) if now < *at + self.settings.lease => format!("{how},{of}"),
            _ => self.why_lost(&host, how, now),
        };
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
            Some(_) if matches!(self.phase, Phase::Form { .. } | Phase::Measure { .. }) => {
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
    pub(super) fn stalled(
        &mut self,
        host: String,
        time: Duration,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let secs = time.as_secs_f64();
        let of = format!("{NOT_RUNNING}{host}, had not run for {secs:.1} s");
        self.stalled = Some((now, of));
        actions.push(record("stalled", json!({"ms": time.as_millis() as u64})));
        let lease = format(self.settings.lease);
        if self.settings.max_nodes > 1 {
            actions.push(Action::Notice(format!(
                "warning: the coordinator did not run for {secs:.1} s; nodes that hear nothing of it for {lease} end their ranks"
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
        let ranks = count(self.world_size(), "worker");
        self.asked(Reason::Signal {
            signal,
            place: place.into(),
        });
        match self.phase {
            Phase::Run if signal == libc::SIGUSR1 => self.pass_on(signal, now, actions),
            Phase::Run if signal == libc::SIGUSR2 && self.settings.job.saves => {
                let place = place.into();
                self.preempt(Reason::Signal { signal, place }, now, actions)
            }
            Phase::Run if signal == libc::SIGUSR2 => self.pass_on(signal, now, actions),
            Phase::Stop { .. } if matches!(signal, libc::SIGUSR1 | libc::SIGUSR2) => {
                self.passing.heard(signal, now);
            }
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
                // Workers that save when they are asked to end seldom know of a terminal that is closed or of Ctrl-\,
                // which would also dump their memory.
                let told = match signal {
                    libc::SIGHUP | libc::SIGQUIT => libc::SIGTERM,
                    signal => signal,
                };
                self.stop(Cause::Signal(signal), told, now, actions);
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
            Phase::Gather { .. }
            | Phase::Form { .. }
            | Phase::Measure { .. }
            | Phase::Pause { .. } => {
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
                let reason = self.asked.clone();
                self.leave(code, reason, None, now, actions);
            }
            // Somebody who waits for the launcher knows better whether it is worth it.
            Phase::Leave { .. } if signal == libc::SIGINT && place.is_empty() => {
                self.fence = self.fence.min(now);
            }
            Phase::Leave { .. } | Phase::Finished { .. } => {}
        }
    }

    /// Keeps a stop that was begun for another reason from being followed by a new start.
    pub(super) fn end_by(&mut self, cause: Cause) {
        let killed = cause == Cause::Signal(libc::SIGINT);
        if matches!(self.cause, Some(Cause::Grow | Cause::Hang { .. }))
            || (killed && matches!(self.cause, Some(Cause::Preempt | Cause::Saved)))
        {
            self.cause = Some(cause);
        }
        self.last = true;
    }

    pub(super) fn preempt(&mut self, why: Reason, now: Duration, actions: &mut Vec<Action>) {
        let grace = format(self.settings.job.grace);
        actions.push(Action::Notice(format!(
            "{why}: the workers save and end, grace {grace}"
        )));
        self.asked(why);
        // Whatever comes of it, the nodes are wanted back.
        self.last = true;
        self.stop(Cause::Preempt, libc::SIGUSR2, now, actions);
    }

    pub(super) fn expired(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.next_lease.is_some_and(|at| now >= at) {
            self.look_for_silence(now, actions);
        }
        match self.phase {
            Phase::Run => {
                if self.passing.deadline.is_some_and(|at| now >= at) {
                    self.end_saving(now, actions);
                } else if self.settings.save_at.is_some_and(|at| now >= at) {
                    self.settings.save_at = None;
                    if self.settings.job.saves {
                        self.preempt("the allocation ends soon".into(), now, actions);
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
            Phase::Gather { .. } if self.waiting.tell_at().is_some_and(|at| now >= at) => {
                self.tell_waiting(now, actions);
            }
            _ => {}
        }
    }

    /// Gives up the nodes whose lease has run out.
    pub(super) fn look_for_silence(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let lease = self.settings.lease;
        let remote = self.nodes.iter().filter(|(_, n)| !n.local);
        let silent: Vec<NodeId> = remote
            .filter(|(_, n)| now >= n.heard + lease)
            .map(|(id, _)| *id)
            .collect();
        for id in silent {
            actions.push(Action::Drop { node: id });
            let how = format!("silent for {}", format(lease));
            self.lost_connection(id, &how, now, actions);
        }
        let left = self.nodes.values().filter(|n| !n.local);
        self.next_lease = left.map(|n| n.heard + lease).min();
    }

    /// All that follows from the state alone.
    pub(super) fn advance(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if matches!(
            self.phase,
            Phase::Run | Phase::Stop { .. } | Phase::Pause { .. }
        ) {
            self.go_on_trying(now, actions);
        }
        match self.phase {
            Phase::Gather { .. } => self.try_to_form(now, actions),
            Phase::Pause { until } if now >= until => {
                self.gather(now);
                if self.settings.open {
                    self.tell_waiting(now, actions);
                }
                self.try_to_form(now, actions);
            }
            Phase::Form { .. } => self.try_to_start(now, actions),
            Phase::Measure { .. } => self.go_on_measuring(now, actions),
            Phase::Run | Phase::Stop { .. }
                if self.members.iter().all(|m| !self.is_awaited(m.id)) =>
            {
                self.settle(now, actions)
            }
            Phase::Leave { code, deadline } if now >= self.left(deadline) => {
                self.phase = Phase::Finished { code }
            }
            _ => {}
        }
    }

    /// When the coordinator may go: its agents have left, or are not waited for any longer, and no rank of a
    /// lost node can run on beside what is started next in the run folder.
    pub(super) fn left(&self, deadline: Duration) -> Duration {
        let alone = self.nodes.values().all(|n| n.local);
        let agents = if alone { Duration::ZERO } else { deadline };
        agents.max(self.fence)
    }

    /// Whether the generation cannot end without a word from this node.
    pub(super) fn is_awaited(&self, id: NodeId) -> bool {
        self.nodes.contains_key(&id) && !self.reports.contains_key(&id)
    }

    pub(super) fn gather(&mut self, now: Duration) {
        self.members.clear();
        self.waiting.again(now);
        self.phase = Phase::Gather {
            deadline: now + self.settings.join,
            last_call: None,
        };
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

    pub(super) fn to_members(&self, message: impl Fn(u32) -> ToAgent, actions: &mut Vec<Action>) {
        for member in self.members.iter().filter(|m| self.is_awaited(m.id)) {
            actions.push(send(member.id, message(self.generation)));
        }
    }

    /// The job cannot be started, and why.
    pub(super) fn give_up(&mut self, why: String, now: Duration, actions: &mut Vec<Action>) {
        actions.push(Action::Notice(why.clone()));
        let reason = Some(why.as_str().into());
        self.leave(exit::PREFLIGHT, reason, Some(&why), now, actions);
    }

    /// Tells everybody to go, and writes the reason down. `why` is for nodes where somebody has started the launcher by
    /// hand, and sees no report.
    pub(super) fn leave(
        &mut self,
        code: i32,
        reason: Option<Reason>,
        why: Option<&str>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        for (id, node) in &self.nodes {
            let message = why.filter(|_| self.settings.open && !node.local);
            let message = message.map(str::to_owned);
            actions.push(send(*id, ToAgent::Exit { code, message }));
        }
        let text = reason.as_ref().map(Reason::to_string);
        actions.push(record("leave", json!({"exit_code": code, "reason": text})));
        actions.extend(reason.map(Action::Left));
        self.phase = Phase::Leave {
            code,
            deadline: now + LEAVE,
        };
        let wait = self.fence.saturating_sub(now);
        if wait > MOMENT {
            let seconds = wait.as_secs_f64();
            let of = match self.lost.as_slice() {
                [one] => one.host.clone(),
                more => format!("{} lost nodes", more.len()),
            };
            actions.push(Action::Notice(format!(
                "waiting {seconds:.1} s: until then ranks of {of} may still run; Ctrl-C leaves at once"
            )));
        }
        self.advance(now, actions);
    }

    /// The host that has this address, where it has joined. `peer` may have a port.
    pub fn host_at(&self, peer: &str) -> Option<&str> {
        let ip = match peer.parse::<SocketAddr>() {
            Ok(address) => address.ip(),
            Err(_) => peer.parse::<IpAddr>().ok()?,
        };
        let ip = ip.to_canonical();
        let has = |node: &&Node| node.join.addresses.iter().any(|(own, _)| *own == ip);
        let mut here = self.nodes.values().chain(self.gone.values()).filter(has);
        here.next().map(|node| node.join.host.as_str())
    }

    pub(super) fn host(&self, id: NodeId) -> &str {
        self.known(id).map_or("a lost node", |n| &n.join.host)
    }
}
