//! The control state follows records as stock recovery does (`xlog_redo`, `xact_redo`, `multixact_redo`,
//! `commit_ts_redo`): exact states after records made by hand.
#![allow(clippy::expect_used)]

mod support;

use pgstrata_ids::Lsn;
use pgstrata_pg_redo::{Changed, ControlState, ControlStateError, RecordKind, RedoError};
use pgstrata_pg_wal::{CheckPoint, ControlFile, DbState, DecodedRecord, PgVersion, Record};
use support::{Fields, control, plain_record};

const XLOG: u8 = 0;
const XACT: u8 = 1;
const MULTIXACT: u8 = 6;
const COMMIT_TS: u8 = 18;
const LOGICAL_MESSAGE: u8 = 21;
const AT: Lsn = Lsn(0x5000);

fn observe(
    state: &mut ControlState,
    (rmgr, info): (u8, u8),
    xid: u32,
    main: &Fields,
) -> Result<Changed, RedoError> {
    let bytes = plain_record(rmgr, info, xid, None, &main.0);
    let record = Record { lsn: AT, end: Lsn(0x5100), bytes: &bytes };
    state.observe(&DecodedRecord::decode(record).expect("well formed"))
}

/// A state that differs from `before` in what `change` does.
fn changed(before: ControlState, change: impl FnOnce(&mut ControlState)) -> ControlState {
    let mut state = before;
    change(&mut state);
    state
}

#[test]
fn ids_above_the_next_one_are_of_the_epoch_before() {
    let state = changed(control(PgVersion::V15), |state| state.next_xid = 5 << 32 | 100);
    assert_eq!(state.full_xid(99), 5 << 32 | 99);
    assert_eq!(state.full_xid(100), 5 << 32 | 100);
    assert_eq!(state.full_xid(101), 4 << 32 | 101);
    assert_eq!(state.full_xid(u32::MAX), 4 << 32 | 0xFFFF_FFFF);
}

#[test]
fn a_record_of_a_later_transaction_advances_the_next_one() {
    let cases = [
        (1000, 999, None),
        (1000, 1000, Some(1001)),
        (1000, 5000, Some(5001)),
        // Special transactions, and those more than half of the ids behind.
        (1000, 0, None),
        (1000, 2, None),
        (3, 2, None),
        (3, 3, Some(4)),
        (0x9000_0000, 3, Some(1 << 32 | 4)),
        (0x7000_0000, 3, None),
        // The epoch goes up with the ids' wrap; 0 to 2 are left out.
        (0xFFFF_FFFF, 0xFFFF_FFFF, Some(1 << 32 | 3)),
        (7 << 32 | 0xFFFF_FFF0, 5, Some(8 << 32 | 6)),
        (7 << 32 | 0xFFFF_FFF0, 0xFFFF_FFF8, Some(7 << 32 | 0xFFFF_FFF9)),
    ];
    for (next, xid, expected) in cases {
        let before = changed(control(PgVersion::V15), |state| state.next_xid = next);
        let mut state = before;
        let found = observe(&mut state, (LOGICAL_MESSAGE, 0), xid, &Fields::new());
        let how = if expected.is_some() { Changed::Counters } else { Changed::Nothing };
        assert_eq!(found, Ok(how), "{next:x} {xid:x}");
        let after = changed(before, |state| state.next_xid = expected.unwrap_or(next));
        assert_eq!(state, after, "{next:x} {xid:x}");
    }
}

#[test]
fn small_records_of_the_log_itself() {
    let before = control(PgVersion::V17);
    let cases: [(u8, Fields, Changed, ControlState); 6] = [
        (
            0x30,
            Fields::new().u32(24_576),
            Changed::Counters,
            changed(before, |state| state.next_oid = 24_576),
        ),
        (
            0x80,
            Fields::new().u8(1),
            Changed::Full,
            changed(before, |state| state.full_page_writes = true),
        ),
        (0x80, Fields::new().u8(0), Changed::Full, before),
        (
            0x90,
            Fields::new().u64(99).u32(8).u32(7),
            Changed::Full,
            changed(before, |state| state.tli = 8),
        ),
        (0x20, Fields::new(), Changed::Nothing, before),
        (0x40, Fields::new(), Changed::Nothing, before),
    ];
    for (info, main, how, after) in cases {
        let mut state = before;
        assert_eq!(observe(&mut state, (XLOG, info), 0, &main), Ok(how), "{info:x}");
        assert_eq!(state, after, "{info:x}");
    }
    // A record that changes nothing itself may be of a later transaction.
    let mut state = before;
    assert_eq!(observe(&mut state, (XLOG, 0x20), 1000, &Fields::new()), Ok(Changed::Counters));
    let kept = observe(&mut state, (XLOG, 0x80), 2000, &Fields::new().u8(0));
    assert_eq!(kept, Ok(Changed::Full));
}

