//! `quorum recover`: going on where a majority of a branch's safekeepers is lost.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use pgstrata_ids::{Lsn, NodeId};
use pgstrata_wire::http::Code;
use pgstrata_wire::http::pageserver::Branch;
use pgstrata_wire::http::safekeeper::{Archived, Change, Member, Quorum, Status, Timeline};

use super::{
    ASK_EVERY, Key, Names, PATIENCE, Progress, Seen, TELL_EVERY, one, quorums, said,
    wait_until_registered,
};
use crate::cluster::Cluster;
use crate::http::{Refused, Service};
use crate::services::Services;
use crate::{branch, out, up};

fn text(ids: &BTreeSet<u64>) -> String {
    ids.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

/// `quorum recover`.
pub fn recover(services: &dyn Services, name: &str, accept_loss: bool) -> Result<()> {
    let Some(row) = branch::find(services, name)? else { bail!("there is no branch '{name}'") };
    let key = (row.tenant_id, row.timeline_id);
    let seen = services.safekeepers()?;
    let left = quorums(said(&seen)).remove(&key).map(|quorum| Left { seen: &seen, key, quorum });
    match left.filter(|left| !left.survivors().is_empty()) {
        Some(left) => with_survivors(&row, &left, accept_loss),
        None => from_archive(&row, &seen, accept_loss).map(drop),
    }
}

/// The same in a cluster that `up` made: others are started where none of the members is left.
pub fn recover_here(cluster: &mut Cluster, name: &str, accept_loss: bool) -> Result<()> {
    let Some(row) = branch::find(cluster, name)? else { bail!("there is no branch '{name}'") };
    let key = (row.tenant_id, row.timeline_id);
    let seen = cluster.safekeepers()?;
    let quorum = quorums(said(&seen)).remove(&key);
    let is_lost =
        quorum.is_none_or(|quorum| Left { seen: &seen, key, quorum }.survivors().is_empty());
    if !is_lost {
        return recover(cluster, name, accept_loss);
    }
    let silent: Vec<u64> =
        seen.iter().filter(|one| one.said.is_err()).map(|one| one.node.0).collect();
    ensure!(
        accept_loss || silent.len() < seen.len(),
        "no safekeeper answers. If the directories of all of them are gone for good, --accept-loss starts others, which go on \
         with what object storage has of branch '{name}'"
    );
    if !accept_loss {
        return from_archive(&row, &seen, false).map(drop);
    }
    let decided = start_others(cluster, key, &silent)?;
    // They stay: what the page server has needs somebody to keep what is written to it.
    let begun = begun_for(cluster, &silent);
    let seen = cluster.safekeepers()?;
    let members = from_archive(&row, &seen, true).map_err(|error| {
        anyhow!("{error:#} (safekeepers {} were started, and can keep it)", text(&begun))
    })?;
    for &new in begun.intersection(&members) {
        up::safekeeper_has_joined(cluster, new, None)?;
    }
    let is_member = |id: &u64| decided.as_ref().is_none_or(|before| before.contains(id));
    let lost: BTreeSet<u64> = silent.into_iter().filter(is_member).collect();
    if !lost.is_empty() {
        out::line(&format!(
            "'pgstrata safekeeper remove' forgets the lost ones ({}), once all branches that they kept were recovered",
            text(&lost)
        ))?;
    }
    Ok(())
}

/// Those who were started in the place of one of these, by this command or an earlier one that ended early.
fn begun_for(cluster: &Cluster, silent: &[u64]) -> BTreeSet<u64> {
    let places = cluster.state.safekeepers.iter();
    let begun = places.filter(|place| place.joins_for.is_some_and(|old| silent.contains(&old)));
    begun.map(|place| place.id).collect()
}

/// Starts as many as the branch has lost and others can't be made: not one for each that is silent, which may keep other branches,
/// and come back. Returns who the members were, if anybody says it.
fn start_others(cluster: &mut Cluster, key: Key, silent: &[u64]) -> Result<Option<BTreeSet<u64>>> {
    // As 'safekeeper replace' does, which finds them where this ends early.
    let start = |cluster: &mut Cluster, old: u64| {
        let new = up::begin_safekeeper(cluster, None, Some(old))?;
        wait_until_heard(cluster, new)
    };
    // Somebody has to read who they were. Whose directory is gone is surely lost.
    if cluster.safekeepers()?.iter().all(|one| one.said.is_err()) {
        let lost = silent.iter().copied().find(|&id| cluster.is_lost(NodeId(id)));
        let first = lost.or(silent.first().copied()).context("there is no safekeeper")?;
        start(cluster, first)?;
    }
    let decided = decided_members(cluster, key)?;
    let members = decided.clone().unwrap_or_else(|| silent.iter().copied().collect());
    for &old in members.iter().filter(|id| silent.contains(id)) {
        if free(cluster, key, &members)? >= members.len() {
            break;
        }
        start(cluster, old)?;
    }
    Ok(decided)
}

/// Who the members are by what is decided, whether or not they answer; `None` where those who answer are of a release that does
/// not say it.
fn decided_members(cluster: &Cluster, key: Key) -> Result<Option<BTreeSet<u64>>> {
    let seen = cluster.safekeepers()?;
    let first = seen.iter().find(|one| one.said.is_ok()).context("no safekeeper answers")?;
    let quorum = ask_archived(&first.service, key)?.quorum;
    Ok(quorum.map(|quorum| quorum.members.iter().map(|member| member.id).collect()))
}

/// How many answer that have nothing of a timeline, so that they can be made members of it.
fn free(cluster: &Cluster, key: Key, members: &BTreeSet<u64>) -> Result<usize> {
    let seen = cluster.safekeepers()?;
    let is_free = |status: &&Status| {
        let served = status.timelines.iter().map(|one| (one.tenant_id, one.timeline_id));
        let damaged = status.damaged.iter().map(|one| (one.tenant_id, one.timeline_id));
        !members.contains(&status.id) && !served.chain(damaged).any(|one| one == key)
    };
    Ok(said(&seen).filter(is_free).count())
}

/// Has one that was just started answer, and be known where members are decided.
fn wait_until_heard(cluster: &Cluster, id: u64) -> Result<()> {
    let since = Instant::now();
    let heard = |cluster: &Cluster| -> Result<bool> {
        let seen = cluster.safekeepers()?;
        Ok(said(&seen).any(|status| status.id == id))
    };
    while !heard(cluster)? {
        ensure!(since.elapsed() < PATIENCE, "safekeeper {id} was started, and does not answer");
        std::thread::sleep(ASK_EVERY);
    }
    wait_until_registered(cluster, &BTreeSet::from([id]))
}

/// What there is of a timeline in object storage, by a safekeeper, which gets what it lacks of it, too.
fn ask_archived(service: &Service, key: Key) -> Result<Archived> {
    let (tenant, timeline) = (key.0.to_string(), key.1.to_string());
    let query = [("tenant_id", tenant.as_str()), ("timeline_id", &timeline)];
    service.post("/v1/catch-up", &query, &[])
}

/// What is left of a branch's members.
struct Left<'a> {
    seen: &'a [Seen],
    key: Key,
    quorum: Quorum,
}

