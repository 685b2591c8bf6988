//! SLRU pages: transaction status, commit timestamps, multixacts.

use super::{Effect, Effects};
use crate::control::ControlState;
use crate::error::{Bad, Step};
use crate::slru::{
    self, CLOG_XACTS_PER_PAGE, COMMIT_TS_PER_PAGE, MEMBERS_PER_PAGE, OFFSETS_PER_PAGE,
};
use pgstrata_ids::SlruKind;
use pgstrata_pg_wal::bytes::{Reader, u32_at, u64_at};
use pgstrata_pg_wal::{DecodedRecord, PgVersion};

/// The page number at the start of a record: 4 bytes before PostgreSQL 17, then 8.
fn page_number(version: PgVersion, main: &[u8]) -> Step<u64> {
    Ok(match version.slru_page_number_size() {
        4 => u64::from(u32_at(main, 0)?),
        _ => u64_at(main, 0)?,
    })
}

impl Effects {
    fn slru_page(&mut self, kind: SlruKind, page: u64, start: usize) {
        let complete = slru::is_complete_slru(&self.buf[start..]);
        let value = self.since(start);
        self.items.push(Effect::SlruPage { kind, page, value, complete });
    }

    fn slru_zero(&mut self, kind: SlruKind, page: u64) {
        let start = self.buf.len();
        slru::encode_zero(&mut self.buf);
        self.slru_page(kind, page, start);
    }

    pub(super) fn clog(&mut self, record: &DecodedRecord<'_>, version: PgVersion) -> Step<()> {
        let page = page_number(version, record.main_data)?;
        match record.header.opcode() {
            0x00 => self.slru_zero(SlruKind::Clog, page),
            _ => self.items.push(Effect::SlruTruncate { kind: SlruKind::Clog, cutoff_page: page }),
        }
        Ok(())
    }

    pub(super) fn commit_ts(&mut self, record: &DecodedRecord<'_>, version: PgVersion) -> Step<()> {
        let kind = SlruKind::CommitTs;
        let page = page_number(version, record.main_data)?;
        match record.header.opcode() {
            0x00 => self.slru_zero(kind, page),
            _ => self.items.push(Effect::SlruTruncate { kind, cutoff_page: page }),
        }
        Ok(())
    }

    /// Makes the page of the next transaction exist when commit timestamps are switched on.
    pub(super) fn activate_commit_ts(&mut self, control: &ControlState) {
        let start = self.buf.len();
        slru::encode_commit_ts(&mut self.buf, 0, 0);
        let page = u64::from(control.next_xid as u32 / COMMIT_TS_PER_PAGE);
        self.slru_page(SlruKind::CommitTs, page, start);
    }

    /// Status of transactions, one value per page.
    pub(super) fn transaction_status(
        &mut self,
        xids: impl Iterator<Item = u32> + Clone,
        status: u8,
    ) {
        self.per_page(SlruKind::Clog, CLOG_XACTS_PER_PAGE, xids, |buf| {
            slru::encode_status(buf, status);
        });
    }

    /// Commit timestamps of transactions, one value per page.
    pub(super) fn commit_timestamps(
        &mut self,
        xids: impl Iterator<Item = u32> + Clone,
        time: i64,
        origin: u16,
    ) {
        self.per_page(SlruKind::CommitTs, COMMIT_TS_PER_PAGE, xids, |buf| {
            slru::encode_commit_ts(buf, time, origin);
        });
    }

    fn per_page(
        &mut self,
        kind: SlruKind,
        entries_per_page: u32,
        xids: impl Iterator<Item = u32> + Clone,
        begin: impl Fn(&mut Vec<u8>),
    ) {
        let Some(first) = xids.clone().next() else {
            return;
        };
        let first_page = first / entries_per_page;
        if xids.clone().all(|xid| xid / entries_per_page == first_page) {
            self.page_entries(kind, entries_per_page, xids, begin);
            return;
        }
        // Rare: subtransactions on other pages than the transaction. Sorted, they are grouped in one pass.
        let mut sorted: Vec<u32> = xids.collect();
        sorted.sort_unstable();
        for group in sorted.chunk_by(|a, b| a / entries_per_page == b / entries_per_page) {
            self.page_entries(kind, entries_per_page, group.iter().copied(), &begin);
        }
    }

    fn page_entries(
        &mut self,
        kind: SlruKind,
        entries_per_page: u32,
        xids: impl Iterator<Item = u32> + Clone,
        begin: impl Fn(&mut Vec<u8>),
    ) {
        let start = self.buf.len();
        let page = xids.clone().next().map_or(0, |xid| xid / entries_per_page);
        begin(&mut self.buf);
        for xid in xids {
            slru::encode_index(&mut self.buf, (xid % entries_per_page) as u16);
        }
        self.slru_page(kind, u64::from(page), start);
    }

