//! Computes: elections, what they write and send.

use super::*;

impl World {
    pub(super) fn begin(&mut self, compute: usize) {
        if self.computes[compute].proposer.is_some() || (self.quiet.is_some() && compute > 0) {
            return;
        }
        let skipped = self.rng.below(3) as u32;
        let configuration = self.quorum.chain.newest().clone();
        self.computes[compute].begin(configuration, skipped);
        let life = self.computes[compute].life;
        self.log(|| format!("compute {compute} begins, the {life}th"));
        self.after(0, Event::Tick(compute, life));
    }

    pub(super) fn end_compute(&mut self, compute: usize, back_after: Time) {
        self.log(|| format!("compute {compute} ends"));
        self.computes[compute].end();
        for node in 0..self.nodes.len() {
            self.disconnect(compute, node);
        }
        self.after(back_after, Event::Begin(compute));
    }

    pub(super) fn tick(&mut self, compute: usize, life: u64) -> Checked {
        if self.computes[compute].life != life || self.computes[compute].proposer.is_none() {
            return Ok(());
        }
        for node in 0..self.nodes.len() {
            let link = &self.computes[compute].links[node];
            match link.connection {
                None => self.connect(compute, node),
                Some(_) if self.now > link.last_heard + DEAD_AFTER => {
                    self.disconnect(compute, node)
                }
                Some(_) => self.send(compute, node, Request::Ping),
            }
        }
        self.pump(compute);
        self.ask_last_record(compute);
        let delay = TICK + self.rng.below(TICK);
        self.after(delay, Event::Tick(compute, life));
        Ok(())
    }

    /// Feeds the proposer, and does what it says.
    pub(super) fn drive(
        &mut self,
        compute: usize,
        feed: impl FnOnce(&mut Proposer, &mut Vec<ProposerOutput>),
    ) -> Checked {
        let mut outputs = Vec::new();
        let Some(proposer) = &mut self.computes[compute].proposer else { return Ok(()) };
        feed(proposer, &mut outputs);
        if let Err(error) = proposer.invariants() {
            return Err(format!(
                "the proposer of compute {compute} is not as it has to be: {error}"
            ));
        }
        for output in outputs {
            match output {
                ProposerOutput::RequestVote(member, request) => {
                    let node = self.node_of(member.node.0);
                    self.send(compute, node, Request::Vote(request));
                }
                ProposerOutput::AnnounceElected(member, elected) => {
                    let node = self.node_of(member.node.0);
                    self.computes[compute].links[node].next = None;
                    self.send(compute, node, Request::Elected(elected));
                }
                ProposerOutput::Elected(election) => {
                    self.log(|| {
                        let (term, start, donor) =
                            (election.term, election.start_lsn, election.donor.node);
                        format!("compute {compute} wins term {term} at {start}, donor {donor}")
                    });
                    self.outcome.elections += 1;
                    let (start, term) = (election.start_lsn, election.term);
                    let one = &mut self.computes[compute];
                    one.start = start;
                    let history = one.proposer.as_ref().map(|proposer| proposer.history().clone());
                    if start == self.parameters.start_lsn {
                        one.generator = Some(generator(&self.parameters, start, Lsn(8), term));
                    }
                    self.truth.elected(compute, term, start, &history.unwrap_or_default())?;
                    let (life, delay) = (self.computes[compute].life, self.rng.below(2000));
                    self.after(delay, Event::Write(compute, life));
                }
                ProposerOutput::StreamFrom(member, lsn) => {
                    let node = self.node_of(member.node.0);
                    self.computes[compute].links[node].next = Some(lsn);
                }
                ProposerOutput::Committed(lsn) => {
                    let term = self.computes[compute].term();
                    self.log(|| format!("compute {compute} has {lsn} of term {term} committed"));
                    self.truth.committed(term, lsn)?;
                }
                ProposerOutput::Fenced(term) => {
                    self.log(|| format!("compute {compute} is fenced by term {term}"));
                    let most = if self.quiet.is_some() { 10_000 } else { 150_000 };
                    let back_after = self.rng.between(2000, most);
                    self.end_compute(compute, back_after);
                    return Ok(());
                }
            }
        }
        self.pump(compute);
        Ok(())
    }

    pub(super) fn node_of(&self, id: u64) -> usize {
        id as usize - 1
    }

    /// Sends each safekeeper what it lacks, and what is committed.
    pub(super) fn pump(&mut self, compute: usize) {
        if !self.computes[compute].is_elected() {
            return;
        }
        for node in 0..self.nodes.len() {
            loop {
                let one = &self.computes[compute];
                let link = &one.links[node];
                let Some(next) = link.next.filter(|_| link.connection.is_some()) else { break };
                let commit_lsn = one.commit_lsn();
                if next < one.start {
                    // It pulls that from others.
                    break;
                }
                let bytes = one.bytes(next, self.plan.chunk).to_vec();
                if bytes.is_empty() && link.told >= commit_lsn {
                    break;
                }
                let length = bytes.len() as u64;
                let append =
                    Append { term: one.term(), start: next, length, record_end: next, commit_lsn };
                let link = &mut self.computes[compute].links[node];
                link.next = Some(next + length);
                link.told = commit_lsn;
                self.send(compute, node, Request::Append(append, bytes));
                if length == 0 {
                    break;
                }
            }
        }
    }

