//! What one acceptor does with single messages.

use pgstrata_ids::{Incarnation, NodeId};

use super::*;
use crate::TermStart;

fn history(entries: &[(u64, u64)]) -> TermHistory {
    let entries = entries.iter().map(|&(term, lsn)| TermStart { term: Term(term), lsn: Lsn(lsn) });
    TermHistory::new(entries.collect()).unwrap()
}

fn member(node: u64) -> Member {
    Member { node: NodeId(node), incarnation: Incarnation([node as u8; 16]) }
}

fn group(nodes: &[u64]) -> Vec<Member> {
    nodes.iter().map(|&node| member(node)).collect()
}

fn three() -> Configuration {
    Configuration::new(1, group(&[1, 2, 3])).unwrap()
}

fn acceptor() -> Acceptor {
    Acceptor::restore(member(1), ControlState::empty(Lsn(8), three()), Lsn(8)).unwrap()
}

/// An acceptor that follows `term`, whose log begins with it.
fn following(term: u64) -> Acceptor {
    let mut acceptor = acceptor();
    let elected = Elected { term: Term(term), history: history(&[(term, 8)]) };
    acceptor.elected(&elected, &mut Vec::new());
    acceptor
}

fn appended(acceptor: &mut Acceptor, term: u64, start: u64, end: u64) {
    let append = Append {
        term: Term(term),
        start: Lsn(start),
        length: end - start,
        record_end: Lsn(end),
        commit_lsn: Lsn(8),
    };
    acceptor.append(&append, &mut Vec::new());
}

#[test]
fn l10_other_members_under_the_same_number_get_no_vote() {
    let mut acceptor = acceptor();
    let mut ask = |number: u64, members: &[u64]| {
        let configuration = Configuration::new(number, group(members)).unwrap();
        let proposer = ProposerId([1; 16]);
        let mut outputs = Vec::new();
        let term = Term(acceptor.term().0 + 1);
        acceptor.vote(&VoteRequest { term, proposer, configuration }, &mut outputs);
        outputs.pop().unwrap()
    };
    let refused = AcceptorOutput::Refuse(Refusal::OtherMembers { number: 1 });
    for members in [&[1][..], &[1, 4], &[1, 2, 3, 4], &[1, 2, 4]] {
        assert_eq!(ask(1, members), refused);
    }
    // In another order they are the same.
    assert!(matches!(ask(1, &[3, 1, 2]), AcceptorOutput::Vote(vote) if vote.granted));
}

#[test]
fn only_what_was_decided_is_followed() {
    let mut acceptor = acceptor();
    let ask = |acceptor: &mut Acceptor, configuration: &Configuration| {
        let (proposer, term) = (ProposerId([1; 16]), Term(acceptor.term().0 + 1));
        let configuration = configuration.clone();
        let mut outputs = Vec::new();
        acceptor.vote(&VoteRequest { term, proposer, configuration }, &mut outputs);
        outputs.pop().unwrap()
    };
    let joint = Configuration::joint(2, group(&[1, 2, 3]), group(&[1, 2, 4])).unwrap();
    let undecided = Refusal::Undecided { number: 2, current: 1 };
    assert_eq!(ask(&mut acceptor, &joint), AcceptorOutput::Refuse(undecided));
    assert_eq!(acceptor.configuration(), &three());
    let mut outputs = Vec::new();
    acceptor.configure(&joint, &mut outputs);
    assert!(
        matches!(&outputs[..], [AcceptorOutput::Persist(state)] if state.configuration == joint)
    );
    assert!(matches!(ask(&mut acceptor, &joint), AcceptorOutput::Vote(vote) if vote.granted));
    let stale = AcceptorOutput::Refuse(Refusal::StaleConfiguration { current: 2 });
    assert_eq!(ask(&mut acceptor, &three()), stale);
    // What was decided earlier, or the same again, changes nothing; another one of the number can't be.
    outputs.clear();
    acceptor.configure(&three(), &mut outputs);
    acceptor.configure(&joint, &mut outputs);
    assert_eq!(outputs, []);
    acceptor.configure(&Configuration::new(2, group(&[1])).unwrap(), &mut outputs);
    assert_eq!(outputs, [AcceptorOutput::Refuse(Refusal::OtherMembers { number: 2 })]);
    // One without the acceptor: it votes for nobody and follows nobody from then on.
    outputs.clear();
    let without = Configuration::new(3, group(&[2, 3, 4])).unwrap();
    acceptor.configure(&without, &mut outputs);
    let not_member = AcceptorOutput::Refuse(Refusal::NotMember);
    assert_eq!(ask(&mut acceptor, &without), not_member);
    outputs.clear();
    let elected = Elected { term: Term(99), history: history(&[(99, 8)]) };
    acceptor.elected(&elected, &mut outputs);
    assert_eq!(outputs, [not_member]);
}

