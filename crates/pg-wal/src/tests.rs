//! The decoder against streams laid out by the encoder.

use crate::checker::WalChecker;
use crate::decoder::WalDecoder;
use crate::encoder::WalWriter;
use crate::error::WalErrorKind;
use crate::page_header::PageHeader;
use crate::{
    CONTROL_FILE_SIZE, CheckPoint, ControlFile, ControlFileError, DbState, DecodedRecord,
    PgVersion, Record, WalError,
};
use pgstrata_ids::{Lsn, PAGE_SIZE};
use proptest::prelude::*;

const SEGMENT: u64 = 1024 * 1024;

fn writer() -> WalWriter {
    WalWriter { version: PgVersion::V15, tli: 1, system_identifier: 42, segment_size: SEGMENT }
}

/// A record of no particular kind: rmgr Heap, main data of the given length.
fn record(prev: Lsn, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    if length > 0 {
        bytes.push(254);
        bytes.extend_from_slice(&(length as u32).to_le_bytes());
        bytes.extend((0..length).map(|at| (at * 7 + length) as u8));
    }
    seal(&mut bytes, prev, 0, 10);
    bytes
}

fn seal(bytes: &mut [u8], prev: Lsn, info: u8, rmgr: u8) {
    let total = bytes.len() as u32;
    bytes[0..4].copy_from_slice(&total.to_le_bytes());
    bytes[8..16].copy_from_slice(&prev.0.to_le_bytes());
    bytes[16] = info;
    bytes[17] = rmgr;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[24..]), &bytes[..20]);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
}

/// A stream of records of these data lengths from `start`: its bytes, and each record's bounds.
fn stream(start: Lsn, lengths: &[usize]) -> (Vec<u8>, Vec<(Lsn, Lsn)>) {
    let (mut bytes, mut bounds) = (Vec::new(), Vec::new());
    let (mut at, mut prev) = (start, Lsn(8));
    for length in lengths {
        let placed = writer().place(at, record(prev, *length));
        bytes.extend_from_slice(&placed.bytes);
        bounds.push((placed.start, placed.end));
        (at, prev) = (placed.end, placed.start);
    }
    (bytes, bounds)
}

fn drain(decoder: &mut WalDecoder, out: &mut Vec<(Lsn, Lsn)>) -> Result<(), WalError> {
    while let Some(record) = decoder.poll()? {
        out.push((record.lsn, record.end));
        let decoded = DecodedRecord::decode(record)?;
        let length = decoded.main_data.len();
        assert!(decoded.main_data.iter().enumerate().all(|(at, b)| *b == (at * 7 + length) as u8));
    }
    Ok(())
}

fn start_strategy() -> impl Strategy<Value = Lsn> {
    // Near a page's end, near a segment's end, at a page's start.
    (1u64..4, 0u64..4, prop_oneof![Just(0u64), 40..PAGE_SIZE as u64]).prop_map(
        |(segment, page, offset)| {
            let page = if page == 3 { SEGMENT / PAGE_SIZE as u64 - 1 } else { page };
            Lsn(segment * SEGMENT + page * PAGE_SIZE as u64 + offset / 8 * 8)
        },
    )
}

