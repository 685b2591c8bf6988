//! The loop: sockets, the proposer core between them, and the log to send.

mod consulting;
mod membership;

#[cfg(test)]
pub(super) use membership::tests as fixtures;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pgstrata_ids::{Lsn, Member, NodeId, Term};
use pgstrata_quorum::{
    Ack, Append, Configuration, Election, Proposer, ProposerOutput, Refusal, TermHistory,
};
use pgstrata_wire::safekeeper::{Greeting, Message, RefusedReason, decode};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::backlog::{Backlog, Piece};
use super::config::{ProposerConfig, ProposerError, WalChunk, WalSource};
use super::connection::Connection;
use super::link::{Link, PING_AFTER};
use super::network::{Network, Ready};

/// How long a commit LSN may wait for an append to travel with.
const COMMIT_DELAY: Duration = Duration::from_millis(1);

/// Longest wait: timers are checked this often at least.
const MAX_WAIT: Duration = Duration::from_millis(250);

/// How often a member is asked how far it is that has to get from others what is not ours to send.
const PULL_PING: Duration = Duration::from_millis(10);

/// Seconds after which a commit that waits is a problem.
const STALLED_AFTER: u64 = 5;

/// See the module.
#[derive(Debug)]
pub struct Driver<N: Network> {
    config: ProposerConfig,
    greeting: Greeting,
    /// The members, by what safekeepers say; one that is not known, before any of them has.
    configuration: Configuration,
    core: Proposer,
    outputs: Vec<ProposerOutput>,
    links: Vec<Link<N::Wire>>,
    pub(super) network: N,
    /// What time it is, by the call that is being made.
    now: Instant,
    random: StdRng,
    backlog: Backlog,
    election: Option<Election>,
    fenced: Option<Term>,
    yields_above: Option<Term>,
    /// Number of the configuration with which no election could continue the log that was led.
    replaced_by: Option<u64>,
    /// What the log was that was led by the term before, while members were changed and a term has to be won with the new ones.
    led: Option<TermHistory>,
    /// The first term in which the source's log was led; all later ones in its history are ours.
    own_since: Term,
    /// Where the log begins that the source writes.
    own_start_lsn: Lsn,
    /// The last record boundary of the log.
    record_end: Lsn,
    /// Since when nobody is elected, or no quorum is there.
    stalled_since: Option<Instant>,
    /// Whether others than the members are asked who these are, and when that was looked at last.
    consults: bool,
    consulted_at: Instant,
    /// Since when a majority knows nothing of the timeline.
    nothing_since: Option<Instant>,
    /// Whom to ask next to found the timeline.
    founder_turn: usize,
    commit_lsn: Lsn,
    commit_changed_at: Instant,
    /// When the log grew after everything in it was committed.
    appended_at: Instant,
    busy: bool,
}

/// A new compute leaves out one of `1 << SKIPPED_BITS` numbers of terms at random: two copies of a quorum choose the same
/// once in so many times, and a member that was away for some hundred elections still takes the next term in one step
/// (`MAX_TERM_STEP` of the acceptor).
const SKIPPED_BITS: u32 = 24;
/// The lowest of them: more than there are campaigns in the life of a compute that tries again.
const LEAST_SKIPPED: u32 = 1 << 20;

/// How many terms a proposer leaves out. One that yields takes the very next, so that a newer compute, of which it may not
/// have heard yet when it asks, outranks it however often it asked before.
fn skipped_terms(yields: bool, random: u32) -> u32 {
    match yields {
        true => 0,
        false => LEAST_SKIPPED + (random >> (u32::BITS - SKIPPED_BITS)),
    }
}

