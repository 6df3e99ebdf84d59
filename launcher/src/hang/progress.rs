//! How far every rank has come, and whether the job still moves. Pure: `now` counts from the launcher's start.

use std::collections::BTreeMap;
use std::time::Duration;
use tsm_job::config::duration;

use super::slow::{Change, Rule, Slowness, Stragglers};
use crate::text::{count, ranks_named};

/// Sections in which no step is made, and which may take longer than one.
const LONG_SECTIONS: [&str; 3] = ["load", "validate", "checkpoint"];
/// The section that a rank may visit alone while the others wait for it.
const DETOUR: &str = "checkpoint";
/// A rank in data parallel training cannot be further ahead of another than this many steps.
const MAX_LEAD: u64 = 1;

/// When a job hangs.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Without a step for this long, the job hangs; `None`: it is not watched for.
    pub hang_timeout: Option<Duration>,
    /// How many times as long the first step may take (data is loaded, kernels are compiled), and the sections
    /// `load`, `validate` and `checkpoint`.
    pub patience: u32,
    pub slow: Rule,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            hang_timeout: Some(Duration::from_secs(600)),
            patience: 3,
            slow: Rule::default(),
        }
    }
}

/// Something worth telling. Each comes once, until it has changed back.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// No rank reports steps: hangs cannot be told from work.
    Unwatched {
        after: Duration,
    },
    Hang(Hang),
    /// After [`Event::Hang`], a rank moved again.
    Resumed {
        idle: Duration,
    },
    /// One rank makes no step, and the others do not wait for it.
    Behind {
        rank: u32,
        step: u64,
        others_at: u64,
        idle: Duration,
    },
    Slow(Slowness),
    Recovered(Slowness),
}

/// A job that makes no step.
#[derive(Clone, Debug, PartialEq)]
pub struct Hang {
    /// Since any rank made a step or entered a section.
    pub idle: Duration,
    pub limit: Duration,
    /// The ranks that the others seem to wait for; empty: steps and sections do not tell.
    pub late: Vec<u32>,
    /// Why they, or why nobody.
    pub reason: String,
    /// Ranks that report no steps, although others do.
    pub unwatched: Vec<u32>,
}

/// What is known of one rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rank {
    pub step: Option<u64>,
    /// Its first reported step: where a resumed job went on.
    pub first_step: Option<u64>,
    pub section: Option<String>,
    /// When it last made a step or entered a section.
    pub moved_at: Duration,
    /// It has said something at all.
    spoke: bool,
    ended: bool,
    /// Sections entered since its last step, without detours.
    entries: u32,
    /// Where it was before a detour.
    main_section: Option<String>,
    behind: bool,
}

/// Progress of all ranks of one generation.
#[derive(Clone, Debug)]
pub struct Tracker {
    limits: Limits,
    ranks: Vec<Rank>,
    stragglers: Stragglers,
    started_at: Duration,
    /// When any rank last moved.
    moved_at: Duration,
    /// A hang was told, and this was when a rank had last moved.
    hangs_since: Option<Duration>,
    told_unwatched: bool,
}

impl Tracker {
    /// For a generation whose ranks are being started `now`.
    pub fn new(world_size: u32, limits: Limits, now: Duration) -> Tracker {
        Tracker {
            stragglers: Stragglers::new(world_size, limits.slow.clone()),
            limits,
            ranks: vec![
                Rank {
                    moved_at: now,
                    ..Rank::default()
                };
                world_size as usize
            ],
            started_at: now,
            moved_at: now,
            hangs_since: None,
            told_unwatched: false,
        }
    }

    /// Takes in what a rank said: `step` and `section` as they are now, `work_ms` for every step since the last
    /// call. With neither it has only shown that it talks to the launcher (`Hello`).
    pub fn feed(
        &mut self,
        rank: u32,
        step: Option<u64>,
        work_ms: &[f32],
        section: Option<&str>,
        now: Duration,
    ) {
        let Some(state) = self.ranks.get_mut(rank as usize) else {
            return;
        };
        let (stepped, entered) = (state.step_to(step), state.enter(section));
        state.spoke = true;
        if stepped || entered {
            state.moved_at = now;
            self.moved_at = now;
        }
        self.stragglers.feed(rank, work_ms);
    }

    /// The others go on without it.
    pub fn ended(&mut self, rank: u32, now: Duration) {
        if let Some(state) = self.ranks.get_mut(rank as usize) {
            state.ended = true;
            self.stragglers.forget(rank);
            // The end of a rank of a job that hangs is no sign that the others move.
            if self.hangs_since.is_none() {
                self.moved_at = now;
            }
        }
    }