    /// What a safekeeper has got from others it need not be sent.
    fn note_pulled(&mut self, compute: usize, node: usize, ack: Ack) {
        let one = &mut self.computes[compute];
        let (term, end) = (one.term(), one.end_lsn());
        let link = &mut one.links[node];
        let has_more = link.next.is_some_and(|next| next < ack.flush_lsn);
        if has_more && ack.term == term && ack.flush_lsn <= end {
            link.next = Some(ack.flush_lsn);
            self.pump(compute);
        }
    }

    /// Asks somebody who has it where the record before the own log begins, so that the first own one can link back to it.
    pub(super) fn ask_last_record(&mut self, compute: usize) {
        let one = &self.computes[compute];
        if !one.is_elected() || one.generator.is_some() {
            return;
        }
        let has_it = |node: usize| {
            let member = self.nodes[node].member;
            let flush_lsn =
                one.proposer.as_ref().and_then(|proposer| proposer.flush_lsn_of(member));
            flush_lsn >= Some(one.start) && one.links[node].connection.is_some()
        };
        let holders: Vec<usize> = (0..self.nodes.len()).filter(|&node| has_it(node)).collect();
        if !holders.is_empty() {
            let (start, node) = (one.start, holders[self.rng.index(holders.len())]);
            self.computes[compute].asks = true;
            self.send(compute, node, Request::LastRecord(start));
        }
    }

    pub(super) fn write(&mut self, compute: usize, life: u64) {
        let one = &mut self.computes[compute];
        if one.life != life || !one.is_elected() {
            return;
        }
        let pending = one.end_lsn().saturating_sub(one.commit_lsn());
        let written = one.end_lsn().saturating_sub(self.parameters.start_lsn);
        // The first record, its barrier, is written whatever is not committed: it shows whether the term still stands.
        let has_room = pending < MOST_PENDING || one.log.is_empty();
        if let Some(generator) = one.generator.as_mut().filter(|_| has_room) {
            let mut bytes = Vec::new();
            for _ in 0..self.rng.between(1, 4) {
                let is_large = self.rng.one_in(60);
                // The longest fill whole segments.
                let most_large = if self.rng.one_in(8) { 150_000 } else { 20_000 };
                let size = self.rng.below(if is_large { most_large } else { self.plan.record });
                bytes.extend(generator.record(size as usize));
            }
            if self.plan.switches && self.rng.one_in(25) && written < MOST_WAL {
                bytes.extend(generator.switch());
            }
            one.log.extend_from_slice(&bytes);
            let (end, term) = (one.end_lsn(), one.term());
            if let Some(proposer) = &mut one.proposer {
                proposer.appended(end);
            }
            self.truth.wrote(term, &bytes);
            self.log(|| format!("compute {compute} writes up to {end}"));
            self.pump(compute);
        }
        let delay = self.rng.between(500, 12_000);
        self.after(delay, Event::Write(compute, life));
    }

    pub(super) fn answer(&mut self, index: usize, reply: Reply) -> Checked {
        let connection = &self.connections[index];
        let (compute, node) = (connection.compute, connection.node);
        let is_current = self.computes[compute].links[node].connection == Some(index);
        if connection.is_dead && self.lie != Some(Lie::LossWithinConnection) || !is_current {
            return Ok(());
        }
        let member = self.nodes[node].member;
        self.computes[compute].links[node].last_heard = self.now;
        match reply {
            Reply::Greeting { promised } => self
                .drive(compute, |proposer, outputs| proposer.connected(member, promised, outputs)),
            Reply::Vote(mut vote) => {
                if self.lie == Some(Lie::DonorIsFixed) && node > 0 {
                    vote.flush_lsn = self.parameters.start_lsn;
                    vote.history = TermHistory::default();
                }
                self.drive(compute, |proposer, outputs| proposer.vote(member, vote, outputs))
            }
            Reply::Ack(ack) => {
                let other = self.nodes[(node + 1) % self.nodes.len()].member;
                if self.lie == Some(Lie::AckCountsTwice) {
                    self.drive(compute, |proposer, outputs| proposer.ack(other, ack, outputs))?;
                }
                self.drive(compute, |proposer, outputs| proposer.ack(member, ack, outputs))?;
                self.note_pulled(compute, node, ack);
                let one = &self.computes[compute];
                if !one.asks && ack.flush_lsn >= one.start {
                    self.ask_last_record(compute);
                }
                Ok(())
            }
            Reply::LastRecord(found) => {
                let parameters = self.parameters.clone();
                let one = &mut self.computes[compute];
                one.asks = false;
                if let Some(prev) = found.filter(|_| one.is_elected() && one.generator.is_none()) {
                    one.generator = Some(generator(&parameters, one.start, prev, one.term()));
                }
                Ok(())
            }
            Reply::Refused(RefusedReason::Quorum(Refusal::Fenced { promised })) => {
                self.disconnect(compute, node);
                self.drive(compute, |proposer, outputs| proposer.outranked(promised, outputs))
            }
            Reply::Refused(_) => {
                self.disconnect(compute, node);
                Ok(())
            }
        }
    }
}
