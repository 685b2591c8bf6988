//! Ingest and page reads on the WAL of a real cluster, in process. `scripts/bench` makes that WAL and runs stock
//! PostgreSQL's replay of the same bytes beside this.
//!
//! ```text
//! replay decode --data base.tar --wal DIRECTORY      records and their parts, nothing else
//! replay ingest --data base.tar --wal DIRECTORY      the page server's whole way into layers
//! replay redo   --data base.tar --wal DIRECTORY      native redo into pages in memory, whole and in parts
//! replay rebuild --data base.tar --wal DIRECTORY     a page from an older one and 10 or 1,000 pieces
//! replay pages  --data base.tar --wal DIRECTORY --rel NAME=1663/5/16384 ...
//! ```
//! `base.tar` is a data directory that was shut down cleanly; the WAL goes on from there, and changes no page before
//! the first whole segment. Prints one line of JSON a result.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // A failed benchmark ends.

mod memory;
mod redo;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use pgstrata_blob::{Location, Store};
use pgstrata_ids::{Fork, Lsn, RelTag, TenantId, TimelineId};
use pgstrata_pageserver::ingest::Ingest;
use pgstrata_pageserver::layer::{BlockCache, Descriptors, LayerSource};
use pgstrata_pageserver::receiver::Safekeepers;
use pgstrata_pageserver::remote::take_generation;
use pgstrata_pageserver::repository::Repository;
use pgstrata_pageserver::timeline::{Limits, Timeline};
use pgstrata_pg_wal::{DecodedRecord, WalDecoder};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use serde_json::json;

/// As a safekeeper sends it.
const CHUNK: usize = 128 * 1024;

/// Processor time of the whole process, in seconds.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) / 100.0
}

struct Nobody;

impl Safekeepers for Nobody {
    fn candidates(&self, _: &Timeline) -> Vec<String> {
        Vec::new()
    }
}

struct Options {
    data: PathBuf,
    wal: PathBuf,
    relations: Vec<(String, RelTag)>,
}

fn relation(text: &str) -> (String, RelTag) {
    let (name, path) = text.split_once('=').expect("--rel NAME=TABLESPACE/DATABASE/RELATION");
    let parts: Vec<u32> = path.split('/').map(|part| part.parse().unwrap()).collect();
    let [spc, db, rel] = parts[..] else { panic!("--rel {text}") };
    (name.to_owned(), RelTag { spc, db, rel, fork: Fork::Main })
}

fn options(mut arguments: impl Iterator<Item = String>) -> Options {
    let mut options = Options { data: "".into(), wal: "".into(), relations: Vec::new() };
    while let Some(flag) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{flag} needs a value"));
        match flag.as_str() {
            "--data" => options.data = value().into(),
            "--wal" => options.wal = value().into(),
            "--rel" => options.relations.push(relation(&value())),
            "--bench" => {}
            _ => panic!("unknown argument {flag}"),
        }
    }
    options
}

/// The segments in order, as one piece of memory, from the segment that holds `from`.
fn read_wal(directory: &Path, from: Lsn, segment_size: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in from.0 / segment_size.. {
        let per_file = 0x1_0000_0000 / segment_size;
        let name = format!("00000001{:08X}{:08X}", number / per_file, number % per_file);
        match std::fs::read(directory.join(name)) {
            // A segment kept for later use still holds old WAL.
            Ok(segment) if segment[8..16] == (number * segment_size).to_le_bytes() => {
                bytes.extend_from_slice(&segment);
            }
            _ => return bytes,
        }
    }
    unreachable!("LSNs end")
}

/// WAL behind a data directory.
struct Recording {
    wal: Vec<u8>,
    segment_size: u64,
    records: u64,
    start: Lsn,
    /// End of the last whole record.
    end: Lsn,
    /// Start of the last record before the WAL.
    last: Lsn,
    decode_seconds: f64,
}

