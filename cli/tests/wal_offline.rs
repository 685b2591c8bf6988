//! Native redo, the WAL reader and the followed state against a real PostgreSQL.
#![allow(clippy::expect_used)]

mod support;

use pgstrata_cli::wal_offline::segments::SegmentDirectory;
use pgstrata_cli::wal_offline::{check_redo, dump};
use pgstrata_ids::{Lsn, PAGE_SIZE, SlruKind};
use pgstrata_pg_redo::{ControlState, Effect, Effects, apply_slru, is_truncated};
use pgstrata_pg_wal::{CheckPoint, ControlFile, DecodedRecord, rmgr};
use pgstrata_tests::installation::Installation;
use pgstrata_tests::thorough;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use support::Cluster;

const SETTINGS: &str = "wal_consistency_checking=all\nfull_page_writes=off\nmax_prepared_transactions=5\n\
                        track_commit_timestamp=on\nwal_level=replica";

/// Runs the SQL script, then several clients that share row locks.
fn worked(major: u32, settings: &str) -> Cluster {
    let cluster = Cluster::start(Installation::of(major), settings);
    cluster.sql(include_str!("workload.sql"));
    cluster.sql("create table mx(id int primary key, v int); insert into mx select i, 0 from generate_series(1, 5) i");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/multixact.sql");
    let script_copy = cluster.base().with_file_name("multixact.sql");
    std::fs::copy(script, &script_copy).expect("the script");
    let file = format!("--file={}", script_copy.display());
    cluster.run("pgbench", &["--no-vacuum", "--client=6", "--transactions=60", &file]);
    cluster
}

/// Every type of record that changes blocks and that the workload is made to produce.
const EXPECTED: &[&str] = &[
    "BRIN/CREATE_INDEX",
    "BRIN/DESUMMARIZE",
    "BRIN/INSERT",
    "BRIN/REVMAP_EXTEND",
    "BRIN/SAMEPAGE_UPDATE",
    "BRIN/UPDATE",
    "Btree/DEDUP",
    "Btree/INSERT_LEAF",
    "Btree/INSERT_POST",
    "Btree/INSERT_UPPER",
    "Btree/MARK_PAGE_HALFDEAD",
    "Btree/NEWROOT",
    "Btree/SPLIT_L",
    "Btree/SPLIT_R",
    "Btree/UNLINK_PAGE",
    "Btree/VACUUM",
    "Generic/Generic",
    "Gin/CREATE_PTREE",
    "Gin/DELETE_LISTPAGE",
    "Gin/INSERT",
    "Gin/INSERT_LISTPAGE",
    "Gin/UPDATE_META_PAGE",
    "Gin/VACUUM_DATA_LEAF_PAGE",
    "Gist/PAGE_DELETE",
    "Gist/PAGE_SPLIT",
    "Gist/PAGE_UPDATE",
    "Hash/ADD_OVFL_PAGE",
    "Hash/DELETE",
    "Hash/INIT_BITMAP_PAGE",
    "Hash/INIT_META_PAGE",
    "Hash/INSERT",
    "Hash/SPLIT_ALLOCATE_PAGE",
    "Hash/SPLIT_CLEANUP",
    "Hash/SPLIT_COMPLETE",
    "Hash/SQUEEZE_PAGE",
    "Heap/DELETE",
    "Heap/HEAP_CONFIRM",
    "Heap/HOT_UPDATE",
    "Heap/INPLACE",
    "Heap/INSERT",
    "Heap/INSERT+INIT",
    "Heap/LOCK",
    "Heap/UPDATE",
    "Heap2/LOCK_UPDATED",
    "Heap2/MULTI_INSERT",
    "Heap2/VISIBLE",
    "SPGist/ADD_LEAF",
    "SPGist/ADD_NODE",
    "SPGist/MOVE_LEAFS",
    "SPGist/PICKSPLIT",
    "SPGist/VACUUM_LEAF",
    "SPGist/VACUUM_REDIRECT",
    "SPGist/VACUUM_ROOT",
    "Sequence/LOG",
];

/// The versions after 15 that a test looks at.
fn newer() -> &'static [u32] {
    if thorough() { &[16, 17, 18] } else { &[18] }
}

