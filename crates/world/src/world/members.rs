//! Who the members are: the object that decides, who reads it, and those who change them, step by step as the shipped steward does.

use pgstrata_ids::{Member, NodeId};
use pgstrata_safekeeper::steward::turn::{self, Heard, Turn, Verdict};
use pgstrata_safekeeper::timeline::Timeline;

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
        version: u64,
        next: Chain,
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
        let is_mending = |member: &Member| self.nodes[self.node_of(member.node.0)].is_mending;
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
                let knows_all =
                    |timeline: &Arc<Timeline>| timeline.commit_lsn() >= self.truth.end();
                node.member == member
                    && node.timeline.as_ref().is_some_and(knows_all)
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
                self.swap(command, version, next);
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
                self.swap(command, version, next);
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
        if !self.is_founded || !self.nodes[at].is_up || self.no_objects_until > self.now {
            self.again(command);
            return Ok(());
        }
        let (chain, version) = (self.quorum.chain.clone(), self.version);
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
        self.decide(command, version, next);
        Ok(())
    }

    fn decide(&mut self, command: usize, version: u64, next: Chain) {
        let slow = self.rng.one_in(8);
        let delay = self.rng.between(100, if slow { 40_000 } else { 2000 });
        let stage = Stage::Swap { version, next, is_waited_for: !slow };
        self.after(delay, Event::Steward(command, stage));
        if slow {
            // Whoever sent it does not wait for it.
            self.again(command);
        }
    }

    /// Compare and swap. Nobody needs the answer: who goes on reads again.
    fn swap(&mut self, command: usize, version: u64, next: Chain) {
        if self.no_objects_until > self.now {
            return;
        }
        if version != self.version && self.lie != Some(Lie::SwapWithoutCompare) {
            self.log(|| format!("command {command} comes too late"));
            return;
        }
        let newest = next.newest().clone();
        self.log(|| format!("command {command} has decided {newest:?}"));
        self.quorum.chain = next;
        self.version += 1;
        self.outcome.changes += 1;
    }

    /// These nodes as they registered last.
    fn wanted(&self, newest: &Configuration, nodes: &[NodeId]) -> Vec<Member> {
        let member = |node: &NodeId| {
            let registered = self.registered[self.node_of(node.0)];
            let is_now = newest.members().iter().find(|member| member.node == *node).copied();
            registered.or(is_now)
        };
        nodes.iter().filter_map(member).collect()
    }

    fn prepare_change(&mut self, command: usize, joint: Configuration) -> Checked {
        let is_new = |member: Member| turn::is_newcomer(&joint, member);
        // Newcomers first: who has the timeline tells its compute, which then counts on them.
        let (newcomers, missing) = self.ask(command, &joint, &is_new, true)?;
        if missing > 0 {
            if !self.give_up(command, &joint)? {
                self.again(command);
            }
            return Ok(());
        }
        let delay = self.rng.between(200, 5000);
        self.after(delay, Event::Steward(command, Stage::Told { joint, newcomers }));
        Ok(())
    }

    /// Undoes a change that will never end.
    fn give_up(&mut self, command: usize, joint: &Configuration) -> Checked<bool> {
        let is_lost = |member: Member| {
            let registered = self.registered[self.node_of(member.node.0)];
            registered.is_some_and(|registered| registered != member)
        };
        let never_ends = turn::never_ends(joint, is_lost).is_some();
        if never_ends && self.quorum.chain.newest() == joint {
            let undone = self.quorum.chain.change_undone();
            let version = self.version;
            self.decide(command, version, undone.map_err(|error| error.to_string())?);
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
        let version = self.version;
        let is_newest = self.quorum.chain.newest() == joint;
        let mut all: Vec<Heard> = newcomers.into_iter().chain(old).collect();
        if self.lie == Some(Lie::OldTermIsJoint) {
            all.iter_mut().for_each(|one| one.status.configured_in = Term(0));
        }
        let mut verdict = turn::verdict(joint, &all);
        if self.lie == Some(Lie::JointNotUsed) && verdict == Verdict::IsUnused {
            verdict = Verdict::IsReady;
        }
        self.log(|| format!("command {command}: {verdict:?}"));
        match verdict {
            Verdict::IsReady if is_newest => {
                let ended = self.quorum.chain.change_ended();
                self.decide(command, version, ended.map_err(|error| error.to_string())?);
            }
            Verdict::WaitsForOld => {
                if !self.give_up(command, joint)? {
                    self.again(command);
                }
            }
            Verdict::IsUnused if !turn::is_led(&all) => {
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

    /// As `Timelines::heard_of`.
    fn status_of(&mut self, index: usize, number: Option<u64>) -> Checked<Option<Status>> {
        self.wake(index)?;
        let has_it = self.nodes[index].timeline.as_ref().map(|one| one.configuration_number());
        if number.is_some_and(|number| has_it.is_none_or(|own| own < number))
            && self.learn(index)?.is_err()
        {
            return Ok(None);
        }
        let status = self.nodes[index].timeline.as_ref().and_then(|one| one.status().ok());
        Ok(status.map(|mut status| {
            if let (Some(number), Some(Lie::DecisionNotTaken)) = (number, self.lie) {
                let newest = self.quorum.chain.newest();
                if newest.number() >= number {
                    status.configuration = newest.clone();
                }
            }
            status
        }))
    }

    /// Reads who the members are, and takes what stands there; the timeline comes to a member that never had it.
    pub(super) fn learn(&mut self, index: usize) -> Checked<Result<(), RefusedReason>> {
        if self.nodes[index].is_resting && !self.wake(index)? {
            let text = "its WAL is away".to_owned();
            return Ok(Err(RefusedReason::Unavailable(text)));
        }
        if self.nodes[index].is_mending {
            let text = "WAL is damaged here".to_owned();
            return Ok(Err(RefusedReason::Storage(text)));
        }
        if self.no_objects_until > self.now {
            let text = "object storage does not answer".to_owned();
            return Ok(Err(RefusedReason::Unavailable(text)));
        }
        if self.lie == Some(Lie::DecisionNotTaken) && self.nodes[index].timeline.is_some() {
            return Ok(Ok(()));
        }
        if !self.is_founded {
            return Ok(Err(RefusedReason::UnknownTimeline));
        }
        let decided = self.quorum.clone();
        if self.nodes[index].timeline.is_none()
            && (!decided.chain.newest().contains(self.nodes[index].member)
                || !self.nodes[index].create(&decided))
        {
            self.settle(index)?;
            return Ok(Err(RefusedReason::UnknownTimeline));
        }
        if self.nodes[index].is_finished() {
            self.settle(index)?;
            return Ok(Err(RefusedReason::UnknownTimeline));
        }
        let taken = self.nodes[index].follow(&decided);
        if let Err(reason) = &taken {
            self.check_refusal(index, reason)?;
        }
        self.settle(index)?;
        Ok(taken)
    }
}
