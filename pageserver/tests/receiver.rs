//! Following safekeepers that misbehave, from servers that speak just enough of the protocol.
#![allow(clippy::unwrap_used)] // A failed test panics.

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pgstrata_blob::{Interceptor, Location, Store, Verdict};
use pgstrata_format::quorum::{AllGivenUp, GivenUp, Quorum};
use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, TimelineId, TimelineParameters};
use pgstrata_pageserver::ingest::Ingest;
use pgstrata_pageserver::lock::Mutex;
use pgstrata_pageserver::receiver::{Safekeepers, follow};
use pgstrata_pageserver::repository::{Moment, Repository};
use pgstrata_pageserver::timeline::{Limits, Timeline};
use pgstrata_pg_wal::PgVersion;
use pgstrata_quorum::Chain;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use support::model::State;
use support::wal::History;
use support::{TENANT, archive, open, runtime};
use tempfile::TempDir;
use tokio::runtime::Runtime;

struct Fixed(Vec<String>);

impl Safekeepers for Fixed {
    fn candidates(&self, _: &Timeline) -> Vec<String> {
        self.0.clone()
    }
}

/// A safekeeper with this WAL.
struct Safekeeper {
    address: String,
    asked: Arc<AtomicU64>,
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[kind][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

/// Sends what it has, and waits for the other to end.
fn serve(stream: TcpStream, knows: u64, start: Lsn, wal: &[u8]) -> Option<()> {
    let mut stream = send(stream, knows, start, wal)?;
    std::io::copy(&mut stream, &mut std::io::sink()).ok().map(drop)
}

fn query(stream: &mut TcpStream) -> Option<String> {
    let mut head = [0; 5];
    stream.read_exact(&mut head).ok()?;
    let mut query = vec![0; u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize - 4];
    stream.read_exact(&mut query).ok()?;
    Some(String::from_utf8_lossy(&query).into_owned())
}

/// Says that it knows of this configuration; 0 is one of a release that doesn't know the question.
fn send(mut stream: TcpStream, knows: u64, start: Lsn, wal: &[u8]) -> Option<TcpStream> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let mut body = vec![0; u32::from_be_bytes(length) as usize - 4];
    stream.read_exact(&mut body).ok()?;
    stream.write_all(&message(b'Z', b"I")).ok()?;
    assert_eq!(query(&mut stream)?, "SHOW pgstrata.configuration\0");
    let text = knows.to_string();
    let answer = match knows {
        0 => message(b'E', b"SERROR\0C42704\0Mno such setting\0\0"),
        _ => {
            let length = (text.len() as u32).to_be_bytes();
            message(b'D', &[&[0, 1], &length[..], text.as_bytes()].concat())
        }
    };
    stream.write_all(&answer).ok()?;
    stream.write_all(&message(b'Z', b"I")).ok()?;
    let query = query(&mut stream)?;
    let from: Lsn = query.split_ascii_whitespace().find_map(|word| word.parse().ok())?;
    stream.write_all(&message(b'W', &[0, 0, 0])).ok()?;
    let mut at = (from - start) as usize;
    while at < wal.len() {
        let end = wal.len().min(at + 10_000);
        let mut body = vec![b'w'];
        body.extend_from_slice(&(start.0 + at as u64).to_be_bytes());
        body.extend_from_slice(&[0; 16]);
        body.extend_from_slice(&wal[at..end]);
        stream.write_all(&message(b'd', &body)).ok()?;
        at = end;
    }
    // Until the other one has enough.
    Some(stream)
}

impl Safekeeper {
    /// One that ends each connection when it has sent all. Also how often it did.
    fn ending(start: Lsn, wal: Vec<u8>) -> (Safekeeper, Arc<AtomicU64>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (asked, ends) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let ended = Arc::clone(&ends);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = send(stream, 0, start, &wal);
                ended.fetch_add(1, Ordering::SeqCst);
            }
        });
        (Safekeeper { address, asked }, ends)
    }

    fn start(start: Lsn, wal: Vec<u8>) -> Safekeeper {
        Safekeeper::that_knows(0, start, wal)
    }

    fn that_knows(configuration: u64, start: Lsn, wal: Vec<u8>) -> Safekeeper {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(AtomicU64::new(0));
        let (counted, wal) = (Arc::clone(&asked), Arc::new(wal));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                counted.fetch_add(1, Ordering::SeqCst);
                let wal = Arc::clone(&wal);
                std::thread::spawn(move || serve(stream, configuration, start, &wal));
            }
        });
        Safekeeper { address, asked }
    }
}

