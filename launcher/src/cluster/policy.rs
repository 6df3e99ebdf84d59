//! Whether a job that failed is started again, when, and without which hosts. Pure: the same history gives the same
//! answer.
//!
//! What people complain about in other launchers, and the rule that answers it, in the order the rules apply:
//!
//! - Nobody asked for restarts, yet a job runs twice: without `--max-restarts` nothing is started again.
//! - A wrong config, a missing file or a model too large for the GPU is started until the budget is gone
//!   (dlrover#1068): what fails again until somebody changes something ends the job at once, with the rank's own code.
//! - A program that reports no steps is judged by rules about steps, and never started again: of one that says nothing
//!   progress is not known, so `--max-restarts` counts alone, all its starts together. Only what follows about pauses
//!   and hosts applies to it.
//! - A deterministic bug is restarted for ever, at the price of an allocation: the same failure at the same step twice
//!   ends the job with code 93, which tells a scheduler not to requeue it.
//! - Restart storms that never come to a step: [`MAX_FRUITLESS`] starts without a step end the job with code 93.
//! - A program that fails by itself before its first step is wrong, not unlucky: it is started again only when it had
//!   made progress.
//! - Long jobs use up their restarts (a fixed `--max-restarts` counts failures of a whole month): every new checkpoint
//!   refills the budget, there is no total. A job that comes to no checkpoint ends after `--max-restarts`.
//! - Restarts at once make a broken file server or network worse; waiting costs GPU hours when nothing is wrong: there
//!   is a backoff only while no progress is made. Where it is not known, a start that lasted [`LONG_START`] ends it.
//! - A restart is announced that cannot be, since too few nodes are left: the job ends with its own failure instead.
//! - The broken node is given ranks again: a host whose GPU failed is left out; one that was in the way
//!   [`MAX_INCIDENTS_OF_A_HOST`] times is, if the others suffice. A permanent blacklist starves a job
//!   (horovod#3319): a lost node may come back after [`COOLDOWN`], and who is left out is said with the reason.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;
use tsm_job::exit;

use crate::class::{Again, Class};

/// Starts in a row that made no progress, after which there is no other.
pub const MAX_FRUITLESS: usize = 3;
/// Incidents of one host among the last [`RECENT`] after which it is left out if possible.
pub const MAX_INCIDENTS_OF_A_HOST: usize = 2;
/// How many of the last incidents are held against a host.
pub const RECENT: usize = 10;
/// How long a lost node is not given ranks when it comes back.
pub const COOLDOWN: Duration = Duration::from_secs(60);
/// After a start of a program that reports no steps that lasted so long, the pauses begin anew.
pub const LONG_START: Duration = Duration::from_secs(10 * 60);

/// What the user allows.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Restarts without a new checkpoint between them.
    pub max_restarts: u32,
    pub first_backoff: Duration,
    pub longest_backoff: Duration,
    /// Of the jitter: different for each job, so that jobs that failed together do not come back together.
    pub seed: u64,
    /// The step that the first start continued from.
    pub resumed_at: Option<u64>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            max_restarts: 0,
            first_backoff: Duration::from_secs(1),
            longest_backoff: Duration::from_secs(60),
            seed: 0,
            resumed_at: None,
        }
    }
}

/// The end of one start of the ranks. The n-th of a job's history ended its n-th start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Incident {
    /// When, since the launcher started.
    pub at: Duration,
    /// How long its start had lasted.
    pub ran: Duration,
    pub class: Class,
    pub again: Again,
    /// By what it is compared with others, see [`crate::class::signature`].
    pub signature: String,
    /// The line that tells, as it was: what people are shown.
    pub evidence: String,
    /// The host to blame.
    pub host: Option<String>,
    /// Which of the agents of that host, where it has several.
    #[serde(default)]
    pub agent: u32,
    /// The rank to blame.
    pub rank: Option<u32>,
    /// The workers talk to the launcher: where they reported no step, there was none.
    #[serde(default)]
    pub tells: bool,
    /// Last finished step of the job.
    pub step: Option<u64>,
    /// Step of the newest complete checkpoint, from which the next start continues.
    pub checkpoint_step: Option<u64>,
}

