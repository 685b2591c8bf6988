//! Data pages: header, line pointers, and the primitives whose byte results matter (storage/bufpage.h,
//! storage/itemid.h, storage/page/bufpage.c).
//!
//! ```text
//! offset  size  field
//!      0     8  pd_lsn            two u32, high half first
//!      8     2  pd_checksum       not maintained by redo
//!     10     2  pd_flags          1 has free line pointers, 2 full, 4 all visible
//!     12     2  pd_lower          end of the line pointers
//!     14     2  pd_upper          start of the tuples; 0 on a page that was never initialised
//!     16     2  pd_special        start of the access method's own data
//!     18     2  page size | layout version: 0x2004
//!     20     4  pd_prune_xid
//!     24     4  line pointers: offset 15 bits, flags 2 bits, length 15 bits
//! ```

use crate::error::{Bad, Step};
use pgstrata_ids::{Lsn, PAGE_SIZE};
use std::ops::Range;

/// A data page.
pub type Page = [u8; PAGE_SIZE];

/// Bytes of the header.
pub const HEADER_SIZE: usize = 24;
const LINE_SIZE: usize = 4;
const LAYOUT: u16 = 0x2004;

pub(crate) const HAS_FREE_LINES: u16 = 1;
pub(crate) const PAGE_FULL: u16 = 2;
pub(crate) const ALL_VISIBLE: u16 = 4;

const LP_NORMAL: u8 = 1;
const LP_REDIRECT: u8 = 2;
const LP_DEAD: u8 = 3;

/// Line pointers of a page, at most.
const MAX_LINES: usize = (PAGE_SIZE - HEADER_SIZE) / LINE_SIZE;
/// `MaxHeapTuplesPerPage`.
const MAX_HEAP_TUPLES: u16 = 291;

/// Rounded up to 8, as tuples are placed.
pub(crate) const fn max_align(length: usize) -> usize {
    (length + 7) & !7
}

pub(crate) fn get_u16(page: &Page, at: usize) -> Step<u16> {
    match page.get(at..at + 2) {
        Some(raw) => Ok(u16::from_le_bytes([raw[0], raw[1]])),
        None => Err(Bad("an offset points outside of the page")),
    }
}

pub(crate) fn get_u32(page: &Page, at: usize) -> Step<u32> {
    match page.get(at..at + 4) {
        Some(raw) => Ok(u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]])),
        None => Err(Bad("an offset points outside of the page")),
    }
}

pub(crate) fn put(page: &mut Page, at: usize, bytes: &[u8]) -> Step<()> {
    match page.get_mut(at..at + bytes.len()) {
        Some(place) => {
            place.copy_from_slice(bytes);
            Ok(())
        }
        None => Err(Bad("an offset points outside of the page")),
    }
}

pub(crate) fn put_u16(page: &mut Page, at: usize, value: u16) -> Step<()> {
    put(page, at, &value.to_le_bytes())
}

pub(crate) fn put_u32(page: &mut Page, at: usize, value: u32) -> Step<()> {
    put(page, at, &value.to_le_bytes())
}

fn field(page: &Page, at: usize) -> u16 {
    u16::from_le_bytes([page[at], page[at + 1]])
}

fn set_field(page: &mut Page, at: usize, value: u16) {
    page[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// The page's LSN.
pub fn lsn(page: &Page) -> Lsn {
    let word = |at: usize| {
        u64::from(u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]))
    };
    Lsn(word(0) << 32 | word(4))
}

/// Sets the page's LSN.
pub fn set_lsn(page: &mut Page, lsn: Lsn) {
    page[0..4].copy_from_slice(&((lsn.0 >> 32) as u32).to_le_bytes());
    page[4..8].copy_from_slice(&(lsn.0 as u32).to_le_bytes());
}

/// True for a page that was never initialised.
pub fn is_new(page: &Page) -> bool {
    upper(page) == 0
}

pub(crate) fn flags(page: &Page) -> u16 {
    field(page, 10)
}

