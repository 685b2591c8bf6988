//! What records imply outside of blocks: exact effects of records made by hand, field by field as PostgreSQL's headers
//! have them (access/xact.h, storage_xlog.h, commands/dbcommands_xlog.h, access/multixact.h, catalog/pg_control.h).
#![allow(clippy::expect_used)]

mod support;

use pgstrata_ids::{Fork, Lsn, RelTag, SlruKind};
use pgstrata_pg_redo::{Changed, ControlState, Effect, Effects, RedoError, ValueRange};
use pgstrata_pg_wal::{DecodedRecord, PgVersion, Record};
use support::{Fields, control, plain_record};

const XLOG: u8 = 0;
const XACT: u8 = 1;
const SMGR: u8 = 2;
const CLOG: u8 = 3;
const DATABASE: u8 = 4;
const TABLESPACE: u8 = 5;
const MULTIXACT: u8 = 6;
const RELMAP: u8 = 7;
const COMMIT_TS: u8 = 18;
const ORIGIN: u8 = 19;

const START: Lsn = Lsn(0x1000);
const END: Lsn = Lsn(0x1080);

/// Effects with their values beside them, as far as they have one.
type Told = Vec<(Effect, Vec<u8>)>;

/// Stands for any range of values: they are compared by content.
const ANY: ValueRange = ValueRange { start: 0, end: 0 };

fn told(effects: &Effects) -> Told {
    let tell = |effect: &Effect| {
        let mut effect = *effect;
        let value = match &mut effect {
            Effect::Block { value, .. }
            | Effect::SlruPage { value, .. }
            | Effect::TablespaceCreate { path: value, .. }
            | Effect::RelMap { file: value, .. }
            | Effect::TwoPhasePut { file: value, .. }
            | Effect::RestorePoint { name: value, .. } => std::mem::replace(value, ANY),
            _ => return (effect, Vec::new()),
        };
        (effect, effects.value(value).to_vec())
    };
    effects.items.iter().map(tell).collect()
}

fn derive_bytes(bytes: &[u8], state: &mut ControlState) -> Result<Told, RedoError> {
    let record = Record { lsn: START, end: END, bytes };
    let decoded = DecodedRecord::decode(record).expect("well formed");
    let mut effects = Effects::new();
    effects.derive(&decoded, state)?;
    Ok(told(&effects))
}

fn derive(
    version: PgVersion,
    (rmgr, info): (u8, u8),
    main: Fields,
) -> (Result<Told, RedoError>, ControlState) {
    let mut state = control(version);
    let told = derive_bytes(&plain_record(rmgr, info, 700, None, &main.0), &mut state);
    (told, state)
}

fn items(version: PgVersion, kind: (u8, u8), main: Fields) -> Told {
    derive(version, kind, main).0.expect("known and well formed")
}

fn reason(version: PgVersion, kind: (u8, u8), main: Fields) -> &'static str {
    match derive(version, kind, main).0 {
        Err(RedoError::Record { reason, lsn, .. }) => {
            assert_eq!(lsn, START);
            reason
        }
        other => panic!("{other:?}"),
    }
}

fn slru(kind: SlruKind, page: u64, complete: bool, value: Fields) -> (Effect, Vec<u8>) {
    (Effect::SlruPage { kind, page, value: ANY, complete }, value.0)
}

fn plain(effect: Effect) -> (Effect, Vec<u8>) {
    (effect, Vec::new())
}

const COUNTERS: Effect = Effect::Control(Changed::Counters);
const FULL: Effect = Effect::Control(Changed::Full);
const CUT_OFF: &str = "the record's data ends too early";

fn main_fork() -> RelTag {
    RelTag { spc: 1663, db: 5, rel: 16384, fork: Fork::Main }
}

