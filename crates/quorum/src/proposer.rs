//! One compute's part of one timeline: winning a term, and knowing what is committed.
//!
//! The driver connects to the members, streams the log's bytes to each from where
//! [`ProposerOutput::StreamFrom`] says, and reports what comes back. A proposer serves one term:
//! when it is outranked it ends in [`Phase::Fenced`], reports no commit ever again, and another
//! attempt needs a new proposer.

use pgstrata_ids::{Lsn, Member, Term};

#[cfg(any(test, feature = "explorer"))]
use crate::Fault;
use crate::{Ack, Configuration, Elected, ProposerId, TermHistory, Vote, VoteRequest};

/// How far a proposer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Hears which terms were promised.
    Greeting,
    /// Waits for votes.
    Campaigning,
    /// Won its term.
    Elected,
    /// A higher term was promised; nothing is committed through this proposer any more.
    Fenced,
}

/// What an election decided.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Election {
    /// The term won.
    pub term: Term,
    /// End of the donor's log, where this term's first record goes: a record boundary.
    pub start_lsn: Lsn,
    /// The voter whose log is continued.
    pub donor: Member,
    /// What voters knew to be committed; at most `start_lsn`.
    pub commit_lsn: Lsn,
    /// The lowest end of a voter's log: bytes from here to `start_lsn` may have to be sent.
    pub lowest_flush_lsn: Lsn,
}

/// One step for the driver.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ProposerOutput {
    /// Ask this member for its vote.
    RequestVote(Member, VoteRequest),
    /// Tell this member who won and what the log is.
    AnnounceElected(Member, Elected),
    /// The term is won.
    Elected(Election),
    /// Send this member the log from here on, until it reconnects.
    StreamFrom(Member, Lsn),
    /// Everything up to here is committed.
    Committed(Lsn),
    /// Term `.0` was promised to someone else; this proposer is done.
    Fenced(Term),
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Heard {
    greeted: Option<Term>,
    vote: Option<(Lsn, TermHistory, Lsn)>,
    flush_lsn: Option<Lsn>,
    streaming: bool,
}

/// The proposer's state; see the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Proposer {
    id: ProposerId,
    configuration: Configuration,
    phase: Phase,
    term: Term,
    members: Vec<Member>,
    heard: Vec<Heard>,
    history: TermHistory,
    start_lsn: Lsn,
    end_lsn: Lsn,
    commit_lsn: Lsn,
    skipped_terms: u32,
    #[cfg(any(test, feature = "explorer"))]
    fault: Option<Fault>,
}

type Outputs = Vec<ProposerOutput>;

impl Proposer {
    /// A proposer that will ask for a term of at least `lowest_term`.
    pub fn new(id: ProposerId, configuration: Configuration, lowest_term: Term) -> Proposer {
        let members: Vec<Member> = configuration.all().collect();
        Proposer {
            id,
            phase: Phase::Greeting,
            term: lowest_term,
            heard: vec![Heard::default(); members.len()],
            members,
            configuration,
            history: TermHistory::default(),
            start_lsn: Lsn::INVALID,
            end_lsn: Lsn::INVALID,
            commit_lsn: Lsn::INVALID,
            skipped_terms: 0,
            #[cfg(any(test, feature = "explorer"))]
            fault: None,
        }
    }

    /// Leaves out so many terms above those that it hears of.
    ///
    /// Logs are compared by the terms that wrote them. That is right while a term has one proposer, which voting sees
    /// to within a quorum, and nothing does between a quorum and a copy of it: each elects its next proposer for the
    /// next term, and the two would pass for one. With a random number here they have different terms.
    pub fn skipping(self, skipped_terms: u32) -> Proposer {
        Proposer { skipped_terms, ..self }
    }

