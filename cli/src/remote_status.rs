//! `status` of a cluster elsewhere: the services that its broker lists, and whether each answers.

use anyhow::Result;
use pgstrata_wire::broker::{Publication, Role};
use pgstrata_wire::http::pageserver::Branch;
use pgstrata_wire::http::safekeeper;
use serde_json::{Value, json};

use crate::members::short::{self, Safekeepers};
use crate::remote::{Remote, ask_each};
use crate::status::{Answers, PATIENCE, STATUS};
use crate::{branch, out, status, table, zones};

/// What one of them said: a safekeeper more than that it is well.
struct Said {
    failure: Option<String>,
    is_there: bool,
    status: Option<safekeeper::Status>,
}

fn ask(remote: &Remote, node: &Publication) -> Said {
    let asked = remote.service(node, PATIENCE).and_then(|service| match node.role {
        Role::Safekeeper => service.get(STATUS, &[]).map(Some),
        Role::Pageserver | Role::Unknown => service.get_bytes("/healthz", &[]).map(|_| None),
    });
    match asked {
        Ok(said) => {
            let failure = said.as_ref().and_then(status::trouble);
            Said { failure, is_there: true, status: said }
        }
        Err(error) => Said { failure: Some(format!("{error:#}")), is_there: false, status: None },
    }
}

fn state(is_there: bool) -> &'static str {
    if is_there { "running" } else { "silent" }
}

fn row(node: &Publication, said: &Said) -> Value {
    let addresses = &node.addresses;
    let (role, name, listen) = match node.role {
        Role::Safekeeper => ("safekeeper", format!("safekeeper-{}", node.node), &addresses.wal),
        Role::Pageserver => ("pageserver", "pageserver".to_owned(), &addresses.pages),
        Role::Unknown => ("unknown", format!("node-{}", node.node), &addresses.http),
    };
    json!({
        "name": name,
        "role": role,
        "node": node.node,
        "zone": node.zone,
        "state": state(said.is_there),
        "listen": listen,
        "pg": addresses.pg,
        "http": addresses.http,
        "failure": said.failure,
    })
}

/// The broker, which is asked first.
fn broker_row(remote: &Remote, failure: Option<String>) -> Value {
    json!({
        "name": "storage-broker",
        "role": "storage-broker",
        "state": state(failure.is_none()),
        "http": remote.broker_url(),
        "failure": failure,
    })
}

/// Everything that the broker lists, and what safekeepers said.
fn services(remote: &Remote, branches: &Result<Vec<Branch>>) -> (Vec<Value>, Answers, Vec<String>) {
    let nodes = match remote.nodes() {
        Ok(nodes) => nodes,
        Err(error) => {
            let rows = vec![broker_row(remote, Some(format!("{error:#}")))];
            return (rows, Answers::default(), Vec::new());
        }
    };
    // What is of a later version is not there for this program.
    let mut sorted: Vec<_> = nodes.iter().filter(|node| node.role != Role::Unknown).collect();
    sorted.sort_by_key(|node| (node.role == Role::Pageserver, node.node));
    let said = ask_each(&sorted, |node| ask(remote, node));
    let mut rows = vec![broker_row(remote, None)];
    rows.extend(sorted.iter().zip(&said).map(|(node, said)| row(node, said)));
    let safekeepers = sorted.iter().filter(|node| node.role == Role::Safekeeper);
    let warning = zones::warning_of(&Vec::from_iter(safekeepers.map(|node| node.zone.as_str())));
    let known = sorted.iter().zip(&said).filter(|(node, _)| node.role == Role::Safekeeper);
    let known = known.map(|(node, said)| (node.node, said.status.as_ref(), false));
    let safekeepers = Safekeepers::new(false, known);
    let statuses = sorted.iter().zip(said);
    let statuses = statuses.filter_map(|(node, said)| Some((node.node(), said.status?)));
    let answers = Answers::of_safekeepers(statuses);
    let mut warnings = Vec::from_iter(warning.into_iter().chain(status::warnings(&answers)));
    if let Ok(branches) = branches {
        warnings.extend(short::warnings(branches, answers.safekeepers(), &safekeepers));
    }
    (rows, answers, warnings)
}

/// `status`, off the machine.
pub fn status(remote: &Remote, as_json: bool) -> Result<()> {
    let branches = branch::rows_of_pageserver(remote, Some(PATIENCE));
    let (rows, answers, warnings) = services(remote, &branches);
    if as_json {
        let listed = |rows: &Vec<Branch>| branch::listed_all(rows, &answers);
        let document = json!({
            "cluster": remote.file.display().to_string(),
            "broker": remote.broker_url(),
            "processes": rows,
            "warnings": warnings,
            "branches": branches.as_ref().map(listed).unwrap_or_default(),
            "branches_failure": branches.as_ref().err().map(|error| format!("{error:#}")),
            // Nobody but who started them knows of them.
            "computes": [],
        });
        return out::line(&document.to_string());
    }
    table::print(&["name", "node", "zone", "state", "listen", "http"], &rows)?;
    for row in &rows {
        if let (Some(name), Some(failure)) = (row["name"].as_str(), row["failure"].as_str()) {
            out::line(&format!("{name}: {failure}"))?;
        }
    }
    for warning in warnings {
        out::line(&format!("warning: {warning}"))?;
    }
    out::line("")?;
    status::print_branches(&branches, &answers)
}
