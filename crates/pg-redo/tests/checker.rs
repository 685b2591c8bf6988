//! The checker on records made by hand: what it compares, goes on from, counts and reports.
#![allow(clippy::expect_used)]

mod support;

use pgstrata_ids::{Fork, Lsn, PAGE_SIZE, RelTag};
use pgstrata_pg_redo::{
    Batch, Checker, Counts, Loaded, MemoryStore, Page, PageStore, Planner, Replayer, Report, page,
    partition,
};
use pgstrata_pg_wal::{PgVersion, Record};
use support::{Block, Fields, control, plain_record, record_bytes};

const HEAP: u8 = 10;
const XLOG: u8 = 0;
const INSERT: u8 = 0x00;
const LOCK: u8 = 0x60;
const FPI: u8 = 0xB0;

const REL: RelTag = RelTag { spc: 1663, db: 5, rel: 16384, fork: Fork::Main };
const MAP: RelTag = RelTag { fork: Fork::Visibility, ..REL };

/// An empty heap page.
fn empty() -> Page {
    let mut page = [0; PAGE_SIZE];
    page[12..20].copy_from_slice(&[24, 0, 0, 32, 0, 32, 4, 32]);
    page
}

/// With a tuple of one byte, inserted by transaction 700 as (3,1).
fn inserted() -> Page {
    let mut page = empty();
    (page[12], page[14], page[15]) = (28, 0xE0, 31);
    page[24..28].copy_from_slice(&(8160u32 | 1 << 15 | 25 << 17).to_le_bytes());
    page[8160..8164].copy_from_slice(&700u32.to_le_bytes());
    (page[8174], page[8176], page[8178]) = (3, 1, 1);
    (page[8181], page[8182], page[8184]) = (8, 24, 7);
    page
}

fn block(number: u32, image: Option<Page>) -> Block {
    // infomask2 1, infomask: xmax invalid, hoff 24; padding, then the byte.
    let data = vec![1, 0, 0, 8, 24, 0, 7];
    Block { id: 0, number, fork: 0, init: false, data, image }
}

/// The insertion of that tuple, with this image to compare with.
fn insert(image: Option<Page>) -> Vec<u8> {
    record_bytes(HEAP, INSERT, &[block(3, image)], &[1, 0, 0])
}

/// The flag "applied" of the first image of a record of one block.
fn applied(mut record: Vec<u8>) -> Vec<u8> {
    record[32] |= 2;
    record
}

fn store(pages: &[(RelTag, u32, Page)]) -> MemoryStore {
    let mut store = MemoryStore::default();
    for (rel, block, page) in pages {
        let Ok(()) = store.store(*rel, *block, page);
    }
    store
}

fn load(store: &mut impl PageStore, rel: RelTag, block: u32) -> (Option<Loaded>, Page) {
    let mut page = [0; PAGE_SIZE];
    (store.load(rel, block, &mut page).ok(), page)
}

fn checker(pages: &[(RelTag, u32, Page)], strict: bool) -> Checker<MemoryStore> {
    Checker::new(store(pages), control(PgVersion::V15), strict)
}

fn feed(checker: &mut Checker<MemoryStore>, at: u64, bytes: &[u8]) {
    let record = Record { lsn: Lsn(at), end: Lsn(at + 0x80), bytes };
    assert!(checker.feed(record).is_ok());
}

/// Records, compared, without a base, mismatches, pending, unsupported.
fn counts(report: &Report) -> [u64; 6] {
    [
        report.records,
        report.compared,
        report.without_base,
        report.mismatches,
        report.visibility_pending,
        report.unsupported,
    ]
}

fn at_lsn(mut page: Page, lsn: u64) -> Page {
    page::set_lsn(&mut page, Lsn(lsn));
    page
}

