//! `branch` and `lsn`.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use pgstrata_ids::Lsn;
use pgstrata_wire::http::pageserver::{Branch, CreateBranch, Deleted, LsnAnswer, Reached};
use serde_json::{Value, json};

use crate::cluster::{Cluster, FIRST_BRANCH};
use crate::remote::Remote;
use crate::services::Services;
use crate::status::Answers;
use crate::{compute, out, table};

/// All rows of the page server.
pub fn rows(services: &dyn Services) -> Result<Vec<Branch>> {
    services.pageserver()?.get("/v1/branches", &[])
}

/// A branch's row, as the page server has it; `None` if there is none.
pub fn find(services: &dyn Services, name: &str) -> Result<Option<Branch>> {
    let rows = rows(services)?;
    if let Some(found) = rows.iter().find(|row| row.name == name) {
        return Ok(Some(found.clone()));
    }
    // What could not be read may have any name.
    if let Some(failure) = rows.into_iter().filter(|row| !row.is_read()).find_map(|row| row.failure)
    {
        bail!("branch '{name}' is not among those that can be read: {failure}");
    }
    Ok(None)
}

/// A branch's row.
pub fn get(services: &dyn Services, name: &str) -> Result<Branch> {
    services.pageserver()?.get("/v1/branch", &[("name", name)])
}

/// How far a branch is known to be committed: what its compute says, else what safekeepers say.
pub fn committed(answers: &Answers, row: &Branch) -> Option<Lsn> {
    let from_compute = answers.compute(&row.name).map(|report| report.commit_lsn);
    if from_compute.is_some_and(Lsn::is_valid) {
        return from_compute;
    }
    let timelines = answers.safekeepers().flat_map(|said| &said.timelines);
    let its = timelines.filter(|timeline| timeline.timeline_id == row.timeline_id);
    its.map(|timeline| timeline.commit_lsn).max()
}

/// The same, of a branch by its name.
pub fn committed_now(services: &dyn Services, name: &str) -> Result<Option<Lsn>> {
    services.committed(&get(services, name)?)
}

/// What is wrong with a branch that is served, a line each.
pub fn troubles(row: &Branch) -> Vec<String> {
    let mut lines = Vec::new();
    lines.extend(row.upload_failure.iter().map(|why| format!("uploads fail: {why}")));
    lines.extend(row.compaction_failure.iter().map(|why| format!("compaction fails: {why}")));
    lines.extend(unreadable(row));
    let bad = row.bad_safekeepers.iter();
    lines.extend(bad.map(|(address, what)| format!("safekeeper {address}: {what}")));
    lines
}

/// The one of them that says what can't be read now.
pub fn unreadable(row: &Branch) -> Option<String> {
    let one = row.unreadable_page.as_deref().unwrap_or_default();
    let count = row.unreadable_pages;
    (count > 0).then(|| format!("{count} pages can't be made, one of them: {one}"))
}

fn listed(answers: &Answers, row: &Branch) -> Value {
    let text = |lsn: Option<Lsn>| lsn.map(|lsn| lsn.to_string());
    json!({
        "name": row.name,
        "timeline_id": row.timeline_id.to_string(),
        "tenant_id": row.tenant_id.to_string(),
        "ancestor": row.ancestor,
        "ancestor_lsn": text(row.ancestor_lsn),
        "last_record_lsn": row.last_record_lsn.to_string(),
        "commit_lsn": text(committed(answers, row).max(Some(row.last_record_lsn))),
        "remote_lsn": row.remote_lsn.to_string(),
        "logical_size": row.logical_size,
        "created": row.created,
        "pg_version": row.pg_version,
        "failure": row.failure,
        "upload_failure": row.upload_failure,
        "compaction_failure": row.compaction_failure,
        "unreadable_pages": row.unreadable_pages,
        "unreadable_page": row.unreadable_page,
        "bad_safekeepers": row.bad_safekeepers,
    })
}

/// Every branch, as the page server has them, asked with a deadline if there is one.
pub fn rows_of_pageserver(
    services: &dyn Services,
    timeout: Option<Duration>,
) -> Result<Vec<Branch>> {
    let mut service = services.pageserver()?;
    service.timeout = timeout.unwrap_or(service.timeout);
    service.get("/v1/branches", &[("sizes", "true")])
}