#[test]
fn who_lost_its_directory_gets_and_gives_no_vote() {
    let wiped = Member { incarnation: Incarnation([9; 16]), ..member(1) };
    let mut acceptor =
        Acceptor::restore(wiped, ControlState::empty(Lsn(8), three()), Lsn(8)).unwrap();
    assert_eq!(asked(&mut acceptor, 1), AcceptorOutput::Refuse(Refusal::NotMember));
}

fn asked(acceptor: &mut Acceptor, term: u64) -> AcceptorOutput {
    let (proposer, configuration) = (ProposerId([1; 16]), three());
    let mut outputs = Vec::new();
    acceptor.vote(&VoteRequest { term: Term(term), proposer, configuration }, &mut outputs);
    outputs.pop().unwrap()
}

#[test]
fn s2_one_message_does_not_use_up_all_terms() {
    let too_far = |asked: u64, promised: u64| {
        let (asked, promised) = (Term(asked), Term(promised));
        AcceptorOutput::Refuse(Refusal::TermTooFar { asked, promised })
    };
    let mut one = acceptor();
    assert_eq!(asked(&mut one, u64::MAX), too_far(u64::MAX, MAX_TERM_STEP));
    let elected = Elected { term: Term(u64::MAX), history: history(&[(u64::MAX, 8)]) };
    let mut outputs = Vec::new();
    one.elected(&elected, &mut outputs);
    assert_eq!(outputs.pop().unwrap(), too_far(u64::MAX, 2 * MAX_TERM_STEP));
    // Another one of which nothing absurd was asked follows in as many steps.
    let next = one.term().0 + 1;
    let mut other = acceptor();
    assert_eq!(asked(&mut other, next), too_far(next, MAX_TERM_STEP));
    assert_eq!(asked(&mut other, next), too_far(next, 2 * MAX_TERM_STEP));
    for acceptor in [&mut one, &mut other] {
        assert!(matches!(asked(acceptor, next), AcceptorOutput::Vote(vote) if vote.granted));
    }
}

/// Two quorums that were one: each elects its next proposer without hearing of the other.
#[test]
fn a_copy_of_a_quorum_has_terms_of_its_own() {
    use crate::{Proposer, ProposerOutput};
    let campaign = |skipped: u32, promised: u64| {
        let proposer = Proposer::new(ProposerId([1; 16]), three(), Term(1));
        let mut proposer = proposer.skipping(skipped);
        let mut outputs = Vec::new();
        for node in [1, 2] {
            proposer.connected(member(node), Term(promised), &mut outputs);
        }
        let asked = outputs.iter().find_map(|output| match output {
            ProposerOutput::RequestVote(_, request) => Some(request.term.0),
            _ => None,
        });
        asked.unwrap()
    };
    assert_eq!((campaign(0, 7), campaign(5, 7)), (8, 13));
    assert_eq!(campaign(5, u64::MAX - 3), u64::MAX);
    // The two logs are told apart, though both go on from the same position.
    let [one, other] = [8, 13].map(|term| history(&[(7, 8), (term, 20)]));
    assert_eq!(one.divergence(Lsn(50), &other, Lsn(50), Lsn(8)), Lsn(20));
}

