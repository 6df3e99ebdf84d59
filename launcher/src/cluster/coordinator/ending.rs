//! What became of a generation, and whether there is another.

use serde_json::json;
use std::time::Duration;
use tsm_job::config::duration::format;
use tsm_job::exit;

use super::passing::left_behind;
use super::{Action, Cause, NOT_RUNNING, Node, Phase, Reason, State, record};
use crate::blame::{Culprit, Fault, Hang, Lost, NodeEnds, Seen, first_failure};
use crate::clock::Utc;
use crate::cluster::policy;
use crate::end::End;
use crate::oom::OomKills;
use crate::report::{self, Failure, Place, own_words};
use crate::status::Restart;
use crate::supervisor::Rank;

/// Why a job ends that nobody has asked to.
const SAVED: &str = "ranks saved by themselves, to go on later";

/// A generation that is over.
#[derive(Clone, Debug)]
pub struct Ending {
    pub generation: u32,
    pub ended_at: Duration,
    /// `succeeded`, `saved`, `stopped`, `failed`, `grown`.
    pub outcome: &'static str,
    /// What the launcher's exit code is, unless there is another generation.
    pub code: i32,
    /// How every rank ended, in order of rank, as far as it is known.
    pub ends: Vec<Option<End>>,
    pub pids: Vec<i32>,
    /// First and last step.
    pub steps: Option<(u64, u64)>,
    pub checkpoint_step: Option<u64>,
    pub failure: Option<Box<Failure>>,
    /// Why it did not go on to the end of the work.
    pub reason: Option<Reason>,
    /// Why it is started again, or why it is not, where there is something to say.
    pub verdict: Option<String>,
    pub again: bool,
}

impl State {
    /// Every node is clean or lost: decides what comes next.
    pub(super) fn settle(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let (ranks, places) = self.merge(now);
        let ends: Vec<Option<End>> = ranks.iter().map(|rank| rank.end).collect();
        let all = |good: fn(&Rank) -> bool| !ranks.is_empty() && ranks.iter().all(good);
        let done = all(Rank::is_well);
        // Some may have come to the end of their work meanwhile.
        let saved = done && !all(Rank::has_succeeded);
        let whole = self.lost.is_empty();
        // A rank that was killed since it did not save in time has not failed, where nobody asked it to end for good.
        let obeyed = ranks.iter().all(|rank| {
            let by_us = matches!(rank.end, Some(End::Signal(s)) if rank.sent.contains(&s));
            rank.is_well() || (by_us && rank.record.is_none())
        });
        let mut ending = Ending {
            generation: self.generation,
            ended_at: now,
            outcome: "succeeded",
            code: exit::OK,
            ends: ends.clone(),
            pids: places.iter().map(|p| p.pid).collect(),
            steps: self.steps,
            checkpoint_step: self.checkpoint_step,
            failure: None,
            reason: None,
            verdict: None,
            again: false,
        };
        let mut leave_out = None;
        let by_signal = match self.cause {
            None | Some(Cause::Failure) => self.passing.blamed(&ranks).map(Cause::Signal),
            _ => None,
        };
        let left_behind = match self.cause {
            None | Some(Cause::Failure | Cause::Saved) if whole && self.refusal.is_none() => {
                let were_late = self.cause == Some(Cause::Saved);
                left_behind(&ranks, &places, were_late, self.settings.job.grace)
            }
            _ => None,
        };
        let cause = by_signal.or(self.cause.clone());
        match cause.clone() {
            None | Some(Cause::Preempt | Cause::Grow) if whole && all(Rank::has_succeeded) => {}
            Some(Cause::Grow) if whole && obeyed && !self.last => {
                (ending.outcome, ending.again) = ("grown", true)
            }
            Some(Cause::Signal(_)) if whole && saved => {
                (ending.outcome, ending.code) = ("saved", exit::REQUEUE)
            }
            None | Some(Cause::Preempt | Cause::Grow | Cause::Saved) if whole && done => {
                (ending.outcome, ending.code) = ("saved", exit::REQUEUE);
            }
            None | Some(Cause::Failure | Cause::Saved) if left_behind.is_some() => {
                (ending.outcome, ending.code) = ("stopped", exit::REQUEUE);
                ending.verdict = left_behind;
            }
            // Not all could save in time, but the work up to the last checkpoint is there.
            Some(Cause::Preempt) if whole && !failed_by_itself(&ranks) => {
                ending.outcome = "stopped";
                ending.code = exit::SIGNAL_BASE + libc::SIGUSR2;
                if self.steps.is_none() {
                    // Nothing was trained yet, so nothing is lost.
                    ending.code = exit::REQUEUE;
                } else if let Some(step) = self.checkpoint_step {
                    ending.code = exit::REQUEUE;
                    ending.verdict = Some(format!(
                        "not all workers could save within the grace: it goes on from step {step}"
                    ));
                }
            }
            Some(Cause::Signal(signal)) => {
                (ending.outcome, ending.code) = ("stopped", exit::SIGNAL_BASE + signal);
                let grace = self.settings.job.grace;
                ending.verdict = self.passing.explain(signal, &ranks, grace);
            }
            _ => leave_out = self.fail(ranks, places, &mut ending, now),
        }
        let again = ending
            .again
            .then(|| (ending.outcome, ending.verdict.clone().unwrap_or_default()));
        let why = match &self.refusal {
            Some((_, text)) => Some(text.clone()),
            None => ending.failure.as_ref().map(|f| self.last_words(f)),
        };
        let headline = |f: &Failure| Reason::Text(f.headline());
        ending.reason = match (&self.refusal, &ending.failure) {
            (Some((_, text)), _) => Some(text.as_str().into()),
            (None, Some(failure)) => Some(headline(failure)),
            (None, None) if ending.reason.is_some() => ending.reason.take(),
            (None, None) if matches!(ending.outcome, "stopped" | "saved") => {
                let saved = (ending.code == exit::REQUEUE).then_some(SAVED);
                self.who_asked(cause).or(saved.map(Reason::from))
            }
            (None, None) => None,
        };
        let (code, generation, outcome) = (ending.code, self.generation, ending.outcome);
        let reason = ending.reason.clone();
        let fields = json!({"generation": generation, "outcome": outcome, "exit_code": code,
            "steps": ending.steps, "verdict": ending.verdict});
        actions.push(record("generation_end", fields));
        actions.push(Action::Ended(Box::new(ending)));
        if let Some(all) = leave_out {
            self.leave_out(all, now, actions);
        }
        match again {
            Some((outcome, why)) => {
                let cause = if outcome == "grown" {
                    "a node has joined".into()
                } else {
                    why
                };
                self.generation += 1;
                let world_size = 0;
                self.restarts.push(Restart {
                    generation: self.generation,
                    time: Utc::now().rfc3339(),
                    cause,
                    world_size,
                });
                if outcome == "grown" {
                    self.pause = Duration::ZERO;
                }
                self.members.clear();
                self.asked = None;
                self.phase = Phase::Pause {
                    until: now + self.pause,
                };
                // At once, where there is nothing to wait for.
                self.advance(now, actions);
            }
            None => self.leave(code, reason, why.as_deref(), now, actions),
        }
    }

