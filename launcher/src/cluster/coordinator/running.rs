//! What the nodes of a generation say while their ranks run.

use serde_json::json;
use std::time::Duration;
use tsm_job::config::duration::format;
use tsm_job::exit;

use super::{Action, Cause, INSPECT, Inspection, LOOK, Phase, Spawned, State, record};
use crate::cluster::message::{About, Beat, NodeReport, ToAgent};
use crate::cluster::topology::{Member, NodeId};
use crate::contain;
use crate::end::End;
use crate::hang::progress::Event as Pace;
use crate::hang::ras::Answer;
use crate::hang::report::{Inspection as Look, report};
use crate::oom::OomKills;
use crate::report::Place;
use crate::supervisor::Rank;
use crate::text::count;

/// Names of metrics that are taken in, and the bytes of each.
const MAX_METRICS: usize = 1000;
const MAX_NAME: usize = 128;

impl State {
    pub(super) fn started(
        &mut self,
        id: NodeId,
        mut spawned: Spawned,
        at: Duration,
        containment: contain::Kind,
        actions: &mut Vec<Action>,
    ) {
        let Some(member) = self.member(id).cloned() else {
            return;
        };
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        spawned.first_rank = member.ranks.start;
        spawned.pids.truncate(member.ranks.len());
        node.pids = spawned.pids.clone();
        let (host, at) = (node.join.host.clone(), node.clock.map(at));
        for (rank, pid) in member.ranks.zip(&spawned.pids) {
            let fields = json!({"generation": self.generation, "rank": rank, "pid": pid, "host": host,
                "at_ms": at.as_secs_f64() * 1e3, "containment": containment});
            actions.push(record("spawn", fields));
        }
        actions.push(Action::Spawned(Box::new(spawned)));
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
        let (host, code) = (self.host(id).to_string(), refusal(code));
        let text = format!("the workers on {host} cannot be started: {message}");
        actions.push(Action::Notice(text.clone()));
        if let Phase::Form { .. } = self.phase {
            // Nowhere else were any started.
            return self.leave(code, Some(text.as_str().into()), Some(&text), now, actions);
        }
        self.reports.insert(
            id,
            NodeReport {
                ranks: Vec::new(),
                started_at: Duration::ZERO,
                oom_kills: OomKills::default(),
                xids: Vec::new(),
                warnings: Vec::new(),
                missing: None,
            },
        );
        // It would fail again, here and elsewhere.
        self.last = true;
        if self.cause.is_none() {
            self.refusal = Some((code, text));
            self.stop(Cause::Failure, libc::SIGTERM, now, actions);
        }
        self.end_save(None, now, actions);
    }

    pub(super) fn failing(
        &mut self,
        id: NodeId,
        local_rank: u32,
        end: Option<End>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(rank) = self.member(id).and_then(|m| rank_of(m, local_rank)) else {
            return;
        };
        let what = match end {
            None => "says that it fails".into(),
            Some(end) if end.is_success() => {
                format!("said that it fails, and ended with {end}")
            }
            Some(end) => format!("ended with {end}"),
        };
        let who = format!("{} {what}", self.name(rank));
        let others = self.world_size().saturating_sub(1) as usize;
        if self.cause.is_some() {
            let who = (others > 0).then_some(who.as_str());
            return self.end_save(who, now, actions);
        }
        let by = end.and_then(|end| self.passing.ended(end));
        let cause = by.map_or(Cause::Failure, Cause::Signal);
        if others > 0 {
            let passed = if cause == Cause::Failure {
                ""
            } else {
                ", which was passed on"
            };
            let (others, grace) = (count(others, "other"), format(self.settings.job.grace));
            actions.push(Action::Notice(format!(
                "{who}{passed}: stopping {others}, grace {grace}"
            )));
        }
        self.stop(cause, libc::SIGTERM, now, actions);
    }

    /// Part of a report that is too long for one message.
    pub(super) fn ranks(&mut self, id: NodeId, mut ranks: Vec<(Rank, Place)>) {
        if let Some(member) = self.member(id).cloned() {
            let part = self.parts.entry(id).or_default();
            ranks.truncate(member.ranks.len().saturating_sub(part.len()));
            part.append(&mut ranks);
        }
    }

