//! Heap tuple headers (access/htup_details.h).
//!
//! ```text
//! offset  size  field
//!      0     4  xmin
//!      4     4  xmax
//!      8     4  command id, or xvac
//!     12     6  ctid: block high u16, block low u16, offset u16
//!     18     2  infomask2
//!     20     2  infomask
//!     22     1  hoff: where the data starts
//! ```

use crate::error::{Bad, Step};
use pgstrata_pg_wal::bytes::Reader;

/// Fixed part of the header.
pub(crate) const HEADER_SIZE: usize = 23;

pub(crate) const XMIN_COMMITTED: u16 = 0x0100;
pub(crate) const XMIN_INVALID: u16 = 0x0200;
const COMBO_CID: u16 = 0x0020;
const XMAX_KEYSHR_LOCK: u16 = 0x0010;
const XMAX_EXCL_LOCK: u16 = 0x0040;
const XMAX_LOCK_ONLY: u16 = 0x0080;
const XMAX_COMMITTED: u16 = 0x0400;
const XMAX_INVALID: u16 = 0x0800;
const XMAX_IS_MULTI: u16 = 0x1000;
const MOVED: u16 = 0xC000;
const XMAX_BITS: u16 = XMAX_COMMITTED
    | XMAX_INVALID
    | XMAX_IS_MULTI
    | XMAX_KEYSHR_LOCK
    | XMAX_EXCL_LOCK
    | XMAX_LOCK_ONLY;

const KEYS_UPDATED: u16 = 0x2000;
const HOT_UPDATED: u16 = 0x4000;

const INFOBIT_IS_MULTI: u8 = 0x01;
const INFOBIT_LOCK_ONLY: u8 = 0x02;
const INFOBIT_EXCL_LOCK: u8 = 0x04;
const INFOBIT_KEYSHR_LOCK: u8 = 0x08;
const INFOBIT_KEYS_UPDATED: u8 = 0x10;

/// A tuple in a page, at least as long as the header.
pub(crate) struct Tuple<'a>(&'a mut [u8]);

/// The five bytes of a header that WAL carries with a new tuple (`xl_heap_header`).
#[derive(Clone, Copy)]
pub(crate) struct LoggedHeader {
    pub infomask2: u16,
    pub infomask: u16,
    pub hoff: u8,
}

impl LoggedHeader {
    pub fn read(reader: &mut Reader<'_>) -> Step<LoggedHeader> {
        Ok(LoggedHeader { infomask2: reader.u16()?, infomask: reader.u16()?, hoff: reader.u8()? })
    }

    /// The header of a tuple that was just inserted by `xmin` at (`block`, `offset`).
    pub fn expand(self, xmin: u32, xmax: u32, block: u32, offset: u16) -> [u8; HEADER_SIZE] {
        let mut header = [0; HEADER_SIZE];
        header[0..4].copy_from_slice(&xmin.to_le_bytes());
        header[4..8].copy_from_slice(&xmax.to_le_bytes());
        header[12..18].copy_from_slice(&tid(block, offset));
        header[18..20].copy_from_slice(&self.infomask2.to_le_bytes());
        header[20..22].copy_from_slice(&(self.infomask & !COMBO_CID).to_le_bytes());
        header[22] = self.hoff;
        header
    }
}

/// A tuple id as it is stored.
pub(crate) fn tid(block: u32, offset: u16) -> [u8; 6] {
    let high = ((block >> 16) as u16).to_le_bytes();
    let low = (block as u16).to_le_bytes();
    let offset = offset.to_le_bytes();
    [high[0], high[1], low[0], low[1], offset[0], offset[1]]
}

impl<'a> Tuple<'a> {
    pub fn new(bytes: &'a mut [u8]) -> Step<Tuple<'a>> {
        if bytes.len() < HEADER_SIZE {
            return Err(Bad("the line pointer holds no tuple"));
        }
        Ok(Tuple(bytes))
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub fn infomask(&self) -> u16 {
        self.word(20)
    }

    pub fn set_infomask(&mut self, value: u16) {
        self.set(20, &value.to_le_bytes());
    }

    pub fn infomask2(&self) -> u16 {
        self.word(18)
    }

    pub fn set_infomask2(&mut self, value: u16) {
        self.set(18, &value.to_le_bytes());
    }

    pub fn set_xmin(&mut self, xid: u32) {
        self.set(0, &xid.to_le_bytes());
    }

    pub fn set_xmax(&mut self, xid: u32) {
        self.set(4, &xid.to_le_bytes());
    }

    pub fn set_xvac(&mut self, xid: u32) {
        self.set(8, &xid.to_le_bytes());
    }

    pub fn set_ctid(&mut self, block: u32, offset: u16) {
        self.set(12, &tid(block, offset));
    }

    /// `HeapTupleHeaderSetCmax` with the first command.
    pub fn reset_cmax(&mut self) {
        self.set(8, &[0; 4]);
        self.set_infomask(self.infomask() & !COMBO_CID);
    }

    pub fn set_hot_updated(&mut self, on: bool) {
        let others = self.infomask2() & !HOT_UPDATED;
        self.set_infomask2(if on { others | HOT_UPDATED } else { others });
    }

    /// Forgets the old xmax's state and takes that of the record (`fix_infomask_from_infobits`).
    pub fn replace_xmax_bits(&mut self, infobits: u8) {
        let mut mask = self.infomask() & !(XMAX_BITS | MOVED);
        let mut mask2 = self.infomask2() & !KEYS_UPDATED;
        for (infobit, bit) in [
            (INFOBIT_IS_MULTI, XMAX_IS_MULTI),
            (INFOBIT_LOCK_ONLY, XMAX_LOCK_ONLY),
            (INFOBIT_EXCL_LOCK, XMAX_EXCL_LOCK),
            (INFOBIT_KEYSHR_LOCK, XMAX_KEYSHR_LOCK),
        ] {
            if infobits & infobit != 0 {
                mask |= bit;
            }
        }
        if infobits & INFOBIT_KEYS_UPDATED != 0 {
            mask2 |= KEYS_UPDATED;
        }
        self.set_infomask(mask);
        self.set_infomask2(mask2);
    }

    /// `HEAP_XMAX_IS_LOCKED_ONLY`.
    pub fn is_locked_only(&self) -> bool {
        let mask = self.infomask();
        let locks = XMAX_IS_MULTI | XMAX_KEYSHR_LOCK | XMAX_EXCL_LOCK;
        mask & XMAX_LOCK_ONLY != 0 || mask & locks == XMAX_EXCL_LOCK
    }

    /// The user data.
    pub fn data(&mut self) -> Step<&mut [u8]> {
        let start = usize::from(self.0[22]);
        self.0.get_mut(start..).ok_or(Bad("the tuple's header is longer than the tuple"))
    }
}