    /// The failure in one line, for nodes that do not show the report.
    fn last_words(&self, failure: &Failure) -> String {
        let of = failure
            .rank
            .map_or(String::new(), |_| format!(" on {}", failure.host));
        let coordinator = self.nodes.values().find(|node| node.local);
        let coordinator = coordinator.map_or("the first node", |node| &node.join.host);
        let file = tsm_job::RunDir::new(&self.settings.job.run_dir).failure();
        let headline = failure.headline();
        format!(
            "{headline}{of}\n  hint: the report is on the screen of {coordinator}, and there in {}",
            file.display()
        )
    }

    /// The nodes that another start leaves out, where there is one.
    fn fail(
        &mut self,
        ranks: Vec<Rank>,
        places: Vec<Place>,
        ending: &mut Ending,
        now: Duration,
    ) -> Option<Vec<policy::LeftOut>> {
        ending.outcome = "failed";
        if let Some((code, _)) = self.refusal {
            // The workers could not be started: that was said already, and what else ended was told to.
            ending.code = code;
            return None;
        }
        let (hang, stacks) = match &self.cause {
            Some(Cause::Hang { late, text, at }) => {
                let late = late.iter().map(|&rank| rank as usize).collect();
                (Some(Hang { at: *at, late }), Some(text.clone()))
            }
            _ => (None, None),
        };
        let nodes = self.node_ends(&ranks);
        let fault = first_failure(&nodes, hang.as_ref(), |rank| own_words(&places[rank]));
        drop(nodes);
        let Some(fault) = fault else {
            ending.code = exit::BUG;
            return None;
        };
        if let Some(time) = self.did_not_run(&fault) {
            self.go_on_later(time, ending);
            return None;
        }
        ending.code = exit_code(&ranks, &fault);
        let node = match &fault.culprit {
            Culprit::Rank(rank) => self.member_of(*rank),
            Culprit::Node { node, .. } => self.members.get(*node),
            Culprit::Late { ranks, .. } => self.member_of(ranks[0]),
        };
        let node = node.map(|m| m.id);
        let of_node = node.and_then(|id| self.reports.get(&id));
        let homes = self.homes();
        let talks = |rank: &Rank| rank.talks || rank.step.is_some() || rank.record.is_some();
        let tells = self.settings.job.saves || !self.progress.is_empty() || ranks.iter().any(talks);
        let mut run = report::Run {
            id: &self.settings.job.run_id,
            dir: &self.settings.job.run_dir,
            exit_code: ending.code,
            tells,
            oom_kills: of_node.map_or(OomKills::default(), |r| r.oom_kills),
            xids: of_node.map(|r| r.xids.as_slice()).unwrap_or_default(),
            homes: &homes,
            stacks: stacks.as_deref(),
            earlier: &self.incidents,
            missing: self.reports.values().find_map(|r| r.missing.as_deref()),
            resume: self.settings.job.resume.as_ref(),
        };
        let failure = report::failure(&run, &fault, &ranks, &places);
        let ran = now.saturating_sub(self.started_at);
        let step = self.steps.map(|(_, last)| last);
        let saved = self
            .checkpoint_step
            .or(self.incidents.last().and_then(|i| i.checkpoint_step));
        let mut incident = failure.incident(ran, step, saved);
        incident.at = now;
        incident.agent = node
            .and_then(|id| self.known(id))
            .map_or(0, |node| node.agent);
        incident.tells = tells;
        let mut left_out = None;
        if self.last {
            ending.verdict = None;
        } else {
            let stock = self.stock();
            let options = &self.settings.policy;
            match policy::decide(options, stock.as_ref(), &self.incidents, &incident) {
                policy::Verdict::Restart {
                    after,
                    leave_out,
                    why,
                } => {
                    left_out = Some(leave_out);
                    self.pause = after;
                    (ending.again, ending.verdict) = (true, Some(why));
                }
                policy::Verdict::Stop { code, why } => {
                    ending.code = code.exit_code(ending.code);
                    ending.verdict = (self.settings.policy.max_restarts > 0).then_some(why);
                }
            }
        }
        run.exit_code = ending.code;
        ending.failure = Some(Box::new(report::failure(&run, &fault, &ranks, &places)));
        self.incidents.push(incident);
        left_out
    }