#[test]
fn a_commit_with_all_its_parts() {
    for version in PgVersion::ALL {
        let dropped_statistics = if version == PgVersion::V18 { 16 } else { 12 };
        let main = Fields::new()
            .u64(5)
            .u32(1 | 2 | 4 | 8 | 32 | 64 | 256)
            .u32(5)
            .u32(1663)
            .u32(2)
            .u32(701)
            .u32(702)
            .u32(2)
            .u32(1663)
            .u32(5)
            .u32(16384)
            .u32(1664)
            .u32(6)
            .u32(16385)
            .u32(1)
            .bytes(&vec![0xEE; dropped_statistics])
            .u32(1)
            .bytes(&[0xEE; 16])
            .u64(0x1234)
            .u64(77);
        let mut state = control(version);
        let bytes = plain_record(XACT, 0x80, 700, Some(9), &main.0);
        let found = derive_bytes(&bytes, &mut state).expect("a commit");
        let expected = vec![
            slru(SlruKind::Clog, 0, false, Fields::new().u8(2).u8(1).u16(700).u16(701).u16(702)),
            slru(
                SlruKind::CommitTs,
                0,
                false,
                Fields::new().u8(6).u64(77).u16(9).u16(700).u16(701).u16(702),
            ),
            plain(Effect::Commit { xid: 700, time: 5 }),
            plain(Effect::OriginProgress {
                node: 9,
                remote_lsn: Lsn(0x1234),
                local_lsn: END,
                force: false,
            }),
            plain(Effect::RelDrop { spc: 1663, db: 5, rel: 16384 }),
            plain(Effect::RelDrop { spc: 1664, db: 6, rel: 16385 }),
            plain(COUNTERS),
        ];
        assert_eq!(found, expected, "{version:?}");
        assert_eq!(state.newest_commit_ts_xid, 702);
    }
}

#[test]
fn a_commit_without_flags_has_no_parts() {
    // What looks like flags is the time.
    let main = Fields::new().u64(0x0000_0002_0000_0000);
    let mut state = control(PgVersion::V17);
    state.control.track_commit_timestamp = false;
    let bytes = plain_record(XACT, 0x00, 700, None, &main.0);
    let expected = vec![
        slru(SlruKind::Clog, 0, false, Fields::new().u8(2).u8(1).u16(700)),
        plain(Effect::Commit { xid: 700, time: 0x2_0000_0000 }),
    ];
    assert_eq!(derive_bytes(&bytes, &mut state), Ok(expected));
    assert_eq!(state.newest_commit_ts_xid, 0, "commit timestamps are off");
}

#[test]
fn subtransactions_of_several_pages_give_a_value_per_page() {
    // 32768 transactions per page of pg_xact, 819 per page of pg_commit_ts; subtransactions come in any order.
    let main = Fields::new().u64(5).u32(2).u32(3).u32(32_769).u32(32_768).u32(65_536);
    let mut state = control(PgVersion::V15);
    let bytes = plain_record(XACT, 0xA0, 32_767, None, &main.0);
    let status = |indexes: &[u16]| {
        indexes.iter().fold(Fields::new().u8(2).u8(2), |fields, index| fields.u16(*index))
    };
    let expected = vec![
        slru(SlruKind::Clog, 0, false, status(&[32_767])),
        slru(SlruKind::Clog, 1, false, status(&[0, 1])),
        slru(SlruKind::Clog, 2, false, status(&[0])),
        plain(COUNTERS),
    ];
    assert_eq!(derive_bytes(&bytes, &mut state), Ok(expected));
    assert_eq!(state.next_xid, 65_537);

    let main = Fields::new().u64(5).u32(2).u32(2).u32(820).u32(819);
    let bytes = plain_record(XACT, 0x80, 818, None, &main.0);
    let found = derive_bytes(&bytes, &mut control(PgVersion::V15)).expect("a commit");
    let time = || Fields::new().u8(6).u64(5).u16(0);
    assert_eq!(found[1], slru(SlruKind::CommitTs, 0, false, time().u16(818)));
    assert_eq!(found[2], slru(SlruKind::CommitTs, 1, false, time().u16(0).u16(1)));
}

#[test]
fn subtransactions_of_one_page_keep_their_order() {
    let main = Fields::new().u64(5).u32(2).u32(2).u32(40_001).u32(39_999);
    let bytes = plain_record(XACT, 0xA0, 40_000, None, &main.0);
    let found = derive_bytes(&bytes, &mut control(PgVersion::V15)).expect("an abort");
    let value = Fields::new().u8(2).u8(2).u16(7_232).u16(7_233).u16(7_231);
    assert_eq!(found[0], slru(SlruKind::Clog, 1, false, value));
}

