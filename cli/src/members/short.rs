//! Branches that are short of members: what `status`, `doctor` and `quorum show` say of them, and what is to be run.
//!
//! A branch has fewer members than it should where it has less than three while there are as many safekeepers, or where some of
//! them are lost: their directories are gone, or other ones are in their place. One whose members are being changed is
//! told of as well, since a command that was interrupted leaves it so. Nobody is asked here.

use std::collections::{BTreeMap, BTreeSet};

use pgstrata_wire::http::pageserver::Branch;
use pgstrata_wire::http::safekeeper::{Member, Quorum, Status};

use super::{Key, Seen, quorums};
use crate::cluster::Cluster;
use crate::services::Services;
use crate::up;

/// Members that a branch should have, where there are as many safekeepers.
const WANTED: usize = 3;

/// What is seen of a safekeeper.
enum Sight {
    /// It answers, in this life of its directory, and has copies of these.
    Answers(String, BTreeSet<Key>),
    /// It does not.
    Silent,
    /// What it had is gone.
    Lost,
}

/// All safekeepers of a cluster.
pub struct Safekeepers {
    seen: BTreeMap<u64, Sight>,
    /// Whether commands start and stop them.
    is_here: bool,
}

/// What is to be said of some branches.
pub struct Short {
    /// The first of them.
    pub branch: String,
    /// How many more there are of whom the same is to be said.
    pub others: usize,
    /// One line: who the members are, and what to run.
    pub text: String,
}

impl Short {
    /// Which branches.
    pub fn object(&self) -> String {
        match self.others {
            0 => self.branch.clone(),
            count => format!("{} and {count} more", self.branch),
        }
    }
}

fn list(ids: impl IntoIterator<Item = u64>) -> String {
    ids.into_iter().map(|id| id.to_string()).collect::<Vec<_>>().join(", ")
}

/// Safekeepers by their ids, for people.
fn named(ids: &[u64]) -> String {
    match ids {
        [id] => format!("safekeeper {id}"),
        _ => format!("safekeepers {}", list(ids.iter().copied())),
    }
}

fn ids(group: &[Member]) -> Vec<u64> {
    group.iter().map(|member| member.id).collect()
}

/// Those of `group` who are not in `other`.
fn without(group: &[Member], other: &[Member]) -> Vec<u64> {
    ids(group).into_iter().filter(|id| !ids(other).contains(id)).collect()
}

impl Safekeepers {
    /// Those of which this is known: their ids, what they said if they did, and whether they are lost.
    pub fn new<'a>(
        is_here: bool,
        all: impl IntoIterator<Item = (u64, Option<&'a Status>, bool)>,
    ) -> Safekeepers {
        let sight = |said: Option<&Status>, is_lost| match said {
            _ if is_lost => Sight::Lost,
            None => Sight::Silent,
            Some(status) => {
                let served = status.timelines.iter().map(|one| (one.tenant_id, one.timeline_id));
                let damaged = status.damaged.iter().map(|one| (one.tenant_id, one.timeline_id));
                Sight::Answers(status.incarnation.clone(), served.chain(damaged).collect())
            }
        };
        let seen = all.into_iter().map(|(id, said, is_lost)| (id, sight(said, is_lost))).collect();
        Safekeepers { seen, is_here }
    }

