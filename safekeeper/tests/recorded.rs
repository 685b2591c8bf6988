//! Conversations of each version with a safekeeper, byte by byte as they were recorded: what an older compute says is
//! answered as then, and what an older safekeeper says is understood. Whoever changes how a message is written has to
//! raise the version, and record what the new one says:
//!
//! ```text
//! PGSTRATA_RECORD=1 cargo test -p pgstrata-safekeeper --test recorded
//! ```
//! records the conversations of the highest version anew, between a real proposer and a real safekeeper, beside those of
//! the others. A recording of a version that was released is never replaced; it goes when the version is spoken no more.

#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::cluster::Cluster;
use common::played::{PATIENCE, START, one_safekeeper, play, wait_alone};
use common::source::source;
use common::wal::{WalGenerator, parameters};
use pgstrata_compute_shim::proposer::{SafekeeperClient, elect};
use pgstrata_ids::{Lsn, NodeId, TenantId, Term, TimelineId};
use pgstrata_sim::conversation::{Side, Turn, read, write};
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::frame::{FrameHeader, HEADER_SIZE, Stamp, split};
use pgstrata_wire::safekeeper::{Message, RefusedReason, SERVED, WAL, chosen, decode, encode};
use pgstrata_wire::version::{Range, Version};

/// A timeline that no safekeeper has.
const NOBODYS: TimelineId = TimelineId([0x99; 16]);

/// What is known of a version. Each that is spoken has all three.
struct Recorded {
    version: Version,
    /// It is elected, appends, tells what is committed, and is silent for a while.
    compute: &'static str,
    /// It reads what the compute wrote.
    reader: &'static str,
    /// It asks for what is not there.
    refused: &'static str,
}

const RECORDED: [Recorded; 1] = [Recorded {
    version: Version(3),
    compute: include_str!("recorded/3-compute.txt"),
    reader: include_str!("recorded/3-reader.txt"),
    refused: include_str!("recorded/3-refused.txt"),
}];

/// Stands between a client and a safekeeper, and notes what passes.
struct Recorder {
    address: String,
    turns: Arc<Mutex<Vec<Turn>>>,
}

impl Recorder {
    fn before(safekeeper: &str) -> Recorder {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let turns = Arc::default();
        let (to, notes) = (safekeeper.to_owned(), Arc::clone(&turns));
        std::thread::spawn(move || {
            let (client, _) = listener.accept().unwrap();
            let server = TcpStream::connect(to).unwrap();
            let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let theirs = Arc::clone(&notes);
            std::thread::spawn(move || pass(Side::Client, from, to, &theirs));
            pass(Side::Server, server, client, &notes);
        });
        Recorder { address, turns }
    }

    /// What passed, a turn for each frame, where it ended.
    fn frames(&self) -> Vec<Turn> {
        let mut frames = Vec::new();
        let mut rests = [Vec::new(), Vec::new()];
        for (side, bytes) in self.turns.lock().unwrap().iter() {
            let rest = &mut rests[usize::from(*side == Side::Server)];
            rest.extend_from_slice(bytes);
            while let Some(size) = split(rest).unwrap().map(|frame| frame.size) {
                frames.push((*side, rest.drain(..size).collect()));
            }
        }
        frames
    }
}

fn pass(side: Side, mut from: TcpStream, mut to: TcpStream, notes: &Mutex<Vec<Turn>>) {
    let mut bytes = vec![0; 1 << 20];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        notes.lock().unwrap().push((side, bytes[..count].to_vec()));
        if to.write_all(&bytes[..count]).is_err() {
            return;
        }
    }
    // Who left is gone on the other side, too.
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// What a compute does: everything that it ever says to a safekeeper.
fn lead(cluster: &Cluster, at: &str) {
    let parameters = parameters(START);
    let mut config = cluster.config(&parameters);
    config.safekeepers = Arc::new(vec![(NodeId(1), at.to_owned())]);
    let mut leader = elect(config, PATIENCE).unwrap();
    let start = leader.elected().start_lsn;
    let mut generator = WalGenerator::new(parameters, start, Lsn(start.0 - 8));
    let barrier = generator.record(0);
    leader.append_record(barrier.into(), PATIENCE).unwrap();
    let (writer, source, wake) = source(generator, true);
    let proposing = leader.run(source, wake, Arc::default()).unwrap();
    writer.commit(3, 100);
    writer.commit(1, 9000);
    // Long enough to ask whether anybody is there.
    std::thread::sleep(Duration::from_millis(1600));
    proposing.stop().unwrap();
}

