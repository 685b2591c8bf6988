use super::*;

#[test]
fn those_who_are_silent_can_not_have_committed_alone() {
    for (listed, silent, expected) in [
        (3, 0, true),
        (3, 1, true),
        (3, 2, false),
        (1, 0, true),
        (1, 1, false),
        (2, 1, true),
        (4, 2, true),
        (4, 3, false),
        (5, 2, true),
        (5, 3, false),
        (0, 0, false),
    ] {
        assert_eq!(is_enough(listed, silent), expected, "{silent} of {listed}");
        // By what a quorum is: those who are silent are none.
        let incarnation = pgstrata_ids::Incarnation([1; 16]);
        let member = |node| pgstrata_ids::Member { node: NodeId(node), incarnation };
        let members: Vec<_> = (0..listed as u64).map(member).collect();
        if let Ok(configuration) = pgstrata_quorum::Configuration::new(1, members) {
            assert_eq!(!configuration.is_quorum(|member| member.node.0 < silent as u64), expected);
        }
    }
}

#[test]
fn all_are_asked_and_answer_in_their_order() {
    let all: Vec<u64> = (0..150).collect();
    let doubled = ask_each(&all, |one| one * 2);
    assert_eq!(doubled, (0..150).map(|one| one * 2).collect::<Vec<_>>());
}