#[test]
fn a_page_goes_on_as_our_redo_left_it() {
    let mut checker = checker(&[(REL, 3, empty())], false);
    // The image has a hint that redo does not set (rule R11), and that the mask hides.
    let mut image = inserted();
    image[8181] |= 1;
    feed(&mut checker, 0x1000, &insert(Some(image)));
    assert_eq!(counts(&checker.report()), [1, 1, 0, 0, 0, 0]);
    let one = Counts { records: 1, compared: 1, restored: 0, mismatches: 0 };
    assert_eq!(checker.report().by_record(), [("Heap/INSERT".to_owned(), one)].into());
    let branches = [("blocks 0".to_owned(), one)].into();
    assert_eq!(checker.report().by_branch(), [("Heap/INSERT".to_owned(), branches)].into());
    let (loaded, page) = load(&mut checker.into_store(), REL, 3);
    assert_eq!(loaded, Some(Loaded::Page));
    assert!(page == at_lsn(inserted(), 0x1080));
}

#[test]
fn after_a_mismatch_a_page_goes_on_from_the_image() {
    let mut checker = checker(&[(REL, 3, empty())], false);
    let mut image = inserted();
    image[8184] = 8;
    feed(&mut checker, 0x1000, &insert(Some(image)));
    assert_eq!(counts(&checker.report()), [1, 1, 0, 1, 0, 0]);
    let one = Counts { records: 1, compared: 1, restored: 0, mismatches: 1 };
    assert_eq!(checker.report().by_record(), [("Heap/INSERT".to_owned(), one)].into());
    assert_eq!(
        checker.report().mismatch_list[0].to_string(),
        "Heap/INSERT at 0/1000, block reference 0, 1663/5/16384 block 3: line pointer 1: data: 1 bytes differ from \
         8184 to 8184; byte 8184 is 0x07, expected 0x08"
    );
    let (_, page) = load(&mut checker.into_store(), REL, 3);
    assert!(page == at_lsn(image, 0x1080));
}

#[test]
fn r9_a_change_that_does_not_apply_is_a_mismatch() {
    // The line pointer is in use.
    let mut checker = checker(&[(REL, 3, at_lsn(inserted(), 1))], false);
    feed(&mut checker, 0x1000, &insert(Some(inserted())));
    assert_eq!(counts(&checker.report()), [1, 0, 1, 1, 0, 0]);
    let text = checker.report().mismatch_list[0].difference.clone();
    assert_eq!(
        text,
        "Heap/INSERT ending at 0/1080 does not apply to block 3: the line pointer is in use"
    );
    let (_, page) = load(&mut checker.into_store(), REL, 3);
    assert!(page == at_lsn(inserted(), 0x1080));
}

#[test]
fn what_was_there_before_is_not_known_everywhere() {
    let mut checker = checker(&[], false);
    feed(&mut checker, 0x1000, &insert(None));
    assert_eq!(counts(&checker.report()), [1, 0, 1, 0, 0, 0]);
    assert_eq!(load(&mut checker.into_store(), REL, 3).0, Some(Loaded::Unknown));
    // With an image it is known from there on.
    let mut checker = self::checker(&[], false);
    feed(&mut checker, 0x1000, &insert(Some(inserted())));
    assert_eq!(counts(&checker.report()), [1, 0, 1, 0, 0, 0]);
    let (loaded, page) = load(&mut checker.into_store(), REL, 3);
    assert_eq!(loaded, Some(Loaded::Page));
    assert!(page == at_lsn(inserted(), 0x1080));
    // A page that is rebuilt from zeros needs none.
    let mut checker = self::checker(&[], false);
    let mut rebuilt = block(3, Some(inserted()));
    rebuilt.init = true;
    feed(&mut checker, 0x1000, &record_bytes(HEAP, INSERT | 0x80, &[rebuilt], &[1, 0, 0]));
    assert_eq!(counts(&checker.report()), [1, 1, 0, 0, 0, 0]);
}

#[test]
fn r2_a_page_that_has_the_change_is_left_alone() {
    for (lsn, compared) in [(0x1080, 0), (0x1081, 0), (0x107F, 1)] {
        let mut checker = checker(&[(REL, 3, at_lsn(empty(), lsn))], false);
        feed(&mut checker, 0x1000, &insert(Some(inserted())));
        assert_eq!(counts(&checker.report()), [1, compared, 0, 0, 0, 0], "{lsn:x}");
        let (_, page) = load(&mut checker.into_store(), REL, 3);
        assert_eq!(page::lsn(&page), Lsn(lsn.max(0x1080)));
        assert_eq!(page[12] == 28, compared == 1);
    }
}

