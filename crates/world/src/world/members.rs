//! Who the members are: the object that decides, who reads it, and those who change them, step by step as the shipped steward does.

use pgstrata_blob::Version;
use pgstrata_ids::{Member, NodeId};
use pgstrata_safekeeper::decisions::Swapped;
use pgstrata_safekeeper::steward::turn::{self, Heard, Turn, Verdict};

use super::*;

/// How often a change takes its next step, at most and at least.
const STEP: (Time, Time) = (2_000, 25_000);

/// So long nobody leads, before a safekeeper takes a term itself.
const COMPUTE_PATIENCE: Time = 15_000;

/// Somebody who wants these to be the members.
#[derive(Debug)]
pub(super) struct Command {
    nodes: Vec<NodeId>,
    /// The safekeeper that it asks.
    at: usize,
    pub(super) is_over: bool,
}

/// What a step of a change has come to.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // One of a run at a time.
pub(super) enum Stage {
    Look,
    /// Newcomers have been told, and others asked.
    Told {
        joint: Configuration,
        newcomers: Vec<Heard>,
    },
    /// Nobody led.
    Unled {
        joint: Configuration,
    },
    /// What was read is on its way to be replaced.
    Swap {
        version: Version,
        next: Quorum,
        is_waited_for: bool,
    },
}

impl World {
    /// Whether a member's directory is lost.
    pub(super) fn is_lost(&self, member: Member) -> bool {
        self.nodes[self.node_of(member.node.0)].member != member
    }

    /// Whether a directory may be lost now: in each group more are left than are gone, also of what was committed before.
    pub(super) fn may_lose(&self, index: usize) -> bool {
        let newest = self.quorum.chain.newest();
        let own = self.nodes[index].member;
        let stays = |group: &[Member]| {
            let is_rotten = |member: Member| self.nodes[self.node_of(member.node.0)].is_rotten;
            let gone =
                |member: &&Member| self.is_lost(**member) || is_rotten(**member) || **member == own;
            group.iter().filter(gone).count() * 2 < group.len().max(1)
        };
        stays(newest.members()) && stays(newest.incoming())
    }

    pub(super) fn wipe(&mut self, index: usize, back_after: Time, replaced_after: Time) {
        let was_member = self.quorum.chain.newest().contains(self.nodes[index].member);
        if !self.may_lose(index) || !self.nodes[index].is_up {
            return;
        }
        let node = &mut self.nodes[index];
        (node.is_doomed, node.loses_power, node.back_after) = (true, true, back_after);
        self.crash(index);
        let seed = self.rng.bits();
        self.nodes[index].wipe(seed);
        self.outcome.wipes += 1;
        self.log(|| format!("safekeeper {} has lost its directory", index + 1));
        if was_member {
            self.after(back_after + replaced_after, Event::Replace);
        }
    }

    /// Members that are lost are replaced, by themselves or others.
    pub(super) fn replace(&mut self) {
        let newest = self.quorum.chain.newest();
        let is_mending = |member: &Member| self.nodes[self.node_of(member.node.0)].is_mending();
        let group = match newest.incoming() {
            [] => newest.members(),
            // A change to who may be mended only once it is over is taken back by whoever began it.
            incoming if self.quiet.is_some() && incoming.iter().any(is_mending) => newest.members(),
            incoming => incoming,
        };
        let mut nodes: Vec<NodeId> = group.iter().map(|member| member.node).collect();
        let lost = group.iter().find(|member| self.is_lost(**member)).map(|member| member.node);
        let spare = (1..=self.nodes.len() as u64).map(NodeId).find(|node| !nodes.contains(node));
        if let (Some(lost), Some(spare), None) = (lost, spare, self.quiet)
            && self.rng.one_in(3)
        {
            nodes.iter_mut().filter(|node| **node == lost).for_each(|node| *node = spare);
        }
        self.want(nodes);
    }

    pub(super) fn want(&mut self, nodes: Vec<NodeId>) {
        if self.quiet.is_some() {
            // Two could undo each other's work for ever.
            self.commands.iter_mut().for_each(|command| command.is_over = true);
        }
        let at = self.rng.index(self.nodes.len());
        let index = self.commands.len();
        self.log(|| format!("command {index}: the members are to be {nodes:?}"));
        self.commands.push(Command { nodes, at, is_over: false });
        self.after(0, Event::Steward(index, Stage::Look));
    }

