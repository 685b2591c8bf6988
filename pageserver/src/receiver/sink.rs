//! What WAL is fed to.

use pgstrata_ids::Lsn;

use super::believing::Doubt;
use crate::ingest::IngestError;

/// What WAL is fed to, and says what of it is there and wanted. Shipped, a timeline with its ingest; simulated, bytes.
pub trait Sink {
    /// Forgets what was fed after the last whole record, and what failed: the next byte is that at [`Sink::whole`]. Before the
    /// first time nothing can be fed.
    fn begin(&mut self) -> Result<(), IngestError>;

    /// The position of the next byte to feed.
    fn position(&self) -> Lsn;

    /// The end of the last whole record that was fed, or where the sink began.
    fn whole(&self) -> Lsn;

    /// Takes committed WAL from [`Sink::position`] on. After an error it is of no use until it [begins](Sink::begin) anew.
    fn feed(&mut self, wal: &[u8]) -> Result<(), IngestError>;

    /// Whether WAL is taken from a source that knows of this configuration of the members, and of no later one; 0 if it does not say.
    /// From now on what is fed comes from it. May wait for object storage.
    fn believes(&mut self, configuration: u64) -> Result<(), Doubt>;

    /// Whether that is to be asked again at once.
    fn is_in_doubt(&self) -> bool {
        false
    }

    /// Everything before it is durable elsewhere: safekeepers need not keep it.
    fn durable(&self) -> Lsn;

    /// Whether somebody waits for more than there is.
    fn is_wanted(&self) -> bool;

    /// Whether no more is to be fed, for good.
    fn is_stopping(&self) -> bool;

    /// There is time for what is due besides.
    fn tidy(&mut self) {}

    /// It does not go on for now, for a reason that people must see.
    fn stall(&mut self, _reason: String) {}

    /// It goes on: what was said of a stall is over.
    fn go_on(&mut self) {}

    /// A safekeeper sent what is no WAL.
    fn note_bad_source(&mut self, _address: &str, _reason: &str) {}
}
