//! What became of a generation, and whether there is another.

use serde_json::json;
use std::time::Duration;
use tsm_job::exit;

use super::{Action, Cause, LostNode, Phase, State, record};
use crate::blame::Blame;
use crate::clock::Utc;
use crate::cluster::policy::{self, Incident};
use crate::end::End;
use crate::report::Place;
use crate::status::Restart;
use crate::supervisor::Rank;

/// A generation that is over.
#[derive(Clone, Debug)]
pub struct Ending {
    pub generation: u32,
    pub world_size: u32,
    pub started_at: Duration,
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
    pub failed: Option<Failed>,
    /// Why it is started again, or why it is not, where there is something to say.
    pub verdict: Option<String>,
    pub again: bool,
}

/// Why a generation failed.
#[derive(Clone, Debug)]
pub struct Failed {
    /// By global rank, `order` by the coordinator's clock.
    pub ranks: Vec<Rank>,
    pub places: Vec<Place>,
    pub blame: Option<Blame>,
    pub lost: Vec<LostNode>,
    /// Late ranks of a hang, and what they were doing.
    pub hang: Option<(Vec<u32>, String)>,
    pub oom_kills: u64,
    pub xids: Vec<String>,
}

impl State {
    /// Every node is clean or lost: decides what comes next.
    pub(super) fn settle(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let (ranks, places) = self.merge();
        let ends: Vec<Option<End>> = ranks.iter().map(|rank| rank.end).collect();
        let all = |good: fn(End) -> bool| !ends.is_empty() && ends.iter().all(|end| end.is_some_and(good));
        let saved = all(|end| end == End::Code(exit::REQUEUE));
        let done = all(|end| end.is_success() || end == End::Code(exit::REQUEUE));
        let whole = self.lost.is_empty();
        let mut ending = Ending {
            generation: self.generation,
            world_size: self.world_size(),
            started_at: self.started_at,
            ended_at: now,
            outcome: "succeeded",
            code: exit::OK,
            ends: ends.clone(),
            pids: places.iter().map(|p| p.pid).collect(),
            steps: self.steps,
            checkpoint_step: self.checkpoint_step,
            failed: None,
            verdict: None,
            again: false,
        };
        match self.cause.clone() {
            None | Some(Cause::Preempt | Cause::Grow) if whole && all(End::is_success) => {}
            Some(Cause::Grow) if whole && done && !self.last => (ending.outcome, ending.again) = ("grown", true),
            Some(Cause::Signal(_)) if whole && saved => (ending.outcome, ending.code) = ("saved", exit::REQUEUE),
            None | Some(Cause::Preempt | Cause::Grow) if whole && done => {
                (ending.outcome, ending.code) = ("saved", exit::REQUEUE);
            }
            Some(Cause::Signal(signal)) => (ending.outcome, ending.code) = ("stopped", exit::SIGNAL_BASE + signal),
            _ => self.fail(ranks, places, &mut ending, now),
        }
        let again = ending.again.then(|| (ending.outcome, ending.verdict.clone().unwrap_or_default()));
        let (code, generation, outcome) = (ending.code, self.generation, ending.outcome);
        let fields = json!({"generation": generation, "outcome": outcome, "exit_code": code,
            "steps": ending.steps, "verdict": ending.verdict});
        actions.push(record("generation_end", fields));
        actions.push(Action::Ended(Box::new(ending)));
        match again {
            Some((outcome, why)) => {
                let cause = if outcome == "grown" { "a node has joined".into() } else { why };
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
                self.phase = Phase::Pause { until: now + self.pause };
                // At once, where there is nothing to wait for.
                self.advance(now, actions);
            }
            None => self.leave(code, now, actions),
        }
    }

