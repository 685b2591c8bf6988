use serde_json::json;

use super::*;

const TENANT: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";
const TIMELINE: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

fn key() -> Key {
    (TENANT.parse().unwrap(), TIMELINE.parse().unwrap())
}

fn group(nodes: &[u64]) -> Vec<Member> {
    nodes.iter().map(|&id| Member { id, incarnation: id.to_string() }).collect()
}

fn quorum(members: &[u64], incoming: &[u64]) -> Quorum {
    Quorum { number: 1, members: group(members), incoming: group(incoming) }
}

/// One that answers, in the life in which it is a member; with a copy, or without.
fn status(id: u64, has_copy: bool) -> Status {
    let damaged = json!({"tenant_id": TENANT, "timeline_id": TIMELINE, "error": "rot"});
    let mut status = Status { id, incarnation: id.to_string(), ..Default::default() };
    status.damaged.extend(has_copy.then(|| serde_json::from_value(damaged).unwrap()));
    status
}

/// Whether commands start them, who answers and has a copy, who answers and has none, who is silent, who is lost.
fn all(is_here: bool, has: &[u64], free: &[u64], silent: &[u64], lost: &[u64]) -> Safekeepers {
    let answering: Vec<Status> = has
        .iter()
        .map(|&id| status(id, true))
        .chain(free.iter().map(|&id| status(id, false)))
        .collect();
    let answering = answering.iter().map(|status| (status.id, Some(status), false));
    let silent = silent.iter().map(|&id| (id, None, false));
    let lost = lost.iter().map(|&id| (id, None, true));
    Safekeepers::new(is_here, answering.chain(silent).chain(lost))
}

fn said(safekeepers: &Safekeepers, members: &[u64], incoming: &[u64]) -> String {
    safekeepers.trouble(key(), &quorum(members, incoming)).unwrap_or_default()
}

#[test]
fn a_branch_with_as_many_members_as_it_should_have_is_not_told_of() {
    for (safekeepers, members) in [
        (all(true, &[1, 2, 3], &[], &[], &[]), &[1, 2, 3][..]),
        // Who is silent may have all of it.
        (all(true, &[1, 2], &[], &[3], &[]), &[1, 2, 3]),
        (all(true, &[1, 2, 3], &[4, 5], &[], &[]), &[1, 2, 3]),
        // There are no more.
        (all(true, &[1], &[], &[], &[]), &[1]),
        (all(true, &[1, 2], &[], &[], &[]), &[1, 2]),
        // Who is lost is none of its members.
        (all(true, &[1, 2, 3], &[], &[], &[4]), &[1, 2, 3]),
    ] {
        assert_eq!(said(&safekeepers, members, &[]), "");
    }
}

#[test]
fn a_branch_with_fewer_members_is_told_with_what_gives_it_more() {
    let alone = all(true, &[1], &[], &[3], &[2]);
    assert_eq!(
        said(&alone, &[1], &[]),
        "safekeeper 1 alone keeps it, of 3 that there are: run 'pgstrata safekeeper replace 2', then 'pgstrata safekeeper \
         replace 3'"
    );
    // One that was given up answers.
    let two = all(true, &[1, 3, 4], &[], &[], &[]);
    assert_eq!(
        said(&two, &[1, 4], &[]),
        "only safekeepers 1, 4 keep it, of 3 that there are: run 'pgstrata safekeeper replace 3'"
    );
    let spare = all(true, &[1, 2], &[3], &[], &[]);
    assert!(said(&spare, &[1, 2], &[]).ends_with("run 'pgstrata safekeeper add'"));
    // Elsewhere nobody is started, and those who have had it can't be members again.
    let elsewhere = all(false, &[1, 3], &[4, 5, 6], &[2], &[]);
    let text = said(&elsewhere, &[1], &[]);
    let expected = "run 'pgstrata safekeeper add --id 4', then 'pgstrata safekeeper add --id 5'";
    assert!(text.ends_with(expected), "{text}");
    let text = said(&all(false, &[1, 3], &[], &[2], &[]), &[1], &[]);
    assert!(text.ends_with("start one more, and run 'pgstrata safekeeper add --id ID'"), "{text}");
}

#[test]
fn members_that_are_lost_are_told() {
    let text = said(&all(true, &[1, 3], &[], &[], &[2]), &[1, 2, 3], &[]);
    assert_eq!(
        text,
        "of its members (1, 2, 3), safekeeper 2 has lost its directory: run 'pgstrata safekeeper replace 2'"
    );
    let text = said(&all(true, &[1], &[], &[], &[2, 3]), &[1, 2, 3], &[]);
    assert!(text.contains("no majority is left") && text.contains("quorum recover"), "{text}");
    // In another life than that in which it is a member.
    let mut renewed = status(2, false);
    renewed.incarnation = "another".to_owned();
    let others = [status(1, true), renewed, status(3, true)];
    let others = Safekeepers::new(false, others.iter().map(|one| (one.id, Some(one), false)));
    assert_eq!(
        said(&others, &[1, 2, 3], &[]),
        "of its members (1, 2, 3), safekeeper 2 has another directory than the member had: run 'pgstrata safekeeper replace 2'"
    );
    let text = said(&all(false, &[1, 3], &[], &[], &[]), &[1, 2, 3], &[]);
    assert!(
        text.contains("2 has not been heard of lately") && text.contains("--with ID"),
        "{text}"
    );
}

#[test]
fn a_change_that_is_under_way_is_told_with_what_goes_on() {
    let (here, elsewhere) = (all(true, &[], &[], &[], &[]), all(false, &[], &[], &[], &[]));
    for (before, after, on_here, on_elsewhere) in [
        (&[1, 2, 3][..], &[1, 3, 4][..], "replace 2", "replace 2 --with 4"),
        (&[1, 2], &[1, 2, 3], "add", "add --id 3"),
        (&[1, 2, 3], &[1, 3], "remove 2", "remove 2"),
    ] {
        for (safekeepers, command) in [(&here, on_here), (&elsewhere, on_elsewhere)] {
            let text = said(safekeepers, before, after);
            let command = format!("'pgstrata safekeeper {command}' goes on when it is given again");
            assert!(text.ends_with(&command), "{text}");
        }
    }
    // Nobody knows which command that was.
    assert!(said(&here, &[1, 2, 3], &[1, 4, 5]).contains("and that command goes on"));
    let mut renewed = quorum(&[1, 2, 3], &[1, 2, 3]);
    renewed.incoming[1].incarnation = "another".to_owned();
    let text = elsewhere.trouble(key(), &renewed).unwrap();
    assert!(text.contains("'pgstrata safekeeper replace 2' goes on"), "{text}");
}
