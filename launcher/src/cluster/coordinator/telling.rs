//! What those hear who have started another node by hand: the words of the job are on the first node's screen.

use super::{Action, Node, State, send};
use crate::cluster::message::ToAgent;
use crate::cluster::topology::NodeId;
use crate::text::ranks_named;

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