#[test]
fn l12_old_terms_are_merged_and_a_branch_goes_on() {
    use crate::{MAX_HISTORY, Proposer, ProposerOutput, Vote};
    // As many terms as a message holds, of 8 bytes each.
    let most = MAX_HISTORY as u64;
    let entries: Vec<(u64, u64)> = (1..=most).map(|term| (term, 8 * term)).collect();
    let full = history(&entries);
    let end = Lsn(8 * most + 8);
    let acceptor_of = |node: u64, flush: Lsn, commit: Lsn| {
        let control = ControlState {
            term: Term(most),
            history: full.up_to(flush),
            commit_lsn: commit,
            ..ControlState::empty(Lsn(8), three())
        };
        Acceptor::restore(member(node), control, flush).unwrap()
    };
    let mut proposer = Proposer::new(ProposerId([1; 16]), three(), Term(1));
    let mut outputs = Vec::new();
    for node in 1..=3 {
        proposer.connected(member(node), Term(most), &mut outputs);
    }
    for node in 1..=2 {
        let vote = Vote {
            asked: Term(most + 1),
            granted: true,
            term: Term(most + 1),
            flush_lsn: end,
            commit_lsn: Lsn(end.0 - 16),
            history: full.clone(),
        };
        proposer.vote(member(node), vote, &mut outputs);
    }
    let elected = outputs.iter().find_map(|output| match output {
        ProposerOutput::AnnounceElected(_, elected) => Some(elected.clone()),
        _ => None,
    });
    let elected = elected.unwrap();
    let entries = elected.history.entries();
    assert!(TermHistory::new(entries.to_vec()).is_ok(), "{} entries", entries.len());
    assert!(entries.len() < 10_000);
    // Who has it all, who lags a little, who lags behind everything that is still told apart,
    // and one of those with a tail that nobody else has.
    let far = Lsn(8 * 1000);
    for (flush, commit, expected) in [
        (end, Lsn(end.0 - 8), end),
        (Lsn(end.0 - 80), Lsn(end.0 - 160), Lsn(end.0 - 80)),
        (far, far, far),
        (far, Lsn(far.0 - 80), Lsn(far.0 - 80)),
    ] {
        let mut acceptor = acceptor_of(1, flush, commit);
        outputs.clear();
        let mut outputs = Vec::new();
        acceptor.elected(&elected, &mut outputs);
        let Some(AcceptorOutput::Ack(ack)) = outputs.last() else { panic!("{outputs:?}") };
        assert_eq!(ack.flush_lsn, expected);
        assert!(acceptor.commit_lsn() == commit);
        assert_eq!(acceptor.invariants(), Ok(()));
    }
    // One that has the merged history and one that has not agree with each other.
    let ours = full.divergence(end, &elected.history, end, Lsn(8));
    assert_eq!((ours, elected.history.divergence(end, &full, end, Lsn(8))), (end, end));
    let mut behind = acceptor_of(1, Lsn(end.0 - 8), Lsn(8));
    let range = PeerRange {
        history: elected.history.clone(),
        commit_lsn: end,
        start: Lsn(end.0 - 8),
        length: 8,
    };
    let mut outputs = Vec::new();
    behind.peer_range(&range, &mut outputs);
    behind.flush(&mut outputs);
    assert_eq!((behind.flush_lsn(), behind.commit_lsn()), (end, end), "{outputs:?}");
}

fn member_of(node: u64, h: &TermHistory, flush: Lsn, commit: Lsn) -> Acceptor {
    let control = ControlState {
        term: Term(20_000),
        history: h.up_to(flush),
        commit_lsn: commit,
        ..ControlState::empty(Lsn(8), three())
    };
    Acceptor::restore(member(node), control, flush).unwrap()
}

