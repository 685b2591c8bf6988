//! `safekeeper list`: the safekeepers of a cluster, and how well each is.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use pgstrata_ids::Lsn;
use pgstrata_wire::http::safekeeper::{Member, Quorum, Status, Timeline};
use serde_json::{Value, json};

use super::{Key, committed, quorums, said};
use crate::services::Services;
use crate::{out, table};

/// What a safekeeper may lack and be well, in bytes.
const CLOSE: u64 = 16 << 20;

/// Who the members are of each timeline.
type Quorums = BTreeMap<Key, Quorum>;

fn is_in(group: &[Member], status: &Status) -> bool {
    let mut own = group.iter().filter(|member| member.id == status.id);
    own.any(|member| member.incarnation == status.incarnation)
}

/// Whether it is a member, or about to be one.
fn is_member(quorum: &Quorum, status: &Status) -> bool {
    is_in(&quorum.members, status) || is_in(&quorum.incoming, status)
}

/// What a safekeeper lacks most on any timeline that it is a member of, in bytes.
fn behind(status: &Status, committed: &BTreeMap<Key, Lsn>, quorums: &Quorums) -> u64 {
    let of = |timeline: &Timeline| {
        let key = (timeline.tenant_id, timeline.timeline_id);
        let counts = quorums.get(&key).is_none_or(|quorum| is_member(quorum, status));
        let committed = committed.get(&key).filter(|_| counts).copied().unwrap_or_default();
        committed.saturating_sub(timeline.flush_lsn)
    };
    status.timelines.iter().map(of).max().unwrap_or_default()
}

/// Whether a change is under way after which it is no member of some timeline.
fn is_leaving(status: &Status, quorums: &Quorums) -> bool {
    let leaves = |quorum: &Quorum| {
        let is_changed = !quorum.incoming.is_empty();
        is_changed && is_in(&quorum.members, status) && !is_in(&quorum.incoming, status)
    };
    quorums.values().any(leaves)
}

/// Whether it was a member, as what it has shows, and is one of nothing any more. One that never was is there to be made one.
fn has_left(status: &Status, quorums: &Quorums) -> bool {
    let served = status.timelines.iter().map(|one| (one.tenant_id, one.timeline_id));
    let damaged = status.damaged.iter().map(|one| (one.tenant_id, one.timeline_id));
    let mut copies = served.chain(damaged);
    let has_copy = copies.any(|key| quorums.contains_key(&key));
    has_copy && !quorums.values().any(|quorum| is_member(quorum, status))
}

/// How it is, in a word.
fn state(status: &Status, behind: u64, quorums: &Quorums) -> &'static str {
    match () {
        // What it has is nobody's concern then, right or damaged.
        () if has_left(status, quorums) => "retired",
        () if !status.damaged.is_empty() => "damaged",
        () if is_leaving(status, quorums) => "draining",
        () if behind > CLOSE => "catching-up",
        () => "ok",
    }
}

/// `safekeeper list`.
pub fn list(services: &dyn Services, json: bool) -> Result<()> {
    let seen = services.safekeepers()?;
    let committed = committed(&seen);
    let quorums = quorums(said(&seen));
    let mut rows: Vec<Value> = seen
        .iter()
        .map(|one| match &one.said {
            Ok(status) => {
                let behind = behind(status, &committed, &quorums);
                let state = state(status, behind, &quorums);
                json!({
                    "id": one.node.0, "incarnation": status.incarnation, "zone": status.zone,
                    "address": one.address, "state": state, "timelines": status.timelines.len(),
                    "behind_bytes": behind, "free_bytes": status.free_bytes,
                })
            }
            Err(_) => gone(one.node.0, Some(&one.address)),
        })
        .collect();
    // Who is a member, and of whom nobody has heard lately.
    let listed: BTreeSet<u64> = seen.iter().map(|one| one.node.0).collect();
    let members = quorums.values().flat_map(|quorum| quorum.members.iter().chain(&quorum.incoming));
    let missing: BTreeSet<u64> =
        members.map(|member| member.id).filter(|id| !listed.contains(id)).collect();
    rows.extend(missing.into_iter().map(|id| gone(id, None)));
    let columns = ["id", "zone", "address", "state", "timelines", "behind_bytes", "free_bytes"];
    match json {
        true => out::line(&Value::Array(rows).to_string()),
        false => table::print(&columns, &rows),
    }
}

fn gone(id: u64, address: Option<&str>) -> Value {
    json!({
        "id": id, "incarnation": null, "zone": null, "address": address, "state": "gone",
        "timelines": null, "behind_bytes": null, "free_bytes": null,
    })
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::{TenantId, TimelineId};
    use pgstrata_wire::http::safekeeper::Damaged;

    use super::*;

    fn key(number: u8) -> Key {
        (TenantId([1; 16]), TimelineId([number; 16]))
    }

    /// Members are in the life of their ids.
    fn quorum(members: &[u64], incoming: &[u64]) -> Quorum {
        let group = |ids: &[u64]| {
            ids.iter().map(|&id| Member { id, incarnation: id.to_string() }).collect()
        };
        Quorum { number: 1, members: group(members), incoming: group(incoming) }
    }

    /// The third, which has copies of these.
    fn third(copies: &[u8]) -> Status {
        let damaged = copies.iter().map(|&number| {
            let ((tenant_id, timeline_id), error) = (key(number), String::new());
            Damaged { tenant_id, timeline_id, error, mending: false, kept: false }
        });
        let (id, incarnation) = (3, "3".to_owned());
        Status { id, incarnation, damaged: damaged.collect(), ..Default::default() }
    }

    #[test]
    fn who_leaves_and_who_has_left_is_told() {
        let state = |status: &Status, all: &[Quorum]| {
            let keyed = all.iter().enumerate();
            let quorums = keyed.map(|(number, one)| (key(number as u8), one.clone())).collect();
            super::state(status, 0, &quorums)
        };
        let (whole, leaving) = (quorum(&[1, 2, 3], &[]), quorum(&[1, 2, 3], &[1, 2, 4]));
        let left = quorum(&[1, 2, 4], &[]);
        assert_eq!(state(&third(&[]), std::slice::from_ref(&whole)), "ok");
        assert_eq!(state(&third(&[]), &[whole.clone(), leaving.clone()]), "draining");
        assert_eq!(state(&third(&[0, 1]), &[left.clone(), leaving.clone()]), "damaged");
        // Another one comes, and it stays.
        assert_eq!(state(&third(&[]), &[quorum(&[1, 2, 3], &[1, 2, 3, 4])]), "ok");
        assert_eq!(state(&third(&[0]), &[left.clone(), left.clone()]), "retired");
        assert_eq!(state(&third(&[0]), &[left.clone(), whole]), "damaged");
        // It waits to be made a member, or is about to become one.
        assert_eq!(state(&third(&[]), std::slice::from_ref(&left)), "ok");
        assert_eq!(state(&third(&[]), &[quorum(&[1, 2, 4], &[1, 2, 3])]), "ok");
        // What it has is of nobody who tells of it.
        assert_eq!(state(&third(&[7]), &[left]), "damaged");
        // In another life of its directory it is another member, which leaves here.
        let mut reborn = third(&[]);
        reborn.incarnation = "4".to_owned();
        assert_eq!(state(&reborn, &[leaving]), "ok");
    }
}
