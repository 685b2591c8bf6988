//! Who keeps the WAL: `safekeeper add|replace|remove|drain`; and, in rooms of their own, `safekeeper list`, `quorum show` and
//! `quorum recover`.
//!
//! A change is made timeline by timeline, by a safekeeper that is asked again until it is done (`POST /v1/members`).
//! What is decided stands in object storage, so that the same command goes on where an earlier one ended.

pub mod left_behind;
mod list;
mod looks;
mod recover;
pub mod short;
mod show;
mod telling;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::Subcommand;
use pgstrata_ids::{Lsn, NodeId, TenantId, TimelineId};
use pgstrata_wire::http::Code;
use pgstrata_wire::http::safekeeper::{Change, Member, Quorum, Status, Step};
use serde_json::json;

pub use self::list::list;
use self::looks::{Looked, until_done};
pub use self::recover::{recover, recover_here};
pub use self::show::show;
use self::telling::{Names, Progress, say_once, silent_majority, stalled};
use crate::cluster::{Cluster, Lock};
use crate::http::{Refused, Service};
use crate::services::Services;
use crate::{branch, out, up, zones};

/// Timelines that are changed at once.
const AT_ONCE: usize = 4;
/// Between two questions how far a change is.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// Longest wait in which nothing moves.
const PATIENCE: Duration = Duration::from_secs(120);
/// So long nothing moves before another safekeeper is asked.
const TURN_AFTER: Duration = Duration::from_secs(10);
/// Longest wait for a safekeeper to register in object storage.
const REGISTER_PATIENCE: Duration = Duration::from_secs(10);
/// Branches that are named, at most.
const MOST_NAMED: usize = 3;
/// Between two lines that tell how far it is.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// What is done with safekeepers.
#[derive(Subcommand)]
pub enum SafekeeperVerb {
    /// List safekeepers, and how well they are
    ///
    /// The state is 'ok'; 'catching-up' while it lacks more than 16 MiB of what is committed; 'damaged' if it can't serve some
    /// timeline; 'gone' if it does not answer; 'draining' while members are being changed so that it keeps less; 'retired'
    /// when it was a member and no branch counts on it any more, so that it may be stopped. A retired one that is started anew
    /// removes what it had, and is 'ok' then like any other that waits to be made a member.
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make one more a member of every branch; in a cluster made by 'up', start it
    Add {
        /// Its failure zone, in a cluster made by 'up' [default: one of its own]
        #[arg(long, value_parser = zones::parse)]
        zone: Option<String>,
        /// In a cluster elsewhere: its node id; it runs already
        #[arg(long)]
        id: Option<u64>,
        /// Even if a majority of a branch's members is in one zone then
        #[arg(long)]
        force: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Put another one in the place of a safekeeper that is gone, or that is to go
    ///
    /// In a cluster made by 'up' the new one is started, with an id of its own, and the old one is stopped. In a cluster
    /// elsewhere --with names one that runs already; without it, ID itself was started with an empty directory.
    Replace {
        /// Node id of the one that goes
        id: u64,
        /// Failure zone of the new one [default: that of the old one]
        #[arg(long, value_parser = zones::parse)]
        zone: Option<String>,
        /// In a cluster elsewhere: node id of the new one
        #[arg(long)]
        with: Option<u64>,
        /// Even if a majority of a branch's members is in one zone then
        #[arg(long)]
        force: bool,
    },
    /// Make every branch do without it; in a cluster made by 'up', stop it
    Remove {
        /// Node id
        id: u64,
        /// Even if a majority of a branch's members is in one zone then
        #[arg(long)]
        force: bool,
    },
    /// Move all that it keeps to safekeepers that are no members yet; it goes on running
    Drain {
        /// Node id
        id: u64,
        /// Even if a majority of a branch's members is in one zone then
        #[arg(long)]
        force: bool,
    },
}

/// What is seen of quorums.
#[derive(Subcommand)]
pub enum QuorumVerb {
    /// Show who keeps a branch's WAL, and how far each is
    Show {
        /// Branch
        #[arg(long, default_value = "main")]
        branch: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Have who is left of a branch's safekeepers go on alone, when most of them are gone for good
    ///
    /// Without --accept-loss it only says what would be lost. Commits that only the lost safekeepers had, and that are not in object
    /// storage, are gone then; if one of them comes back after all, it counts for nothing, and keeps what it has. Where none is left
    /// others go on with what is in object storage. What the page server has is never lost: where it has more than the safekeepers
    /// that are left and object storage, a branch of it is the way.
    Recover {
        /// Branch
        #[arg(long, default_value = "main")]
        branch: String,
        /// Give up what only the lost ones had
        #[arg(long)]
        accept_loss: bool,
    },
}

/// A safekeeper, and what it says.
pub struct Seen {
    /// Which.
    pub node: NodeId,
    /// Its WAL port.
    pub address: String,
    /// How it is asked.
    pub service: Service,
    /// Its status.
    pub said: Result<Status>,
}

type Key = (TenantId, TimelineId);

/// What those said who answer.
fn said(seen: &[Seen]) -> impl Iterator<Item = &Status> {
    seen.iter().filter_map(|one| one.said.as_ref().ok())
}

/// The newest configuration of each timeline that anybody tells of.
fn quorums<'a>(said: impl IntoIterator<Item = &'a Status>) -> BTreeMap<Key, Quorum> {
    let mut newest: BTreeMap<Key, Quorum> = BTreeMap::new();
    for status in said {
        for timeline in &status.timelines {
            let Some(quorum) = &timeline.quorum else { continue };
            let key = (timeline.tenant_id, timeline.timeline_id);
            let known = newest.entry(key).or_insert_with(|| quorum.clone());
            if known.number < quorum.number {
                *known = quorum.clone();
            }
        }
    }
    newest
}

fn ids(group: &[Member]) -> Vec<u64> {
    group.iter().map(|member| member.id).collect()
}

/// The members that there are to be once the change under way has ended.
fn next_members(quorum: &Quorum) -> Vec<u64> {
    let group = match quorum.incoming.is_empty() {
        true => &quorum.members,
        false => &quorum.incoming,
    };
    ids(group)
}

/// How far each timeline is known to be committed.
fn committed(seen: &[Seen]) -> BTreeMap<Key, Lsn> {
    let mut most: BTreeMap<Key, Lsn> = BTreeMap::new();
    for status in said(seen) {
        for timeline in &status.timelines {
            let known = most.entry((timeline.tenant_id, timeline.timeline_id)).or_default();
            *known = timeline.commit_lsn.max(*known);
        }
    }
    most
}

/// Makes each timeline have the members that `wanted` says, of those that it is about to have; none if it has them. Goes on
/// where an earlier command ended. Those that came to be meanwhile, with whoever was there, are changed, too.
fn change(
    services: &dyn Services,
    wanted: impl Fn(&Quorum) -> Result<Vec<u64>>,
    force: bool,
) -> Result<usize> {
    let (mut met, mut changed) = (BTreeSet::new(), 0);
    // What was made meanwhile is there at the next look, without a pause.
    until_done(Instant::now, Duration::ZERO, || {
        let before = met.len();
        changed += change_unmet(services, &wanted, force, &mut met)?;
        Ok(match met.len() == before {
            true => Looked::Done(changed),
            false => Looked::NotYet(format!(
                "{} branches have the new members, and others may have been made meanwhile",
                met.len()
            )),
        })
    })
}

/// Changes those timelines that were not met yet.
fn change_unmet(
    services: &dyn Services,
    wanted: impl Fn(&Quorum) -> Result<Vec<u64>>,
    force: bool,
    met: &mut BTreeSet<Key>,
) -> Result<usize> {
    let seen = services.safekeepers()?;
    let silent: Vec<String> =
        seen.iter().filter(|one| one.said.is_err()).map(|one| one.node.to_string()).collect();
    if !silent.is_empty() {
        say_once(&format!("safekeepers that do not answer: {}", silent.join(", ")));
    }
    // All of them: what was decided may not have reached anybody who answers here.
    let (mut work, mut new) = (Vec::new(), BTreeSet::new());
    for (key, quorum) in quorums(said(&seen)) {
        if met.insert(key) {
            let nodes = wanted(&quorum)?;
            new.extend(newcomers(&seen, &quorum, &nodes));
            work.push((key, nodes, quorum.number));
        }
    }
    refuse_unknown(services, &seen, &silent)?;
    wait_until_registered(services, &new)?;
    let able: Vec<&Service> =
        seen.iter().filter(|one| one.said.is_ok()).map(|one| &one.service).collect();
    ensure!(!able.is_empty(), "no safekeeper answers");
    // What people call them is worth no failure.
    let names = names(services).unwrap_or_default();
    tell_stalled(&seen, &names, &mut work);
    let (next, progress) = (AtomicUsize::new(0), Progress::new(names, work.len()));
    let changed = AtomicUsize::new(0);
    let failed = std::thread::scope(|scope| {
        let take = || -> Result<()> {
            while let Some((key, nodes, before)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                let number = one(&able, *key, nodes, (force, *before), &progress)?;
                changed.fetch_add(usize::from(number != Some(*before)), Ordering::Relaxed);
                progress.add_done();
            }
            Ok(())
        };
        let threads: Vec<_> = (0..AT_ONCE.min(work.len())).map(|_| scope.spawn(take)).collect();
        threads.into_iter().find_map(|thread| match thread.join() {
            Ok(outcome) => outcome.err(),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    });
    match failed {
        None => Ok(changed.into_inner()),
        Some(error) => Err(error.context(format!(
            "{} of {} branches have the new members; the same command goes on with the others",
            progress.done(),
            work.len()
        ))),
    }
}

/// What branches are called.
fn names(services: &dyn Services) -> Result<Names> {
    let rows = branch::rows(services)?;
    Ok(rows.into_iter().map(|row| ((row.tenant_id, row.timeline_id), row.name)).collect())
}

/// Says of which branches no majority of the members answers, and puts them last: nothing moves there before those are brought
/// back, or given up, and the others have not to wait for that.
fn tell_stalled(seen: &[Seen], names: &Names, work: &mut [(Key, Vec<u64>, u64)]) {
    let said: Vec<&Status> = said(seen).collect();
    let quorums = quorums(said.iter().copied());
    let silent = |key: &Key| silent_majority(*key, quorums.get(key)?, &said);
    let members = |key: &Key| quorums.get(key).map(|quorum| ids(&quorum.members));
    let mut found = Vec::new();
    for (key, nodes, _) in work.iter() {
        // Who is to be what it is waits for nothing.
        if let (Some(silent), Some(members)) = (silent(key), members(key))
            && members != *nodes
        {
            found.push((*key, members, silent));
        }
    }
    for line in stalled(names, &found) {
        say_once(&line);
    }
    let is_stalled = |key: &Key| found.iter().any(|(other, ..)| other == key);
    work.sort_by_key(|(key, ..)| is_stalled(key));
}

/// Those of these nodes that are no members yet, in this life of their directories.
fn newcomers(seen: &[Seen], quorum: &Quorum, nodes: &[u64]) -> Vec<u64> {
    let is_member = |status: &Status| {
        let mut own = quorum.members.iter().filter(|member| member.id == status.id);
        own.any(|member| member.incarnation == status.incarnation)
    };
    let new = said(seen).filter(|status| nodes.contains(&status.id) && !is_member(status));
    new.map(|status| status.id).collect()
}

/// Who can't register in object storage can't be made a member: says why, rather than that nobody knows it.
fn wait_until_registered(services: &dyn Services, ids: &BTreeSet<u64>) -> Result<()> {
    let since = Instant::now();
    while !ids.is_empty() {
        let seen = services.safekeepers()?;
        let mut unregistered = said(&seen).filter(|status| ids.contains(&status.id));
        let found = unregistered.find_map(|one| Some((one.id, one.registration_error.clone()?)));
        let Some((id, why)) = found else { break };
        ensure!(
            since.elapsed() < REGISTER_PATIENCE,
            "safekeeper {id} can't register in object storage, and is made a member of nothing before it has: {why}. See whether \
             object storage has space and lets it write; it goes on trying, and the same command goes on"
        );
        std::thread::sleep(ASK_EVERY);
    }
    Ok(())
}

/// Refuses to call a change done where a branch may be kept by those only who do not answer.
fn refuse_unknown(services: &dyn Services, seen: &[Seen], silent: &[String]) -> Result<()> {
    // Those whose directories are gone have nothing that could be left without.
    let mut unheard = seen.iter().filter(|one| one.said.is_err());
    if unheard.all(|one| services.is_lost(one.node)) {
        return Ok(());
    }
    let known = quorums(said(seen));
    for row in branch::rows(services)? {
        // One that nothing was written to has no members yet.
        let is_written = row.last_record_lsn > row.start_lsn;
        ensure!(
            !is_written || known.contains_key(&(row.tenant_id, row.timeline_id)),
            "who keeps branch '{}' is told by none of the safekeepers that answer: start those that do not ({}), or this \
             could leave it without its only copy",
            row.name,
            silent.join(", ")
        );
    }
    Ok(())
}

/// Changes one timeline's members, which were thought out from the configuration of a number. Returns that which it has now.
fn one(
    able: &[&Service],
    key: Key,
    nodes: &[u64],
    (force, after): (bool, u64),
    progress: &Progress,
) -> Result<Option<u64>> {
    let nodes: Vec<String> = nodes.iter().map(u64::to_string).collect();
    let (tenant, timeline, nodes) = (key.0.to_string(), key.1.to_string(), nodes.join(","));
    let (force, after) = (force.to_string(), after.to_string());
    let query = [
        ("tenant_id", tenant.as_str()),
        ("timeline_id", &timeline),
        ("nodes", &nodes),
        ("force", &force),
        ("after", &after),
    ];
    let mut moved = (Instant::now(), None);
    // The same one again and again: it knows who is silent, where another one would have to find that out first.
    let mut turn = 0usize;
    loop {
        let asked: Result<Change> = able[turn % able.len()].post("/v1/members", &query, &[]);
        let why = match asked {
            Ok(change) if change.step == Step::Done => {
                return Ok(change.quorum.map(|quorum| quorum.number));
            }
            Ok(change) => {
                let at = (change.step, change.behind_bytes, change.quorum.map(|one| one.number));
                if moved.1 != Some(at) {
                    moved = (Instant::now(), Some(at));
                }
                match change.behind_bytes {
                    0 => format!("it waits for {}", change.waits_for),
                    bytes => {
                        format!("it waits for {} ({} MB behind)", change.waits_for, bytes >> 20)
                    }
                }
            }
            Err(error) => match error.downcast_ref::<Refused>() {
                Some(refused) if refused.0.code != Code::Busy => return Err(error),
                // It may be gone, or busy: another one is asked.
                _ => {
                    turn += 1;
                    format!("{error:#}")
                }
            },
        };
        // It may be the one that others don't hear.
        turn += usize::from(moved.0.elapsed() > TURN_AFTER);
        ensure!(
            moved.0.elapsed() < PATIENCE,
            "{}: nothing has moved for {} s: {why}",
            progress.named(key),
            PATIENCE.as_secs()
        );
        progress.tell(key, &why);
        std::thread::sleep(ASK_EVERY);
    }
}

/// Their members, with one in the place of another.
fn replaced(quorum: &Quorum, old: u64, new: Option<u64>) -> Vec<u64> {
    let mut nodes = next_members(quorum);
    if nodes.contains(&old) {
        nodes.retain(|&node| node != old);
        nodes.extend(new.filter(|new| !nodes.contains(new)));
    }
    nodes
}

fn report(what: &str, count: usize) -> Result<()> {
    out::line(&format!("{what}; {count} branches changed"))
}

/// In a cluster elsewhere, whose processes somebody else starts and stops.
pub fn run_elsewhere(services: &dyn Services, verb: &SafekeeperVerb) -> Result<()> {
    match *verb {
        SafekeeperVerb::List { json } => list(services, json),
        SafekeeperVerb::Add { id, force, json, .. } => {
            let Some(id) = id else {
                bail!("--id is needed: the node id of the safekeeper, which runs already");
            };
            let added = |quorum: &Quorum| {
                let mut nodes = next_members(quorum);
                nodes.extend(Some(id).filter(|id| !nodes.contains(id)));
                Ok(nodes)
            };
            let count = change(services, added, force)?;
            done_adding(id, count, json)
        }
        SafekeeperVerb::Replace { id, with, force, .. } => {
            let new = with.unwrap_or(id);
            let count = change(services, |quorum| Ok(replaced(quorum, id, Some(new))), force)?;
            report(&format!("safekeeper {new} is in the place of {id}"), count)
        }
        SafekeeperVerb::Remove { id, force } => {
            let count = without(services, id, force)?;
            report(&format!("safekeeper {id} is no member of anything"), count)
        }
        SafekeeperVerb::Drain { id, force } => drain(services, id, force),
    }
}

fn done_adding(id: u64, count: usize, json: bool) -> Result<()> {
    match json {
        true => out::line(&json!({ "id": id, "timelines": count }).to_string()),
        false => report(&format!("safekeeper {id} is a member"), count),
    }
}

fn without(services: &dyn Services, id: u64, force: bool) -> Result<usize> {
    let without = |quorum: &Quorum| {
        let is_member = quorum.members.iter().any(|member| member.id == id);
        if !is_member && quorum.incoming.iter().any(|member| member.id == id) {
            // It is about to come: those go on who were there before.
            return Ok(quorum.members.iter().map(|member| member.id).collect());
        }
        let nodes = replaced(quorum, id, None);
        ensure!(!nodes.is_empty(), "safekeeper {id} is the only one that keeps a branch");
        Ok(nodes)
    };
    change(services, without, force)
}

fn drain(services: &dyn Services, id: u64, force: bool) -> Result<()> {
    let seen = services.safekeepers()?;
    let able: Vec<u64> = seen.iter().filter(|one| one.said.is_ok()).map(|one| one.node.0).collect();
    let elsewhere = |quorum: &Quorum| {
        let nodes = next_members(quorum);
        let free = able.iter().find(|&&node| node != id && !nodes.contains(&node));
        match (nodes.contains(&id), free) {
            (false, _) => Ok(nodes),
            (true, Some(&free)) => Ok(replaced(quorum, id, Some(free))),
            (true, None) => bail!(
                "there is no other safekeeper that could take what {id} keeps: start one, or use 'safekeeper remove', \
                 which leaves one copy less"
            ),
        }
    };
    let count = change(services, elsewhere, force)?;
    report(&format!("safekeeper {id} keeps nothing"), count)
}

/// Names of branches that a safekeeper is to keep, by those who answer, of whom each branch must have one.
fn kept_by(services: &dyn Services, id: u64) -> Result<Vec<String>> {
    let seen = services.safekeepers()?;
    let silent: Vec<String> =
        seen.iter().filter(|one| one.said.is_err()).map(|one| one.node.to_string()).collect();
    let has_others = seen.iter().any(|one| one.said.is_ok() && one.node.0 != id);
    ensure!(has_others, "no other safekeeper answers: whether {id} keeps anything is not known");
    refuse_unknown(services, &seen, &silent)?;
    let keeps = |quorum: &Quorum| {
        quorum.members.iter().chain(&quorum.incoming).any(|member| member.id == id)
    };
    let kept = quorums(said(&seen)).into_iter().filter(|(_, quorum)| keeps(quorum));
    let kept: BTreeSet<Key> = kept.map(|(key, _)| key).collect();
    if kept.is_empty() {
        return Ok(Vec::new());
    }
    // Of what was deleted not everybody may have heard.
    let rows = branch::rows(services)?;
    let its = rows.into_iter().filter(|row| kept.contains(&(row.tenant_id, row.timeline_id)));
    Ok(its.map(|row| row.name).collect())
}

/// Changes members so that `id` keeps nothing, and stops it in the very moment in which that is so: before another branch is made,
/// with it. Returns how many branches were changed.
fn end(
    dir: &Path,
    id: u64,
    without: impl Fn(&Cluster) -> Result<usize>,
    after: impl FnOnce(&mut Cluster) -> Result<()>,
) -> Result<usize> {
    let mut changed = 0;
    let mut after = Some(after);
    until_done(Instant::now, ASK_EVERY, || {
        changed += without(&Cluster::open(dir)?)?;
        let (mut cluster, _lock) = Cluster::change(dir)?;
        let kept = kept_by(&cluster, id)?;
        if kept.is_empty() {
            after.take().map_or(Ok(()), |after| after(&mut cluster))?;
            return Ok(Looked::Done(changed));
        }
        // Members may not have heard yet of what was decided.
        let (named, others) = kept.split_at(kept.len().min(MOST_NAMED));
        let others = match others.len() {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        Ok(Looked::NotYet(format!(
            "safekeeper {id} still keeps {}{others}, or not everybody has heard that it does not",
            named.join(", ")
        )))
    })
}

/// In a cluster that `up` made: processes are started and stopped, too. While members change, which takes as long as copying does,
/// other commands may change what else there is: `up` starts a safekeeper that this waits for.
pub fn run_here(dir: &Path, verb: SafekeeperVerb) -> Result<()> {
    Cluster::open(dir)?;
    let _members = Lock::take_for_members(dir)?;
    // What the command before has left.
    let cluster = Cluster::open(dir)?;
    let begin = |zone: Option<String>, replaces| {
        let (mut cluster, _lock) = Cluster::change(dir)?;
        let id = up::begin_safekeeper(&mut cluster, zone, replaces)?;
        Ok::<_, anyhow::Error>((id, cluster))
    };
    match verb {
        SafekeeperVerb::Add { zone, force, json, id: None } => {
            let (id, cluster) = begin(zone, None)?;
            let added = |quorum: &Quorum| {
                let mut nodes = next_members(quorum);
                nodes.extend(Some(id).filter(|id| !nodes.contains(id)));
                Ok(nodes)
            };
            let count = change(&cluster, added, force)?;
            let (mut cluster, _lock) = Cluster::change(dir)?;
            up::safekeeper_has_joined(&mut cluster, id, None)?;
            done_adding(id, count, json)
        }
        SafekeeperVerb::Replace { id, zone, force, with: None } => {
            let (new, _) = begin(zone, Some(id))?;
            let mut unfinished = None;
            let instead = |cluster: &Cluster| {
                // A branch that went on with fewer, when most were lost, gets one more.
                let places = cluster.state.safekeepers.iter();
                let full = places.filter(|place| place.id != id).count();
                let filled = |quorum: &Quorum| {
                    let mut nodes = replaced(quorum, id, Some(new));
                    if nodes.len() < full && !nodes.contains(&new) {
                        nodes.push(new);
                    }
                    Ok(nodes)
                };
                change(cluster, filled, force)
            };
            let count = end(dir, id, instead, |cluster| {
                unfinished = up::joins_for(cluster, id);
                up::end_safekeeper(cluster, id)?;
                up::safekeeper_has_joined(cluster, new, unfinished)
            })?;
            if let Some(old) = unfinished.filter(|&old| old > 0) {
                eprintln!(
                    "pgstrata: safekeeper {id} was to take the place of {old}: 'pgstrata safekeeper replace {old}' goes on \
                     with {new}"
                );
            }
            report(&format!("safekeeper {new} is in the place of {id}"), count)
        }
        SafekeeperVerb::Remove { id, force } => {
            let listed = cluster.state.safekeepers.iter().any(|place| place.id == id);
            ensure!(listed, "there is no safekeeper {id} in {}", dir.display());
            let without = |cluster: &Cluster| without(cluster, id, force);
            let count = end(dir, id, without, |cluster| up::end_safekeeper(cluster, id))?;
            report(&format!("safekeeper {id} is no member of anything"), count)
        }
        SafekeeperVerb::Add { id: Some(_), .. } | SafekeeperVerb::Replace { with: Some(_), .. } => {
            bail!("a cluster made by 'up' starts its safekeepers itself: leave out --id and --with")
        }
        other => run_elsewhere(&cluster, &other),
    }
}
