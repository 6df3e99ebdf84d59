//! What those hear who have started another node by hand: the words of the job are on the first node's screen.

use super::joining::tidy;
use super::{Action, Node, State, send};
use crate::cluster::message::ToAgent;
use crate::cluster::topology::NodeId;
use crate::text::ranks_named;

/// There are not so many.
const MAX_OPTIONS: usize = 32;

impl State {
    fn is_read(&self, node: &Node) -> bool {
        self.settings.is_read && !node.local
    }

    /// `how`: behind the name of the job.
    pub(super) fn tell_joined(&self, id: NodeId, how: &str, actions: &mut Vec<Action>) {
        if self.nodes.get(&id).is_none_or(|node| !self.is_read(node)) {
            return;
        }
        let job = &self.settings.job;
        let first = self.nodes.values().find(|node| node.local);
        let first = first.map_or("another node", |node| &node.join.host);
        let (run, dir) = (&job.run_id, job.run_dir.display());
        let text = format!("joined job {run} of {first}{how}; its output is there, in {dir}");
        actions.push(send(id, ToAgent::Tell { text }));
    }

    /// What a node was started with, and does not count, is told here and there.
    pub(super) fn tell_ignored(&mut self, id: NodeId, actions: &mut Vec<Action>) {
        let Some(node) = self.nodes.get(&id) else {
            return;
        };
        let Some(text) = ignored(&node.join.options, &self.settings.job.options) else {
            return;
        };
        let notice = format!("warning: {} {text}", node.join.host);
        let is_read = self.is_read(node);
        // Also of one that comes back.
        if self.warned.insert(notice.clone()) {
            actions.push(Action::Notice(notice));
        }
        if is_read {
            let text = format!("warning: this node {text}");
            actions.push(send(id, ToAgent::Tell { text }));
        }
    }

    /// At a start: which ranks the nodes have.
    pub(super) fn tell_places(&self, actions: &mut Vec<Action>) {
        let num = self.members.len();
        for (node_rank, member) in self.members.iter().enumerate() {
            if self.nodes.get(&member.id).is_some_and(|n| self.is_read(n)) {
                let ranks: Vec<u32> = member.ranks.clone().collect();
                let again = match self.generation {
                    0 => String::new(),
                    n => format!(", start {}", n + 1),
                };
                let ranks = ranks_named(&ranks);
                let text = format!("this is node {node_rank} of {num}, with {ranks}{again}");
                let text = ToAgent::Tell { text };
                actions.push(send(member.id, text));
            }
        }
    }
}

/// `was started with --nodes 3, another --env: what the first node has counts, --nodes 2`, where it is not as there.
fn ignored(own: &[(String, String)], first: &[(String, String)]) -> Option<String> {
    let (mut given, mut counts): (Vec<String>, Vec<String>) = Default::default();
    for (flag, value) in own.iter().take(MAX_OPTIONS) {
        let there = first.iter().find(|(known, _)| known == flag);
        let there = there.map(|(_, value)| value);
        if there == Some(value) {
            continue;
        }
        // Values of variables may be secrets.
        if flag == "--env" {
            given.push("another --env".into());
            continue;
        }
        given.push(tidy(&format!("{flag} {value}")).trim_end().to_owned());
        counts.push(match there {
            Some(value) => format!("{flag} {value}"),
            None => format!("no {}", tidy(flag)),
        });
    }
    let counts = match counts.as_slice() {
        [] => String::new(),
        counts => format!(", {}", counts.join(", ")),
    };
    let given = given.join(", ");
    (!given.is_empty())
        .then(|| format!("was started with {given}: what the first node has counts{counts}"))
}