impl<N: Network> Driver<N> {
    /// One that `yields_above` a term, the highest that its compute ever asked for, yields to whoever was promised a higher
    /// one meanwhile.
    pub fn new(
        config: ProposerConfig,
        yields_above: Option<Term>,
        network: N,
        now: Instant,
    ) -> Result<Driver<N>, ProposerError> {
        let greeting = Greeting {
            parameters: config.parameters.clone(),
            known: 0,
            addresses: Vec::new(),
            proposer: config.id,
        };
        let link = |node: &NodeId| Link::new(*node, Arc::clone(&config.safekeepers), now);
        let links = config.safekeepers_to_ask.iter().map(link).collect();
        let configuration = Configuration::unknown(&config.safekeepers_to_ask)
            .map_err(|error| ProposerError::Source(io::Error::other(error)))?;
        let mut random = StdRng::seed_from_u64(config.seed);
        let skipped = skipped_terms(yields_above.is_some(), random.next_u32());
        let core = Proposer::new(config.id, configuration.clone(), Term(1)).skipping(skipped);
        Ok(Driver {
            configuration,
            core,
            greeting,
            outputs: Vec::new(),
            links,
            network,
            now,
            random,
            backlog: Backlog::new(config.parameters.start_lsn, config.limits.backlog),
            config,
            election: None,
            fenced: None,
            yields_above,
            replaced_by: None,
            led: None,
            own_since: Term(0),
            own_start_lsn: Lsn::INVALID,
            record_end: Lsn::INVALID,
            stalled_since: Some(now),
            consults: false,
            consulted_at: now,
            nothing_since: None,
            founder_turn: 0,
            commit_lsn: Lsn::INVALID,
            commit_changed_at: now,
            appended_at: now,
            busy: false,
        })
    }

    /// A core for a term of at least `lowest`.
    fn proposer(&mut self, yields: bool, lowest: Term) -> Proposer {
        let skipped = skipped_terms(yields, self.random.next_u32());
        Proposer::new(self.config.id, self.configuration.clone(), lowest).skipping(skipped)
    }

    /// The core that campaigns or leads now.
    pub fn core(&self) -> &Proposer {
        &self.core
    }

    /// What was won, if anything yet.
    pub fn election(&self) -> Option<&Election> {
        self.election.as_ref()
    }

    /// The term that outranked this one, if any.
    pub fn fenced(&self) -> Option<Term> {
        self.fenced
    }

    /// What is committed, as far as known.
    pub fn commit_lsn(&self) -> Lsn {
        self.commit_lsn
    }

    /// End of the log.
    pub fn end_lsn(&self) -> Lsn {
        self.backlog.end()
    }

    /// Members that have the elected log up to `lsn`, and their addresses.
    pub fn holders(&self, lsn: Lsn) -> Vec<(NodeId, String)> {
        let donor = self.election.as_ref().filter(|election| lsn <= election.start_lsn);
        let donor = donor.map(|election| election.donor);
        let has = |member| Some(member) == donor || self.core.flush_lsn_of(member) >= Some(lsn);
        let links = self.links.iter().filter(|link| link.member.is_some_and(has));
        links.filter_map(|link| Some((link.node, link.address.clone()?))).collect()
    }

    /// Why nothing can be committed now, if so: too few members are there, or what was sent has waited for long.
    pub fn problem(&self) -> Option<String> {
        if !self.is_quorum_there() {
            return Some(format!("no quorum of safekeepers is connected: {}", self.describe()));
        }
        let waiting = self.now.saturating_duration_since(self.waiting_since()?);
        let seconds = waiting.as_secs();
        (seconds >= STALLED_AFTER)
            .then(|| format!("no commit was possible for {seconds} s: {}", self.describe()))
    }

    fn is_quorum_there(&self) -> bool {
        let is_there =
            |member| self.links.iter().any(|link| link.member == Some(member) && link.is_greeted());
        self.configuration.is_quorum(is_there)
    }

    /// Since when a commit waits, if one does: within a record there is nothing to be committed yet.
    fn waiting_since(&self) -> Option<Instant> {
        let waits = self.record_end > self.commit_lsn;
        waits.then(|| self.commit_changed_at.max(self.appended_at))
    }