/// Whether layers can't be written now.
#[derive(Debug, Default)]
struct Layers(AtomicBool);

impl Interceptor for Layers {
    fn verdict(&self, action: &'static str, path: &str) -> Verdict {
        let is_refused =
            action == "write" && path.contains("/layers/") && self.0.load(Ordering::SeqCst);
        if is_refused { Verdict::Refuse } else { Verdict::Perform }
    }
}

/// A page server with one branch.
struct Imported {
    runtime: Runtime,
    directory: TempDir,
    store: Store,
    layers: Arc<Layers>,
    repository: Arc<Repository>,
    timeline: Arc<Timeline>,
    state: State,
}

fn imported() -> Imported {
    imported_with(Limits::default())
}

fn imported_with(limits: Limits) -> Imported {
    let (runtime, directory) = (runtime(), tempfile::tempdir().unwrap());
    let layers = Arc::new(Layers::default());
    let store = Store::open(&Location::Memory, None).unwrap().intercepted(Arc::clone(&layers) as _);
    let repository = open(&runtime, &store, directory.path(), limits).unwrap();
    let state = State::first(&mut SmallRng::seed_from_u64(1));
    let archive = archive(PgVersion::V15, &state);
    let timeline = repository.import(TENANT, TimelineId([7; 16]), "main", &archive[..]).unwrap();
    Imported { runtime, directory, store, layers, repository, timeline, state }
}

