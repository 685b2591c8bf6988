//! One safekeeper's part of one timeline: promises, the log's end, and what is committed.
//!
//! # The driver's duties
//! * Perform outputs in order, each completely before the next; stop for good if one fails.
//! * `Persist`: durable when it returns, atomically. `Truncate`: likewise.
//! * After a crash give [`Acceptor::restore`] the last persisted [`ControlState`] and the end of
//!   the last valid record that is durable, at most what was written.

use pgstrata_ids::{Lsn, Member, NodeId, Term};

#[cfg(any(test, feature = "explorer"))]
use crate::Fault;
use crate::{
    Ack, Append, Configuration, Elected, PeerRange, ProposerId, Refusal, TermHistory, TermStart,
    Vote, VoteRequest,
};

/// How far one message raises the promised term at most: no cluster holds so many elections, and
/// it takes two thousand million messages to use up all terms.
const MAX_TERM_STEP: u64 = 1 << 32;

/// What an acceptor must not forget.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ControlState {
    /// First byte of the timeline.
    pub start_lsn: Lsn,
    /// The members.
    pub configuration: Configuration,
    /// The term that was promised when the configuration was taken. Whoever won a later one with this acceptor's vote
    /// counted by this configuration.
    pub configured_in: Term,
    /// The highest term promised.
    pub term: Term,
    /// Who got the vote in `term`; `None` if the promise came without a vote.
    pub voted_for: Option<ProposerId>,
    /// Which term wrote which byte.
    pub history: TermHistory,
    /// Something known to be committed and durable here; may lag.
    pub commit_lsn: Lsn,
}

impl ControlState {
    /// A timeline of which nothing is known but its beginning.
    pub fn empty(start_lsn: Lsn, configuration: Configuration) -> ControlState {
        ControlState {
            start_lsn,
            configuration,
            configured_in: Term(0),
            term: Term(0),
            voted_for: None,
            history: TermHistory::default(),
            commit_lsn: start_lsn,
        }
    }
}

/// One step for the driver.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum AcceptorOutput {
    /// Replace the control state.
    Persist(ControlState),
    /// Remove all bytes at and after this position, so that no crash brings them back.
    Truncate(Lsn),
    /// Write the message's bytes from offset `skip` on to position `at`. Need not be durable.
    Write {
        /// Where the first byte goes: the end of what was written before.
        at: Lsn,
        /// How many of the message's bytes are here already.
        skip: u64,
    },
    /// Make everything written durable.
    Sync,
    /// Answer a vote request.
    Vote(Vote),
    /// Answer the current proposer.
    Ack(Ack),
    /// Answer that nothing was done; the connection is of no further use.
    Refuse(Refusal),
    /// Readers may have everything up to here.
    Committed(Lsn),
}

/// A control state and log that don't belong together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the durable log ends at {flush_lsn}, before {needed}, which the control file says was \
     durable: WAL files of this timeline are missing or damaged"
)]
pub struct InvalidState {
    /// Where the log ends.
    pub flush_lsn: Lsn,
    /// Where it should reach at least.
    pub needed: Lsn,
}

/// The acceptor's state; see the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Acceptor {
    member: Member,
    control: ControlState,
    write_lsn: Lsn,
    boundary_lsn: Lsn,
    flush_lsn: Lsn,
    commit_lsn: Lsn,
    proposer_commit_lsn: Lsn,
    #[cfg(any(test, feature = "explorer"))]
    fault: Option<Fault>,
}

type Outputs = Vec<AcceptorOutput>;

impl Acceptor {
    /// Goes on from durable state: `flush_lsn` is the end of the last valid durable record.
    pub fn restore(
        member: Member,
        control: ControlState,
        flush_lsn: Lsn,
    ) -> Result<Acceptor, InvalidState> {
        let needed = control.commit_lsn.max(control.start_lsn);
        if flush_lsn < needed {
            return Err(InvalidState { flush_lsn, needed });
        }
        Ok(Acceptor {
            member,
            write_lsn: flush_lsn,
            boundary_lsn: flush_lsn,
            flush_lsn,
            commit_lsn: control.commit_lsn,
            proposer_commit_lsn: Lsn::INVALID,
            control,
            #[cfg(any(test, feature = "explorer"))]
            fault: None,
        })
    }

