//! The election that a safekeeper has members make: see [`crate::campaign`].

use pgstrata_wire::safekeeper::Greeting;

use super::*;

/// How often it looks after its connections.
const TICK: Time = 8_000;

impl World {
    /// The number by which its connections are known: no compute's.
    pub(super) fn campaign_index(&self) -> usize {
        self.computes.len()
    }

    pub(super) fn begin_campaign(&mut self, joint: Configuration) {
        self.campaign.begin(joint);
        let life = self.campaign.life;
        self.log(|| "a safekeeper has members elect".into());
        self.after(0, Event::TickCampaign(life));
        self.after(100_000, Event::EndCampaign(life));
    }

    pub(super) fn end_campaign(&mut self) {
        self.campaign.proposer = None;
        for node in 0..self.nodes.len() {
            self.leave_campaign(node);
        }
    }

    fn campaign_greeting(&self, known: u64) -> Message<'static> {
        Message::Greeting(Greeting {
            parameters: self.parameters.clone(),
            known,
            addresses: Vec::new(),
            proposer: self.campaign.id(),
        })
    }

    fn leave_campaign(&mut self, node: usize) {
        let link = &mut self.campaign.links[node];
        (link.next, link.member) = (None, None);
        if let Some(connection) = link.connection.take() {
            // What is on its way still arrives; what the other end sends is heard by nobody.
            self.leave(connection);
        }
    }

    pub(super) fn tick_campaign(&mut self, life: u64) {
        if self.campaign.life != life || self.campaign.proposer.is_none() {
            return;
        }
        let configuration = self.campaign.configuration();
        let members = configuration.map(Configuration::nodes).unwrap_or_default();
        let number = configuration.map_or(0, Configuration::number);
        for node in 0..self.nodes.len() {
            let link = &self.campaign.links[node];
            match link.connection {
                None if members.contains(&self.nodes[node].member.node) => {
                    let index = self.connect(self.campaign_index(), node);
                    let link = &mut self.campaign.links[node];
                    (link.connection, link.last_heard) = (Some(index), self.now);
                    let greeting = self.campaign_greeting(number);
                    self.send(index, &greeting);
                }
                None => {}
                Some(_) if self.now > link.last_heard + DEAD_AFTER => self.leave_campaign(node),
                Some(index) => self.send(index, &Message::Ping),
            }
        }
        self.tell_committed();
        let delay = TICK + self.rng.below(TICK);
        self.after(delay, Event::TickCampaign(life));
    }

    fn tell_committed(&mut self) {
        if !self.campaign.is_elected() {
            return;
        }
        let (term, start, commit_lsn) =
            (self.campaign.term(), self.campaign.start, self.campaign.committed);
        for node in 0..self.nodes.len() {
            let link = &mut self.campaign.links[node];
            let may_be_told = link.next.is_some_and(|next| next >= start) && link.told < commit_lsn;
            let Some(index) = link.connection.filter(|_| may_be_told) else { continue };
            link.told = commit_lsn;
            let append = Append { term, start, length: 0, record_end: start, commit_lsn };
            self.send(index, &Message::Append(append, &[]));
        }
    }

    fn ask_member(&mut self, member: Member, message: &Message<'_>) {
        let link = &self.campaign.links[self.node_of(member.node.0)];
        if let Some(index) = link.connection.filter(|_| link.member == Some(member)) {
            self.send(index, message);
        }
    }

    /// Feeds the proposer, and does what it says.
    fn drive(&mut self, feed: impl FnOnce(&mut Proposer, &mut Vec<ProposerOutput>)) -> Checked {
        let mut outputs = Vec::new();
        let Some(proposer) = &mut self.campaign.proposer else { return Ok(()) };
        feed(proposer, &mut outputs);
        if let Err(error) = proposer.invariants() {
            return Err(format!("a safekeeper's proposer is not as it has to be: {error}"));
        }
        for output in outputs {
            match output {
                ProposerOutput::RequestVote(member, request) => {
                    self.ask_member(member, &Message::VoteRequest(request));
                }
                ProposerOutput::AnnounceElected(member, elected) => {
                    let node = self.node_of(member.node.0);
                    self.campaign.links[node].next = None;
                    self.ask_member(member, &Message::Elected(elected));
                }
                ProposerOutput::Elected(election) => {
                    let (start, term) = (election.start_lsn, election.term);
                    self.log(|| format!("a safekeeper wins term {term} at {start}"));
                    self.outcome.elections += 1;
                    let proposer = self.campaign.proposer.as_ref();
                    let history = proposer.map(|proposer| proposer.history().clone());
                    let index = self.campaign_index();
                    self.truth.elected(index, term, start, &history.unwrap_or_default())?;
                    (self.campaign.start, self.campaign.committed) = (start, election.commit_lsn);
                }
                ProposerOutput::StreamFrom(member, lsn) => {
                    let node = self.node_of(member.node.0);
                    self.campaign.links[node].next = Some(lsn);
                }
                ProposerOutput::Committed(lsn) => {
                    let term = self.campaign.term();
                    self.log(|| format!("a safekeeper has {lsn} of term {term} committed"));
                    self.truth.committed(term, lsn)?;
                    self.campaign.committed = self.campaign.committed.max(lsn);
                }
                ProposerOutput::Fenced(term) => {
                    self.log(|| format!("a safekeeper's election is outranked by term {term}"));
                    self.end_campaign();
                    return Ok(());
                }
            }
        }
        self.tell_committed();
        Ok(())
    }

    pub(super) fn answer_campaign(&mut self, index: usize, reply: Reply) -> Checked {
        let connection = &self.connections[index];
        let node = connection.node;
        let is_current = self.campaign.links[node].connection == Some(index);
        if connection.is_dead && self.lie != Some(Lie::LossWithinConnection) || !is_current {
            return Ok(());
        }
        self.campaign.links[node].last_heard = self.now;
        if let Reply::Greeting(reply) = reply {
            let member = Member { node: reply.node, incarnation: reply.incarnation };
            let promised = reply.term;
            let own = self.campaign.configuration();
            if !own.is_some_and(|own| own.contains(member)) {
                self.leave_campaign(node);
                return Ok(());
            }
            self.campaign.links[node].member = Some(member);
            return self.drive(|proposer, outputs| proposer.connected(member, promised, outputs));
        }
        let Some(member) = self.campaign.links[node].member else { return Ok(()) };
        match reply {
            // Its own is what it was asked for.
            Reply::Greeting(_) | Reply::Configuration(_) => Ok(()),
            Reply::Vote(vote) => {
                self.drive(|proposer, outputs| proposer.vote(member, vote, outputs))
            }
            Reply::Ack(ack) => self.drive(|proposer, outputs| proposer.ack(member, ack, outputs)),
            Reply::Refused(RefusedReason::Quorum(Refusal::Fenced { promised })) => {
                self.leave_campaign(node);
                self.drive(|proposer, outputs| proposer.outranked(promised, outputs))
            }
            Reply::Refused(_) => {
                self.leave_campaign(node);
                Ok(())
            }
        }
    }
}
