//! Who else is asked who the members are. Those that are known may be gone, and others decided on, of whom none of them can
//! tell: until somebody is elected, and whenever nothing can be committed for a while, everybody is asked who was heard of.
//!
//! What they say is taken as that of members is. They count for nothing else: only who is a member is met as one.

use std::time::{Duration, Instant};

use pgstrata_ids::{Member, NodeId};

use super::{Driver, STALLED_AFTER};
use crate::proposer::link::Link;
use crate::proposer::network::Network;

/// Most safekeepers that are asked at a time beside the members.
const MAX_CONSULTED: usize = 32;

/// So long nobody is elected, or no quorum is there, before those are asked too who are only said to have the timeline.
const CONSULT_AFTER: Duration = Duration::from_secs(1);

/// So long nobody is elected before refusals count: whoever says who has the timeline may be about to.
const REFUSED_AFTER: Duration = Duration::from_secs(2);

/// How often it is looked at whom to ask.
const LOOK_AFTER: Duration = Duration::from_millis(50);

impl<N: Network> Driver<N> {
    /// Whether so many members refuse that the others are no quorum, and everybody was heard who could tell of other members.
    pub fn is_refused(&self) -> bool {
        let refuses =
            |member: Member| self.links.iter().any(|link| link.node == member.node && link.refuses);
        self.is_stalled_for(self.now, REFUSED_AFTER)
            && !self.configuration.is_quorum(|member| !refuses(member))
            && self.links.iter().filter(|link| link.is_asked_at_all()).all(Link::is_heard)
    }

    fn is_stalled_for(&self, now: Instant, patience: Duration) -> bool {
        self.stalled_since.is_some_and(|since| now.saturating_duration_since(since) >= patience)
    }

    /// Whether a term is still to be won with the members that are known.
    fn campaigns(&self) -> bool {
        self.election.is_none() || self.led.is_some()
    }

    /// Begins to ask others, or leaves them, as it is needed now.
    pub(super) fn consult_if_due(&mut self, now: Instant) {
        if now.saturating_duration_since(self.consulted_at) < LOOK_AFTER {
            return;
        }
        self.consulted_at = now;
        match self.campaigns() || !self.is_quorum_there() {
            true => self.stalled_since = self.stalled_since.or(Some(now)),
            false => self.stalled_since = None,
        }
        let patience = Duration::from_secs(STALLED_AFTER);
        let waits_long = self
            .waiting_since()
            .is_some_and(|since| now.saturating_duration_since(since) >= patience);
        let is_long = waits_long || self.is_stalled_for(now, CONSULT_AFTER);
        if is_long || self.campaigns() {
            return self.consult(is_long);
        }
        self.consults = false;
        for link in &mut self.links {
            link.is_consulted = false;
        }
    }

    /// Asks everybody who was heard of, and `widely` also those who are said to have the timeline: those first that may know
    /// most, as only so many are asked.
    pub(super) fn consult(&mut self, widely: bool) {
        self.consults = true;
        let mut heard_of = self.config.safekeepers_to_ask.clone();
        if widely {
            heard_of.extend(self.config.safekeepers.holders());
        }
        heard_of.extend(self.told_nodes());
        heard_of.extend(self.links.iter().rev().map(|link| link.node));
        let members = self.configuration.nodes();
        let mut consulted: Vec<NodeId> = Vec::new();
        for node in heard_of {
            if consulted.len() < MAX_CONSULTED
                && !members.contains(&node)
                && !consulted.contains(&node)
            {
                consulted.push(node);
            }
        }
        for link in &mut self.links {
            link.is_consulted = consulted.contains(&link.node);
        }
        for node in consulted {
            self.consult_one(node);
        }
    }

    /// Asks also those that others have just told of, if others are asked now: where they are is said with it.
    pub(super) fn consult_told(&mut self) {
        if !self.consults {
            return;
        }
        let consulted = self.links.iter().filter(|link| link.is_consulted).count();
        let told = self.told_nodes().into_iter();
        let new: Vec<NodeId> =
            told.filter(|node| !self.links.iter().any(|link| link.node == *node)).collect();
        for node in new.into_iter().take(MAX_CONSULTED.saturating_sub(consulted)) {
            self.consult_one(node);
        }
    }

    /// The nodes of all configurations that safekeepers told of, newer than the own one.
    fn told_nodes(&self) -> Vec<NodeId> {
        let told = self.links.iter().filter_map(|link| link.tells_of.as_ref());
        let newer = told.filter(|told| told.number() > self.configuration.number());
        newer.flat_map(|told| told.nodes()).collect()
    }