impl Left<'_> {
    fn of(&self, member: &Member) -> Option<&Timeline> {
        let status = self.seen.iter().filter_map(|one| one.said.as_ref().ok());
        let mut its =
            status.filter(|said| said.id == member.id && said.incarnation == member.incarnation);
        let is_it = |one: &&Timeline| (one.tenant_id, one.timeline_id) == self.key;
        its.next()?.timelines.iter().find(is_it)
    }

    fn members(&self) -> impl Iterator<Item = &Member> {
        self.quorum.members.iter().chain(&self.quorum.incoming)
    }

    fn survivors(&self) -> BTreeSet<u64> {
        let answering = self.members().filter(|member| self.of(member).is_some());
        answering.map(|member| member.id).collect()
    }

    /// Those to be asked where this was decided before, and did not come to its end: the one that has most decides with all, until
    /// they have it too. `None` where that is not so, or too few answer.
    fn unfinished(&self) -> Option<Vec<&Service>> {
        let Quorum { members, incoming, .. } = &self.quorum;
        let [most] = members.as_slice() else { return None };
        let answering = incoming.iter().filter(|member| self.of(member).is_some()).count();
        let is_so = incoming.contains(most) && self.of(most).is_some();
        let able = self.seen.iter().filter(|one| one.said.is_ok()).map(|one| &one.service);
        (is_so && 2 * answering > incoming.len()).then(|| able.collect())
    }

    fn lost(&self) -> BTreeSet<u64> {
        let silent = self.members().filter(|member| self.of(member).is_none());
        silent.map(|member| member.id).collect()
    }
}

/// The progress of one branch.
fn alone(row: &Branch) -> Progress {
    Progress::new(Names::from([((row.tenant_id, row.timeline_id), row.name.clone())]), 1)
}