    /// What is wrong with each member, for messages.
    pub fn describe(&self) -> String {
        let text = |link: &Link<N::Wire>| {
            let state = match (&link.last_error, &link.connection) {
                (Some(error), _) => error.clone(),
                (None, Some(_)) => "connected".to_owned(),
                (None, None) => "not connected".to_owned(),
            };
            let at = link.address.iter().map(|address| format!(" at {address}"));
            format!("safekeeper {}{}: {state}", link.node, at.collect::<String>())
        };
        let asked = self.links.iter().filter(|link| link.is_asked_at_all());
        asked.map(text).collect::<Vec<_>>().join("; ")
    }

    /// Those with whom something is wrong.
    pub fn troubled(&self) -> Vec<NodeId> {
        let is_troubled = |link: &&Link<N::Wire>| {
            link.is_asked_at_all() && (link.last_error.is_some() || link.connection.is_none())
        };
        self.links.iter().filter(is_troubled).map(|link| link.node).collect()
    }

    /// The members, as far as it is known who they are.
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// Whether the term that was won still stands.
    pub fn check(&self) -> Result<(), ProposerError> {
        match (self.fenced, self.replaced_by) {
            (Some(term), _) => Err(ProposerError::Fenced(term)),
            (None, Some(number)) => Err(ProposerError::MembersChanged(number)),
            (None, None) => Ok(()),
        }
    }

    /// Campaigns again, above `term`, on the same connections.
    pub fn campaign_above(&mut self, term: Term) {
        let next = Term(term.0.saturating_add(1));
        let yields = self.yields_above.is_some();
        self.core = self.proposer(yields, next);
        self.fenced = None;
        // Nothing of an election that was won meanwhile is of use.
        self.election = None;
        self.backlog = Backlog::new(self.config.parameters.start_lsn, self.config.limits.backlog);
        self.commit_lsn = Lsn::INVALID;
        for link in &mut self.links {
            link.next_lsn = None;
            link.told_commit_lsn = Lsn::INVALID;
        }
        for link in &self.links {
            let member = link.member.filter(|_| link.connection.is_some() && link.is_greeted());
            if let Some(member) = member {
                self.core.connected(member, term, &mut self.outputs);
            }
        }
    }

    /// True if more may be appended now. Commits come at record boundaries only: within a record whose start is
    /// committed there is nothing to wait for.
    pub fn has_room(&self) -> bool {
        let is_within_record = self.record_end <= self.commit_lsn;
        self.backlog.end().saturating_sub(self.commit_lsn) < self.config.limits.uncommitted
            || is_within_record
    }

    /// Most WAL that is sent in one piece, in bytes.
    pub fn most_in_a_chunk(&self) -> usize {
        self.config.limits.chunk
    }

    /// Extends the log, if it is still led; sent by the next turn.
    pub fn append(&mut self, now: Instant, chunk: WalChunk) -> Result<(), ProposerError> {
        self.now = now;
        // What another one won a term with is no log for this to go to, whatever its end is.
        self.check()?;
        let end = chunk.start.checked_add(chunk.bytes.len() as u64);
        let fits = chunk.start == self.backlog.end() && !chunk.bytes.is_empty();
        let Some(_) = end.filter(|&end| fits && chunk.record_end <= end) else {
            let text = format!(
                "WAL at {} with a record end at {} does not continue the log, which ends at {}",
                chunk.start,
                chunk.record_end,
                self.backlog.end()
            );
            return Err(ProposerError::Source(io::Error::other(text)));
        };
        if self.record_end <= self.commit_lsn {
            self.appended_at = now;
        }
        self.record_end = self.record_end.max(chunk.record_end);
        self.core.appended(chunk.record_end);
        let term = self.core.term();
        let mut chunk = chunk;
        // The wire bounds one append; a larger piece is cut, its record end known with the last.
        let most = self.config.limits.chunk;
        while chunk.bytes.len() > most {
            let bytes = chunk.bytes.split_to(most);
            let start = chunk.start;
            chunk.start = start + most as u64;
            let record_end = self.backlog.boundary_before(start).unwrap_or_default();
            let piece = WalChunk { start, bytes, record_end };
            self.backlog.push(Piece::new(term, piece, self.commit_lsn));
        }
        self.backlog.push(Piece::new(term, chunk, self.commit_lsn));
        Ok(())
    }