    /// From now on nobody wants anything else than that all members are there.
    pub(super) fn last_change(&mut self) {
        let newest = self.quorum.chain.newest();
        if !newest.incoming().is_empty() || newest.all().any(|member| self.is_lost(member)) {
            self.replace();
        } else {
            self.commands.iter_mut().for_each(|command| command.is_over = true);
        }
    }

    /// Whether all is as it is to be: nobody changes, and the members are there, and know what is committed.
    pub(super) fn is_settled(&self) -> bool {
        let newest = self.quorum.chain.newest();
        newest.incoming().is_empty()
            && self.commands.iter().all(|command| command.is_over)
            && newest.all().all(|member| {
                let node = &self.nodes[self.node_of(member.node.0)];
                node.member == member
                    && node.timeline().is_some_and(|one| one.commit_lsn() >= self.truth.end())
                    && !node.is_rotten
            })
    }

    fn again(&mut self, command: usize) {
        let delay = self.rng.between(STEP.0, STEP.1);
        self.after(delay, Event::Steward(command, Stage::Look));
    }

    pub(super) fn steward(&mut self, command: usize, stage: Stage) -> Checked {
        if self.commands[command].is_over {
            // What is on its way gets there all the same.
            if let Stage::Swap { version, next, .. } = stage {
                self.swap(command, &version, &next)?;
                if self.quiet.is_some() {
                    self.last_change();
                }
            }
            return Ok(());
        }
        match stage {
            Stage::Look => self.look(command),
            Stage::Told { joint, newcomers } => self.conclude_change(command, &joint, newcomers),
            Stage::Unled { joint } => {
                let (all, _) = self.ask(command, &joint, &|_| true, false)?;
                if !turn::is_led(&all) && self.quorum.chain.newest() == &joint {
                    self.elect_without_compute(joint);
                }
                self.again(command);
                Ok(())
            }
            Stage::Swap { version, next, is_waited_for } => {
                self.swap(command, &version, &next)?;
                if is_waited_for {
                    self.again(command);
                }
                Ok(())
            }
        }
    }

    fn look(&mut self, command: usize) -> Checked {
        self.commands[command].at = self.rng.index(self.nodes.len());
        let at = self.commands[command].at;
        let read = self.read_decided().filter(|_| self.nodes[at].is_up);
        let Some((decided, version)) = read else {
            self.again(command);
            return Ok(());
        };
        let chain = decided.chain.clone();
        let nodes = self.commands[command].nodes.clone();
        let newest = chain.newest().clone();
        let next = match turn::of(&newest, &nodes) {
            Turn::Begin => match chain.change_to(self.wanted(&newest, &nodes)) {
                Ok(next) => {
                    let joint = next.newest().clone();
                    let (heard, _) = self.ask(command, &joint, &|_| true, false)?;
                    let answers = |member: Member| {
                        let is_up = self.nodes[self.node_of(member.node.0)].is_up;
                        let is_rotten = self.nodes[self.node_of(member.node.0)].is_rotten;
                        (heard.iter().any(|one| one.member == member) && !is_rotten)
                            || (turn::is_newcomer(&joint, member) && is_up)
                    };
                    if !joint.is_quorum(answers) {
                        self.again(command);
                        return Ok(());
                    }
                    next
                }
                // All hear of it; as long as not enough do, it is said again.
                Err(_) => {
                    let (heard, _) = self.ask(command, &newest, &|_| true, true)?;
                    let knows = |member: Member| heard.iter().any(|one| one.member == member);
                    if !newest.is_quorum(knows) {
                        self.again(command);
                        return Ok(());
                    }
                    self.commands[command].is_over = true;
                    self.log(|| format!("command {command} is done"));
                    return Ok(());
                }
            },
            Turn::Undo if self.rng.one_in(2) || self.quiet.is_some() => {
                chain.change_undone().map_err(|error| error.to_string())?
            }
            Turn::Undo => {
                self.commands[command].is_over = true;
                return Ok(());
            }
            Turn::Prepare => return self.prepare_change(command, newest),
        };
        self.decide(command, version, Quorum { chain: next, ..decided });
        Ok(())
    }

