//! Who the members are: what safekeepers say when they are greeted, a timeline that is founded, and members that change while
//! a term is led.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_ids::{Lsn, Member, NodeId, Term};
use pgstrata_quorum::{Configuration, Election, Refusal, TermHistory};
use pgstrata_wire::safekeeper::GreetingReply;

use super::{Driver, proposer};
use crate::proposer::link::Link;

/// So long those are waited for who have not said what they know of a timeline of which a majority knows nothing.
const FOUNDING_PATIENCE: Duration = Duration::from_millis(200);

/// What is wrong with a safekeeper that is no member.
fn no_member(member: Member, configuration: &Configuration) -> String {
    let node = member.node;
    match configuration.nodes().contains(&node) {
        true => format!(
            "safekeeper {node} has another directory than the one that joined: what it promised and \
             stored is lost, and it is not counted until it is made a member anew"
        ),
        false => format!("safekeeper {node} is no member of this branch"),
    }
}

impl Driver {
    /// What a safekeeper knows of the timeline, and who it is.
    pub(super) fn take_greeting(&mut self, index: usize, reply: GreetingReply) -> io::Result<()> {
        if !self.links[index].answered() {
            return Ok(());
        }
        let member = Member { node: reply.node, incarnation: reply.incarnation };
        self.links[index].heard = Some(reply.incarnation);
        let Some(said) = reply.configuration.as_ref().filter(|said| said.is_known()) else {
            if self.configuration.is_known() {
                return Err(io::Error::other("it finds no trace of the branch in object storage"));
            }
            self.links[index].knows_nothing = true;
            if let Some(nodes) = reply.configuration {
                // Of before members had incarnations: it is founded with these, whatever we were told.
                self.configuration = nodes;
                self.add_links();
            }
            return Ok(());
        };
        if said.number() > self.configuration.number() {
            self.told_of(said.clone(), index, true);
        } else if !said.has_the_members_of(&self.configuration) {
            let number = said.number();
            return Err(io::Error::other(Refusal::OtherMembers { number }));
        }
        self.note_places(reply.addresses);
        if !self.configuration.contains(member) {
            self.links[index].refuses = true;
            return Err(io::Error::other(no_member(member, &self.configuration)));
        }
        self.links[index].succeeded(member);
        if self.yields_above.is_some_and(|asked| reply.term > asked) {
            self.core.outranked(reply.term, &mut self.outputs);
        }
        self.core.connected(member, reply.term, &mut self.outputs);
        Ok(())
    }

    /// A member tells of a newer configuration, in answer to a greeting or by itself. It is taken when it can elect: whoever
    /// leads goes on as it is until a quorum has told so, since one may have read what others can't read now.
    pub(super) fn told_of(&mut self, decided: Configuration, index: usize, is_greeting: bool) {
        let number = decided.number();
        if number <= self.configuration.number() {
            return;
        }
        let link = &mut self.links[index];
        link.tells_of = link.tells_of.max(number);
        let told_by = Some(index).filter(|_| is_greeting);
        // Whoever campaigns, or goes on just now with members that it was told of before, commits nothing meanwhile.
        if self.election.is_none() || self.led.is_some() {
            return self.adopt(decided, told_by);
        }
        if self.told_of.as_ref().is_none_or(|told_of| told_of.number() < number) {
            self.told_of = Some(decided);
        }
        let Some(next) = &self.told_of else { return };
        let knows = |member: Member| {
            let mut links = self.links.iter().filter(|link| link.node == member.node);
            links.any(|link| {
                link.heard == Some(member.incarnation) && link.tells_of >= next.number()
            })
        };
        // Newcomers are met only afterwards; who changes members has them know first.
        if self.configuration.yields_to(next, knows)
            && let Some(next) = self.told_of.take()
        {
            self.adopt(next, told_by);
        }
    }

    /// Campaigns with these members, as the safekeeper at `told_by` says in answer to a greeting; the others are asked what they
    /// say. If a term was won already, its log is to go on, with the next one.
    pub(super) fn adopt(&mut self, configuration: Configuration, told_by: Option<usize>) {
        self.greeting.known = configuration.number();
        self.configuration = configuration;
        self.told_of = None;
        let nodes = self.configuration.nodes();
        for (index, link) in self.links.iter_mut().enumerate() {
            // One that is wanted no more is left in the next turn: what it sent may be just being read.
            link.is_wanted = nodes.contains(&link.node);
            if link.is_wanted && Some(index) != told_by {
                link.greet_again(&self.greeting);
            }
        }
        self.add_links();
        self.outputs.clear();
        self.busy = true;
        let term = self.core.term();
        if self.election.is_none() {
            return self.campaign_above(term);
        }
        // While it was elected. An election after that may not have come to its end yet, and changed nothing.
        if self.core.history().last().is_some() {
            self.led = Some(self.core.history().clone());
        }
        // Whoever was promised a higher term meanwhile has taken over.
        self.yields_above = Some(term);
        let next = Term(term.0.saturating_add(1));
        self.core = proposer(self.config.id, &self.configuration, true, next);
        for link in &mut self.links {
            link.next_lsn = None;
            link.pulls = false;
            link.told_commit_lsn = Lsn::INVALID;
        }
    }