#[test]
fn the_end_of_a_prepared_transaction_is_its_own() {
    let main = || Fields::new().u64(5).u32(16 | 32 | 128).u32(650).bytes(b"ab\0").u64(0x99).u64(3);
    let mut state = control(PgVersion::V16);
    state.next_xid = 7 << 32 | 1000;
    let bytes = plain_record(XACT, 0xB0, 0, Some(4), &main().0);
    let progress =
        Effect::OriginProgress { node: 4, remote_lsn: Lsn(0x99), local_lsn: END, force: false };
    let expected = vec![
        slru(SlruKind::Clog, 0, false, Fields::new().u8(2).u8(1).u16(650)),
        slru(SlruKind::CommitTs, 0, false, Fields::new().u8(6).u64(3).u16(4).u16(650)),
        plain(Effect::Commit { xid: 650, time: 5 }),
        plain(progress),
        plain(Effect::TwoPhaseRemove { full_xid: 7 << 32 | 650 }),
        plain(COUNTERS),
    ];
    assert_eq!(derive_bytes(&bytes, &mut state), Ok(expected));

    let bytes = plain_record(XACT, 0xC0, 0, Some(4), &main().0);
    let expected = vec![
        slru(SlruKind::Clog, 0, false, Fields::new().u8(2).u8(2).u16(650)),
        plain(progress),
        plain(Effect::TwoPhaseRemove { full_xid: 650 }),
    ];
    assert_eq!(derive_bytes(&bytes, &mut control(PgVersion::V16)), Ok(expected));
}

#[test]
fn malformed_ends_of_transactions_are_refused() {
    let version = PgVersion::V18;
    let unnamed = "the end of a prepared transaction does not name it";
    assert_eq!(reason(version, (XACT, 0x30), Fields::new().u64(5)), unnamed);
    assert_eq!(reason(version, (XACT, 0xC0), Fields::new().u64(5).u32(0)), unnamed);
    let endless = Fields::new().u64(5).u32(16 | 128).u32(650).bytes(b"ab");
    assert_eq!(reason(version, (XACT, 0xB0), endless), "a transaction's name has no end");
    let short = |count: u32| Fields::new().u64(5).u32(2).u32(count).u32(701);
    assert_eq!(reason(version, (XACT, 0x80), short(2)), CUT_OFF);
    assert!(derive(version, (XACT, 0x80), short(1)).0.is_ok());
    assert_eq!(reason(version, (XACT, 0x80), Fields::new().u64(5).bytes(&[0; 3])), CUT_OFF);
}

#[test]
fn an_abort_has_no_invalidations() {
    // The bit is of commits; what follows here is the origin.
    let main = Fields::new().u64(5).u32(8 | 32).u64(0x99).u64(3);
    let found = items(PgVersion::V17, (XACT, 0xA0), main);
    let expected =
        Effect::OriginProgress { node: 0, remote_lsn: Lsn(0x99), local_lsn: END, force: false };
    assert_eq!(found[1], plain(expected));
}

/// `xl_xact_prepare` with a name of `gid` bytes, then subtransactions.
fn prepare(gid: usize, subxids: &[u32]) -> Vec<u8> {
    let mut main = Fields::new()
        .u32(0x57F9_4534)
        .u32(0)
        .u32(699)
        .u32(5)
        .u64(3)
        .u32(10)
        .u32(subxids.len() as u32)
        .bytes(&[0; 22])
        .u16(gid as u16)
        .u64(0x77)
        .u64(0)
        .bytes(&vec![b'g'; gid.next_multiple_of(8)]);
    for subxid in subxids {
        main = main.u32(*subxid);
    }
    main.0
}

#[test]
fn a_prepared_transaction_is_its_file() {
    let main = prepare(9, &[1500, 1400]);
    let mut file = main.clone();
    file.extend_from_slice(&crc32c::crc32c(&main).to_le_bytes());
    let put = |full_xid| (Effect::TwoPhasePut { full_xid, file: ANY }, file.clone());
    let mut state = control(PgVersion::V15);
    let found = derive_bytes(&plain_record(XACT, 0x10, 699, None, &main), &mut state);
    assert_eq!(found, Ok(vec![put(699), plain(COUNTERS)]));
    assert_eq!(state.next_xid, 1501);

    // An origin's progress is known by the record's origin alone; 0 is none.
    let mut state = control(PgVersion::V15);
    let found = derive_bytes(&plain_record(XACT, 0x10, 699, Some(0), &main), &mut state);
    assert_eq!(found.map(|items| items.len()), Ok(2));
    let found = derive_bytes(&plain_record(XACT, 0x10, 699, Some(6), &main), &mut state);
    let progress =
        Effect::OriginProgress { node: 6, remote_lsn: Lsn(0x77), local_lsn: END, force: false };
    assert_eq!(found, Ok(vec![put(699), plain(progress)]));

    let cut = Fields(main[..main.len() - 1].to_vec());
    assert_eq!(reason(PgVersion::V15, (XACT, 0x10), cut), CUT_OFF);
    assert_eq!(reason(PgVersion::V15, (XACT, 0x10), Fields(main[..71].to_vec())), CUT_OFF);
}