    /// What is decided, if it is founded and can be read now.
    fn read_decided(&self) -> Option<(Quorum, Version)> {
        self.outside.decisions.read_versioned(self.key()).ok().flatten()
    }

    fn decide(&mut self, command: usize, version: Version, next: Quorum) {
        let slow = self.rng.one_in(8);
        let delay = self.rng.between(100, if slow { 40_000 } else { 2000 });
        self.swaps += 1;
        let stage = Stage::Swap { version, next, is_waited_for: !slow };
        self.after(delay, Event::Steward(command, stage));
        if slow {
            // Whoever sent it does not wait for it.
            self.again(command);
        }
    }

    /// Compare and swap. Nobody needs the answer: who goes on reads again.
    fn swap(&mut self, command: usize, version: &Version, next: &Quorum) -> Checked {
        self.swaps -= 1;
        let read = match self.lie {
            Some(Lie::SwapWithoutCompare) => self.read_decided().map(|(_, version)| version),
            _ => None,
        };
        let swapped =
            self.outside.decisions.swap(self.key(), read.as_ref().unwrap_or(version), next);
        match swapped {
            Ok(Swapped::Yes) => {
                let newest = next.chain.newest();
                self.log(|| format!("command {command} has decided {newest:?}"));
            }
            Ok(Swapped::No) => self.log(|| format!("command {command} comes too late")),
            Err(reason) => self.log(|| format!("command {command}: {reason}")),
        }
        self.check_objects()
    }

    /// These nodes as they registered last.
    fn wanted(&self, newest: &Configuration, nodes: &[NodeId]) -> Vec<Member> {
        let mut members = Vec::new();
        for node in nodes {
            let registered = self.registered(*node);
            let is_now = newest.members().iter().find(|member| member.node == *node).copied();
            members.extend(registered.or(is_now));
        }
        members
    }

    /// As it registered last, if that is known now.
    fn registered(&self, node: NodeId) -> Option<Member> {
        let found = self.outside.decisions.registration(node).ok().flatten();
        found.map(|registration| registration.member)
    }

    fn prepare_change(&mut self, command: usize, joint: Configuration) -> Checked {
        let is_new = |member: Member| turn::is_newcomer(&joint, member);
        // Newcomers first: who has the timeline tells its compute, which then counts on them.
        let (newcomers, missing) = self.ask(command, &joint, &is_new, true)?;
        if missing > 0 {
            if !self.undo(command, &joint)? {
                self.again(command);
            }
            return Ok(());
        }
        let delay = self.rng.between(200, 5000);
        self.after(delay, Event::Steward(command, Stage::Told { joint, newcomers }));
        Ok(())
    }

    /// Undoes a change that will never end.
    fn undo(&mut self, command: usize, joint: &Configuration) -> Checked<bool> {
        let is_lost = |member: Member| {
            self.registered(member.node).is_some_and(|registered| registered != member)
        };
        if turn::never_ends(joint, is_lost).is_some()
            && let Some((decided, version)) = self.read_decided()
            && decided.chain.newest() == joint
        {
            let undone = decided.chain.change_undone().map_err(|error| error.to_string())?;
            self.decide(command, version, Quorum { chain: undone, ..decided });
            return Ok(true);
        }
        Ok(false)
    }

