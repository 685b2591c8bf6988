//! A majority of the members is lost for good, and an operator who says so has the shipped steward give up what only they had.

use std::io;

use pgstrata_ids::{Member, NodeId};
use pgstrata_safekeeper::steward::reach::{Patience, Reach, heard};
use pgstrata_safekeeper::steward::turn::Heard;
use pgstrata_safekeeper::steward::{Left, Steward};
use pgstrata_safekeeper::timelines::Timelines;

use super::*;

/// How soon the operator tries again.
const AGAIN: Time = 10_000;

/// Safekeepers as a steward reaches them: those that are up.
#[derive(Debug)]
struct Reached(Vec<(NodeId, Arc<Timelines>)>);

impl Reached {
    fn visit(&self, node: NodeId) -> Option<Visit> {
        let (_, timelines) = self.0.iter().find(|(other, _)| *other == node)?;
        Some(Visit::new(Arc::clone(timelines)))
    }
}

impl Reach for Reached {
    fn ask(
        &self,
        key: TimelineKey,
        members: &[Member],
        number: Option<u64>,
        _: Patience,
    ) -> Vec<Result<Heard, String>> {
        let ask = |member: &Member| {
            let mut visit = self.visit(member.node).ok_or("it is down")?;
            let said = match number {
                Some(number) => visit.learn(key, number),
                None => visit.open(key),
            };
            heard(*member, said.map_err(|reason| reason.to_string()))
        };
        members.iter().map(ask).collect()
    }

    fn answers(&self, node: NodeId) -> Result<(), String> {
        self.visit(node).map(drop).ok_or_else(|| "it is down".into())
    }

    fn has_nothing(&self, node: NodeId, key: TimelineKey) -> bool {
        let said = self.visit(node).map(|mut visit| visit.open(key));
        matches!(said, Some(Err(RefusedReason::UnknownTimeline)))
    }

    fn wait_for_compute(&self) {}

    fn elect(&self, _: &Configuration, _: &[Heard]) -> io::Result<()> {
        Err(io::Error::other("who recovers has nobody elect"))
    }
}

impl World {
    /// Whether those who are left of the members can't elect.
    fn is_majority_lost(&self) -> bool {
        let members = self.quorum.chain.newest().members();
        let lost = members.iter().filter(|member| self.is_lost(**member)).count();
        lost * 2 >= members.len()
    }

    pub(super) fn lose_most(&mut self, nodes: u8, back_after: Time, recovered_after: Time) {
        let newest = self.quorum.chain.newest().clone();
        let is_unwell = |member: Member| {
            self.is_lost(member) || self.nodes[self.node_of(member.node.0)].is_rotten
        };
        if !self.is_founded || self.is_recovering || newest.all().any(is_unwell) {
            return;
        }
        let is_one = |member: &Member| is_in(nodes, self.node_of(member.node.0));
        let gone: Vec<Member> = newest.all().filter(is_one).collect();
        let lost = newest.members().iter().filter(|member| gone.contains(member)).count();
        if lost * 2 < newest.members().len() {
            return;
        }
        for member in gone {
            let index = self.node_of(member.node.0);
            if self.nodes[index].is_up {
                let node = &mut self.nodes[index];
                (node.is_doomed, node.loses_power, node.back_after) = (true, true, back_after);
                self.crash(index);
            }
            let seed = self.archiving.bits();
            self.nodes[index].wipe(seed);
            self.outcome.wipes += 1;
            self.log(|| format!("safekeeper {} has lost its directory for good", index + 1));
        }
        self.is_recovering = true;
        self.after(recovered_after, Event::Recover);
    }

    /// An operator moves the directory away of a safekeeper that members went on without.
    pub(super) fn begin_anew(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        (node.is_doomed, node.loses_power, node.back_after) = (true, false, 1000);
        self.crash(index);
        let seed = self.archiving.bits();
        self.nodes[index].wipe(seed);
        self.log(|| format!("safekeeper {} begins anew", index + 1));
    }

