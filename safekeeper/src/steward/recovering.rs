//! Going on where a majority of the members is lost: with who is left of them, or, if nobody is, with what is archived.
//!
//! Never without an operator who says so. What the lost ones had alone is given up, and nothing else: what is archived was
//! committed, and whoever decides from now on has it first.

use std::collections::BTreeSet;

use pgstrata_format::archived::Extent;
use pgstrata_format::quorum::{GivenUp, Quorum, Restored};
use pgstrata_ids::{Lsn, Member, NodeId};
use pgstrata_quorum::{Chain, Configuration};
use pgstrata_wire::http::safekeeper::{Change, Step};

use super::reach::Patience;
use super::turn::Heard;
use super::{Steward, Trouble, later};
use crate::archive::ArchiveError;
use crate::decisions::Swapped;
use crate::timelines::TimelineKey;

/// What an operator says of those who are left.
#[derive(Clone, Debug)]
pub struct Left {
    /// All members that answer, of the configuration of this number; nobody and 0 where none is left.
    pub survivors: Vec<NodeId>,
    /// That number.
    pub after: u64,
    /// Where none is left: who may become members, the most wanted first.
    pub newcomers: Vec<NodeId>,
}

impl Steward {
    /// Has those who are left of the members go on alone, where they can't elect; or, where nobody is left, others with what is
    /// archived.
    pub fn recover(&self, key: TimelineKey, left: &Left) -> Result<Change, Trouble> {
        let Some((quorum, version)) = self.decisions.read_versioned(key).map_err(later)? else {
            return Err(Trouble::NotFound(format!("timeline {} was never founded", key.1)));
        };
        if quorum.is_deleted {
            let text = format!("timeline {} was deleted with its branch", key.1);
            return Err(Trouble::NotFound(text));
        }
        let newest = quorum.chain.newest();
        if newest.number() != left.after && left.after != 0 {
            // Who is left may never have heard of it.
            self.ask(key, newest, &|_| true, Some(newest.number()));
            let text = "the members were changed meanwhile: look again";
            return Err(Trouble::Conflict(format!("{text} (configuration {})", newest.number())));
        }
        let (mut heard, _) = self.ask_with(key, newest, &|_| true, None, Patience::ForAll);
        // Who was given up before, and may not know it, is none of them.
        heard.retain(|one| !quorum.went_on_without(&one.status.configuration, one.member));
        // A copy of an older version that was never told who the members are, or doesn't take it, is not one of theirs: it would
        // not go on with what is decided here.
        let is_told = |one: &Heard| one.status.configuration.is_known();
        if !heard.iter().all(is_told) {
            let untold: Vec<Member> =
                heard.iter().filter(|one| !is_told(one)).map(|one| one.member).collect();
            let (told, _) =
                self.ask(key, newest, &|member| untold.contains(member), Some(newest.number()));
            heard.retain(is_told);
            heard.extend(told);
        }
        let members: Vec<Member> = heard.iter().map(|one| one.member).collect();
        // Where a change is under way it can be undone: those before it are enough.
        let before =
            Configuration::new(newest.number(), newest.members().to_vec()).map_err(later)?;
        if before.is_quorum(|member| members.contains(&member)) {
            let text = "a majority of the members answers: nothing needs to be given up";
            return Err(Trouble::Conflict(text.into()));
        }
        let answers: Vec<String> = members.iter().map(|member| member.node.to_string()).collect();
        let answers = answers.join(", ");
        let are_these = members.len() == left.survivors.len()
            && members.iter().all(|member| left.survivors.contains(&member.node));
        if !are_these {
            let text = format!("others answer than was said: look again (these do: {answers})");
            return Err(Trouble::Conflict(text));
        }
        let archived = match self.newest(&quorum) {
            Ok(archived) => archived,
            // Who has all of it does not need to be told what log it is of.
            Err(ArchiveError::Older(end))
                if heard.iter().any(|one| one.status.commit_lsn >= end) =>
            {
                None
            }
            Err(error) => return Err(later(error)),
        };
        let members_left = !members.is_empty();
        let known = heard.iter().map(|one| one.status.commit_lsn).max().unwrap_or_default();
        let (chain, restored) = match most(&heard) {
            Some(most) => {
                if let Some(extent) = &archived {
                    refuse_to_give_up(most, extent, quorum.parameters.start_lsn)?;
                }
                (quorum.chain.recovered(most.member, members).map_err(later)?, quorum.restored)
            }
            None => {
                let Some(extent) = &archived else {
                    let text = "no member answers, and no WAL of the timeline is in object storage";
                    return Err(Trouble::Conflict(text.into()));
                };
                self.check_archived(&quorum, extent)?;
                let members = self.newcomers(key, &left.newcomers, newest)?;
                let chain = quorum.chain.restored(members).map_err(later)?;
                let (number, lsn) = (chain.newest().number(), extent.boundary);
                (chain, Some(Restored { number, lsn }))
            }
        };
        let number = chain.newest().number();
        // Up to what is known to be committed here all logs are the same, whoever archives theirs.
        // Also where nothing is archived yet: those who are given up may still live, and archive what they have before they
        // hear of it.
        let known = known.max(quorum.parameters.start_lsn);
        let lsn = archived.as_ref().map_or(known, |extent| extent.boundary.max(known));
        let last_record = archived.filter(|extent| known <= extent.boundary);
        let last_record = last_record.and_then(|extent| extent.last_record);
        if quorum.given_up.is_full() {
            let text = "members of this timeline were given up too often: make a branch of it";
            return Err(Trouble::Conflict(text.into()));
        }
        let given_up = quorum.given_up.with(GivenUp { number, lsn, last_record });
        // None of those who begin with what is archived had a copy before.
        let is_older = quorum.is_older && members_left;
        let decided = Quorum { chain, restored, given_up, is_older, ..quorum };
        match self.decisions.swap(key, &version, &decided).map_err(later)? {
            Swapped::Yes => {}
            Swapped::No => return Err(later("others change the members at the same time")),
        }
        tracing::warn!(timeline = %key.1, number, survivors = answers, "who is left goes on alone");
        self.tell_former(key, &decided.chain);
        let told = self.finish(key, &decided.chain)?;
        Ok(match decided.chain.newest().incoming().is_empty() {
            true => told,
            // The one that has most decides with them until they have it too.
            false => Change { step: Step::CatchingUp, ..told },
        })
    }