impl Recording {
    /// From `start` on, a segment's start; `checkpoint` is a record before it.
    fn read(directory: &Path, start: Lsn, checkpoint: Lsn, segment_size: u64) -> Recording {
        // Records between the shutdown and the timeline's start: only the last one's place matters.
        let before = read_wal(directory, checkpoint, segment_size);
        let mut decoder = WalDecoder::new(checkpoint, segment_size);
        decoder.feed(&before[(checkpoint.0 % segment_size) as usize..segment_size as usize]);
        let mut last = checkpoint;
        while let Some(record) = decoder.poll().unwrap() {
            last = record.lsn;
        }

        let mut wal = read_wal(directory, start, segment_size);
        let began = Instant::now();
        let mut decoder = WalDecoder::new(start, segment_size).with_prev(last);
        let (mut records, mut end, mut parts) = (0, start, 0);
        'wal: for chunk in wal.chunks(CHUNK) {
            decoder.feed(chunk);
            loop {
                match decoder.poll() {
                    Ok(Some(record)) => {
                        records += 1;
                        end = record.end;
                        parts += DecodedRecord::decode(record).unwrap().blocks.len();
                    }
                    Ok(None) => break,
                    // The server was stopped at once: behind its last record there is old WAL.
                    Err(_) => break 'wal,
                }
            }
        }
        std::hint::black_box(parts);
        let decode_seconds = began.elapsed().as_secs_f64();
        wal.truncate((end.0 - start.0) as usize);
        Recording { wal, segment_size, records, start, end, last, decode_seconds }
    }

    fn report(&self, what: &str, seconds: f64) {
        let bytes = self.wal.len() as f64;
        let row = json!({
            "what": what,
            "bytes": self.wal.len(),
            "records": self.records,
            "seconds": seconds,
            "mb_per_s": bytes / 1e6 / seconds,
            "records_per_s": self.records as f64 / seconds,
        });
        println!("{row}");
    }
}

/// A repository with the imported cluster, and its WAL.
struct Bench {
    repository: Arc<Repository>,
    timeline: Arc<Timeline>,
    recording: Recording,
    directory: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

fn open(runtime: &tokio::runtime::Runtime, directory: &Path) -> Arc<Repository> {
    let location: Location = directory.join("objects").to_str().unwrap().parse().unwrap();
    let store = Store::open(&location, None).unwrap();
    runtime.block_on(async {
        let generation = take_generation(&store).await.unwrap();
        let source = Arc::new(LayerSource {
            store,
            runtime: tokio::runtime::Handle::current(),
            cache: BlockCache::new(256 << 20),
            descriptors: Descriptors::new(512),
            directory: directory.join("layers"),
            downloaded: AtomicU64::new(0),
        });
        Repository::open(source, generation, Limits::default(), Arc::new(Nobody)).await.unwrap()
    })
}

fn prepare(options: &Options) -> Bench {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.unwrap();
    let directory = tempfile::Builder::new().prefix("pgstrata-bench-").tempdir().unwrap();
    let repository = open(&runtime, directory.path());
    let archive = File::open(&options.data).unwrap();
    let (tenant, id) = (TenantId([1; 16]), TimelineId([2; 16]));
    let timeline = repository.import(tenant, id, "main", archive).unwrap();
    let info = &timeline.info;
    let recording =
        Recording::read(&options.wal, info.start_lsn, info.start_record, info.segment_size);
    timeline.progress.advance(recording.start, recording.last);
    Bench { repository, timeline, recording, directory, runtime }
}

/// Leaves as much touched memory in the heap as layers in memory take, as a server has that runs for a while: a new
/// process meets a page fault for every 4 KiB that it takes in at first. That is paid once, and would be a third of what
/// is measured here.
fn warm_heap() {
    const PIECE: usize = 16 << 20;
    // This one is mapped by itself; that it was freed makes glibc take pieces of its size from the heap from now on.
    drop(std::hint::black_box(vec![1u8; PIECE + (1 << 20)]));
    let touched: Vec<Vec<u8>> = (0..20).map(|_| vec![1; PIECE]).collect();
    // What lies above them stays, so that the heap is not given back.
    std::mem::forget(std::hint::black_box(Vec::<u8>::with_capacity(PIECE)));
    drop(std::hint::black_box(touched));
}

impl Bench {
    /// Ingests everything; the background threads flush and compact meanwhile, as they do.
    fn ingest(&self) -> f64 {
        let mut ingest = Ingest::new(Arc::clone(&self.timeline)).unwrap();
        warm_heap();
        // What the import wrote is not to be written while something else is measured.
        rustix::fs::sync();
        let cpu = cpu_seconds();
        let began = Instant::now();
        for chunk in self.recording.wal.chunks(CHUNK) {
            ingest.feed(chunk).unwrap();
        }
        let seconds = began.elapsed().as_secs_f64();
        assert_eq!(self.timeline.progress.lsn(), self.recording.end);
        eprintln!("{:.2} s of processor time in {seconds:.2} s", cpu_seconds() - cpu);
        seconds
    }