#[test]
fn r3_an_image_that_is_applied_replaces_the_page() {
    let mut checker = checker(&[(REL, 3, at_lsn(empty(), 0x5000))], false);
    let mut image = inserted();
    image[8184] = 99;
    feed(&mut checker, 0x1000, &applied(insert(Some(image))));
    // There is nothing to compare with.
    assert_eq!(counts(&checker.report()), [1, 0, 0, 0, 0, 0]);
    let (_, page) = load(&mut checker.into_store(), REL, 3);
    assert!(page == at_lsn(image, 0x1080), "data beside it are not for redo");

    let mut checker = self::checker(&[(REL, 3, empty())], false);
    feed(&mut checker, 0x1000, &applied(insert(Some(image))));
    let restored = Counts { records: 1, compared: 0, restored: 1, mismatches: 0 };
    assert_eq!(checker.report().by_record(), [("Heap/INSERT".to_owned(), restored)].into());

    // An image of a page that was never initialised gets no LSN.
    let mut checker = self::checker(&[(REL, 3, empty())], false);
    let image = Block { data: Vec::new(), ..block(3, Some([0; PAGE_SIZE])) };
    feed(&mut checker, 0x1000, &applied(record_bytes(XLOG, FPI, &[image], &[])));
    assert!(load(&mut checker.into_store(), REL, 3).1 == [0; PAGE_SIZE]);
}

#[test]
fn blocks_that_are_only_looked_at_are_compared() {
    // Hash MOVE_PAGE_CONTENTS refers to the bucket's first page for its lock.
    let record = |image: Page| {
        let looked_at = Block { data: Vec::new(), ..block(3, Some(image)) };
        record_bytes(12, 0x70, &[looked_at], &[0, 0, 0])
    };
    let mut page = empty();
    page[16..18].copy_from_slice(&8176u16.to_le_bytes());
    page[14..16].copy_from_slice(&8176u16.to_le_bytes());
    page[8188] = 2;
    let mut checker = checker(&[(REL, 3, page)], false);
    feed(&mut checker, 0x1000, &record(page));
    assert_eq!(counts(&checker.report()), [1, 1, 0, 0, 0, 0]);
    let mut other = page;
    other[8176] = 1;
    feed(&mut checker, 0x2000, &record(other));
    assert_eq!(counts(&checker.report()), [2, 2, 0, 1, 0, 0]);
    let mut checker = self::checker(&[], false);
    feed(&mut checker, 0x1000, &record(page));
    assert_eq!(counts(&checker.report()), [1, 0, 1, 0, 0, 0]);
    // Nothing of free space maps is kept (rule R7).
    let mut checker = self::checker(&[], false);
    let map = Block { data: Vec::new(), fork: 1, ..block(3, Some(page)) };
    feed(&mut checker, 0x1000, &record_bytes(12, 0x70, &[map], &[0, 0, 0]));
    assert_eq!(counts(&checker.report()), [1, 0, 0, 0, 0, 0]);
}

#[test]
fn what_cannot_be_replayed_is_counted_and_told() {
    let mut checker = checker(&[], false);
    feed(&mut checker, 0x1000, &plain_record(130, 0, 700, None, &[]));
    feed(&mut checker, 0x2000, &plain_record(3, 0x20, 700, None, &[]));
    let report = checker.report();
    assert_eq!(counts(&report), [2, 0, 0, 0, 0, 2]);
    assert_eq!(report.unsupported_list.len(), 2);
    assert!(report.unsupported_list[0].starts_with("record at 0/1000 is of resource manager 130"));
    let names: Vec<_> = report.by_record().into_keys().collect();
    assert_eq!(names, ["CLOG/0x20", "custom130/0x00"]);
}

/// A map page with these bits for the first four heap blocks.
fn map(bits: u8) -> Page {
    let mut page = empty();
    page[24] = bits;
    page
}

