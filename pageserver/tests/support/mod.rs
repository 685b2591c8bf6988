//! What the page server's in-process tests share: generated WAL, a model that is obviously right,
//! and an object store that fails on command.
#![allow(dead_code, clippy::unwrap_used)] // Each test uses a part of it; a failed test panics.

pub mod faults;
pub mod model;
pub mod process;
pub mod s3;
pub mod wal;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::Result;
use pgstrata_blob::Store;
use pgstrata_ids::{Lsn, TenantId};
use pgstrata_pageserver::layer::{BlockCache, Descriptors, LayerSource};
use pgstrata_pageserver::receiver::Safekeepers;
use pgstrata_pageserver::remote::take_generation;
use pgstrata_pageserver::repository::Repository;
use pgstrata_pageserver::timeline::{Limits, Timeline};
use pgstrata_pg_wal::{CheckPoint, ControlFile, DbState, PgVersion};
use tokio::runtime::Runtime;

/// The smallest that PostgreSQL allows, so that a little WAL has several.
pub const SEGMENT_SIZE: u32 = 1 << 20;
pub const TENANT: TenantId = TenantId([1; 16]);
pub const SYSTEM_ID: u64 = 0x1234_5678_9ABC_DEF0;
/// Where the cluster that is imported was shut down.
pub const CHECKPOINT: Lsn = Lsn(0x0100_0028);

/// Nobody has WAL: the tests feed it.
pub struct Nobody;

impl Safekeepers for Nobody {
    fn candidates(&self, _: &Timeline) -> Vec<String> {
        Vec::new()
    }
}

pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A page server's repository, as a process that just started opens it.
pub fn open(
    runtime: &Runtime,
    store: &Store,
    directory: &Path,
    limits: Limits,
) -> Result<Arc<Repository>> {
    runtime.block_on(async {
        let generation = take_generation(store).await?;
        let source = Arc::new(LayerSource {
            store: store.clone(),
            runtime: tokio::runtime::Handle::current(),
            cache: BlockCache::new(1 << 20),
            descriptors: Descriptors::new(32),
            directory: directory.to_owned(),
            downloaded: AtomicU64::new(0),
        });
        Repository::open(source, generation, limits, Arc::new(Nobody)).await
    })
}

/// The control file of a cluster that was shut down cleanly.
pub fn control(version: PgVersion) -> ControlFile {
    ControlFile {
        version,
        system_identifier: SYSTEM_ID,
        state: DbState::ShutDowned,
        time: 0,
        checkpoint: CHECKPOINT,
        checkpoint_copy: CheckPoint {
            this_tli: 1,
            prev_tli: 1,
            next_xid: 1000,
            next_multi: 1,
            ..CheckPoint::default()
        },
        unlogged_lsn: Lsn(1000),
        min_recovery_point: Lsn(0),
        min_recovery_point_tli: 0,
        backup_start_point: Lsn(0),
        backup_end_point: Lsn(0),
        backup_end_required: false,
        wal_level: 1,
        wal_log_hints: false,
        max_connections: 100,
        max_worker_processes: 8,
        max_wal_senders: 10,
        max_prepared_xacts: 0,
        max_locks_per_xact: 64,
        track_commit_timestamp: false,
        max_align: 8,
        float_format: 0,
        block_size: 8192,
        relation_segment_blocks: 131_072,
        wal_block_size: 8192,
        wal_segment_size: SEGMENT_SIZE,
        name_data_length: 64,
        index_max_keys: 32,
        toast_max_chunk_size: 1996,
        large_object_block_size: 2048,
        float8_by_value: true,
        data_checksum_version: 0,
        default_char_signedness: true,
        mock_authentication_nonce: [0; 32],
    }
}

/// A tar of the data directory that `state` describes.
pub fn archive(version: PgVersion, state: &model::State) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut add = |path: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o600);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, path, content).unwrap();
    };
    add("global/pg_control", &control(version).encode());
    for (rel, pages) in &state.relations {
        let path = match rel.spc {
            1664 => format!("global/{}{}", rel.rel, rel.fork.suffix()),
            _ => format!("base/{}/{}{}", rel.db, rel.rel, rel.fork.suffix()),
        };
        add(&path, &pages.iter().flat_map(|page| page.iter().copied()).collect::<Vec<_>>());
    }
    let clog: Vec<u8> = state.clog.values().flat_map(|page| page.iter().copied()).collect();
    add("pg_xact/0000", &clog);
    for db in &state.databases {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(0o700);
        header.set_size(0);
        archive.append_data(&mut header, format!("base/{db}"), std::io::empty()).unwrap();
    }
    archive.into_inner().unwrap()
}