    /// Goes on with the log after a term was won with other members, if that is the same log: no other proposer has
    /// written in between, and what is missing at the winner's start is still here.
    pub(super) fn go_on(&mut self, led: &TermHistory, election: Election) {
        let start = election.start_lsn;
        // What was committed every winner has; it is looked at all the same, as it is sent on as committed.
        let is_ours = led.is_led_on(self.own_since, self.core.history(), start)
            && start >= self.commit_lsn
            && (self.backlog.base()..=self.record_end).contains(&start);
        if !is_ours {
            self.replaced_by = Some(self.configuration.number());
            return;
        }
        tracing::info!(
            term = %self.core.term(),
            configuration = self.configuration.number(),
            "the branch's members were changed; the log goes on"
        );
        let term = self.core.term();
        // Voters may know more to be committed than was heard here, and then that is never said again.
        self.commit_lsn = self.commit_lsn.max(election.commit_lsn);
        self.backlog.restamp(term, self.commit_lsn);
        self.core.appended(self.record_end);
        self.election = Some(election);
    }

    fn add_links(&mut self) {
        for node in self.configuration.nodes() {
            if !self.links.iter().any(|link| link.node == node) {
                self.links.push(Link::new(node, Arc::clone(&self.config.safekeepers)));
            }
        }
    }

    /// Where members are, as another one says; of others it is of no interest.
    pub(super) fn note_places(&mut self, places: Vec<(NodeId, String)>) {
        for (node, address) in places {
            if let Some(link) = self.links.iter_mut().find(|link| link.node == node) {
                link.told = Some(address);
            }
        }
    }

    /// Has the timeline founded when so many safekeepers know nothing of it that the others could not have elected, and the
    /// others are not to be heard for a moment.
    pub(super) fn found_if_due(&mut self) {
        if self.configuration.is_known() || self.links.iter().any(Link::is_founding) {
            return;
        }
        let knows_nothing = |member: Member| {
            self.links.iter().any(|link| link.node == member.node && link.knows_nothing)
        };
        if !self.configuration.is_quorum(knows_nothing) {
            self.nothing_since = None;
            return;
        }
        let since = *self.nothing_since.get_or_insert_with(Instant::now);
        let is_open = self.links.iter().any(|link| !link.is_settled());
        if is_open && since.elapsed() < FOUNDING_PATIENCE {
            return;
        }
        let able: Vec<usize> =
            (0..self.links.len()).filter(|&index| self.links[index].knows_nothing).collect();
        let Some(&founder) = able.get(self.founder_turn % able.len().max(1)) else { return };
        self.founder_turn += 1;
        let heard = |node: NodeId| {
            let link = self.links.iter().find(|link| link.node == node);
            (node, link.and_then(|link| link.heard))
        };
        let nodes = self.configuration.nodes().into_iter().map(heard).collect();
        self.links[founder].found(nodes);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, Term};
    use pgstrata_quorum::{Configuration, ProposerId, TermHistory, Vote};
    use pgstrata_sim::wal::parameters;

    use super::*;
    use crate::proposer::config::ProposerConfig;

    const START: Lsn = Lsn(1 << 20);
    const MEMBER: Member = Member { node: NodeId(1), incarnation: Incarnation([1; 16]) };

    fn driver() -> Driver {
        let config = ProposerConfig {
            parameters: parameters(START),
            safekeepers_to_ask: vec![MEMBER.node],
            safekeepers: Arc::new(Vec::new()),
            identity: None,
            id: ProposerId([7; 16]),
            asked_term: Arc::default(),
        };
        Driver::new(config, None).unwrap()
    }

    /// The one member votes; it has a log up to `end`, and knows so much of it to be committed.
    fn elect(driver: &mut Driver, end: Lsn, commit_lsn: Lsn, history: TermHistory) -> Term {
        driver.core.connected(MEMBER, driver.core.term(), &mut driver.outputs);
        let term = driver.core.term();
        let vote = Vote { asked: term, granted: true, term, flush_lsn: end, commit_lsn, history };
        driver.core.vote(MEMBER, vote, &mut driver.outputs);
        driver.act();
        term
    }

    #[test]
    fn what_voters_know_to_be_committed_is_said_when_the_log_goes_on() {
        let mut driver = driver();
        driver.adopt(Configuration::new(1, vec![MEMBER]).unwrap(), None);
        elect(&mut driver, START, START, TermHistory::default());
        assert_eq!(driver.commit_lsn(), START);
        // It writes, and what is acknowledged gets lost.
        let end = START + 800;
        driver.record_end = end;
        driver.core.appended(end);
        let history = driver.core.history().clone();
        // Members change. Who votes has proven meanwhile that all of it is committed: no acknowledgement says so again.
        driver.adopt(Configuration::new(2, vec![MEMBER]).unwrap(), None);
        elect(&mut driver, end, end, history);
        assert!(driver.election().is_some());
        assert_eq!(driver.commit_lsn(), end);
    }
}