#[test]
fn a_page_of_another_timeline_is_the_one_that_is_wrong() {
    let (mut bytes, bounds) = stream(Lsn(SEGMENT), &[3 * PAGE_SIZE, 100, 100]);
    let checker = || WalChecker::new(Lsn(SEGMENT), SEGMENT);
    assert_eq!(checker().with_timeline(1).check(&bytes), Ok(()));
    // A bit of the second page's header, after its magic and its flags.
    bytes[PAGE_SIZE + 4 + 2] ^= 2;
    let error = checker().with_timeline(1).check(&bytes).unwrap_err();
    let second = Lsn(SEGMENT + PAGE_SIZE as u64);
    assert_eq!(error, WalErrorKind::OtherTimeline { found: 0x2_0001, expected: 1 }.at(second));
    // Who does not know which timeline it is meets that a page later.
    let third = second + PAGE_SIZE as u64;
    let error = checker().check(&bytes).unwrap_err();
    assert_eq!(error, WalErrorKind::TimelineWentBack { found: 1, before: 0x2_0001 }.at(third));
    assert!(bounds[0].1 > third);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_stream_in_any_chunks(
        start in start_strategy(),
        lengths in prop::collection::vec(prop_oneof![0usize..200, 7000usize..30000], 1..40),
        chunks in prop::collection::vec(1usize..9000, 1..20),
    ) {
        let (bytes, bounds) = stream(start, &lengths);
        let mut decoder = WalDecoder::new(start, SEGMENT).with_prev(Lsn(8)).with_system_identifier(42);
        let mut found = Vec::new();
        let mut rest = &bytes[..];
        for chunk in chunks.iter().cycle() {
            let (now, later) = rest.split_at(rest.len().min(*chunk));
            prop_assert_eq!(decoder.feed_position() + rest.len() as u64, start + bytes.len() as u64);
            decoder.feed(now);
            drain(&mut decoder, &mut found)?;
            rest = later;
            if rest.is_empty() { break; }
        }
        prop_assert_eq!(&found, &bounds);
        prop_assert_eq!(decoder.position(), bounds[bounds.len() - 1].1);
        prop_assert_eq!(decoder.last_record(), Some(bounds[bounds.len() - 1].0));
    }

    #[test]
    fn a_cut_stream_resumes_after_rewind(
        start in start_strategy(),
        lengths in prop::collection::vec(prop_oneof![0usize..200, 7000usize..30000], 1..20),
        cut: prop::sample::Index,
        zeros: bool,
    ) {
        let (bytes, bounds) = stream(start, &lengths);
        let cut = cut.index(bytes.len());
        let mut decoder = WalDecoder::new(start, SEGMENT).with_prev(Lsn(8));
        let mut found = Vec::new();
        decoder.feed(&bytes[..cut]);
        if zeros {
            // What a file holds behind the part that is written.
            decoder.feed(&vec![0; 3 * PAGE_SIZE]);
        }
        let _ = drain(&mut decoder, &mut found);
        prop_assert!(bounds.starts_with(&found));
        let again = decoder.rewind();
        prop_assert_eq!(again, found.last().map_or(start, |(_, end)| *end));
        decoder.feed(&bytes[(again - start) as usize..]);
        drain(&mut decoder, &mut found)?;
        prop_assert_eq!(found, bounds);
    }

    /// The decoder is the slow twin: the same verdict on any stream, whole, cut or damaged, in any pieces.
    #[test]
    fn the_checker_agrees_with_the_decoder(
        start in start_strategy(),
        lengths in prop::collection::vec(prop_oneof![0usize..200, 7000usize..30000], 1..20),
        chunks in prop::collection::vec(1usize..9000, 1..20),
        cut: prop::sample::Index,
        damage in prop::option::of((any::<prop::sample::Index>(), 1u8..)),
        switch: bool,
        knows_prev: bool,
        knows_timeline: bool,
    ) {
        let (mut bytes, bounds) = stream(start, &lengths);
        if switch {
            let (prev, at) = bounds[bounds.len() - 1];
            let mut last = vec![0; 24];
            seal(&mut last, prev, 0x40, 0);
            bytes.extend_from_slice(&writer().place(at, last).bytes);
            let end = start + bytes.len() as u64;
            bytes.resize((end.0.next_multiple_of(SEGMENT) - start.0) as usize, 0);
        }
        bytes.truncate(cut.index(bytes.len()) + 1);
        if let Some((at, flip)) = damage {
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
        }
        let mut decoder = WalDecoder::new(start, SEGMENT).with_system_identifier(42);
        let mut checker = WalChecker::new(start, SEGMENT).with_system_identifier(42);
        if knows_timeline {
            decoder = decoder.with_timeline(1);
            checker = checker.with_timeline(1);
        }
        if knows_prev {
            decoder = decoder.with_prev(Lsn(8));
            checker = checker.with_prev(Lsn(8));
        }
        decoder.feed(&bytes);
        let decoded = loop {
            match decoder.poll() {
                Ok(Some(_)) => {}
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        let mut rest = &bytes[..];
        let mut checked = Ok(());
        for chunk in chunks.iter().cycle() {
            let (now, later) = rest.split_at(rest.len().min(*chunk));
            checked = checked.and_then(|()| checker.check(now));
            rest = later;
            if rest.is_empty() { break; }
        }
        prop_assert_eq!(checked, decoded);
        // The decoder names an end whose padding it has not seen.
        prop_assert!(checker.position() <= decoder.position());
        if checker.feed_position() >= decoder.position() {
            prop_assert_eq!(checker.position(), decoder.position());
            prop_assert_eq!(checker.last_record(), decoder.last_record());
        }
        if checked.is_ok() {
            prop_assert_eq!(checker.feed_position(), start + bytes.len() as u64);
        }
    }

    #[test]
    fn a_later_page_is_a_start_too(
        lengths in prop::collection::vec(prop_oneof![0usize..200, 7000usize..30000], 1..20),
        page: prop::sample::Index,
    ) {
        let start = Lsn(SEGMENT);
        let (bytes, bounds) = stream(start, &lengths);
        let page = page.index(bytes.len().div_ceil(PAGE_SIZE)) * PAGE_SIZE;
        let from = start + page as u64;
        let mut decoder = WalDecoder::new(from, SEGMENT);
        let mut found = Vec::new();
        decoder.feed(&bytes[page..]);
        drain(&mut decoder, &mut found)?;
        let expected: Vec<_> = bounds.iter().copied().filter(|(lsn, _)| *lsn >= from).collect();
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn a_changed_byte_never_passes(
        lengths in prop::collection::vec(prop_oneof![0usize..200, 7000usize..12000], 1..10),
        at: prop::sample::Index,
        flip in 1u8..,
    ) {
        let start = Lsn(SEGMENT);
        let (mut bytes, bounds) = stream(start, &lengths);
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let mut decoder = WalDecoder::new(start, SEGMENT).with_prev(Lsn(8)).with_system_identifier(42);
        let mut found = Vec::new();
        decoder.feed(&bytes);
        if drain(&mut decoder, &mut found).is_ok() {
            // Padding, the pad bytes of a header, and bit 4 of page flags are not covered by anything.
            let position = start + at as u64;
            let in_record = bounds.iter().any(|(lsn, _)| position >= *lsn && position < *lsn + 18);
            prop_assert!(!in_record || found.len() < bounds.len());
        } else {
            prop_assert!(found.len() < bounds.len());
            prop_assert!(bounds.starts_with(&found));
        }
    }

    #[test]
    fn no_bytes_panic(start: u64, bytes in prop::collection::vec(any::<u8>(), 0..20000)) {
        let mut decoder = WalDecoder::new(Lsn(start >> 1), SEGMENT);
        decoder.feed(&bytes);
        while let Ok(Some(_)) = decoder.poll() {}
        let whole = Record { lsn: Lsn(8), end: Lsn(16), bytes: &bytes };
        let _ = DecodedRecord::decode(whole);
    }

    #[test]
    fn no_record_body_panics(body in prop::collection::vec(prop_oneof![0u8..5, any::<u8>(), 250u8..], 0..400)) {
        let mut bytes = vec![0; 24];
        bytes.extend_from_slice(&body);
        seal(&mut bytes, Lsn(8), 0, 10);
        let whole = Record { lsn: Lsn(64), end: Lsn(128), bytes: &bytes };
        if let Ok(decoded) = DecodedRecord::decode(whole) {
            for block in &decoded.blocks {
                if let Some(image) = block.image {
                    let _ = image.restore(&mut [0; PAGE_SIZE]);
                }
            }
        }
    }

    #[test]
    fn our_records_fit_anywhere(at in start_strategy()) {
        let checkpoint = CheckPoint { next_xid: 5 << 32 | 7, next_oid: 9, this_tli: 1, ..CheckPoint::default() };
        for version in PgVersion::ALL {
            let writer = WalWriter { version, ..writer() };
            let noop = writer.noop(at, Lsn(8));
            let shutdown = writer.checkpoint_shutdown(noop.end, noop.start, &checkpoint);
            prop_assert_eq!(noop.start, writer.record_start(at));
            let prefix = writer.segment_prefix(at);
            prop_assert_eq!(prefix.len() as u64 % SEGMENT, at.0 % SEGMENT);
            // Where `XLogFindNextRecord` begins on the page of our record: right at it.
            let mut skipped = writer.skipped_prefix(at);
            prop_assert_eq!(skipped.len(), prefix.len());
            let page = skipped.len() - at.page_offset() as usize;
            skipped.extend_from_slice(&noop.bytes);
            let header = if at.0 % SEGMENT < PAGE_SIZE as u64 { 40 } else { 24 };
            let continued = skipped[page + 2] & 1 != 0;
            let rest = u32::from_le_bytes([16, 17, 18, 19].map(|at| skipped[page + at]));
            prop_assert_eq!(continued, rest > 0);
            let first = header + rest.next_multiple_of(8);
            if at.page_offset() > 0 {
                prop_assert_eq!(u64::from(first), at.align_up().page_offset());
            }
            let mut decoder = WalDecoder::new(at, SEGMENT).with_prev(Lsn(8)).with_system_identifier(42);
            decoder.feed(&noop.bytes);
            decoder.feed(&shutdown.bytes);
            let first = decoder.poll()?.map(|record| (record.lsn, record.end, record.bytes.len()));
            prop_assert_eq!(first, Some((noop.start, noop.end, 24)));
            let record = decoder.poll()?;
            prop_assert!(record.is_some());
            if let Some(record) = record {
                prop_assert_eq!((record.lsn, record.end, record.bytes.len()), (shutdown.start, shutdown.end, 114));
                let decoded = DecodedRecord::decode(record)?;
                let read = CheckPoint::decode(version, decoded.main_data);
                prop_assert_eq!(read, Ok(CheckPoint { redo: shutdown.start, ..checkpoint }));
            }
        }
    }
}

#[test]
fn a_switch_leads_to_the_next_segment() {
    let start = Lsn(SEGMENT);
    let mut switch = vec![0; 24];
    seal(&mut switch, Lsn(8), 0x40, 0);
    let placed = writer().place(start, switch);
    assert_eq!(placed.start, start + 40);
    let next = writer().noop(start + SEGMENT, placed.start);
    let mut decoder = WalDecoder::new(start, SEGMENT).with_prev(Lsn(8));
    decoder.feed(&placed.bytes);
    let record = decoder.poll().expect("valid").expect("complete");
    assert_eq!((record.lsn, record.end), (start + 40, start + SEGMENT));
    assert_eq!(decoder.position(), start + SEGMENT);
    decoder.feed(&vec![0; SEGMENT as usize - placed.bytes.len()]);
    assert!(decoder.poll().expect("nothing wrong").is_none());
    decoder.feed(&next.bytes);
    assert_eq!(decoder.poll().expect("valid").expect("complete").end, next.end);
}

/// A record torn at a page's end, then `OVERWRITE_CONTRECORD` on the next page, naming `named`.
fn torn(named: Lsn) -> (WalDecoder, Lsn) {
    let start = Lsn(SEGMENT);
    let (mut bytes, bounds) = stream(start, &[100, 10_000]);
    bytes.truncate(PAGE_SIZE);
    let page = start + PAGE_SIZE as u64;
    PageHeader {
        version: PgVersion::V15,
        tli: 1,
        address: page,
        continuation: None,
        overwrites_contrecord: true,
        segment: None,
    }
    .encode(&mut bytes);
    let mut record = vec![0; 24];
    record.extend_from_slice(&[255, 16]);
    record.extend_from_slice(&named.0.to_le_bytes());
    record.extend_from_slice(&[0; 8]);
    seal(&mut record, bounds[0].0, 0xD0, 0);
    bytes.extend_from_slice(&record);
    let mut decoder = WalDecoder::new(start, SEGMENT).with_prev(Lsn(8));
    decoder.feed(&bytes);
    decoder.feed(&[0; 16]);
    let first = decoder.poll().expect("valid").expect("complete");
    assert_eq!(first.lsn, bounds[0].0);
    (decoder, page)
}

#[test]
fn a_torn_record_can_be_abandoned() {
    let (_, bounds) = stream(Lsn(SEGMENT), &[100, 10_000]);
    let (mut decoder, page) = torn(bounds[1].0);
    let record = decoder.poll().expect("valid").expect("complete");
    assert_eq!(record.lsn, page + 24);
    let (mut decoder, page) = torn(bounds[0].0);
    let error = decoder.poll().expect_err("names another record");
    assert_eq!(error, WalErrorKind::OverwriteContrecord.at(page + 24));
    assert!(!error.is_end_of_wal());
}

#[test]
fn the_end_is_told_from_damage() {
    let start = Lsn(SEGMENT);
    let (bytes, bounds) = stream(start, &[100]);
    let end_after = |tail: &[u8]| {
        let mut decoder = WalDecoder::new(start, SEGMENT);
        decoder.feed(&bytes);
        decoder.feed(tail);
        decoder.poll().expect("valid").expect("complete");
        decoder.poll().expect_err("no further record")
    };
    let end = end_after(&[0; 8]);
    assert_eq!(end, WalErrorKind::ZeroLength.at(bounds[0].1));
    assert!(end.is_end_of_wal());
    assert!(!end_after(&[9, 0, 0, 0, 0, 0, 0, 0]).is_end_of_wal());

    let page = start + PAGE_SIZE as u64;
    let full = PAGE_SIZE - 40 - 24 - 5;
    let at_page = |header: &[u8]| {
        let mut decoder = WalDecoder::new(start, SEGMENT);
        decoder.feed(&stream(start, &[full]).0);
        decoder.feed(header);
        assert_eq!(decoder.poll().expect("valid").expect("complete").end, page);
        decoder.poll().expect_err("no further record")
    };
    assert_eq!(at_page(&[0; 24]), WalErrorKind::ZeroPage.at(page));
    let mut stale = writer().segment_prefix(page + 24);
    stale.drain(..PAGE_SIZE);
    stale[8..16].copy_from_slice(&8192u64.to_le_bytes());
    assert_eq!(at_page(&stale), WalErrorKind::StalePage { found: Lsn(8192) }.at(page));
    assert!(at_page(&stale).is_end_of_wal());
}

#[test]
fn a_long_record_is_refused_before_it_is_read() {
    let start = Lsn(SEGMENT);
    let (bytes, _) = stream(start, &[50_000]);
    let mut decoder = WalDecoder::new(start, SEGMENT).with_max_record_size(10_000);
    decoder.feed(&bytes[..100]);
    let error = decoder.poll().expect_err("too long");
    assert!(matches!(error.kind, WalErrorKind::RecordTooLong(_)));
}

#[test]
fn no_record_starts_inside_a_page_header() {
    for start in [Lsn(SEGMENT + 8), Lsn(SEGMENT + 32), Lsn(2 * SEGMENT + 8192 + 16), Lsn(4097)] {
        let error = WalDecoder::new(start, SEGMENT).poll().expect_err("not a boundary");
        assert_eq!(error.kind, WalErrorKind::BadStart, "{start}");
    }
}

#[test]
fn control_file_round_trips() {
    for version in PgVersion::ALL {
        let checkpoint_copy = CheckPoint { redo: Lsn(77), time: 12, ..CheckPoint::default() };
        let file = ControlFile {
            version,
            system_identifier: 7,
            state: DbState::ShutDowned,
            time: 12,
            checkpoint: Lsn(77),
            checkpoint_copy,
            unlogged_lsn: Lsn(1000),
            min_recovery_point: Lsn(0),
            min_recovery_point_tli: 0,
            backup_start_point: Lsn(0),
            backup_end_point: Lsn(0),
            backup_end_required: false,
            wal_level: 1,
            wal_log_hints: true,
            max_connections: 100,
            max_worker_processes: 8,
            max_wal_senders: 10,
            max_prepared_xacts: 3,
            max_locks_per_xact: 64,
            track_commit_timestamp: false,
            max_align: 8,
            float_format: 1234567.0f64.to_bits(),
            block_size: 8192,
            relation_segment_blocks: 131_072,
            wal_block_size: 8192,
            wal_segment_size: 16 << 20,
            name_data_length: 64,
            index_max_keys: 32,
            toast_max_chunk_size: 1996,
            large_object_block_size: 2048,
            float8_by_value: true,
            data_checksum_version: 1,
            default_char_signedness: true,
            mock_authentication_nonce: [9; 32],
        };
        let mut bytes = file.encode();
        assert_eq!(bytes.len(), CONTROL_FILE_SIZE);
        assert_eq!(ControlFile::decode(&bytes), Ok(file));
        bytes[40] ^= 1;
        assert_eq!(ControlFile::decode(&bytes), Err(ControlFileError::Checksum));
        assert_eq!(ControlFile::decode(&bytes[..200]), Err(ControlFileError::TooShort));
    }
}