    fn fail(&mut self, ranks: Vec<Rank>, places: Vec<Place>, ending: &mut Ending, now: Duration) {
        let words = |rank: usize| crate::report::own_words(&places[rank]);
        let blame = crate::blame::first_failure(&ranks, words);
        let hang = match &self.cause {
            Some(Cause::Hang { late, text }) => Some((late.clone(), text.clone())),
            _ => None,
        };
        ending.outcome = "failed";
        ending.code = self.refusal.unwrap_or_else(|| exit_code(&ranks, blame.as_ref(), !self.lost.is_empty()));
        let failed = Failed {
            blame,
            lost: self.lost.clone(),
            hang,
            oom_kills: self.reports.values().map(|r| r.oom_kills).sum(),
            xids: self.reports.values().flat_map(|r| r.xids.clone()).collect(),
            ranks,
            places,
        };
        let incident = Incident::of(&failed, now, self.steps.map(|(_, last)| last), self.checkpoint_step);
        match self.history.judge(&incident, now) {
            _ if self.last => {}
            policy::Verdict::Restart { after, leave_out, why } => {
                for host in leave_out {
                    self.left_out.insert(host, why.clone());
                }
                self.pause = after;
                (ending.again, ending.verdict) = (true, Some(why));
            }
            policy::Verdict::Stop { code, why } => {
                ending.code = code.unwrap_or(ending.code);
                ending.verdict = why;
            }
        }
        ending.failed = Some(failed);
    }

    /// The ranks of all nodes in order of rank, their `order` by the coordinator's clock.
    fn merge(&self) -> (Vec<Rank>, Vec<Place>) {
        let mut all: Vec<(Rank, Place, Duration)> = Vec::new();
        for member in &self.members {
            let clock = self.nodes.get(&member.id).map(|n| n.clock);
            match self.reports.get(&member.id) {
                Some(report) => {
                    // Within a node the kernel's order rules, whatever the clock says.
                    let mut by_order: Vec<usize> = (0..report.ranks.len()).collect();
                    by_order.sort_by_key(|&i| report.ranks[i].0.order);
                    let mut times = vec![Duration::ZERO; report.ranks.len()];
                    let mut last = Duration::ZERO;
                    for i in by_order {
                        let at = report.ranks[i].0.ended_at;
                        last = last.max(clock.map_or(at, |c| c.map(at)));
                        times[i] = last;
                    }
                    all.extend(report.ranks.iter().zip(times).map(|((r, p), at)| (r.clone(), p.clone(), at)));
                }
                None => all.extend(member.ranks.clone().map(|rank| self.lost_rank(member.id, rank))),
            }
        }
        let mut by_time: Vec<usize> = (0..all.len()).collect();
        by_time.sort_by_key(|&i| (all[i].2, all[i].0.order));
        for (order, i) in by_time.into_iter().enumerate() {
            (all[i].0.order, all[i].0.ended_at) = (order + 1, all[i].2);
        }
        all.into_iter().map(|(rank, place, _)| (rank, place)).unzip()
    }

    fn lost_rank(&self, id: u64, number: u32) -> (Rank, Place, Duration) {
        let lost = self.lost.iter().find(|l| l.member.id == id);
        let at = lost.map_or(Duration::ZERO, |l| l.at);
        let progress = self.progress.get(&number);
        let rank = Rank {
            ended_at: at,
            step: progress.and_then(|p| p.step),
            section: progress.and_then(|p| p.section.clone()),
            ..Rank::default()
        };
        let local = lost.map_or(0, |l| number - l.member.ranks.start) as usize;
        let host = lost.map_or("a lost node".into(), |l| l.host.clone());
        let dir = tsm_job::RunDir::new(&self.settings.job.run_dir);
        let place = Place {
            device: lost.and_then(|l| l.devices.get(local)).cloned().unwrap_or_default(),
            pid: 0,
            stderr_file: dir.log(&host, number, true),
            error_file: crate::plan::error_file(dir.path(), &host, number),
            stderr: Vec::new(),
            stuck_in: None,
            host,
        };
        (rank, place, at)
    }
}

/// The code of the rank to blame; of one that announced its failure and hung, what it announced.
fn exit_code(ranks: &[Rank], blame: Option<&Blame>, lost: bool) -> i32 {
    let blamed = blame.map(|b| &ranks[b.rank]);
    let announced = blamed.and_then(|rank| match (&rank.record, rank.end) {
        (Some(record), None) => Some(record.code),
        (Some(record), Some(End::Signal(signal))) if rank.sent.contains(&signal) => Some(record.code),
        _ => None,
    });
    let end = announced.map(End::Code).or(blamed.and_then(|rank| rank.end));
    match end {
        Some(end) => end.exit_code(),
        None if lost => exit::PEER,
        // Every failure has a rank that ended or announced it.
        None => exit::BUG,
    }
}