#[test]
fn redo_equals_the_images_in_the_wal() {
    check_images(15);
}

#[test]
fn redo_equals_the_images_in_the_wal_of_newer_versions() {
    newer().iter().for_each(|major| check_images(*major));
}

/// Runs the check; what it says, and whether all is well.
fn check(cluster: &Cluster, jobs: usize) -> (serde_json::Value, bool) {
    let args = check_redo::CheckRedoArgs {
        data: cluster.base(),
        wal: cluster.wal(),
        strict: true,
        jobs: NonZeroUsize::new(jobs),
        branches: true,
        json: true,
    };
    let mut out = Vec::new();
    let clean = check_redo::run(&args, &mut out).expect("the check runs");
    (serde_json::from_slice(&out).expect("JSON"), clean)
}

fn check_images(major: u32) {
    let mut cluster = worked(major, SETTINGS);
    cluster.stop();
    let (report, clean) = check(&cluster, 3);
    // Visibility maps of databases made from a template are not in the WAL, so they may differ when compared strictly.
    assert!(clean, "{} {}", report["mismatch_list"], report["unsupported_list"]);
    assert!(report["pages_compared"].as_u64() > Some(50_000), "{}", report["pages_compared"]);
    for name in EXPECTED {
        let compared_as = |name: &str| report["by_record"][name]["compared"].as_u64();
        let compared = compared_as(name).or_else(|| compared_as(&format!("{name}+INIT")));
        assert!(compared > Some(0), "{name} was not exercised");
    }
    let branches = &report["by_branch"]["Heap/INSERT+INIT"];
    assert!(branches["blocks 0+init"]["compared"].as_u64() > Some(0), "{branches}");
    if major == 15 {
        assert_eq!(check(&cluster, 1), (report, true), "threads do not matter");
        check_damaged(&cluster);
    }
}

/// A byte of a tuple of `pg_class` is wrong in the base: the first record that shows the page tells where.
fn check_damaged(cluster: &Cluster) {
    let directory = cluster.base().join("base");
    let is_last = |name: &u32| directory.join(name.to_string()).join("1259").is_file();
    let names = std::fs::read_dir(&directory).expect("databases");
    let names = names.map(|entry| entry.expect("one").file_name().into_string().expect("utf-8"));
    let database = names.filter_map(|name| name.parse().ok()).filter(is_last).max();
    let path = directory.join(database.expect("a database").to_string()).join("1259");
    let mut bytes = std::fs::read(&path).expect("pg_class");
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[24 + at * 4 + byte]));
    let first = (0..200).find(|at| word(*at) >> 15 & 3 == 1).expect("a tuple");
    // The name of the relation.
    let name = (word(first) & 0x7FFF) as usize + 40;
    bytes[name] ^= 1;
    std::fs::write(&path, bytes).expect("the damage");
    let (one, clean) = check(cluster, 1);
    assert!(!clean);
    assert_eq!(one["mismatches"], 1, "a wrong byte is told once: {}", one["mismatch_list"]);
    let text = one["mismatch_list"][0].as_str().expect("a description").to_owned();
    let place = format!("1259 block 0: line pointer {}: data: 1 bytes differ", first + 1);
    assert!(text.contains(&place), "{text}");
    assert_eq!(check(cluster, 3), (one, false));
}

/// What `pg_waldump` and our dump both say of a record.
fn waldump_rows(text: &str) -> Vec<(String, String, String, String, String)> {
    let field = |line: &str, from: &str| -> String {
        let rest = line.split_once(from).map_or("", |(_, rest)| rest).trim_start();
        rest.split([',', ' ']).next().unwrap_or("").to_owned()
    };
    text.lines()
        .filter(|line| line.starts_with("rmgr: "))
        .map(|line| {
            let lengths = line.split_once("len (rec/tot):").map_or("", |(_, rest)| rest);
            let lengths = lengths.split(',').next().unwrap_or("").replace(' ', "");
            let lsn = field(line, "lsn: ");
            let kind = format!("{}/{}", field(line, "rmgr: "), field(line, "desc: "));
            (lsn, field(line, "prev "), kind, field(line, "tx: "), lengths)
        })
        .collect()
}

