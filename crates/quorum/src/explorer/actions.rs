//! What can happen next, and what then does.

use pgstrata_ids::{Lsn, Term};

use super::checks;
use super::search::fingerprint;
use super::world::{
    Action, Compute, Content, Message, NODES, Node, RECORD, World, configuration, index, made_up,
    member, wiped,
};
use crate::{
    Acceptor, AcceptorOutput, Adopter, Append, Configuration, ControlState, Fault, Holding,
    PeerRange, Phase, ProposerOutput, Refusal, joint_in_use, provable_commit,
};

/// The outputs of one input, and the bytes that came with it.
type Outputs = (Vec<AcceptorOutput>, Vec<u8>);

impl World {
    /// Everything that can happen in this state.
    pub fn actions(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        let is_joint = !self.newest().incoming().is_empty();
        let has_ended = self.number == self.undone.max(1) + 2;
        let may_change = !has_ended && (!is_joint || self.joint_is_in_use());
        if self.left.changes > 0 && (may_change || self.fault == Some(Fault::NewTooEarly)) {
            actions.push(Action::Change);
        }
        let is_late = self.number == 3 && self.fault == Some(Fault::UndoneTooLate);
        if self.left.undos > 0 && (is_joint || is_late) {
            actions.push(Action::Undo);
        }
        for (c, compute) in self.computes.iter().enumerate() {
            self.compute_actions(c as u8, compute, &mut actions);
        }
        for (m, message) in self.network.iter().enumerate() {
            if m > 0 && self.network[m - 1] == *message {
                continue;
            }
            let m = m as u8;
            actions.push(Action::Deliver(m, false));
            if self.left.duplicates > 0 {
                actions.push(Action::Deliver(m, true));
            }
            if self.left.crashes > 0 && message.to_acceptor() {
                let (outputs, payload) = self.clone().react(m);
                let crash = |after, kept| Action::DeliverAndCrash(m, after, kept);
                self.crashes(message.node, &outputs, &payload, crash, &mut actions);
            }
        }
        for node in 0..self.nodes.len() as u8 {
            let core = &self.nodes[usize::from(node)].core;
            if self.left.late_flush && core.write_lsn() > core.flush_lsn() {
                actions.push(Action::Flush(node));
                if self.left.crashes > 0 {
                    let outputs = self.clone().flush(node);
                    let crash = |after, kept| Action::FlushAndCrash(node, after, kept);
                    self.crashes(node, &outputs, &[], crash, &mut actions);
                }
            }
            if self.left.learns > 0 && core.configuration().number() < u64::from(self.number) {
                actions.push(Action::Learn(node));
            }
            if self.left.wipes > 0 {
                actions.push(Action::Wipe(node));
            }
            for other in (0..self.nodes.len() as u8).filter(|&other| other != node) {
                let theirs = &self.nodes[usize::from(other)].core;
                let end = self.copy_end(node);
                if self.left.copies > 0 && end > theirs.flush_lsn() {
                    actions.push(Action::Copy(node, other));
                }
                if self.left.follows > 0 && self.followed_range(node, other).is_some() {
                    actions.push(Action::Follow(node, other));
                }
                if self.left.proofs > 0 && node < other {
                    actions.push(Action::Prove(node, other));
                }
            }
        }
        actions
    }

    fn compute_actions(&self, c: u8, compute: &Compute, actions: &mut Vec<Action>) {
        if !compute.started {
            // Whoever starts may not have heard of the last change yet.
            actions.extend((1..=self.number).map(|number| Action::Campaign(c, number)));
            if self.left.made_up > 0 {
                actions.push(Action::CampaignMadeUp(c));
            }
            return;
        }
        if self.left.restarts > 0 {
            actions.push(Action::Restart(c));
        }
        let phase = compute.core.phase();
        if phase == Phase::Elected && compute.records > 0 {
            actions.push(Action::Write(c));
        }
        for node in 0..self.nodes.len() {
            if phase != Phase::Fenced && self.left.reconnects > 0 {
                actions.push(Action::Reconnect(c, node as u8));
            }
            let Some(next) = compute.next[node].filter(|_| phase == Phase::Elected) else {
                continue;
            };
            let commit = compute.core.commit_lsn().0 as u8;
            let tidings = self.left.tidings > 0 && compute.told[node] < commit;
            if usize::from(next) < compute.log.len() || tidings {
                actions.push(Action::Send(c, node as u8, false));
            }
            if self.left.pieces && usize::from(next) + RECORD <= compute.log.len() {
                actions.push(Action::Send(c, node as u8, true));
            }
        }
    }