    /// Whoever was a member, and goes on no more, hears of that before others begin, if it lives: a compute that was not told yet would
    /// have it acknowledge what those who go on lack. One that is not there finds out by itself.
    fn tell_former(&self, key: TimelineKey, chain: &Chain) {
        let newest = chain.newest();
        let all = chain.configurations().iter().flat_map(Configuration::all);
        let former: BTreeSet<Member> = all.filter(|member| !newest.contains(*member)).collect();
        let former: Vec<Member> = former.into_iter().collect();
        for answer in self.reach.ask(key, &former, Some(newest.number()), Patience::AsUsual) {
            // Refusing is what one does that has understood.
            tracing::debug!(timeline = %key.1, ?answer, "a former member is told");
        }
    }

    /// How far the archived log goes.
    fn newest(&self, quorum: &Quorum) -> Result<Option<Extent>, ArchiveError> {
        let newest = self.archive.newest(&quorum.parameters, &quorum.given_up);
        self.decisions.runtime().block_on(newest)
    }

    /// Nobody is made a member who could not begin: what is archived can be had, and has a record that ends where it is said to
    /// end.
    fn check_archived(&self, quorum: &Quorum, extent: &Extent) -> Result<(), Trouble> {
        let checked = self.archive.check_end(&quorum.parameters, extent, &quorum.given_up);
        self.decisions.runtime().block_on(checked).map_err(|why| {
            Trouble::Later(format!(
                "what is archived up to {} can't be gone on with: {why}",
                extent.boundary
            ))
        })
    }

    /// How far the archived log of a timeline goes, `None` if none of it is archived; and who its members are.
    pub fn archived(&self, key: TimelineKey) -> Result<(Option<Lsn>, Configuration), Trouble> {
        let Some(quorum) = self.decisions.read(key).map_err(later)? else {
            return Err(Trouble::NotFound(format!("timeline {} was never founded", key.1)));
        };
        let archived = match self.newest(&quorum) {
            Err(ArchiveError::Older(end)) => Some(end),
            newest => newest.map_err(later)?.map(|extent| extent.boundary),
        };
        Ok((archived, quorum.chain.newest().clone()))
    }