/// A heap record that refers to the map page, as of 18.6.
fn lock(image: Option<Page>) -> Vec<u8> {
    let heap = Block { data: Vec::new(), ..block(3, None) };
    let map = Block { id: 1, data: Vec::new(), fork: 2, ..block(0, image) };
    record_bytes(HEAP, LOCK, &[heap, map], &[0, 0, 0, 0, 1, 0, 0, 1])
}

#[test]
fn bits_that_are_still_set_are_pending_only() {
    let run = |ours: u8, image: u8, strict: bool| {
        let mut checker = checker(&[(REL, 3, inserted()), (MAP, 0, map(ours))], strict);
        feed(&mut checker, 0x1000, &lock(Some(map(image))));
        let report = checker.report();
        let bits = load(&mut checker.into_store(), MAP, 0).1[24];
        (report.compared, report.mismatches, report.visibility_pending, bits)
    };
    // Block 3 loses all-frozen, the highest bit.
    assert_eq!(run(0xFF, 0x7F, true), (1, 0, 0, 0x7F));
    assert_eq!(run(0xFF, 0x7E, true), (1, 0, 1, 0x7F));
    assert_eq!(run(0xFE, 0x7F, true), (1, 1, 0, 0x7F), "a bit that is missing is a mistake");
    // PostgreSQL's own comparison takes the whole page for a hole.
    assert_eq!(run(0xFE, 0x7F, false), (1, 0, 0, 0x7E));
}

#[test]
fn hollow_maps_are_adopted_once() {
    // CREATE DATABASE copies a map by an image whose hole is all of its content.
    let mut hollow = record_bytes(
        XLOG,
        FPI,
        &[Block { data: Vec::new(), fork: 2, ..block(0, Some(empty())) }],
        &[],
    );
    // A length of 24 bytes, the hole behind them, "has a hole" and "applied".
    hollow[28..33].copy_from_slice(&[24, 0, 24, 0, 3]);
    hollow.truncate(hollow.len() - (PAGE_SIZE - 24));
    let length = hollow.len() as u32;
    hollow[0..4].copy_from_slice(&length.to_le_bytes());
    let mut checker = checker(&[(REL, 3, inserted())], true);
    feed(&mut checker, 0x1000, &hollow);
    assert_eq!(counts(&checker.report()), [1, 0, 0, 0, 0, 0]);
    feed(&mut checker, 0x2000, &lock(Some(map(0x15))));
    assert_eq!(counts(&checker.report()), [2, 1, 1, 0, 0, 0]);
    feed(&mut checker, 0x3000, &lock(Some(map(0x55))));
    assert_eq!(counts(&checker.report()), [3, 2, 1, 1, 0, 0]);
    // An image of all of a map hides nothing.
    let mut checker = self::checker(&[(REL, 3, inserted())], true);
    let whole = Block { data: Vec::new(), fork: 2, ..block(0, Some(empty())) };
    feed(&mut checker, 0x1000, &applied(record_bytes(XLOG, FPI, &[whole], &[])));
    feed(&mut checker, 0x2000, &lock(Some(map(0x15))));
    assert_eq!(counts(&checker.report()), [2, 1, 0, 1, 0, 0]);
}

#[test]
fn a_fuzzy_base_may_lack_pages_until_its_end() {
    let pages = [(REL, 3, [0; PAGE_SIZE])];
    let run = |fuzzy: bool, end: bool| {
        let mut planner = Planner::new(control(PgVersion::V15));
        let mut batch = Batch::new(1);
        let mut replayer = Replayer::new(store(&pages), false);
        if fuzzy {
            replayer = replayer.with_fuzzy_base();
        }
        assert!(batch.is_empty());
        if end {
            let bytes = plain_record(XLOG, 0x50, 0, None, &Fields::new().u64(64).0);
            let record = Record { lsn: Lsn(0x800), end: Lsn(0x880), bytes: &bytes };
            planner.feed(record, &mut batch).expect("a record");
        }
        let bytes = insert(None);
        let record = Record { lsn: Lsn(0x1000), end: Lsn(0x1080), bytes: &bytes };
        planner.feed(record, &mut batch).expect("a record");
        assert!(!batch.is_empty());
        let Ok(()) = replayer.run(&batch, 0);
        let Ok(()) = replayer.run(&batch, 1);
        (replayer.report().mismatches, replayer.report().without_base)
    };
    assert_eq!(run(false, false), (1, 1));
    assert_eq!(run(true, false), (0, 1));
    assert_eq!(run(true, true), (1, 1));
}

