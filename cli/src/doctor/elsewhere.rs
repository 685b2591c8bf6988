//! A cluster that a file tells of: what its services say over HTTP, and those of them that run on this machine.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use jiff::Timestamp;
use pgstrata_blob::Location;
use pgstrata_http_client::certificate_of;
use pgstrata_identity::{Certificate, says_until};
use pgstrata_ids::{Member, NodeId};
use pgstrata_wire::broker::{self, Publication};
use pgstrata_wire::http::pageserver::Branch;
use pgstrata_wire::http::safekeeper;

use super::clocks::{self, Dated};
use super::finding::{Finding, Severity};
use super::later::Later;
use super::processes::Running;
use super::services::{self, Role, State};
use super::{branches, certificates, here, machine, store};
use crate::branch;
use crate::cluster_file::{ClusterFile, Written, read_token};
use crate::http::Service;
use crate::members::short::Safekeepers;
use crate::remote::{Asked, Remote, ask_each};
use crate::status::{PATIENCE, STATUS};

const STARTS: &str = "start it again";
/// Longest wait for this machine.
const MACHINE_PATIENCE: Duration = Duration::from_secs(10);
/// Branches whose members are asked for, at most.
const MOST_BRANCHES: usize = 256;
/// What is looked at on the machines of services only.
const OF_MACHINES: [&str; 5] = ["mounts", "write caches", "syncs", "space", "limits"];

/// What a service showed and said.
struct Seen {
    object: String,
    role: Role,
    zone: String,
    node: Option<NodeId>,
    dated: Result<Dated, String>,
    shown: io::Result<Option<Certificate>>,
    /// What a safekeeper says of itself; of others only whether they answer.
    said: Result<Option<safekeeper::Status>, String>,
}

/// A branch's members.
struct Members {
    branch: String,
    /// How many it has, and how many of them are well; or why that is not known.
    counted: Result<(usize, usize), String>,
}

/// Everything that was asked of services.
struct Answered {
    /// Whether the broker said where the others are.
    listed: Result<(), String>,
    seen: Vec<Seen>,
    branches: Result<Vec<Branch>, String>,
    /// What is known of the members of branches.
    members: Vec<Members>,
    /// How many branches there are beside them.
    others: usize,
}

fn text(error: anyhow::Error) -> String {
    format!("{error:#}")
}

/// The time and the certificate of a service that can be asked.
fn look_at(service: &Service) -> (Result<Dated, String>, io::Result<Option<Certificate>>) {
    let Service { address, access, whom, .. } = service;
    let (address, access, whom) = (address.clone(), access.clone(), whom.clone());
    // The look-up of a name may hang.
    let shown = Later::start(move || certificate_of(&address, &access, whom, PATIENCE));
    let dated = here::date(service);
    let shown = shown.wait(Instant::now() + PATIENCE);
    (dated, shown.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into())))
}

fn node(remote: &Remote, node: &Publication) -> Seen {
    let (role, object) = match node.role {
        broker::Role::Safekeeper => (Role::Safekeeper, format!("safekeeper-{}", node.node)),
        _ => (Role::Pageserver, "pageserver".to_owned()),
    };
    let service = remote.service(node, PATIENCE);
    let (dated, shown) = match &service {
        Ok(service) => look_at(service),
        Err(error) => (Err(format!("{error:#}")), Err(io::Error::other(format!("{error:#}")))),
    };
    let said = service.and_then(|service| match role {
        Role::Safekeeper => service.get(STATUS, &[]).map(Some),
        _ => service.get_bytes("/healthz", &[]).map(|_| None),
    });
    let (zone, said) = (node.zone.clone(), said.map_err(text));
    Seen { object, role, zone, node: Some(node.node()), dated, shown, said }
}

/// Whether somebody answered that what we show is not enough.
fn is_refusal(why: &str) -> bool {
    ["it answers 401", "it answers 403"].iter().any(|status| why.contains(status))
}