    /// Those of a cluster on this machine.
    pub fn here<'a>(
        cluster: &Cluster,
        said: impl IntoIterator<Item = &'a Status>,
        lost: &BTreeSet<u64>,
    ) -> Safekeepers {
        let said: BTreeMap<u64, &Status> =
            said.into_iter().map(|status| (status.id, status)).collect();
        let places = cluster.state.safekeepers.iter().map(|place| place.id);
        Safekeepers::new(true, places.map(|id| (id, said.get(&id).copied(), lost.contains(&id))))
    }

    /// Those of a cluster, as they were just seen.
    pub(super) fn of(services: &dyn Services, seen: &[Seen]) -> Safekeepers {
        let all =
            seen.iter().map(|one| (one.node.0, one.said.as_ref().ok(), services.is_lost(one.node)));
        Safekeepers::new(services.is_here(), all)
    }

    /// Why a member has nothing of what it promised; `None` if that is not so, or not known.
    fn loss(&self, member: &Member) -> Option<&'static str> {
        match self.seen.get(&member.id) {
            Some(Sight::Lost) => Some("has lost its directory"),
            Some(Sight::Answers(incarnation, _)) if *incarnation != member.incarnation => {
                Some("has another directory than the member had")
            }
            Some(Sight::Answers(..) | Sight::Silent) => None,
            None if self.is_here => Some("is not one of this cluster any more"),
            None => Some("has not been heard of lately"),
        }
    }

    /// What is to be said of a branch with these members, if anything.
    pub fn trouble(&self, key: Key, quorum: &Quorum) -> Option<String> {
        if !quorum.incoming.is_empty() {
            return Some(self.changing(quorum));
        }
        let members = &quorum.members;
        let lost: Vec<_> =
            members.iter().filter_map(|one| Some((one.id, self.loss(one)?))).collect();
        if !lost.is_empty() {
            return Some(self.losing(&ids(members), &lost));
        }
        let is_few = members.len() < WANTED && self.seen.len() >= WANTED;
        is_few.then(|| self.few(key, &ids(members)))
    }

    /// What is to be said of a branch that nobody keeps yet, if a majority of all safekeepers, which begins one, does not answer.
    fn unbegun(&self) -> Option<String> {
        let answers = |sight: &&Sight| matches!(sight, Sight::Answers(..));
        let (all, able) = (self.seen.len(), self.seen.values().filter(answers).count());
        if able > all / 2 {
            return None;
        }
        let mut away = Vec::new();
        let mut commands = Vec::new();
        for (&id, sight) in &self.seen {
            match sight {
                Sight::Answers(..) => continue,
                Sight::Silent => away.push(format!("safekeeper {id} does not answer")),
                Sight::Lost => away.push(format!("safekeeper {id} has lost its directory")),
            }
            commands.push(format!("'pgstrata safekeeper replace {id}'"));
        }
        let start = match self.is_here {
            true => "start what does not run ('pgstrata up')",
            false => "start those",
        };
        Some(format!(
            "no compute starts: nobody keeps it yet, and a majority of all {all} safekeepers begins a branch; {}. Bring them back: \
             {start}; or put others in the places of those that are gone for good: {}",
            away.join("; "),
            commands.join(", ")
        ))
    }

    fn changing(&self, quorum: &Quorum) -> String {
        let (before, after) = (&quorum.members, &quorum.incoming);
        let (leave, come) = (without(before, after), without(after, before));
        // Who begins anew in the same place.
        let renewed = after.iter().find(|one| {
            before.iter().any(|old| old.id == one.id && old.incarnation != one.incarnation)
        });
        let command = match (leave.as_slice(), come.as_slice(), renewed) {
            ([old], [_], None) if self.is_here => format!("replace {old}"),
            ([old], [new], None) => format!("replace {old} --with {new}"),
            ([old], [], None) => format!("remove {old}"),
            ([], [_], None) if self.is_here => "add".to_owned(),
            ([], [new], None) => format!("add --id {new}"),
            ([], [], Some(one)) => format!("replace {}", one.id),
            _ => String::new(),
        };
        let again = match command.as_str() {
            "" => "that command".to_owned(),
            command => format!("'pgstrata safekeeper {command}'"),
        };
        format!(
            "its members are being changed from {} to {}: unless a command is at it, it was interrupted, and {again} goes on \
             when it is given again",
            named(&ids(before)),
            list(ids(after))
        )
    }

    fn losing(&self, members: &[u64], lost: &[(u64, &str)]) -> String {
        let said: Vec<String> =
            lost.iter().map(|(id, why)| format!("safekeeper {id} {why}")).collect();
        let what =
            format!("of its members ({}), {}", list(members.iter().copied()), said.join("; "));
        if 2 * lost.len() >= members.len() {
            return format!(
                "{what}: no majority is left, bring them back with their directories. If they are gone for good, 'pgstrata quorum \
                 recover --branch BRANCH' says what would be lost"
            );
        }
        let commands: Vec<String> = lost.iter().map(|(id, _)| self.replacing(*id)).collect();
        format!("{what}: {}", commands.join(", then "))
    }

    /// The command that puts another one in the place of a member.
    fn replacing(&self, id: u64) -> String {
        match self.seen.get(&id) {
            // It can come in anew with the directory that it has.
            Some(_) => format!("run 'pgstrata safekeeper replace {id}'"),
            None if self.is_here => "run 'pgstrata safekeeper add'".to_owned(),
            None => format!(
                "start it again, or run 'pgstrata safekeeper replace {id} --with ID', which puts another one in its place"
            ),
        }
    }

    fn few(&self, key: Key, members: &[u64]) -> String {
        let lacking = WANTED - members.len().min(WANTED);
        let others = || self.seen.iter().filter(|(id, _)| !members.contains(id));
        let commands: Vec<String> = match self.is_here {
            true => {
                // Who can't be made a member of it: its place is taken by another one.
                let mut gone: Vec<(u8, u64)> = others()
                    .filter_map(|(&id, sight)| match sight {
                        Sight::Lost => Some((0, id)),
                        Sight::Silent => Some((1, id)),
                        Sight::Answers(_, has) => has.contains(&key).then_some((2, id)),
                    })
                    .collect();
                gone.sort_unstable();
                let gone = gone.into_iter().map(|(_, id)| format!("replace {id}"));
                gone.chain(std::iter::repeat("add".to_owned())).take(lacking).collect()
            }
            false => {
                let is_free = |sight: &Sight| match sight {
                    Sight::Answers(_, has) => !has.contains(&key),
                    Sight::Silent | Sight::Lost => false,
                };
                let free = others().filter(|(_, sight)| is_free(sight));
                let free = free.map(|(id, _)| format!("add --id {id}"));
                free.take(lacking).collect()
            }
        };
        let commands: Vec<String> =
            commands.iter().map(|command| format!("'pgstrata safekeeper {command}'")).collect();
        let remedy = match commands.is_empty() {
            true => "start one more, and run 'pgstrata safekeeper add --id ID'".to_owned(),
            false => format!("run {}", commands.join(", then ")),
        };
        let kept = match members {
            [id] => format!("safekeeper {id} alone keeps it"),
            _ => format!("only {} keep it", named(members)),
        };
        format!("{kept}, of {} that there are: {remedy}", self.seen.len())
    }
}