/// Those who are left go on, once they have what is archived.
fn with_survivors(row: &Branch, left: &Left<'_>, accept_loss: bool) -> Result<()> {
    let (name, quorum) = (&row.name, &left.quorum);
    if accept_loss && let Some(able) = left.unfinished() {
        let nodes: Vec<u64> = quorum.incoming.iter().map(|member| member.id).collect();
        one(&able, left.key, &nodes, (true, quorum.number), &alone(row))?;
        let nodes = text(&nodes.into_iter().collect());
        return out::line(&format!("branch '{name}' goes on with {nodes}, as was decided before"));
    }
    // A change that is under way can be undone by those who were members before it.
    let answering = quorum.members.iter().filter(|member| left.of(member).is_some()).count();
    ensure!(
        answering <= quorum.members.len() / 2,
        "a majority of the safekeepers of branch '{name}' answers: nothing needs to be given up. 'pgstrata safekeeper replace \
         ID' puts another one in the place of one that is gone"
    );
    let (survivors, lost) = (left.survivors(), left.lost());
    // What it has is not lost yet.
    let mends = |id: &&u64| {
        let said = left.seen.iter().filter_map(|one| one.said.as_ref().ok());
        let mut its = said.filter(|said| said.id == **id).flat_map(|said| &said.damaged);
        its.any(|one| (one.tenant_id, one.timeline_id) == left.key && one.mending)
    };
    if let Some(id) = lost.iter().find(mends) {
        bail!(
            "safekeeper {id} answers, and gets what is damaged of branch '{name}' from others: it may have what they lack. \
             'pgstrata safekeeper list' and its status say how far it is; stop it if what it has is to be given up"
        );
    }
    let able: Vec<&Service> = left
        .seen
        .iter()
        .filter(|one| survivors.contains(&one.node.0))
        .map(|one| &one.service)
        .collect();
    // What is beyond may be of a compute that committed nothing.
    let known = left.members().filter_map(|member| left.of(member)).map(|one| one.commit_lsn).max();
    let end = get_archived(&able, left.key, known.unwrap_or_default())?;
    refuse_what_would_not_fit(row, end, "no safekeeper that is left knows more than")?;
    let line = format!(
        "branch '{name}': commits after {end} may be missing, which only safekeepers {} had; all before it are with {}",
        text(&lost),
        text(&survivors)
    );
    if !accept_loss {
        bail!("{line}. If they are gone for good, --accept-loss goes on without them");
    }
    let Some(first) = able.first() else { bail!("no safekeeper answers any more") };
    let nodes: Vec<u64> = survivors.iter().copied().collect();
    let begun = decide(first, left.key, (&survivors, &[]), quorum.number)?;
    // Where there are several, the one that has most of it decides until all have it.
    let number = begun.quorum.map_or(quorum.number, |quorum| quorum.number);
    one(&able, left.key, &nodes, (true, number), &alone(row))?;
    out::line(&line)?;
    out::line(&format!(
        "it goes on with {} alone: 'pgstrata safekeeper remove' forgets the lost ones, and 'pgstrata safekeeper add' \
         makes it safe again",
        text(&survivors)
    ))
}

/// Has those who are left get what is in object storage and they lack. Returns up to where what is committed is known then.
fn get_archived(able: &[&Service], key: Key, known: Lsn) -> Result<Lsn> {
    let mut moved = (Instant::now(), known);
    let mut told = Instant::now();
    loop {
        let (mut most, mut archived) = (known, Lsn::INVALID);
        for service in able {
            let has = ask_archived(service, key)?;
            most = most.max(has.commit_lsn.unwrap_or_default());
            archived = archived.max(has.archived_lsn.unwrap_or_default());
        }
        if most >= archived {
            return Ok(most);
        }
        if most > moved.1 {
            moved = (Instant::now(), most);
        }
        ensure!(
            moved.0.elapsed() < PATIENCE,
            "object storage has WAL up to {archived}, and those who are left have it up to {most} only, and get no more: \
             their logs say why"
        );
        if told.elapsed() > TELL_EVERY {
            told = Instant::now();
            let missing = archived.saturating_sub(most) >> 20;
            eprintln!("pgstrata: who is left gets {missing} MB of WAL from object storage");
        }
        std::thread::sleep(ASK_EVERY);
    }
}

/// Where what is archived ends, with which others can go on.
fn end_of_archive(row: &Branch, able: &[&Seen]) -> Result<Lsn> {
    let (name, key) = (&row.name, (row.tenant_id, row.timeline_id));
    // What it has is not lost yet.
    let mends = |one: &&&Seen| {
        let mut damaged = one.said.iter().flat_map(|said| &said.damaged);
        damaged.any(|one| (one.tenant_id, one.timeline_id) == key && one.mending)
    };
    if let Some(one) = able.iter().find(mends) {
        bail!(
            "safekeeper {} answers, and gets what is damaged of branch '{name}' from others: it may have what they lack. Stop it \
             if what it has is to be given up",
            one.node
        );
    }
    let Some(first) = able.first() else {
        bail!("no safekeeper answers: start as many as branch '{name}' had, with new directories")
    };
    let Some(end) = ask_archived(&first.service, key)?.archived_lsn else {
        bail!(
            "no safekeeper that answers has WAL of branch '{name}', and none is in object storage. The page server has it up to \
             {}: 'pgstrata branch create NAME --from {name}' makes a branch of that",
            row.last_record_lsn
        );
    };
    refuse_what_would_not_fit(row, end, "object storage has its WAL only up to")?;
    Ok(end)
}