    pub(super) fn clean(
        &mut self,
        id: NodeId,
        mut report: NodeReport,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(member) = self.member(id).cloned() else {
            return;
        };
        if self.reports.contains_key(&id) {
            return;
        }
        let mut ranks = self.parts.remove(&id).unwrap_or_default();
        ranks.append(&mut report.ranks);
        ranks.truncate(member.ranks.len());
        report.ranks = ranks;
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
        let is_fine = |rank: &Rank| rank.is_well() || self.passing.killed(rank).is_some();
        let failed = report.ranks.iter().any(|(rank, _)| !is_fine(rank));
        // Where its grace is over, that of the others is too.
        let is_unsaved = |rank: &Rank| !rank.is_well() && !rank.sent.contains(&libc::SIGKILL);
        let unsaved = member
            .ranks
            .clone()
            .zip(&report.ranks)
            .find_map(|(number, (rank, _))| {
                let end = rank.end.filter(|_| is_unsaved(rank))?;
                Some(format!("{} ended with {end}", self.name(number)))
            });
        self.reports.insert(id, report);
        // It was not said before where a rank that saved by itself was not followed by the others in time.
        if failed && self.cause.is_none() {
            self.stop(Cause::Failure, libc::SIGTERM, now, actions);
        } else if let Some(who) = unsaved {
            self.end_save(Some(&who), now, actions);
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
                let first = progress.first_step.unwrap_or(step);
                let (low, high) = self.steps.unwrap_or((first, step));
                self.steps = Some((low.min(first).min(step), high.max(step)));
            }
            self.watch.feed(
                number,
                rank.step,
                &progress.work_ms,
                rank.section.as_deref(),
                now,
            );
            if let Some(step) = progress.step {
                self.compare_with_checkpoint(step, actions);
            }
            if progress.checkpoint.is_some() {
                self.checkpoint_step = progress.checkpoint;
                self.grow(now, actions);
            }
        }
        for (name, value) in beat.metrics {
            let is_new = !self.metrics.contains_key(&name);
            if !is_new || (self.metrics.len() < MAX_METRICS && name.len() <= MAX_NAME) {
                self.metrics.insert(name, value);
            }
        }
    }

    /// What a job continues is no progress of its own. Only what it had before its own first checkpoint counts here.
    pub(super) fn hear_where_it_goes_on(&mut self, word: &About) {
        let has_saved = self.incidents.iter().any(|i| i.checkpoint_step.is_some());
        if let About::Resumed { step, .. } = word
            && !has_saved
        {
            self.settings.policy.resumed_at = Some(*step);
        }
    }

    /// Says so where a new start did not find what an earlier one has saved.
    fn compare_with_checkpoint(&mut self, step: u64, actions: &mut Vec<Action>) {
        let saved = self.goes_on_from.take();
        let Some(saved) = saved.filter(|&saved| step <= saved && self.settings.job.saves) else {
            return;
        };
        let dir = self.settings.job.run_dir.display();
        actions.push(record("went_back", json!({"step": step, "saved": saved})));
        actions.push(Action::Notice(format!(
            "warning: this start is at step {step}, though step {saved} was saved: no rank has found a usable checkpoint of it in {dir}\n  hint: it may be on the disk of a node that is lost; use a run folder that all nodes share"
        )));
    }

    /// Takes in a waiting node, now that little is lost by a new start.
    pub(super) fn grow(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if !self.may_grow() {
            return;
        }
        let mut spares = self.candidates(now).into_iter();
        let is_fit = |id| self.member(id).is_none() && self.is_tried(id);
        let Some(spare) = spares.find(|c| is_fit(c.id)) else {
            // There may be some that joined when nothing ran.
            return self.try_next(now, actions);
        };
        let host = self.host(spare.id);
        actions.push(Action::Notice(format!(
            "{host} is taken in: the workers save and start again"
        )));
        self.stop(Cause::Grow, libc::SIGUSR2, now, actions);
    }

    pub(super) fn look_for_hangs(&mut self, now: Duration, actions: &mut Vec<Action>) {
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
    pub(super) fn name(&self, rank: u32) -> String {
        let member = self.members.iter().find(|m| m.ranks.contains(&rank));
        match member {
            Some(member) if self.members.len() > 1 => {
                format!("rank {rank} on {}", self.host(member.id))
            }
            _ => format!("rank {rank}"),
        }
    }

    /// Asks all nodes what their ranks are doing: the late ones are understood beside the others.
    pub(super) fn inspect(&mut self, late: Vec<u32>, now: Duration, actions: &mut Vec<Action>) {
        self.to_members(|generation| ToAgent::Inspect { generation }, actions);
        self.inspection = Some(Inspection {
            late,
            looks: Vec::new(),
            ras: None,
            waiting: self.awaited().collect(),
            found: now,
            deadline: now + INSPECT,
        });
    }

    pub(super) fn inspected(
        &mut self,
        id: NodeId,
        mut looks: Vec<Look>,
        ras: Option<Answer>,
        more: bool,
    ) {
        let ranks = self.member(id).map_or(0..0, |m| m.ranks.clone());
        if let Some(inspection) = &mut self.inspection
            && inspection.waiting.contains(&id)
        {
            let known = |rank: u32| inspection.looks.iter().any(|look| look.rank == rank);
            looks.retain(|look| ranks.contains(&look.rank) && !known(look.rank));
            looks.truncate(ranks.len());
            inspection.looks.extend(looks);
            if more {
                return;
            }
            inspection.waiting.retain(|&node| node != id);
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
}

/// The exit code for a node that cannot run the job, which is no success whatever the node says.
pub(super) fn refusal(code: i32) -> i32 {
    match code {
        1..=255 => code,
        _ => exit::PREFLIGHT,
    }
}

/// Number in the job of a node's rank; `None` for one that the node does not have.
pub(super) fn rank_of(member: &Member, local_rank: u32) -> Option<u32> {
    let rank = member.ranks.start.checked_add(local_rank)?;
    member.ranks.contains(&rank).then_some(rank)
}
