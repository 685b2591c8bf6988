//! A sink of bytes, for tests.

use pgstrata_ids::Lsn;

use super::believing::Doubt;
use super::sink::Sink;
use crate::ingest::IngestError;

pub const START: Lsn = Lsn(0x100_0000);

/// Where it is told how its records end, it says so: what was fed is whole up to `whole`, which tests set.
#[derive(Debug)]
pub struct Bytes {
    pub fed: Vec<u8>,
    pub position: Lsn,
    pub whole: Lsn,
    pub durable: Lsn,
    pub is_wanted: bool,
    pub is_stopping: bool,
    /// What feeding is answered.
    pub broken: Option<IngestError>,
    /// How often there was time for what is due besides.
    pub tidied: usize,
    pub stalled: Option<String>,
    pub bad: Vec<String>,
    /// Which configurations it was asked about, and what is answered.
    pub judged: Vec<u64>,
    pub doubt: Option<Doubt>,
    pub is_in_doubt: bool,
}

impl Default for Bytes {
    fn default() -> Bytes {
        Bytes {
            fed: Vec::new(),
            position: START,
            whole: START,
            durable: Lsn::INVALID,
            is_wanted: false,
            is_stopping: false,
            broken: None,
            tidied: 0,
            stalled: None,
            bad: Vec::new(),
            judged: Vec::new(),
            doubt: None,
            is_in_doubt: false,
        }
    }
}

impl Sink for Bytes {
    fn begin(&mut self) -> Result<(), IngestError> {
        self.position = self.whole;
        self.is_in_doubt = false;
        Ok(())
    }

    fn position(&self) -> Lsn {
        self.position
    }

    fn whole(&self) -> Lsn {
        self.whole
    }

    fn feed(&mut self, wal: &[u8]) -> Result<(), IngestError> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        self.fed.extend_from_slice(wal);
        self.position = self.position + wal.len() as u64;
        Ok(())
    }

    fn believes(&mut self, configuration: u64) -> Result<(), Doubt> {
        self.judged.push(configuration);
        self.doubt.clone().map_or(Ok(()), Err)
    }

    fn is_in_doubt(&self) -> bool {
        self.is_in_doubt
    }

    fn durable(&self) -> Lsn {
        self.durable
    }

    fn is_wanted(&self) -> bool {
        self.is_wanted
    }

    fn is_stopping(&self) -> bool {
        self.is_stopping
    }

    fn tidy(&mut self) {
        self.tidied += 1;
    }

    fn stall(&mut self, reason: String) {
        self.stalled = Some(reason);
    }

    fn go_on(&mut self) {
        self.stalled = None;
    }

    fn note_bad_source(&mut self, address: &str, _reason: &str) {
        self.bad.push(address.to_owned());
    }
}