fn checkpoint() -> CheckPoint {
    CheckPoint {
        redo: Lsn(0x4F00),
        this_tli: 3,
        prev_tli: 2,
        full_page_writes: true,
        wal_level: 0,
        next_xid: 900,
        next_oid: 30_000,
        next_multi: 20,
        next_multi_offset: 40,
        oldest_xid: 100,
        oldest_xid_db: 5,
        oldest_multi: 10,
        oldest_multi_db: 6,
        time: 1_700_000_000,
        oldest_commit_ts_xid: 0,
        newest_commit_ts_xid: 0,
        oldest_active_xid: 0,
    }
}

/// The state after a checkpoint, of an older one in which everything is ahead, or behind.
fn after_checkpoint(info: u8, ahead: bool) -> (ControlState, ControlState) {
    let before = changed(control(PgVersion::V15), |state| {
        (state.next_xid, state.next_oid) = if ahead { (1000, 40_000) } else { (800, 20_000) };
        (state.next_multi, state.next_multi_offset) = if ahead { (25, 50) } else { (15, 30) };
        (state.oldest_xid, state.oldest_xid_db) = if ahead { (150, 1) } else { (50, 1) };
        (state.oldest_multi, state.oldest_multi_db) = if ahead { (12, 1) } else { (8, 1) };
    });
    let mut state = before;
    let main = Fields::new().bytes(&checkpoint().encode(PgVersion::V15));
    assert_eq!(observe(&mut state, (XLOG, info), 0, &main), Ok(Changed::Full));
    let expected = changed(before, |state| {
        state.control.checkpoint = AT;
        state.control.checkpoint_copy = checkpoint();
        state.control.time = 1_700_000_000;
        state.full_page_writes = true;
        state.tli = 3;
    });
    (state, expected)
}

#[test]
fn a_shutdown_checkpoint_sets_the_counters() {
    let set = |state: &mut ControlState| {
        (state.next_xid, state.next_oid) = (900, 30_000);
        (state.next_multi, state.next_multi_offset) = (20, 40);
        (state.oldest_xid, state.oldest_xid_db) = (100, 5);
    };
    let (found, before) = after_checkpoint(0x00, true);
    // MultiXactAdvanceOldest: the oldest multixact never goes back.
    assert_eq!(found, changed(before, set));
    let (found, before) = after_checkpoint(0x00, false);
    let with_multi = changed(before, |state| {
        set(state);
        (state.oldest_multi, state.oldest_multi_db) = (10, 6);
    });
    assert_eq!(found, with_multi);
}

#[test]
fn an_online_checkpoint_only_advances_them() {
    let (found, before) = after_checkpoint(0x10, true);
    assert_eq!(found, before);
    let (found, before) = after_checkpoint(0x10, false);
    // But for the next oid: NEXTOID records are ahead of the checkpoint.
    let advanced = changed(before, |state| {
        state.next_xid = 900;
        (state.next_multi, state.next_multi_offset) = (20, 40);
        (state.oldest_xid, state.oldest_xid_db) = (100, 5);
        (state.oldest_multi, state.oldest_multi_db) = (10, 6);
    });
    assert_eq!(found, advanced);
}

#[test]
fn parameters_are_taken_over() {
    let main = Fields::new().u32(101).u32(102).u32(103).u32(104).u32(105).u32(2).u8(1).u8(1);
    let before = control(PgVersion::V16);
    let mut state = before;
    assert_eq!(observe(&mut state, (XLOG, 0x60), 0, &main), Ok(Changed::Full));
    let after = changed(before, |state| {
        let control = &mut state.control;
        (control.max_connections, control.max_worker_processes) = (101, 102);
        (control.max_wal_senders, control.max_prepared_xacts) = (103, 104);
        (control.max_locks_per_xact, control.wal_level) = (105, 2);
        control.wal_log_hints = true;
    });
    assert_eq!(state, after);
    let main = Fields::new().bytes(&main.0[..25]).u8(1);
    assert!(observe(&mut state, (XLOG, 0x60), 0, &main).is_ok());
    let main = Fields::new().bytes(&main.0[..24]).u8(0).u8(1);
    assert!(observe(&mut state, (XLOG, 0x60), 0, &main).is_ok());
    assert!(!state.control.wal_log_hints);
}

