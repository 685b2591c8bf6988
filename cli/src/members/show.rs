//! `quorum show`: who keeps a branch's WAL, and how far each is.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use pgstrata_ids::Lsn;
use pgstrata_wire::http::safekeeper::Member;
use serde_json::{Value, json};

use super::short::Safekeepers;
use super::{committed, quorums, said};
use crate::services::Services;
use crate::{branch, out, table};

/// `quorum show`.
pub fn show(services: &dyn Services, name: &str, json: bool) -> Result<()> {
    let Some(row) = branch::find(services, name)? else { bail!("there is no branch '{name}'") };
    let key = (row.tenant_id, row.timeline_id);
    // They are asked at different moments: what was committed before is held by who is well.
    let most = committed(&services.safekeepers()?).remove(&key).unwrap_or_default();
    let seen = services.safekeepers()?;
    let Some(quorum) = quorums(said(&seen)).remove(&key) else {
        bail!(
            "no safekeeper that answers says who keeps the WAL of branch '{name}': it has none of its own before a \
             compute was started on it"
        );
    };
    let has = |id: u64, incarnation: &str| {
        let status = seen.iter().filter_map(|one| one.said.as_ref().ok());
        let mut its = status.filter(|said| said.id == id && said.incarnation == incarnation);
        let said = its.next()?;
        let timeline = said.timelines.iter().find(|one| (one.tenant_id, one.timeline_id) == key)?;
        Some((said.zone.clone(), timeline.flush_lsn, timeline.commit_lsn))
    };
    let mut whole = BTreeSet::new();
    let described = |member: &Member| {
        let found = has(member.id, &member.incarnation);
        let text = |lsn: Lsn| lsn.to_string();
        json!({
            "id": member.id, "incarnation": member.incarnation,
            "zone": found.as_ref().map(|found| found.0.clone()),
            "flush_lsn": found.as_ref().map(|found| text(found.1)),
            "commit_lsn": found.as_ref().map(|found| text(found.2)),
        })
    };
    for member in quorum.members.iter().chain(&quorum.incoming) {
        if has(member.id, &member.incarnation).is_some_and(|found| found.1 >= most) {
            whole.insert((member.id, member.incarnation.clone()));
        }
    }
    let members: Vec<Value> = quorum.members.iter().map(described).collect();
    let incoming: Vec<Value> = quorum.incoming.iter().map(described).collect();
    let all = Safekeepers::of(services, &seen);
    let warning = all.trouble(key, &quorum).map(|text| format!("branch {name}: {text}"));
    // With one of these left, nothing is lost.
    let safe = whole.len().saturating_sub(1);
    if json {
        let shown = json!({
            "number": quorum.number, "joint": !incoming.is_empty(), "members": members,
            "incoming": incoming, "safe_after_losing": safe, "warning": warning,
        });
        return out::line(&shown.to_string());
    }
    let columns = ["id", "zone", "flush_lsn", "commit_lsn"];
    out::line(&format!("configuration {}", quorum.number))?;
    table::print(&columns, &members)?;
    if !incoming.is_empty() {
        out::line("is being changed to")?;
        table::print(&columns, &incoming)?;
    }
    out::line(&format!("nothing that is committed is lost with any {safe} of them"))?;
    warning.map_or(Ok(()), |warning| out::line(&format!("warning: {warning}")))
}