    /// Makes one mistake from now on.
    #[cfg(any(test, feature = "explorer"))]
    pub fn with_fault(self, fault: Option<Fault>) -> Proposer {
        Proposer { fault, ..self }
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The term asked for or won.
    pub fn term(&self) -> Term {
        self.term
    }

    /// The log as this proposer knows it, once elected.
    pub fn history(&self) -> &TermHistory {
        &self.history
    }

    /// The members whose votes and acknowledgements are counted.
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// What is known to be committed.
    pub fn commit_lsn(&self) -> Lsn {
        self.commit_lsn
    }

    /// End of what was appended: a record boundary.
    pub fn end_lsn(&self) -> Lsn {
        self.end_lsn
    }

    /// What a member acknowledged; `None` before its first acknowledgement.
    pub fn flush_lsn_of(&self, member: Member) -> Option<Lsn> {
        self.index(member).and_then(|index| self.heard[index].flush_lsn)
    }

    /// The lowest position that every member acknowledged; `None` until all have.
    pub fn lowest_flush_lsn(&self) -> Option<Lsn> {
        self.heard.iter().map(|member| member.flush_lsn).min().flatten()
    }

    fn index(&self, member: Member) -> Option<usize> {
        self.members.iter().position(|&other| other == member)
    }

    /// A member is (again) connected and has promised `promised`.
    pub fn connected(&mut self, member: Member, promised: Term, outputs: &mut Outputs) {
        let Some(index) = self.index(member) else { return };
        self.heard[index].streaming = false;
        self.heard[index].greeted = Some(promised);
        match self.phase {
            Phase::Greeting => self.try_campaign(outputs),
            Phase::Campaigning => self.request_vote(member, outputs),
            Phase::Elected if promised > self.term => self.fence(promised, outputs),
            Phase::Elected => self.announce(member, outputs),
            Phase::Fenced => {}
        }
    }

    fn try_campaign(&mut self, outputs: &mut Outputs) {
        let greeted =
            |member: Member| self.index(member).is_some_and(|i| self.heard[i].greeted.is_some());
        if !self.configuration.is_quorum(greeted) {
            return;
        }
        let highest = self.heard.iter().filter_map(|member| member.greeted).max();
        let skipped = u64::from(self.skipped_terms);
        let next = Term(highest.unwrap_or_default().0.saturating_add(1).saturating_add(skipped));
        self.term = self.term.max(next);
        self.phase = Phase::Campaigning;
        for index in 0..self.members.len() {
            if self.heard[index].greeted.is_some() {
                self.request_vote(self.members[index], outputs);
            }
        }
    }

    fn request_vote(&self, member: Member, outputs: &mut Outputs) {
        let configuration = self.configuration.clone();
        let request = VoteRequest { term: self.term, proposer: self.id, configuration };
        outputs.push(ProposerOutput::RequestVote(member, request));
    }

    fn announce(&self, member: Member, outputs: &mut Outputs) {
        let elected = Elected { term: self.term, history: self.history.clone() };
        outputs.push(ProposerOutput::AnnounceElected(member, elected));
    }

    /// A member answered the vote request.
    pub fn vote(&mut self, member: Member, vote: Vote, outputs: &mut Outputs) {
        let Some(index) = self.index(member) else { return };
        if vote.asked != self.term {
            return;
        }
        match self.phase {
            Phase::Campaigning if !vote.granted => self.fence(vote.term, outputs),
            Phase::Campaigning => {
                self.heard[index].vote = Some((vote.flush_lsn, vote.history, vote.commit_lsn));
                self.try_win(outputs);
            }
            // Everyone who was greeted by then heard of the election when it was won.
            _ => {}
        }
    }

    fn is_quorum(&self, has: impl Fn(&Heard) -> bool) -> bool {
        let has = |member: Member| self.index(member).is_some_and(|index| has(&self.heard[index]));
        #[cfg(any(test, feature = "explorer"))]
        if self.fault == Some(Fault::SmallQuorum) {
            return self.members.iter().filter(|&&member| has(member)).count()
                >= self.members.len() / 2;
        }
        self.counted().is_quorum(has)
    }

    /// The members that count, and a mistake of who they are.
    #[cfg(any(test, feature = "explorer"))]
    fn counted(&self) -> std::borrow::Cow<'_, Configuration> {
        use std::borrow::Cow;
        let group = match self.fault {
            Some(Fault::JointIsNew) => self.configuration.incoming(),
            Some(Fault::JointIsOld) => self.configuration.members(),
            _ => &[],
        };
        let one = Configuration::new(self.configuration.number(), group.to_vec());
        one.map_or(Cow::Borrowed(&self.configuration), Cow::Owned)
    }

    #[cfg(not(any(test, feature = "explorer")))]
    fn counted(&self) -> &Configuration {
        &self.configuration
    }