impl Incident {
    /// Its class, with the line that tells. What ranks that hang had said last tells nothing.
    fn what(&self) -> String {
        match self.class {
            Class::Hang => self.class.to_string(),
            class => format!("{class}: {}", self.evidence),
        }
    }
}

impl fmt::Display for Incident {
    /// `rank 3 on gpu-01 at step 66: killed from outside: signal 9 (SIGKILL)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.rank, &self.host) {
            (Some(rank), Some(host)) => write!(f, "rank {rank} on {host}")?,
            (Some(rank), None) => write!(f, "rank {rank}")?,
            (None, Some(host)) => write!(f, "node {host}")?,
            (None, None) => write!(f, "the job")?,
        }
        if let Some(step) = self.step {
            write!(f, " at step {step}")?;
        }
        write!(f, ": {}", self.what())
    }
}

/// The answer to an incident.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Verdict {
    Restart {
        after: Duration,
        /// All hosts to leave out from now on, also for earlier incidents.
        leave_out: Vec<LeftOut>,
        why: String,
    },
    Stop {
        code: StopCode,
        why: String,
    },
}

/// A host that is not given ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeftOut {
    pub host: String,
    /// Only this of its agents; `None`: the whole machine.
    pub agent: Option<u32>,
    /// It cannot run the job. Otherwise it is used all the same where the others do not suffice.
    pub must: bool,
    /// Since the launcher started; `None`: to the end of the job.
    pub until: Option<Duration>,
    pub why: String,
}

impl LeftOut {
    pub fn covers(&self, host: &str, agent: u32) -> bool {
        self.host == host && self.agent.is_none_or(|own| own == agent)
    }

    pub fn is_over(&self, now: Duration) -> bool {
        self.until.is_some_and(|until| now >= until)
    }

    /// Whether it says the same as `other`, if perhaps with another reason.
    pub fn repeats(&self, other: &LeftOut) -> bool {
        (&self.host, self.agent, self.must, self.until)
            == (&other.host, other.agent, other.must, other.until)
    }
}

/// With what code a job ends that is not started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopCode {
    KeepOwn,
    /// [`exit::DO_NOT_REQUEUE`].
    DoNotRequeue,
}

impl StopCode {
    /// The launcher's exit code; `own` is that of the rank that failed first.
    pub fn exit_code(self, own: i32) -> i32 {
        match self {
            StopCode::KeepOwn => own,
            StopCode::DoNotRequeue => exit::DO_NOT_REQUEUE,
        }
    }
}

/// The nodes that a start can have, where no other may join.
#[derive(Clone, Debug, PartialEq)]
pub struct Stock {
    /// Host, and which of its agents.
    pub nodes: Vec<(String, u32)>,
    /// So many does a start need.
    pub needed: usize,
}

impl Stock {
    /// Why they do not suffice without those that cannot run the job.
    fn lacks(&self, left_out: &[LeftOut]) -> Option<String> {
        let is_out = |host: &str, agent| left_out.iter().any(|l| l.must && l.covers(host, agent));
        let nodes = self.nodes.iter();
        let fit = nodes.filter(|(host, agent)| !is_out(host, *agent)).count();
        match (fit, self.needed) {
            (fit, needed) if fit >= needed => None,
            (0, 1) => Some("there is no other node to start it on".into()),
            (fit, needed) => Some(format!(
                "a start needs {needed} nodes, and has {fit} without the one that failed"
            )),
        }
    }
}