/// Rows of branches, as listings show them.
pub fn listed_all(rows: &[Branch], answers: &Answers) -> Vec<Value> {
    rows.iter().map(|row| listed(answers, row)).collect()
}

/// `branch list`.
pub fn list(services: &dyn Services, as_json: bool) -> Result<()> {
    let rows = listed_all(&rows_of_pageserver(services, None)?, &services.answers());
    if as_json {
        return out::line(&Value::Array(rows).to_string());
    }
    let columns =
        ["name", "ancestor", "ancestor_lsn", "last_record_lsn", "remote_lsn", "logical_size"];
    table::print(&columns, &rows)
}

/// `--at LSN or TIME`.
#[derive(Clone, Debug)]
pub enum At {
    /// An LSN.
    Lsn(Lsn),
    /// A time, RFC 3339 in UTC.
    Time(String),
}

/// Reads an LSN or a time.
pub fn parse_at(text: &str) -> Result<At, String> {
    if let Ok(lsn) = text.parse() {
        return Ok(At::Lsn(lsn));
    }
    // "2026-01-31 12:00:00+00" is how PostgreSQL prints what RFC 3339 writes with a T.
    let mut time = text.replacen(' ', "T", 1);
    if let Some(at) = time.rfind(['+', '-'])
        && at > 10
        && time.len() - at == 3
    {
        time.push_str(":00");
    }
    match time.parse::<jiff::Timestamp>() {
        Ok(time) => Ok(At::Time(time.to_string())),
        Err(_) if time.parse::<jiff::civil::DateTime>().is_ok() => Err(format!(
            "'{text}' has no time zone: write 2026-01-31T12:00:00Z for UTC, or \
             2026-01-31T12:00:00+01:00"
        )),
        Err(_) => {
            Err(format!("'{text}' is neither an LSN (0/1A2B3C8) nor a time (2026-01-31T12:00:00Z)"))
        }
    }
}

fn create_request(
    services: &dyn Services,
    name: &str,
    from: &str,
    at: Option<&At>,
    replace: bool,
) -> Result<Branch> {
    let source = get(services, from)?;
    let mut request =
        CreateBranch { name: name.into(), from: from.into(), replace, ..Default::default() };
    // "Now" includes everything that a client was told is committed; and what was committed by
    // the time asked for must have arrived before the answer can be trusted.
    match at {
        Some(At::Lsn(lsn)) => request.lsn = Some(*lsn),
        Some(At::Time(time)) => request.time = Some(time.clone()),
        None => {}
    }
    if request.lsn.is_none() {
        request.at_least = services.committed(&source)?;
    }
    services.pageserver()?.patient()?.post_json("/v1/branches", &request)
}

/// Removes what a deletion left that was killed: a new branch must not find another one's settings.
pub fn make_room(cluster: &Cluster, name: &str) -> Result<()> {
    pgstrata_ids::check_branch_name(name)?;
    if find(cluster, name)?.is_none() && compute::process(cluster, name).pid().is_none() {
        cluster.remove_compute_directory(name)?;
    }
    Ok(())
}

/// `branch create`.
pub fn create(
    services: &dyn Services,
    name: &str,
    from: &str,
    at: Option<&At>,
    as_json: bool,
) -> Result<()> {
    pgstrata_ids::check_branch_name(name)?;
    let row = create_request(services, name, from, at, false)?;
    match as_json {
        true => out::line(&listed(&services.answers(), &row).to_string()),
        false => {
            let at = row.ancestor_lsn.unwrap_or(row.start_lsn);
            out::line(&format!("{name} (from {from} at {at})"))
        }
    }
}