    /// How long the coordinator had not run when its nodes gave it up, where a scheduler may queue the job again: it
    /// suspends all processes together, and nobody here would start the agents again that have ended since.
    fn did_not_run(&self, fault: &Fault) -> Option<Duration> {
        let Culprit::Node { how, .. } = &fault.culprit else {
            return None;
        };
        let goes_on = self.settings.requeues && how.contains(NOT_RUNNING);
        self.stalled.as_ref().filter(|_| goes_on).map(|s| s.time)
    }

    /// Nobody failed, and the work up to the last checkpoint is there.
    fn go_on_later(&self, time: Duration, ending: &mut Ending) {
        let text = format!(
            "the job did not run for {:.1} s: suspended?",
            time.as_secs_f64()
        );
        let (lease, from) = (format(self.settings.lease), self.checkpoint_step);
        let from = from.map_or("its last checkpoint".into(), |step| format!("step {step}"));
        ending.verdict = Some(format!(
            "{text} Nodes that hear nothing for {lease} end their ranks; it goes on from {from}"
        ));
        ending.reason = Some(text.as_str().into());
        (ending.outcome, ending.code) = ("stopped", exit::REQUEUE);
    }

    /// The nodes of the next start, where no other can come.
    fn stock(&self) -> Option<policy::Stock> {
        let is_fit =
            |n: &&Node| !(self.convicted.iter()).any(|l| l.must && l.covers(&n.join.host, n.agent));
        let nodes = self.nodes.values().filter(is_fit);
        (!self.settings.open).then(|| policy::Stock {
            nodes: nodes.map(|n| (n.join.host.clone(), n.agent)).collect(),
            needed: self.settings.min_nodes as usize,
        })
    }

    /// The node that runs a rank of this generation.
    fn member_of(&self, rank: usize) -> Option<&super::Member> {
        let rank = rank as u32;
        self.members.iter().find(|m| m.ranks.contains(&rank))
    }

    /// The node of each rank.
    fn homes(&self) -> Vec<report::Home> {
        let of = |(node_rank, member): (usize, &super::Member)| {
            let home = report::Home {
                node_rank,
                uncertainty: self
                    .known(member.id)
                    .map_or(Duration::ZERO, |n| n.clock.error()),
                is_lost: self.lost.iter().any(|l| l.member.id == member.id),
            };
            vec![home; member.ranks.len()]
        };
        self.members.iter().enumerate().flat_map(of).collect()
    }