/// A store that knows that what it does not have does not exist.
struct Complete(MemoryStore);

impl PageStore for Complete {
    type Error = std::convert::Infallible;

    fn load(&mut self, rel: RelTag, block: u32, page: &mut Page) -> Result<Loaded, Self::Error> {
        let found = self.0.load(rel, block, page)?;
        Ok(if found == Loaded::Unknown { Loaded::Missing } else { found })
    }

    fn store(&mut self, rel: RelTag, block: u32, page: &Page) -> Result<(), Self::Error> {
        self.0.store(rel, block, page)
    }

    fn truncate(&mut self, rel: RelTag, blocks: u32) -> Result<(), Self::Error> {
        self.0.truncate(rel, blocks)
    }

    fn drop_relation(&mut self, spc: u32, db: u32, rel: u32) -> Result<(), Self::Error> {
        self.0.drop_relation(spc, db, rel)
    }

    fn drop_database(&mut self, spc: u32, db: u32) -> Result<(), Self::Error> {
        self.0.drop_database(spc, db)
    }

    fn copy_database(&mut self, from: (u32, u32), to: (u32, u32)) -> Result<(), Self::Error> {
        self.0.copy_database(from, to)
    }
}

#[test]
fn r9_map_pages_that_are_missing_come_into_being_unless_they_are_cut() {
    let run = |record: &[u8]| {
        let mut checker = Checker::new(Complete(store(&[])), control(PgVersion::V15), false);
        let record = Record { lsn: Lsn(0x1000), end: Lsn(0x1080), bytes: record };
        assert!(checker.feed(record).is_ok());
        let counts = counts(&checker.report());
        let mut store = checker.into_store();
        (counts, [(REL, 3), (MAP, 0)].map(|(rel, block)| load(&mut store, rel, block).0))
    };
    let (page, missing) = (Some(Loaded::Page), Some(Loaded::Missing));
    // A truncation clears the tail of a map page only if there is one.
    let cut = Fields::new().u32(5).u32(1663).u32(5).u32(16384).u32(2);
    let found = run(&plain_record(2, 0x20, 700, None, &cut.0));
    assert_eq!(found, ([1, 0, 0, 0, 0, 0], [missing, missing]));
    // A heap change's own page must be there; the map page need not.
    let found = run(&record_bytes(HEAP, INSERT, &[block(3, None)], &[1, 0, 1]));
    assert_eq!(found, ([1, 0, 1, 1, 0, 0], [missing, page]));
}

/// Tablespace, database, relation, fork, block.
type Place = (u32, u32, u32, Fork, u32);