pub(crate) fn set_flags(page: &mut Page, flags: u16) {
    set_field(page, 10, flags);
}

pub(crate) fn set_flag(page: &mut Page, flag: u16, on: bool) {
    let others = flags(page) & !flag;
    set_flags(page, if on { others | flag } else { others });
}

pub(crate) fn lower(page: &Page) -> u16 {
    field(page, 12)
}

pub(crate) fn set_lower(page: &mut Page, value: u16) {
    set_field(page, 12, value);
}

pub(crate) fn upper(page: &Page) -> u16 {
    field(page, 14)
}

pub(crate) fn set_upper(page: &mut Page, value: u16) {
    set_field(page, 14, value);
}

pub(crate) fn special(page: &Page) -> u16 {
    field(page, 16)
}

pub(crate) fn prune_xid(page: &Page) -> u32 {
    u32::from_le_bytes([page[20], page[21], page[22], page[23]])
}

pub(crate) fn set_prune_xid(page: &mut Page, xid: u32) {
    page[20..24].copy_from_slice(&xid.to_le_bytes());
}

/// `PageInit`: an empty page of zeros with this much special space.
pub(crate) fn init(page: &mut Page, special_size: usize) {
    page.fill(0);
    let special = (PAGE_SIZE - max_align(special_size)) as u16;
    set_field(page, 12, HEADER_SIZE as u16);
    set_field(page, 14, special);
    set_field(page, 16, special);
    set_field(page, 18, LAYOUT);
}

/// A line pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub offset: u16,
    pub flags: u8,
    pub length: u16,
}

impl Line {
    pub const UNUSED: Line = Line { offset: 0, flags: 0, length: 0 };
    pub const DEAD: Line = Line { offset: 0, flags: LP_DEAD, length: 0 };

    pub fn normal(offset: u16, length: u16) -> Line {
        Line { offset, flags: LP_NORMAL, length }
    }

    pub fn redirect(to: u16) -> Line {
        Line { offset: to, flags: LP_REDIRECT, length: 0 }
    }

    pub fn from_word(word: u32) -> Line {
        Line {
            offset: (word & 0x7FFF) as u16,
            flags: (word >> 15 & 3) as u8,
            length: (word >> 17) as u16,
        }
    }

    pub fn to_word(self) -> u32 {
        u32::from(self.offset & 0x7FFF) | u32::from(self.flags) << 15 | u32::from(self.length) << 17
    }

    pub fn is_used(self) -> bool {
        self.flags != 0
    }

    pub fn is_normal(self) -> bool {
        self.flags == LP_NORMAL
    }

    pub fn has_storage(self) -> bool {
        self.length != 0
    }

    /// Length of the item and the padding after it.
    pub fn aligned_length(self) -> usize {
        max_align(self.length.into())
    }

    pub fn range(self) -> Range<usize> {
        usize::from(self.offset)..usize::from(self.offset) + usize::from(self.length)
    }
}

/// Number of line pointers.
pub(crate) fn line_count(page: &Page) -> u16 {
    let count = usize::from(lower(page)).saturating_sub(HEADER_SIZE) / LINE_SIZE;
    count.min(MAX_LINES) as u16
}

fn line_at(number: u16) -> usize {
    HEADER_SIZE + (usize::from(number) - 1) * LINE_SIZE
}

/// The line pointer with this number, counted from 1.
pub(crate) fn line(page: &Page, number: u16) -> Step<Line> {
    if number == 0 || number > line_count(page) {
        return Err(Bad("the page has no line pointer of that number"));
    }
    Ok(Line::from_word(get_u32(page, line_at(number))?))
}

pub(crate) fn set_line(page: &mut Page, number: u16, line: Line) -> Step<()> {
    if number == 0 || number > line_count(page) {
        return Err(Bad("the page has no line pointer of that number"));
    }
    put_u32(page, line_at(number), line.to_word())
}

