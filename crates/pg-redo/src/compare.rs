//! Says how two pages differ, in terms of fields rather than bytes: those of the header, the line pointers, the tuples,
//! the special space and the metapages of each access method.

use crate::page::{self, HEADER_SIZE, Line, Page};
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::rmgr;
use std::fmt::Write as _;
use std::ops::Range;

/// Differences that are listed; the rest is counted.
const LISTED: usize = 8;

/// Position, length, name.
type Field = (usize, usize, &'static str);

const HEADER_FIELDS: [Field; 8] = [
    (0, 8, "pd_lsn"),
    (8, 2, "pd_checksum"),
    (10, 2, "pd_flags"),
    (12, 2, "pd_lower"),
    (14, 2, "pd_upper"),
    (16, 2, "pd_special"),
    (18, 2, "pd_pagesize_version"),
    (20, 4, "pd_prune_xid"),
];

const HEAP_TUPLE: &[Field] = &[
    (0, 4, "t_xmin"),
    (4, 4, "t_xmax"),
    (8, 4, "t_cid"),
    (12, 6, "t_ctid"),
    (18, 2, "t_infomask2"),
    (20, 2, "t_infomask"),
    (22, 1, "t_hoff"),
];
const INDEX_TUPLE: &[Field] = &[(0, 6, "t_tid"), (6, 2, "t_info")];
const BRIN_TUPLE: &[Field] = &[(0, 4, "bt_blkno"), (4, 1, "bt_info")];
/// Of leaf tuples; the first four bytes of inner ones hold state, flags and sizes too.
const SPGIST_TUPLE: &[Field] = &[(0, 4, "state and size"), (4, 2, "t_info"), (6, 6, "heapPtr")];

// Positions in special spaces count from its start.
const BTREE_SPECIAL: &[Field] = &[
    (0, 4, "btpo_prev"),
    (4, 4, "btpo_next"),
    (8, 4, "btpo_level"),
    (12, 2, "btpo_flags"),
    (14, 2, "btpo_cycleid"),
];
const HASH_SPECIAL: &[Field] = &[
    (0, 4, "hasho_prevblkno"),
    (4, 4, "hasho_nextblkno"),
    (8, 4, "hasho_bucket"),
    (12, 2, "hasho_flag"),
    (14, 2, "hasho_page_id"),
];
const GIN_SPECIAL: &[Field] = &[(0, 4, "rightlink"), (4, 2, "maxoff"), (6, 2, "flags")];
const GIST_SPECIAL: &[Field] =
    &[(0, 8, "nsn"), (8, 4, "rightlink"), (12, 2, "flags"), (14, 2, "gist_page_id")];
const SPGIST_SPECIAL: &[Field] =
    &[(0, 2, "flags"), (2, 2, "nRedirection"), (4, 2, "nPlaceholder"), (6, 2, "spgist_page_id")];
const BRIN_SPECIAL: &[Field] = &[(4, 2, "flags"), (6, 2, "type")];
const SEQUENCE_SPECIAL: &[Field] = &[(0, 4, "magic")];

// Positions in metapages count from the end of the page header.
const BTREE_META: &[Field] = &[
    (0, 4, "btm_magic"),
    (4, 4, "btm_version"),
    (8, 4, "btm_root"),
    (12, 4, "btm_level"),
    (16, 4, "btm_fastroot"),
    (20, 4, "btm_fastlevel"),
    (24, 4, "btm_last_cleanup_num_delpages"),
    (32, 8, "btm_last_cleanup_num_heap_tuples"),
    (40, 1, "btm_allequalimage"),
];
const HASH_META: &[Field] = &[
    (0, 4, "hashm_magic"),
    (4, 4, "hashm_version"),
    (8, 8, "hashm_ntuples"),
    (16, 2, "hashm_ffactor"),
    (18, 2, "hashm_bsize"),
    (20, 2, "hashm_bmsize"),
    (22, 2, "hashm_bmshift"),
    (24, 4, "hashm_maxbucket"),
    (28, 4, "hashm_highmask"),
    (32, 4, "hashm_lowmask"),
    (36, 4, "hashm_ovflpoint"),
    (40, 4, "hashm_firstfree"),
    (44, 4, "hashm_nmaps"),
    (48, 4, "hashm_procid"),
];
const GIN_META: &[Field] = &[
    (0, 4, "head"),
    (4, 4, "tail"),
    (8, 4, "tailFreeSize"),
    (12, 4, "nPendingPages"),
    (16, 8, "nPendingHeapTuples"),
    (24, 4, "nTotalPages"),
    (28, 4, "nEntryPages"),
    (32, 4, "nDataPages"),
    (40, 8, "nEntries"),
    (48, 4, "ginVersion"),
];
const BRIN_META: &[Field] = &[
    (0, 4, "brinMagic"),
    (4, 4, "brinVersion"),
    (8, 4, "pagesPerRange"),
    (12, 4, "lastRevmapPage"),
];

/// What is known of a page besides its bytes.
#[derive(Clone, Copy, Debug)]
pub struct PageKind {
    /// Resource manager of the record that changed it.
    pub rmgr: u8,
    /// Block number.
    pub block: u32,
    /// The page is a visibility map's.
    pub is_visibility_map: bool,
}

/// How a page is laid out.
struct Layout {
    tuple: &'static [Field],
    special: &'static [Field],
    /// Of a metapage, which has no line pointers.
    meta: Option<&'static [Field]>,
    /// There are line pointers.
    has_lines: bool,
}

impl Layout {
    fn of(kind: PageKind, page: &Page) -> Layout {
        let meta = |fields| (kind.block == 0).then_some(fields);
        let (tuple, special, meta): (&[Field], &[Field], _) = match kind.rmgr {
            rmgr::HEAP | rmgr::HEAP2 => (HEAP_TUPLE, &[], None),
            rmgr::SEQUENCE => (HEAP_TUPLE, SEQUENCE_SPECIAL, None),
            rmgr::BTREE => (INDEX_TUPLE, BTREE_SPECIAL, meta(BTREE_META)),
            rmgr::HASH => (INDEX_TUPLE, HASH_SPECIAL, meta(HASH_META)),
            rmgr::GIN => (INDEX_TUPLE, GIN_SPECIAL, meta(GIN_META)),
            rmgr::GIST => (INDEX_TUPLE, GIST_SPECIAL, None),
            rmgr::SPGIST => (SPGIST_TUPLE, SPGIST_SPECIAL, None),
            rmgr::BRIN => (BRIN_TUPLE, BRIN_SPECIAL, meta(BRIN_META)),
            _ => (&[], &[], None),
        };
        let word = |from_end: usize| page[PAGE_SIZE - from_end];
        let other_content = match kind.rmgr {
            // Bitmap pages, data pages, and the map from ranges to tuples.
            rmgr::HASH => word(4) & 0x0F == 4,
            rmgr::GIN => word(2) & 1 != 0,
            rmgr::BRIN => word(2) == 0x92,
            rmgr::GENERIC => true,
            _ => false,
        };
        Layout { tuple, special, meta, has_lines: meta.is_none() && !other_content }
    }
}

/// The differences between two pages, or `None` if they are equal. `rmgr` says how to read the tuples.
pub fn compare(rmgr: u8, expected: &Page, found: &Page) -> Option<String> {
    // No access method's metapage is a page of tuples.
    let kind = PageKind { rmgr, block: 1, is_visibility_map: false };
    compare_pages(kind, expected, found)
}

/// As [`compare`], knowing which page it is.
pub fn compare_pages(kind: PageKind, expected: &Page, found: &Page) -> Option<String> {
    if expected == found {
        return None;
    }
    let mut report = Report { expected, found, text: String::new(), count: 0, told: 0 };
    for (at, length, name) in HEADER_FIELDS {
        report.field("", name, at..at + length);
    }
    let layout = Layout::of(kind, expected);
    if kind.is_visibility_map && matches!(kind.rmgr, rmgr::HEAP | rmgr::HEAP2) {
        report.visibility(kind.block);
        return Some(report.finish(PAGE_SIZE));
    }
    for (at, length, name) in layout.meta.unwrap_or(&[]) {
        report.field("metapage: ", name, HEADER_SIZE + at..HEADER_SIZE + at + length);
    }
    let special = usize::from(page::special(expected)).clamp(HEADER_SIZE, PAGE_SIZE);
    let special = if page::special(expected) == page::special(found) { special } else { PAGE_SIZE };
    if layout.has_lines {
        report.lines(layout.tuple, special);
    }
    let named = layout.special.last().map_or(0, |(at, length, _)| at + length);
    if special + named <= PAGE_SIZE {
        for (at, length, name) in layout.special {
            report.field("special space: ", name, special + at..special + at + length);
        }
        let rest = special + named..PAGE_SIZE;
        report.bytes("special space: ", rest);
    }
    Some(report.finish(special))
}

struct Report<'a> {
    expected: &'a Page,
    found: &'a Page,
    text: String,
    count: usize,
    /// Bytes that differ and were told of by name.
    told: usize,
}