    /// Makes one mistake from now on.
    #[cfg(any(test, feature = "explorer"))]
    pub fn with_fault(self, fault: Option<Fault>) -> Acceptor {
        Acceptor { fault, ..self }
    }

    /// Everything but the node's name, as a hash.
    #[cfg(any(test, feature = "explorer"))]
    pub(crate) fn hash_nameless(&self, hasher: &mut impl std::hash::Hasher) {
        use std::hash::Hash;
        self.control.hash(hasher);
        (self.write_lsn, self.boundary_lsn, self.flush_lsn).hash(hasher);
        (self.commit_lsn, self.proposer_commit_lsn).hash(hasher);
    }

    #[cfg(any(test, feature = "explorer"))]
    fn faulty(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    /// The control state as it should be persisted now.
    pub fn control(&self) -> ControlState {
        ControlState { commit_lsn: self.commit_lsn, ..self.control.clone() }
    }

    /// The members.
    pub fn configuration(&self) -> &Configuration {
        &self.control.configuration
    }

    /// The term that was promised when they were taken.
    pub fn configured_in(&self) -> Term {
        self.control.configured_in
    }

    /// The highest term promised.
    pub fn term(&self) -> Term {
        self.control.term
    }

    /// The term that was promised last, and where it begins, if it is known who won it.
    pub fn followed(&self) -> Option<TermStart> {
        self.control.history.last().filter(|last| last.term == self.control.term)
    }

    /// Which term wrote which byte.
    pub fn history(&self) -> &TermHistory {
        &self.control.history
    }

    /// End of what is written, durable or not.
    pub fn write_lsn(&self) -> Lsn {
        self.write_lsn
    }

    /// The last record boundary of what is written.
    pub fn boundary_lsn(&self) -> Lsn {
        self.boundary_lsn
    }

    /// How many of an append's bytes are here already, if others are new and would be taken now:
    /// for a driver that looks at bytes before the acceptor counts on them.
    pub fn takes(&self, append: &Append) -> Option<u64> {
        let end = append.start.checked_add(append.length)?;
        let adopted = self.control.history.last().is_some_and(|last| last.term == append.term);
        let taken = adopted
            && append.term >= self.control.term
            && append.start <= self.write_lsn
            && end > self.write_lsn;
        taken.then(|| self.write_lsn - append.start)
    }

    /// End of the durable log.
    pub fn flush_lsn(&self) -> Lsn {
        self.flush_lsn
    }

    /// What is known to be committed; at most `flush_lsn`.
    pub fn commit_lsn(&self) -> Lsn {
        self.commit_lsn
    }

    /// Who this is.
    pub fn member(&self) -> Member {
        self.member
    }

    /// Takes a configuration that was decided: it is the newest of the timeline's one chain. The word of whoever counts votes
    /// is not enough, as two of them could each have one of their own.
    pub fn configure(&mut self, decided: &Configuration, outputs: &mut Outputs) {
        let own = &self.control.configuration;
        match decided.number().cmp(&own.number()) {
            std::cmp::Ordering::Less => {}
            std::cmp::Ordering::Equal if decided.has_the_members_of(own) => {}
            std::cmp::Ordering::Equal => {
                let number = own.number();
                outputs.push(AcceptorOutput::Refuse(Refusal::OtherMembers { number }));
            }
            std::cmp::Ordering::Greater => {
                self.control.configuration = decided.clone();
                self.control.configured_in = self.control.term;
                outputs.push(AcceptorOutput::Persist(self.control()));
            }
        }
        self.check();
    }

    /// Answers a vote request.
    pub fn vote(&mut self, request: &VoteRequest, outputs: &mut Outputs) {
        let is_member = request.configuration.contains(self.member);
        let counts = self.check_configuration(&request.configuration);
        match counts.and(if is_member { Ok(()) } else { Err(Refusal::NotMember) }) {
            Ok(()) => self.vote_in(request.term, request.proposer, outputs),
            Err(refusal) => outputs.push(AcceptorOutput::Refuse(refusal)),
        }
    }

    /// Answers a vote request of before members had incarnations, by whoever counts votes of these nodes: as long as it is not
    /// decided which lives of their directories are meant. That is the first configuration then, which has the same quorums.
    pub fn vote_by_nodes(
        &mut self,
        (term, proposer): (Term, ProposerId),
        nodes: &[NodeId],
        outputs: &mut Outputs,
    ) {
        match self.check_nodes(nodes) {
            Ok(()) => self.vote_in(term, proposer, outputs),
            Err(refusal) => outputs.push(AcceptorOutput::Refuse(refusal)),
        }
    }

    /// Whether these are the members, of which is known only that.
    pub fn check_nodes(&self, nodes: &[NodeId]) -> Result<(), Refusal> {
        let own = &self.control.configuration;
        let known = own.nodes();
        if own.is_known() {
            return Err(Refusal::StaleConfiguration { current: own.number() });
        }
        if known.len() != nodes.len() || !known.iter().all(|node| nodes.contains(node)) {
            return Err(Refusal::OtherMembers { number: 1 });
        }
        match nodes.contains(&self.member.node) {
            true => Ok(()),
            false => Err(Refusal::NotMember),
        }
    }

    fn vote_in(&mut self, term: Term, proposer: ProposerId, outputs: &mut Outputs) {
        if self.refuses_step(term, outputs) {
            return;
        }
        let again = term == self.control.term && self.control.voted_for == Some(proposer);
        let granted = again || self.may_vote(term);
        if granted && !again {
            // In this order, so that nothing is destroyed before the promise is written down, which a full disk may prevent.
            self.sync_what_is_whole(outputs);
            self.control.term = term;
            self.control.voted_for = Some(proposer);
            self.persist_vote(outputs);
            self.cut_what_has_begun(outputs);
        }
        outputs.push(AcceptorOutput::Vote(Vote {
            asked: term,
            granted,
            term: self.control.term,
            flush_lsn: self.flush_lsn,
            commit_lsn: self.commit_lsn,
            history: self.voted_history(),
        }));
        self.check();
    }

    fn voted_history(&self) -> TermHistory {
        #[cfg(any(test, feature = "explorer"))]
        if self.faulty(Fault::EmptyTermForgotten) {
            return self.control.history.up_to(self.flush_lsn);
        }
        self.control.history.reached_by(self.flush_lsn)
    }

    /// Whether votes may be counted by these members, as far as numbers tell.
    pub fn check_configuration(&self, other: &Configuration) -> Result<(), Refusal> {
        let own = &self.control.configuration;
        #[cfg(any(test, feature = "explorer"))]
        if (self.faulty(Fault::StaleConfigurationTaken) && other.number() < own.number())
            || (self.faulty(Fault::MessengerBelieved) && other.number() > own.number())
        {
            return Ok(());
        }
        match other.number().cmp(&own.number()) {
            std::cmp::Ordering::Less => Err(Refusal::StaleConfiguration { current: own.number() }),
            std::cmp::Ordering::Equal if !other.has_the_members_of(own) => {
                Err(Refusal::OtherMembers { number: own.number() })
            }
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => {
                let (number, current) = (other.number(), own.number());
                Err(Refusal::Undecided { number, current })
            }
        }
    }

    /// One absurd term must not use up all that are left. It is not simply refused, as others may
    /// have promised it, step by step, and then nobody could win here and there.
    fn refuses_step(&mut self, asked: Term, outputs: &mut Outputs) -> bool {
        let promised = Term(self.control.term.0.saturating_add(MAX_TERM_STEP));
        if asked <= promised {
            return false;
        }
        self.control.term = promised;
        self.control.voted_for = None;
        outputs.push(AcceptorOutput::Persist(self.control()));
        outputs.push(AcceptorOutput::Refuse(Refusal::TermTooFar { asked, promised }));
        true
    }

    fn may_vote(&self, term: Term) -> bool {
        #[cfg(any(test, feature = "explorer"))]
        if self.faulty(Fault::VoteTwice) && term == self.control.term {
            return true;
        }
        term > self.control.term
    }

    fn persist_vote(&self, outputs: &mut Outputs) {
        #[cfg(any(test, feature = "explorer"))]
        if self.faulty(Fault::VoteNotPersisted) {
            return;
        }
        outputs.push(AcceptorOutput::Persist(self.control()));
    }

    /// A vote speaks for the log as it will be after a crash: what is written must be durable
    /// first, or bytes that the winner wasn't told of could come back and count as held.
    fn sync_what_is_whole(&mut self, outputs: &mut Outputs) {
        #[cfg(any(test, feature = "explorer"))]
        if self.faulty(Fault::VoteKeepsUnsynced) {
            return;
        }
        if self.boundary_lsn > self.flush_lsn {
            outputs.push(AcceptorOutput::Sync);
            self.flush_lsn = self.boundary_lsn;
        }
    }

    /// For the same reason what is here of a record that has only begun goes, durably before the vote is given: where nothing is
    /// missing of it but zeros, recovery would find it whole.
    fn cut_what_has_begun(&mut self, outputs: &mut Outputs) {
        #[cfg(any(test, feature = "explorer"))]
        if self.faulty(Fault::VoteKeepsUnsynced) {
            return;
        }
        if self.write_lsn > self.boundary_lsn {
            outputs.push(AcceptorOutput::Truncate(self.boundary_lsn));
            self.write_lsn = self.boundary_lsn;
        }
    }

    /// Follows the winner of a term: drops what its log doesn't have and takes its history.
    pub fn elected(&mut self, elected: &Elected, outputs: &mut Outputs) {
        if let Err(refusal) = self.check_elected(elected) {
            outputs.push(AcceptorOutput::Refuse(refusal));
            return;
        }
        if self.refuses_step(elected.term, outputs) {
            return;
        }
        let divergence = self.divergence(elected);
        if divergence < self.commit_lsn && !self.tolerates_loss() {
            let commit_lsn = self.commit_lsn;
            let refusal = Refusal::CommittedDiffers { divergence, commit_lsn };
            outputs.push(AcceptorOutput::Refuse(refusal));
            return;
        }
        let newer = elected.term > self.control.term;
        if newer {
            self.control.term = elected.term;
            self.control.voted_for = None;
        }
        let changed = self.control.history != elected.history;
        self.replace_history(divergence, newer, changed.then_some(&elected.history), outputs);
        self.proposer_commit_lsn = Lsn::INVALID;
        outputs.push(AcceptorOutput::Ack(self.ack()));
        self.check();
    }

    /// Whether it is a member, or, where it is not decided yet who is, one of the nodes: those who count members are not let in
    /// then.
    fn takes_part(&self) -> bool {
        let own = &self.control.configuration;
        match own.is_known() {
            true => own.contains(self.member),
            false => own.nodes().contains(&self.member.node),
        }
    }

    fn check_elected(&self, elected: &Elected) -> Result<(), Refusal> {
        let promised = self.control.term;
        if elected.term < promised {
            return Err(Refusal::Fenced { promised });
        }
        // What it holds and says is counted for a member, and it is none, or none any more.
        if !self.takes_part() {
            return Err(Refusal::NotMember);
        }
        let entries = elected.history.entries();
        if entries.last().map(|last| last.term) != Some(elected.term) {
            return Err(Refusal::Malformed("the history doesn't end with the sender's term"));
        }
        if entries[0].lsn != self.control.start_lsn {
            return Err(Refusal::Malformed("the history doesn't begin where the timeline does"));
        }
        Ok(())
    }

    fn divergence(&self, elected: &Elected) -> Lsn {
        #[cfg(any(test, feature = "explorer"))]
        if self.faulty(Fault::WrongDivergence) {
            let start = elected.history.last().map_or(Lsn::INVALID, |last| last.lsn);
            return start.min(self.flush_lsn);
        }
        #[cfg(any(test, feature = "explorer"))]
        if self.faulty(Fault::TruncateBelowCommit) {
            let last = self.control.history.last().map_or(Lsn::INVALID, |last| last.lsn);
            return last.min(self.flush_lsn);
        }
        let ours = &self.control.history;
        // Where no entry is shared, entries were merged, or nothing is: what is committed here every winner has.
        let base = self.commit_lsn;
        ours.divergence(self.flush_lsn, &elected.history, Lsn::MAX, base)
    }

    #[cfg(any(test, feature = "explorer"))]
    fn tolerates_loss(&self) -> bool {
        self.faulty(Fault::TruncateBelowCommit)
    }

    #[cfg(not(any(test, feature = "explorer")))]
    fn tolerates_loss(&self) -> bool {
        false
    }

    /// Old bytes must be gone, durably, before a history says that they are of another term; and
    /// before they go, the promise that makes them worthless must be durable.
    fn replace_history(
        &mut self,
        divergence: Lsn,
        promised: bool,
        history: Option<&TermHistory>,
        outputs: &mut Outputs,
    ) {
        let truncates = self.write_lsn > divergence;
        #[cfg(any(test, feature = "explorer"))]
        if self.faulty(Fault::HistoryBeforeTruncate) {
            if let Some(history) = history {
                self.control.history = history.clone();
                outputs.push(AcceptorOutput::Persist(self.control()));
            }
            if truncates {
                outputs.push(AcceptorOutput::Truncate(divergence));
                self.truncated(divergence);
            }
            return;
        }
        if truncates {
            if promised {
                outputs.push(AcceptorOutput::Persist(self.control()));
            }
            outputs.push(AcceptorOutput::Truncate(divergence));
            self.truncated(divergence);
        }
        if let Some(history) = history {
            self.control.history = history.clone();
            #[cfg(any(test, feature = "explorer"))]
            if self.faulty(Fault::HistoryNotPersisted) {
                return;
            }
            outputs.push(AcceptorOutput::Persist(self.control()));
        } else if promised && !truncates {
            outputs.push(AcceptorOutput::Persist(self.control()));
        }
    }

    /// A cut makes nothing durable: what is left was so before, or waits for a sync as before.
    fn truncated(&mut self, lsn: Lsn) {
        self.write_lsn = lsn;
        self.boundary_lsn = self.boundary_lsn.min(lsn);
        self.flush_lsn = self.flush_lsn.min(lsn);
        self.commit_lsn = self.commit_lsn.min(lsn);
    }

    /// Takes bytes of the elected proposer. They are acknowledged by [`Acceptor::flush`].
    ///
    /// A gap is ignored: the sender learns of it by the acknowledgement that doesn't come, and
    /// over an ordered connection there is none.
    pub fn append(&mut self, append: &Append, outputs: &mut Outputs) {
        let promised = self.control.term;
        if append.term < promised && !self.takes_old_term() {
            outputs.push(AcceptorOutput::Refuse(Refusal::Fenced { promised }));
            return;
        }
        let Some(end) = append.start.checked_add(append.length) else {
            outputs.push(AcceptorOutput::Refuse(Refusal::Malformed("bytes past the last LSN")));
            return;
        };
        if append.record_end > end {
            let refusal = Refusal::Malformed("the record end is past the bytes");
            outputs.push(AcceptorOutput::Refuse(refusal));
            return;
        }
        let adopted = self.control.history.last().is_some_and(|last| last.term == append.term);
        if !(adopted || self.takes_old_term()) || append.start > self.write_lsn {
            return;
        }
        if end > self.write_lsn {
            let skip = self.write_lsn - append.start;
            outputs.push(AcceptorOutput::Write { at: self.write_lsn, skip });
            self.write_lsn = end;
        }
        self.advance_boundary(append.record_end);
        self.proposer_commit_lsn = self.proposer_commit_lsn.max(append.commit_lsn);
        self.advance_commit(outputs);
        self.check();
    }

    #[cfg(any(test, feature = "explorer"))]
    fn takes_old_term(&self) -> bool {
        self.faulty(Fault::AppendOldTerm)
    }

    #[cfg(not(any(test, feature = "explorer")))]
    fn takes_old_term(&self) -> bool {
        false
    }

    fn advance_boundary(&mut self, record_end: Lsn) {
        #[cfg(any(test, feature = "explorer"))]
        if self.faulty(Fault::FlushInsideRecord) {
            self.boundary_lsn = self.write_lsn;
            return;
        }
        self.boundary_lsn = self.boundary_lsn.max(record_end.min(self.write_lsn));
    }

    fn advance_commit(&mut self, outputs: &mut Outputs) {
        let commit_lsn = self.proposer_commit_lsn.min(self.commit_limit());
        if commit_lsn > self.commit_lsn {
            self.commit_lsn = commit_lsn;
            outputs.push(AcceptorOutput::Committed(commit_lsn));
        }
    }

    fn commit_limit(&self) -> Lsn {
        #[cfg(any(test, feature = "explorer"))]
        if self.faulty(Fault::CommitBeyondLog) {
            return Lsn::MAX;
        }
        self.flush_lsn
    }

    /// Makes everything appended durable and acknowledges it: once for any number of appends.
    pub fn flush(&mut self, outputs: &mut Outputs) {
        let sync = self.boundary_lsn > self.flush_lsn;
        #[cfg(any(test, feature = "explorer"))]
        if self.faulty(Fault::AckBeforeSync) && sync {
            self.flush_lsn = self.boundary_lsn;
            outputs.push(AcceptorOutput::Ack(self.ack()));
            outputs.push(AcceptorOutput::Sync);
            return;
        }
        if sync {
            outputs.push(AcceptorOutput::Sync);
            self.flush_lsn = self.boundary_lsn;
        }
        outputs.push(AcceptorOutput::Ack(self.ack()));
        self.advance_commit(outputs);
        self.check();
    }

    fn ack(&self) -> Ack {
        Ack {
            term: self.control.history.last().map_or(Term(0), |last| last.term),
            flush_lsn: self.flush_lsn,
            commit_lsn: self.commit_lsn,
        }
    }

    /// Takes committed bytes of another acceptor; refused if they contradict what is committed
    /// here. Call [`Acceptor::flush`] when no more come; only then do they count.
    pub fn peer_range(&mut self, range: &PeerRange, outputs: &mut Outputs) {
        let committed = range.history.up_to(range.commit_lsn);
        let end = range.start.checked_add(range.length).filter(|&end| end <= range.commit_lsn);
        let (Some(end), Some(newest)) = (end, committed.last()) else {
            let refusal = Refusal::Malformed("bytes of a peer past its commit LSN");
            outputs.push(AcceptorOutput::Refuse(refusal));
            return;
        };
        if range.commit_lsn <= self.flush_lsn {
            return;
        }
        if self.refuses_step(newest.term, outputs) {
            return;
        }
        if let Err(refusal) = self.adopt_committed(range, &committed, newest.term, outputs) {
            outputs.push(AcceptorOutput::Refuse(refusal));
            return;
        }
        if range.start <= self.write_lsn && end > self.write_lsn {
            let skip = self.write_lsn - range.start;
            outputs.push(AcceptorOutput::Write { at: self.write_lsn, skip });
            self.write_lsn = end;
        }
        if self.write_lsn >= range.commit_lsn {
            self.boundary_lsn = self.boundary_lsn.max(range.commit_lsn);
            self.proposer_commit_lsn = self.proposer_commit_lsn.max(range.commit_lsn);
        }
        self.check();
    }

    /// Begins an empty log at `range.start`, a record boundary that is committed, with the history of another one. What is before
    /// it is in the archive, which is as good as held here: an acceptor that has it all may remove it too. Before
    /// [`AcceptorOutput::Persist`] is performed, what recovery needs to find that boundary again must be durable.
    pub fn begin_at(&mut self, range: &PeerRange, outputs: &mut Outputs) {
        let (lsn, start_lsn) = (range.start, self.control.start_lsn);
        let committed = range.history.up_to(range.commit_lsn);
        let begins = committed.entries().first().map(|first| first.lsn);
        let is_within = lsn > start_lsn && lsn <= range.commit_lsn && range.length == 0;
        let (Some(newest), true) = (committed.last(), is_within && begins == Some(start_lsn))
        else {
            let refusal = Refusal::Malformed("a beginning that is not within what is committed");
            return outputs.push(AcceptorOutput::Refuse(refusal));
        };
        if self.write_lsn > start_lsn {
            let refusal = Refusal::Malformed("a beginning of a log that is not empty");
            return outputs.push(AcceptorOutput::Refuse(refusal));
        }
        if self.refuses_step(newest.term, outputs) {
            return;
        }
        // Persisted once and with the log's end: either alone is no state to go on from. Nothing is there to be cut.
        let adopted = &mut Vec::new();
        if let Err(refusal) = self.adopt_committed(range, &committed, newest.term, adopted) {
            return outputs.push(AcceptorOutput::Refuse(refusal));
        }
        self.write_lsn = lsn;
        self.boundary_lsn = lsn;
        self.flush_lsn = lsn;
        self.commit_lsn = lsn;
        outputs.push(AcceptorOutput::Persist(self.control()));
        self.check();
    }

    /// The term that this acceptor follows, and up to where another log is the same as the one that this term began with:
    /// one term and position never have two values, so that what is missing here may come from there, committed or not, as
    /// an [`Append`] of that term. `None` while nobody has won the term that was promised last.
    pub fn shares_beginning(&self, other: &TermHistory, other_end: Lsn) -> Option<(Term, Lsn)> {
        let ours = &self.control.history;
        let followed = self.followed()?;
        #[cfg(any(test, feature = "explorer"))]
        if self.faulty(Fault::AnyLogShared) {
            return Some((followed.term, followed.lsn.min(other_end)));
        }
        let agreed = ours.divergence(followed.lsn, other, other_end, self.commit_lsn);
        Some((followed.term, agreed))
    }

    /// Makes the own history agree with a committed one.
    fn adopt_committed(
        &mut self,
        range: &PeerRange,
        committed: &TermHistory,
        newest: Term,
        outputs: &mut Outputs,
    ) -> Result<(), Refusal> {
        let commit_lsn = range.commit_lsn;
        // The newest entry names all before it, merged or not.
        if self.control.history.up_to(commit_lsn).last() == committed.last() {
            return Ok(());
        }
        let base = self.commit_lsn;
        let ours = &self.control.history;
        let divergence = ours.divergence(self.write_lsn, committed, commit_lsn, base);
        // A later winner has everything committed; a history of one that doesn't is no winner's.
        let later = ours.last().is_some_and(|last| last.term > newest);
        if divergence < self.commit_lsn || later {
            let commit_lsn = self.commit_lsn;
            return Err(Refusal::CommittedDiffers { divergence, commit_lsn });
        }
        let newer = newest > self.control.term;
        if newer {
            self.control.term = newest;
            self.control.voted_for = None;
        }
        self.replace_history(divergence, newer, Some(committed), outputs);
        Ok(())
    }

    /// Takes note of a proof that `lsn` of `term` is committed, as far as this log has it.
    pub fn learn_commit(&mut self, term: Term, lsn: Lsn, outputs: &mut Outputs) {
        if self.control.history.last().is_some_and(|last| last.term == term) {
            self.proposer_commit_lsn = self.proposer_commit_lsn.max(lsn);
            self.advance_commit(outputs);
        }
        self.check();
    }

    /// What must hold between any two inputs.
    pub fn invariants(&self) -> Result<(), &'static str> {
        let order = [
            self.control.start_lsn,
            self.commit_lsn,
            self.flush_lsn,
            self.boundary_lsn,
            self.write_lsn,
        ];
        if !order.is_sorted() {
            return Err("start <= commit <= flush <= record boundary <= write");
        }
        let history = &self.control.history;
        if history.last().is_some_and(|last| last.term > self.control.term) {
            return Err("no term in the log is above the promised one");
        }
        if history.entries().first().is_some_and(|first| first.lsn != self.control.start_lsn) {
            return Err("the history begins where the timeline does");
        }
        if self.write_lsn > self.control.start_lsn && history.entries().is_empty() {
            return Err("every byte is of some term");
        }
        Ok(())
    }

    /// A few comparisons, always made: a state that can't be must not be written down.
    fn check(&self) {
        #[cfg(any(test, feature = "explorer"))]
        if self.fault.is_some() {
            return;
        }
        assert_eq!(self.invariants(), Ok(()));
    }
}

#[cfg(test)]
mod tests;