/// What is to be said of branches, by what safekeepers said. Those of which the same is to be said are said together.
pub fn find<'a>(
    rows: &[Branch],
    said: impl IntoIterator<Item = &'a Status>,
    safekeepers: &Safekeepers,
) -> Vec<Short> {
    let quorums = quorums(said);
    let mut found: Vec<Short> = Vec::new();
    for row in rows {
        let key = (row.tenant_id, row.timeline_id);
        let text = match quorums.get(&key) {
            Some(quorum) => safekeepers.trouble(key, quorum),
            // It has no members before a compute was started on it. What was written to it is kept by somebody.
            None if row.is_read() && row.last_record_lsn <= row.start_lsn => safekeepers.unbegun(),
            None => None,
        };
        let Some(text) = text else { continue };
        match found.iter_mut().find(|other| other.text == text) {
            Some(alike) => alike.others += 1,
            None => found.push(Short { branch: row.name.clone(), others: 0, text }),
        }
    }
    found
}

/// How many members each branch has that was ever written to, and how many of them are well, by its name: of two groups those
/// of whom fewer may fail. `None` where nobody says who they are.
pub fn counted(rows: &[Branch], said: &[Status]) -> Vec<(String, Option<(usize, usize)>)> {
    let quorums = quorums(said);
    let written = rows.iter().filter(|row| row.last_record_lsn > row.start_lsn || !row.is_read());
    let count = |row: &Branch| {
        let key = (row.tenant_id, row.timeline_id);
        let quorum = quorums.get(&key)?;
        let is_well = |member: &&Member| {
            let mut own = said.iter().filter(|status| status.id == member.id);
            own.any(|status| {
                let is_it = |tenant, timeline| (tenant, timeline) == key;
                let mut unserved = status.damaged.iter();
                let mut served = status.timelines.iter();
                // One that has nothing of it yet is about to.
                status.incarnation == member.incarnation
                    && !unserved.any(|one| is_it(one.tenant_id, one.timeline_id))
                    && !served.any(|one| {
                        is_it(one.tenant_id, one.timeline_id) && one.committed_wal_damaged
                    })
            })
        };
        let groups = [&quorum.members, &quorum.incoming].into_iter().filter(|one| !one.is_empty());
        let counts = groups.map(|group| (group.len(), group.iter().filter(is_well).count()));
        counts.min_by_key(|(all, well)| *well as isize - (*all / 2 + 1) as isize)
    };
    written.map(|row| (row.name.clone(), count(row))).collect()
}

/// What [`find`] says, as warnings.
pub fn warnings<'a>(
    rows: &[Branch],
    said: impl IntoIterator<Item = &'a Status>,
    safekeepers: &Safekeepers,
) -> Vec<String> {
    let found = find(rows, said, safekeepers);
    found.iter().map(|short| format!("branch {}: {}", short.object(), short.text)).collect()
}

/// Those of a cluster on this machine whose directories are gone. Looks at the disk.
pub fn lost_here(cluster: &Cluster) -> BTreeSet<u64> {
    let places = cluster.state.safekeepers.iter();
    let lost = places.filter(|place| up::has_lost_directory(&cluster.dir, place));
    lost.map(|place| place.id).collect()
}

#[cfg(test)]
#[path = "short_tests.rs"]
mod tests;