/// The branch that takes the primary's place where that is gone. It was renamed by an earlier version, or by a command
/// that was killed before it could remember that.
pub fn next_primary(cluster: &Cluster) -> Result<String> {
    let mut ours = rows(cluster)?;
    ours.retain(|row| row.tenant_id.to_string() == cluster.state.tenant);
    let names: Vec<_> = ours.iter().map(|row| row.name.clone()).collect();
    let primary = &cluster.state.primary;
    if names.is_empty() {
        bail!(
            "branch {primary} is not in {} any more: put the objects back (an empty database in \
             its place would be somebody else's)",
            cluster.object_store()
        );
    }
    if names.iter().any(|name| name == FIRST_BRANCH) {
        return Ok(FIRST_BRANCH.to_owned());
    }
    // A new cluster begins with one branch, from which all others come.
    let roots: Vec<_> = ours.iter().filter(|row| row.ancestor.is_none()).collect();
    match roots.as_slice() {
        [root] => Ok(root.name.clone()),
        _ => bail!(
            "there is no branch '{primary}' any more, which 'up' starts: rename one of {} to \
             '{FIRST_BRANCH}'",
            names.join(", ")
        ),
    }
}

/// Refuses to delete what `up` could not do without. Returns the primary branch of what is left.
fn primary_without(cluster: &Cluster, name: &str) -> Result<String> {
    let rows = rows(cluster)?;
    let names = rows.iter().map(|row| row.name.as_str());
    let others: Vec<_> = names.filter(|other| *other != name).collect();
    if others.is_empty() {
        bail!(
            "branch '{name}' is the last one of the cluster: to begin anew, run 'pgstrata down' and \
             remove {} and the objects in {}",
            cluster.dir.display(),
            cluster.object_store()
        );
    }
    if cluster.state.primary != name {
        return Ok(cluster.state.primary.clone());
    }
    match others.as_slice() {
        [other] => Ok((*other).to_owned()),
        _ if others.contains(&FIRST_BRANCH) => Ok(FIRST_BRANCH.to_owned()),
        _ => bail!(
            "branch '{name}' is the one that 'pgstrata up' starts: rename it, rename the one that is \
             to be started instead to '{FIRST_BRANCH}', and delete it then"
        ),
    }
}

fn refuse_with_compute(cluster: &Cluster, name: &str) -> Result<()> {
    if compute::process(cluster, name).pid().is_some() {
        bail!("branch '{name}' has a compute: stop it first ('pgstrata compute stop {name}')");
    }
    Ok(())
}

fn send_delete(services: &dyn Services, name: &str) -> Result<()> {
    services.pageserver()?.patient()?.delete::<Deleted>("/v1/branch", &[("name", name)]).map(drop)
}

/// `branch delete`.
pub fn delete(cluster: &mut Cluster, name: &str) -> Result<()> {
    get(cluster, name)?;
    refuse_with_compute(cluster, name)?;
    let primary = primary_without(cluster, name)?;
    send_delete(cluster, name)?;
    cluster.state.ports.remove(name);
    cluster.state.computes.remove(name);
    cluster.state.primary = primary;
    cluster.save()?;
    // Another branch of that name must not find this one's settings.
    cluster.remove_compute_directory(name)
}

/// `branch reset`: as if it were created again now, from the branch that it came from.
pub fn reset(cluster: &Cluster, name: &str, at: Option<&At>) -> Result<()> {
    let row = get(cluster, name)?;
    let ancestor = ancestor_of(&row)?;
    refuse_with_compute(cluster, name)?;
    create_request(cluster, name, ancestor, at, true).map(drop)
}

fn ancestor_of(row: &Branch) -> Result<&str> {
    let ancestor = row.ancestor.as_deref();
    ancestor.with_context(|| format!("branch '{}' has no ancestor to be reset to", row.name))
}

/// A compute elsewhere is found by what it is connected to.
fn refuse_with_compute_elsewhere(remote: &Remote, row: &Branch) -> Result<()> {
    if remote.has_compute(row)? {
        bail!("branch '{}' has a compute: stop it first, where it runs", row.name);
    }
    Ok(())
}

/// `branch delete`, of a cluster elsewhere.
pub fn delete_remote(remote: &Remote, name: &str) -> Result<()> {
    let row = get(remote, name)?;
    refuse_with_compute_elsewhere(remote, &row)?;
    if rows(remote)?.iter().all(|other| other.name == name) {
        bail!("branch '{name}' is the last one of the cluster");
    }
    send_delete(remote, name)
}

/// `branch reset`, of a cluster elsewhere.
pub fn reset_remote(remote: &Remote, name: &str, at: Option<&At>) -> Result<()> {
    let row = get(remote, name)?;
    let ancestor = ancestor_of(&row)?;
    refuse_with_compute_elsewhere(remote, &row)?;
    create_request(remote, name, ancestor, at, true).map(drop)
}