    /// Reads blocks by so many threads.
    fn read(&self, name: &str, rel: RelTag, blocks: &[u32], readers: usize, from: &str) {
        let began = Instant::now();
        let mut times: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = blocks
                .chunks(blocks.len().div_ceil(readers))
                .map(|blocks| {
                    scope.spawn(move || {
                        let mut page = [0; 8192];
                        let one = |block: &u32| {
                            let began = Instant::now();
                            self.timeline
                                .block(rel, *block, self.recording.end, &mut page)
                                .unwrap();
                            began.elapsed().as_nanos() as u64
                        };
                        blocks.iter().map(one).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let seconds = began.elapsed().as_secs_f64();
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100] as f64 / 1e3;
        let row = json!({
            "what": "pages", "relation": name, "from": from, "readers": readers,
            "pages": blocks.len(), "p50_us": at(50), "p99_us": at(99),
            "pages_per_s": blocks.len() as f64 / seconds,
        });
        println!("{row}");
    }

    /// Every block of the relations once, in random order: half by one reader, half by eight. No page is read twice,
    /// so that none comes from the cache of pages.
    fn read_all(&self, relations: &[(String, RelTag)], from: &str) {
        for (name, rel) in relations {
            let blocks = self.timeline.rel_size(*rel, self.recording.end).unwrap().blocks.unwrap();
            let mut order: Vec<u32> = (0..blocks).collect();
            order.shuffle(&mut SmallRng::seed_from_u64(7));
            let (one, eight) = order.split_at(order.len() / 2);
            self.read(name, *rel, one, 1, from);
            self.read(name, *rel, eight, 8, from);
        }
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let Some(mode) = arguments.next() else {
        println!("this one needs a cluster's WAL: 'make bench' makes it and runs it");
        return;
    };
    let options = options(arguments);
    match mode.as_str() {
        "redo" => redo::all(&options),
        "rebuild" => redo::rebuild(&options),
        "decode" => {
            let bench = prepare(&options);
            bench.recording.report("decode", bench.recording.decode_seconds);
            bench.repository.shut_down();
        }
        "ingest" => {
            let bench = prepare(&options);
            let seconds = bench.ingest();
            bench.recording.report("ingest", seconds);
            bench.repository.shut_down();
        }
        "pages" => {
            let mut bench = prepare(&options);
            bench.ingest();
            bench.read_all(&options.relations, "memory");
            bench.repository.shut_down();
            // A page server that just started: what it reads lies in layer files.
            bench.repository = open(&bench.runtime, bench.directory.path());
            bench.timeline = bench.repository.timeline(bench.timeline.info.id).unwrap();
            bench.read_all(&options.relations, "layers");
            bench.repository.shut_down();
        }
        other => panic!("unknown mode {other}"),
    }
}
