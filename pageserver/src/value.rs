//! Values of keys other than pages: their bytes in layers.
//!
//! ```text
//! RelSize       u8 0 gone, 1 present; u32 blocks; u32 high-water mark
//! Database      u8 0 dropped, 1 created, 2 copied; if copied: u32 tablespace, u32 database
//! SlruExtent    for each range of pages: u64 first page; u64 end page (exclusive)
//! TwoPhase      u8 0 removed, 1 present; file content
//! Tablespace    u8 0 dropped, 1 created; location
//! ControlState  u8 0 full, 1 counters; encoding of the redo crate
//! CommitTime    u8 kind: 0 commit, 1 prepare, 2 other record; i64 time; u64 record start
//! Origin        u8 0 dropped, 1 present; u64 remote LSN; u64 local LSN
//! RelMap        the file
//! ```
//! Little-endian. The high-water mark is the largest size that any relation of this name ever
//! had: blocks at or above it have no older versions, so growing over them needs no zeros.

use anyhow::{Result, bail};

/// Appends a page as it is, without the zeros between its line pointers and its tuples.
///
/// `u16 offset of the hole, u16 length of the hole, the other bytes`. Works for any 8192 bytes: a
/// hole that is not all zeros is stored.
pub fn encode_page(page: &[u8; 8192], to: &mut Vec<u8>) {
    let field = |at: usize| u16::from_le_bytes([page[at], page[at + 1]]);
    let (lower, upper) = (usize::from(field(12)), usize::from(field(14)));
    let plausible = lower >= 24 && lower < upper && upper <= page.len();
    let hole = match plausible && page[lower..upper].iter().all(|&byte| byte == 0) {
        true => lower..upper,
        // Everything from some point on is often zero: SLRU pages that fill up, new pages.
        false => page.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1)..page.len(),
    };
    to.extend_from_slice(&(hole.start as u16).to_le_bytes());
    to.extend_from_slice(&(hole.len() as u16).to_le_bytes());
    to.extend_from_slice(&page[..hole.start]);
    to.extend_from_slice(&page[hole.end..]);
}

/// Reads what [`encode_page`] wrote.
pub fn decode_page(bytes: &[u8], page: &mut [u8; 8192]) -> Result<()> {
    let hole = word(bytes, 0)?;
    let (start, length) = ((hole & 0xFFFF) as usize, (hole >> 16) as usize);
    let content = &bytes[4..];
    if start + length > page.len() || content.len() != page.len() - length {
        bail!("a page's hole {start}+{length} does not fit its {} bytes", content.len());
    }
    page[..start].copy_from_slice(&content[..start]);
    page[start..start + length].fill(0);
    page[start + length..].copy_from_slice(&content[start..]);
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    match bytes.get(at..at + 4) {
        Some(&[a, b, c, d]) => Ok(u32::from_le_bytes([a, b, c, d])),
        _ => bail!("a value of {} bytes is too short", bytes.len()),
    }
}

fn wide(bytes: &[u8], at: usize) -> Result<u64> {
    Ok(u64::from(word(bytes, at)?) | u64::from(word(bytes, at + 4)?) << 32)
}

/// A relation fork's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelSize {
    /// Blocks, or `None` if the fork is gone.
    pub blocks: Option<u32>,
    /// Largest size ever.
    pub high_water: u32,
}

impl RelSize {
    /// A fork that never was.
    pub const NEVER: RelSize = RelSize { blocks: None, high_water: 0 };

    /// Appends the bytes.
    pub fn encode(self, to: &mut Vec<u8>) {
        to.push(u8::from(self.blocks.is_some()));
        to.extend_from_slice(&self.blocks.unwrap_or(0).to_le_bytes());
        to.extend_from_slice(&self.high_water.to_le_bytes());
    }

    /// Reads the bytes.
    pub fn decode(bytes: &[u8]) -> Result<RelSize> {
        let blocks = word(bytes, 1)?;
        Ok(RelSize { blocks: (bytes[0] == 1).then_some(blocks), high_water: word(bytes, 5)? })
    }
}

/// A database's directory in one tablespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Database {
    /// It is gone, with everything in it.
    Dropped,
    /// It began empty.
    Created,
    /// It began as everything that (tablespace, database) held at that LSN.
    Copied {
        /// Source tablespace.
        spc: u32,
        /// Source database.
        db: u32,
    },
}

impl Database {
    /// Appends the bytes.
    pub fn encode(self, to: &mut Vec<u8>) {
        match self {
            Database::Dropped => to.push(0),
            Database::Created => to.push(1),
            Database::Copied { spc, db } => {
                to.push(2);
                to.extend_from_slice(&spc.to_le_bytes());
                to.extend_from_slice(&db.to_le_bytes());
            }
        }
    }

    /// Reads the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Database> {
        match bytes.first() {
            Some(0) => Ok(Database::Dropped),
            Some(1) => Ok(Database::Created),
            Some(2) => Ok(Database::Copied { spc: word(bytes, 1)?, db: word(bytes, 5)? }),
            other => bail!("a database value starts with {other:?}"),
        }
    }
}

/// The pages of an SLRU that exist: disjoint ranges, because page numbers wrap around.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlruExtent {
    /// First page and one past the last page of each range, ascending.
    pub ranges: Vec<(u64, u64)>,
}