#[test]
fn assignments_and_invalidations_imply_nothing() {
    for opcode in [0x50, 0x60] {
        assert_eq!(items(PgVersion::V17, (XACT, opcode), Fields::new().u32(700).u32(0)), vec![]);
    }
}

#[test]
fn r7_a_free_space_map_is_not_created() {
    let create = |fork: u32| Fields::new().u32(1663).u32(5).u32(16384).u32(fork);
    for (fork, number) in [(Fork::Main, 0), (Fork::Visibility, 2), (Fork::Init, 3)] {
        let found = items(PgVersion::V17, (SMGR, 0x10), create(number));
        assert_eq!(found, vec![plain(Effect::RelCreate { rel: main_fork().with_fork(fork) })]);
    }
    assert_eq!(items(PgVersion::V17, (SMGR, 0x10), create(1)), vec![]);
    for unknown in [4, 256, u32::MAX] {
        assert_eq!(reason(PgVersion::V17, (SMGR, 0x10), create(unknown)), "unknown fork");
    }
}

#[test]
fn r6_a_truncation_cuts_the_visibility_map_too() {
    let truncate = |blocks: u32, flags: u32| {
        let main = Fields::new().u32(blocks).u32(1663).u32(5).u32(16384).u32(flags);
        items(PgVersion::V17, (SMGR, 0x20), main)
    };
    let map = main_fork().with_fork(Fork::Visibility);
    let heap = |blocks| plain(Effect::RelTruncate { rel: main_fork(), blocks });
    let maps = |blocks| plain(Effect::RelTruncate { rel: map, blocks });
    // 40000 is 7328 blocks into the second page of the map.
    let tail = Effect::Block { rel: map, block: 1, value: ANY, complete: false, extends: false };
    let tail = (tail, Fields::new().u8(5).u16(7_328).0);
    assert_eq!(truncate(40_000, 7), vec![heap(40_000), tail.clone(), maps(2)]);
    assert_eq!(truncate(40_000, 2), vec![tail, maps(2)]);
    assert_eq!(truncate(40_000, 1), vec![heap(40_000)]);
    assert_eq!(truncate(40_000, 4), vec![]);
    assert_eq!(truncate(2 * 32_672, 7), vec![heap(2 * 32_672), maps(2)], "at a page's start");
    assert_eq!(truncate(0, 2), vec![maps(0)]);
}

#[test]
fn databases_and_tablespaces() {
    let version = PgVersion::V16;
    let copy = Fields::new().u32(16390).u32(1663).u32(4).u32(1665);
    let created = |copy_from| plain(Effect::DatabaseCreate { spc: 1663, db: 16390, copy_from });
    assert_eq!(items(version, (DATABASE, 0x00), copy), vec![created(Some((1665, 4)))]);
    let logged = Fields::new().u32(16390).u32(1663);
    assert_eq!(items(version, (DATABASE, 0x10), logged), vec![created(None)]);
    let dropped = Fields::new().u32(16390).u32(2).u32(1663).u32(16400);
    let drop = |spc| plain(Effect::DatabaseDrop { spc, db: 16390 });
    assert_eq!(items(version, (DATABASE, 0x20), dropped), vec![drop(1663), drop(16400)]);

    let create = Fields::new().u32(16400).bytes(b"/srv/a\0");
    let made = Effect::TablespaceCreate { oid: 16400, path: ANY };
    assert_eq!(items(version, (TABLESPACE, 0x00), create), vec![(made, b"/srv/a".to_vec())]);
    let drop = items(version, (TABLESPACE, 0x10), Fields::new().u32(16400));
    assert_eq!(drop, vec![plain(Effect::TablespaceDrop { oid: 16400 })]);
}

