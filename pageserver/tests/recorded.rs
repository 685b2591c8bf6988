//! Conversations of each version with the page service, byte by byte as they were recorded: an older compute is answered as
//! then, and its bytes are what the codec writes. Whoever changes them has to raise the version, and record what the new
//! one says:
//!
//! ```text
//! PGSTRATA_RECORD=1 cargo test -p pgstrata-pageserver --test recorded
//! ```
//! records the conversation of the highest version anew. A recording of a version that was released is never replaced.

#![allow(clippy::unwrap_used)] // A failed test panics.

mod support;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pgstrata_ids::{Fork, Lsn, RelTag, TimelineId};
use pgstrata_pg_wal::PgVersion;
use pgstrata_sim::conversation::{Side, Turn, read, write};
use pgstrata_wire::pages::{
    Hello, PAGES, PagesReply, PagesRequest, Query, REPLY_SIZE, REQUEST_SIZE, Status,
};
use pgstrata_wire::version::{Range, Version};
use support::model::State;
use support::process::{Process, command};
use support::{TENANT, archive};

const ID: TimelineId = TimelineId([7; 16]);
const PATIENCE: Duration = Duration::from_secs(10);
const REL: RelTag = RelTag { spc: 1663, db: 5, rel: 16384, fork: Fork::Main };

/// Where the history of what was imported begins: a new segment.
const START: Lsn = Lsn(0x0110_0000);

/// Each version that is spoken, and its conversation.
const RECORDED: [(Version, &str); 1] = [(Version(1), include_str!("recorded/1-compute.txt"))];

/// A page server with one relation of two pages, always the same.
fn served(directory: &std::path::Path) -> Process {
    let store = directory.join("objects");
    let process = Process::start(command(&directory.join("local"), store.to_str().unwrap()));
    let page = |filler: u8| {
        let mut page = [0; 8192];
        page[12..20].copy_from_slice(&[24, 0, 0, 0x1F, 0, 0x20, 4, 0x20]);
        page[0x1F00..0x1F10].fill(filler);
        Arc::new(page)
    };
    let mut state = State { next_xid: 1000, ..State::default() };
    state.databases.insert(5);
    state.relations.insert(REL, vec![page(0x11), page(0x22)]);
    state.clog.insert(0, Arc::new([0; 8192]));
    let imported = process.import(ID, "main", &archive(PgVersion::V15, &state));
    assert_eq!(imported.status, 200, "{}", imported.text());
    process
}

/// What a compute asks: everything that it ever does.
fn requests() -> Vec<PagesRequest> {
    let other = RelTag { rel: 99, ..REL };
    let at = |lsn, query| PagesRequest { number: 1, lsn, query };
    let now = |query| at(START, query);
    vec![
        now(Query::Size { rel: REL }),
        // More than there are.
        now(Query::Pages { rel: REL, block: 0, count: 8 }),
        now(Query::Pages { rel: REL, block: 7, count: 1 }),
        now(Query::Relations { spc: 1663, db: 5 }),
        now(Query::Size { rel: other }),
        now(Query::Pages { rel: other, block: 0, count: 1 }),
        // Before there was anything.
        at(Lsn(1), Query::Size { rel: REL }),
    ]
}

