//! What an import takes from a data directory besides pages.
#![allow(clippy::unwrap_used)] // A failed test panics.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use pgstrata_ids::Key;
use pgstrata_pageserver::import::read_archive;
use pgstrata_pageserver::origins::{self, ORIGINS_FILE};
use pgstrata_pageserver::value::decode_present;
use pgstrata_pg_wal::PgVersion;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use support::model::State;
use support::{archive, control};

/// An archive of a cluster that was shut down with these files in it.
fn with_files(version: PgVersion, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut more = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o600);
        header.set_size(content.len() as u64);
        more.append_data(&mut header, path, *content).unwrap();
    }
    // Two empty blocks end an archive.
    let mut bytes = more.into_inner().unwrap();
    bytes.truncate(bytes.len() - 1024);
    bytes.extend(archive(version, &State::first(&mut SmallRng::seed_from_u64(1))));
    bytes
}

#[test]
fn prepared_transactions_and_origins_are_imported() {
    let progress = origins::encode([(1, 0x1234), (3, 0x1_0000_0000)]);
    for (version, name) in
        [(PgVersion::V15, "pg_twophase/000002BC"), (PgVersion::V18, "pg_twophase/00000000000002BC")]
    {
        let next_xid = control(version).checkpoint_copy.next_xid;
        assert!(next_xid >> 32 == 0 && next_xid > 0x2BC, "{next_xid}");
        let files: [(&str, &[u8]); 2] = [(name, b"prepared"), (ORIGINS_FILE, &progress)];
        let spool = tempfile::tempdir().unwrap();
        let archive = with_files(version, &files);
        let imported = read_archive(archive.as_slice(), spool.path()).unwrap();
        let values: BTreeMap<_, _> = imported.values.map(Result::unwrap).collect();
        // The first byte has the flags of a layer's value.
        let content = |key| values.get(&key).and_then(|value| decode_present(&value[1..]));
        assert_eq!(content(Key::two_phase(0x2BC)), Some(&b"prepared"[..]), "{version:?}");
        assert_eq!(content(Key::origin(1)).unwrap()[..8], 0x1234_u64.to_le_bytes());
        assert_eq!(content(Key::origin(3)).unwrap()[..8], 0x1_0000_0000_u64.to_le_bytes());
        assert_eq!(content(Key::origin(2)), None);
    }
    let mut damaged = progress.clone();
    damaged[8] ^= 1;
    let damaged = with_files(PgVersion::V15, &[(ORIGINS_FILE, &damaged)]);
    assert!(read_archive(damaged.as_slice(), Path::new("/nowhere")).is_err());
}