/// What to do about `incident`, which came after all of `earlier`, each of which was answered by a restart. `stock`:
/// `None` where other nodes may still join.
pub fn decide(
    options: &Options,
    stock: Option<&Stock>,
    earlier: &[Incident],
    incident: &Incident,
) -> Verdict {
    let history: Vec<&Incident> = earlier.iter().chain([incident]).collect();
    let starts = Starts { options, history };
    let known = starts.progress_is_known();
    let last = starts.history.len() - 1;
    let progress = starts.made_progress(last);
    let fruitless = starts.fruitless();
    let keep = |why: String| Verdict::Stop {
        code: StopCode::KeepOwn,
        why,
    };
    let give_up = |why: String| Verdict::Stop {
        code: StopCode::DoNotRequeue,
        why,
    };
    if options.max_restarts == 0 {
        return keep("no restart is allowed (--max-restarts 0)".into());
    }
    if incident.again == Again::Fails {
        return keep(format!(
            "{}: starting again fails again until this is changed",
            incident.class
        ));
    }
    if known && starts.seen_before() {
        return give_up(match incident.step {
            Some(step) => format!("the same failure at step {step} twice: {}", incident.what()),
            None => format!(
                "the same failure before the first step twice: {}",
                incident.what()
            ),
        });
    }
    if known && fruitless >= MAX_FRUITLESS {
        return give_up(format!("{fruitless} starts in a row made no progress"));
    }
    if known && incident.class == Class::Program && !progress {
        return keep(
            "the program failed by itself and had made no progress since its start".into(),
        );
    }
    let left = starts.restarts_left();
    if left == 0 {
        let all = options.max_restarts;
        return keep(match known {
            true => {
                format!(
                    "all {all} restarts since the last new checkpoint are used (--max-restarts)"
                )
            }
            false => format!(
                "all {all} restarts are used (--max-restarts), which count alone since the program reports no steps"
            ),
        });
    }
    let leave_out = starts.left_out();
    if let Some(lacks) = stock.and_then(|stock| stock.lacks(&leave_out)) {
        return keep(format!("{}: {lacks}", incident.class));
    }
    let after = match fruitless {
        0 => Duration::ZERO,
        n => backoff(options, n as u32 - 1),
    };
    let why = match fruitless {
        _ if !known => format!(
            "{}; the program reports no steps, so --max-restarts counts alone, after a pause of {:.1} s",
            incident.class,
            after.as_secs_f64()
        ),
        0 => format!(
            "{}, and progress was made since the last start",
            incident.class
        ),
        _ => format!(
            "{}, without progress: a pause of {:.1} s",
            incident.class,
            after.as_secs_f64()
        ),
    };
    Verdict::Restart {
        after,
        leave_out,
        why: format!("{why}; restarts left: {}", left - 1),
    }
}

/// The pause before the next start when `attempt` starts before it made no progress: doubles up to the longest, plus up
/// to a quarter that depends on the seed.
pub fn backoff(options: &Options, attempt: u32) -> Duration {
    let pause = options
        .first_backoff
        .saturating_mul(2u32.saturating_pow(attempt));
    let jitter = pause
        .checked_mul(random(options.seed, attempt) % 251)
        .unwrap_or(Duration::MAX)
        / 1000;
    pause.saturating_add(jitter).min(options.longest_backoff)
}

/// SplitMix64: spread over all values for neighbouring arguments.
fn random(seed: u64, attempt: u32) -> u32 {
    let mut x = seed.wrapping_add((u64::from(attempt) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) >> 32) as u32
}

/// A job's starts so far, each with the incident that ended it.
struct Starts<'a> {
    options: &'a Options,
    /// Not empty.
    history: Vec<&'a Incident>,
}

