//! `safekeeper list`: the safekeepers of a cluster, and how well each is.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use pgstrata_ids::Lsn;
use pgstrata_wire::http::safekeeper::{Member, Status, Timeline};
use serde_json::{Value, json};

use super::{Key, committed, quorums, said};
use crate::services::Services;
use crate::{out, table};

/// What a safekeeper may lack and be well, in bytes.
const CLOSE: u64 = 16 << 20;

/// What a safekeeper lacks most on any timeline, in bytes.
fn behind(status: &Status, committed: &BTreeMap<Key, Lsn>) -> u64 {
    let of = |timeline: &Timeline| {
        let key = (timeline.tenant_id, timeline.timeline_id);
        let is_member = timeline.quorum.as_ref().is_none_or(|quorum| {
            let own = |member: &Member| {
                member.id == status.id && member.incarnation == status.incarnation
            };
            quorum.members.iter().chain(&quorum.incoming).any(own)
        });
        let committed = committed.get(&key).filter(|_| is_member).copied().unwrap_or_default();
        committed.saturating_sub(timeline.flush_lsn)
    };
    status.timelines.iter().map(of).max().unwrap_or_default()
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
                let behind = behind(status, &committed);
                let state = match () {
                    () if !status.damaged.is_empty() => "damaged",
                    () if behind > CLOSE => "catching-up",
                    () => "ok",
                };
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