    /// As many of these as there were members, each of which answers.
    fn newcomers(
        &self,
        key: TimelineKey,
        nodes: &[NodeId],
        before: &Configuration,
    ) -> Result<Vec<Member>, Trouble> {
        let count = before.members().len();
        let registered = self.decisions.registrations(nodes).map_err(later)?;
        let members = registered.into_iter().flatten().filter_map(|one| {
            let is_one =
                !before.contains(one.member) && self.reach.has_nothing(one.member.node, key);
            is_one.then_some(one.member)
        });
        let members: Vec<Member> = members.take(count).collect();
        match members.len() > count / 2 {
            true => Ok(members),
            false => Err(Trouble::Conflict(format!(
                "there were {count} members, and only {} others answer: start more safekeepers",
                members.len()
            ))),
        }
    }
}

/// Whose log a proposer would go on with.
fn most(heard: &[Heard]) -> Option<&Heard> {
    heard.iter().max_by_key(|one| {
        let reached = one.status.history.reached_by(one.status.flush_lsn);
        (reached.last().map(|last| last.term), one.status.flush_lsn)
    })
}

/// What is archived was committed: who goes on has to have it.
fn refuse_to_give_up(most: &Heard, extent: &Extent, start_lsn: Lsn) -> Result<(), Trouble> {
    let status = &most.status;
    // Where no entry is shared some were merged, and what is committed on both is the same.
    let base = status.commit_lsn.min(extent.boundary).max(start_lsn);
    let history = &status.history;
    let agreed = history.divergence(status.flush_lsn, &extent.history, extent.boundary, base);
    match agreed >= extent.boundary {
        true => Ok(()),
        false => Err(Trouble::Later(format!(
            "object storage has WAL up to {}, and safekeeper {} agrees with it up to {agreed} only: it gets it from there first",
            extent.boundary, most.member.node
        ))),
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::{Incarnation, SystemId, TenantId, Term, TimelineId, TimelineParameters};
    use pgstrata_quorum::{TermHistory, TermStart};
    use pgstrata_wire::safekeeper::Status;

    use super::*;

    fn history(entries: &[(u64, u64)]) -> TermHistory {
        let entry = |&(term, lsn)| TermStart { term: Term(term), lsn: Lsn(lsn) };
        TermHistory::new(entries.iter().map(entry).collect()).unwrap()
    }

    fn heard(flush: u64, commit: u64, entries: &[(u64, u64)]) -> Heard {
        let member = Member { node: NodeId(3), incarnation: Incarnation([3; 16]) };
        let parameters = TimelineParameters {
            tenant: TenantId([1; 16]),
            timeline: TimelineId([2; 16]),
            system_id: SystemId(7),
            pg_version: 17,
            pg_timeline: 1,
            segment_size: 1 << 20,
            start_lsn: Lsn(100),
            ancestor: None,
        };
        let status = Status {
            member,
            parameters,
            configuration: Configuration::new(1, vec![member]).unwrap(),
            configured_in: Term(0),
            has_proposer: false,
            term: Term(9),
            available_lsn: Lsn(100),
            flush_lsn: Lsn(flush),
            commit_lsn: Lsn(commit),
            history: history(entries),
        };
        Heard { member, status }
    }

    #[test]
    fn what_is_archived_is_never_given_up() {
        let extent = |boundary: u64, entries: &[(u64, u64)]| Extent {
            from: Lsn(0),
            boundary: Lsn(boundary),
            last_record: None,
            configuration: 1,
            history: history(entries),
        };
        let refused = |most: &Heard, extent: &Extent| {
            refuse_to_give_up(most, extent, Lsn(100)).err().map(|why| why.to_string())
        };
        let archived = extent(300, &[(1, 100), (2, 250)]);
        // All of it and more; all of it; less.
        assert_eq!(refused(&heard(400, 200, &[(1, 100), (2, 250)]), &archived), None);
        assert_eq!(refused(&heard(300, 300, &[(1, 100), (2, 250)]), &archived), None);
        let why = refused(&heard(260, 200, &[(1, 100), (2, 250)]), &archived).unwrap();
        assert!(why.contains("up to 0/12C") && why.contains("up to 0/104 only"), "{why}");
        // As much, and more, of a term that came to nothing.
        let why = refused(&heard(500, 200, &[(1, 100)]), &archived).unwrap();
        assert!(why.contains("up to 0/FA only"), "{why}");
        // Where others merged what is committed.
        assert_eq!(refused(&heard(400, 300, &[(2, 100)]), &archived), None);
    }
}