    /// Every crash between these outputs, with every part of the unsynced log surviving.
    fn crashes(
        &self,
        node: u8,
        outputs: &[AcceptorOutput],
        payload: &[u8],
        crash: impl Fn(u8, u8) -> Action,
        actions: &mut Vec<Action>,
    ) {
        for after in 0..=outputs.len() {
            let mut world = self.clone();
            if world.perform(node, 0, 0, &outputs[..after], payload).is_err() {
                continue;
            }
            let disk = &world.nodes[usize::from(node)];
            let mut last = None;
            for kept in disk.synced..=disk.log.len() {
                let whole = kept - kept % RECORD;
                if last.replace(whole) != Some(whole) {
                    actions.push(crash(after as u8, kept as u8));
                }
            }
        }
    }

    /// The state after an action; an error is what is wrong with it.
    pub fn after(&self, action: Action) -> Result<World, String> {
        let mut world = self.clone();
        world.act(action)?;
        world.purge();
        world.network.sort_unstable();
        checks::state(&world)?;
        Ok(world)
    }

    fn act(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Campaign(c, number) => self.campaign(c, self.configuration(number)),
            Action::CampaignMadeUp(c) => {
                self.left.made_up -= 1;
                self.campaign(c, made_up(self.number))
            }
            Action::Wipe(node) => self.wipe(node),
            Action::Learn(node) => self.learn(node),
            Action::Change => {
                self.left.changes -= 1;
                self.number += 1;
                Ok(())
            }
            Action::Undo => {
                self.left.undos -= 1;
                self.number += 1;
                self.undone = self.number;
                Ok(())
            }
            Action::Restart(c) => {
                self.left.restarts -= 1;
                let old = &self.computes[usize::from(c)];
                let new = Compute::new(c, old.run + 1, old.records, self.left.five, self.fault);
                self.computes[usize::from(c)] = new;
                self.network.retain(|message| message.compute != c || message.to_acceptor());
                Ok(())
            }
            Action::Write(c) => {
                let compute = &mut self.computes[usize::from(c)];
                let left = compute.records.checked_sub(1);
                let left = left.ok_or("a beginning needs records that the bounds don't allow")?;
                compute.log.extend(compute.record(c));
                compute.records = left;
                compute.core.appended(Lsn(compute.log.len() as u64));
                Ok(())
            }
            Action::Send(c, node, piece) => {
                self.send(c, node, piece);
                Ok(())
            }
            Action::Reconnect(c, node) => {
                self.left.reconnects -= 1;
                self.connect(c, node)
            }
            Action::Deliver(m, keep) => {
                let message = self.network[usize::from(m)].clone();
                let (outputs, payload) = self.react_checked(m)?;
                if keep {
                    self.left.duplicates -= 1;
                } else {
                    self.network.remove(usize::from(m));
                }
                self.perform(message.node, message.compute, message.run, &outputs, &payload)
            }
            Action::DeliverAndCrash(m, after, kept) => {
                let message = self.network[usize::from(m)].clone();
                let (outputs, payload) = self.react(m);
                self.network.remove(usize::from(m));
                let done = &outputs[..usize::from(after)];
                self.perform(message.node, message.compute, message.run, done, &payload)?;
                self.crash(message.node, kept)
            }
            Action::Flush(node) => {
                let outputs = self.flush(node);
                self.perform_for_leader(node, &outputs)
            }
            Action::FlushAndCrash(node, after, kept) => {
                let outputs = self.flush(node);
                self.perform_for_leader(node, &outputs[..usize::from(after)])?;
                self.crash(node, kept)
            }
            Action::Copy(from, to) => self.copy(from, to),
            Action::Follow(from, to) => self.follow(from, to),
            Action::Prove(a, b) => self.prove(a, b),
        }
    }

    fn campaign(&mut self, c: u8, members: Configuration) -> Result<(), String> {
        let compute = &mut self.computes[usize::from(c)];
        compute.started = true;
        compute.core = Compute::proposer(c, compute.run, members, self.fault);
        (0..self.nodes.len() as u8).try_for_each(|node| self.connect(c, node))
    }

    fn connect(&mut self, c: u8, node: u8) -> Result<(), String> {
        let acceptor = &self.nodes[usize::from(node)].core;
        // Who greets says which life of its directory this is.
        if acceptor.member() != member(node, self.left.five) {
            return Ok(());
        }
        let (promised, five) = (acceptor.term(), self.left.five);
        let compute = &mut self.computes[usize::from(c)];
        compute.next[usize::from(node)] = None;
        let mut outputs = Vec::new();
        compute.core.connected(member(node, five), promised, &mut outputs);
        self.proposer_outputs(c, outputs)
    }

    fn send(&mut self, c: u8, node: u8, piece: bool) {
        let compute = &mut self.computes[usize::from(c)];
        let Some(next) = compute.next[usize::from(node)] else { return };
        let from = usize::from(next);
        let to = if piece { from + 1 } else { compute.log.len() };
        let commit_lsn = compute.core.commit_lsn();
        let append = Append {
            term: compute.core.term(),
            start: Lsn(from as u64),
            length: (to - from) as u64,
            record_end: Lsn((to - to % RECORD) as u64),
            commit_lsn,
        };
        self.left.tidings -= u8::from(from == to);
        compute.next[usize::from(node)] = Some(to as u8);
        compute.told[usize::from(node)] = commit_lsn.0 as u8;
        let bytes = compute.log[from..to].to_vec();
        let run = compute.run;
        self.post(c, run, node, Content::Append(append, bytes));
    }

    fn post(&mut self, compute: u8, run: u8, node: u8, content: Content) {
        let order = fingerprint(&content);
        self.network.push(Message { compute, run, node, order, content });
    }

    fn react_checked(&mut self, m: u8) -> Result<Outputs, String> {
        let message = self.network[usize::from(m)].clone();
        if message.to_acceptor() {
            return Ok(self.react(m));
        }
        let (c, five) = (message.compute, self.left.five);
        let compute = &mut self.computes[usize::from(c)];
        let node = member(message.node, five);
        let mut outputs = Vec::new();
        if compute.run == message.run {
            match &message.content {
                Content::Vote(vote, log) => {
                    if compute.core.phase() == Phase::Campaigning {
                        compute.voted[usize::from(message.node)].clone_from(log);
                    }
                    compute.core.vote(node, vote.clone(), &mut outputs);
                }
                Content::Ack(ack) => compute.core.ack(node, *ack, &mut outputs),
                _ => {}
            }
        }
        self.proposer_outputs(c, outputs)?;
        Ok((Vec::new(), Vec::new()))
    }

    /// What an acceptor says to a message; nothing is performed yet.
    fn react(&mut self, m: u8) -> Outputs {
        let newest = self.newest();
        let message = self.network[usize::from(m)].clone();
        let core = &mut self.nodes[usize::from(message.node)].core;
        let mut outputs = Vec::new();
        let mut payload = Vec::new();
        match message.content {
            Content::VoteRequest(request) => {
                // Its driver looks where configurations are decided.
                let believes = self.fault == Some(Fault::MessengerBelieved);
                if request.configuration.number() > core.configuration().number() && !believes {
                    core.configure(&newest, &mut outputs);
                }
                core.vote(&request, &mut outputs);
            }
            Content::Elected(elected) => core.elected(&elected, &mut outputs),
            Content::Append(append, bytes) => {
                core.append(&append, &mut outputs);
                if !self.left.late_flush && core.write_lsn() > core.flush_lsn() {
                    core.flush(&mut outputs);
                }
                payload = bytes;
            }
            Content::Vote(..) | Content::Ack(_) => {}
        }
        (outputs, payload)
    }

    fn flush(&mut self, node: u8) -> Vec<AcceptorOutput> {
        let mut outputs = Vec::new();
        self.nodes[usize::from(node)].core.flush(&mut outputs);
        outputs
    }

    /// A flush's acknowledgement goes to whoever leads the acknowledged term.
    fn perform_for_leader(&mut self, node: u8, outputs: &[AcceptorOutput]) -> Result<(), String> {
        let term = self.nodes[usize::from(node)].core.history().last().map(|last| last.term);
        let leads = |compute: &Compute| Some(compute.core.term()) == term;
        let c = self.computes.iter().position(leads);
        let run = c.map_or(u8::MAX, |c| self.computes[c].run);
        self.perform(node, c.unwrap_or(0) as u8, run, outputs, &[])
    }

    /// Does on the disk and in the network what an acceptor's outputs say.
    fn perform(
        &mut self,
        node: u8,
        compute: u8,
        run: u8,
        outputs: &[AcceptorOutput],
        payload: &[u8],
    ) -> Result<(), String> {
        for output in outputs {
            let disk = &mut self.nodes[usize::from(node)];
            let content = match output {
                AcceptorOutput::Persist(control) => {
                    let before = disk.control.configuration.clone();
                    disk.control = control.clone();
                    if self.fault == Some(Fault::ConfigurationNotPersisted) {
                        disk.control.configuration = before;
                    }
                    continue;
                }
                AcceptorOutput::Truncate(lsn) => {
                    let at = lsn.0 as usize;
                    if at < disk.told_commit {
                        return Err(format!(
                            "acceptor {node} removes committed bytes from {lsn} on"
                        ));
                    }
                    disk.log.truncate(at);
                    disk.synced = disk.synced.min(at);
                    continue;
                }
                AcceptorOutput::Write { at, skip } => {
                    if at.0 as usize != disk.log.len() {
                        return Err(format!("acceptor {node} writes at {at}, not at its end"));
                    }
                    disk.log.extend_from_slice(&payload[*skip as usize..]);
                    continue;
                }
                AcceptorOutput::Sync => {
                    disk.synced = disk.log.len();
                    continue;
                }
                AcceptorOutput::Committed(lsn) => {
                    let at = lsn.0 as usize;
                    disk.told_commit = disk.told_commit.max(at);
                    let term = disk.core.term();
                    let Some(log) = disk.log.get(..at).map(<[u8]>::to_vec) else {
                        return Err(format!(
                            "acceptor {node} reports {lsn} committed, past its log"
                        ));
                    };
                    // Whoever told it did so in the promised term at the latest.
                    checks::commit(self, &log, term)?;
                    continue;
                }
                AcceptorOutput::Vote(vote) if !vote.granted => continue,
                AcceptorOutput::Vote(vote) => {
                    let end = (vote.flush_lsn.0 as usize).min(disk.log.len());
                    Content::Vote(vote.clone(), disk.log[..end].to_vec())
                }
                AcceptorOutput::Ack(ack) => Content::Ack(*ack),
                // A compute that hears that it is outranked stops. As messages may be lost, and
                // computes may do nothing more, that adds no behaviour.
                AcceptorOutput::Refuse(Refusal::Fenced { .. }) => continue,
                // Nor does this one: whoever hears it starts again, with a newer configuration.
                AcceptorOutput::Refuse(Refusal::StaleConfiguration { .. }) => continue,
                // Nor do these: they are for whoever made something up, or speaks to another life of a directory.
                AcceptorOutput::Refuse(Refusal::Undecided { .. } | Refusal::NotMember) => continue,
                AcceptorOutput::Refuse(Refusal::OtherMembers { .. }) if self.may_be_made_up => {
                    continue;
                }
                AcceptorOutput::Refuse(Refusal::CommittedDiffers { .. }) => {
                    return Err(format!("acceptor {node} was told to drop committed bytes"));
                }
                AcceptorOutput::Refuse(refusal) => return Err(refusal.to_string()),
            };
            let still_there = self.computes[usize::from(compute)].run == run;
            if still_there {
                self.post(compute, run, node, content);
            }
        }
        Ok(())
    }

    /// Loses everything in memory and what wasn't synced, but for `kept` bytes; starts again.
    pub(super) fn crash(&mut self, node: u8, kept: u8) -> Result<(), String> {
        self.left.crashes -= 1;
        let fault = self.fault;
        let disk = &mut self.nodes[usize::from(node)];
        disk.log.truncate(usize::from(kept).max(disk.synced));
        // Recovery ends the log with its last whole record.
        disk.log.truncate(disk.log.len() - disk.log.len() % RECORD);
        disk.synced = disk.log.len();
        let end = Lsn(disk.log.len() as u64);
        let core = Acceptor::restore(disk.core.member(), disk.control.clone(), end);
        disk.core = core.map_err(|error| error.to_string())?.with_fault(fault);
        disk.told_commit = disk.core.commit_lsn().0 as usize;
        Ok(())
    }

    fn learn(&mut self, node: u8) -> Result<(), String> {
        self.left.learns -= 1;
        let mut outputs = Vec::new();
        let newest = self.newest();
        self.nodes[usize::from(node)].core.configure(&newest, &mut outputs);
        self.perform(node, 0, u8::MAX, &outputs, &[])
    }

    /// Whether some of the acceptors show that both groups have committed something in a term.
    fn joint_is_in_use(&self) -> bool {
        let adopter = |node: &Node| Adopter {
            number: node.core.configuration().number(),
            configured_in: match self.fault {
                Some(Fault::OldTermIsJoint) => Term(0),
                _ => node.core.configured_in(),
            },
            holding: Holding {
                member: node.core.member(),
                flush_lsn: node.core.flush_lsn(),
                history: node.core.history().clone(),
            },
        };
        let all: Vec<Adopter> = self.nodes.iter().map(adopter).collect();
        // Whoever changes members need not hear of all of them.
        (0..1u8 << all.len()).any(|who| {
            let said = all.iter().enumerate().filter(|(n, _)| who & 1 << n != 0);
            let said: Vec<Adopter> = said.map(|(_, one)| one.clone()).collect();
            joint_in_use(&self.newest(), &said).is_some()
        })
    }

    fn configuration(&self, number: u8) -> Configuration {
        // What was decided before stays what it was.
        configuration(number, self.undone, self.left.five)
    }

    fn newest(&self) -> Configuration {
        self.configuration(self.number)
    }

    /// Its promises and its log are gone.
    fn wipe(&mut self, node: u8) -> Result<(), String> {
        self.left.wipes -= 1;
        let (fault, newest, five) = (self.fault, self.newest(), self.left.five);
        let disk = &mut self.nodes[usize::from(node)];
        let control = ControlState::empty(Lsn(0), newest);
        let core = Acceptor::restore(wiped(node, five, fault), control.clone(), Lsn(0));
        let core = core.map_err(|error| error.to_string())?.with_fault(fault);
        *disk = Node { core, control, log: Vec::new(), synced: 0, told_commit: 0 };
        Ok(())
    }

    fn copy_end(&self, from: u8) -> Lsn {
        let core = &self.nodes[usize::from(from)].core;
        match self.fault {
            Some(Fault::PeerBeyondCommit) => core.flush_lsn(),
            _ => core.commit_lsn(),
        }
    }

    fn copy(&mut self, from: u8, to: u8) -> Result<(), String> {
        self.left.copies -= 1;
        let commit_lsn = self.copy_end(from);
        let source = &self.nodes[usize::from(from)];
        let history = source.core.history().clone();
        let target = &self.nodes[usize::from(to)].core;
        let end = target.flush_lsn();
        let start = target.history().divergence(end, &history, commit_lsn, Lsn(0));
        let payload = source.log[start.0 as usize..commit_lsn.0 as usize].to_vec();
        let range = PeerRange { history, commit_lsn, start, length: payload.len() as u64 };
        let mut outputs = Vec::new();
        self.nodes[usize::from(to)].core.peer_range(&range, &mut outputs);
        self.perform(to, 0, u8::MAX, &outputs, &payload)?;
        let outputs = self.flush(to);
        self.perform_for_leader(to, &outputs)
    }

    /// What the second acceptor lacks of the log that it follows, and the first has: an append of that term.
    fn followed_range(&self, from: u8, to: u8) -> Option<Append> {
        let (source, target) = (&self.nodes[usize::from(from)], &self.nodes[usize::from(to)].core);
        let (term, end) =
            target.shares_beginning(source.core.history(), source.core.flush_lsn())?;
        let start = target.flush_lsn();
        let length = end.0.checked_sub(start.0).filter(|&length| length > 0)?;
        Some(Append { term, start, length, record_end: end, commit_lsn: Lsn::INVALID })
    }

    fn follow(&mut self, from: u8, to: u8) -> Result<(), String> {
        self.left.follows -= 1;
        let Some(append) = self.followed_range(from, to) else { return Ok(()) };
        let (start, end) = (append.start.0 as usize, append.record_end.0 as usize);
        let bytes = self.nodes[usize::from(from)].log[start..end].to_vec();
        // Whoever leads that term, if anybody still does, is told as of its own.
        let leads = |compute: &Compute| compute.core.term() == append.term;
        let c = self.computes.iter().position(leads);
        let run = c.map_or(u8::MAX, |c| self.computes[c].run);
        self.post(c.unwrap_or(0) as u8, run, to, Content::Append(append, bytes));
        Ok(())
    }

    fn prove(&mut self, a: u8, b: u8) -> Result<(), String> {
        self.left.proofs -= 1;
        let holding = |node: u8| {
            let core = &self.nodes[usize::from(node)].core;
            let mut history = core.history().clone();
            if self.fault == Some(Fault::ProofIgnoresAdoption) {
                history = history.up_to(core.flush_lsn());
            }
            Holding { member: core.member(), flush_lsn: core.flush_lsn(), history }
        };
        let of = |node: u8| self.nodes[usize::from(node)].core.configuration();
        let newest = if of(a).number() < of(b).number() { of(b) } else { of(a) };
        let proof = provable_commit(newest, &[holding(a), holding(b)]);
        let Some((term, lsn)) = proof else { return Ok(()) };
        let log = self.nodes[usize::from(a)].log[..lsn.0 as usize].to_vec();
        checks::commit(self, &log, term)?;
        for node in [a, b] {
            let mut outputs = Vec::new();
            self.nodes[usize::from(node)].core.learn_commit(term, lsn, &mut outputs);
            self.perform(node, 0, u8::MAX, &outputs, &[])?;
        }
        Ok(())
    }

    fn proposer_outputs(&mut self, c: u8, outputs: Vec<ProposerOutput>) -> Result<(), String> {
        let (run, five) = (self.computes[usize::from(c)].run, self.left.five);
        for output in outputs {
            let compute = &mut self.computes[usize::from(c)];
            match output {
                ProposerOutput::RequestVote(node, request) => {
                    self.post(c, run, index(node, five), Content::VoteRequest(request));
                }
                ProposerOutput::AnnounceElected(node, elected) => {
                    self.post(c, run, index(node, five), Content::Elected(elected));
                }
                ProposerOutput::StreamFrom(node, lsn) => {
                    compute.next[usize::from(index(node, five))] = Some(lsn.0 as u8);
                }
                ProposerOutput::Elected(election) => {
                    let donor = usize::from(index(election.donor, five));
                    compute.log = std::mem::take(&mut compute.voted)[donor].clone();
                    checks::elected(self, c, election.start_lsn)?;
                }
                ProposerOutput::Committed(lsn) => {
                    let term = compute.core.term();
                    let log = compute.log[..lsn.0 as usize].to_vec();
                    checks::commit(self, &log, term)?;
                }
                ProposerOutput::Fenced(_) => compute.next = [None; NODES],
            }
        }
        Ok(())
    }
}

impl Message {
    /// True if an acceptor gets it.
    pub fn to_acceptor(&self) -> bool {
        matches!(self.content, Content::VoteRequest(_) | Content::Elected(_) | Content::Append(..))
    }
}