fn connect(process: &Process) -> TcpStream {
    let stream = TcpStream::connect(&process.pages).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Says something, and reads the reply to it with its body.
fn ask(stream: &mut TcpStream, said: &[u8]) -> Vec<u8> {
    stream.write_all(said).unwrap();
    let mut reply = vec![0; REPLY_SIZE];
    stream.read_exact(&mut reply).unwrap();
    let head = PagesReply::decode(reply.first_chunk().unwrap()).unwrap();
    reply.resize(REPLY_SIZE + head.length as usize, 0);
    stream.read_exact(&mut reply[REPLY_SIZE..]).unwrap();
    reply
}

/// Records what this program says, if that is asked for: what is compiled in here is what was recorded before.
fn records() -> bool {
    if std::env::var_os("PGSTRATA_RECORD").is_none() {
        return false;
    }
    let directory = tempfile::tempdir().unwrap();
    let process = served(directory.path());
    let mut stream = connect(&process);
    let hello = Hello { versions: PAGES.speaks, tenant: TENANT, timeline: ID };
    let requests = requests().into_iter().map(|request| request.encode().to_vec());
    let mut turns: Vec<Turn> = Vec::new();
    for said in std::iter::once(hello.encode().to_vec()).chain(requests) {
        let reply = ask(&mut stream, &said);
        turns.extend([(Side::Client, said), (Side::Server, reply)]);
    }
    let highest = PAGES.speaks.highest();
    let about = format!("Version {highest} of the {}: all that a compute asks.", PAGES.name);
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join(format!("tests/recorded/{highest}-compute.txt"));
    std::fs::write(path, write(&about, &turns)).unwrap();
    true
}

/// The same as clients sent it before there were ranges.
fn without_range(turns: &[Turn]) -> Vec<Turn> {
    let mut turns = turns.to_vec();
    turns[0].1[12] = 0;
    turns
}

#[test]
fn an_older_compute_is_answered_as_it_was() {
    if records() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let process = served(directory.path());
    for (_, text) in RECORDED {
        let turns = read(text).unwrap();
        for turns in [without_range(&turns), turns] {
            let mut stream = connect(&process);
            for pair in turns.chunks(2) {
                let [(Side::Client, said), (Side::Server, expected)] = pair else {
                    panic!("each request has a reply");
                };
                let answer = ask(&mut stream, said);
                // What an error says is for people.
                let compared = match expected[0] {
                    2 => ..REPLY_SIZE / 2,
                    _ => ..expected.len().max(answer.len()),
                };
                assert_eq!(answer.get(compared), expected.get(compared), "to {said:?}");
            }
        }
    }
}

#[test]
fn a_version_that_is_spoken_is_written_as_it_was_recorded() {
    let known: Vec<Version> = RECORDED.iter().map(|(version, _)| *version).collect();
    let missing: Vec<_> = PAGES.speaks.all().filter(|version| !known.contains(version)).collect();
    assert!(missing.is_empty(), "not recorded yet: {missing:?}; see the top of this file");
    for (version, text) in RECORDED {
        let mut met = BTreeSet::new();
        let mut requests = requests().into_iter();
        for (number, (side, bytes)) in read(text).unwrap().iter().enumerate() {
            if *side == Side::Server {
                let head = PagesReply::decode(bytes.first_chunk().unwrap()).unwrap();
                assert_eq!(head.encode(), bytes[..REPLY_SIZE], "raise the version");
                assert_eq!(head.length as usize, bytes.len() - REPLY_SIZE);
                assert!(number != 1 || head.chosen() == version);
                met.insert(match head.status {
                    Status::Done => "done",
                    Status::NoRelation => "no relation",
                    Status::Error => "error",
                });
            } else if number == 0 {
                let hello = Hello::decode(bytes.first_chunk().unwrap()).unwrap();
                assert_eq!(hello.encode()[..], bytes[..], "raise the version");
                assert_eq!((hello.tenant, hello.timeline), (TENANT, ID));
                assert!(hello.versions.contains(version));
            } else {
                let request: &[u8; REQUEST_SIZE] = bytes.first_chunk().unwrap();
                let request = PagesRequest::decode(request).unwrap();
                assert_eq!(request.encode()[..], bytes[..], "raise the version");
                // By what it says: two fields that change places are the same to a codec that changed with them.
                assert_eq!(Some(request), requests.next());
                met.insert(match request.query {
                    Query::Pages { .. } => "pages",
                    Query::Size { .. } => "size",
                    Query::Relations { .. } => "relations",
                });
            }
        }
        let all = ["done", "error", "no relation", "pages", "relations", "size"];
        assert!(met.iter().eq(&all), "{met:?}");
    }
}

#[test]
fn versions_that_do_not_meet_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let process = served(directory.path());
    let greet = |lowest, highest| {
        let versions = Range::new(lowest, highest).unwrap();
        let hello = Hello { versions, tenant: TENANT, timeline: ID };
        let reply = ask(&mut connect(&process), &hello.encode());
        let head = PagesReply::decode(reply.first_chunk().unwrap()).unwrap();
        (head.status, head.version, String::from_utf8(reply[REPLY_SIZE..].to_vec()).unwrap())
    };
    let highest = PAGES.speaks.highest();
    // One that is newer, and still speaks ours.
    let newer = greet(PAGES.speaks.lowest().0, highest.0 + 5);
    assert_eq!(newer, (Status::Done, Some(highest), String::new()));
    let (status, _, text) = greet(highest.0 + 1, highest.0 + 2);
    assert_eq!(status, Status::Error);
    let theirs = Range::new(highest.0 + 1, highest.0 + 2).unwrap();
    let ours = PAGES.speaks;
    let expected = format!(
        "the compute speaks {theirs} of the page protocol, this page server {ours}: upgrade the page server first"
    );
    assert_eq!(text, expected);
}
