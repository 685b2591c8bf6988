//! Which life of their directories the members are in: one that lost its directory has forgotten
//! what it promised, and must not be counted under its old id.

use std::collections::BTreeMap;

use pgstrata_ids::{Incarnation, NodeId};
use pgstrata_wire::safekeeper::GreetingReply;

/// See the module.
#[derive(Debug, Default)]
pub struct Incarnations {
    /// What members say of themselves, the first time that we meet them.
    met: BTreeMap<NodeId, Incarnation>,
    /// What other members have kept, which counts for more.
    vouched: BTreeMap<NodeId, Incarnation>,
}

impl Incarnations {
    /// Takes note of an answer. Returns who is known not to be who it was: of those met, and the
    /// one that answers.
    pub fn meet(&mut self, reply: &GreetingReply) -> Vec<NodeId> {
        for &(node, incarnation) in &reply.known {
            if node != reply.node {
                self.vouched.entry(node).or_insert(incarnation);
            }
        }
        let first = *self.met.entry(reply.node).or_insert(reply.incarnation);
        let vouched = |node: &NodeId, own: &Incarnation| {
            self.vouched.get(node).is_none_or(|known| known == own)
        };
        let mut strange: Vec<NodeId> = self
            .met
            .iter()
            .filter(|(node, own)| !vouched(node, own))
            .map(|(node, _)| *node)
            .collect();
        let changed = first != reply.incarnation || !vouched(&reply.node, &reply.incarnation);
        if changed && !strange.contains(&reply.node) {
            strange.push(reply.node);
        }
        for node in &strange {
            // What it says of itself is worth nothing; if its directory comes back, it is met anew.
            if self.vouched.contains_key(node) {
                self.met.remove(node);
            }
        }
        strange
    }

    /// Those whose votes and acknowledgements are counted.
    pub fn counted(&self) -> Vec<(NodeId, Incarnation)> {
        self.met.iter().map(|(&node, &incarnation)| (node, incarnation)).collect()
    }
}

/// What is wrong with such a member.
pub fn describe(node: NodeId) -> String {
    format!(
        "safekeeper {node} has another directory than the one that joined: what it promised and \
         stored is lost, and under its old id it must not vote"
    )
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::{Lsn, Term};

    use super::*;

    fn reply(node: u64, life: u8, known: &[(u64, u8)]) -> GreetingReply {
        let incarnation = |life: u8| Incarnation([life; 16]);
        GreetingReply {
            node: NodeId(node),
            incarnation: incarnation(life),
            known: known.iter().map(|&(node, life)| (NodeId(node), incarnation(life))).collect(),
            term: Term(0),
            flush_lsn: Lsn(0),
            commit_lsn: Lsn(0),
        }
    }

    #[test]
    fn l10_who_forgot_is_not_counted() {
        let mut members = Incarnations::default();
        assert_eq!(members.meet(&reply(1, 7, &[])), []);
        assert_eq!(members.meet(&reply(2, 2, &[])), []);
        // It came back with another directory while we run.
        assert_eq!(members.meet(&reply(1, 8, &[])), [NodeId(1)]);
        assert_eq!(members.meet(&reply(1, 7, &[])), []);
        // The third knows the second of another time: it had been let in by mistake.
        assert_eq!(members.meet(&reply(3, 3, &[(1, 7), (2, 1)])), [NodeId(2)]);
        assert_eq!(members.meet(&reply(2, 2, &[])), [NodeId(2)]);
        assert_eq!(members.counted().len(), 2);
        assert_eq!(members.meet(&reply(2, 1, &[])), []);
        assert_eq!(members.counted().len(), 3);
    }
}