    /// What is known of the ends on each node. `ranks` are those of the whole job, by rank.
    fn node_ends<'a>(&'a self, ranks: &'a [Rank]) -> Vec<NodeEnds<'a>> {
        let node = |member: &'a super::Member| {
            let seen = |number: u32| {
                ranks.get(number as usize).map(|rank| Seen {
                    number: number as usize,
                    rank,
                    at: rank.first_at,
                })
            };
            let lost = self.lost.iter().find(|l| l.member.id == member.id);
            NodeEnds {
                host: self.host(member.id),
                ranks: member.ranks.clone().filter_map(seen).collect(),
                uncertainty: self
                    .known(member.id)
                    .map_or(Duration::ZERO, |n| n.clock.error()),
                lost: lost.map(|l| Lost {
                    heard: l.heard,
                    given_up: l.at,
                    how: &l.how,
                }),
            }
        };
        self.members.iter().map(node).collect()
    }

    /// The ranks of all nodes in order of rank, their times on the coordinator's clock, where nothing lies ahead.
    fn merge(&self, now: Duration) -> (Vec<Rank>, Vec<Place>) {
        let mut all: Vec<(Rank, Place)> = Vec::new();
        for member in &self.members {
            let clock = self.known(member.id).map(|n| n.clock);
            let known = self
                .reports
                .get(&member.id)
                .map(|r| r.ranks.as_slice())
                .unwrap_or_default();
            for (number, i) in member.ranks.clone().zip(0..) {
                all.push(match known.get(i) {
                    Some((rank, place)) => {
                        let mut rank = rank.clone();
                        let map = |at| clock.map_or(at, |c| c.map(at)).min(now);
                        rank.ended_at = map(rank.ended_at);
                        rank.first_at = map(rank.first_at);
                        rank.left = rank.left.map(|(order, at, after)| (order, map(at), after));
                        (rank, place.clone())
                    }
                    None => self.lost_rank(member.id, number),
                });
            }
        }
        all.into_iter().unzip()
    }

    /// A rank that no report speaks of: its node is lost, or it was never started.
    fn lost_rank(&self, id: u64, number: u32) -> (Rank, Place) {
        let lost = self.lost.iter().find(|l| l.member.id == id);
        let at = lost.map_or(Duration::ZERO, |l| l.at);
        let progress = self.progress.get(&number);
        let rank = Rank {
            ended_at: at,
            first_at: at,
            step: progress.and_then(|p| p.step),
            section: progress.and_then(|p| p.section.clone()),
            ..Rank::default()
        };
        let local = lost.map_or(0, |l| number - l.member.ranks.start) as usize;
        let host = lost.map_or("a lost node".into(), |l| l.host.clone());
        let dir = tsm_job::RunDir::new(&self.settings.job.run_dir);
        let place = Place {
            device: lost
                .and_then(|l| l.devices.get(local))
                .cloned()
                .unwrap_or_default(),
            pid: 0,
            stderr_file: dir.log(&host, number, true),
            error_file: crate::plan::error_file(dir.path(), &host, number),
            exception: None,
            stderr: Vec::new(),
            oom_kill: None,
            stuck_in: None,
            host,
        };
        (rank, place)
    }
}

/// The code of the rank to blame; of one that announced its failure and hung, or ended as if it had not, what it
/// announced.
fn exit_code(ranks: &[Rank], fault: &Fault) -> i32 {
    let Culprit::Rank(number) = fault.culprit else {
        return exit::PEER;
    };
    let rank = &ranks[number];
    let code = match (&rank.record, rank.end) {
        (Some(record), None) => record.code,
        (Some(record), Some(End::Signal(signal))) if rank.sent.contains(&signal) => record.code,
        (Some(record), Some(end)) if end.is_success() => record.code,
        // It had failed when the stop overtook its end: the signal says nothing.
        (None, Some(End::Signal(signal))) if rank.sent.contains(&signal) => 1,
        (_, Some(end)) => end.exit_code(),
        // Every failure has a rank that ended or announced it.
        (None, None) => exit::BUG,
    };
    // It failed, whatever it says.
    match code {
        1..=255 => code,
        _ => 1,
    }
}

/// Whether a rank ended otherwise than it was told to.
fn failed_by_itself(ranks: &[Rank]) -> bool {
    let told = |rank: &Rank| match rank.end {
        Some(End::Signal(signal)) => rank.sent.contains(&signal),
        Some(End::Code(_)) => rank.is_well(),
        None => true,
    };
    !ranks.iter().all(told)
}