fn client(address: &str) -> SafekeeperClient {
    SafekeeperClient::connect(address, None, None, PATIENCE).unwrap()
}

/// What a reader does. Returns what it was told, as text.
fn follow(address: &str) -> String {
    let parameters = parameters(START);
    let mut client = client(address);
    let mut status = client.learn(parameters.tenant, parameters.timeline, 1).unwrap();
    client.open(parameters.tenant, parameters.timeline).unwrap();
    let last = client.last_record(status.flush_lsn).unwrap();
    let mut bytes = Vec::new();
    let end = client.read_wal(START, status.commit_lsn, Term(0), &mut bytes).unwrap();
    status.parameters.segment_size = parameters.segment_size;
    format!("{status:?} {last:?} {end} {}", crc32c::crc32c(&bytes))
}

fn ask_in_vain(address: &str) -> String {
    client(address).open(TenantId([0x11; 16]), NOBODYS).unwrap_err().to_string()
}

/// Records what this program says, if that is asked for: what is compiled in here is what was recorded before.
fn records() -> bool {
    if std::env::var_os("PGSTRATA_RECORD").is_none() {
        return false;
    }
    let cluster = one_safekeeper();
    let highest = WAL.speaks.highest();
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/recorded");
    let save = |name: &str, recorder: &Recorder| {
        let about = format!("Version {highest} of the {}: {name}.", WAL.name);
        let text = write(&about, &recorder.frames());
        std::fs::write(directory.join(format!("{highest}-{name}.txt")), text).unwrap();
    };
    let before = |save_as: &str, act: &dyn Fn(&str)| {
        let recorder = Recorder::before(&cluster.nodes[0].wal);
        act(&recorder.address);
        save(save_as, &recorder);
    };
    before("compute", &|address| lead(&cluster, address));
    wait_alone(&cluster.nodes[0].wal);
    before("reader", &|address| drop(follow(address)));
    before("refused", &|address| drop(ask_in_vain(address)));
    true
}

/// The message of one frame, and what its header says of versions.
fn message(bytes: &[u8]) -> (FrameHeader, Message<'_>) {
    let header = FrameHeader::decode(bytes.first_chunk().unwrap()).unwrap();
    let frame = split(bytes).unwrap().unwrap();
    assert_eq!(frame.size, bytes.len(), "a turn is one frame");
    (header, decode(frame.kind, frame.body).unwrap())
}

/// The same as clients sent it before there were ranges.
fn without_range(first: &[u8]) -> Vec<u8> {
    let (header, message) = message(first);
    let mut bytes = Vec::new();
    encode(&message, Stamp::In(header.version), &mut bytes);
    bytes
}

fn conversations(recorded: &Recorded) -> [Vec<Turn>; 3] {
    [recorded.compute, recorded.reader, recorded.refused].map(|text| read(text).unwrap())
}

#[test]
fn an_older_client_is_answered_as_it_was() {
    if records() {
        return;
    }
    for recorded in RECORDED {
        let [compute, reader, refused] = conversations(&recorded);
        let older = |turns: &[Turn]| {
            let mut turns = turns.to_vec();
            turns[0].1 = without_range(&turns[0].1);
            turns
        };
        for change in [|turns: &[Turn]| turns.to_vec(), older] {
            let cluster = one_safekeeper();
            play(&cluster.nodes[0].wal, &change(&compute));
            wait_alone(&cluster.nodes[0].wal);
            for conversation in [&reader, &refused] {
                play(&cluster.nodes[0].wal, &change(conversation));
            }
        }
    }
}

/// A safekeeper of a recorded conversation: it takes what was said then only, and answers as then. It ends with its thread.
fn older_safekeeper(turns: Vec<Turn>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        for (number, (side, bytes)) in turns.iter().enumerate() {
            if *side == Side::Server {
                stream.write_all(bytes).unwrap();
                continue;
            }
            let mut said = vec![0; bytes.len()];
            stream.read_exact(&mut said).unwrap();
            // Of the first one, a safekeeper from before there were ranges saw no more.
            let same = match number {
                0 => without_range(&said) == without_range(bytes),
                _ => said == *bytes,
            };
            assert!(same, "{:?} instead of {:?}", message(&said), message(bytes));
        }
    });
    address
}