/// The broker, which answers even where it refuses to tell us of others.
fn broker(remote: &Remote, listed: Result<(), String>) -> Seen {
    let (dated, shown) = match remote.broker_service(PATIENCE) {
        Ok(service) => look_at(&service),
        Err(error) => (Err(format!("{error:#}")), Err(io::Error::other(format!("{error:#}")))),
    };
    let (object, zone) = ("storage-broker".to_owned(), String::new());
    let said = match listed {
        Err(why) if !is_refusal(&why) => Err(why),
        _ => Ok(None),
    };
    Seen { object, role: Role::Broker, zone, node: None, dated, shown, said }
}

/// How many members a branch has, and how many of them are well.
fn members(
    remote: &Remote,
    row: &Branch,
    asked: &[Asked],
    well: &[(NodeId, String)],
) -> Result<(usize, usize), String> {
    let unknown = "no safekeeper that answers says who its members are";
    let configuration = remote.configuration(row, asked).ok_or(unknown)?;
    // One with another directory than the member had is none of them.
    let is_well = |member: &Member| {
        let mut own = well.iter().filter(|(node, _)| *node == member.node);
        own.any(|(_, incarnation)| *incarnation == member.incarnation.to_string())
    };
    let members: Vec<Member> = configuration.all().collect();
    Ok((members.len(), members.iter().filter(|member| is_well(member)).count()))
}

fn is_damaged(status: &safekeeper::Status) -> bool {
    !status.damaged.is_empty()
        || status.timelines.iter().any(|timeline| timeline.committed_wal_damaged)
}

/// Asks everybody. May take long.
fn ask(remote: &Remote) -> Answered {
    // Asked once: it may be silent for a while.
    let (nodes, listed) = match remote.nodes() {
        Ok(nodes) => (nodes, Ok(())),
        Err(error) => (Default::default(), Err(text(error))),
    };
    let nodes = nodes.iter();
    // What is of a later version is not there for this program.
    let mut nodes: Vec<_> = nodes.filter(|node| node.role != broker::Role::Unknown).collect();
    nodes.sort_by_key(|node| (node.role == broker::Role::Pageserver, node.node));
    let mut seen = vec![broker(remote, listed.clone())];
    seen.extend(ask_each(&nodes, |one| node(remote, one)));
    let branches = branch::rows_of_pageserver(remote, Some(PATIENCE)).map_err(text);
    let mut asked = Vec::new();
    let mut well = Vec::new();
    for (node, said) in
        seen.iter().filter_map(|one| Some((one.node?, one.said.as_ref().ok()?.as_ref()?)))
    {
        asked.push(Asked { node, said: Ok(said.clone()) });
        well.extend((!is_damaged(said)).then(|| (node, said.incarnation.clone())));
    }
    let rows = branches.as_deref().unwrap_or_default();
    let (rows, others) = rows.split_at(rows.len().min(MOST_BRANCHES));
    let members = ask_each(rows, |row| Members {
        branch: row.name.clone(),
        counted: members(remote, row, &asked, &well),
    });
    let others = others.len();
    Answered { listed, seen, branches, members, others }
}

fn service(seen: &Seen) -> services::Service {
    let (state, damage, trouble) = match &seen.said {
        Ok(None) => (State::Answers, None, None),
        Ok(Some(status)) => {
            let trouble = crate::status::trouble(status);
            let damage = trouble.clone().filter(|_| is_damaged(status));
            (State::Answers, damage, trouble)
        }
        Err(why) => (State::Silent, None, Some(why.clone())),
    };
    services::Service { object: seen.object.clone(), role: seen.role, state, damage, trouble }
}

/// Branches that have the same to be said are said together.
fn check_members(members: &[Members], others: usize) -> Vec<Finding> {
    let mut alike: BTreeMap<&Result<(usize, usize), String>, Vec<&str>> = BTreeMap::new();
    for one in members {
        alike.entry(&one.counted).or_default().push(&one.branch);
    }
    let mut findings = Vec::new();
    for (counted, names) in alike {
        let object = match names.as_slice() {
            [name] => format!("branch {name}"),
            [name, rest @ ..] => format!("branch {name} and {} more", rest.len()),
            [] => continue,
        };
        findings.push(match counted {
            Ok((count, well)) => services::majority(&object, *count, *well),
            Err(why) => {
                let text = format!("not looked at: {why}");
                Finding::new("services", &object, Severity::Unknown, &text)
            }
        });
    }
    if others > 0 {
        let text = format!("not looked at: these are branches after the first {MOST_BRANCHES}");
        let object = format!("{others} branches");
        findings.push(Finding::new("services", &object, Severity::Unknown, &text));
    }
    findings
}

