//! Speed of decoding, of deriving effects, and of applying pieces.
//!
//! `PGSTRATA_BENCH_WAL=FILE cargo bench --package pgstrata-pg-redo` uses a real segment, of PostgreSQL 15 to 18, in place
//! of the built-in stream of no-op records.
#![allow(clippy::expect_used)]

#[path = "../tests/support/mod.rs"]
mod support;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pgstrata_ids::{Lsn, PAGE_SIZE};
use pgstrata_pg_redo::{Effect, Effects, apply_block, page};
use pgstrata_pg_wal::{DecodedRecord, PgVersion, Record, WalDecoder, WalWriter};
use std::hint::black_box;
use support::{Block, control, record_bytes};

const SEGMENT: u64 = 16 << 20;

/// One segment: the one that the environment names, or no-op records.
fn segment() -> (Lsn, Vec<u8>) {
    if let Some(path) = std::env::var_os("PGSTRATA_BENCH_WAL") {
        let bytes = std::fs::read(path).expect("a WAL segment");
        let address = bytes[8..16].try_into().expect("a header");
        return (Lsn(u64::from_le_bytes(address)), bytes);
    }
    let version = PgVersion::V15;
    let writer = WalWriter { version, tli: 1, system_identifier: 1, segment_size: SEGMENT };
    let (mut at, mut prev) = (Lsn(SEGMENT), Lsn(8));
    let mut bytes = Vec::new();
    while bytes.len() < 4 << 20 {
        let placed = writer.noop(at, prev);
        bytes.extend_from_slice(&placed.bytes);
        (at, prev) = (placed.end, placed.start);
    }
    (Lsn(SEGMENT), bytes)
}

fn decode(criterion: &mut Criterion) {
    let (start, bytes) = segment();
    let mut group = criterion.benchmark_group("wal");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("decode", |bencher| {
        bencher.iter(|| {
            let mut decoder = WalDecoder::new(start, SEGMENT);
            let mut blocks = 0;
            for chunk in bytes.chunks(128 * 1024) {
                decoder.feed(chunk);
                while let Ok(Some(record)) = decoder.poll() {
                    blocks += DecodedRecord::decode(record).map_or(0, |record| record.blocks.len());
                }
            }
            black_box((blocks, decoder.position()))
        });
    });
    group.finish();
}

fn derive_and_apply(criterion: &mut Criterion) {
    // An insert of a 128 byte tuple.
    let mut data = vec![1, 0, 2, 8, 24];
    data.resize(5 + 105, 7);
    let block = Block { id: 0, number: 3, fork: 0, init: false, data, image: None };
    let bytes = record_bytes(10, 0, &[block], &[1, 0, 0]);
    let record = Record { lsn: Lsn(0x1000), end: Lsn(0x2000), bytes: &bytes };
    let decoded = DecodedRecord::decode(record).expect("well formed");
    let mut state = control(PgVersion::V15);
    let mut effects = Effects::new();
    criterion.bench_function("derive heap insert", |bencher| {
        bencher.iter(|| effects.derive(black_box(&decoded), &mut state));
    });

    let Some(Effect::Block { value, .. }) = effects.items.first().copied() else {
        panic!("an insert changes a block");
    };
    let mut empty = [0; PAGE_SIZE];
    empty[12..20].copy_from_slice(&[24, 0, 0, 32, 0, 32, 4, 32]);
    criterion.bench_function("apply heap insert", |bencher| {
        bencher.iter(|| {
            // Only what the insert changed is put back, so that no page is copied.
            empty[12..16].copy_from_slice(&[24, 0, 0, 32]);
            page::set_lsn(&mut empty, Lsn(0));
            apply_block(black_box(&mut empty), effects.value(value), 3, record.end)
        });
    });
}

criterion_group!(benches, decode, derive_and_apply);
criterion_main!(benches);
