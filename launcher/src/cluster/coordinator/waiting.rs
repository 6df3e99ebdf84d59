//! Whom the job waits for: the user hears it before long, and by name where the hosts are known.

use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tsm_job::config::duration::format;

use super::{Action, State, nodes, record};
use crate::text::few;

/// When to tell what is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Of a line that somebody else's shell wrote.
const MAX_LINE: usize = 200;
/// A loss belongs to the end of a starter that is no further away: SLURM takes its time to end the tasks of an srun.
const TOGETHER: Duration = Duration::from_secs(10);
/// Hosts of which such a line is shown.
const SHOWN: usize = 8;

#[derive(Clone, Debug)]
pub(super) struct Waiting {
    /// `None`: it was told.
    tell_at: Option<Duration>,
    /// By host: the last words on the way to its agent.
    words: BTreeMap<String, String>,
    /// Starters that were killed: whose, the words for it, and when.
    killed: Vec<(String, String, Duration)>,
}

impl Waiting {
    pub fn begin(now: Duration) -> Waiting {
        Waiting {
            tell_at: Some(now + PATIENCE),
            words: BTreeMap::new(),
            killed: Vec::new(),
        }
    }

    /// Nodes are waited for once more.
    pub fn again(&mut self, now: Duration) {
        self.tell_at = Some(now + PATIENCE);
    }

    /// When it is time for [`State::tell_waiting`].
    pub fn tell_at(&self) -> Option<Duration> {
        self.tell_at
    }

    /// Said on the way to the agent of `host`, by a remote shell for example.
    pub fn heard(&mut self, host: String, line: &str) {
        let shown = line.chars().filter(|c| !c.is_control()).take(MAX_LINE);
        let line: String = shown.collect();
        if !line.trim().is_empty() {
            self.words.insert(host, line);
        }
    }

    /// The agent of `host` is there, and speaks for itself.
    pub fn arrived(&mut self, host: &str) {
        self.words.remove(host);
        self.killed.retain(|(of, ..)| of != host);
    }
}

impl State {
    /// Says for how many nodes the job waits, and for which.
    pub(super) fn tell_waiting(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.waiting.tell_at = None;
        let here = self.candidates(now).len() as u32;
        let missing = self.settings.min_nodes.saturating_sub(here);
        if missing == 0 {
            return;
        }
        let hosts = self.missing_hosts();
        actions.push(record(
            "waiting",
            json!({"for_nodes": missing, "hosts": hosts}),
        ));
        let (missing, join) = (nodes(missing as usize), format(self.settings.join));
        let mut text = format!("waiting up to {join} for {missing} to join");
        if let Some(who) = self.name_missing() {
            text = format!("{text}; {who}");
        }
        actions.push(Action::Notice(text));
    }

    /// It may come before the loss of the agents that it held, or after.
    pub(super) fn starter_killed(&mut self, host: String, killed: String, now: Duration) {
        for lost in &mut self.lost {
            if holds(&self.settings.hosts, &host, &lost.host) && now < lost.at + TOGETHER {
                lost.how = format!("{}, and {killed}", lost.how);
            }
        }
        self.waiting.killed.push((host, killed, now));
    }

    /// How the connection to an agent of `host` ended, where what held it was killed just before.
    pub(super) fn why_lost(&self, host: &str, how: &str, now: Duration) -> String {
        let mut killed = self.waiting.killed.iter().rev();
        match killed
            .find(|(of, _, at)| holds(&self.settings.hosts, of, host) && now < *at + TOGETHER)
        {
            Some((_, killed, _)) => format!("{how}, and {killed}"),
            None => how.into(),
        }
    }

    fn missing_hosts(&self) -> Vec<&str> {
        let here: BTreeSet<&str> = self.nodes.values().map(|n| n.join.host.as_str()).collect();
        let hosts = self.settings.hosts.iter().map(String::as_str);
        hosts.filter(|host| !here.contains(host)).collect()
    }

    /// `missing: b`, with the last words on the way to it; `None` where nobody knows who should come.
    pub(super) fn name_missing(&self) -> Option<String> {
        let missing = self.missing_hosts();
        if missing.is_empty() {
            return None;
        }
        let said = |host: &&str| {
            let line = self.waiting.words.get(*host)?;
            Some(format!("\n  heard from {host} so far: {line}"))
        };
        let words: String = missing.iter().filter_map(said).take(SHOWN).collect();
        Some(format!("missing: {}{words}", few(&missing)))
    }
}

/// Whether the starter of this name holds the agent of `host`: it is called after its host, or holds all.
fn holds(hosts: &[String], starter: &str, host: &str) -> bool {
    starter == host || !hosts.iter().any(|h| h == starter)
}