impl SlruExtent {
    /// Adds a page. True if it was not there.
    pub fn add(&mut self, page: u64) -> bool {
        let at = self.ranges.partition_point(|(_, end)| *end < page);
        match self.ranges.get_mut(at) {
            Some((first, end)) if *first <= page && page < *end => return false,
            Some((_, end)) if *end == page => *end += 1,
            Some((first, _)) if *first == page + 1 => *first = page,
            _ => self.ranges.insert(at, (page, page + 1)),
        }
        if at + 1 < self.ranges.len() && self.ranges[at].1 == self.ranges[at + 1].0 {
            self.ranges[at].1 = self.ranges[at + 1].1;
            self.ranges.remove(at + 1);
        }
        true
    }

    /// Keeps the pages that `keep` wants.
    pub fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        let mut kept = SlruExtent::default();
        for page in self.pages().filter(|page| keep(*page)) {
            match kept.ranges.last_mut() {
                Some((_, end)) if *end == page => *end += 1,
                _ => kept.ranges.push((page, page + 1)),
            }
        }
        *self = kept;
    }

    /// Every page, ascending.
    pub fn pages(&self) -> impl Iterator<Item = u64> {
        self.ranges.iter().flat_map(|&(first, end)| first..end)
    }

    /// Appends the bytes.
    pub fn encode(&self, to: &mut Vec<u8>) {
        for (first, end) in &self.ranges {
            to.extend_from_slice(&first.to_le_bytes());
            to.extend_from_slice(&end.to_le_bytes());
        }
    }

    /// Reads the bytes.
    pub fn decode(bytes: &[u8]) -> Result<SlruExtent> {
        let mut ranges = Vec::new();
        for at in (0..bytes.len()).step_by(16) {
            ranges.push((wide(bytes, at)?, wide(bytes, at + 8)?));
        }
        Ok(SlruExtent { ranges })
    }
}

/// What kind of record a [`Boundary`] is the end of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoundaryKind {
    /// A transaction committed.
    Commit,
    /// A transaction was prepared.
    Prepare,
    /// Any other record; noted now and then so that branches can start near any LSN.
    Other,
}

/// The end of a record at which a branch may start. The LSN is the value's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// What ends here.
    pub kind: BoundaryKind,
    /// Commit time, microseconds since 2000-01-01 (0 for other records).
    pub time: i64,
    /// Start of the record: the next record's `xl_prev`.
    pub record_start: u64,
}

impl Boundary {
    /// Appends the bytes.
    pub fn encode(self, to: &mut Vec<u8>) {
        to.push(match self.kind {
            BoundaryKind::Commit => 0,
            BoundaryKind::Prepare => 1,
            BoundaryKind::Other => 2,
        });
        to.extend_from_slice(&self.time.to_le_bytes());
        to.extend_from_slice(&self.record_start.to_le_bytes());
    }

    /// Reads the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Boundary> {
        let kind = match bytes.first() {
            Some(0) => BoundaryKind::Commit,
            Some(1) => BoundaryKind::Prepare,
            Some(2) => BoundaryKind::Other,
            other => bail!("a boundary starts with {other:?}"),
        };
        Ok(Boundary { kind, time: wide(bytes, 1)? as i64, record_start: wide(bytes, 9)? })
    }
}

/// Something that is there with content, or not there any more.
pub fn encode_present(content: Option<&[u8]>, to: &mut Vec<u8>) {
    to.push(u8::from(content.is_some()));
    to.extend_from_slice(content.unwrap_or_default());
}

/// Reads what [`encode_present`] wrote.
pub fn decode_present(bytes: &[u8]) -> Option<&[u8]> {
    match bytes.split_first() {
        Some((1, content)) => Some(content),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        for size in [RelSize::NEVER, RelSize { blocks: Some(7), high_water: 9 }] {
            let mut bytes = Vec::new();
            size.encode(&mut bytes);
            assert_eq!(RelSize::decode(&bytes).unwrap(), size);
        }
        for database in
            [Database::Dropped, Database::Created, Database::Copied { spc: 1663, db: 5 }]
        {
            let mut bytes = Vec::new();
            database.encode(&mut bytes);
            assert_eq!(Database::decode(&bytes).unwrap(), database);
        }
        let mut heap = [0; 8192];
        heap[12..16].copy_from_slice(&[40, 0, 0x00, 0x10]);
        heap[30] = 1;
        heap[8000] = 2;
        let mut dirty_hole = heap;
        dirty_hole[100] = 3;
        for (page, size) in
            [(heap, 40 + 4096 + 4), (dirty_hole, 8001 + 4), ([0; 8192], 4), ([7; 8192], 8196)]
        {
            let mut bytes = Vec::new();
            encode_page(&page, &mut bytes);
            assert_eq!(bytes.len(), size);
            let mut back = [9; 8192];
            decode_page(&bytes, &mut back).unwrap();
            assert!(back == page);
            assert!(decode_page(&bytes[..bytes.len() - 1], &mut back).is_err());
        }

        let mut extent = SlruExtent::default();
        for page in [5, 6, 8, 7, 1, 0, 100] {
            assert!(extent.add(page));
            assert!(!extent.add(page));
        }
        assert_eq!(extent.ranges, vec![(0, 2), (5, 9), (100, 101)]);
        let mut bytes = Vec::new();
        extent.encode(&mut bytes);
        assert_eq!(SlruExtent::decode(&bytes).unwrap(), extent);
        extent.retain(|page| page % 2 == 0);
        assert_eq!(extent.ranges, vec![(0, 1), (6, 7), (8, 9), (100, 101)]);

        let boundary = Boundary { kind: BoundaryKind::Prepare, time: -5, record_start: 1 << 40 };
        let mut bytes = Vec::new();
        boundary.encode(&mut bytes);
        assert_eq!(Boundary::decode(&bytes).unwrap(), boundary);
        assert!(Boundary::decode(&bytes[..16]).is_err());
    }
}