/// Others go on with what is archived. Returns who they are.
fn from_archive(row: &Branch, seen: &[Seen], accept_loss: bool) -> Result<BTreeSet<u64>> {
    let (name, key) = (&row.name, (row.tenant_id, row.timeline_id));
    let able: Vec<&Seen> = seen.iter().filter(|one| one.said.is_ok()).collect();
    let end = end_of_archive(row, &able)?;
    let line = format!(
        "branch '{name}': commits after {end} may be missing, which only its safekeepers had, none of which answers; all \
         before it are in object storage"
    );
    if !accept_loss {
        bail!("{line}. If they are gone for good, --accept-loss goes on with others");
    }
    let newcomers = spread(&able);
    let first = able.first().context("no safekeeper answers")?;
    let begun = decide(&first.service, key, (&BTreeSet::new(), &newcomers), 0)?;
    out::line(&line)?;
    out::line("it goes on with others: 'pgstrata quorum show' says which")?;
    let members = begun.quorum.into_iter().flat_map(|quorum| quorum.members);
    Ok(members.map(|member| member.id).collect())
}

/// Nodes in an order in which the first few are in as many zones as there are.
fn spread(able: &[&Seen]) -> Vec<u64> {
    let mut left: Vec<(&str, u64)> = able
        .iter()
        .filter_map(|one| Some((one.said.as_ref().ok()?.zone.as_str(), one.node.0)))
        .collect();
    let mut order = Vec::new();
    while !left.is_empty() {
        let mut zones = BTreeSet::new();
        left.retain(|&(zone, node)| {
            // Of those whose zone is not known each is in one of its own.
            let is_next = zone.is_empty() || zones.insert(zone);
            if is_next {
                order.push(node);
            }
            !is_next
        });
    }
    order
}

/// The page server's pages are made of what was committed: other WAL before there would not fit them.
fn refuse_what_would_not_fit(row: &Branch, end: Lsn, who: &str) -> Result<()> {
    let name = &row.name;
    ensure!(
        row.last_record_lsn <= end,
        "the page server has branch '{name}' up to {}, and {who} {end} to be committed: 'pgstrata branch create NAME --from \
         {name}' makes a branch that has all of it",
        row.last_record_lsn
    );
    Ok(())
}

fn decide(
    service: &Service,
    key: Key,
    (survivors, newcomers): (&BTreeSet<u64>, &[u64]),
    after: u64,
) -> Result<Change> {
    let newcomers: Vec<String> = newcomers.iter().map(u64::to_string).collect();
    let (tenant, timeline, newcomers) = (key.0.to_string(), key.1.to_string(), newcomers.join(","));
    let (survivors, after) = (text(survivors).replace(' ', ""), after.to_string());
    let query = [
        ("tenant_id", tenant.as_str()),
        ("timeline_id", &timeline),
        ("survivors", &survivors),
        ("after", &after),
        ("newcomers", &newcomers),
    ];
    let since = Instant::now();
    let begun: Change = loop {
        let asked: Result<Change> = service.post("/v1/recover", &query, &[]);
        match asked {
            Err(error) if is_busy(&error) && since.elapsed() < PATIENCE => {
                std::thread::sleep(ASK_EVERY);
            }
            other => break other?,
        }
    };
    ensure!(
        begun.waits_for.is_empty(),
        "it is decided, but not everybody has heard of it ({}): give the command again",
        begun.waits_for
    );
    Ok(begun)
}

/// Whether it may be otherwise in a moment.
fn is_busy(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Refused>().is_some_and(|refused| refused.0.code == Code::Busy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_go_on_are_spread_over_zones() {
        let one = |node: u64, zone: &str| {
            let said = serde_json::json!({
                "id": node, "incarnation": "", "zone": zone, "timelines": [], "damaged": []
            });
            let said: Status = serde_json::from_value(said).unwrap();
            let service = Service::pageserver("127.0.0.1:1");
            Seen { node: NodeId(node), address: String::new(), service, said: Ok(said) }
        };
        let order = |all: &[Seen]| spread(&all.iter().collect::<Vec<_>>());
        let all = [one(1, "a"), one(2, "a"), one(3, "b"), one(4, "b"), one(5, "c")];
        assert_eq!(order(&all), [1, 3, 5, 2, 4]);
        assert_eq!(order(&[one(1, ""), one(2, ""), one(3, "a")]), [1, 2, 3]);
        assert_eq!(order(&[]), Vec::<u64>::new());
    }
}