#[test]
fn commit_timestamps_start_with_the_next_transaction() {
    let parameters = |track| Fields::new().bytes(&[0; 24]).u8(0).u8(track);
    // Tracked before, tracked now, oldest and newest before, oldest and newest after.
    let cases = [
        (false, 1, (0, 0), (2000, 2000)),
        // Known already, from WAL replayed before.
        (false, 1, (7, 9), (7, 9)),
        (true, 1, (0, 0), (0, 0)),
        (true, 1, (7, 9), (7, 9)),
        (true, 0, (7, 9), (0, 0)),
        (false, 0, (7, 9), (7, 9)),
        (false, 0, (0, 0), (0, 0)),
    ];
    for (before, now, xids, after) in cases {
        let mut state = control(PgVersion::V16);
        state.next_xid = 6 << 32 | 2000;
        state.control.track_commit_timestamp = before;
        (state.oldest_commit_ts_xid, state.newest_commit_ts_xid) = xids;
        assert_eq!(observe(&mut state, (XLOG, 0x60), 0, &parameters(now)), Ok(Changed::Full));
        let found = (state.oldest_commit_ts_xid, state.newest_commit_ts_xid);
        assert_eq!(found, after, "{before} {now} {xids:?}");
        assert_eq!(state.control.track_commit_timestamp, now == 1);
    }
}

#[test]
fn the_oldest_commit_timestamp_only_advances() {
    // Page, then the oldest transaction. Among normal ids order is modulo 2^32; special ones are plain numbers.
    let cases = [
        (100, 200, 200),
        (200, 100, 200),
        (0xFFFF_FFF0, 5, 5),
        (5, 0xFFFF_FFF0, 5),
        (1, 0xF000_0000, 0xF000_0000),
        (2, 0xF000_0000, 0xF000_0000),
        (3, 0xF000_0000, 3),
        (0xF000_0000, 2, 0xF000_0000),
        (0xF000_0000, 3, 3),
        // Nothing is kept yet.
        (0, 200, 0),
    ];
    for (before, oldest, after) in cases {
        for version in [PgVersion::V16, PgVersion::V17] {
            let page = Fields::new().u32(9);
            let page = if version == PgVersion::V17 { page.u32(0) } else { page };
            let mut state = control(version);
            state.oldest_commit_ts_xid = before;
            let found = observe(&mut state, (COMMIT_TS, 0x10), 0, &page.u32(oldest));
            assert_eq!(found, Ok(Changed::Counters));
            assert_eq!(state.oldest_commit_ts_xid, after, "{before:x} {oldest:x}");
        }
    }
    // The record that zeroes a page has no such field.
    let mut state = control(PgVersion::V16);
    state.oldest_commit_ts_xid = 100;
    let zero = observe(&mut state, (COMMIT_TS, 0x00), 0, &Fields::new().u32(9).u32(200));
    assert_eq!((zero, state.oldest_commit_ts_xid), (Ok(Changed::Nothing), 100));
}

#[test]
fn commits_advance_the_newest_commit_timestamp() {
    let commit = |subxid: u32| Fields::new().u64(5).u32(2).u32(1).u32(subxid);
    let run = |info, track, newest, subxid| {
        let mut state = control(PgVersion::V18);
        state.control.track_commit_timestamp = track;
        state.newest_commit_ts_xid = newest;
        let found = observe(&mut state, (XACT, info), 700, &commit(subxid)).expect("a commit");
        (found, state.newest_commit_ts_xid, state.next_xid)
    };
    assert_eq!(run(0x80, true, 650, 701), (Changed::Counters, 701, 1000));
    assert_eq!(run(0x80, true, 650, 699), (Changed::Counters, 700, 1000));
    assert_eq!(run(0x80, true, 800, 701), (Changed::Nothing, 800, 1000));
    assert_eq!(run(0x80, true, 700, 699), (Changed::Nothing, 700, 1000));
    assert_eq!(run(0x80, false, 650, 701), (Changed::Nothing, 650, 1000));
    // Special ids have an order too.
    let mut state = control(PgVersion::V18);
    state.newest_commit_ts_xid = 2;
    let main = Fields::new().u64(5);
    assert_eq!(observe(&mut state, (XACT, 0), 2, &main), Ok(Changed::Nothing));
    assert_eq!(observe(&mut state, (XACT, 0), 3, &main), Ok(Changed::Counters));
    assert_eq!(run(0xA0, true, 650, 701), (Changed::Nothing, 650, 1000));
    // Subtransactions advance the next transaction too, whatever becomes of them.
    assert_eq!(run(0xA0, true, 650, 1500), (Changed::Counters, 650, 1501));
    assert_eq!(run(0x80, false, 650, 1500), (Changed::Counters, 650, 1501));
}