#[test]
fn a_relation_map_gets_its_checksum() {
    for (version, size, crc_at) in [(PgVersion::V15, 512, 504), (PgVersion::V16, 524, 520)] {
        let file: Vec<u8> = (0..size).map(|at| at as u8).collect();
        let main = Fields::new().u32(5).u32(1663).u32(size as u32).bytes(&file);
        let mut expected = file.clone();
        let crc = crc32c::crc32c(&file[..crc_at]);
        expected[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        let map = Effect::RelMap { spc: 1663, db: 5, file: ANY };
        assert_eq!(items(version, (RELMAP, 0x00), main), vec![(map, expected)]);
        let main = Fields::new().u32(5).u32(1663).u32(size as u32 - 4).bytes(&file);
        let wrong = "the relation map has a wrong size";
        assert_eq!(reason(version, (RELMAP, 0x00), main), wrong);
    }
}

#[test]
fn slru_pages_are_zeroed_and_cut_by_number() {
    // Page numbers have four bytes before 17, and eight since.
    let page = |version: PgVersion, page: u32| match version {
        PgVersion::V15 | PgVersion::V16 => Fields::new().u32(page),
        _ => Fields::new().u64(u64::from(page)),
    };
    for version in PgVersion::ALL {
        for (rmgr, kind) in [(CLOG, SlruKind::Clog), (COMMIT_TS, SlruKind::CommitTs)] {
            let found = items(version, (rmgr, 0x00), page(version, 70));
            assert_eq!(found, vec![slru(kind, 70, true, Fields::new().u8(1))]);
            let found = items(version, (rmgr, 0x10), page(version, 70).u32(2_400_000).u32(1));
            assert_eq!(found[0], plain(Effect::SlruTruncate { kind, cutoff_page: 70 }));
        }
        let members = items(version, (MULTIXACT, 0x10), page(version, 3));
        let zeroed = slru(SlruKind::MultiXactMembers, 3, true, Fields::new().u8(1));
        assert_eq!(members, vec![zeroed, plain(COUNTERS)]);
    }
}

/// `xl_multixact_create`.
fn create(multi: u32, offset: u32, members: &[(u32, u32)]) -> Fields {
    let fields = Fields::new().u32(multi).u32(offset).u32(members.len() as u32);
    members.iter().fold(fields, |fields, (xid, status)| fields.u32(*xid).u32(*status))
}

fn offsets(page: u64, zero: bool, entries: &[(u16, u32)]) -> (Effect, Vec<u8>) {
    let start = Fields::new().u8(if zero { 4 } else { 3 });
    let fields = entries.iter().fold(start, |fields, (index, to)| fields.u16(*index).u32(*to));
    slru(SlruKind::MultiXactOffsets, page, zero, fields)
}

fn members(page: u64, entries: &[(u16, u8, u32)]) -> (Effect, Vec<u8>) {
    let add = |fields: Fields, (index, status, xid): &(u16, u8, u32)| {
        fields.u16(*index).u8(*status).u32(*xid)
    };
    let fields = entries.iter().fold(Fields::new().u8(5), add);
    slru(SlruKind::MultiXactMembers, page, false, fields)
}

fn feed(state: &mut ControlState, info: u8, main: Fields) -> Told {
    let bytes = plain_record(MULTIXACT, info, 700, None, &main.0);
    derive_bytes(&bytes, state).expect("a multixact record")
}

#[test]
fn a_multixact_sets_its_offset_and_the_next_ones() {
    // 2048 offsets and 1636 members per page.
    let mut state = control(PgVersion::V15);
    let found = feed(&mut state, 0x20, create(5, 1635, &[(700, 0), (701, 5), (702, 1)]));
    let expected = vec![
        offsets(0, false, &[(5, 1635), (6, 1638)]),
        members(0, &[(1635, 0, 700)]),
        members(1, &[(0, 5, 701), (1, 1, 702)]),
        plain(COUNTERS),
    ];
    assert_eq!(found, expected);
    assert_eq!((state.next_multi, state.next_multi_offset), (6, 1638));

    let bad = "a multixact member has an unknown status";
    assert_eq!(reason(PgVersion::V15, (MULTIXACT, 0x20), create(5, 1, &[(700, 6)])), bad);
    let cut = Fields(create(5, 1, &[(700, 0)]).0[..19].to_vec());
    assert_eq!(reason(PgVersion::V15, (MULTIXACT, 0x20), cut), CUT_OFF);
}

#[test]
fn offset_zero_and_multixact_zero_are_skipped() {
    let mut state = control(PgVersion::V15);
    // The next offset would be 0, which means "not set": PostgreSQL goes on with 1.
    let found = feed(&mut state, 0x20, create(5, u32::MAX, &[(700, 0)]));
    assert_eq!(found[0], offsets(0, false, &[(5, u32::MAX), (6, 1)]));
    // The multixact behind the last one is 1; page 0 is another page, and already there.
    let found = feed(&mut state, 0x20, create(u32::MAX, 7, &[(700, 0)]));
    assert_eq!(found[0], offsets(2_097_151, false, &[(2047, 7)]));
    assert_eq!(found[1], offsets(0, false, &[(1, 8)]));
}

#[test]
fn the_next_page_of_offsets_is_initialised_early_and_once() {
    let mut state = control(PgVersion::V15);
    let last = |state: &mut ControlState| feed(state, 0x20, create(2047, 9, &[(700, 0)]));
    // WAL of older minor versions: the page's own record comes after the multixact that reaches it.
    let found = last(&mut state);
    assert_eq!(found[0], offsets(0, false, &[(2047, 9)]));
    assert_eq!(found[1], offsets(1, true, &[(0, 10)]));
    assert_eq!(feed(&mut state, 0x00, Fields::new().u32(1)), vec![plain(COUNTERS)]);
    // Another one for the page is not skipped.
    let zeroed = slru(SlruKind::MultiXactOffsets, 1, true, Fields::new().u8(1));
    assert_eq!(feed(&mut state, 0x00, Fields::new().u32(1))[0], zeroed);

    // WAL of newer ones: the page was initialised before.
    let mut state = control(PgVersion::V15);
    assert_eq!(feed(&mut state, 0x00, Fields::new().u32(1))[0], zeroed);
    assert_eq!(last(&mut state)[1], offsets(1, false, &[(0, 10)]));
    // A multixact in between ends the wait for the page's record.
    let mut state = control(PgVersion::V15);
    last(&mut state);
    feed(&mut state, 0x20, create(2048, 10, &[(700, 0)]));
    assert_eq!(feed(&mut state, 0x00, Fields::new().u32(1))[0], zeroed);
}

#[test]
fn a_truncation_of_multixacts_keeps_the_page_before_the_oldest() {
    let truncate = |end_multi: u32, members: (u32, u32)| {
        let main = Fields::new().u32(5).u32(1).u32(end_multi).u32(members.0).u32(members.1);
        items(PgVersion::V17, (MULTIXACT, 0x30), main)
    };
    let removed = |first_page, end_page| {
        plain(Effect::SlruRemove {
            kind: SlruKind::MultiXactMembers,
            first_page,
            end_page,
            max_page: 2_625_285,
        })
    };
    let cut =
        |cutoff_page| plain(Effect::SlruTruncate { kind: SlruKind::MultiXactOffsets, cutoff_page });
    let found = truncate(2048, (1636, 8180));
    assert_eq!(found, vec![removed(1, 5), cut(0), plain(FULL)]);
    assert_eq!(truncate(2049, (1635, 8179)), vec![removed(0, 4), cut(1), plain(FULL)]);
    // Before multixact 1 is the last one.
    assert_eq!(truncate(1, (0, 0))[1], cut(2_097_151));
}

/// `xl_parameter_change` that changes nothing but whether commits are timestamped.
fn parameters(track: u8) -> Fields {
    Fields::new().u32(100).u32(8).u32(10).u32(0).u32(64).u32(1).u8(0).u8(track)
}

#[test]
fn commit_timestamps_are_switched_on_and_off() {
    let mut state = control(PgVersion::V17);
    state.next_xid = 2000;
    let change = |state: &mut ControlState, track| {
        derive_bytes(&plain_record(XLOG, 0x60, 0, None, &parameters(track).0), state)
            .expect("parameters")
    };
    assert_eq!(change(&mut state, 1), vec![plain(FULL)], "as before");
    let cleared = plain(Effect::SlruClear { kind: SlruKind::CommitTs });
    assert_eq!(change(&mut state, 0), vec![cleared, plain(FULL)]);
    assert_eq!(change(&mut state, 0), vec![plain(FULL)]);
    // 2000 is on the page of 1638 to 2456. A value without entries makes the page exist.
    let page = slru(SlruKind::CommitTs, 2, false, Fields::new().u8(6).u64(0).u16(0));
    assert_eq!(change(&mut state, 1), vec![page, plain(FULL)]);
    assert_eq!((state.oldest_commit_ts_xid, state.newest_commit_ts_xid), (2000, 2000));
}

#[test]
fn restore_points_and_ends_of_backups() {
    let main = Fields::new().u64(99).bytes(b"before\0\0rest");
    let point = Effect::RestorePoint { time: 99, name: ANY };
    assert_eq!(items(PgVersion::V17, (XLOG, 0x70), main), vec![(point, b"before".to_vec())]);
    let found = items(PgVersion::V17, (XLOG, 0x50), Fields::new().u64(0x8000));
    assert_eq!(found, vec![plain(Effect::BackupEnd { start: Lsn(0x8000) })]);
    assert_eq!(items(PgVersion::V17, (XLOG, 0x20), Fields::new()), vec![]);
}

#[test]
fn origins_advance_and_go() {
    let set = |force: &[u8]| {
        items(PgVersion::V17, (ORIGIN, 0x00), Fields::new().u64(0x500).u16(3).bytes(force))
    };
    let progress = |force| {
        plain(Effect::OriginProgress { node: 3, remote_lsn: Lsn(0x500), local_lsn: END, force })
    };
    assert_eq!(set(&[1]), vec![progress(true)]);
    assert_eq!(set(&[0]), vec![progress(false)]);
    assert_eq!(set(&[]), vec![progress(false)]);
    let drop = items(PgVersion::V17, (ORIGIN, 0x10), Fields::new().u16(3));
    assert_eq!(drop, vec![plain(Effect::OriginDrop { node: 3 })]);
}

#[test]
fn what_is_not_known_is_refused() {
    let bytes = plain_record(130, 0x00, 700, None, &[]);
    let found = derive_bytes(&bytes, &mut control(PgVersion::V17));
    assert_eq!(found, Err(RedoError::UnknownRmgr { lsn: START, rmgr: 130 }));
    let (found, _) = derive(PgVersion::V17, (CLOG, 0x20), Fields::new().u64(1));
    let unknown = RedoError::UnknownRecord { lsn: START, rmgr_name: "CLOG", info: 0x20 };
    assert_eq!(found, Err(unknown));
}

#[test]
fn values_of_earlier_records_stay_until_they_are_cleared() {
    let bytes = plain_record(CLOG, 0x00, 700, None, &Fields::new().u64(1).0);
    let record = Record { lsn: START, end: END, bytes: &bytes };
    let decoded = DecodedRecord::decode(record).expect("well formed");
    let mut state = control(PgVersion::V17);
    let mut effects = Effects::new();
    effects.derive_next(&decoded, &mut state).expect("known");
    effects.derive_next(&decoded, &mut state).expect("known");
    assert_eq!((effects.buf.as_slice(), effects.items.len()), (&[1, 1][..], 1));
    assert_eq!(effects.value(ValueRange { start: 1, end: 2 }), [1]);
    assert_eq!(effects.value(ValueRange { start: 1, end: 3 }), [0; 0]);
    effects.derive(&decoded, &mut state).expect("known");
    assert_eq!(effects.buf, [1]);

    // Ranges are of 32 bits; a record's values may be twice as long as the record.
    let mut long = decoded.clone();
    long.header.total_length = 0x8000_0000;
    let too_long = effects.derive(&long, &mut state).map_err(|error| error.to_string());
    assert_eq!(too_long, Err("CLOG/ZEROPAGE at 0/1000: the record is too long".to_owned()));
    long.header.total_length = 0x7FFF_FFFF;
    assert_eq!(effects.derive(&long, &mut state), Ok(()));
    assert_eq!(effects.derive_next(&long, &mut state), Ok(()), "one byte more");
    assert!(effects.derive_next(&long, &mut state).is_err(), "two bytes more");

    // A buffer of up to a megabyte is kept, a larger one is given back.
    effects.buf = Vec::with_capacity(1024 * 1024);
    effects.clear_values();
    assert!(effects.buf.capacity() >= 1024 * 1024);
    effects.buf = Vec::with_capacity(1024 * 1024 + 1);
    effects.clear_values();
    assert_eq!(effects.buf.capacity(), 0);
}
