//! Computes of the release before, which name a timeline's members by their nodes. They are served where nothing more is known of
//! those, which is so until a compute of this release has the timeline founded.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pgstrata_ids::{Incarnation, NodeId};
use pgstrata_wire::safekeeper::RefusedReason;
use pgstrata_wire::safekeeper::version2::Greeting;

use super::deleting::refuse_deleted;
use super::{Timelines, check_parameters};
use crate::timeline::Timeline;

impl Timelines {
    /// The timeline that such a compute greets about. None is created: how it would be founded is of this release.
    pub fn greet_by_nodes(&self, greeting: &Greeting) -> Result<Arc<Timeline>, RefusedReason> {
        let parameters = &greeting.parameters;
        let timeline =
            self.get((parameters.tenant, parameters.timeline)).map_err(|reason| match reason {
                RefusedReason::UnknownTimeline => RefusedReason::Mismatch(
                    "this safekeeper has nothing of the branch, and lets no compute of an older release begin it: \
                     upgrade the compute first"
                        .to_owned(),
                ),
                other => other,
            })?;
        check_parameters(timeline.parameters(), parameters)?;
        let own = timeline.configuration();
        if own.is_known() {
            return Err(decided());
        }
        // Before that is known, others could be founding it as if it were new.
        if !self.are_undecided_noted.load(Ordering::Acquire) {
            let text = "it is not written down yet that there is a copy of the branch here: object storage has not answered";
            return Err(RefusedReason::Unavailable(text.to_owned()));
        }
        // It may never have been told here: others may be the members, whatever was founded.
        if let Some(found) =
            self.context.decisions.read((parameters.tenant, parameters.timeline))?
        {
            refuse_deleted(&found)?;
            self.take(&timeline, &found)?;
            return Err(decided());
        }
        let nodes = own.nodes();
        if nodes.len() != greeting.nodes.len()
            || !nodes.iter().all(|node| greeting.nodes.contains(node))
        {
            let nodes: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
            let text = format!(
                "the branch's members are the safekeepers {}, and no others",
                nodes.join(", ")
            );
            return Err(RefusedReason::Mismatch(text));
        }
        if !greeting.addresses.is_empty() {
            timeline.note_addresses(&greeting.addresses);
        }
        Ok(timeline)
    }

    /// Refuses to have votes counted of a safekeeper that is in another life of its directory than the one that was met.
    pub fn check_met(&self, members: &[(NodeId, Incarnation)]) -> Result<(), RefusedReason> {
        let own = self.context.shared.own;
        let is_another = |&&(node, incarnation): &&(NodeId, Incarnation)| {
            let met = match node == own.node {
                true => Some(&own.incarnation),
                false => self.context.met.get(&node),
            };
            met.is_some_and(|&met| met != incarnation)
        };
        match members.iter().find(is_another) {
            None => Ok(()),
            Some((node, _)) => Err(RefusedReason::Mismatch(format!(
                "safekeeper {node} has another directory than the one that joined: what it promised and stored is lost, and under \
                 its old id it must not vote"
            ))),
        }
    }

    /// Those of these nodes that were met by the release before.
    pub fn met(&self, nodes: &[NodeId]) -> Vec<(NodeId, Incarnation)> {
        let met = &self.context.met;
        nodes.iter().filter_map(|node| Some((*node, *met.get(node)?))).collect()
    }
}

/// What such a compute is told once it is decided who the members are.
pub fn decided() -> RefusedReason {
    RefusedReason::Mismatch(
        "a compute of a newer release has had it decided who the branch's members are, which this one does not follow: upgrade the \
         compute"
            .to_owned(),
    )
}