    /// What has become worth telling. Call it about every second.
    pub fn check(&mut self, now: Duration) -> Vec<Event> {
        let mut events = Vec::new();
        if let Some(since) = self.hangs_since.take_if(|since| *since < self.moved_at) {
            let idle = self.moved_at - since;
            events.push(Event::Resumed { idle });
        }
        for change in self.stragglers.check() {
            events.push(match change {
                Change::Slow(slowness) => Event::Slow(slowness),
                Change::Recovered(slowness) => Event::Recovered(slowness),
            });
        }
        if let Some(limit) = self.limit() {
            self.check_hang(limit, now, &mut events);
            self.check_behind(limit, now, &mut events);
        }
        events
    }

    fn check_hang(&mut self, limit: Duration, now: Duration, events: &mut Vec<Event>) {
        let idle = now.saturating_sub(self.moved_at);
        if self.hangs() || idle < limit || self.ranks.iter().all(|r| r.ended) {
            return;
        }
        if !self.ranks.iter().any(|r| r.spoke) {
            if !std::mem::replace(&mut self.told_unwatched, true) {
                let after = now.saturating_sub(self.started_at);
                events.push(Event::Unwatched { after });
            }
            return;
        }
        self.hangs_since = Some(self.moved_at);
        events.push(Event::Hang(self.hang(now)));
    }

    fn check_behind(&mut self, limit: Duration, now: Duration, events: &mut Vec<Event>) {
        let Some(others_at) = self.watched().filter_map(|r| self.rank(r).step).max() else {
            return;
        };
        let hangs = self.hangs();
        for (rank, state) in self.ranks.iter_mut().enumerate() {
            let Some(step) = state.step.filter(|_| !state.ended) else {
                continue;
            };
            let idle = now.saturating_sub(state.moved_at);
            let behind = idle >= limit && others_at > step + MAX_LEAD;
            if behind && !state.behind && !hangs {
                events.push(Event::Behind {
                    rank: rank as u32,
                    step,
                    others_at,
                    idle,
                });
            }
            state.behind = behind && (state.behind || !hangs);
        }
    }

    /// How long no rank may move, as things are now.
    pub fn limit(&self) -> Option<Duration> {
        let long = |rank: &Rank| {
            rank.step.is_none()
                || (rank.section.as_deref()).is_some_and(|s| LONG_SECTIONS.contains(&s))
        };
        let patient = self.watched().any(|rank| long(self.rank(rank)));
        let factor = if patient { self.limits.patience } else { 1 };
        Some(self.limits.hang_timeout? * factor.max(1))
    }

    pub fn rank(&self, rank: u32) -> &Rank {
        &self.ranks[rank as usize]
    }

    pub fn world_size(&self) -> u32 {
        self.ranks.len() as u32
    }

    /// Since the rank made a step or entered a section.
    pub fn idle(&self, rank: u32, now: Duration) -> Duration {
        now.saturating_sub(self.rank(rank).moved_at)
    }

    pub fn is_slow(&self, rank: u32) -> bool {
        self.stragglers.is_slow(rank)
    }

    /// The job hangs: [`Event::Hang`] was given, and nothing moved since.
    pub fn hangs(&self) -> bool {
        self.hangs_since.is_some()
    }

    /// Ranks that run, and take part in the steps that are reported. A rank that made no step counts only as long
    /// as the others can be waiting for it to make its first.
    fn watched(&self) -> impl Iterator<Item = u32> + '_ {
        let made = |rank: &Rank| Some(rank.step? - rank.first_step?);
        let most = self.ranks.iter().filter_map(made).max().unwrap_or(0);
        let counts = move |rank: &Rank| {
            !rank.ended && (rank.step.is_some() || rank.spoke && most <= MAX_LEAD)
        };
        (0..self.world_size()).filter(move |&rank| counts(self.rank(rank)))
    }

    /// The job as it stands, as if it hung.
    pub fn hang(&self, now: Duration) -> Hang {
        let watched: Vec<u32> = self.watched().collect();
        let (late, reason) = self.late(&watched);
        let unwatched = |rank: &u32| !self.rank(*rank).ended && !watched.contains(rank);
        Hang {
            idle: now.saturating_sub(self.moved_at),
            limit: self.limit().unwrap_or_default(),
            late,
            reason,
            unwatched: (0..self.world_size()).filter(unwatched).collect(),
        }
    }

    /// The ranks that the others wait for, and how that is known.
    fn late(&self, watched: &[u32]) -> (Vec<u32>, String) {
        let by_step = self.group(watched, |rank| rank.step);
        let (Some((&lowest, last)), Some((&highest, _))) =
            (by_step.first_key_value(), by_step.last_key_value())
        else {
            return (Vec::new(), "no rank reports steps".into());
        };
        if lowest != highest {
            let ahead = watched.len() - last.len();
            let reason = format!(
                "{} at {}, {} at {} or further wait",
                names(last),
                at(lowest),
                count(ahead, "rank"),
                at(by_step.keys().nth(1).copied().flatten()),
            );
            return (last.clone(), reason);
        }
        let detour = |rank: &Rank| rank.section.as_deref() == Some(DETOUR);
        let by_detour = self.group(watched, detour);
        if let (Some(away), Some(others)) = (by_detour.get(&true), by_detour.get(&false)) {
            let reason = format!(
                "{} in section {DETOUR}, {} at the same step wait",
                names(away),
                count(others.len(), "rank")
            );
            return (away.clone(), reason);
        }
        let by_entries = self.group(watched, |rank| rank.entries);
        if by_entries.len() > 1
            && let (Some((_, last)), Some((_, first))) =
                (by_entries.first_key_value(), by_entries.last_key_value())
        {
            let reason = format!(
                "{} at {} in {}, {} already in {}",
                names(last),
                at(lowest),
                self.section(last[0]),
                names(first),
                self.section(first[0])
            );
            return (last.clone(), reason);
        }
        let all = if watched.len() == 1 {
            "the only rank that reports steps is"
        } else {
            "all ranks are"
        };
        let reason = format!(
            "{all} at {} in {}: a collective that does not end, or the data",
            at(lowest),
            self.section(watched[0])
        );
        (Vec::new(), reason)
    }

    fn group<K: Ord>(&self, ranks: &[u32], key: impl Fn(&Rank) -> K) -> BTreeMap<K, Vec<u32>> {
        let mut groups: BTreeMap<K, Vec<u32>> = BTreeMap::new();
        for &rank in ranks {
            groups.entry(key(self.rank(rank))).or_default().push(rank);
        }
        groups
    }

    fn section(&self, rank: u32) -> String {
        match &self.rank(rank).section {
            Some(section) => format!("section {section}"),
            None => "no section".into(),
        }
    }
}

