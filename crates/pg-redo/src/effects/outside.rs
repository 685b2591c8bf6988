//! Effects that are not on pages: relations, databases, tablespaces, relation maps, transactions, origins.

use super::{Effect, Effects};
use crate::control::ControlState;
use crate::error::{Bad, Step};
use crate::slru::{ABORTED, COMMITTED};
use crate::value;
use crate::visibility;
use crate::xact::{self, Prepare, Xact};
use pgstrata_ids::{Fork, Lsn, RelTag, SlruKind};
use pgstrata_pg_wal::bytes::{Reader, i64_at, u16_at, u32_at, u64_at};
use pgstrata_pg_wal::{DecodedRecord, PgVersion};

const SMGR_TRUNCATE_HEAP: u32 = 1;
const SMGR_TRUNCATE_VM: u32 = 2;

fn locator(reader: &mut Reader<'_>, fork: Fork) -> Step<RelTag> {
    Ok(RelTag { spc: reader.u32()?, db: reader.u32()?, rel: reader.u32()?, fork })
}

impl Effects {
    pub(super) fn xlog(
        &mut self,
        record: &DecodedRecord<'_>,
        control: &ControlState,
        commit_ts_was_active: bool,
    ) -> Step<()> {
        let main = record.main_data;
        match record.header.opcode() {
            0x50 => self.items.push(Effect::BackupEnd { start: Lsn(u64_at(main, 0)?) }),
            0x60 => match (commit_ts_was_active, control.control.track_commit_timestamp) {
                (false, true) => self.activate_commit_ts(control),
                (true, false) => self.items.push(Effect::SlruClear { kind: SlruKind::CommitTs }),
                _ => {}
            },
            0x70 => {
                let time = i64_at(main, 0)?;
                let name = main[8..].split(|byte| *byte == 0).next().unwrap_or(&[]);
                let start = self.buf.len();
                self.buf.extend_from_slice(name);
                let name = self.since(start);
                self.items.push(Effect::RestorePoint { time, name });
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn transaction(
        &mut self,
        record: &DecodedRecord<'_>,
        control: &ControlState,
    ) -> Step<()> {
        let info = record.header.info;
        match info & 0x70 {
            xact::COMMIT | xact::ABORT | xact::COMMIT_PREPARED | xact::ABORT_PREPARED => {
                let xact =
                    Xact::decode(control.version(), info, record.header.xid, record.main_data)?;
                self.transaction_end(record, &xact, control);
            }
            xact::PREPARE => self.prepare(record, control)?,
            _ => {}
        }
        Ok(())
    }

    fn transaction_end(
        &mut self,
        record: &DecodedRecord<'_>,
        xact: &Xact<'_>,
        control: &ControlState,
    ) {
        let status = if xact.commits { COMMITTED } else { ABORTED };
        self.transaction_status(xact.all_xids(), status);
        let origin = record.origin.unwrap_or(0);
        if xact.commits {
            if control.control.track_commit_timestamp {
                let time = xact.origin.map_or(xact.time, |(_, time)| time);
                self.commit_timestamps(xact.all_xids(), time, origin);
            }
            self.items.push(Effect::Commit { xid: xact.xid, time: xact.time });
        }
        if let Some((remote_lsn, _)) = xact.origin {
            self.origin_progress(record, origin, remote_lsn, false);
        }
        for (spc, db, rel) in xact.relations() {
            self.items.push(Effect::RelDrop { spc, db, rel });
        }
        if xact.two_phase {
            self.items.push(Effect::TwoPhaseRemove { full_xid: control.full_xid(xact.xid) });
        }
    }

    fn prepare(&mut self, record: &DecodedRecord<'_>, control: &ControlState) -> Step<()> {
        let prepare = Prepare::decode(record.main_data)?;
        let start = self.buf.len();
        self.buf.extend_from_slice(record.main_data);
        self.buf.extend_from_slice(&crc32c::crc32c(record.main_data).to_le_bytes());
        let file = self.since(start);
        self.items.push(Effect::TwoPhasePut { full_xid: control.full_xid(prepare.xid), file });
        if let Some(origin) = record.origin.filter(|origin| *origin != 0) {
            self.origin_progress(record, origin, prepare.origin_lsn, false);
        }
        Ok(())
    }

    fn origin_progress(
        &mut self,
        record: &DecodedRecord<'_>,
        node: u16,
        remote_lsn: Lsn,
        force: bool,
    ) {
        let local_lsn = record.end;
        self.items.push(Effect::OriginProgress { node, remote_lsn, local_lsn, force });
    }

    pub(super) fn origin(&mut self, record: &DecodedRecord<'_>) -> Step<()> {
        let main = record.main_data;
        match record.header.opcode() {
            0x00 => {
                let force = main.get(10).is_some_and(|force| *force != 0);
                self.origin_progress(record, u16_at(main, 8)?, Lsn(u64_at(main, 0)?), force);
            }
            _ => self.items.push(Effect::OriginDrop { node: u16_at(main, 0)? }),
        }
        Ok(())
    }

    pub(super) fn storage(&mut self, record: &DecodedRecord<'_>) -> Step<()> {
        let mut reader = Reader::new(record.main_data);
        if record.header.opcode() == 0x10 {
            let rel = locator(&mut reader, Fork::Main)?;
            let fork = reader.u32()?;
            let fork = u8::try_from(fork).ok().and_then(Fork::from_number);
            let rel = rel.with_fork(fork.ok_or(Bad("unknown fork"))?);
            if rel.fork != Fork::FreeSpace {
                self.items.push(Effect::RelCreate { rel });
            }
            return Ok(());
        }
        let blocks = reader.u32()?;
        let rel = locator(&mut reader, Fork::Main)?;
        let flags = reader.u32()?;
        if flags & SMGR_TRUNCATE_HEAP != 0 {
            self.items.push(Effect::RelTruncate { rel, blocks });
        }
        if flags & SMGR_TRUNCATE_VM != 0 {
            self.truncate_visibility(rel.with_fork(Fork::Visibility), blocks);
        }
        Ok(())
    }

    /// `visibilitymap_prepare_truncate`: clears the tail of the last page that stays.
    fn truncate_visibility(&mut self, rel: RelTag, heap_blocks: u32) {
        let (block, index) = visibility::place(heap_blocks);
        let mut blocks = block;
        if index != 0 {
            blocks += 1;
            let start = self.buf.len();
            value::encode_visibility_truncate(&mut self.buf, index);
            let value = self.since(start);
            self.items.push(Effect::Block { rel, block, value, complete: false, extends: false });
        }
        self.items.push(Effect::RelTruncate { rel, blocks });
    }

    pub(super) fn database(&mut self, record: &DecodedRecord<'_>) -> Step<()> {
        let main = record.main_data;
        let db = u32_at(main, 0)?;
        match record.header.opcode() {
            0x00 => {
                let copy_from = Some((u32_at(main, 12)?, u32_at(main, 8)?));
                self.items.push(Effect::DatabaseCreate { spc: u32_at(main, 4)?, db, copy_from });
            }
            0x10 => {
                let spc = u32_at(main, 4)?;
                self.items.push(Effect::DatabaseCreate { spc, db, copy_from: None });
            }
            _ => {
                let mut reader = Reader::new(main);
                reader.u32()?;
                for _ in 0..reader.u32()? {
                    self.items.push(Effect::DatabaseDrop { spc: reader.u32()?, db });
                }
            }
        }
        Ok(())
    }

    pub(super) fn tablespace(&mut self, record: &DecodedRecord<'_>) -> Step<()> {
        let oid = u32_at(record.main_data, 0)?;
        if record.header.opcode() != 0x00 {
            self.items.push(Effect::TablespaceDrop { oid });
            return Ok(());
        }
        let path = record.main_data[4..].split(|byte| *byte == 0).next().unwrap_or(&[]);
        let start = self.buf.len();
        self.buf.extend_from_slice(path);
        let path = self.since(start);
        self.items.push(Effect::TablespaceCreate { oid, path });
        Ok(())
    }

    /// The record holds the whole file; the checksum is computed when it is written (utils/cache/relmapper.c).
    pub(super) fn relmap(&mut self, record: &DecodedRecord<'_>, version: PgVersion) -> Step<()> {
        let mut reader = Reader::new(record.main_data);
        let db = reader.u32()?;
        let spc = reader.u32()?;
        let length = reader.u32()? as usize;
        if length != version.relmap_size() {
            return Err(Bad("the relation map has a wrong size"));
        }
        let start = self.buf.len();
        self.buf.extend_from_slice(reader.take(length)?);
        let crc_at = start + version.relmap_crc_offset();
        let crc = crc32c::crc32c(&self.buf[start..crc_at]);
        self.buf[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        let file = self.since(start);
        self.items.push(Effect::RelMap { spc, db, file });
        Ok(())
    }
}
