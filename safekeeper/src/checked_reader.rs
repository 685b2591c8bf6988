//! Reading committed WAL of a timeline and its ancestors that is handed out only once it was checked.

use pgstrata_ids::Lsn;
use pgstrata_pg_wal::WalError;

use crate::chain_reader::{ChainReader, ReadError};
use crate::verifier::{Next, Verifier};

/// WAL that can't be handed out.
#[derive(Debug, thiserror::Error)]
pub enum CheckedError {
    /// It can't be had.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// What is there is not what was committed.
    #[error("no record ends at {0}, which is committed")]
    Unfinished(Lsn),
    /// What is there is no WAL. It is looked into, if it is here.
    #[error("WAL after {right} is damaged on this safekeeper, or in the archive: {error}")]
    Damaged {
        /// Everything before it is right.
        right: Lsn,
        /// What is wrong.
        error: WalError,
    },
}

/// See the module. Reads one stretch after the other.
#[derive(Debug)]
pub struct CheckedReader {
    reader: ChainReader,
    /// Of what is read, once there is something, and up to where.
    verifier: Option<(Verifier, Lsn)>,
}

impl CheckedReader {
    /// Of what this one reads.
    pub fn new(reader: ChainReader) -> CheckedReader {
        CheckedReader { reader, verifier: None }
    }

    /// Fills `buffer` from `at` on, as far as it is whole and right: at least one byte. Each time `at` is where the last
    /// time ended. WAL is committed up to `end`, which is after `at`, and a record ends there, so nothing that could be handed out is
    /// held back for long.
    pub async fn read(
        &mut self,
        at: Lsn,
        end: Lsn,
        buffer: &mut [u8],
    ) -> Result<usize, CheckedError> {
        if self.verifier.as_ref().is_some_and(|(_, until)| at >= *until) {
            self.verifier = None;
        }
        let (verifier, until) = match &mut self.verifier {
            Some(verifier) => verifier,
            none => none.insert(self.reader.verifier(at).await?),
        };
        let end = end.min(*until);
        let mut read = Vec::new();
        loop {
            let (at, count) = match verifier.next(end) {
                Next::Take => return Ok(verifier.take(buffer, end)),
                Next::Read { at, count } => (at, count),
                Next::Unfinished => return Err(CheckedError::Unfinished(end)),
            };
            if !read.is_empty() {
                // A long record is read to its end first: others have their turn meanwhile. What follows each commit is read at
                // once, since to wait for a turn costs as much as the rest of it.
                tokio::task::yield_now().await;
            }
            read.resize(count, 0);
            let count = self.reader.read(at, &mut read).await?;
            if let Err(error) = verifier.give(&read[..count]) {
                let right = verifier.right_until();
                self.reader.suspect(right, &error.to_string());
                return Err(CheckedError::Damaged { right, error });
            }
        }
    }
}