impl Rank {
    fn step_to(&mut self, step: Option<u64>) -> bool {
        let Some(step) = step.filter(|step| self.step.is_none_or(|old| old < *step)) else {
            return false;
        };
        self.first_step.get_or_insert(step);
        (self.step, self.entries) = (Some(step), 0);
        true
    }

    fn enter(&mut self, section: Option<&str>) -> bool {
        let Some(section) = section.filter(|s| self.section.as_deref() != Some(s)) else {
            return false;
        };
        self.section = Some(section.into());
        if section != DETOUR && self.main_section.as_deref() != Some(section) {
            self.main_section = Some(section.into());
            self.entries += 1;
        }
        true
    }
}

impl Event {
    /// For people, in one line; `place` names a rank, such as `rank 3 (gpu-07)`.
    pub fn describe(&self, place: impl Fn(u32) -> String) -> String {
        let ms = |s: &Slowness| {
            let digits = if s.others_ms < 10.0 { 2 } else { 0 };
            format!(
                "{:.digits$} ms of own work a step, the median of the others is {:.digits$} ms, over {} steps",
                s.work_ms, s.others_ms, s.steps
            )
        };
        match self {
            Event::Unwatched { after } => format!(
                "no rank has reported a step in {}: hangs are not watched for (a program reports steps over TSM_AGENT_FD)",
                time(*after)
            ),
            Event::Hang(hang) => hang.to_string(),
            Event::Resumed { idle } => format!("the job moves again, after {}", time(*idle)),
            Event::Behind {
                rank,
                step,
                others_at,
                idle,
            } => format!(
                "{} has been at step {step} for {}, while others went on to step {others_at}",
                place(*rank),
                time(*idle)
            ),
            Event::Slow(s) => {
                format!(
                    "{} is slow, {:.2} times: {}",
                    place(s.rank),
                    s.factor,
                    ms(s)
                )
            }
            Event::Recovered(s) => format!("{} is no longer slow: {}", place(s.rank), ms(s)),
        }
    }
}

impl std::fmt::Display for Hang {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (idle, limit) = (time(self.idle), time(self.limit));
        write!(
            f,
            "no rank made a step in {idle} (limit {limit}): {}",
            self.reason
        )?;
        if !self.unwatched.is_empty() {
            write!(f, "; {} no steps", report(&self.unwatched))?;
        }
        Ok(())
    }
}

fn report(ranks: &[u32]) -> String {
    let verb = if ranks.len() == 1 {
        "reports"
    } else {
        "report"
    };
    format!("{} {verb}", ranks_named(ranks))
}

/// `rank 3 is`, `ranks 0-2,7 are`.
fn names(ranks: &[u32]) -> String {
    let verb = if ranks.len() == 1 { "is" } else { "are" };
    format!("{} {verb}", ranks_named(ranks))
}

fn at(step: Option<u64>) -> String {
    step.map_or("no step yet".into(), |step| format!("step {step}"))
}

/// In whole seconds where there are any.
pub fn time(d: Duration) -> String {
    let (s, ms) = (d.as_secs(), d.subsec_millis());
    match s {
        0 => format!("{ms}ms"),
        60.. if !s.is_multiple_of(60) => format!("{}m {}s", s / 60, s % 60),
        _ => duration::format(Duration::from_secs(s)),
    }
}

#[cfg(test)]
mod tests;