    fn try_win(&mut self, outputs: &mut Outputs) {
        if !self.is_quorum(|member| member.vote.is_some()) {
            return;
        }
        let votes = self.members.iter().zip(&self.heard).filter_map(|(&member, heard)| {
            heard.vote.as_ref().map(|(flush, history, commit)| (member, *flush, history, *commit))
        });
        let rank = |flush: Lsn, history: &TermHistory| {
            #[cfg(any(test, feature = "explorer"))]
            if self.fault == Some(Fault::DonorByLength) {
                return (Term(0), flush);
            }
            (history.last().map_or(Term(0), |last| last.term), flush)
        };
        let Some((donor, start_lsn, history, _)) =
            votes.clone().max_by_key(|(_, flush, history, _)| rank(*flush, history))
        else {
            return;
        };
        let commit_lsn = votes.clone().map(|vote| vote.3).max().unwrap_or_default();
        let lowest_flush_lsn = votes.map(|vote| vote.1).min().unwrap_or_default();
        let history = history.continued(self.term, start_lsn);
        self.history = history.compacted(commit_lsn.min(start_lsn));
        self.start_lsn = start_lsn;
        self.end_lsn = start_lsn;
        self.commit_lsn = commit_lsn.min(start_lsn);
        self.phase = Phase::Elected;
        outputs.push(ProposerOutput::Elected(Election {
            term: self.term,
            start_lsn,
            donor,
            commit_lsn: self.commit_lsn,
            lowest_flush_lsn,
        }));
        for index in 0..self.members.len() {
            if self.heard[index].greeted.is_some() {
                self.announce(self.members[index], outputs);
            }
        }
    }

    /// The log was extended, and its last record boundary is `record_end`: possibly one that was
    /// known before, while a long record is being sent.
    pub fn appended(&mut self, record_end: Lsn) {
        self.end_lsn = self.end_lsn.max(record_end);
    }

    /// A member acknowledged part of this term's log.
    pub fn ack(&mut self, member: Member, ack: Ack, outputs: &mut Outputs) {
        let Some(index) = self.index(member) else { return };
        if self.phase != Phase::Elected {
            return;
        }
        if ack.term > self.term {
            return self.fence(ack.term, outputs);
        }
        if ack.term < self.term {
            return;
        }
        let heard = &mut self.heard[index];
        heard.flush_lsn = heard.flush_lsn.max(Some(ack.flush_lsn));
        if !heard.streaming {
            heard.streaming = true;
            outputs.push(ProposerOutput::StreamFrom(member, ack.flush_lsn));
        }
        self.advance_commit(outputs);
    }

    /// Only a quorum that has followed this term up to its start makes what came before it committed: one that holds older
    /// bytes alone could still be outvoted by a newer term's log (figure 8 of the Raft paper).
    fn advance_commit(&mut self, outputs: &mut Outputs) {
        let reached = |member: Member| self.flush_lsn_of(member);
        #[cfg(any(test, feature = "explorer"))]
        let reached = |member: Member| match self.fault {
            Some(Fault::SmallQuorum) => self.heard.iter().map(|member| member.flush_lsn).max()?,
            _ => reached(member),
        };
        let Some(lsn) = self.counted().quorum_lsn(reached) else { return };
        let lsn = lsn.min(self.end_lsn);
        if lsn > self.commit_lsn && (lsn >= self.start_lsn || self.commits_older_terms()) {
            self.commit_lsn = lsn;
            outputs.push(ProposerOutput::Committed(lsn));
        }
    }

    #[cfg(any(test, feature = "explorer"))]
    fn commits_older_terms(&self) -> bool {
        self.fault == Some(Fault::CommitOlderTerm)
    }

    #[cfg(not(any(test, feature = "explorer")))]
    fn commits_older_terms(&self) -> bool {
        false
    }

    /// A member refused because it promised `promised`, or is known to have.
    pub fn outranked(&mut self, promised: Term, outputs: &mut Outputs) {
        if promised > self.term {
            self.fence(promised, outputs);
        }
    }

    fn fence(&mut self, promised: Term, outputs: &mut Outputs) {
        if self.phase != Phase::Fenced {
            self.phase = Phase::Fenced;
            outputs.push(ProposerOutput::Fenced(promised));
        }
    }

    /// What this proposer knows of one member, and what it knows otherwise, as hashes: so that
    /// states that differ only in the members' names count as one.
    #[cfg(any(test, feature = "explorer"))]
    pub(crate) fn hash_member(&self, member: Member, hasher: &mut impl std::hash::Hasher) {
        use std::hash::Hash;
        self.index(member).map(|index| &self.heard[index]).hash(hasher);
    }

    #[cfg(any(test, feature = "explorer"))]
    pub(crate) fn hash_rest(&self, hasher: &mut impl std::hash::Hasher) {
        use std::hash::Hash;
        (self.id, self.phase, self.term, &self.history).hash(hasher);
        self.configuration.number().hash(hasher);
        (self.start_lsn, self.end_lsn, self.commit_lsn).hash(hasher);
    }

    /// What must hold between any two inputs.
    pub fn invariants(&self) -> Result<(), &'static str> {
        if self.phase == Phase::Elected {
            if self.commit_lsn > self.end_lsn || self.start_lsn > self.end_lsn {
                return Err("start and commit are within the log");
            }
            if self.history.last().map(|last| last.term) != Some(self.term) {
                return Err("the history ends with the own term");
            }
        }
        Ok(())
    }
}