#[test]
fn relations_and_databases_go_and_are_copied() {
    let pages: Vec<_> = [(1663, 5, 16384), (1663, 5, 16385), (1663, 6, 16384), (1664, 5, 16384)]
        .into_iter()
        .flat_map(|(spc, db, rel)| {
            let rel = RelTag { spc, db, rel, fork: Fork::Main };
            [(rel, 0, inserted()), (rel, 1, inserted()), (rel.with_fork(Fork::Init), 1, empty())]
        })
        .collect();
    let left = |record: &[u8]| -> Vec<Place> {
        let mut checker = checker(&pages, false);
        feed(&mut checker, 0x1000, record);
        let mut store = checker.into_store();
        let mut found = Vec::new();
        for (spc, db, rel) in [
            (1663, 5, 16384),
            (1663, 5, 16385),
            (1663, 6, 16384),
            (1664, 9, 16384),
            (1664, 9, 16385),
            (1664, 5, 16384),
        ] {
            for (fork, block) in [(Fork::Main, 0), (Fork::Main, 1), (Fork::Init, 1)] {
                let tag = RelTag { spc, db, rel, fork };
                if load(&mut store, tag, block).0 == Some(Loaded::Page) {
                    found.push((spc, db, rel, fork, block));
                }
            }
        }
        found
    };
    let all = left(&plain_record(XLOG, 0x20, 0, None, &[]));
    assert_eq!(all.len(), 12);
    let without = |gone: &dyn Fn(&Place) -> bool| -> Vec<_> {
        all.iter().copied().filter(|page| !gone(page)).collect()
    };
    let cut = Fields::new().u32(1).u32(1663).u32(5).u32(16384).u32(1);
    let found = left(&plain_record(2, 0x20, 700, None, &cut.0));
    assert_eq!(found, without(&|page| *page == (1663, 5, 16384, Fork::Main, 1)));
    let abort = Fields::new().u64(5).u32(4).u32(1).u32(1663).u32(5).u32(16384);
    let found = left(&plain_record(1, 0xA0, 700, None, &abort.0));
    assert_eq!(found, without(&|page| (page.0, page.1, page.2) == (1663, 5, 16384)));
    let drop = Fields::new().u32(5).u32(1).u32(1663);
    let found = left(&plain_record(4, 0x20, 700, None, &drop.0));
    assert_eq!(found, without(&|page| (page.0, page.1) == (1663, 5)));
    // A created database replaces what was there, and may be a copy.
    let create = Fields::new().u32(6).u32(1663);
    let found = left(&plain_record(4, 0x10, 700, None, &create.0));
    assert_eq!(found, without(&|page| (page.0, page.1) == (1663, 6)));
    let copy = Fields::new().u32(9).u32(1664).u32(5).u32(1663);
    let found = left(&plain_record(4, 0x00, 700, None, &copy.0));
    let copied: Vec<_> = found.iter().filter(|page| page.1 == 9).map(|page| page.2).collect();
    assert_eq!(copied, [16384, 16384, 16384, 16385, 16385, 16385]);
    assert_eq!(found.len(), 18);
}

#[test]
fn every_block_has_its_partition() {
    let other = RelTag { spc: 1, db: 2, ..REL };
    let mut used = [0; 4];
    for block in 0..1000 {
        let place = partition(REL, block, 4);
        assert_eq!(place, partition(other, block, 4), "a copied database's pages stay together");
        used[place] += 1;
        assert_eq!(partition(REL, block, 0), 0);
        assert_eq!(partition(REL, block, 1), 0);
    }
    assert!(used.iter().all(|count| (200..300).contains(count)), "{used:?}");
    // Relations and forks are spread too.
    let spread = |tag: &dyn Fn(u32) -> RelTag, count: u32| -> usize {
        let places: std::collections::BTreeSet<_> =
            (0..count).map(|at| partition(tag(at), 7, 1_000_003)).collect();
        places.len()
    };
    assert!(spread(&|at| RelTag { rel: 16384 + at, ..REL }, 100) > 90);
    let forks = [Fork::Main, Fork::FreeSpace, Fork::Visibility, Fork::Init];
    assert_eq!(spread(&|at| REL.with_fork(forks[at as usize]), 4), 4);

    // Steps go to their block's partition, and what is done to whole relations to all.
    let mut planner = Planner::new(control(PgVersion::V15));
    let mut batch = Batch::new(3);
    let bytes = insert(Some(inserted()));
    let record = Record { lsn: Lsn(0x1000), end: Lsn(0x1080), bytes: &bytes };
    planner.feed(record, &mut batch).expect("a record");
    assert!(batch.size() > PAGE_SIZE);
    let compared = |batch: &Batch, place: usize| {
        let mut replayer = Replayer::new(store(&[(REL, 3, empty())]), false);
        let Ok(()) = replayer.run(batch, place);
        replayer.report().compared
    };
    let place = partition(REL, 3, 3);
    for at in 0..3 {
        assert_eq!(compared(&batch, at), u64::from(at == place));
    }
    batch.clear();
    assert_eq!((batch.size(), batch.is_empty()), (0, true));
}