#[test]
fn an_older_safekeeper_is_understood() {
    for recorded in RECORDED {
        let [compute, reader, refused] = conversations(&recorded);
        // What is read is what the compute's conversation wrote.
        let cluster = one_safekeeper();
        play(&cluster.nodes[0].wal, &compute);
        wait_alone(&cluster.nodes[0].wal);
        let expected = follow(&cluster.nodes[0].wal);
        assert_eq!(follow(&older_safekeeper(reader)), expected);
        let text = ask_in_vain(&older_safekeeper(refused));
        assert_eq!(text, RefusedReason::UnknownTimeline.to_string());
        // What a compute says has its own ids and terms: of its safekeeper's answers the codec is what there is.
        let mut input = FrameBuffer::new(1 << 20);
        let answers = compute.iter().filter(|(side, _)| *side == Side::Server);
        for (number, (_, bytes)) in answers.enumerate() {
            assert!(input.fill(&mut &bytes[..]).unwrap());
            let version = chosen(&mut input).unwrap();
            assert_eq!(version, (number == 0).then_some(recorded.version));
            let frame = input.next().unwrap().unwrap();
            assert!(decode(frame.kind, frame.body).is_ok());
            let size = frame.size;
            input.consume(size);
        }
    }
}

#[test]
fn a_version_that_is_spoken_is_written_as_it_was_recorded() {
    let known: Vec<Version> = RECORDED.iter().map(|recorded| recorded.version).collect();
    let missing: Vec<_> = WAL.speaks.all().filter(|version| !known.contains(version)).collect();
    assert!(missing.is_empty(), "not recorded yet: {missing:?}; see the top of this file");
    for recorded in RECORDED {
        let mut kinds = BTreeSet::new();
        for turns in conversations(&recorded) {
            for (number, (_, bytes)) in turns.iter().enumerate() {
                let (header, message) = message(bytes);
                // A first message is of the lowest version that was spoken then.
                assert!(number == 0 || header.version == recorded.version);
                let stamp = match number {
                    0 => Stamp::First(header.offer),
                    _ => Stamp::In(recorded.version),
                };
                let mut again = Vec::new();
                encode(&message, stamp, &mut again);
                assert!(again == *bytes, "raise the version: {message:?} is written otherwise");
                kinds.insert(message.kind());
            }
        }
        // The last, 72, is said when members change, of which there is one here.
        let expected = (1..=8).chain([10, 11]).chain(65..=71);
        assert!(kinds.iter().copied().eq(expected), "recorded: {kinds:?}");
    }
}

/// What a safekeeper answers to a first message that offers these versions, and in which version.
fn greeted(address: &str, offer: Range) -> (Version, String) {
    let parameters = parameters(START);
    let mut bytes = Vec::new();
    let open = Message::Open(parameters.tenant, parameters.timeline);
    encode(&open, Stamp::First(offer), &mut bytes);
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&bytes).unwrap();
    let mut answer = vec![0; 1 << 16];
    let mut length = 0;
    loop {
        if let Some(frame) = split(&answer[..length]).unwrap() {
            return match decode(frame.kind, frame.body).unwrap() {
                Message::Refused(reason) => (frame.version, reason.to_string()),
                other => panic!("{other:?}"),
            };
        }
        let count = stream.read(&mut answer[length..]).unwrap();
        assert!(count > 0, "it was closed without a word, {length} bytes of {HEADER_SIZE}");
        length += count;
    }
}

#[test]
fn versions_that_do_not_meet_are_named() {
    let cluster = one_safekeeper();
    let (lowest, highest) = (SERVED.speaks.lowest().0, SERVED.speaks.highest().0);
    let range = |lowest, highest| Range::new(lowest, highest).unwrap();
    let ask = |offer| greeted(&cluster.nodes[0].wal, offer);
    // One that is newer, and still speaks ours.
    let newer = ask(range(lowest, highest + 5));
    assert_eq!(newer, (Version(highest), RefusedReason::UnknownTimeline.to_string()));
    // Those that don't read the refusal all the same: it is in their own version.
    let (version, text) = ask(range(highest + 1, highest + 2));
    assert_eq!(version, Version(highest + 1));
    let (theirs, ours) = (range(highest + 1, highest + 2), SERVED.speaks);
    assert_eq!(
        text,
        format!(
            "the reader speaks {theirs} of the WAL protocol, this safekeeper {ours}: upgrade the safekeeper first"
        )
    );
    let (version, text) = ask(range(1, lowest - 1));
    assert_eq!(version, Version(1));
    assert!(text.ends_with("upgrade the reader first"), "{text}");
}