#[test]
fn h12_a_rotten_safekeeper_is_left_for_another() {
    let Imported { runtime, directory: _directory, store, repository, timeline, state, .. } =
        imported();
    let info = &timeline.info;
    let mut history =
        History::new(PgVersion::V15, info.start_lsn, info.start_record, Arc::new(state));
    history.grow(&mut SmallRng::seed_from_u64(2), 300);
    let mut rotten = history.bytes.clone();
    let middle = rotten.len() / 2;
    rotten[middle] ^= 1;
    let bad = Safekeeper::start(history.start, rotten.clone());
    let good = Safekeeper::start(history.start, history.bytes.clone());
    let safekeepers = Fixed(vec![bad.address.clone(), good.address.clone()]);
    let follower = {
        let timeline = Arc::clone(&timeline);
        std::thread::spawn(move || follow(&timeline, &safekeepers))
    };
    timeline.wait(history.end(), Duration::from_secs(10)).unwrap();
    let bad_sources = timeline.bad_sources();
    assert_eq!(bad_sources.keys().collect::<Vec<_>>(), [&bad.address], "{bad_sources:?}");
    assert!(bad.asked.load(Ordering::SeqCst) <= 2, "it is asked again and again");
    assert!(!timeline.has_failed());
    timeline.stop();
    follower.join().unwrap();

    // Where all are rotten, ingest waits, says why, and goes on when one is repaired.
    let repaired = Arc::new(Mutex::new(vec![bad.address.clone()]));
    let again = tempfile::tempdir().unwrap();
    repository.stop();
    drop(repository);
    let repository = open(&runtime, &store, again.path(), Limits::default()).unwrap();
    let timeline = repository.timeline(TimelineId([7; 16])).unwrap();
    let follower = {
        let (timeline, safekeepers) = (Arc::clone(&timeline), Changing(Arc::clone(&repaired)));
        std::thread::spawn(move || follow(&timeline, &safekeepers))
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while timeline.failure().is_none() {
        assert!(Instant::now() < deadline, "nobody says why it waits");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(timeline.failure().unwrap().contains(&bad.address));
    repaired.lock().push(good.address.clone());
    timeline
        .wait(history.end(), Duration::from_secs(10))
        .or_else(|_| timeline.wait(history.end(), Duration::from_secs(10)))
        .unwrap();
    timeline.stop();
    follower.join().unwrap();
    repository.stop();
}

/// A source begins a record that was given up with it; others went on with other ones, of which it knows nothing.
#[test]
fn a_record_that_was_given_up_when_it_had_begun_keeps_nobody_from_going_on() {
    let Imported { runtime: _runtime, directory: _directory, repository, timeline, state, .. } =
        imported();
    let info = &timeline.info;
    let state = Arc::new(state);
    let grown = |last: u64| {
        let mut history =
            History::new(PgVersion::V15, info.start_lsn, info.start_record, Arc::clone(&state));
        history.grow(&mut SmallRng::seed_from_u64(2), 100);
        let shared = history.bytes.len();
        history.grow(&mut SmallRng::seed_from_u64(last), 100);
        (history, shared)
    };
    let ((given_up, shared), (history, _)) = (grown(3), grown(4));
    // One that has no more than the beginning of a record, or goes on, for a moment, with others.
    let begun = given_up.bytes[..shared + 30].to_vec();
    assert!(begun[shared..] != history.bytes[shared..begun.len()]);
    let (lost, ends) = Safekeeper::ending(given_up.start, begun);
    let left = Safekeeper::start(history.start, history.bytes.clone());
    let safekeepers = Fixed(vec![lost.address.clone(), left.address.clone()]);
    let follower = {
        let timeline = Arc::clone(&timeline);
        std::thread::spawn(move || follow(&timeline, &safekeepers))
    };
    timeline.wait(history.end(), Duration::from_secs(10)).unwrap();
    assert!(ends.load(Ordering::SeqCst) > 0 && timeline.bad_sources().is_empty());
    timeline.stop();
    follower.join().unwrap();
    repository.stop();
}

/// Two logs that part at some point, each of its own members.
struct Parted {
    imported: Imported,
    parts_at: Lsn,
    given_up: Safekeeper,
    survivor: Safekeeper,
    /// What the survivor has.
    history: History,
    given_up_end: Lsn,
}

impl Parted {
    fn new(limits: Limits) -> Parted {
        let imported = imported_with(limits);
        let info = &imported.timeline.info;
        let state = Arc::new(imported.state.clone());
        let grown = |last: u64, most: usize| {
            let mut history =
                History::new(PgVersion::V15, info.start_lsn, info.start_record, Arc::clone(&state));
            history.grow(&mut SmallRng::seed_from_u64(2), 100);
            let shared = history.end();
            history.grow(&mut SmallRng::seed_from_u64(last), most);
            (history, shared)
        };
        let ((lost, _), (history, parts_at)) = (grown(3, 2000), grown(4, 1900));
        let given_up = Safekeeper::that_knows(1, lost.start, lost.bytes.clone());
        let survivor = Safekeeper::that_knows(2, history.start, history.bytes.clone());
        Parted { imported, parts_at, given_up, survivor, history, given_up_end: lost.end() }
    }

    /// Who the members are, and, from some time on, that one went on without the others.
    fn decide(&self, given_up_at: Option<Lsn>) {
        let info = &self.imported.timeline.info;
        let member =
            |node| Member { node: NodeId(node), incarnation: Incarnation([node as u8; 16]) };
        let mut chain = Chain::found(vec![member(1), member(2), member(3)]).unwrap();
        let mut given_up = AllGivenUp::default();
        if let Some(lsn) = given_up_at {
            chain = chain.recovered(member(3), vec![member(3)]).unwrap();
            let number = chain.newest().number();
            assert_eq!(number, 2);
            given_up = given_up.with(GivenUp { number, lsn, last_record: None });
        }
        let parameters = TimelineParameters {
            tenant: TENANT,
            timeline: info.id,
            system_id: info.system_id,
            pg_version: 15,
            pg_timeline: 1,
            segment_size: info.segment_size as u32,
            start_lsn: info.start_lsn,
            ancestor: None,
        };
        let quorum = Quorum {
            parameters,
            chain,
            is_older: false,
            restored: None,
            given_up,
            is_deleted: false,
        };
        let name = Quorum::object_name(TENANT, info.id);
        let put = self.imported.store.put(&name, quorum.encode().into());
        self.imported.runtime.block_on(put).unwrap();
    }

    fn follow(&self, safekeepers: &Arc<Mutex<Vec<String>>>) -> std::thread::JoinHandle<()> {
        let safekeepers = Changing(Arc::clone(safekeepers));
        let timeline = Arc::clone(&self.imported.timeline);
        std::thread::spawn(move || follow(&timeline, &safekeepers))
    }

    fn check(&self) {
        let timeline = &self.imported.timeline;
        let (end, state) = (self.history.end(), &self.history.states[&self.history.end()].1);
        // There may be more of the other one.
        let deadline = Instant::now() + Duration::from_secs(10);
        while timeline.progress.lsn() != end {
            assert!(Instant::now() < deadline, "it is at {}", timeline.progress.lsn());
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut page = [0; 8192];
        for (rel, pages) in &state.relations {
            for (block, expected) in (0..).zip(pages) {
                timeline.block(*rel, block, end, &mut page).unwrap();
                assert!(page == **expected, "block {block} of {rel}");
            }
        }
    }
}

struct Changing(Arc<Mutex<Vec<String>>>);

impl Safekeepers for Changing {
    fn candidates(&self, _: &Timeline) -> Vec<String> {
        self.0.lock().clone()
    }
}

#[test]
fn wal_that_was_given_up_is_not_taken_in() {
    let parted = Parted::new(Limits::default());
    parted.decide(Some(parted.parts_at));
    let timeline = &parted.imported.timeline;
    let safekeepers = Arc::new(Mutex::new(vec![parted.given_up.address.clone()]));
    let follower = parted.follow(&safekeepers);
    assert!(timeline.wait(parted.parts_at, Duration::from_secs(1)).is_err());
    assert!(parted.given_up.asked.load(Ordering::SeqCst) > 1);
    assert_eq!(timeline.progress.lsn(), timeline.info.start_lsn);
    safekeepers.lock().push(parted.survivor.address.clone());
    parted.check();
    assert!(timeline.bad_sources().is_empty(), "{:?}", timeline.bad_sources());
    timeline.stop();
    follower.join().unwrap();
    parted.imported.repository.stop();
}

/// It was taken in when it had not been given up yet: nothing of it becomes durable, or what a branch starts from.
#[test]
fn wal_that_was_taken_in_and_is_given_up_then_is_forgotten() {
    let parted = Parted::new(Limits::default());
    parted.decide(None);
    let Imported { timeline, repository, .. } = &parted.imported;
    let safekeepers = Arc::new(Mutex::new(vec![parted.given_up.address.clone()]));
    let follower = parted.follow(&safekeepers);
    timeline.wait(parted.given_up_end, Duration::from_secs(10)).unwrap();
    // Pages of it are remembered.
    let mut page = [0; 8192];
    for (rel, pages) in &parted.history.states[&parted.history.end()].1.relations {
        for (block, _) in (0..).zip(pages) {
            let _ = timeline.block(*rel, block, parted.given_up_end, &mut page);
        }
    }
    parted.decide(Some(parted.parts_at));
    // A branch waits for what is to come in its place: nobody has that yet, and then there is somebody.
    let refused = repository.create_branch("early", "main", Moment::Now).err().unwrap();
    assert!(refused.to_string().contains("is not reached yet"), "{refused:#}");
    assert_eq!(timeline.progress.lsn(), timeline.info.start_lsn);
    timeline.request_freeze();
    safekeepers.lock().push(parted.survivor.address.clone());
    parted.check();
    let branch = repository.create_branch("late", "main", Moment::Now).unwrap();
    assert_eq!(branch.info.start_lsn, parted.history.end());
    timeline.request_freeze();
    let deadline = Instant::now() + Duration::from_secs(10);
    while timeline.remote_consistent_lsn() < parted.history.end() {
        assert!(Instant::now() < deadline, "{:?}", timeline.trouble("flush"));
        std::thread::sleep(Duration::from_millis(10));
    }
    parted.check();
    timeline.stop();
    follower.join().unwrap();
    repository.stop();
}

/// Frozen layers that wait to be uploaded are not waited for by the ingest that is to forget them.
#[test]
fn what_is_refused_to_be_uploaded_holds_nothing_up() {
    // One layer waits, and the next one for that.
    let parted =
        Parted::new(Limits { frozen_layers: 1, open_layer_bytes: 1 << 20, ..Limits::default() });
    parted.decide(None);
    let Imported { timeline, repository, layers, .. } = &parted.imported;
    layers.0.store(true, Ordering::SeqCst);
    let safekeepers = Arc::new(Mutex::new(vec![parted.given_up.address.clone()]));
    let follower = parted.follow(&safekeepers);
    let deadline = Instant::now() + Duration::from_secs(10);
    while timeline.frozen_layers() == 0 {
        assert!(Instant::now() < deadline, "it is at {}", timeline.progress.lsn());
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(100));
    assert!(timeline.progress.lsn() < parted.given_up_end, "it waits");
    // What the message that is just being taken in had is looked at too.
    parted.decide(Some(Lsn(timeline.progress.lsn().0 - 8)));
    let refused = repository.create_branch("early", "main", Moment::Now).err();
    assert!(refused.is_some(), "it begins with what was given up");
    parted.decide(Some(timeline.info.start_lsn));
    layers.0.store(false, Ordering::SeqCst);
    while timeline.progress.lsn() > timeline.info.start_lsn {
        assert!(Instant::now() < deadline, "{:?}", timeline.trouble("flush"));
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(timeline.remote_consistent_lsn(), timeline.info.start_lsn);
    safekeepers.lock().push(parted.survivor.address.clone());
    parted.check();
    timeline.stop();
    follower.join().unwrap();
    repository.stop();
}

/// A safekeeper that has no timeline, and counts who asks for one.
fn without_timelines() -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let asked = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&asked);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            counted.fetch_add(1, Ordering::SeqCst);
            let text = b"SFATAL\0C3D000\0Mtimeline: there is none\0\0";
            let _ = stream.write_all(&message(b'E', text));
            // Until the other one has read it.
            std::thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()));
        }
    });
    (address, asked)
}