/// The bytes of the item with this number.
pub(crate) fn item(page: &Page, number: u16) -> Step<&[u8]> {
    let line = line(page, number)?;
    page.get(line.range()).ok_or(Bad("a line pointer points outside of the page"))
}

pub(crate) fn item_mut(page: &mut Page, number: u16) -> Step<&mut [u8]> {
    let line = line(page, number)?;
    page.get_mut(line.range()).ok_or(Bad("a line pointer points outside of the page"))
}

fn check_bounds(page: &Page) -> Step<()> {
    let (lower, upper, special) =
        (usize::from(lower(page)), usize::from(upper(page)), usize::from(special(page)));
    let ok = (HEADER_SIZE..=upper).contains(&lower) && upper <= special && special <= PAGE_SIZE;
    if ok { Ok(()) } else { Err(Bad("the page header's bounds are corrupt")) }
}

/// How an item is added where a line pointer exists already.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Add {
    /// Later line pointers move up.
    Insert,
    /// The line pointer must be unused.
    Heap,
    /// As `Heap`, without the heap's limit on line pointers.
    Overwrite,
}

/// `PageAddItemExtended`: puts the item below the others. Alignment padding keeps the bytes it had.
pub(crate) fn add_item(page: &mut Page, data: &[u8], number: u16, how: Add) -> Step<()> {
    let at = reserve_item(page, data.len(), number, how)?;
    put(page, at, data)
}

/// As [`add_item`], without the item's bytes: they are to be written from where it says.
pub(crate) fn reserve_item(page: &mut Page, length: usize, number: u16, how: Add) -> Step<usize> {
    check_bounds(page)?;
    let count = line_count(page);
    let limit = count + 1;
    if number == 0 || number > limit {
        return Err(Bad("the item would leave a gap in the line pointers"));
    }
    if how == Add::Heap && number > MAX_HEAP_TUPLES {
        return Err(Bad("the page has too many line pointers"));
    }
    let shuffle = number < limit && how == Add::Insert;
    if number < limit && !shuffle {
        let old = line(page, number)?;
        if old.is_used() || old.has_storage() {
            return Err(Bad("the line pointer is in use"));
        }
    }
    let old_lower = lower(page);
    let new_lower =
        if number == limit || shuffle { old_lower + LINE_SIZE as u16 } else { old_lower };
    let Some(new_upper) = usize::from(upper(page)).checked_sub(max_align(length)) else {
        return Err(Bad("the page has no room for the item"));
    };
    if usize::from(new_lower) > new_upper {
        return Err(Bad("the page has no room for the item"));
    }
    if shuffle {
        let from = line_at(number);
        page.copy_within(from..line_at(limit), from + LINE_SIZE);
    }
    set_lower(page, new_lower);
    set_line(page, number, Line::normal(new_upper as u16, length as u16))?;
    set_upper(page, new_upper as u16);
    Ok(new_upper)
}

/// Puts the items against the special space in line-pointer order, the lowest number at the highest address. Both code
/// paths of `compactify_tuples` give this result.
///
/// Which line pointers are dead is as good as random, so there are no branches on that, which no processor foresees.
fn compact(page: &mut Page) -> Step<()> {
    let end_of_lines = line_at(line_count(page) + 1);
    // The first items often are where they belong.
    let mut at_rest = usize::from(special(page));
    let mut first = HEADER_SIZE;
    while first < end_of_lines {
        let line = Line::from_word(get_u32(page, first)?);
        let upper = if line.has_storage() { line.offset.into() } else { at_rest };
        if at_rest - upper.min(at_rest) != line.aligned_length() {
            break;
        }
        at_rest = upper;
        first += LINE_SIZE;
    }
    let (items, lines) = (upper(page).into()..at_rest, first..end_of_lines);
    match items.len() {
        0..=2048 => compact_items::<2048>(page, items, lines),
        2049..=4096 => compact_items::<4096>(page, items, lines),
        _ => compact_items::<PAGE_SIZE>(page, items, lines),
    }
}