    pub(super) fn multixact(
        &mut self,
        record: &DecodedRecord<'_>,
        control: &mut ControlState,
    ) -> Step<()> {
        let main = record.main_data;
        match record.header.opcode() {
            0x00 => {
                let page = page_number(control.version(), main)?;
                // Initialised early by the last multixact of the page before; its entry must survive.
                if control.offsets_page_early != Some(page as u32) {
                    self.slru_zero(SlruKind::MultiXactOffsets, page);
                    control.offsets_page = page as u32;
                }
                control.offsets_page_early = None;
            }
            0x10 => {
                let page = page_number(control.version(), main)?;
                self.slru_zero(SlruKind::MultiXactMembers, page);
            }
            0x20 => self.multixact_create(main, control)?,
            _ => self.multixact_truncate(main)?,
        }
        Ok(())
    }

    /// `RecordNewMultiXact`: the multixact's own offset, the next one's, and the members.
    fn multixact_create(&mut self, main: &[u8], control: &mut ControlState) -> Step<()> {
        let mut reader = Reader::new(main);
        let multi = reader.u32()?;
        let offset = reader.u32()?;
        let count = reader.u32()?;
        let members = reader.take(count as usize * 8)?;

        let next = multi.wrapping_add(1).max(1);
        let next_offset = offset.wrapping_add(count).max(1);
        let (page, next_page) = (multi / OFFSETS_PER_PAGE, next / OFFSETS_PER_PAGE);
        let start = self.buf.len();
        slru::encode_offsets(&mut self.buf, false);
        slru::encode_offset(&mut self.buf, (multi % OFFSETS_PER_PAGE) as u16, offset);
        if next_page == page {
            slru::encode_offset(&mut self.buf, (next % OFFSETS_PER_PAGE) as u16, next_offset);
        }
        self.slru_page(SlruKind::MultiXactOffsets, u64::from(page), start);

        control.offsets_page_early = None;
        if next_page != page {
            // WAL of older minor versions initialises the next page only after this record.
            let early = control.offsets_page == page;
            if early {
                control.offsets_page_early = Some(next_page);
                control.offsets_page = next_page;
            }
            let start = self.buf.len();
            slru::encode_offsets(&mut self.buf, early);
            slru::encode_offset(&mut self.buf, (next % OFFSETS_PER_PAGE) as u16, next_offset);
            self.slru_page(SlruKind::MultiXactOffsets, u64::from(next_page), start);
        }
        self.multixact_members(offset, members)
    }

    fn multixact_members(&mut self, first: u32, members: &[u8]) -> Step<()> {
        let mut rest = Reader::new(members);
        let mut member = first;
        while !rest.is_empty() {
            let page = member / MEMBERS_PER_PAGE;
            let start = self.buf.len();
            slru::encode_members(&mut self.buf);
            while !rest.is_empty() && member / MEMBERS_PER_PAGE == page {
                let xid = rest.u32()?;
                let status = rest.u32()?;
                if status > 5 {
                    return Err(Bad("a multixact member has an unknown status"));
                }
                let index = (member % MEMBERS_PER_PAGE) as u16;
                slru::encode_member(&mut self.buf, index, status as u8, xid);
                member = member.wrapping_add(1);
            }
            self.slru_page(SlruKind::MultiXactMembers, u64::from(page), start);
        }
        Ok(())
    }

    fn multixact_truncate(&mut self, main: &[u8]) -> Step<()> {
        let end_multi = u32_at(main, 8)?;
        let start_member = u32_at(main, 12)?;
        let end_member = u32_at(main, 16)?;
        self.items.push(Effect::SlruRemove {
            kind: SlruKind::MultiXactMembers,
            first_page: u64::from(start_member / MEMBERS_PER_PAGE),
            end_page: u64::from(end_member / MEMBERS_PER_PAGE),
            max_page: u64::from(u32::MAX / MEMBERS_PER_PAGE),
        });
        // PerformOffsetsTruncation: the page of the multixact before the oldest stays.
        let last_gone = match end_multi.wrapping_sub(1) {
            0 => u32::MAX,
            before => before,
        };
        let cutoff_page = u64::from(last_gone / OFFSETS_PER_PAGE);
        self.items.push(Effect::SlruTruncate { kind: SlruKind::MultiXactOffsets, cutoff_page });
        Ok(())
    }
}
