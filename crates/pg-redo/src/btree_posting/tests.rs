//! Posting lists of btrees by hand (nbtree.h: a posting tuple's block number is where its TIDs start, and its offset
//! their number with the bit 0x2000; both count only with the bit 0x2000 of `t_info`).
#![allow(clippy::unwrap_used)]

use super::*;

/// A TID of block 0.
fn tid(offset: u8) -> [u8; 6] {
    [0, 0, 0, 0, offset, 0]
}

/// A posting tuple with a key of 8 bytes, its TIDs numbered from 1.
fn posting_tuple(count: u8) -> Vec<u8> {
    let mut bytes = vec![0, 0, 16, 0, count, 0x20];
    let length = max_align(16 + usize::from(count) * 6);
    bytes.extend_from_slice(&(length as u16 | 0x2000).to_le_bytes());
    bytes.extend_from_slice(&[0xCC; 8]);
    (1..=count).for_each(|number| bytes.extend_from_slice(&tid(number)));
    bytes.resize(length, 0);
    bytes
}

/// A tuple with that key, for one TID.
fn plain_tuple(number: u8) -> Vec<u8> {
    let mut bytes = tid(number).to_vec();
    bytes.extend_from_slice(&[16, 0]);
    bytes.extend_from_slice(&[0xCC; 8]);
    bytes
}

fn reason<T>(step: Step<T>) -> &'static str {
    step.map(|_| ()).unwrap_err().0
}

#[test]
fn both_bits_make_a_posting_tuple() {
    assert_eq!(tids(&posting_tuple(3)).unwrap(), [tid(1), tid(2), tid(3)].concat());
    assert_eq!(tids(&plain_tuple(4)).unwrap(), tid(4));
    // A pivot tuple has the first bit only; an offset number that large is no count.
    let mut pivot = posting_tuple(3);
    pivot[5] = 0;
    assert_eq!(tids(&pivot).unwrap(), [0, 0, 16, 0, 3, 0]);
    let mut large = posting_tuple(3);
    large[7] = 0;
    assert_eq!(tids(&large).unwrap(), [0, 0, 16, 0, 3, 0x20]);
    // Other bits are no part of the count, nor do they make one.
    let mut flagged = posting_tuple(3);
    flagged[5] = 0xF0;
    assert_eq!(tids(&flagged).unwrap().len(), 18);
    flagged[5] = 0xD0;
    assert_eq!(tids(&flagged).unwrap().len(), 6);
    let mut cut = posting_tuple(3);
    cut.truncate(33);
    assert_eq!(reason(tids(&cut)), "a posting list is longer than its tuple");
    assert_eq!(tids(&posting_tuple(3)[..34]).unwrap().len(), 18);
}

#[test]
fn a_list_of_one_is_a_plain_tuple() {
    let list = |numbers: &[u8]| numbers.iter().flat_map(|number| tid(*number)).collect::<Vec<_>>();
    assert_eq!(form_posting(&plain_tuple(9), &list(&[1, 2])).unwrap().bytes(), posting_tuple(2));
    assert_eq!(form_posting(&posting_tuple(3), &list(&[1, 2])).unwrap().bytes(), posting_tuple(2));
    assert_eq!(form_posting(&posting_tuple(3), &list(&[7])).unwrap().bytes(), plain_tuple(7));
    let impossible = "a posting list has an impossible size";
    assert_eq!(reason(form_posting(&plain_tuple(9), &[])), impossible);
    // A tuple has at most 8191 bytes, which with alignment is 8184: 1361 TIDs behind this key.
    assert_eq!(form_posting(&plain_tuple(9), &[1; 1361 * 6]).unwrap().bytes().len(), 8184);
    assert_eq!(reason(form_posting(&plain_tuple(9), &[1; 1362 * 6])), impossible);
    let mut longest = plain_tuple(9);
    longest[6..8].copy_from_slice(&[0xFF, 0x1F]);
    longest.resize(8191, 0xCC);
    assert_eq!(form_posting(&longest, &tid(9)).unwrap().bytes(), longest);
    // Its key is at least the header, and within the tuple.
    let mut short = plain_tuple(9);
    short[6] = 7;
    assert_eq!(reason(form_posting(&short, &tid(1))), "an index tuple is too short");
    short[6] = 17;
    assert_eq!(reason(form_posting(&short, &tid(1))), "an index tuple is too short");
    let mut header = tid(9).to_vec();
    header.extend_from_slice(&[8, 0]);
    assert_eq!(form_posting(&header, &tid(1)).unwrap().bytes(), [0, 0, 0, 0, 1, 0, 8, 0]);
}

