//! Computes: elections, what they write and send.

use pgstrata_ids::NodeId;

use super::*;

impl World {
    pub(super) fn begin(&mut self, compute: usize) {
        let one = &self.computes[compute];
        if one.proposer.is_some() || one.is_steward || (self.quiet.is_some() && compute > 0) {
            return;
        }
        if self.now < self.idle_until {
            self.at(self.idle_until, Event::Begin(compute));
            return;
        }
        let skipped = self.skipped();
        // One that it was told of before, perhaps, and hears of the newest only now.
        let known = self.quorum.chain.configurations();
        let back = if self.rng.one_in(3) { self.rng.index(known.len()) } else { 0 };
        let mut configuration = known[known.len() - 1 - back].clone();
        let serves = |node: &NodeId| !self.nodes[self.node_of(node.0)].is_mending;
        if self.quiet.is_some() && !configuration.nodes().iter().any(serves) {
            // Whom nobody answers is told of others by who starts it again.
            configuration = self.quorum.chain.newest().clone();
        }
        self.computes[compute].begin(configuration, skipped);
        let life = self.computes[compute].life;
        self.log(|| format!("compute {compute} begins, the {life}th"));
        self.after(0, Event::Tick(compute, life));
    }

    /// More than one that goes on with other members, which is never to outrank a newer one.
    fn skipped(&mut self) -> u32 {
        10 + self.rng.below(3) as u32
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
                None if self.is_wanted(compute, node) => self.connect(compute, node),
                None => {}
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
                    if let Some(node) = self.link_to(compute, member) {
                        self.send(compute, node, Request::Vote(request));
                    }
                }
                ProposerOutput::AnnounceElected(member, elected) => {
                    if let Some(node) = self.link_to(compute, member) {
                        self.computes[compute].links[node].next = None;
                        self.send(compute, node, Request::Elected(elected));
                    }
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
                    let history = one.proposer.as_ref().map(|proposer| proposer.history().clone());
                    self.truth.elected(compute, term, start, &history.unwrap_or_default())?;
                    match one.led.take() {
                        Some(led) => {
                            if !one.goes_on(&led, start) && self.lie != Some(Lie::AnyLogLedOn) {
                                self.log(|| format!("compute {compute} can't go on at {start}"));
                                let back_after = self.rng.between(2000, 50_000);
                                self.end_compute(compute, back_after);
                                return Ok(());
                            }
                            // Voters may know more, and no more is said of what they know.
                            one.committed = one.committed.max(election.commit_lsn);
                            let end = one.end_lsn();
                            let again = one.bytes(start, usize::MAX).to_vec();
                            self.truth.wrote(term, &again);
                            self.outcome.led_on += 1;
                            if let Some(proposer) = &mut self.computes[compute].proposer {
                                proposer.appended(end);
                            }
                        }
                        None => {
                            one.start = start;
                            one.own_since = term;
                            one.committed = election.commit_lsn;
                            if start == self.parameters.start_lsn {
                                let parameters = &self.parameters;
                                one.generator = Some(generator(parameters, start, Lsn(8), term));
                            }
                        }
                    }
                    let (life, delay) = (self.computes[compute].life, self.rng.below(2000));
                    if !self.computes[compute].is_steward {
                        self.after(delay, Event::Write(compute, life, term));
                        self.after(BARRIER_PATIENCE, Event::Barrier(compute, life, term));
                    }
                }
                ProposerOutput::StreamFrom(member, lsn) => {
                    if let Some(node) = self.link_to(compute, member) {
                        self.computes[compute].links[node].next = Some(lsn);
                    }
                }
                ProposerOutput::Committed(lsn) => {
                    let term = self.computes[compute].term();
                    self.log(|| format!("compute {compute} has {lsn} of term {term} committed"));
                    self.truth.committed(term, lsn)?;
                    let one = &mut self.computes[compute];
                    one.committed = one.committed.max(lsn);
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

    /// Where a member has greeted.
    fn link_to(&self, compute: usize, member: Member) -> Option<usize> {
        let node = self.node_of(member.node.0);
        (self.computes[compute].links[node].member == Some(member)).then_some(node)
    }

    fn is_wanted(&self, compute: usize, node: usize) -> bool {
        let configuration = self.computes[compute].configuration();
        configuration.is_some_and(|one| one.nodes().contains(&self.nodes[node].member.node))
    }

    /// A member tells of a configuration. In answer to a greeting it need not be greeted again.
    fn told_of(&mut self, compute: usize, node: usize, decided: &Configuration, is_greeting: bool) {
        if self.computes[compute].is_steward {
            return;
        }
        let Some(next) = self.computes[compute].hears_of(decided, node) else { return };
        self.log(|| format!("compute {compute} goes on with configuration {}", next.number()));
        let (number, skipped) = (next.number(), self.skipped());
        self.computes[compute].adopt(next, skipped);
        for other in 0..self.nodes.len() {
            if !self.is_wanted(compute, other) {
                self.disconnect(compute, other);
            } else if !(is_greeting && other == node) {
                self.computes[compute].links[other].member = None;
                self.send(compute, other, Request::Greet(number));
            }
        }
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
                let commit_lsn = one.committed;
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

    /// Another one is started where a compute commits nothing in its term.
    pub(super) fn barrier(&mut self, compute: usize, life: u64, term: Term) {
        let one = &self.computes[compute];
        let is_it = one.life == life && one.is_elected() && one.term() == term;
        let start = one.proposer.as_ref().map_or(Lsn::INVALID, |proposer| {
            proposer.history().last().map_or(Lsn::INVALID, |last| last.lsn)
        });
        if is_it && one.committed < start {
            self.end_compute(compute, 1000);
        }
    }

    pub(super) fn write(&mut self, compute: usize, life: u64, term: Term) {
        let one = &mut self.computes[compute];
        if one.life != life || !one.is_elected() || one.term() != term {
            return;
        }
        let pending = one.end_lsn().saturating_sub(one.committed);
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
        self.after(delay, Event::Write(compute, life, term));
    }

    /// As the shipped driver takes a greeting's answer.
    fn greeted(
        &mut self,
        compute: usize,
        node: usize,
        member: Member,
        said: &Configuration,
        promised: Term,
    ) -> Checked {
        self.computes[compute].links[node].heard = Some(member);
        self.told_of(compute, node, said, true);
        let one = &mut self.computes[compute];
        let Some(own) = one.configuration() else { return Ok(()) };
        if !own.contains(member) {
            self.disconnect(compute, node);
            return Ok(());
        }
        one.links[node].member = Some(member);
        if one.yields_above.is_some_and(|asked| promised > asked)
            && self.lie != Some(Lie::AnyLogLedOn)
        {
            self.drive(compute, |proposer, outputs| proposer.outranked(promised, outputs))?;
        }
        self.drive(compute, |proposer, outputs| proposer.connected(member, promised, outputs))
    }

    pub(super) fn answer(&mut self, index: usize, reply: Reply) -> Checked {
        let connection = &self.connections[index];
        let (compute, node) = (connection.compute, connection.node);
        let is_current = self.computes[compute].links[node].connection == Some(index);
        if connection.is_dead && self.lie != Some(Lie::LossWithinConnection) || !is_current {
            return Ok(());
        }
        self.computes[compute].links[node].last_heard = self.now;
        if let Reply::Greeting { member, configuration, promised } = reply {
            return self.greeted(compute, node, member, &configuration, promised);
        }
        if let Reply::Configuration(decided) = &reply {
            self.told_of(compute, node, decided, false);
            return Ok(());
        }
        // What was answered before it was greeted anew is about what was asked before.
        let Some(member) = self.computes[compute].links[node].member else { return Ok(()) };
        match reply {
            Reply::Greeting { .. } | Reply::Configuration(_) => Ok(()),
            Reply::Vote(mut vote) => {
                if self.lie == Some(Lie::DonorIsFixed) && node > 0 {
                    vote.flush_lsn = self.parameters.start_lsn;
                    vote.history = TermHistory::default();
                }
                self.drive(compute, |proposer, outputs| proposer.vote(member, vote, outputs))
            }
            Reply::Ack(ack) => {
                let other = self.nodes[(node + 1) % self.plan.nodes].member;
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
