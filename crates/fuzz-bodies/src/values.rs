//! Stored values, as a page server reads them back, and what looks at finished pages.

use crate::input::Input;
use pgstrata_ids::{Lsn, PAGE_SIZE};
use pgstrata_pg_redo::{
    ControlState, MaskTarget, PageKind, apply_block, apply_slru, compare_pages, mask, pd_checksum,
    value_kind,
};
use pgstrata_pg_wal::{CheckPoint, ControlFile, PgVersion};

/// A page and a value: `u32 block, u16 length of the page's start, u16 of its end, both, value`.
pub fn values(data: &[u8]) {
    let mut input = Input(data);
    let block = input.u32();
    let (first, last) = (usize::from(input.u16()), usize::from(input.u16()));
    let (start, end) = (input.take(first.min(PAGE_SIZE)), input.take(last.min(PAGE_SIZE)));
    let mut base = [0; PAGE_SIZE];
    base[PAGE_SIZE - end.len()..].copy_from_slice(end);
    base[..start.len()].copy_from_slice(start);
    let value = input.0;

    let mut page = base;
    let _ = value_kind(value);
    let _ = apply_block(&mut page, value, block, Lsn(1 << 40));
    let mut slru = base;
    let _ = apply_slru(&mut slru, value, Lsn(8));
    let _ = ControlState::decode(value);
    let _ = ControlFile::decode(value);
    for version in PgVersion::ALL {
        let _ = CheckPoint::decode(version, value);
    }
    let _ = pd_checksum(&page, block);
    let rmgr = 9 + (block >> 24 & 15) as u8;
    let is_visibility_map = block & 1 != 0;
    let target = MaskTarget { rmgr, block, is_visibility_map, strict: block & 2 != 0 };
    mask(&mut base, target);
    mask(&mut page, target);
    let kind = PageKind { rmgr, block, is_visibility_map };
    let difference = compare_pages(kind, &base, &page);
    assert_eq!(difference.is_none(), base == page);
    assert!(difference.is_none_or(|difference| !difference.is_empty()));
}