/// Puts those items against the end of the range in which they lie whose line pointers are at `lines`. The range is of
/// `N` bytes at most.
#[inline(never)] // So much of the stack is for those who need it.
fn compact_items<const N: usize>(
    page: &mut Page,
    items: Range<usize>,
    lines: Range<usize>,
) -> Step<()> {
    const OUTSIDE: Bad = Bad("a line pointer points outside of the items");
    const TOO_LONG: Bad = Bad("items are longer than the page");
    let start_of_old = items.end.saturating_sub(N);
    let old: [u8; N] = *page[start_of_old..].first_chunk().ok_or(OUTSIDE)?;
    let copy = |page: &mut Page, from: &Range<usize>, to| {
        if from.start < items.start || from.end > items.end {
            return Err(OUTSIDE);
        }
        let from = from.start - start_of_old..from.end - start_of_old;
        put(page, to, old.get(from).ok_or(OUTSIDE)?)
    };
    let enough = |upper: &usize| *upper >= lines.end;
    let mut upper = Some(items.end).filter(enough).ok_or(TOO_LONG)?;
    // Neighbours that stay neighbours are copied together.
    let mut together = upper..upper;
    for at in lines.clone().step_by(LINE_SIZE) {
        let line = Line::from_word(get_u32(page, at)?);
        let (stored, start, length) =
            (line.has_storage(), usize::from(line.offset), line.aligned_length());
        if stored & (start + length != together.start) {
            if together.start != upper {
                copy(page, &together, upper)?;
            }
            together = start..start + length;
        }
        together.start = if stored { start } else { together.start };
        upper = upper.checked_sub(length).filter(enough).ok_or(TOO_LONG)?;
        let moved = Line { offset: if stored { upper as u16 } else { line.offset }, ..line };
        put_u32(page, at, moved.to_word())?;
    }
    if together.start != upper {
        copy(page, &together, upper)?;
    }
    set_upper(page, upper as u16);
    Ok(())
}

/// `PageRepairFragmentation`: compacts the tuples and cuts trailing unused line pointers.
pub(crate) fn repair_fragmentation(page: &mut Page) -> Step<()> {
    check_bounds(page)?;
    let count = line_count(page);
    let (mut last_used, mut unused) = (0, 0);
    let lines = page[HEADER_SIZE..line_at(count + 1)].as_chunks_mut::<LINE_SIZE>().0;
    for (number, bytes) in (1..).zip(lines) {
        let word = u32::from_le_bytes(*bytes);
        let used = Line::from_word(word).is_used();
        *bytes = if used { word } else { 0 }.to_le_bytes();
        last_used = if used { number } else { last_used };
        unused += u16::from(!used);
    }
    compact(page)?;
    let cut = count - last_used;
    set_lower(page, lower(page) - cut * LINE_SIZE as u16);
    set_flag(page, HAS_FREE_LINES, unused > cut);
    Ok(())
}

/// `PageTruncateLinePointerArray`: cuts trailing unused line pointers, except for the first one. Moves no data.
pub(crate) fn truncate_lines(page: &mut Page) -> Step<()> {
    check_bounds(page)?;
    let mut count = line_count(page);
    while count > 1 && !line(page, count)?.is_used() {
        count -= 1;
    }
    set_lower(page, (HEADER_SIZE + usize::from(count) * LINE_SIZE) as u16);
    let mut unused = false;
    for number in 1..=count {
        unused |= !line(page, number)?.is_used();
    }
    set_flag(page, HAS_FREE_LINES, unused);
    Ok(())
}

/// Moves the bytes between `pd_upper` and `offset` by `by`, with the line pointers of what moves.
fn slide(page: &mut Page, offset: u16, by: isize) -> Step<()> {
    let from = usize::from(upper(page));
    let until = usize::from(offset);
    let to = from.checked_add_signed(by).ok_or(Bad("items are longer than the page"))?;
    if from > until || to < usize::from(lower(page)) || to + (until - from) > PAGE_SIZE {
        return Err(Bad("a line pointer points outside of the page"));
    }
    page.copy_within(from..until, to);
    set_upper(page, to as u16);
    for number in 1..=line_count(page) {
        let old = line(page, number)?;
        if old.has_storage() && old.offset <= offset {
            let moved = usize::from(old.offset).checked_add_signed(by);
            let moved = moved.ok_or(Bad("a line pointer points outside of the page"))?;
            set_line(page, number, Line { offset: moved as u16, ..old })?;
        }
    }
    Ok(())
}