#[test]
fn a_timeline_that_no_safekeeper_has_is_seldom_asked_for() {
    struct Heard(Vec<String>, Arc<std::sync::atomic::AtomicBool>);
    impl Safekeepers for Heard {
        fn candidates(&self, _: &Timeline) -> Vec<String> {
            self.0.clone()
        }
        fn is_known(&self, _: &Timeline) -> bool {
            self.1.load(Ordering::SeqCst)
        }
    }
    let Imported {
        runtime: _runtime,
        directory: _directory,
        store: _,
        repository,
        timeline,
        state: _,
        ..
    } = imported();
    let (address, asked) = without_timelines();
    let heard = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let safekeepers = Heard(vec![address], Arc::clone(&heard));
    let follower = {
        let timeline = Arc::clone(&timeline);
        std::thread::spawn(move || follow(&timeline, &safekeepers))
    };
    std::thread::sleep(Duration::from_secs(3));
    let before = asked.load(Ordering::SeqCst);
    assert!((1..=2).contains(&before), "asked {before} times");
    // It appears, and that is noticed soon; and whoever wants its WAL waits for no pause.
    heard.store(true, Ordering::SeqCst);
    let deadline = Instant::now() + Duration::from_secs(3);
    while asked.load(Ordering::SeqCst) == before {
        assert!(Instant::now() < deadline, "nobody notices that it appeared");
        std::thread::sleep(Duration::from_millis(10));
    }
    heard.store(false, Ordering::SeqCst);
    std::thread::sleep(Duration::from_secs(1));
    let before = asked.load(Ordering::SeqCst);
    let _ = timeline.wait(Lsn(timeline.info.start_lsn.0 + 1), Duration::from_millis(300));
    assert!(asked.load(Ordering::SeqCst) > before, "whoever waits is not heard");
    timeline.stop();
    follower.join().unwrap();
    repository.stop();
}

