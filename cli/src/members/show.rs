//! `quorum show`: who keeps a branch's WAL, and how far each is.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use pgstrata_ids::Lsn;
use pgstrata_wire::http::safekeeper::{Member, Quorum, Status, Timeline};
use serde_json::{Value, json};

use super::short::Safekeepers;
use super::{Key, committed, quorums, said};
use crate::services::Services;
use crate::{branch, out, table};

/// What members say of a timeline.
struct Shown {
    members: Vec<Value>,
    incoming: Vec<Value>,
    /// Members that may be lost, any of them, with nothing that is committed lost.
    safe: usize,
    /// Members that have all that is committed, and how many of them have none of it on their disks.
    whole: usize,
    away: usize,
}

/// What a member says of a timeline, and its zone; `None` if it says nothing.
fn said_of<'a>(
    member: &Member,
    key: Key,
    said: &[&'a Status],
) -> Option<(&'a Status, &'a Timeline)> {
    let is_it =
        |status: &&&Status| status.id == member.id && status.incarnation == member.incarnation;
    let status = said.iter().find(is_it)?;
    let is_key = |one: &&Timeline| (one.tenant_id, one.timeline_id) == key;
    Some((status, status.timelines.iter().find(is_key)?))
}

fn described(member: &Member, key: Key, said: &[&Status]) -> Value {
    let found = said_of(member, key, said);
    json!({
        "id": member.id, "incarnation": member.incarnation,
        "zone": found.map(|(status, _)| status.zone.clone()),
        "flush_lsn": found.map(|(_, timeline)| timeline.flush_lsn.to_string()),
        "commit_lsn": found.map(|(_, timeline)| timeline.commit_lsn.to_string()),
        "away": found.map(|(_, timeline)| timeline.away),
    })
}

impl Shown {
    /// Of what was committed up to `most`.
    fn of(quorum: &Quorum, key: Key, most: Lsn, said: &[&Status]) -> Shown {
        let rows = |group: &[Member]| group.iter().map(|one| described(one, key, said)).collect();
        let (mut whole, mut away) = (BTreeSet::new(), BTreeSet::new());
        for member in quorum.members.iter().chain(&quorum.incoming) {
            let Some((_, timeline)) = said_of(member, key, said) else { continue };
            if timeline.flush_lsn >= most {
                let name = (member.id, &member.incarnation);
                whole.insert(name);
                away.extend(timeline.away.then_some(name));
            }
        }
        Shown {
            members: rows(&quorum.members),
            incoming: rows(&quorum.incoming),
            // With one of these left, nothing is lost.
            safe: whole.len().saturating_sub(1),
            whole: whole.len(),
            away: away.len(),
        }
    }

    /// For people: where the WAL is of those who have none on their disks.
    fn line_of_away(&self) -> Option<String> {
        let Shown { whole, away, .. } = self;
        let what = match whole - away {
            0 => "no member has it on its disk",
            _ => "these are as safe as that is",
        };
        (*away > 0).then(|| {
            format!("{away} of {whole} copies are in object storage only, and not on disks of safekeepers: {what}")
        })
    }
}

/// Rows for people.
fn with_places(rows: &[Value]) -> Vec<Value> {
    let placed = |row: &Value| {
        let mut row = row.clone();
        row["wal"] = match row["away"].as_bool() {
            Some(true) => json!("object storage"),
            Some(false) => json!("disk"),
            None => Value::Null,
        };
        row
    };
    rows.iter().map(placed).collect()
}

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
    let shown = Shown::of(&quorum, key, most, &Vec::from_iter(said(&seen)));
    let all = Safekeepers::of(services, &seen);
    let warning = all.trouble(key, &quorum).map(|text| format!("branch {name}: {text}"));
    let Shown { members, incoming, safe, .. } = &shown;
    if json {
        let shown = json!({
            "number": quorum.number, "joint": !incoming.is_empty(), "members": members,
            "incoming": incoming, "safe_after_losing": safe, "warning": warning,
        });
        return out::line(&shown.to_string());
    }
    let columns = ["id", "zone", "flush_lsn", "commit_lsn", "wal"];
    out::line(&format!("configuration {}", quorum.number))?;
    table::print(&columns, &with_places(members))?;
    if !incoming.is_empty() {
        out::line("is being changed to")?;
        table::print(&columns, &with_places(incoming))?;
    }
    out::line(&format!("nothing that is committed is lost with any {safe} of them"))?;
    let lines = shown.line_of_away().into_iter();
    let mut lines = lines.chain(warning.map(|warning| format!("warning: {warning}")));
    lines.try_for_each(|line| out::line(&line))
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::{TenantId, TimelineId};

    use super::*;

    fn key() -> Key {
        (TenantId([1; 16]), TimelineId([2; 16]))
    }

    fn status(id: u64, flush_lsn: u64, away: bool) -> Status {
        let timeline = json!({
            "tenant_id": key().0.to_string(), "timeline_id": key().1.to_string(), "system_id": "1", "pg_version": 15,
            "segment_size": 16 << 20, "start_lsn": "0/8", "term": 1, "flush_lsn": Lsn(flush_lsn).to_string(),
            "commit_lsn": "0/64", "available_lsn": "0/8", "archived_lsn": "0/8", "remote_consistent_lsn": "0/8",
            "away": away,
        });
        Status {
            id,
            incarnation: id.to_string(),
            timelines: vec![serde_json::from_value(timeline).unwrap()],
            ..Default::default()
        }
    }

    #[test]
    fn copies_that_are_in_object_storage_only_are_told_from_others() {
        let member = |id: u64| Member { id, incarnation: id.to_string() };
        let quorum =
            Quorum { number: 1, members: [1, 2, 3].map(member).to_vec(), incoming: Vec::new() };
        let shown =
            |said: &[Status]| Shown::of(&quorum, key(), Lsn(100), &said.iter().collect::<Vec<_>>());
        let some = shown(&[status(1, 100, false), status(2, 100, true)]);
        assert_eq!(some.members[0]["away"], false);
        assert_eq!(some.members[1]["away"], true);
        assert_eq!(some.members[2]["away"], Value::Null);
        assert_eq!((some.safe, some.whole, some.away), (1, 2, 1));
        let line = some.line_of_away().unwrap();
        assert!(line.starts_with("1 of 2 copies are in object storage only"), "{line}");
        let places = with_places(&some.members);
        assert_eq!(
            (&places[0]["wal"], &places[1]["wal"]),
            (&json!("disk"), &json!("object storage"))
        );
        let all = shown(&[1, 2, 3].map(|id| status(id, 100, true)));
        assert!(all.line_of_away().unwrap().ends_with("no member has it on its disk"));
        // One that lacks something is no copy, wherever that is.
        let behind = shown(&[status(1, 100, false), status(2, 99, true)]);
        assert_eq!((behind.safe, behind.line_of_away()), (0, None));
    }
}