    fn consult_one(&mut self, node: NodeId) {
        if !self.links.iter().any(|link| link.node == node) {
            let mut link = Link::new(node, self.config.safekeepers.clone(), self.now);
            (link.is_wanted, link.is_consulted) = (false, true);
            self.links.push(link);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use bytes::Bytes;
    use pgstrata_ids::{Incarnation, Lsn, Term};
    use pgstrata_quorum::{Configuration, TermHistory};
    use pgstrata_wire::safekeeper::GreetingReply;

    use super::*;
    use crate::proposer::driver::membership::tests::{
        START, driver, driver_among, elect, members, places, vote,
    };
    use crate::proposer::sockets::Sockets;
    use crate::proposer::{Members, ProposerError, WalChunk};

    /// The safekeeper, which is in the life of its directory that all are in here, says who the members are.
    fn hear(driver: &mut Driver<Sockets>, node: u64, said: Configuration) -> io::Result<()> {
        let reply = GreetingReply {
            node: NodeId(node),
            incarnation: Incarnation([5; 16]),
            configuration: Some(said),
            addresses: Vec::new(),
            term: Term(0),
            flush_lsn: START,
            commit_lsn: START,
        };
        let index = driver.links.iter().position(|link| link.node == NodeId(node)).unwrap();
        let heard = driver.take_greeting(index, reply);
        if let Err(error) = &heard {
            driver.links[index].fail(Instant::now(), error);
        }
        heard
    }

    fn asked(driver: &Driver<Sockets>) -> Vec<u64> {
        let asked = driver.links.iter().filter(|link| link.is_asked_at_all());
        let mut nodes: Vec<u64> = asked.map(|link| link.node.0).collect();
        nodes.sort_unstable();
        nodes
    }

    fn refuse(driver: &mut Driver<Sockets>, node: u64) {
        let link = driver.links.iter_mut().find(|link| link.node == NodeId(node)).unwrap();
        link.refuses = true;
        link.fail(Instant::now(), &"it was given up");
    }

    #[test]
    fn refusals_end_no_start_before_everybody_was_heard() {
        let mut driver = driver();
        driver.stalled_since = driver.now.checked_sub(REFUSED_AFTER);
        refuse(&mut driver, 1);
        refuse(&mut driver, 2);
        assert!(!driver.is_refused(), "the third may be one with which others went on");
        // It left meanwhile, and tells of others, who are waited for.
        hear(&mut driver, 3, members(2, &[4])).unwrap_err();
        assert!(!driver.is_refused());
        refuse(&mut driver, 4);
        assert!(!driver.is_refused(), "the first two were not asked again since");
        refuse(&mut driver, 1);
        refuse(&mut driver, 2);
        assert!(driver.is_refused());
        // One that was only asked knows of a time before.
        driver.consult_one(NodeId(5));
        assert!(!driver.is_refused());
        hear(&mut driver, 5, members(1, &[1, 2, 3])).unwrap_err();
        assert!(driver.is_refused());
        // Who has the timeline may be about to be said.
        driver.stalled_since = Some(Instant::now());
        assert!(!driver.is_refused());
    }

    #[test]
    fn an_older_configuration_hides_none_of_a_newer_one() {
        let mut driver = driver();
        // It has left at that, and the members of then are gone.
        hear(&mut driver, 1, members(5, &[7, 8, 9])).unwrap_err();
        assert_eq!(driver.configuration.number(), 5);
        assert_eq!(asked(&driver), [1, 2, 3, 7, 8, 9]);
        driver.consult(false);
        hear(&mut driver, 3, members(6, &[3])).unwrap();
        assert_eq!(asked(&driver), [1, 2, 3, 7, 8, 9]);
        hear(&mut driver, 2, members(5, &[7, 8, 9])).unwrap_err();
        assert_eq!(driver.configuration, members(6, &[3]), "what is older is not followed");
        elect(&mut driver, &TermHistory::default(), START, START);
        driver.consult_if_due(Instant::now() + Duration::from_secs(1));
        assert_eq!(asked(&driver), [3], "the others are left once somebody is elected");
    }

    #[test]
    fn no_more_are_asked_than_so_many() {
        let mut driver = driver();
        for number in 1..=90 {
            driver.adopt(members(number, &[number, number + 1, number + 2]), None);
        }
        assert_eq!(asked(&driver).len(), 3 + MAX_CONSULTED);
        assert!(asked(&driver).starts_with(&[1, 2, 3]), "those that it was told of come first");
    }

    /// Two that are said to have the timeline.
    #[derive(Debug)]
    struct Holders;

    impl Members for Holders {
        fn addresses(&self, node: NodeId) -> Vec<String> {
            places().addresses(node)
        }

        fn holders(&self) -> Vec<NodeId> {
            [4, 5].map(NodeId).to_vec()
        }
    }

    /// It has led with three members, who were lost when they had a record; and hears who took their place.
    fn replaced() -> (Driver<Sockets>, TermHistory, Lsn) {
        let mut driver = driver_among(Arc::new(Holders));
        for node in 1..=3 {
            hear(&mut driver, node, members(1, &[1, 2, 3])).unwrap();
        }
        elect(&mut driver, &TermHistory::default(), START, START);
        let end = START + 64;
        let bytes = Bytes::from(vec![7; 64]);
        driver.append(Instant::now(), WalChunk { start: START, bytes, record_end: end }).unwrap();
        driver.commit_lsn = end;
        let now = Instant::now() + Duration::from_secs(1);
        driver.consult_if_due(now);
        driver.consult_if_due(now + Duration::from_secs(60));
        assert_eq!(asked(&driver), [1, 2, 3], "nothing waits");
        for node in 1..=3 {
            driver.links[node - 1].fail(now, &"gone");
        }
        driver.consult_if_due(now + Duration::from_secs(61));
        assert_eq!(asked(&driver), [1, 2, 3]);
        driver.consult_if_due(now + Duration::from_secs(61) + CONSULT_AFTER);
        assert_eq!(asked(&driver), [1, 2, 3, 4, 5]);
        let led = driver.core.history().clone();
        hear(&mut driver, 4, members(2, &[4, 5])).unwrap_err();
        assert_eq!(driver.configuration.number(), 1, "one may have read what others can't read");
        hear(&mut driver, 5, members(2, &[4, 5])).unwrap();
        assert_eq!(driver.configuration.number(), 2);
        (driver, led, end)
    }

    /// It finds no object; `nodes` are what it knows of before there were any. Who is asked to found the timeline then.
    fn founder(
        driver: &mut Driver<Sockets>,
        node: u64,
        nodes: Option<Configuration>,
    ) -> Option<u64> {
        let reply = GreetingReply {
            node: NodeId(node),
            incarnation: Incarnation([5; 16]),
            configuration: nodes,
            addresses: Vec::new(),
            term: Term(0),
            flush_lsn: START,
            commit_lsn: START,
        };
        let index = driver.links.iter().position(|link| link.node == NodeId(node)).unwrap();
        driver.take_greeting(index, reply).unwrap();
        driver.found_if_due();
        driver.links.iter().find(|link| link.is_founding()).map(|link| link.node.0)
    }

    #[test]
    fn nothing_is_founded_while_others_are_said_to_have_it() {
        let mut driver = driver_among(Arc::new(Holders));
        for node in 1..=3 {
            assert_eq!(founder(&mut driver, node, None), None);
        }
        assert_eq!(asked(&driver), [1, 2, 3, 4, 5]);
        assert_eq!(founder(&mut driver, 4, None), None);
        assert!(founder(&mut driver, 5, None).is_some(), "it was a mistake");
    }

    /// The first has lost its directory: it would found what is new, for all that it knows.
    #[test]
    fn a_branch_of_before_is_founded_by_who_has_a_copy() {
        let nodes = Configuration::unknown(&[1, 2, 3].map(NodeId)).unwrap();
        let mut driver = driver();
        assert_eq!(founder(&mut driver, 1, None), None);
        founder(&mut driver, 2, Some(nodes.clone()));
        let founder = founder(&mut driver, 3, Some(nodes));
        assert!(founder == Some(2) || founder == Some(3), "{founder:?}");
    }

    #[test]
    fn a_compute_whose_members_were_all_replaced_finds_the_others() {
        let (mut driver, led, end) = replaced();
        elect(&mut driver, &led, end, end);
        driver.check().unwrap();
        assert_eq!(driver.commit_lsn(), end);
    }

    #[test]
    fn a_compute_ends_where_others_go_on_with_less() {
        let (mut driver, _, _) = replaced();
        vote(&mut driver, &TermHistory::default(), START, START);
        let ended = driver.check();
        assert!(matches!(ended, Err(ProposerError::MembersChanged(2))), "{ended:?}");
    }
}