#[test]
fn dump_agrees_with_pg_waldump() {
    let mut cluster =
        worked(15, "max_prepared_transactions=5\ntrack_commit_timestamp=on\nwal_compression=pglz");
    cluster.run("pgbench", &["--initialize", "--quiet"]);
    cluster.run("pgbench", &["--client=4", "--transactions=200"]);
    cluster.stop();
    let mut out = Vec::new();
    let args = dump::DumpArgs { wal: cluster.wal(), from: None, to: None, json: true };
    dump::run(&args, &mut out).expect("the dump runs");
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&out).expect("JSON");
    let padded = |lsn: &str| {
        let (high, low) = lsn.split_once('/').expect("an LSN");
        format!("{high}/{low:0>8}")
    };
    let ours: Vec<_> = rows
        .iter()
        .map(|row| {
            let text = |name: &str| row[name].as_str().expect("text").to_owned();
            let kind = format!("{}/{}", text("rmgr"), text("record"));
            let lengths = format!("{}/{}", row["record_length"], row["length"]);
            (padded(&text("lsn")), padded(&text("prev")), kind, row["xid"].to_string(), lengths)
        })
        .collect();
    let wal = cluster.wal();
    let wal = wal.to_str().expect("utf-8");
    // It ends with an error at the end of the WAL, so its status says nothing.
    let output = std::process::Command::new(support::bin_directory().join("pg_waldump"))
        .args(["-p", wal, "-s", rows[0]["lsn"].as_str().expect("text")])
        .output()
        .expect("pg_waldump runs");
    let theirs = waldump_rows(&String::from_utf8_lossy(&output.stdout));
    assert!(theirs.len() > 10_000, "{} records", theirs.len());
    for (ours, theirs) in ours.iter().zip(&theirs) {
        // Some descriptions are empty, or begin with what belongs to the name in ours.
        let same_name = ours.2 == theirs.2 || theirs.2.ends_with('/');
        assert!(same_name, "{ours:?} {theirs:?}");
        assert_eq!(
            (&ours.0, &ours.1, &ours.3, &ours.4),
            (&theirs.0, &theirs.1, &theirs.3, &theirs.4)
        );
    }
    assert_eq!(ours.len(), theirs.len());
}

type SlruPages = BTreeMap<(SlruKind, u64), Box<[u8; PAGE_SIZE]>>;

fn slru_pages(data: &Path) -> SlruPages {
    let mut pages = SlruPages::new();
    for kind in SlruKind::ALL {
        for entry in std::fs::read_dir(data.join(kind.directory())).expect("an SLRU") {
            let entry = entry.expect("an entry");
            let name = entry.file_name().into_string().expect("utf-8");
            let segment = u64::from_str_radix(&name, 16).expect("a segment name");
            let bytes = std::fs::read(entry.path()).expect("a segment");
            for (at, page) in bytes.chunks_exact(PAGE_SIZE).enumerate() {
                let page = Box::new(page.try_into().expect("a page"));
                pages.insert((kind, segment * 32 + at as u64), page);
            }
        }
    }
    pages
}

#[test]
fn followed_state_equals_a_stopped_cluster() {
    check_state(15);
}

#[test]
fn followed_state_equals_a_stopped_cluster_of_newer_versions() {
    newer().iter().for_each(|major| check_state(*major));
}