#[test]
fn tids_are_removed_by_their_indexes() {
    let removed = |indexes: &[u8]| {
        let indexes: Vec<u8> = indexes.iter().flat_map(|index| [*index, 0]).collect();
        remove_tids(&posting_tuple(4), &indexes)
    };
    let left = |indexes: &[u8]| tids(removed(indexes).unwrap().bytes()).unwrap().to_vec();
    assert_eq!(left(&[]), [tid(1), tid(2), tid(3), tid(4)].concat());
    assert_eq!(left(&[0, 3]), [tid(2), tid(3)].concat());
    assert_eq!(removed(&[0, 1, 3]).unwrap().bytes(), plain_tuple(3));
    let missing = "TIDs to remove are missing or out of order";
    assert_eq!(reason(removed(&[4])), missing);
    assert_eq!(reason(removed(&[1, 0])), missing);
    assert_eq!(reason(removed(&[0, 1, 2, 3])), "a posting list has an impossible size");
    let none = "the tuple to update has no posting list";
    assert_eq!(reason(remove_tids(&plain_tuple(1), &[])), none);
}

#[test]
fn a_new_tid_goes_into_the_list_and_the_last_one_out() {
    let swap = |at: usize| {
        let mut new = plain_tuple(9);
        let list = swap_posting(&mut new, &posting_tuple(3), at);
        list.map(|list| {
            (new[4], tids(list.bytes()).unwrap().iter().copied().step_by(6).count(), list)
        })
    };
    for (at, expected) in [(1, [1, 9, 2]), (2, [1, 2, 9])] {
        let (moved, count, list) = swap(at).unwrap();
        let numbers: Vec<u8> = tids(list.bytes()).unwrap().chunks(6).map(|tid| tid[4]).collect();
        assert_eq!((moved, count, numbers.as_slice()), (3, 3, &expected[..]));
        assert_eq!(list.bytes().len(), posting_tuple(3).len());
    }
    let there = "a posting list cannot be split there";
    assert_eq!(reason(swap(0)), there);
    assert_eq!(reason(swap(3)), there);
    assert_eq!(reason(swap(4)), there);
    assert_eq!(reason(swap_posting(&mut [0; 7], &posting_tuple(3), 1)), there);
    assert!(swap_posting(&mut [0; 8], &posting_tuple(3), 1).is_ok());
    let none = "the tuple to split has no posting list";
    assert_eq!(reason(swap_posting(&mut [0; 8], &plain_tuple(1), 1)), none);
    let longer = "a posting list is longer than its tuple";
    assert_eq!(reason(swap_posting(&mut [0; 8], &posting_tuple(3)[..33], 1)), longer);
}

#[test]
fn merged_lists_fit_a_page() {
    let mut list = TidList::new();
    list.push(&[7; 8190]).unwrap();
    list.push(&[8; 2]).unwrap();
    assert_eq!((list.bytes().len(), list.bytes()[8190]), (8192, 8));
    assert_eq!(reason(list.push(&[9])), "merged posting lists are longer than a page");
    list.clear();
    assert_eq!(list.bytes(), [0; 0]);
    let longer = "an index tuple is longer than a page";
    assert_eq!(NewTuple::copy(&[5; 8192]).unwrap().bytes().len(), 8192);
    assert_eq!(reason(NewTuple::copy(&[5; 8193])), longer);
}
