//! A safekeeper that has members elect, where no compute does it, and writes nothing.

use pgstrata_ids::{Lsn, Member, Term};
use pgstrata_quorum::{Configuration, Phase, Proposer, ProposerId};

use crate::plan::Time;

/// What it knows of its connection to one member.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Its index, while there is one.
    pub connection: Option<usize>,
    pub last_heard: Time,
    /// Once it may be told what is committed.
    pub next: Option<Lsn>,
    /// The commit LSN that was sent last.
    pub told: Lsn,
    /// Who has greeted on it.
    pub member: Option<Member>,
}

/// See the module.
#[derive(Debug)]
pub struct Campaign {
    /// How many there were before.
    pub life: u64,
    pub proposer: Option<Proposer>,
    pub links: Vec<Link>,
    pub start: Lsn,
    pub committed: Lsn,
}

impl Campaign {
    pub fn new(nodes: usize) -> Campaign {
        Campaign {
            life: 0,
            proposer: None,
            links: vec![Link::default(); nodes],
            start: Lsn::INVALID,
            committed: Lsn::INVALID,
        }
    }

    pub fn begin(&mut self, configuration: Configuration) {
        self.life += 1;
        self.proposer = Some(Proposer::new(self.id(), configuration, Term(0)));
        self.links = vec![Link::default(); self.links.len()];
        self.committed = Lsn::INVALID;
    }

    /// As whom it asks now.
    pub fn id(&self) -> ProposerId {
        let mut id = [0xCA; 16];
        id[..8].copy_from_slice(&self.life.to_le_bytes());
        ProposerId(id)
    }

    pub fn configuration(&self) -> Option<&Configuration> {
        self.proposer.as_ref().map(Proposer::configuration)
    }

    pub fn is_elected(&self) -> bool {
        self.proposer.as_ref().is_some_and(|proposer| proposer.phase() == Phase::Elected)
    }

    pub fn term(&self) -> Term {
        self.proposer.as_ref().map_or(Term(0), Proposer::term)
    }
}
