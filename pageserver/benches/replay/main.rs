//! Ingest and page reads on the WAL of a real cluster, in process. `scripts/bench` makes that WAL and runs stock
//! PostgreSQL's replay of the same bytes beside this.
//!
//! ```text
//! replay decode --data base.tar --wal DIRECTORY      records and their parts, nothing else
//! replay ingest --data base.tar --wal DIRECTORY      the page server's whole way into layers
//! replay redo   --data base.tar --wal DIRECTORY      native redo into pages in memory: all of it, and its last part alone
//! replay pages  --data base.tar --wal DIRECTORY --rel NAME=1663/5/16384 ...
//! ```
//! `base.tar` is a data directory that was shut down cleanly; the WAL goes on from there, and changes no page before
//! the first whole segment. Prints one line of JSON a result.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // A failed benchmark ends.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use pgstrata_blob::{Location, Store};
use pgstrata_ids::{Fork, Key, Lsn, RelTag, TenantId, TimelineId};
use pgstrata_pageserver::import::read_archive;
use pgstrata_pageserver::ingest::Ingest;
use pgstrata_pageserver::layer::{BlockCache, LayerSource};
use pgstrata_pageserver::receiver::Safekeepers;
use pgstrata_pageserver::remote::take_generation;
use pgstrata_pageserver::repository::Repository;
use pgstrata_pageserver::timeline::{Limits, Timeline};
use pgstrata_pageserver::value::decode_page;
use pgstrata_pg_redo::{ControlState, Effect, Effects, apply_block, apply_slru};
use pgstrata_pg_wal::{DecodedRecord, WalDecoder};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rustc_hash::FxHashMap;
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

/// A repository with the imported cluster, and its WAL.
struct Bench {
    repository: Arc<Repository>,
    timeline: Arc<Timeline>,
    wal: Vec<u8>,
    records: u64,
    /// End of the last whole record.
    end: Lsn,
    /// Start of the last record before the WAL.
    last: Lsn,
    decode_seconds: f64,
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
    let start = timeline.info.start_lsn;
    let segment_size = timeline.info.segment_size;

    // Records between the shutdown and the timeline's start: only the last one's place matters.
    let checkpoint = timeline.info.start_record;
    let before = read_wal(&options.wal, checkpoint, segment_size);
    let mut decoder = WalDecoder::new(checkpoint, segment_size);
    decoder.feed(&before[(checkpoint.0 % segment_size) as usize..segment_size as usize]);
    let mut last = checkpoint;
    while let Some(record) = decoder.poll().unwrap() {
        last = record.lsn;
    }
    timeline.progress.advance(start, last);

    let wal = read_wal(&options.wal, start, segment_size);
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
    let wal = wal[..(end.0 - start.0) as usize].to_vec();
    Bench { repository, timeline, wal, records, end, last, decode_seconds, directory, runtime }
}

impl Bench {
    fn report(&self, what: &str, seconds: f64) {
        let bytes = self.wal.len() as f64;
        let row = json!({
            "what": what,
            "bytes": self.wal.len(),
            "records": self.records,
            "seconds": seconds,
            "mb_per_s": bytes / 1e6 / seconds,
            "records_per_s": self.records as f64 / seconds,
            "layer_bytes": self.repository.object_bytes(),
        });
        println!("{row}");
    }

    /// Ingests everything; the background threads flush and compact meanwhile, as they do.
    fn ingest(&self) -> f64 {
        let mut ingest = Ingest::new(Arc::clone(&self.timeline)).unwrap();
        let cpu = cpu_seconds();
        let began = Instant::now();
        for chunk in self.wal.chunks(CHUNK) {
            ingest.feed(chunk).unwrap();
        }
        let seconds = began.elapsed().as_secs_f64();
        assert_eq!(self.timeline.progress.lsn(), self.end);
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
                            self.timeline.block(rel, *block, self.end, &mut page).unwrap();
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
            let blocks = self.timeline.rel_size(*rel, self.end).unwrap().blocks.unwrap();
            let mut order: Vec<u32> = (0..blocks).collect();
            order.shuffle(&mut SmallRng::seed_from_u64(7));
            let (one, eight) = order.split_at(order.len() / 2);
            self.read(name, *rel, one, 1, from);
            self.read(name, *rel, eight, 8, from);
        }
    }
}

/// Pages in memory, as redo finds and leaves them.
struct Pages {
    base: FxHashMap<Key, Vec<u8>>,
    places: FxHashMap<Key, u32>,
    pages: Vec<[u8; 8192]>,
}

/// One change to one page.
struct Step {
    place: u32,
    block: u32,
    is_slru: bool,
    lsn: Lsn,
    value: Range<usize>,
}

impl Pages {
    fn new(data: &Path) -> (Pages, ControlState) {
        let imported = read_archive(File::open(data).unwrap()).unwrap();
        let base: FxHashMap<Key, Vec<u8>> = imported.values.into_iter().collect();
        // Room for what there is and as much again, as a server has in its shared buffers.
        let pages = Vec::with_capacity(2 * base.len() + 16384);
        let pages = Pages { base, places: FxHashMap::default(), pages };
        (pages, imported.state)
    }