fn check_answered(answered: &Answered, now: Timestamp) -> Vec<Finding> {
    let Answered { listed, seen, branches, members, others } = answered;
    let services: Vec<_> = seen.iter().map(service).collect();
    let mut findings = services::check(&services, STARTS);
    let has_pageserver = seen.iter().any(|one| one.role == Role::Pageserver);
    let mut say = |object, severity, text: &str| {
        findings.push(Finding::new("services", object, severity, text));
    };
    match listed {
        Ok(()) if !has_pageserver => {
            let text = "the broker has heard of none lately: no branch can be made, and no compute starts; start one with this \
                        --broker";
            say("pageserver", Severity::Danger, text);
        }
        Ok(()) => {}
        Err(why) if is_refusal(why) => {
            say(
                "cluster",
                Severity::Unknown,
                &format!("not looked at: the broker tells us of nobody ({why})"),
            );
        }
        Err(_) => {
            let text = "nothing is known of safekeepers and page servers, which the broker would tell of: start it, or see whether \
                        the file names the right one";
            say("cluster", Severity::Danger, text);
        }
    }
    findings.extend(check_members(members, *others));
    let safekeepers = || seen.iter().filter(|one| one.role == Role::Safekeeper);
    let zones = safekeepers().map(|one| (one.object.clone(), one.zone.clone()));
    findings.extend(services::check_zones(&Vec::from_iter(zones)));
    let said: Vec<_> = safekeepers().filter_map(|one| one.said.clone().ok().flatten()).collect();
    findings.extend(branches::check(branches, &said));
    if listed.is_ok() {
        let known = safekeepers().filter_map(|one| {
            Some((one.node?.0, one.said.as_ref().ok().and_then(Option::as_ref), false))
        });
        let known = Safekeepers::new(false, known);
        findings.extend(branches::check_members(branches, &said, &known));
    }
    for one in seen {
        findings.push(clocks::check(&one.object, one.dated.as_ref().map_err(String::as_str)));
        let shown = one.shown.as_ref().map(Option::as_ref);
        findings.extend(certificates::shown(&one.object, shown, now));
    }
    let text =
        "not looked at: nobody but who started them knows of computes; see the status of each";
    findings.push(Finding::new("services", "computes", Severity::Unknown, text));
    findings
}

/// What the file itself shows to services.
fn check_file(file: &Path, written: &Written, now: Timestamp) -> Vec<Finding> {
    let directory = file.parent().unwrap_or(Path::new(""));
    let object = "cluster file";
    if let Some(tls) = &written.tls {
        let read = certificates::Directory::read(&directory.join(tls));
        return certificates::directory(object, &read, now);
    }
    let token = match (&written.token, &written.token_file) {
        (Some(token), _) => Some(token.clone()),
        (None, Some(file)) => read_token(&directory.join(file)).ok(),
        (None, None) => return Vec::new(),
    };
    vec![certificates::token(object, token.as_deref().and_then(says_until), now)]
}