    /// What an operator does: `quorum recover --accept-loss`, once all who are not lost answer, and then members as many as before.
    pub(super) fn recover(&mut self) -> Checked {
        if !self.is_majority_lost() {
            self.is_recovering = false;
            let nodes = (1..=self.plan.nodes as u64).map(NodeId).collect();
            self.want(nodes);
            return Ok(());
        }
        self.after(AGAIN, Event::Recover);
        let newest = self.quorum.chain.newest().clone();
        let left: Vec<Member> = newest.all().filter(|member| !self.is_lost(*member)).collect();
        // Who is down, or is mended, is not lost.
        let is_there = |member: &Member| {
            let node = &self.nodes[self.node_of(member.node.0)];
            node.timelines().is_some() && !node.is_finished() && !node.is_mending()
        };
        if !left.iter().all(is_there) {
            return Ok(());
        }
        let reached = self.nodes.iter().filter(|node| !node.is_finished()).filter_map(|node| {
            let timelines = Arc::clone(node.timelines()?);
            Some((node.member.node, timelines))
        });
        // A change that was under way may have ended with those who are lost.
        if left.is_empty() && !self.objects.newest(&self.quorum.given_up)?.is_valid() {
            self.log(|| "nothing is left of the timeline anywhere".into());
            self.is_all_lost = true;
            return Ok(());
        }
        let steward = Steward {
            decisions: self.outside.decisions.clone(),
            archive: Arc::clone(&self.outside.archive),
            reach: Arc::new(Reached(reached.collect())),
        };
        let said = Left {
            survivors: left.iter().map(|member| member.node).collect(),
            after: if left.is_empty() { 0 } else { newest.number() },
            newcomers: (1..=self.nodes.len() as u64).map(NodeId).collect(),
        };
        let recovered = steward.recover(self.key(), &said);
        drop(steward);
        let text = recovered.map_or_else(|error| error.to_string(), |change| format!("{change:?}"));
        self.log(|| format!("recovery without {} of the members: {text}", newest.number()));
        self.check_objects()?;
        (0..self.nodes.len()).try_for_each(|index| self.has_done(index))
    }

    /// It is decided that what only lost members had is given up: nothing else is.
    pub(super) fn give_up(&mut self, decided: &Quorum) -> Checked {
        let newest = decided.chain.newest();
        let before = &self.quorum.given_up;
        let archived = self.objects.newest(before)?;
        let restored = decided.restored.filter(|restored| restored.number == newest.number());
        let (lsn, term) = match (restored, newest.members().first()) {
            (Some(restored), _) => {
                let history = self.truth.history().up_to(restored.lsn);
                (restored.lsn, history.last().map_or(Term(0), |last| last.term))
            }
            (None, Some(most)) => {
                let (own, flush_lsn) = self.nodes[self.node_of(most.node.0)].log();
                let (history, end) = (self.truth.history(), self.truth.end());
                let lsn = own.divergence(flush_lsn, history, end, self.parameters.start_lsn);
                (lsn, own.last().map_or(Term(0), |last| last.term))
            }
            (None, None) => return Err("nobody decides from now on".into()),
        };
        if archived > lsn {
            return Err(format!("{lsn} is what is kept, and {archived} is archived"));
        }
        for member in newest.all() {
            let node = &self.nodes[self.node_of(member.node.0)];
            let commit_lsn = node.timeline().map(|one| one.commit_lsn()).unwrap_or_default();
            let (own, flush_lsn) = node.log();
            let (history, end) = (self.truth.history(), self.truth.end());
            let has = own.divergence(flush_lsn, history, end, self.parameters.start_lsn);
            if node.member == member && commit_lsn.max(has) > lsn {
                let name = &node.name;
                return Err(format!("{lsn} is what is kept, and {name} has {commit_lsn}, {has}"));
            }
        }
        let lost = self.truth.end().saturating_sub(lsn);
        self.log(|| format!("what is committed from {lsn} on is given up: {lost} bytes"));
        self.outcome.recoveries += 1;
        self.outcome.restorations += u64::from(restored.is_some());
        self.outcome.given_up_bytes += lost;
        self.truth.give_up(lsn, term, &decided.given_up);
        self.objects.give_up(decided)?;
        self.follow_anew(lsn, decided)?;
        if let Some((since, end)) = &mut self.quiet {
            (*since, *end) = (self.now, lsn.min(*end));
        }
        for here in &self.here {
            here.give_up(decided.given_up.clone());
        }
        Ok(())
    }
}