/// `branch rename`, of a cluster elsewhere.
pub fn rename_remote(remote: &Remote, old: &str, new: &str) -> Result<()> {
    refuse_with_compute_elsewhere(remote, &get(remote, old)?)?;
    send_rename(remote, old, new)
}

fn send_rename(services: &dyn Services, old: &str, new: &str) -> Result<()> {
    services
        .pageserver()?
        .patient()?
        .post::<Branch>("/v1/branch/rename", &[("name", old), ("to", new)], &[])
        .map(drop)
}

/// `branch rename`.
pub fn rename(cluster: &mut Cluster, old: &str, new: &str) -> Result<()> {
    refuse_with_compute(cluster, old)?;
    send_rename(cluster, old, new)?;
    // A compute that died is still wanted, under the name that the branch has now.
    if let Some(place) = cluster.state.computes.remove(old) {
        cluster.state.computes.insert(new.to_owned(), place);
    }
    if let Some(port) = cluster.state.ports.remove(old) {
        cluster.state.ports.insert(new.to_owned(), port);
    }
    // Who gives a branch the usual name wants that one to be started.
    if cluster.state.primary == old || new == FIRST_BRANCH {
        cluster.state.primary = new.to_owned();
    }
    cluster.save()?;
    cluster.move_compute_directory(old, new)
}

/// Waits until a branch is ingested as far as it is known to be committed, which is returned.
fn wait_for_committed(services: &dyn Services, branch: &str) -> Result<Option<Lsn>> {
    let committed = committed_now(services, branch)?;
    if let Some(lsn) = committed {
        let lsn = lsn.to_string();
        services
            .pageserver()?
            .patient()?
            .get::<Reached>("/v1/branch/wait", &[("name", branch), ("lsn", &lsn)])?;
    }
    Ok(committed)
}

/// The page server's answer to what a branch's LSN was at a time, or is.
fn lsn_at(services: &dyn Services, branch: &str, time: Option<&str>) -> Result<LsnAnswer> {
    let mut query = vec![("name", branch)];
    query.extend(time.map(|time| ("time", time)));
    services.pageserver()?.patient()?.get("/v1/branch/lsn", &query)
}

/// The LSN of a moment of a branch.
pub fn resolve(services: &dyn Services, branch: &str, at: &At) -> Result<Lsn> {
    match at {
        At::Lsn(lsn) => Ok(*lsn),
        At::Time(time) => {
            wait_for_committed(services, branch)?;
            Ok(lsn_at(services, branch, Some(time))?.lsn)
        }
    }
}

/// `lsn`.
pub fn lsn(services: &dyn Services, branch: &str, at: Option<&At>, as_json: bool) -> Result<()> {
    let time = match at {
        Some(At::Lsn(_)) => bail!("--at takes a time here, such as 2026-01-31T12:00:00Z"),
        Some(At::Time(time)) => Some(time.as_str()),
        None => None,
    };
    let committed = wait_for_committed(services, branch)?;
    let mut answer = lsn_at(services, branch, time)?;
    if at.is_none()
        && let Some(lsn) = committed
    {
        answer.lsn = lsn;
    }
    match as_json {
        true => out::line(&serde_json::to_string(&answer)?),
        false => out::line(&answer.lsn.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_an_lsn_or_a_time_with_its_zone() {
        assert!(matches!(parse_at("0/1A2B3C8"), Ok(At::Lsn(Lsn(0x1A2_B3C8)))));
        for text in ["2026-01-31T12:00:00Z", "2026-01-31 13:00:00+01", "2026-01-31T12:00:00.0Z"] {
            let At::Time(time) = parse_at(text).unwrap() else { panic!("{text} is no LSN") };
            assert_eq!(time, "2026-01-31T12:00:00Z");
        }
        for text in ["2026-01-31T12:00:00", "2026-01-31 12:00", "2026-01-31"] {
            let error = parse_at(text).unwrap_err();
            assert!(error.contains("time zone"), "{error}");
        }
        assert!(parse_at("yesterday").unwrap_err().contains("neither"));
    }
}