#[test]
fn multixacts_advance_and_never_go_back() {
    let create = |multi: u32, offset: u32, xids: &[u32]| {
        let fields = Fields::new().u32(multi).u32(offset).u32(xids.len() as u32);
        xids.iter().fold(fields, |fields, xid| fields.u32(*xid).u32(1))
    };
    let run = |next: (u32, u32), main: Fields| {
        let mut state = control(PgVersion::V15);
        (state.next_multi, state.next_multi_offset) = next;
        let found = observe(&mut state, (MULTIXACT, 0x20), 0, &main);
        assert_eq!(found, Ok(Changed::Counters));
        (state.next_multi, state.next_multi_offset, state.next_xid)
    };
    assert_eq!(run((5, 10), create(5, 10, &[700, 1500])), (6, 12, 1501));
    assert_eq!(run((9, 30), create(5, 10, &[700])), (9, 30, 1000));
    assert_eq!(run((9, 10), create(5, 30, &[700])), (9, 31, 1000));
    assert_eq!(
        run((0xFFFF_FFFF, 0xFFFF_FFFF), create(0xFFFF_FFFF, 0xFFFF_FFFF, &[1])),
        (0, 0, 1000)
    );
    assert_eq!(run((1, 1), create(0x9000_0000, 0x9000_0000, &[1])), (1, 1, 1000), "long ago");

    let truncate = |multi| Fields::new().u32(6).u32(1).u32(multi).u32(0).u32(0);
    for (before, multi, after) in [(10, 11, (11, 6)), (10, 10, (10, 1)), (10, 9, (10, 1))] {
        let mut state = control(PgVersion::V15);
        (state.oldest_multi, state.oldest_multi_db) = (before, 1);
        let found = observe(&mut state, (MULTIXACT, 0x30), 0, &truncate(multi));
        assert_eq!(found, Ok(Changed::Full));
        assert_eq!((state.oldest_multi, state.oldest_multi_db), after);
    }
    // Zeroing a page tells nothing.
    let mut state = control(PgVersion::V15);
    let zero = observe(&mut state, (MULTIXACT, 0x00), 0, &Fields::new().u32(1));
    assert_eq!((zero, state), (Ok(Changed::Nothing), control(PgVersion::V15)));
}

#[test]
fn r8_checksums_or_the_setting_make_hint_bits_logged() {
    for (checksums, setting, logged) in
        [(0, false, false), (1, false, true), (0, true, true), (1, true, true)]
    {
        let mut state = control(PgVersion::V15);
        (state.control.data_checksum_version, state.control.wal_log_hints) = (checksums, setting);
        assert_eq!(state.hint_bits_are_logged(), logged);
    }
}

#[test]
fn a_cluster_can_be_started_as_if_it_was_shut_down_here() {
    for (version, wal_level) in [(PgVersion::V16, 0), (PgVersion::V17, 1), (PgVersion::V18, 1)] {
        let state = changed(control(version), |state| {
            (state.tli, state.full_page_writes) = (4, true);
            (state.next_xid, state.next_oid) = (3 << 32 | 77, 50_000);
            (state.next_multi, state.next_multi_offset) = (11, 22);
            (state.oldest_xid, state.oldest_xid_db) = (33, 44);
            (state.oldest_multi, state.oldest_multi_db) = (55, 66);
            (state.oldest_commit_ts_xid, state.newest_commit_ts_xid) = (70, 76);
            state.control.min_recovery_point = Lsn(9);
            state.control.min_recovery_point_tli = 9;
            state.control.backup_start_point = Lsn(9);
            state.control.backup_end_point = Lsn(9);
            state.control.backup_end_required = true;
            state.control.unlogged_lsn = Lsn(5555);
        });
        let checkpoint = CheckPoint {
            redo: AT,
            this_tli: 4,
            prev_tli: 4,
            full_page_writes: true,
            wal_level,
            next_xid: 3 << 32 | 77,
            next_oid: 50_000,
            next_multi: 11,
            next_multi_offset: 22,
            oldest_xid: 33,
            oldest_xid_db: 44,
            oldest_multi: 55,
            oldest_multi_db: 66,
            time: 99,
            oldest_commit_ts_xid: 70,
            newest_commit_ts_xid: 76,
            oldest_active_xid: 0,
        };
        assert_eq!(state.checkpoint(AT, 99), checkpoint);
        let mut expected: ControlFile = control(version).control;
        expected.state = DbState::ShutDowned;
        expected.time = 99;
        expected.checkpoint = AT;
        expected.checkpoint_copy = checkpoint;
        // What the server starts with; recovery's fields are those of a cluster that needs none.
        expected.unlogged_lsn = Lsn(1000);
        assert_eq!(state.to_pg_control(AT, 99), expected);

        // And followed from there it is the same state.
        let again = ControlState::from_pg_control(&expected);
        assert_eq!(again.checkpoint(AT, 99), checkpoint);
    }
}