/// Processor time of the calling thread, in ticks of 10 ms.
fn ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

#[test]
fn a_branch_of_what_stopped_for_good_waits_without_work() {
    let Imported { runtime, directory: _directory, store, repository, timeline, state, .. } =
        imported();
    let info = &timeline.info;
    let mut history =
        History::new(PgVersion::V15, info.start_lsn, info.start_record, Arc::new(state));
    history.grow(&mut SmallRng::seed_from_u64(2), 100);
    Ingest::new(Arc::clone(&timeline)).unwrap().feed(&history.bytes).unwrap();
    let child = repository.create_branch("child", "main", Moment::Now).unwrap().info.id;
    repository.stop();
    drop((timeline, repository));
    // What the branch starts from was not in object storage.
    let again = tempfile::tempdir().unwrap();
    let repository = open(&runtime, &store, again.path(), Limits::default()).unwrap();
    let (main, child) = (repository.branch("main").unwrap(), repository.timeline(child).unwrap());
    assert!(main.progress.lsn() < child.info.start_lsn);
    main.fail("its WAL is not understood".to_owned());
    let follower = {
        let child = Arc::clone(&child);
        std::thread::spawn(move || {
            follow(&child, &Fixed(Vec::new()));
            ticks()
        })
    };
    std::thread::sleep(Duration::from_secs(1));
    child.stop();
    let worked = follower.join().unwrap();
    assert!(worked <= 10, "it looked again and again for {worked} ticks");
    repository.stop();
}