impl Starts<'_> {
    /// The checkpoint that start `i` continued from.
    fn resumed_at(&self, i: usize) -> Option<u64> {
        match i.checked_sub(1) {
            Some(before) => self.history[before]
                .checkpoint_step
                .max(self.options.resumed_at),
            None => self.options.resumed_at,
        }
    }

    /// Whether any of the starts told how far it came.
    fn progress_is_known(&self) -> bool {
        self.history.iter().any(|h| h.tells || h.step.is_some())
    }

    /// Whether start `i` came further than where it started, as far as is known.
    fn made_progress(&self, i: usize) -> bool {
        match self.history[i].step {
            Some(step) => step > self.resumed_at(i).unwrap_or(0),
            None => !self.progress_is_known() && self.history[i].ran >= LONG_START,
        }
    }

    /// Whether a checkpoint was made in start `i`.
    fn made_checkpoint(&self, i: usize) -> bool {
        let from = self.resumed_at(i).unwrap_or(0);
        self.history[i]
            .checkpoint_step
            .is_some_and(|step| step > from)
    }

    /// Starts without progress, the last one backwards.
    fn fruitless(&self) -> usize {
        let backwards = (0..self.history.len()).rev();
        backwards.take_while(|&i| !self.made_progress(i)).count()
    }

    /// Whether the last incident repeats one before it. Broken hardware, machines that cannot prepare a worker, and lost
    /// nodes are no failure of the job.
    fn seen_before(&self) -> bool {
        let Some((last, before)) = self.history.split_last() else {
            return false;
        };
        if matches!(
            last.class,
            Class::Hardware | Class::Machine | Class::NodeLost
        ) {
            return false;
        }
        let same =
            |earlier: &&Incident| earlier.step == last.step && earlier.signature == last.signature;
        before.iter().any(same)
    }

    /// Restarts that may still be made, the next one included.
    fn restarts_left(&self) -> u32 {
        let full = self.options.max_restarts;
        let last = self.history.len() - 1;
        (0..=last).fold(full, |left, i| {
            let left = if self.made_checkpoint(i) { full } else { left };
            // Every incident but the last was answered by a restart.
            if i < last {
                left.saturating_sub(1)
            } else {
                left
            }
        })
    }

    fn left_out(&self) -> Vec<LeftOut> {
        let nodes = self.history.iter();
        let mut nodes: Vec<(&str, u32)> = nodes
            .filter_map(|h| Some((h.host.as_deref()?, h.agent)))
            .collect();
        nodes.sort_unstable();
        nodes.dedup();
        let mut all: Vec<LeftOut> = Vec::new();
        for (host, agent) in nodes {
            let known = all.iter().any(|l| l.covers(host, agent));
            all.extend(self.against(host, agent).filter(|_| !known));
        }
        all
    }

    /// Why to leave out an agent, or its machine.
    fn against(&self, host: &str, agent: u32) -> Option<LeftOut> {
        let of_host = |incident: &&&Incident| incident.host.as_deref() == Some(host);
        let left_out = |agent, must, until, why| LeftOut {
            host: host.into(),
            agent,
            must,
            until,
            why,
        };
        let unfit = |i: &&&Incident| i.again == Again::Elsewhere && i.class != Class::NodeLost;
        if let Some(unfit) = self.history.iter().filter(of_host).find(unfit) {
            return Some(left_out(None, true, None, unfit.what()));
        }
        let recent = &self.history[self.history.len().saturating_sub(RECENT)..];
        let suspect = |i: &&&Incident| {
            matches!(
                i.class,
                Class::Killed
                    | Class::Network
                    | Class::Hang
                    | Class::NodeLost
                    | Class::Unknown
                    | Class::Hardware
                    | Class::Machine
            ) && !is_none_of_its_doing(i)
        };
        let own = recent.iter().filter(of_host).filter(|i| i.agent == agent);
        let incidents: Vec<_> = own.filter(suspect).collect();
        let last = incidents.last()?;
        if incidents.len() >= MAX_INCIDENTS_OF_A_HOST {
            let why = format!(
                "{} of the last {} failures began there, the last: {}",
                incidents.len(),
                recent.len(),
                last.what()
            );
            return Some(left_out(Some(agent), false, None, why));
        }
        let until = last.at + COOLDOWN;
        let now = self.history.last().map_or(Duration::ZERO, |h| h.at);
        (last.class == Class::NodeLost && now < until)
            .then(|| left_out(Some(agent), false, Some(until), last.what()))
    }
}

/// A node that gave the coordinator up, which did not run.
fn is_none_of_its_doing(incident: &Incident) -> bool {
    incident.class == Class::NodeLost && incident.again == Again::MayWork
}

#[cfg(test)]
mod tests;