/// `PageIndexTupleDelete`: later line pointers move down; the physical order of the rest is kept.
pub(crate) fn delete_item(page: &mut Page, number: u16) -> Step<()> {
    check_bounds(page)?;
    let old = line(page, number)?;
    let end = usize::from(lower(page));
    page.copy_within(line_at(number) + LINE_SIZE..end, line_at(number));
    set_lower(page, (end - LINE_SIZE) as u16);
    slide(page, old.offset, max_align(usize::from(old.length)) as isize)
}

/// `PageIndexMultiDelete`. Up to two items are deleted one by one, which keeps the physical order; more are deleted by
/// compaction, which does not: the threshold is visible in the bytes.
pub(crate) fn delete_items(
    page: &mut Page,
    numbers: impl Fn(usize) -> u16,
    count: usize,
) -> Step<()> {
    if count <= 2 {
        return (0..count).rev().try_for_each(|at| delete_item(page, numbers(at)));
    }
    check_bounds(page)?;
    let (mut next, mut last) = (0, 0);
    for number in 1..=line_count(page) {
        if next < count && numbers(next) == number {
            next += 1;
            continue;
        }
        let line = line(page, number)?;
        last += 1;
        set_line(page, last, line)?;
    }
    if next != count {
        return Err(Bad("items to delete are missing or out of order"));
    }
    set_lower(page, line_at(last + 1) as u16);
    compact(page)
}

/// `PageIndexTupleDeleteNoCompact`: other items keep their numbers.
pub(crate) fn delete_item_keeping_numbers(page: &mut Page, number: u16) -> Step<()> {
    check_bounds(page)?;
    let old = line(page, number)?;
    if number < line_count(page) {
        set_line(page, number, Line::UNUSED)?;
    } else {
        set_lower(page, lower(page) - LINE_SIZE as u16);
    }
    slide(page, old.offset, max_align(usize::from(old.length)) as isize)
}

/// `PageIndexTupleOverwrite`: in place; if the aligned length differs, what lies below moves. Flags stay.
pub(crate) fn overwrite_item(page: &mut Page, number: u16, data: &[u8]) -> Step<()> {
    check_bounds(page)?;
    let old = line(page, number)?;
    let by = max_align(usize::from(old.length)) as isize - max_align(data.len()) as isize;
    if by != 0 {
        slide(page, old.offset, by)?;
    }
    let offset = usize::from(old.offset).checked_add_signed(by);
    let offset = offset.ok_or(Bad("a line pointer points outside of the page"))?;
    set_line(
        page,
        number,
        Line { offset: offset as u16, length: data.len() as u16, flags: old.flags },
    )?;
    put(page, offset, data)
}

/// `PageGetTempPageCopySpecial`: an empty page with the special space of `page`.
pub(crate) fn empty_copy(page: &Page) -> Step<Page> {
    check_bounds(page)?;
    let from = usize::from(special(page));
    let mut copy = [0; PAGE_SIZE];
    init(&mut copy, PAGE_SIZE - from);
    if usize::from(special(&copy)) != from {
        return Err(Bad("the page header's bounds are corrupt"));
    }
    copy[from..].copy_from_slice(&page[from..]);
    Ok(copy)
}

/// The special space, if it has `size` bytes.
pub(crate) fn special_at(page: &Page, size: usize) -> Step<usize> {
    if usize::from(special(page)) == PAGE_SIZE - size {
        Ok(PAGE_SIZE - size)
    } else {
        Err(Bad("the page is not of the expected access method"))
    }
}

#[cfg(test)]
mod tests;