impl Report<'_> {
    fn add(&mut self, difference: std::fmt::Arguments<'_>) {
        self.count += 1;
        if self.count <= LISTED {
            let separator = if self.count > 1 { "; " } else { "" };
            let _ = write!(self.text, "{separator}{difference}");
        }
    }

    fn differing(&self, range: Range<usize>) -> usize {
        range.filter(|at| self.expected[*at] != self.found[*at]).count()
    }

    fn field(&mut self, place: &str, name: &str, range: Range<usize>) {
        let (expected, found) = (&self.expected[range.clone()], &self.found[range.clone()]);
        if expected == found {
            return;
        }
        let hex = |bytes: &[u8]| -> String {
            bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect()
        };
        let (expected, found) = (hex(expected), hex(found));
        self.told += self.differing(range);
        self.add(format_args!("{place}{name} is 0x{found}, expected 0x{expected}"));
    }

    /// Bytes that have no name.
    fn bytes(&mut self, place: &str, range: Range<usize>) {
        let differs = |at: &usize| self.expected[*at] != self.found[*at];
        let Some(first) = range.clone().find(differs) else { return };
        let last = range.clone().rfind(differs).unwrap_or(first);
        let count = self.differing(range);
        self.told += count;
        let (expected, found) = (self.expected[first], self.found[first]);
        self.add(format_args!(
            "{place}{count} bytes differ from {first} to {last}; byte {first} is {found:#04x}, expected {expected:#04x}"
        ));
    }

    fn lines(&mut self, tuple: &[Field], special: usize) {
        let (in_expected, in_found) =
            (page::line_count(self.expected), page::line_count(self.found));
        if in_expected != in_found {
            self.add(format_args!("there are {in_found} line pointers, expected {in_expected}"));
        }
        for number in 1..=in_expected.min(in_found) {
            self.line(tuple, number, special);
        }
        let ends = (line_end(in_expected), line_end(in_found));
        // Those that only one page has were told of by their number.
        self.told += self.differing(ends.0.min(ends.1)..ends.0.max(ends.1));
    }

    fn line(&mut self, tuple: &[Field], number: u16, special: usize) {
        let (Ok(a), Ok(b)) = (page::line(self.expected, number), page::line(self.found, number))
        else {
            return;
        };
        if a != b {
            self.told += self.differing(line_end(number) - 4..line_end(number));
            self.add(format_args!("line pointer {number} is {}, expected {}", Text(b), Text(a)));
        }
        let range = a.range();
        // A tuple that lies elsewhere has its own bytes there; which of them are wrong cannot be told.
        if a != b || range.start < HEADER_SIZE || range.end > special {
            return;
        }
        if self.expected[range.clone()] == self.found[range.clone()] {
            return;
        }
        let place = format!("line pointer {number}: ");
        let mut named = 0;
        for (at, length, name) in tuple {
            if at + length <= range.len() {
                self.field(&place, name, range.start + at..range.start + at + length);
                named = at + length;
            }
        }
        self.bytes(&format!("{place}data: "), range.start + named..range.end);
    }

    /// Two bits for each heap block.
    fn visibility(&mut self, block: u32) {
        const PER_PAGE: u64 = (PAGE_SIZE - HEADER_SIZE) as u64 * 4;
        for at in HEADER_SIZE..PAGE_SIZE {
            let (expected, found) = (self.expected[at], self.found[at]);
            if expected == found {
                continue;
            }
            self.told += 1;
            for pair in (0..4).filter(|pair| (expected ^ found) >> (pair * 2) & 3 != 0) {
                let heap = u64::from(block) * PER_PAGE + (at - HEADER_SIZE) as u64 * 4 + pair;
                let name = |bits: u8| {
                    ["none", "all visible", "all frozen", "all visible and frozen"]
                        [usize::from(bits >> (pair * 2) & 3)]
                };
                let (expected, found) = (name(expected), name(found));
                self.add(format_args!("heap block {heap} is {found}, expected {expected}"));
            }
        }
    }

    /// What differs and has no name yet: the content of pages without line pointers, padding, the hole.
    fn finish(mut self, special: usize) -> String {
        let all = self.differing(0..PAGE_SIZE);
        if all > self.told {
            let count = self.count;
            let place = if count == 0 { "" } else { "content: " };
            self.bytes(place, HEADER_SIZE..special);
            if self.count == count {
                self.bytes(place, 0..PAGE_SIZE);
            }
        }
        if self.count > LISTED {
            let _ = write!(self.text, "; and {} more", self.count - LISTED);
        }
        self.text
    }
}

fn line_end(number: u16) -> usize {
    HEADER_SIZE + usize::from(number) * 4
}

/// A line pointer as people read it.
struct Text(Line);

impl std::fmt::Display for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Line { offset, flags, length } = self.0;
        let flags = ["unused", "normal", "redirect", "dead"][usize::from(flags & 3)];
        write!(f, "{flags} at {offset}, {length} bytes")
    }
}

#[cfg(test)]
mod tests;
