//! Which node gets which ranks. Pure.

use std::ops::Range;

/// Number of a connection; never used twice in a job.
pub type NodeId = u64;

/// A node that can take ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    pub id: NodeId,
    /// Place that a scheduler gave it; those without one come after, as they joined.
    pub order: Option<u32>,
    /// Workers it can run.
    pub num_ranks: u32,
}

/// One node of a generation, by node rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    pub id: NodeId,
    pub ranks: Range<u32>,
}

/// Chooses at most `max` of `candidates`, which stand in the order in which they joined.
///
/// Nodes of `before` that are still there keep their place, so that ranks stay where they were; places that
/// became free go to new nodes; what is left free is closed.
pub fn assign(before: &[NodeId], candidates: &[Candidate], max: u32) -> Vec<Member> {
    let known = |id: NodeId| candidates.iter().find(|c| c.id == id);
    let mut new: Vec<&Candidate> = candidates
        .iter()
        .filter(|c| !before.contains(&c.id))
        .collect();
    new.sort_by_key(|c| c.order.unwrap_or(u32::MAX));
    let mut new = new.into_iter();
    let mut places: Vec<Option<&Candidate>> = before.iter().map(|&id| known(id)).collect();
    for place in &mut places {
        if place.is_none() {
            *place = new.next();
        }
    }
    let chosen = places.into_iter().flatten().chain(new).take(max as usize);
    let mut next = 0;
    chosen
        .map(|c| {
            let first = next;
            next += c.num_ranks;
            Member {
                id: c.id,
                ranks: first..next,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(id: NodeId, order: Option<u32>, num_ranks: u32) -> Candidate {
        Candidate {
            id,
            order,
            num_ranks,
        }
    }

    fn ids(members: &[Member]) -> Vec<NodeId> {
        members.iter().map(|m| m.id).collect()
    }

    #[test]
    fn the_scheduler_s_order_counts_before_the_order_of_joining() {
        let nodes = [
            candidate(1, Some(2), 4),
            candidate(2, Some(0), 4),
            candidate(3, None, 2),
            candidate(4, Some(1), 4),
        ];
        let members = assign(&[], &nodes, 4);
        assert_eq!(ids(&members), [2, 4, 1, 3]);
        assert_eq!(members[3].ranks, 12..14);
    }

    #[test]
    fn a_spare_takes_the_place_of_the_lost_node() {
        let nodes = [
            candidate(1, None, 2),
            candidate(3, None, 2),
            candidate(9, None, 2),
        ];
        assert_eq!(ids(&assign(&[1, 2, 3], &nodes, 3)), [1, 9, 3]);
        assert_eq!(ids(&assign(&[1, 2, 3], &nodes[..2], 3)), [1, 3]);
    }

    proptest! {
        #[test]
        fn ranks_are_complete_and_survivors_never_overtake(
            before in proptest::collection::vec(0u64..12, 0..6),
            present in proptest::collection::btree_set(0u64..12, 0..12),
            max in 1u32..8,
            num_ranks in 1u32..5,
        ) {
            let mut before = before;
            before.dedup();
            before.sort_unstable();
            before.dedup();
            let nodes: Vec<_> = present.iter().map(|&id| candidate(id, None, num_ranks)).collect();
            let members = assign(&before, &nodes, max);
            prop_assert_eq!(members.len(), nodes.len().min(max as usize));
            let ranks: Vec<u32> = members.iter().flat_map(|m| m.ranks.clone()).collect();
            prop_assert_eq!(ranks, (0..members.len() as u32 * num_ranks).collect::<Vec<_>>());
            // Where no node was lost, everybody keeps their ranks.
            if before.iter().all(|id| present.contains(id)) {
                let kept = before.len().min(max as usize);
                prop_assert_eq!(&ids(&members)[..kept], &before[..kept]);
            }
        }
    }
}
