//! `wal verify --all`: each copy of each branch's WAL, how far it is right, and where it is damaged.
//!
//! What a safekeeper has is read from it, which checks it once more. What it has in its cache it does not read from its disk for
//! this: that is what its scrub does, in its own time.

use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use pgstrata_compute_shim::proposer::SafekeeperClient;
use pgstrata_ids::{Lsn, Term};
use pgstrata_pg_wal::{PgVersion, WalChecker};
use pgstrata_wire::http::pageserver::Branch;
use pgstrata_wire::http::safekeeper::Status;
use serde_json::{Value, json};

use crate::branch;
use crate::cluster_file::Archive;
use crate::members::Seen;
use crate::services::{Services, WalPlaces};
use crate::table;
use crate::wal::{fetch_object, object_name, tail_name, unpack, unpack_tail};

const TIMEOUT: Duration = Duration::from_secs(30);

/// WAL asked for at once.
const PIECE: u64 = 1 << 20;

/// How a copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// All that is committed and kept there is right.
    Ok,
    /// Something is wrong or missing.
    Damaged,
    /// It can't be told.
    Unreachable,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    branch: String,
    place: String,
    /// See there.
    pub state: State,
    /// First byte that is there.
    from: Option<Lsn>,
    /// Everything from there to here is right.
    to: Option<Lsn>,
    why: Option<String>,
}

impl Copy {
    fn value(&self) -> Value {
        let state = match self.state {
            State::Ok => "ok",
            State::Damaged => "damaged",
            State::Unreachable => "unreachable",
        };
        let lsn = |lsn: Option<Lsn>| lsn.map(|lsn| lsn.to_string());
        json!({
            "branch": self.branch, "copy": self.place, "state": state,
            "from": lsn(self.from), "ok_to": lsn(self.to), "reason": self.why,
        })
    }
}

/// Prints them.
pub fn write(copies: &[Copy], as_json: bool, out: &mut impl Write) -> std::io::Result<()> {
    let rows: Vec<Value> = copies.iter().map(Copy::value).collect();
    if as_json {
        return writeln!(out, "{}", Value::Array(rows));
    }
    let columns = ["branch", "copy", "state", "from", "ok_to", "reason"];
    table::lines(&columns, &rows).iter().try_for_each(|line| writeln!(out, "{line}"))
}

/// Reads all of them, of one branch or of all.
pub fn look(services: &dyn Services, only: Option<&str>) -> Result<Vec<Copy>> {
    let mut branches = branch::rows(services)?;
    if let Some(name) = only {
        branches.retain(|row| row.name == name);
        if branches.is_empty() {
            // It says what is wrong with the name.
            branches.push(branch::get(services, name)?);
        }
    }
    let places = services.wal_places()?;
    let mut copies = Vec::new();
    for row in branches {
        let seen = services.safekeepers()?;
        let row = match row.is_read() {
            true => row,
            false => {
                let told = told_by_safekeepers(&row, &seen);
                copies.push(not_served(&row, told.is_some()));
                let Some(told) = told else { continue };
                told
            }
        };
        for one in &seen {
            copies.extend(of_safekeeper(&row, one, &places));
        }
        if let Some(archive) = &places.archive {
            copies.extend(of_archive(&row, &seen, archive));
        }
    }
    Ok(copies)
}

/// What the page server's copy is said to be, where it does not serve the branch.
fn not_served(row: &Branch, is_told: bool) -> Copy {
    let failure = row.failure.as_deref().unwrap_or("the page server does not say why");
    let unchecked = match is_told {
        true => "",
        false => "; no safekeeper that answers has it, so that none of its copies was checked",
    };
    let why = format!("the branch is not served: {failure}{unchecked}");
    copy(row, "page server".to_owned(), None, Ended::unreachable(None, &why))
}

/// A branch that the page server does not serve, whose row is empty, with what its WAL is read by, as safekeepers know it.
/// `None` if none says.
fn told_by_safekeepers(row: &Branch, seen: &[Seen]) -> Option<Branch> {
    let statuses = seen.iter().filter_map(|one| one.said.as_ref().ok());
    let timelines = statuses.flat_map(|status| &status.timelines);
    let mut own = timelines
        .filter(|one| (one.tenant_id, one.timeline_id) == (row.tenant_id, row.timeline_id));
    // What is no size of segments is nothing to count in.
    let told = own.find(|one| one.segment_size.is_power_of_two() && one.start_lsn.is_valid())?;
    Some(Branch {
        start_lsn: told.start_lsn,
        pg_version: told.pg_version,
        segment_size: u64::from(told.segment_size),
        ..row.clone()
    })
}

/// What a check ended with.
struct Ended {
    to: Option<Lsn>,
    state: State,
    why: Option<String>,
}

impl Ended {
    fn damaged(to: Lsn, why: &dyn std::fmt::Display) -> Ended {
        Ended { to: Some(to), state: State::Damaged, why: Some(why.to_string()) }
    }

    fn unreachable(to: Option<Lsn>, why: &dyn std::fmt::Display) -> Ended {
        Ended { to, state: State::Unreachable, why: Some(why.to_string()) }
    }
}

fn copy(row: &Branch, place: String, from: Option<Lsn>, ended: Ended) -> Copy {
    let Ended { to, state, why } = ended;
    Copy { branch: row.name.clone(), place, state, from, to, why }
}