#[test]
fn reports_of_parts_add_up() {
    let mut all = Report::default();
    for at in 0..150u64 {
        let mut checker = checker(&[(REL, 3, empty())], false);
        let mut image = inserted();
        image[8184] = 8;
        // Later parts may be of earlier records.
        feed(&mut checker, 0x10_0000 - at * 0x1000, &insert(Some(image)));
        feed(&mut checker, 0x20_0000, &plain_record(130, 0, 700, None, &[]));
        all.merge(&checker.report());
    }
    assert_eq!(counts(&all), [300, 150, 0, 150, 0, 150]);
    assert_eq!((all.mismatch_list.len(), all.unsupported_list.len()), (100, 100));
    assert!(all.mismatch_list.is_sorted_by_key(|mismatch| mismatch.lsn));
    let sum = Counts { records: 150, compared: 150, restored: 0, mismatches: 150 };
    assert_eq!(all.by_record()["Heap/INSERT"], sum);

    // One part describes as many.
    let mut checker = checker(&[], false);
    for at in 0..101 {
        feed(&mut checker, 0x1000 + at * 0x100, &plain_record(130, 0, 700, None, &[]));
    }
    assert_eq!(checker.report().unsupported_list.len(), 100);
    let mut planner = Planner::new(control(PgVersion::V15));
    let mut batch = Batch::new(1);
    for _ in 0..101 {
        let bytes = plain_record(130, 0, 700, None, &[]);
        let record = Record { lsn: Lsn(0x1000), end: Lsn(0x1080), bytes: &bytes };
        planner.feed(record, &mut batch).expect("a record");
        let bytes = insert(None);
        let record = Record { lsn: Lsn(0x1000), end: Lsn(0x1080), bytes: &bytes };
        planner.feed(record, &mut batch).expect("a record");
    }
    assert_eq!(planner.report().unsupported_list.len(), 100);
    let mut replayer = Replayer::new(store(&[(REL, 3, at_lsn(inserted(), 1))]), false);
    let Ok(()) = replayer.run(&batch, 0);
    assert_eq!((replayer.report().mismatches, replayer.report().mismatch_list.len()), (101, 100));
    let mut pages = self::checker(&[(REL, 3, at_lsn(inserted(), 1))], false);
    for at in 0..101 {
        feed(&mut pages, 0x1000 + at * 0x100, &insert(None));
    }
    assert_eq!((pages.report().mismatch_list.len(), pages.report().mismatches), (100, 101));
}

#[test]
fn pending_bits_and_missing_bases_add_up_too() {
    let mut all = Report::default();
    for _ in 0..2 {
        let pages = [(REL, 3, inserted()), (MAP, 0, map(0xFF))];
        let mut checker = checker(&pages, true);
        feed(&mut checker, 0x1000, &lock(Some(map(0x7E))));
        feed(&mut checker, 0x2000, &record_bytes(HEAP, INSERT, &[block(4, None)], &[1, 0, 0]));
        all.merge(&checker.report());
    }
    assert_eq!(counts(&all), [4, 2, 2, 0, 2, 0]);
    let names: Vec<_> = all.by_record().into_keys().collect();
    assert_eq!(names, ["Heap/INSERT", "Heap/LOCK"]);
}

#[test]
fn gists_flag_of_deleted_tuples_is_not_compared() {
    // Minor versions differ in who sets it (4); only that is left out of the comparison.
    let mut before = empty();
    before[14..18].copy_from_slice(&[0xF0, 31, 0xF0, 31]);
    before[8188..8192].copy_from_slice(&[1, 0, 0x81, 0xFF]);
    let run = |image: Page, rmgr_info: u8| {
        let mut checker = checker(&[(REL, 3, before)], false);
        let block = Block { data: Vec::new(), ..block(3, Some(image)) };
        feed(&mut checker, 0x1000, &record_bytes(14, rmgr_info, &[block], &[0, 0, 0, 0, 0, 0]));
        let report = checker.report();
        (report.compared, report.mismatches, load(&mut checker.into_store(), REL, 3).1[8188])
    };
    assert_eq!(run(before, 0x10), (1, 0, 5));
    let mut other = before;
    other[8188] |= 2;
    assert_eq!(run(other, 0x10), (1, 1, 3));
    // PAGE_UPDATE that deletes nothing does not set it.
    let mut flagged = before;
    flagged[8188] |= 4;
    assert_eq!(run(flagged, 0x00), (1, 0, 1));
}