    /// The first half of a turn: sends what there is to send. Returns how long to wait for something to happen, `wait` at most,
    /// before the [other half](Driver::end_turn).
    pub fn begin_turn(
        &mut self,
        now: Instant,
        mut source: Option<&mut (dyn WalSource + '_)>,
        wait: Duration,
    ) -> Duration {
        self.now = now;
        self.consult_if_due(now);
        for (token, link) in self.links.iter_mut().enumerate() {
            if !link.is_asked_at_all() && link.connection.is_some() {
                link.fail(now, &"it is no member of this branch any more");
            }
            link.connect_if_due(now, token as u64, &mut self.network);
        }
        self.found_if_due();
        self.act();
        self.tell_commit(now);
        self.busy = false;
        for index in 0..self.links.len() {
            let sent = self.send(index, &mut source);
            let ping_after = if self.links[index].pulls { PULL_PING } else { PING_AFTER };
            let link = &mut self.links[index];
            let sent = sent.and_then(|()| link.keep_alive(now, ping_after, &self.greeting));
            let link = &mut self.links[index];
            if let Err(error) = sent.and_then(|()| link.flush(now, index as u64, &mut self.network))
            {
                let why = self.why(index, error);
                self.links[index].fail(now, &why);
            }
        }
        self.drop_what_all_have();
        self.waiting_time(now, wait)
    }

    /// The other half: looks at what has happened.
    pub fn end_turn(&mut self, now: Instant, ready: &[Ready]) {
        self.now = now;
        for event in ready {
            let index = event.token as usize;
            if let Err(error) = self.handle_link(index, *event) {
                self.links[index].fail(now, &error);
            }
        }
        self.act();
    }

    fn waiting_time(&self, now: Instant, wait: Duration) -> Duration {
        if self.busy {
            return Duration::ZERO;
        }
        let mut wait = wait.min(MAX_WAIT);
        // Who still has something to take is told after that, and room for it ends the wait.
        let is_to_be_told = |link: &Link<N::Wire>| {
            let takes_all = link.connection.as_ref().is_some_and(|one| one.queued() == 0);
            takes_all && self.is_behind_on_commit(link)
        };
        if self.links.iter().any(is_to_be_told) {
            wait = wait.min(COMMIT_DELAY);
        }
        if self.links.iter().any(|link| link.pulls && link.connection.is_some()) {
            wait = wait.min(PULL_PING);
        }
        // The end of an attempt wakes whoever waits.
        let links = self.links.iter().enumerate();
        let idle = links.filter(|(token, _)| !self.network.is_dialing(*token as u64));
        let retry = idle
            .filter_map(|(_, link)| link.retry_at())
            .min()
            .map(|at| at.saturating_duration_since(now));
        retry.map_or(wait, |retry| wait.min(retry))
    }

    /// Whether every connected member was told the commit LSN.
    pub fn everyone_told(&self) -> bool {
        !self.links.iter().any(|link| self.is_behind_on_commit(link))
    }

    fn is_behind_on_commit(&self, link: &Link<N::Wire>) -> bool {
        link.next_lsn.is_some() && link.told_commit_lsn < self.commit_lsn
    }

    /// Tells members a commit LSN that found no append to travel with.
    fn tell_commit(&mut self, now: Instant) {
        if now.saturating_duration_since(self.commit_changed_at) < COMMIT_DELAY {
            return;
        }
        let (term, commit_lsn) = (self.core.term(), self.commit_lsn);
        for link in &mut self.links {
            let (Some(next), Some(connection)) = (link.next_lsn, &mut link.connection) else {
                continue;
            };
            if link.told_commit_lsn < commit_lsn && connection.queued() == 0 {
                let record_end = Lsn::INVALID;
                let append = Append { term, start: next, length: 0, record_end, commit_lsn };
                connection.push(&Message::Append(append, &[]));
                link.told_commit_lsn = commit_lsn;
            }
        }
    }

    /// Queues more of the log for one member.
    fn send(
        &mut self,
        index: usize,
        source: &mut Option<&mut (dyn WalSource + '_)>,
    ) -> io::Result<()> {
        let link = &mut self.links[index];
        let Some(connection) = &mut link.connection else { return Ok(()) };
        // A term was won then, but not with what is here.
        if self.replaced_by.is_some() {
            return Ok(());
        }
        while let Some(next) = link.next_lsn {
            if next >= self.backlog.end() || connection.queued() >= self.config.limits.queued {
                return Ok(());
            }
            let Some(piece) = self.backlog.piece_at(next) else { break };
            // One that was made before says what was committed then.
            let told = if piece.start == next {
                connection.push_piece(piece);
                piece.commit_lsn
            } else {
                let skip = (next - piece.start) as usize;
                let bytes = piece.payload.slice(skip..);
                let rest = WalChunk { start: next, bytes, record_end: piece.record_end };
                connection.push_piece(&Piece::new(self.core.term(), rest, self.commit_lsn));
                self.commit_lsn
            };
            link.told_commit_lsn = link.told_commit_lsn.max(told);
            link.next_lsn = Some(piece.end());
        }
        self.catch_up(index, source)
    }

    /// Queues one piece of WAL that is no longer in memory, if the source still has it. Else the member pulls it from others.
    fn catch_up(
        &mut self,
        index: usize,
        source: &mut Option<&mut (dyn WalSource + '_)>,
    ) -> io::Result<()> {
        let link = &mut self.links[index];
        let (Some(next), Some(connection)) = (link.next_lsn, &mut link.connection) else {
            return Ok(());
        };
        if link.pulls || connection.queued() >= self.config.limits.old_queued {
            return Ok(());
        }
        // What earlier terms wrote is not the source's to give: its file may have zeros there.
        if next < self.own_start_lsn {
            link.pulls = true;
            return Ok(());
        }
        let to = self.backlog.base().min(next + self.config.limits.chunk as u64);
        let bytes = match source {
            Some(source) => source.read_range(next, to).unwrap_or_default(),
            None => bytes::Bytes::new(),
        };
        if bytes.is_empty() || bytes.len() as u64 > to - next {
            link.pulls = true;
            return Ok(());
        }
        self.busy = true;
        self.push_old(index, next, bytes);
        Ok(())
    }

    fn push_old(&mut self, index: usize, start: Lsn, bytes: bytes::Bytes) {
        let end = start + bytes.len() as u64;
        let record_end = self.backlog.boundary_before(end).unwrap_or_default();
        let chunk = WalChunk { start, bytes, record_end };
        let piece = Piece::new(self.core.term(), chunk, self.commit_lsn);
        let link = &mut self.links[index];
        if let Some(connection) = &mut link.connection {
            connection.push_piece(&piece);
            link.told_commit_lsn = link.told_commit_lsn.max(self.commit_lsn);
            link.next_lsn = Some(end);
        }
    }

    fn drop_what_all_have(&mut self) {
        if let Some(lowest) = self.core.lowest_flush_lsn() {
            self.backlog.trim(lowest);
        } else {
            self.backlog.trim(Lsn::INVALID);
        }
    }

    /// What a member has got from others it need not be sent.
    fn note_pulled(&mut self, index: usize, ack: Ack) {
        let end = self.backlog.end();
        let link = &mut self.links[index];
        let has_more = link.next_lsn.is_some_and(|next| next < ack.flush_lsn);
        if has_more && ack.term == self.core.term() && ack.flush_lsn <= end {
            link.next_lsn = Some(ack.flush_lsn);
            link.pulls = false;
        }
    }

    fn handle_link(&mut self, index: usize, event: Ready) -> io::Result<()> {
        if event.writable
            && let Err(error) = self.write_to(index)
        {
            return Err(self.why(index, error));
        }
        if event.readable { self.read_from(index) } else { Ok(()) }
    }

    /// Why writing fails: the other side may have said so before it closed the connection.
    fn why(&mut self, index: usize, error: io::Error) -> io::Error {
        self.read_from(index).err().unwrap_or(error)
    }

    fn write_to(&mut self, index: usize) -> io::Result<()> {
        if self.links[index].is_to_be_greeted() {
            // By these it finds the others while there is no compute: also those that we have not met yet.
            self.greeting.addresses = self.places();
        }
        self.links[index].writable(&self.greeting, self.now)?;
        let link = &mut self.links[index];
        if let Some(connection) = &link.connection {
            let (wire, blocked) = (&connection.wire, connection.blocked);
            self.network.tell_of_room(index as u64, wire, blocked)?;
        }
        Ok(())
    }

    fn read_from(&mut self, index: usize) -> io::Result<()> {
        loop {
            let link = &mut self.links[index];
            let Some(connection) = &mut link.connection else { return Ok(()) };
            if !connection.receive(&mut link.input, self.now)? {
                return Ok(());
            }
            self.take_answers(index)?;
            let connection = &self.links[index].connection;
            // Else the poller says so: an attempt for each answer costs as much as the answer.
            if !connection.as_ref().is_some_and(Connection::holds_more) {
                return Ok(());
            }
        }
    }

    fn take_answers(&mut self, index: usize) -> io::Result<()> {
        let invalid = |error: &dyn std::fmt::Display| {
            io::Error::new(io::ErrorKind::InvalidData, error.to_string())
        };
        loop {
            let link = &mut self.links[index];
            let frame = link.input.next().map_err(|error| invalid(&error))?;
            let Some(frame) = frame else { return Ok(()) };
            let size = frame.size;
            let message = decode(frame.kind, frame.body).map_err(|error| invalid(&error))?;
            let node = link.node;
            // Who was not greeted, or has to be greeted anew, is no member.
            let member = link.member.filter(|_| link.is_greeted());
            match (message, member) {
                (Message::GreetingReply(reply), _) if reply.node == node => {
                    self.take_greeting(index, reply)?;
                }
                (Message::GreetingReply(reply), _) => {
                    let text = format!("this is safekeeper {}, not {node}", reply.node);
                    return Err(invalid(&text));
                }
                (Message::Vote(vote), Some(member)) => {
                    self.core.vote(member, vote, &mut self.outputs);
                }
                (Message::Ack(ack), Some(member)) => {
                    self.core.ack(member, ack, &mut self.outputs);
                    self.note_pulled(index, ack);
                }
                // To what was asked before it was greeted anew.
                (Message::Vote(_) | Message::Ack(_), None) => {}
                (Message::Configuration(decided, places), _) => {
                    self.told_of(decided, index, false);
                    self.note_places(places);
                }
                (Message::Refused(reason), _) => {
                    if let RefusedReason::Quorum(Refusal::Fenced { promised }) = reason {
                        self.core.outranked(promised, &mut self.outputs);
                    }
                    // Before it greets: its copy of the branch is damaged, or another branch's; or it is of another time.
                    let lasting = matches!(
                        reason,
                        RefusedReason::Storage(_)
                            | RefusedReason::Forbidden(_)
                            | RefusedReason::Mismatch(_)
                            | RefusedReason::Version(_)
                            | RefusedReason::Quorum(Refusal::OtherMembers { .. })
                    );
                    let link = &mut self.links[index];
                    link.refuses = lasting && link.is_asked();
                    return Err(io::Error::other(reason.to_string()));
                }
                (other, _) => {
                    return Err(invalid(&format!("message kind {} is no answer", other.kind())));
                }
            }
            self.links[index].input.consume(size);
        }
    }

    /// Performs what the core wants.
    fn act(&mut self) {
        let mut outputs = std::mem::take(&mut self.outputs);
        for output in outputs.drain(..) {
            match output {
                ProposerOutput::RequestVote(member, request) => {
                    // Before it is known whether it is won: who is elected later must not take it for another's.
                    if self.yields_above.is_some() {
                        self.config.asked_term.fetch_max(request.term.0, Ordering::AcqRel);
                    }
                    self.push(member, &Message::VoteRequest(request));
                }
                ProposerOutput::AnnounceElected(member, elected) => {
                    self.push(member, &Message::Elected(elected));
                }
                ProposerOutput::StreamFrom(member, lsn) => {
                    if let Some(link) = self.link_to(member) {
                        link.next_lsn = Some(lsn);
                    }
                }
                ProposerOutput::Elected(election) if self.led.is_some() => {
                    self.config.asked_term.fetch_max(election.term.0, Ordering::AcqRel);
                    let led = self.led.take().unwrap_or_default();
                    self.go_on(&led, election);
                }
                ProposerOutput::Elected(election) => {
                    self.config.asked_term.fetch_max(election.term.0, Ordering::AcqRel);
                    self.own_since = election.term;
                    self.own_start_lsn = election.start_lsn;
                    self.record_end = election.start_lsn;
                    self.backlog = Backlog::new(election.start_lsn, self.config.limits.backlog);
                    self.commit_lsn = election.commit_lsn;
                    self.election = Some(election);
                }
                ProposerOutput::Committed(lsn) => {
                    // What a term begins with may be less than what the one before it was known to have committed.
                    self.commit_lsn = self.commit_lsn.max(lsn);
                    self.commit_changed_at = self.now;
                }
                ProposerOutput::Fenced(term) => self.fenced = Some(term),
            }
        }
        self.outputs = outputs;
    }

    /// The connection to a member, if it was greeted: a node in another life of its directory is another one.
    fn link_to(&mut self, member: Member) -> Option<&mut Link<N::Wire>> {
        self.links.iter_mut().find(|link| link.member == Some(member) && link.is_greeted())
    }

    fn push(&mut self, member: Member, message: &Message<'_>) {
        let link = self.link_to(member);
        if let Some(connection) = link.and_then(|link| link.connection.as_mut()) {
            connection.push(message);
            self.busy = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use bytes::Bytes;
    use pgstrata_ids::Incarnation;
    use pgstrata_wire::frame::Stamp;
    use pgstrata_wire::safekeeper::{GreetingReply, WAL, encode};

    use super::membership::tests::{START, config, elect, members, places};
    use super::*;
    use crate::proposer::network::Wire;

    /// One that takes everything, or has been closed by now; and what had come before that.
    #[derive(Debug, Default)]
    struct Sink {
        is_closed: bool,
        said: Vec<u8>,
    }

    impl Read for Sink {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.said.len().min(buffer.len());
            buffer[..count].copy_from_slice(&self.said[..count]);
            self.said.drain(..count);
            match (count, self.is_closed) {
                (0, true) => Err(io::ErrorKind::ConnectionReset.into()),
                (0, false) => Err(io::ErrorKind::WouldBlock.into()),
                _ => Ok(count),
            }
        }
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.is_closed {
                true => Err(io::ErrorKind::BrokenPipe.into()),
                false => Ok(bytes.len()),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Wire for Sink {
        fn holds_more(&self) -> bool {
            false
        }
    }

    #[derive(Debug)]
    struct Sinks;

    impl Network for Sinks {
        type Wire = Sink;

        fn dial(&mut self, _: u64, _: NodeId, _: &str) -> Option<io::Result<Sink>> {
            Some(Ok(Sink::default()))
        }

        fn is_dialing(&self, _: u64) -> bool {
            false
        }

        fn tell_of_room(&mut self, _: u64, _: &Sink, _: bool) -> io::Result<()> {
            Ok(())
        }
    }

    /// What can't be written any more is no reason: that had come before.
    #[test]
    fn why_a_safekeeper_closed_the_connection_is_told() {
        let (now, full) = (Instant::now(), "no space left");
        for is_told_by_the_poller in [true, false] {
            let mut driver = Driver::new(config(Arc::new(places())), None, Sinks, now).unwrap();
            driver.begin_turn(now, None, Duration::ZERO);
            let ready = Ready { token: 0, readable: true, writable: true };
            driver.end_turn(now, &[ready]);
            let connection = driver.links[0].connection.as_mut().unwrap();
            connection.push(&Message::Ping);
            connection.wire.is_closed = true;
            let refusal = Message::Refused(RefusedReason::Storage(full.to_owned()));
            let stamp = Stamp::In(WAL.speaks.highest());
            encode(&refusal, stamp, &mut connection.wire.said);
            match is_told_by_the_poller {
                true => driver.end_turn(now, &[ready]),
                false => drop(driver.begin_turn(now, None, Duration::ZERO)),
            }
            let why = driver.links[0].last_error.clone().unwrap();
            assert!(why.contains(full), "{why}");
        }
    }

    /// A piece of before does not tell what was committed since: it would be told with the next one only, whenever that comes.
    #[test]
    fn who_is_sent_what_was_written_before_is_told_what_is_committed_by_now() {
        let now = Instant::now();
        let mut driver = Driver::new(config(Arc::new(places())), None, Sinks, now).unwrap();
        driver.begin_turn(now, None, Duration::ZERO);
        for index in 0..3 {
            let reply = GreetingReply {
                node: driver.links[index].node,
                incarnation: Incarnation([5; 16]),
                configuration: Some(members(1, &[1, 2, 3])),
                addresses: Vec::new(),
                term: Term(0),
                flush_lsn: START,
                commit_lsn: START,
            };
            driver.take_greeting(index, reply).unwrap();
        }
        elect(&mut driver, &TermHistory::default(), START, START);
        let end = START + 64;
        let bytes = Bytes::from(vec![7; 64]);
        driver.append(now, WalChunk { start: START, bytes, record_end: end }).unwrap();
        for link in &mut driver.links[..2] {
            link.next_lsn = Some(START);
        }
        driver.begin_turn(now, None, Duration::ZERO);
        (driver.commit_lsn, driver.commit_changed_at) = (end, now);
        // The third comes late.
        driver.links[2].next_lsn = Some(START);
        driver.begin_turn(now, None, Duration::ZERO);
        assert_eq!(driver.links[2].next_lsn, Some(end));
        assert!(driver.links.iter().all(|link| link.told_commit_lsn < end), "nobody was told");
        assert_eq!(driver.begin_turn(now, None, MAX_WAIT), COMMIT_DELAY);
        driver.begin_turn(now + COMMIT_DELAY, None, Duration::ZERO);
        assert!(driver.everyone_told());
    }

    #[test]
    fn h6_who_tries_again_asks_for_less_than_a_newcomer() {
        let newcomer = |random| skipped_terms(false, random);
        for random in [0, 1, 1 << 31, u32::MAX] {
            // Both heard of the same term; the one that tries again has asked for a thousand in vain.
            assert!(1000 + skipped_terms(true, random) < newcomer(random));
        }
        // Two copies choose from many, each as often as any other.
        let step = 1 << (u32::BITS - SKIPPED_BITS);
        for number in [0, 1, 1 << 20, (1 << SKIPPED_BITS) - 1] {
            assert_eq!(newcomer(number * step), LEAST_SKIPPED + number);
        }
    }
}