fn check_state(major: u32) {
    let mut cluster = worked(major, "max_prepared_transactions=5\ntrack_commit_timestamp=on");
    // Enough for second pages of pg_xact, and of multixacts.
    cluster.sql(
        "create procedure burn() language plpgsql as $$ begin for i in 1..40000 loop
           perform txid_current(); commit; end loop; end $$;
         call burn(); insert into t(a) values (1);",
    );
    cluster.stop();
    let read = |data: &Path, name: &str| std::fs::read(data.join(name)).expect("a file");
    let (base, data) = (cluster.base(), cluster.data());
    let control = ControlFile::decode(&read(&base, "global/pg_control")).expect("pg_control");
    let start = control.checkpoint_copy.redo;
    let mut state = ControlState::from_pg_control(&control);
    let mut before = state;
    let mut pages = slru_pages(&base);
    let mut relmaps = BTreeMap::new();
    let mut prepared = BTreeMap::new();
    let mut effects = Effects::new();
    let mut last = None;
    let directory = SegmentDirectory::open(&cluster.wal()).expect("segments");
    let mut reader = directory.reader(Some(start)).expect("a reader");
    let follow = |record: pgstrata_pg_wal::Record<'_>| -> anyhow::Result<bool> {
        let decoded = DecodedRecord::decode(record)?;
        before = state;
        effects.derive(&decoded, &mut state)?;
        for effect in &effects.items {
            match *effect {
                Effect::SlruPage { kind, page, value, .. } => {
                    let page = pages.entry((kind, page)).or_insert(Box::new([0; PAGE_SIZE]));
                    apply_slru(page, effects.value(value), record.end)?;
                }
                Effect::SlruTruncate { kind, cutoff_page } => {
                    pages.retain(|(k, page), _| {
                        *k != kind || !is_truncated(kind, *page, cutoff_page)
                    });
                }
                Effect::RelMap { spc, db, file } => {
                    relmaps.insert((spc, db), effects.value(file).to_vec());
                }
                Effect::DatabaseDrop { spc, db } => {
                    relmaps.remove(&(spc, db));
                }
                Effect::TwoPhasePut { full_xid, file } => {
                    prepared.insert(full_xid, effects.value(file).to_vec());
                }
                Effect::TwoPhaseRemove { full_xid } => {
                    prepared.remove(&full_xid);
                }
                _ => {}
            }
        }
        if decoded.header.rmgr == rmgr::XLOG && decoded.header.opcode() == 0 {
            last = Some((decoded.lsn, CheckPoint::decode(state.version(), decoded.main_data)));
        }
        Ok(true)
    };
    reader.for_each(follow).expect("the WAL is replayed");

    let (lsn, checkpoint) = last.expect("a shutdown checkpoint");
    let checkpoint = checkpoint.expect("a checkpoint");
    let ours = before.checkpoint(lsn, checkpoint.time);
    // A shutdown checkpoint gives back the oids that were reserved in advance; whoever follows WAL does not know them.
    assert!(ours.next_oid >= checkpoint.next_oid);
    assert_eq!(CheckPoint { next_oid: checkpoint.next_oid, ..ours }, checkpoint);
    let stopped = ControlFile::decode(&read(&data, "global/pg_control")).expect("pg_control");
    let made = state.to_pg_control(lsn, checkpoint.time);
    // The file is written a moment after the record.
    assert!(stopped.time >= checkpoint.time);
    let (unlogged_lsn, time) = (stopped.unlogged_lsn, stopped.time);
    assert_eq!(ControlFile { unlogged_lsn, time, ..made }, stopped);
    let stored = ControlState::decode(&state.encode()).expect("its own encoding");
    assert_eq!(stored, state);

    let expected = slru_pages(&data);
    let names = |pages: &SlruPages| pages.keys().copied().collect::<Vec<_>>();
    assert_eq!(names(&expected), names(&pages));
    assert!(expected.contains_key(&(SlruKind::Clog, 1)), "a second page of pg_xact");
    for (key, page) in &expected {
        let differs = page.iter().zip(pages[key].iter()).position(|(a, b)| a != b);
        assert_eq!(differs, None, "first differing byte of {key:?}");
    }
    assert!(!relmaps.is_empty());
    for ((spc, db), file) in &relmaps {
        let name = if *spc == 1664 { "global".to_owned() } else { format!("base/{db}") };
        assert_eq!(&read(&data, &format!("{name}/pg_filenode.map")), file, "relation map of {db}");
    }
    assert_eq!(prepared.len(), 1);
    for (full_xid, file) in &prepared {
        let name = match state.version().major() {
            15 | 16 => format!("pg_twophase/{full_xid:08X}"),
            _ => format!("pg_twophase/{full_xid:016X}"),
        };
        assert_eq!(&read(&data, &name), file);
    }
    assert!(lsn > Lsn(0));
}
