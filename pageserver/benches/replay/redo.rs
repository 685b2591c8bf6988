//! Native redo into pages in memory, beside which stock PostgreSQL's replay of the same WAL is measured.

use std::time::Instant;

use pgstrata_ids::Lsn;
use pgstrata_pageserver::import::Imported;
use pgstrata_pg_redo::{ControlState, Effects, Reads, ValueRange, reads};
use pgstrata_pg_wal::{DecodedRecord, WalDecoder};
use serde_json::json;

use crate::memory::{Change, Memory, Page, apply};
use crate::{CHUNK, Options, Recording};

/// Values of so many bytes are gathered before their pages are changed: with what leads to them, they stay in a core's
/// own caches.
const BATCH_BYTES: usize = 128 << 10;

/// So many changes before its turn, a page's header and line pointers are asked for; they tell where the rest is.
const HEADER_AHEAD: usize = 12;

/// So many changes before its turn, the parts of the page that the change reads are asked for.
const ITEMS_AHEAD: usize = 4;

/// Changes of pages, in the order of the WAL.
#[derive(Default)]
struct Batch {
    changes: Vec<Change>,
}

impl Batch {
    /// Memory is slow beside redo, and a change by itself would wait for its page, the line pointer and the item in
    /// turn: here, waits of one change go on beside work on others.
    fn apply(&mut self, pages: &mut [Page], values: &[u8]) {
        for (at, change) in self.changes.iter().enumerate() {
            if let Some(later) = self.changes.get(at + HEADER_AHEAD) {
                let page = &pages[later.place as usize];
                (0..4).for_each(|line| prefetch(page, line * 64));
            }
            if let Some(later) = self.changes.get(at + ITEMS_AHEAD) {
                let ValueRange { start, end } = later.value;
                let reads = reads(&values[start as usize..end as usize]);
                prefetch_items(&pages[later.place as usize], reads);
            }
            apply(&mut pages[change.place as usize], change, values);
        }
        self.changes.clear();
    }
}

fn prefetch_items(page: &Page, reads: Reads) {
    let upper = usize::from(u16::from_le_bytes([page[14], page[15]]));
    match reads {
        Reads::Page => (upper..8192).step_by(64).for_each(|at| prefetch(page, at)),
        Reads::Item(number) => {
            let line = (20 + 4 * usize::from(number)) % 8192;
            let offset = usize::from(u16::from_le_bytes([page[line], page[line + 1]]) & 0x7FFF);
            prefetch(page, offset);
            prefetch(page, offset + 64);
        }
        Reads::FreeSpace => {}
    }
    if reads != Reads::Page {
        prefetch(page, upper + 8192 - 64);
        prefetch(page, upper + 8192 - 128);
    }
}

/// Asks for a byte of the page, modulo its length.
#[inline]
fn prefetch(page: &Page, at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing, whatever its address is; this one is within the page, too.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(page.as_ptr().add(at % 8192).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (page, at);
}

/// Decodes and derives; `each` is given every record's effects, and what it leaves of their values stays.
fn derive(
    recording: &Recording,
    control: &mut ControlState,
    mut each: impl FnMut(&mut Effects, Lsn),
) -> Effects {
    let mut decoder =
        WalDecoder::new(recording.start, recording.segment_size).with_prev(recording.last);
    let mut effects = Effects::new();
    for chunk in recording.wal.chunks(CHUNK) {
        decoder.feed(chunk);
        while let Some(record) = decoder.poll().unwrap() {
            let decoded = DecodedRecord::decode(record).unwrap();
            effects.derive_next(&decoded, control).unwrap();
            each(&mut effects, decoded.end);
        }
    }
    effects
}

#[inline(never)] // For profiles.
/// From WAL to pages, every record's changes before those of the next.
fn in_order(recording: &Recording, memory: &mut Memory, control: &mut ControlState) {
    derive(recording, control, |effects, lsn| {
        let copies = memory.changes(effects, lsn, |memory, change| {
            apply(&mut memory.arena.pages()[change.place as usize], &change, &effects.buf);
        });
        if copies {
            memory.copy_databases(effects);
        }
        effects.buf.clear();
    });
}

#[inline(never)] // For profiles.
/// From WAL to pages, the changes of some thousand records at a time.
fn in_batches(recording: &Recording, memory: &mut Memory, control: &mut ControlState) {
    let mut batch = Batch::default();
    let rest = derive(recording, control, |effects, lsn| {
        let copies = memory.changes(effects, lsn, |_, change| batch.changes.push(change));
        if copies || effects.buf.len() >= BATCH_BYTES {
            batch.apply(memory.arena.pages(), &effects.buf);
            effects.buf.clear();
        }
        if copies {
            memory.copy_databases(effects);
        }
    });
    batch.apply(memory.arena.pages(), &rest.buf);
}

/// Every change of a page, as layers hold them, and the pages as they were before.
struct Kept {
    changes: Vec<Change>,
    values: Vec<u8>,
    fresh: Vec<Page>,
}

impl Kept {
    fn collect(recording: &Recording, memory: &Memory, mut control: ControlState) -> Kept {
        let mut memory = memory.copy();
        let mut changes = Vec::new();
        let effects = derive(recording, &mut control, |effects, lsn| {
            let copies = memory.changes(effects, lsn, |_, change| changes.push(change));
            assert!(!copies, "this WAL copies a database, for which changes have to be applied");
        });
        Kept { changes, values: effects.buf, fresh: memory.arena.pages().to_vec() }
    }

    /// Page by page; each page's changes stay in their order, and their values lie one after the other.
    fn by_page(self) -> Kept {
        let Kept { mut changes, values, fresh } = self;
        changes.sort_by_key(|change| change.place);
        let mut sorted = Vec::with_capacity(values.len());
        for change in &mut changes {
            let start = sorted.len() as u32;
            let ValueRange { start: from, end: to } = change.value;
            sorted.extend_from_slice(&values[from as usize..to as usize]);
            change.value = ValueRange { start, end: sorted.len() as u32 };
        }
        Kept { changes, values: sorted, fresh }
    }

    fn apply_all(&self, pages: &mut [Page]) {
        for change in &self.changes {
            apply(&mut pages[change.place as usize], change, &self.values);
        }
    }

    /// Every thread takes pages of its own.
    fn apply_by_threads(&self, pages: &mut [Page], threads: usize) {
        let each = pages.len().div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            let mut rest = &self.changes[..];
            for (number, pages) in pages.chunks_mut(each).enumerate() {
                let first = number * each;
                let end = rest.partition_point(|change| (change.place as usize) < first + each);
                let (share, others) = rest.split_at(end);
                rest = others;
                scope.spawn(move || {
                    for change in share {
                        apply(&mut pages[change.place as usize - first], change, &self.values);
                    }
                });
            }
        });
    }
}