    fn conclude_change(
        &mut self,
        command: usize,
        joint: &Configuration,
        newcomers: Vec<Heard>,
    ) -> Checked {
        let is_old = |member: Member| !turn::is_newcomer(joint, member);
        let (old, _) = self.ask(command, joint, &is_old, true)?;
        let read = self.read_decided().filter(|(decided, _)| decided.chain.newest() == joint);
        let mut all: Vec<Heard> = newcomers.into_iter().chain(old).collect();
        if self.lie == Some(Lie::OldTermIsJoint) {
            all.iter_mut().for_each(|one| one.status.configured_in = Term(0));
        }
        let mut verdict = turn::verdict(joint, &all);
        if self.lie == Some(Lie::JointNotUsed) && verdict == Verdict::IsUnused {
            verdict = Verdict::IsReady;
        }
        self.log(|| format!("command {command}: {verdict:?}"));
        match (verdict, read) {
            (Verdict::IsReady, Some((decided, version))) => {
                let ended = decided.chain.change_ended().map_err(|error| error.to_string())?;
                self.decide(command, version, Quorum { chain: ended, ..decided });
            }
            (Verdict::WaitsForOld, _) => {
                if !self.undo(command, joint)? {
                    self.again(command);
                }
            }
            (Verdict::IsUnused, _) if !turn::is_led(&all) => {
                let stage = Stage::Unled { joint: joint.clone() };
                self.after(COMPUTE_PATIENCE, Event::Steward(command, stage));
            }
            _ => self.again(command),
        }
        Ok(())
    }

    /// A safekeeper has members elect, and writes nothing.
    fn elect_without_compute(&mut self, joint: Configuration) {
        if self.campaign.proposer.is_none() {
            self.begin_campaign(joint);
        }
    }

    /// What those say who are asked for, and how many don't answer. They may be told to look where it is decided first.
    fn ask(
        &mut self,
        command: usize,
        configuration: &Configuration,
        wanted: &dyn Fn(Member) -> bool,
        look: bool,
    ) -> Checked<(Vec<Heard>, usize)> {
        let at = self.commands[command].at;
        let (mut heard, mut silent) = (Vec::new(), 0);
        let members: Vec<Member> = configuration.all().filter(|&member| wanted(member)).collect();
        for member in members {
            let index = self.node_of(member.node.0);
            let is_reached =
                self.nodes[index].is_up && !self.is_cut_between(at, index) && !self.rng.one_in(20);
            let status = match is_reached {
                true => self.status_of(index, look.then(|| configuration.number()))?,
                false => None,
            };
            match status.filter(|status| status.member == member) {
                Some(status) => heard.push(Heard { member, status }),
                None => silent += 1,
            }
        }
        Ok((heard, silent))
    }

    /// What a safekeeper answers who asks for its status; it may be told to look where it is decided first.
    fn status_of(&mut self, index: usize, number: Option<u64>) -> Checked<Option<Status>> {
        let key = self.key();
        let Some(mut visit) = self.visit(index) else { return Ok(None) };
        let said = match number.filter(|_| self.lie != Some(Lie::DecisionNotTaken)) {
            Some(number) => visit.learn(key, number),
            None => visit.open(key),
        };
        drop(visit);
        self.has_done(index)?;
        let mut status = match said {
            Ok(status) => status,
            Err(RefusedReason::UnknownTimeline) => return Ok(None),
            Err(reason) => return self.check_refusal(index, &reason).map(|()| None),
        };
        if let (Some(number), Some(Lie::DecisionNotTaken)) = (number, self.lie) {
            let newest = self.quorum.chain.newest();
            if newest.number() >= number {
                status.configuration = newest.clone();
            }
        }
        Ok(Some(status))
    }

    /// Somebody who asks a safekeeper.
    pub(super) fn visit(&self, index: usize) -> Option<Visit> {
        let timelines = self.nodes[index].timelines()?;
        Some(Visit::new(Arc::clone(timelines)))
    }

    /// A safekeeper has done what it was asked for, and has answered.
    pub(super) fn has_done(&mut self, index: usize) -> Checked {
        if self.nodes[index].disk.has_stopped() {
            return self.settle(index);
        }
        self.nodes[index].look(&mut self.truth)?;
        self.nodes[index].promise(None);
        self.settle(index)
    }

    /// Reads who the members are, and takes what stands there.
    pub(super) fn learn(&mut self, index: usize) -> Checked<Result<(), RefusedReason>> {
        if self.lie == Some(Lie::DecisionNotTaken) {
            return Ok(Ok(()));
        }
        let learned = self.nodes[index].learn();
        if let Err(reason) = learned.as_ref()
            && !matches!(reason, RefusedReason::UnknownTimeline)
        {
            self.check_refusal(index, reason)?;
        }
        self.settle(index)?;
        Ok(learned)
    }
}
