//! Effects and redo: any records on any pages.

use crate::control::control;
use crate::input::Input;
use pgstrata_ids::{Fork, Lsn, PAGE_SIZE, RelTag};
use pgstrata_pg_redo::{
    Checker, ControlState, Effect, Effects, Loaded, Page, PageStore, apply_slru, is_complete,
    is_complete_slru, is_truncated, value_kind,
};
use pgstrata_pg_wal::{DecodedRecord, PgVersion, Record};
use std::collections::BTreeMap;
use std::convert::Infallible;

const HEADER: usize = 24;
/// Records of one input: enough to build a page and to change it.
const RECORDS: usize = 16;
/// Pages of one input.
const PAGES: usize = 8;

/// Records on pages.
///
/// ```text
/// u8   version | 4 hint bits are logged | 8 commit timestamps
/// then items: u8 kind
///      1: page    u8 fork, u32 block, u16 length of its start, u16 length of its end, both; zeros between
///      else: record  u16 length, bytes; its length field is put right
/// ```
pub fn redo(data: &[u8]) {
    let mut input = Input(data);
    let flags = input.u8();
    let version = PgVersion::ALL[usize::from(flags & 3)];
    let state = control(version, flags & 4 != 0, flags & 8 != 0);
    let mut store = Pages::default();
    let mut records = Vec::new();
    while !input.is_empty() && records.len() < RECORDS {
        if input.u8() == 1 {
            store.add(&mut input);
        } else {
            let length = usize::from(input.u16());
            let mut bytes = input.take(length).to_vec();
            bytes.resize(bytes.len().max(HEADER), 0);
            let total = bytes.len() as u32;
            bytes[..4].copy_from_slice(&total.to_le_bytes());
            records.push(bytes);
        }
    }
    run(state, store, &records);
}

fn run(mut state: ControlState, store: Pages, records: &[Vec<u8>]) {
    let mut slru = [0x11; PAGE_SIZE];
    let mut effects = Effects::new();
    let mut checker = Checker::new(store, state, true);
    for (at, bytes) in records.iter().enumerate() {
        // Past every page LSN that an input can name by chance, or before it.
        let lsn = Lsn((1 << 40) + at as u64 * 0x1_0000);
        let record = Record { lsn, end: lsn + 0x8000, bytes };
        if checker.feed(record).is_err() {
            return;
        }
        let Ok(decoded) = DecodedRecord::decode(record) else { return };
        if effects.derive(&decoded, &mut state).is_err() {
            continue;
        }
        // A block's main data may be kept once for each of 33 blocks, but is bounded itself.
        assert!(effects.buf.len() <= 34 * (bytes.len() + 64));
        for effect in &effects.items {
            match *effect {
                Effect::Block { value, complete, .. } => {
                    let value = effects.value(value);
                    assert_eq!(is_complete(value), complete);
                    assert!(value_kind(value).is_ok());
                }
                Effect::SlruPage { value, complete, .. } => {
                    let value = effects.value(value);
                    assert_eq!(is_complete_slru(value), complete);
                    assert!(apply_slru(&mut slru, value, record.end).is_ok());
                }
                Effect::SlruTruncate { kind, cutoff_page } => {
                    let _ = is_truncated(kind, 0, cutoff_page);
                }
                _ => {}
            }
        }
    }
    let _ = checker.report().mismatch_list.iter().map(ToString::to_string).collect::<Vec<_>>();
}

/// Pages by fork and block. One that is not there is another one, so that redo finds something.
#[derive(Default)]
struct Pages {
    pages: BTreeMap<(Fork, u32), Page>,
}

impl Pages {
    fn add(&mut self, input: &mut Input<'_>) {
        let fork = Fork::from_number(input.u8() & 3).unwrap_or(Fork::Main);
        let block = input.u32();
        let (first, last) = (usize::from(input.u16()), usize::from(input.u16()));
        let (start, end) = (input.take(first.min(PAGE_SIZE)), input.take(last.min(PAGE_SIZE)));
        let mut page = [0; PAGE_SIZE];
        page[PAGE_SIZE - end.len()..].copy_from_slice(end);
        page[..start.len()].copy_from_slice(start);
        if self.pages.len() < PAGES {
            self.pages.insert((fork, block), page);
        }
    }
}

impl PageStore for Pages {
    type Error = Infallible;

    fn load(&mut self, rel: RelTag, block: u32, page: &mut Page) -> Result<Loaded, Infallible> {
        let same = self.pages.get(&(rel.fork, block));
        let found = same.or_else(|| {
            let count = self.pages.len().max(1);
            self.pages.values().nth(block as usize % count)
        });
        Ok(match found {
            Some(found) => {
                *page = *found;
                Loaded::Page
            }
            None => Loaded::Missing,
        })
    }

    fn store(&mut self, rel: RelTag, block: u32, page: &Page) -> Result<(), Infallible> {
        self.pages.insert((rel.fork, block), *page);
        Ok(())
    }

    fn truncate(&mut self, rel: RelTag, blocks: u32) -> Result<(), Infallible> {
        self.pages.retain(|(fork, block), _| *fork != rel.fork || *block < blocks);
        Ok(())
    }

    fn drop_relation(&mut self, _: u32, _: u32, _: u32) -> Result<(), Infallible> {
        self.pages.clear();
        Ok(())
    }

    fn drop_database(&mut self, _: u32, _: u32) -> Result<(), Infallible> {
        self.pages.clear();
        Ok(())
    }

    fn copy_database(&mut self, _: (u32, u32), _: (u32, u32)) -> Result<(), Infallible> {
        Ok(())
    }
}