fn elect_by(term: u64, votes: &[(u64, &Acceptor)]) -> Elected {
    use crate::{Proposer, ProposerOutput, Vote};
    let mut proposer = Proposer::new(ProposerId([1; 16]), three(), Term(term));
    let mut outputs = Vec::new();
    for (node, _) in votes {
        proposer.connected(member(*node), Term(term - 1), &mut outputs);
    }
    for (node, a) in votes {
        let vote = Vote {
            asked: Term(term),
            granted: true,
            term: Term(term),
            flush_lsn: a.flush_lsn(),
            commit_lsn: a.commit_lsn(),
            history: a.history().up_to(a.flush_lsn()),
        };
        proposer.vote(member(*node), vote, &mut outputs);
    }
    outputs
        .iter()
        .find_map(|o| match o {
            ProposerOutput::AnnounceElected(_, e) => Some(e.clone()),
            _ => None,
        })
        .unwrap()
}

#[test]
fn l12_what_ends_where_a_kept_entry_begins_is_not_merged() {
    // 8200 terms of 8 bytes. Committed on {2,3} up to the end of term 4105's predecessor; 3 alone has the rest.
    let n = 8200u64;
    let entries: Vec<(u64, u64)> = (1..=n).map(|t| (t, 8 * t)).collect();
    let full = history(&entries);
    // history.continued adds one: first kept index = 8201-4096 = 4105 -> lsn = 8*4106
    let k1 = Lsn(8 * 4106);
    let c = member_of(3, &full, Lsn(8 * n + 8), k1);
    let mut b = member_of(2, &full, k1, Lsn(8));
    let elected = elect_by(20_001, &[(2, &b), (3, &c)]);
    let mut outputs = Vec::new();
    b.elected(&elected, &mut outputs);
    assert_eq!(b.flush_lsn(), k1);
}

#[test]
fn l12_a_merged_history_that_shrank_shuts_nobody_out() {
    let n = 8200u64;
    let entries: Vec<(u64, u64)> = (1..=n).map(|t| (t, 8 * t)).collect();
    let full = history(&entries);
    let end = Lsn(8 * n + 8);
    // A lacks the last term's bytes, C has them, uncommitted.
    let mut a = member_of(1, &full, Lsn(8 * n), Lsn(8 * n));
    let c = member_of(3, &full, end, Lsn(8 * n));
    let merged = elect_by(20_001, &[(1, &a), (3, &c)]);
    let mut outputs = Vec::new();
    a.elected(&merged, &mut outputs);
    // C is gone; B is far behind, with a commit LSN.
    let mut b = member_of(2, &full, Lsn(8000), Lsn(8000));
    let next = elect_by(20_002, &[(1, &a), (2, &b)]);
    outputs.clear();
    b.elected(&next, &mut outputs);
    assert!(matches!(outputs.last(), Some(AcceptorOutput::Ack(_))));
}

#[test]
fn a_vote_leaves_nothing_of_a_record_that_has_only_begun() {
    let mut acceptor = following(1);
    appended(&mut acceptor, 1, 8, 24);
    let mut outputs = Vec::new();
    let begun = Append {
        term: Term(1),
        start: Lsn(24),
        length: 9,
        record_end: Lsn(24),
        commit_lsn: Lsn(8),
    };
    acceptor.append(&begun, &mut outputs);
    assert_eq!((acceptor.write_lsn(), acceptor.boundary_lsn()), (Lsn(33), Lsn(24)));
    outputs.clear();
    let request = VoteRequest {
        term: Term(2),
        proposer: ProposerId([2; 16]),
        configuration: acceptor.configuration().clone(),
    };
    acceptor.vote(&request, &mut outputs);
    // What may fail for want of space comes before anything is destroyed, and the vote last.
    let [sync, persist, cut, vote] = &outputs[..] else { panic!("{outputs:?}") };
    assert_eq!((sync, cut), (&AcceptorOutput::Sync, &AcceptorOutput::Truncate(Lsn(24))));
    assert!(matches!(persist, AcceptorOutput::Persist(state) if state.term == Term(2)));
    assert!(matches!(vote, AcceptorOutput::Vote(vote) if vote.flush_lsn == Lsn(24)));
    assert_eq!((acceptor.write_lsn(), acceptor.flush_lsn()), (Lsn(24), Lsn(24)));
}

