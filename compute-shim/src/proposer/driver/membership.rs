//! Who the members are: what safekeepers say when they are greeted, a timeline that is founded, and members that change while
//! a term is led.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use pgstrata_ids::{Lsn, Member, NodeId, Term};
use pgstrata_quorum::{Configuration, Election, Refusal, TermHistory};
use pgstrata_wire::safekeeper::GreetingReply;

use super::Driver;
use crate::proposer::link::Link;
use crate::proposer::network::Network;

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

impl<N: Network> Driver<N> {
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
            self.links[index].has_copy = reply.configuration.is_some();
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
            // For good: what it knows is of another time, or of other members by the same number.
            self.links[index].refuses =
                number == self.configuration.number() || !self.configuration.contains(member);
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
        let tells_of = &mut self.links[index].tells_of;
        if tells_of.as_ref().is_none_or(|before| before.number() < number) {
            *tells_of = Some(decided.clone());
        }
        self.consult_told();
        let told_by = Some(index).filter(|_| is_greeting);
        // Whoever campaigns, or goes on just now with members that it was told of before, commits nothing meanwhile.
        if self.election.is_none() || self.led.is_some() {
            return self.adopt(decided, told_by);
        }
        let told = self.links.iter().filter_map(|link| {
            let member = Member { node: link.node, incarnation: link.heard? };
            Some((member, link.tells_of.as_ref()?))
        });
        // Newcomers are met only afterwards; who changes members has them know first.
        if let Some(next) = self.configuration.next_of(&told.collect::<Vec<_>>()).cloned() {
            self.adopt(next, told_by);
        }
    }

    /// Campaigns with these members, as the safekeeper at `told_by` says in answer to a greeting; the others are asked what they
    /// say. If a term was won already, its log is to go on, with the next one.
    pub(super) fn adopt(&mut self, configuration: Configuration, told_by: Option<usize>) {
        self.greeting.known = configuration.number();
        self.configuration = configuration;
        let nodes = self.configuration.nodes();
        for link in &mut self.links {
            link.members_changed(nodes.contains(&link.node), self.now);
        }
        // Until somebody is elected: these may be gone, and others know of newer ones.
        self.consult(false);
        for (index, link) in self.links.iter_mut().enumerate() {
            // One that is asked no more is left in the next turn: what it sent may be just being read.
            if link.is_asked_at_all() && Some(index) != told_by {
                link.greet_again(&self.greeting, self.now);
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
        self.core = self.proposer(true, next);
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
        // Members may know more of it than was heard of here before they were asked anew: they find out from each other. Where
        // all that waits is that, nothing more would come that could be committed after it.
        if election.commit_lsn > self.commit_lsn {
            self.commit_lsn = election.commit_lsn;
            self.commit_changed_at = self.now;
        }
        self.backlog.restamp(term, self.commit_lsn);
        self.core.appended(self.record_end);
        self.election = Some(election);
    }

    fn add_links(&mut self) {
        for node in self.configuration.nodes() {
            match self.links.iter_mut().find(|link| link.node == node) {
                // It may have been asked as one that is none.
                Some(link) => link.is_wanted = true,
                None => {
                    let members = Arc::clone(&self.config.safekeepers);
                    self.links.push(Link::new(node, members, self.now));
                }
            }
        }
    }

    /// Where the members are, as far as it is known. Who was one before is nobody's to find any more.
    pub(super) fn places(&self) -> Vec<(NodeId, String)> {
        let members = self.links.iter().filter(|link| link.is_wanted);
        members.filter_map(|link| Some((link.node, link.best_address()?))).collect()
    }

    /// Where members are, as another one says; of others it is of no interest.
    pub(super) fn note_places(&mut self, places: Vec<(NodeId, String)>) {
        for (node, address) in places {
            if let Some(link) = self.links.iter_mut().find(|link| link.node == node) {
                link.told = Some(address);
            }
        }
    }

    /// Whether somebody else is said to have the timeline, who has not said yet that it has nothing: it is asked, and nothing is
    /// founded with others.
    fn waits_for_holders(&mut self) -> bool {
        let nodes = self.configuration.nodes();
        let has_nothing = |node: &NodeId| {
            let link = self.links.iter().find(|link| link.node == *node);
            link.is_some_and(|link| link.knows_nothing && !link.has_copy)
        };
        let holders = self.config.safekeepers.holders();
        let waits = holders.iter().any(|node| !nodes.contains(node) && !has_nothing(node));
        if waits {
            self.consult(true);
        }
        waits
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
        let since = *self.nothing_since.get_or_insert(self.now);
        let is_open = self.links.iter().any(|link| !link.is_settled());
        if is_open && self.now.saturating_duration_since(since) < FOUNDING_PATIENCE {
            return;
        }
        if self.waits_for_holders() {
            return;
        }
        // Who has a copy knows whom it has met, and that what it founds is not new.
        let has_copy = self.links.iter().any(|link| link.can_found() && link.has_copy);
        let is_able = |link: &Link<N::Wire>| link.can_found() && (link.has_copy || !has_copy);
        let able: Vec<usize> =
            (0..self.links.len()).filter(|&index| is_able(&self.links[index])).collect();
        let Some(&founder) = able.get(self.founder_turn % able.len().max(1)) else { return };
        self.founder_turn += 1;
        // Of what was there before its members were written down a directory that has nothing of it is no member's.
        let counts = |link: &&Link<N::Wire>| !(has_copy && link.knows_nothing && !link.has_copy);
        let heard = |node: NodeId| {
            let link = self.links.iter().find(|link| link.node == node);
            (node, link.filter(counts).and_then(|link| link.heard))
        };
        let nodes = self.configuration.nodes().into_iter().map(heard).collect();
        self.links[founder].found(nodes, self.now);
    }
}

#[cfg(test)]
pub(in crate::proposer) mod tests {
    use bytes::Bytes;
    use pgstrata_ids::{Incarnation, SystemId, TenantId, TimelineId, TimelineParameters};
    use pgstrata_quorum::{ProposerId, Vote};
    use pgstrata_wire::frame::Stamp;
    use pgstrata_wire::safekeeper::{Message, decode, encode};

    use super::*;
    use std::time::Instant;

    use crate::proposer::sockets::Sockets;
    use crate::proposer::{Members, ProposerConfig, ProposerError, WalChunk};

    pub(in crate::proposer) const START: Lsn = Lsn(16 << 20);

    /// One that was told of three safekeepers, and has met nobody.
    pub(in crate::proposer) fn driver() -> Driver<Sockets> {
        driver_among(Arc::new(places()))
    }

    pub(in crate::proposer) fn places() -> Vec<(NodeId, String)> {
        (1..=99).map(|node| (NodeId(node), format!("host-{node}:5454"))).collect()
    }

    /// The same, where others say where they are.
    pub(in crate::proposer) fn driver_among(safekeepers: Arc<dyn Members>) -> Driver<Sockets> {
        Driver::of_sockets(config(safekeepers), None).unwrap()
    }

    pub(in crate::proposer) fn config(safekeepers: Arc<dyn Members>) -> ProposerConfig {
        let parameters = TimelineParameters {
            tenant: TenantId([1; 16]),
            timeline: TimelineId([2; 16]),
            system_id: SystemId(3),
            pg_version: 15,
            pg_timeline: 1,
            segment_size: 16 << 20,
            start_lsn: START,
            ancestor: None,
        };
        ProposerConfig {
            parameters,
            safekeepers_to_ask: [1, 2, 3].map(NodeId).to_vec(),
            safekeepers,
            identity: None,
            id: ProposerId([4; 16]),
            seed: 7,
            asked_term: Arc::default(),
            limits: Default::default(),
        }
    }

    pub(in crate::proposer) fn members(number: u64, nodes: &[u64]) -> Configuration {
        let member = |&node| Member { node: NodeId(node), incarnation: Incarnation([5; 16]) };
        Configuration::new(number, nodes.iter().map(member).collect()).unwrap()
    }

    /// It hears that this term was promised to somebody.
    pub(in crate::proposer) fn outrank<N: Network>(driver: &mut Driver<N>, term: Term) {
        driver.core.outranked(term, &mut driver.outputs);
        driver.act();
    }

    /// What it has appended up to `lsn` is committed.
    pub(in crate::proposer) fn commit<N: Network>(driver: &mut Driver<N>, lsn: Lsn) {
        driver.outputs.push(pgstrata_quorum::ProposerOutput::Committed(lsn));
        driver.act();
    }

    /// All members greet it, and vote for it with this log, of which they know so much to be committed. Returns the term.
    pub(in crate::proposer) fn vote<N: Network>(
        driver: &mut Driver<N>,
        log: &TermHistory,
        end: Lsn,
        commit_lsn: Lsn,
    ) -> Term {
        let members: Vec<Member> = driver.configuration.all().collect();
        for &member in &members {
            driver.core.connected(member, Term(0), &mut driver.outputs);
        }
        let term = driver.core.term();
        for &member in &members {
            let history = log.clone();
            let vote =
                Vote { asked: term, granted: true, term, flush_lsn: end, commit_lsn, history };
            driver.core.vote(member, vote, &mut driver.outputs);
        }
        driver.act();
        term
    }

    /// The same, and it leads from then on.
    pub(in crate::proposer) fn elect<N: Network>(
        driver: &mut Driver<N>,
        log: &TermHistory,
        end: Lsn,
        commit_lsn: Lsn,
    ) -> Term {
        let term = vote(driver, log, end, commit_lsn);
        assert_eq!(driver.election.as_ref().map(|election| election.term), Some(term));
        term
    }

    /// The end of the log that others go on with may be where a record of this one's would go.
    #[test]
    fn nothing_is_appended_to_a_log_that_others_do_not_go_on_with() {
        let mut driver = driver();
        driver.adopt(members(1, &[1, 2, 3]), None);
        elect(&mut driver, &TermHistory::default(), START, START);
        let end = START + 64;
        let chunk = WalChunk { start: START, bytes: Bytes::from(vec![7; 64]), record_end: end };
        driver.append(driver.now, chunk).unwrap();
        driver.adopt(members(2, &[1, 2, 4]), None);
        // Somebody else wrote there.
        let others = TermHistory::default().continued(Term(1), START);
        vote(&mut driver, &others, end, START);
        assert!(matches!(driver.check(), Err(ProposerError::MembersChanged(2))));
        let chunk = WalChunk { start: end, bytes: Bytes::from(vec![7; 64]), record_end: end + 64 };
        let appended = driver.append(driver.now, chunk);
        assert!(matches!(appended, Err(ProposerError::MembersChanged(2))), "{appended:?}");
        assert_eq!(driver.end_lsn(), end);
    }

    #[test]
    fn what_members_found_to_be_committed_is_committed_when_the_log_goes_on() {
        let mut driver = driver();
        driver.adopt(members(1, &[1, 2, 3]), None);
        elect(&mut driver, &TermHistory::default(), START, START);
        assert_eq!(driver.commit_lsn(), START);
        // All have the record, and tell each other; the compute hears of a change, and not of that.
        let end = START + 64;
        let bytes = Bytes::from(vec![7; 64]);
        driver.append(Instant::now(), WalChunk { start: START, bytes, record_end: end }).unwrap();
        let led = driver.core.history().clone();
        driver.adopt(members(2, &[1, 2, 4]), None);
        elect(&mut driver, &led, end, end);
        assert_eq!(driver.check().ok(), Some(()));
        assert_eq!(driver.commit_lsn(), end, "nobody would ever say so again");
        assert_eq!(driver.problem().filter(|text| text.contains("no commit")), None);
    }

    #[test]
    fn a_compute_tells_of_no_former_members() {
        let mut driver = driver();
        for number in 1..90 {
            driver.adopt(members(number, &[number, number + 1, number + 2]), None);
        }
        let places = driver.places();
        let nodes: Vec<u64> = places.iter().map(|(node, _)| node.0).collect();
        assert_eq!(nodes, [89, 90, 91]);
        // A safekeeper takes so many.
        driver.greeting.addresses = places;
        let mut bytes = Vec::new();
        let highest = pgstrata_wire::safekeeper::WAL.speaks.highest();
        encode(&Message::Greeting(driver.greeting.clone()), Stamp::In(highest), &mut bytes);
        let frame = pgstrata_wire::frame::split(&bytes).unwrap().unwrap();
        assert_eq!(
            decode(frame.kind, frame.body).unwrap(),
            Message::Greeting(driver.greeting.clone())
        );
    }
}