    fn place(&mut self, key: Key) -> u32 {
        if let Some(place) = self.places.get(&key) {
            return *place;
        }
        let place = self.pages.len() as u32;
        self.pages.push([0; 8192]);
        if let Some(stored) = self.base.get(&key) {
            decode_page(&stored[1..], &mut self.pages[place as usize]).unwrap();
        }
        self.places.insert(key, place);
        place
    }

    fn apply(&mut self, step: &Step, values: &[u8]) {
        apply_step(&mut self.pages[step.place as usize], step, values);
    }
}

fn apply_step(page: &mut [u8; 8192], step: &Step, values: &[u8]) {
    let value = &values[step.value.clone()];
    match step.is_slru {
        true => apply_slru(page, value, step.lsn).unwrap(),
        false => apply_block(page, value, step.block, step.lsn).unwrap(),
    }
}

impl Bench {
    /// Decodes, derives, and gives each change of a page to `each`.
    fn derive(
        &self,
        pages: &mut Pages,
        control: &mut ControlState,
        mut each: impl FnMut(&mut Pages, Step, &[u8]),
    ) {
        let (start, record_start) = (self.timeline.info.start_lsn, self.last);
        let segment_size = self.timeline.info.segment_size;
        let mut decoder = WalDecoder::new(start, segment_size).with_prev(record_start);
        let mut effects = Effects::new();
        for chunk in self.wal.chunks(CHUNK) {
            decoder.feed(chunk);
            while let Some(record) = decoder.poll().unwrap() {
                let decoded = DecodedRecord::decode(record).unwrap();
                effects.derive(&decoded, control).unwrap();
                for effect in &effects.items {
                    let (key, block, is_slru, value) = match *effect {
                        Effect::Block { rel, block, value, .. } => {
                            (Key::rel_block(rel, block), block, false, value)
                        }
                        Effect::SlruPage { kind, page, value, .. } => {
                            (Key::slru_page(kind, page), 0, true, value)
                        }
                        _ => continue,
                    };
                    let value = value.start as usize..value.end as usize;
                    let place = pages.place(key);
                    let step = Step { place, block, is_slru, lsn: decoded.end, value };
                    each(pages, step, &effects.buf);
                }
            }
        }
    }

    /// Native redo of everything, the way from WAL to pages and its last part alone.
    fn redo(&self, data: &Path) {
        let (mut pages, mut control) = Pages::new(data);
        let began = Instant::now();
        self.derive(&mut pages, &mut control, |pages, step, values| pages.apply(&step, values));
        self.report("redo", began.elapsed().as_secs_f64());

        let (mut pages, mut control) = Pages::new(data);
        let (mut steps, mut kept) = (Vec::new(), Vec::new());
        self.derive(&mut pages, &mut control, |_, step, values| {
            let start = kept.len();
            kept.extend_from_slice(&values[step.value.clone()]);
            steps.push(Step { value: start..kept.len(), ..step });
        });
        let fresh = pages.pages.clone();
        let began = Instant::now();
        steps.iter().for_each(|step| pages.apply(step, &kept));
        self.report("apply", began.elapsed().as_secs_f64());
        let serial = std::mem::replace(&mut pages.pages, fresh.clone());

        // As a page server replays: each page's changes one after the other, as layers hold them.
        steps.sort_by_key(|step| step.place);
        let mut sorted = Vec::with_capacity(kept.len());
        for step in &mut steps {
            let start = sorted.len();
            sorted.extend_from_slice(&kept[step.value.clone()]);
            step.value = start..sorted.len();
        }
        let kept = sorted;
        let began = Instant::now();
        steps.iter().for_each(|step| pages.apply(step, &kept));
        self.report("apply by page", began.elapsed().as_secs_f64());
        let by_page = std::mem::replace(&mut pages.pages, fresh);
        assert!(serial == by_page, "the order among pages matters");

        // Pages are independent of each other: every thread takes those of its own.
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let each = pages.pages.len().div_ceil(threads).max(1);
        let mut shares: Vec<Vec<&Step>> = (0..threads).map(|_| Vec::new()).collect();
        for step in &steps {
            shares[step.place as usize / each].push(step);
        }
        let began = Instant::now();
        std::thread::scope(|scope| {
            for (number, (share, pages)) in
                shares.iter().zip(pages.pages.chunks_mut(each)).enumerate()
            {
                let kept = &kept;
                scope.spawn(move || {
                    for step in share {
                        apply_step(&mut pages[step.place as usize - number * each], step, kept);
                    }
                });
            }
        });
        self.report(&format!("apply, {threads} threads"), began.elapsed().as_secs_f64());
        assert!(serial == pages.pages, "the order among pages matters");
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let Some(mode) = arguments.next() else {
        println!("this one needs a cluster's WAL: 'make bench' makes it and runs it");
        return;
    };
    let options = options(arguments);
    let mut bench = prepare(&options);
    match mode.as_str() {
        "decode" => bench.report("decode", bench.decode_seconds),
        "ingest" => {
            let seconds = bench.ingest();
            bench.report("ingest", seconds);
        }
        "redo" => bench.redo(&options.data),
        "pages" => {
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