#[test]
fn who_counts_nodes_is_given_a_vote_until_it_is_decided_who_they_are() {
    let nodes = [1, 2, 3].map(NodeId);
    let unknown = Configuration::unknown(&nodes).unwrap();
    let state = ControlState::empty(Lsn(8), unknown);
    let mut acceptor = Acceptor::restore(member(1), state, Lsn(8)).unwrap();
    let ask = |acceptor: &mut Acceptor, term: u64, proposer: u8, nodes: &[NodeId]| {
        let mut outputs = Vec::new();
        let asked = (Term(term), ProposerId([proposer; 16]));
        acceptor.vote_by_nodes(asked, nodes, &mut outputs);
        outputs.pop().unwrap()
    };
    let granted = |output: AcceptorOutput| match output {
        AcceptorOutput::Vote(vote) => vote.granted,
        other => panic!("{other:?}"),
    };
    let refused = |output: AcceptorOutput| match output {
        AcceptorOutput::Refuse(refusal) => refusal,
        other => panic!("{other:?}"),
    };
    assert!(granted(ask(&mut acceptor, 1, 1, &nodes)));
    assert!(!granted(ask(&mut acceptor, 1, 2, &nodes)));
    assert!(granted(ask(&mut acceptor, 1, 1, &nodes)));
    for others in [&nodes[..2], &[1, 2, 4].map(NodeId)] {
        let refusal = refused(ask(&mut acceptor, 2, 2, others));
        assert_eq!(refusal, Refusal::OtherMembers { number: 1 });
    }
    // Nor is it asked by who counts members: those are not known.
    let request = VoteRequest {
        term: Term(2),
        proposer: ProposerId([2; 16]),
        configuration: acceptor.configuration().clone(),
    };
    let mut outputs = Vec::new();
    acceptor.vote(&request, &mut outputs);
    assert_eq!(outputs, [AcceptorOutput::Refuse(Refusal::NotMember)]);
    acceptor.configure(&three(), &mut outputs);
    let refusal = refused(ask(&mut acceptor, 2, 2, &nodes));
    assert_eq!(refusal, Refusal::StaleConfiguration { current: 1 });
}

#[test]
fn l18_a_cut_makes_nothing_durable() {
    let mut acceptor = following(1);
    appended(&mut acceptor, 1, 8, 24);
    appended(&mut acceptor, 1, 24, 40);
    assert_eq!((acceptor.write_lsn(), acceptor.flush_lsn()), (Lsn(40), Lsn(8)));
    // Another member has the first record of term 1, and committed ones of term 2 after it.
    let range = PeerRange {
        history: history(&[(1, 8), (2, 24)]),
        commit_lsn: Lsn(56),
        start: Lsn(24),
        length: 16,
    };
    let mut outputs = Vec::new();
    acceptor.peer_range(&range, &mut outputs);
    assert!(outputs.contains(&AcceptorOutput::Truncate(Lsn(24))), "{outputs:?}");
    assert_eq!((acceptor.write_lsn(), acceptor.flush_lsn()), (Lsn(40), Lsn(8)));
    acceptor.peer_range(&PeerRange { start: Lsn(40), ..range }, &mut outputs);
    outputs.clear();
    acceptor.flush(&mut outputs);
    assert_eq!(outputs[0], AcceptorOutput::Sync);
    assert_eq!((acceptor.flush_lsn(), acceptor.commit_lsn()), (Lsn(56), Lsn(56)));
}