fn read(options: &Options) -> (Memory, ControlState, Recording) {
    let (memory, imported) = Memory::read(&options.data);
    let segment_size = u64::from(imported.state.control.wal_segment_size);
    let Imported { start_lsn, record_start, state, .. } = imported;
    let recording = Recording::read(&options.wal, start_lsn, record_start, segment_size);
    (memory, state, recording)
}

fn timed(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_secs_f64()
}

/// All of redo, and its parts. However it is done, the pages have to be the same.
pub fn all(options: &Options) {
    let (memory, control, recording) = read(options);
    let (mut one, mut state) = (memory.copy(), control);
    recording.report("redo", timed(|| in_batches(&recording, &mut one, &mut state)));
    let (mut other, mut state) = (memory.copy(), control);
    recording.report("redo in order", timed(|| in_order(&recording, &mut other, &mut state)));
    assert!(one.arena.pages() == other.arena.pages(), "the order among pages matters");
    drop(other);

    let kept = Kept::collect(&recording, &memory, control);
    let mut pages = kept.fresh.clone();
    recording.report("apply in order", timed(|| kept.apply_all(&mut pages)));
    assert!(pages == one.arena.pages(), "applying apart from deriving matters");
    let kept = kept.by_page();
    pages.clone_from(&kept.fresh);
    recording.report("apply", timed(|| kept.apply_all(&mut pages)));
    assert!(pages == one.arena.pages(), "the order among pages matters");
    pages.clone_from(&kept.fresh);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let seconds = timed(|| kept.apply_by_threads(&mut pages, threads));
    recording.report(&format!("apply, {threads} threads"), seconds);
    assert!(pages == one.arena.pages(), "the order among pages matters");
}

/// One page from an older one and so many pieces, as a read does: a copy of the page, then each piece.
pub fn rebuild(options: &Options) {
    let (memory, control, recording) = read(options);
    let kept = Kept::collect(&recording, &memory, control).by_page();
    for pieces in [10, 100, 1000] {
        let mut pages = kept.fresh.clone();
        let mut times = Vec::new();
        for of_page in kept.changes.chunk_by(|a, b| a.place == b.place) {
            let page = &mut pages[of_page[0].place as usize];
            // The first ones bring the page into being.
            for some in of_page.chunks(pieces) {
                let began = Instant::now();
                let mut rebuilt = *page;
                some.iter().for_each(|change| apply(&mut rebuilt, change, &kept.values));
                let nanoseconds = began.elapsed().as_nanos() as u64;
                *page = rebuilt;
                if some.len() == pieces {
                    times.push(nanoseconds);
                }
            }
        }
        times.sort_unstable();
        if times.is_empty() {
            continue;
        }
        let at = |percent: usize| times[(times.len() - 1) * percent / 100] as f64 / 1e3;
        let row = json!({
            "what": "rebuild", "pieces": pieces, "pages": times.len(), "p50_us": at(50), "p99_us": at(99),
        });
        println!("{row}");
    }
}