#[test]
fn counters_are_stored_in_forty_bytes() {
    let mut file = control(PgVersion::V15).control;
    file.checkpoint_copy.next_multi = 3 * 2048 + 5;
    let state = changed(ControlState::from_pg_control(&file), |state| {
        (state.next_xid, state.next_oid, state.next_multi_offset) = (3 << 32 | 77, 50_000, 22);
        (state.oldest_commit_ts_xid, state.newest_commit_ts_xid) = (70, 76);
    });
    let bytes = Fields::new()
        .u64(3 << 32 | 77)
        .u32(50_000)
        .u32(6149)
        .u32(22)
        .u32(70)
        .u32(76)
        // The page of the next multixact; none was initialised early.
        .u32(3)
        .u32(u32::MAX)
        .u32(0);
    assert_eq!(state.encode_counters().as_slice(), bytes.0);
    let mut other = control(PgVersion::V15);
    assert_eq!(other.apply_counters(&bytes.0), Ok(()));
    assert_eq!(other.encode_counters(), state.encode_counters());
    assert_eq!(other.next_xid, 3 << 32 | 77);
    assert_eq!(other.apply_counters(&bytes.0[..39]), Err(ControlStateError::Truncated));
    let early = Fields::new().bytes(&bytes.0[..32]).u32(4).u32(0);
    assert_eq!(other.apply_counters(&early.0), Ok(()));
    assert_eq!(other.encode_counters().as_slice(), early.0);
}

#[test]
fn the_whole_state_is_stored_with_its_format() {
    let state = changed(control(PgVersion::V18), |state| {
        (state.tli, state.full_page_writes) = (4, true);
        (state.oldest_xid, state.oldest_xid_db) = (33, 44);
        (state.oldest_multi, state.oldest_multi_db) = (55, 66);
        state.next_oid = 50_000;
    });
    let bytes = state.encode();
    assert_eq!(bytes.len(), 2 + 20 + 40 + 296);
    assert_eq!(bytes[..10], [1, 1, 4, 0, 0, 0, 33, 0, 0, 0]);
    assert_eq!(ControlState::decode(&bytes), Ok(state));
    let off = changed(state, |state| state.full_page_writes = false);
    assert_eq!(ControlState::decode(&off.encode()), Ok(off));
    let newer: Vec<u8> = [&[2], &bytes[1..]].concat();
    assert_eq!(ControlState::decode(&newer), Err(ControlStateError::Newer(2)));
    for length in [0, 1, 21, 61] {
        assert_eq!(ControlState::decode(&bytes[..length]), Err(ControlStateError::Truncated));
    }
    let mut wrong = bytes.clone();
    wrong[62 + 100] ^= 1;
    assert!(matches!(ControlState::decode(&wrong), Err(ControlStateError::ControlFile(_))));
}

#[test]
fn errors_name_the_record() {
    let found = observe(&mut control(PgVersion::V17), (XLOG, 0x30), 0, &Fields::new().u8(1));
    let expected = RedoError::Record {
        record: RecordKind { version: PgVersion::V17, rmgr: XLOG, info: 0x30 },
        lsn: AT,
        reason: "the record's data ends too early",
    };
    assert_eq!(found, Err(expected.clone()));
    assert_eq!(expected.to_string(), "XLOG/NEXTOID at 0/5000: the record's data ends too early");
}