/// Those of the cluster's services that run here: their directories, limits and certificates.
fn check_machine(broker: &str, listed: usize, deadline: Instant) -> Vec<Finding> {
    let looked = Later::start(Running::all);
    let running = looked.wait(deadline).unwrap_or_default();
    let running: Vec<_> = running.into_iter().filter(|running| running.is_of(broker)).collect();
    let mut places = Vec::new();
    let mut findings = Vec::new();
    for one in &running {
        if one.is_contained() {
            let text = "not looked at: it runs in a container, whose directories are not those of this name here; run this there";
            findings.push(Finding::new("mounts", &one.object(), Severity::Unknown, text));
            continue;
        }
        let store = one.option("--object-store").and_then(|store| store.parse().ok());
        let store = match store {
            Some(Location::Directory(path)) if path.is_absolute() => Some(path),
            _ => None,
        };
        let known =
            |path: &PathBuf| !places.iter().any(|place: &super::place::Place| place.path == *path);
        let store = store.filter(known);
        let dir = one.directory("--dir").filter(known);
        places.extend(machine::places_of(&one.program, &one.object(), dir, store));
    }
    if running.is_empty() {
        let text = "not looked at: none of its services that can be seen runs on this machine; run this on those that they run on";
        let unknown = |check| Finding::new(check, "machines", Severity::Unknown, text);
        return OF_MACHINES.into_iter().map(unknown).collect();
    }
    let has_compute = running.iter().any(|one| one.program == "compute-shim");
    places.extend(has_compute.then(machine::memory));
    findings.extend(machine::check(places, listed, deadline));
    let named: Vec<_> = running.into_iter().map(|one| (one.object(), Some(one))).collect();
    let checked = Later::start(move || here::check_running(&named, Timestamp::now()));
    findings.extend(here::in_time(checked.wait(deadline), "limits"));
    let text =
        "not looked at on other machines: run this on each that services of the cluster run on";
    findings.push(Finding::new("machines", "machines", Severity::Unknown, text));
    findings
}

/// Everything about the cluster of a file.
pub fn check(file: &Path, deadline: Instant) -> Result<Vec<Finding>> {
    let written = Written::read(file)?;
    let now = Timestamp::now();
    let mut findings = check_file(file, &written, now);
    let directory = file.parent().unwrap_or(Path::new(""));
    let content = match ClusterFile::of(written, directory)
        .with_context(|| file.display().to_string())
    {
        Ok(content) => content,
        Err(error) => {
            findings.push(Finding::new("cluster", "cluster file", Severity::Danger, &text(error)));
            return Ok(findings);
        }
    };
    let archive = content.archive.clone();
    let remote = Remote::of(file, content);
    let broker = remote.broker_url().to_owned();
    let answered = Later::start(move || ask(&remote));
    let probed =
        archive.map(|archive| (archive.0.clone(), Later::start(move || store::read(&archive))));
    findings.push(match probed {
        Some((location, probed)) => store::check(&location, probed.wait(deadline)),
        None => {
            let text = "not looked at: the file names no object_store; what services say of it is said with them";
            Finding::new("store", "objects", Severity::Unknown, text)
        }
    });
    let listed = match answered.wait(deadline) {
        Some(answered) => {
            findings.extend(check_answered(&answered, now));
            answered.seen.iter().filter(|one| one.role == Role::Safekeeper).count()
        }
        None => {
            let text =
                "services do not answer in time: see the network, and the resolver of their names";
            findings.push(Finding::new("services", "cluster", Severity::Danger, text));
            0
        }
    };
    // Of its own: what services took of the time is none of its disks' fault.
    findings.extend(check_machine(&broker, listed, Instant::now() + MACHINE_PATIENCE));
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_with_the_same_members_are_said_together() {
        let of = |branch: &str, counted: Result<(usize, usize), &str>| Members {
            branch: branch.to_owned(),
            counted: counted.map_err(str::to_owned),
        };
        let all =
            [of("a", Ok((3, 3))), of("b", Ok((3, 1))), of("c", Ok((3, 3))), of("d", Err("why"))];
        let mut found = check_members(&all, 7);
        found.sort_by(|one, other| one.object.cmp(&other.object));
        let found: Vec<_> = found
            .iter()
            .map(|one| (one.object.as_str(), one.severity, one.text.as_str()))
            .collect();
        assert_eq!(found[0].0, "7 branches");
        assert_eq!(
            found[1],
            ("branch a and 1 more", Severity::Ok, "3 of 3 safekeepers are well: 1 more may fail")
        );
        assert_eq!((found[2].0, found[2].1), ("branch b", Severity::Danger));
        assert_eq!(found[3], ("branch d", Severity::Unknown, "not looked at: why"));
    }

    #[test]
    fn a_refusal_is_told_from_a_failure() {
        assert!(is_refusal(
            "the broker https://b: it answers 403 Forbidden: a token of scope tenant"
        ));
        assert!(!is_refusal("the broker https://b: it answers 500 Internal Server Error: 403"));
        assert!(!is_refusal("it was silent for 3 s"));
    }
}
