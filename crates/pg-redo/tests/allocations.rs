//! Applying a piece allocates nothing, whatever the record: pages are rebuilt from thousands of them.
#![allow(clippy::expect_used)]

mod support;

#[path = "support/corpus.rs"]
mod corpus;

use corpus::read_all;
use pgstrata_ids::{Lsn, PAGE_SIZE};
use pgstrata_pg_redo::{Effect, Effects, apply_block};
use pgstrata_pg_wal::{DecodedRecord, Record};
use std::collections::BTreeMap;
use support::control;

#[test]
fn applying_a_piece_does_not_allocate() {
    let one = allocation_counter::measure(|| drop(std::hint::black_box(vec![1])));
    assert_eq!(one.count_total, 1, "allocations are not counted");
    let mut effects = Effects::new();
    let (mut pieces, mut allocating) = (0, BTreeMap::new());
    for case in read_all(include_bytes!("oracle_corpus.zst")) {
        let record = Record { lsn: Lsn(1 << 40), end: Lsn((1 << 40) + 8192), bytes: &case.record };
        let decoded = DecodedRecord::decode(record).expect("a record");
        effects.derive(&decoded, &mut control(case.version)).expect("a record that is known");
        for effect in &effects.items {
            let Effect::Block { rel, block, value, complete, .. } = *effect else { continue };
            let before = case.pages.iter().find(|page| (page.0, page.1) == (rel, block));
            if before.is_none() && !complete {
                continue;
            }
            let mut page = before.map_or([0; PAGE_SIZE], |(_, _, page)| **page);
            let value = effects.value(value);
            let mut applied = Ok(());
            let counted = allocation_counter::measure(|| {
                applied = apply_block(&mut page, value, block, decoded.end);
            });
            applied.expect("what PostgreSQL wrote");
            pieces += 1;
            if counted.count_total > 0 {
                let kind = (decoded.header.rmgr, decoded.header.opcode());
                *allocating.entry(kind).or_insert(0) += counted.count_total;
            }
        }
    }
    assert!(pieces > 1000, "{pieces} pieces");
    assert!(allocating.is_empty(), "resource manager, opcode: allocations: {allocating:?}");
}
