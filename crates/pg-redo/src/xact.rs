//! Commit, abort and prepare records taken apart (access/xact.h, access/rmgrdesc/xactdesc.c).
//!
//! After the time and, if flagged, `xinfo`, sections follow without alignment, each only if its bit is set.

use crate::error::{Bad, Step};
use pgstrata_ids::Lsn;
use pgstrata_pg_wal::PgVersion;
use pgstrata_pg_wal::bytes::Reader;

const HAS_XINFO: u8 = 0x80;
pub(crate) const COMMIT: u8 = 0x00;
pub(crate) const PREPARE: u8 = 0x10;
pub(crate) const ABORT: u8 = 0x20;
pub(crate) const COMMIT_PREPARED: u8 = 0x30;
pub(crate) const ABORT_PREPARED: u8 = 0x40;

const HAS_DB_INFO: u32 = 1;
const HAS_SUBXACTS: u32 = 1 << 1;
const HAS_RELATIONS: u32 = 1 << 2;
const HAS_INVALIDATIONS: u32 = 1 << 3;
const HAS_TWO_PHASE: u32 = 1 << 4;
const HAS_ORIGIN: u32 = 1 << 5;
const HAS_GID: u32 = 1 << 7;
const HAS_DROPPED_STATS: u32 = 1 << 8;

/// Fixed part of a prepare record.
const PREPARE_HEADER: usize = 72;

/// What a record that ends, or prepares, a transaction says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Xact<'a> {
    pub commits: bool,
    /// The transaction itself; for the prepared forms not the record's own xid.
    pub xid: u32,
    /// Microseconds since 2000.
    pub time: i64,
    subxids: &'a [u8],
    relations: &'a [u8],
    /// Set by the forms that end a prepared transaction.
    pub two_phase: bool,
    /// Remote position and time.
    pub origin: Option<(Lsn, i64)>,
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + Clone + '_ {
    bytes.chunks_exact(4).map(|raw| u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]))
}

fn list<'a>(reader: &mut Reader<'a>, item: usize) -> Step<&'a [u8]> {
    let count = reader.u32()? as usize;
    Ok(reader.take(count.checked_mul(item).ok_or(Bad("a list is longer than its record"))?)?)
}

const fn stats_item(version: PgVersion) -> usize {
    if matches!(version, PgVersion::V18) { 16 } else { 12 }
}

impl<'a> Xact<'a> {
    /// A commit or abort record, prepared or not.
    pub fn decode(version: PgVersion, info: u8, record_xid: u32, main: &'a [u8]) -> Step<Xact<'a>> {
        let opcode = info & 0x70;
        let commits = matches!(opcode, COMMIT | COMMIT_PREPARED);
        let mut reader = Reader::new(main);
        let time = reader.i64()?;
        let xinfo = if info & HAS_XINFO != 0 { reader.u32()? } else { 0 };
        let has = |bit: u32| xinfo & bit != 0;
        if has(HAS_DB_INFO) {
            reader.take(8)?;
        }
        let subxids = if has(HAS_SUBXACTS) { list(&mut reader, 4)? } else { &[] };
        let relations = if has(HAS_RELATIONS) { list(&mut reader, 12)? } else { &[] };
        if has(HAS_DROPPED_STATS) {
            list(&mut reader, stats_item(version))?;
        }
        if has(HAS_INVALIDATIONS) && commits {
            list(&mut reader, 16)?;
        }
        let two_phase = matches!(opcode, COMMIT_PREPARED | ABORT_PREPARED);
        let mut xid = record_xid;
        if has(HAS_TWO_PHASE) {
            xid = reader.u32()?;
            if has(HAS_GID) {
                let length = reader.rest().iter().position(|byte| *byte == 0);
                reader.take(length.ok_or(Bad("a transaction's name has no end"))? + 1)?;
            }
        } else if two_phase {
            return Err(Bad("the end of a prepared transaction does not name it"));
        }
        let origin = if has(HAS_ORIGIN) { Some((Lsn(reader.u64()?), reader.i64()?)) } else { None };
        Ok(Xact { commits, xid, time, subxids, relations, two_phase, origin })
    }

    /// The transaction and its subtransactions.
    pub fn all_xids(&self) -> impl Iterator<Item = u32> + Clone + 'a {
        std::iter::once(self.xid).filter(|xid| *xid != 0).chain(words(self.subxids))
    }

    /// Relations whose files go away: tablespace, database, relation.
    pub fn relations(&self) -> impl Iterator<Item = (u32, u32, u32)> + 'a {
        self.relations.chunks_exact(12).map(|raw| {
            let word =
                |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
            (word(0), word(4), word(8))
        })
    }
}

/// What a prepare record says beyond being the state file's content.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prepare<'a> {
    pub xid: u32,
    subxids: &'a [u8],
    pub origin_lsn: Lsn,
}

impl<'a> Prepare<'a> {
    pub fn decode(main: &'a [u8]) -> Step<Prepare<'a>> {
        let mut reader = Reader::new(main);
        let header = reader.take(PREPARE_HEADER)?;
        let mut fields = Reader::new(header);
        fields.take(8)?;
        let xid = fields.u32()?;
        fields.take(16)?;
        let subxact_count = fields.u32()? as usize;
        fields.take(22)?;
        let gid_length = usize::from(fields.u16()?);
        let origin_lsn = Lsn(fields.u64()?);
        reader.take(gid_length.next_multiple_of(8))?;
        let length = subxact_count.checked_mul(4).ok_or(Bad("a list is longer than its record"))?;
        Ok(Prepare { xid, subxids: reader.take(length)?, origin_lsn })
    }

    pub fn subxids(&self) -> impl Iterator<Item = u32> + 'a {
        words(self.subxids)
    }
}