/// `None` if it has no copy, and need not have one.
fn of_safekeeper(row: &Branch, seen: &Seen, places: &WalPlaces) -> Option<Copy> {
    let place = format!("safekeeper {}", seen.node);
    let status: &Status = match &seen.said {
        Ok(status) => status,
        Err(error) => {
            return Some(copy(row, place, None, Ended::unreachable(None, &format!("{error:#}"))));
        }
    };
    let is_it = |tenant, timeline| (tenant, timeline) == (row.tenant_id, row.timeline_id);
    let damaged = status.damaged.iter().find(|one| is_it(one.tenant_id, one.timeline_id));
    if let Some(damaged) = damaged {
        let (to, state) = (None, State::Damaged);
        let why = Some(damaged.error.clone());
        return Some(copy(row, place, None, Ended { to, state, why }));
    }
    let has = status.timelines.iter().find(|one| is_it(one.tenant_id, one.timeline_id))?;
    let (from, to) = (has.available_lsn.max(has.start_lsn), has.commit_lsn);
    Some(copy(row, place, Some(from), read_safekeeper(row, seen, places, from, to)))
}

fn checker(row: &Branch, from: Lsn) -> WalChecker {
    let checker =
        WalChecker::new(from, row.segment_size).with_version(PgVersion::from_major(row.pg_version));
    match from == row.start_lsn {
        true => checker.at_boundary(),
        false => checker,
    }
}

fn read_safekeeper(row: &Branch, seen: &Seen, places: &WalPlaces, from: Lsn, to: Lsn) -> Ended {
    let node = places.identity.as_ref().map(|_| seen.node);
    let connected =
        SafekeeperClient::connect(&seen.address, node, places.identity.as_ref(), TIMEOUT);
    let mut client = match connected {
        Ok(client) => client,
        Err(error) => return Ended::unreachable(None, &error),
    };
    // What is refused by a word comes as an error of no other kind.
    let failed = |to: Lsn, error: std::io::Error| match error.kind() {
        std::io::ErrorKind::Other => Ended::damaged(to, &error),
        _ => Ended::unreachable(Some(to), &error),
    };
    if let Err(error) = client.open(row.tenant_id, row.timeline_id) {
        return failed(from, error);
    }
    let mut checker = checker(row, from);
    let mut at = from;
    let mut bytes = Vec::new();
    while at < to {
        bytes.clear();
        let read = client.read_wal(at, (at + PIECE).min(to), Term(0), &mut bytes);
        let right = checker.position();
        match read {
            Ok(end) if end > at => at = end,
            Ok(end) => return Ended::damaged(right, &format!("it has no more than {end} of {to}")),
            Err(error) => return failed(right, error),
        }
        if let Err(error) = checker.check(&bytes) {
            return Ended::damaged(checker.position(), &error);
        }
    }
    ended(&checker, to)
}

/// All was read up to `to`, where a record should end.
fn ended(checker: &WalChecker, to: Lsn) -> Ended {
    match checker.position() {
        right if right == to => Ended { to: Some(to), state: State::Ok, why: None },
        right => Ended::damaged(right, &format!("no record ends at {to}")),
    }
}

/// What safekeepers have seen to be there is there, and right. `None` if that is nothing, or nobody says.
fn of_archive(row: &Branch, seen: &[Seen], archive: &Archive) -> Option<Copy> {
    let statuses = seen.iter().filter_map(|one| one.said.as_ref().ok());
    let timelines = statuses.flat_map(|status| &status.timelines);
    let own = timelines
        .filter(|one| (one.tenant_id, one.timeline_id) == (row.tenant_id, row.timeline_id));
    let (size, from) = (row.segment_size, row.start_lsn);
    let archived = own.map(|one| one.archived_lsn).max()?;
    if archived <= from {
        return None;
    }
    let mut checker = checker(row, from);
    let check = |checker: &mut WalChecker| {
        for number in from.segment_number(size)..archived.segment_number(size) {
            let right = checker.position();
            let object = object_name((row.tenant_id, row.timeline_id), number, size);
            let packed = match fetch_object(archive, &object, size) {
                Ok(Some(packed)) => packed,
                Ok(None) => return Ended::damaged(right, &format!("'{object}' is missing")),
                Err(error) => return Ended::unreachable(Some(right), &format!("{error:#}")),
            };
            let segment = match unpack(&object, &packed, size) {
                Ok(segment) => segment,
                Err(error) => return Ended::damaged(right, &format!("{error:#}")),
            };
            let skip = from.saturating_sub(Lsn(number * size)) as usize;
            if let Err(error) = checker.check(&segment[skip..]) {
                return Ended::damaged(checker.position(), &format!("'{object}': {error}"));
            }
        }
        let from = archived.segment_start(size).max(from);
        if from < archived {
            let object = tail_name((row.tenant_id, row.timeline_id), archived, size);
            let right = checker.position();
            let packed = match fetch_object(archive, &object, size) {
                Ok(Some(packed)) => packed,
                Ok(None) => return Ended::damaged(right, &format!("'{object}' is missing")),
                Err(error) => return Ended::unreachable(Some(right), &format!("{error:#}")),
            };
            match unpack_tail(&object, &packed, (archived - from) as usize) {
                Err(error) => return Ended::damaged(right, &format!("{error:#}")),
                Ok(tail) => {
                    if let Err(error) = checker.check(&tail) {
                        let text = format!("'{object}': {error}");
                        return Ended::damaged(checker.position(), &text);
                    }
                }
            }
            return ended(checker, archived);
        }
        // A record may go on in what is not archived yet.
        Ended { to: Some(checker.position()), state: State::Ok, why: None }
    };
    let ended = check(&mut checker);
    Some(copy(row, "archive".to_owned(), Some(from), ended))
}
