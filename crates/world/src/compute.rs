//! One compute: the shipped proposer, the log that it goes on with, and its end of each connection.

use pgstrata_ids::{Lsn, Member, Term};
use pgstrata_quorum::{Configuration, Phase, Proposer, ProposerId, TermHistory};
use pgstrata_sim::wal::WalGenerator;

use crate::plan::Time;

/// What it knows of its connection to one safekeeper.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Its index, while there is one.
    pub connection: Option<usize>,
    pub last_heard: Time,
    /// The next byte to send, once it may.
    pub next: Option<Lsn>,
    /// The commit LSN that was sent last.
    pub told: Lsn,
    /// Who has greeted on it.
    pub member: Option<Member>,
    /// Who has answered there last.
    pub heard: Option<Member>,
    /// The newest configuration that it told of.
    pub tells_of: Option<Configuration>,
}

/// See the module.
#[derive(Debug)]
pub struct Compute {
    pub index: usize,
    /// How many there were in its place.
    pub life: u64,
    pub proposer: Option<Proposer>,
    pub links: Vec<Link>,
    /// Of the own term: bytes from its start on.
    pub log: Vec<u8>,
    pub start: Lsn,
    /// Once the last record before the start is known.
    pub generator: Option<WalGenerator>,
    /// Whether somebody is asked for that record.
    pub asks: bool,
    /// What it knows to be committed, in whichever of its terms.
    pub committed: Lsn,
    /// What was led, while a term has to be won with other members.
    pub led: Option<TermHistory>,
    /// The first of the terms in which the own log was led.
    pub own_since: Term,
    /// The highest term that it asked for before members changed: who was promised a higher one has taken over.
    pub yields_above: Option<Term>,
    /// It is a safekeeper that has members elect, where no compute does, and writes nothing.
    pub is_steward: bool,
}

impl Compute {
    pub fn new(index: usize, nodes: usize) -> Compute {
        Compute {
            index,
            life: 0,
            proposer: None,
            links: vec![Link::default(); nodes],
            log: Vec::with_capacity(64 << 10),
            start: Lsn::INVALID,
            generator: None,
            asks: false,
            committed: Lsn::INVALID,
            led: None,
            own_since: Term(0),
            yields_above: None,
            is_steward: false,
        }
    }

    /// One begins, which nobody knows.
    pub fn begin(&mut self, configuration: Configuration, skipped: u32) {
        self.life += 1;
        let proposer = Proposer::new(self.id(), configuration, Term(0));
        self.proposer = Some(proposer.skipping(skipped));
        self.links = vec![Link::default(); self.links.len()];
        self.log.clear();
        self.generator = None;
        self.asks = false;
        self.committed = Lsn::INVALID;
        self.led = None;
        self.yields_above = None;
    }

    fn id(&self) -> ProposerId {
        let mut id = [self.index as u8 + 1; 16];
        id[..8].copy_from_slice(&self.life.to_le_bytes());
        ProposerId(id)
    }

    /// The members that it counts.
    pub fn configuration(&self) -> Option<&Configuration> {
        self.proposer.as_ref().map(Proposer::configuration)
    }

    /// A member tells of a newer configuration. True if it is to go on with that now: whoever leads does once a quorum has told
    /// of it. As the shipped driver does.
    pub fn hears_of(&mut self, decided: &Configuration, node: usize) -> Option<Configuration> {
        let own = self.configuration()?.clone();
        if decided.number() <= own.number() {
            return None;
        }
        let tells_of = &mut self.links[node].tells_of;
        if tells_of.as_ref().is_none_or(|before| before.number() < decided.number()) {
            *tells_of = Some(decided.clone());
        }
        if !self.is_elected() || self.led.is_some() {
            return Some(decided.clone());
        }
        let told =
            self.links.iter().filter_map(|link| Some((link.heard?, link.tells_of.as_ref()?)));
        own.next_of(&told.collect::<Vec<_>>()).cloned()
    }

    /// Campaigns with other members. If a term was won already, its log is to go on with the next one.
    pub fn adopt(&mut self, configuration: Configuration, skipped: u32) {
        let Some(before) = self.proposer.take() else { return };
        let term = before.term();
        let next = Term(term.0 + 1);
        let mut skipped = skipped;
        if before.phase() == Phase::Elected {
            self.led = Some(before.history().clone());
        }
        if self.led.is_some() {
            self.yields_above = Some(term);
            skipped = 0;
        }
        self.proposer = Some(Proposer::new(self.id(), configuration, next).skipping(skipped));
        for link in &mut self.links {
            link.next = None;
            link.told = Lsn::INVALID;
        }
    }

    /// Whether the log goes on after an election that was won with other members: nobody else has written in between, and what
    /// is missing at the winner's start is here.
    pub fn goes_on(&self, led: &TermHistory, start: Lsn) -> bool {
        let won = self.proposer.as_ref().map(Proposer::history);
        won.is_some_and(|won| led.is_led_on(self.own_since, won, start))
            && start >= self.committed
            && (self.start..=self.end_lsn()).contains(&start)
    }

    /// It is gone.
    pub fn end(&mut self) {
        self.proposer = None;
        self.generator = None;
    }

    pub fn is_elected(&self) -> bool {
        self.proposer.as_ref().is_some_and(|proposer| proposer.phase() == Phase::Elected)
    }

    pub fn term(&self) -> Term {
        self.proposer.as_ref().map_or(Term(0), Proposer::term)
    }

    /// End of what it wrote.
    pub fn end_lsn(&self) -> Lsn {
        self.start + self.log.len() as u64
    }

    /// Own bytes from `from` on, so many at most.
    pub fn bytes(&self, from: Lsn, most: usize) -> &[u8] {
        let offset = (from.0.saturating_sub(self.start.0) as usize).min(self.log.len());
        &self.log[offset..self.log.len().min(offset.saturating_add(most))]
    }
}
