//! WAL in object storage: ordinary PostgreSQL segments, zstd-compressed, and of a timeline that nobody writes to the beginning of
//! its last one, its tail.
//!
//! A tail has its end in its name, and is never replaced: what is committed up to there is the same for ever. It is of no use any
//! more, and removed, once more than it is archived.

mod reader;
mod tail;

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use pgstrata_blob::{PutOutcome, Store};
use pgstrata_format::archived::{Extent, MAX_SIZE as MAX_EXTENT};
use pgstrata_format::quorum::AllGivenUp;
use pgstrata_ids::{Lsn, TimelineParameters};
use pgstrata_quorum::TermHistory;

pub use self::reader::ArchiveReader;
pub use self::tail::Tail;
use crate::checked_segment::CheckedSegment;

/// Compression level: fast, since WAL compresses well at any.
const ZSTD_LEVEL: i32 = 3;

/// What most objects say of themselves is shorter, in bytes.
const SHORT_EXTENT: u64 = 4096;

/// See the module.
#[derive(Debug)]
pub struct Archive {
    store: Store,
    level: i32,
    /// Whether what takes long is another thread's.
    is_off_runtime: bool,
}

/// Archived WAL that can't be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArchiveError {
    /// Now. It may be later.
    #[error("{0}")]
    Away(String),
    /// It is not what was stored: no later attempt mends that.
    #[error("{0}")]
    Damaged(String),
    /// What goes furthest, to there, does not say what log it is of.
    #[error("WAL up to {0} was archived by an older version, which does not say what log it is of")]
    Older(Lsn),
}

impl ArchiveError {
    fn away(error: impl std::fmt::Display) -> ArchiveError {
        ArchiveError::Away(error.to_string())
    }
}

impl From<ArchiveError> for String {
    fn from(error: ArchiveError) -> String {
        error.to_string()
    }
}

/// What is known of the log that WAL is of.
#[derive(Clone, Debug)]
pub struct Log {
    /// Number of its newest configuration.
    pub configuration: u64,
    /// Which term wrote which of its bytes.
    pub history: TermHistory,
}

impl Log {
    /// What a segment's object says of itself.
    fn extent_of(&self, parameters: &TimelineParameters, segment: &CheckedSegment) -> Extent {
        let mut history = self.history.up_to(segment.boundary);
        if history.last().is_none() {
            // The log's first record goes on after the segment: its term has begun all the same, and the segment is told apart from
            // that of members who were given up.
            history = self.history.reached_by(segment.boundary);
        }
        Extent {
            from: Lsn(segment.number * u64::from(parameters.segment_size)),
            boundary: segment.boundary,
            last_record: segment.last_record,
            configuration: self.configuration,
            history,
        }
    }
}

/// Where a timeline's archived WAL is.
fn directory(parameters: &TimelineParameters) -> String {
    format!("tenants/{}/timelines/{}/wal", parameters.tenant, parameters.timeline)
}

/// The object of one segment.
pub fn object_name(parameters: &TimelineParameters, number: u64) -> String {
    format!("{}/{}.zst", directory(parameters), parameters.segment_name(number))
}

impl Archive {
    /// The archive in `store`.
    pub fn new(store: Store) -> Archive {
        Archive { store, level: ZSTD_LEVEL, is_off_runtime: true }
    }

    /// The same with another compression level, on the thread that asks: simulations have one thread, and little use for small
    /// objects.
    pub fn compressing(self, level: i32) -> Archive {
        Archive { level, is_off_runtime: false, ..self }
    }

    /// Stores a segment. If an object of its name is there already, that is read, and must be the
    /// same: the same position of a timeline never has other committed bytes.
    pub async fn put(
        &self,
        parameters: &TimelineParameters,
        segment: &CheckedSegment,
        log: &Log,
    ) -> Result<(), String> {
        let name = object_name(parameters, segment.number);
        if segment.missing > 0 {
            // Who wrote it may be gone, and say so no more.
            if self.holds(parameters, segment).await? {
                return Ok(());
            }
            return Err(format!(
                "{name} begins with WAL of the ancestor timeline, which this safekeeper doesn't \
                 have: another member has to write it"
            ));
        }
        let extent = log.extent_of(parameters, segment);
        match self.put_object(&name, Arc::clone(&segment.bytes), &extent).await? {
            PutOutcome::Created => Ok(()),
            PutOutcome::Exists => match self.holds(parameters, segment).await? {
                true => Ok(()),
                false => Err(format!("{name} was there, and is gone again")),
            },
        }
    }

    /// Stores a segment in the place of one that is of members who were given up, after what the log that goes on shares with
    /// theirs. False if the one that is there is not of them, or is another one before that too.
    pub async fn replace_given_up(
        &self,
        parameters: &TimelineParameters,
        segment: &CheckedSegment,
        log: &Log,
        given_up: &AllGivenUp,
    ) -> Result<bool, String> {
        let size = u64::from(parameters.segment_size);
        let name = object_name(parameters, segment.number);
        let from = Lsn(segment.number * size);
        if given_up.includes(log.configuration) || segment.missing > 0 {
            return Ok(false);
        }
        let Some((extent, found)) = self.get_object(&name, size as usize).await? else {
            return Ok(false);
        };
        let number = extent.map_or(0, |extent| extent.configuration);
        let Some(limit) = given_up.denies(number, from + size) else { return Ok(false) };
        let shared = (limit.lsn.saturating_sub(from) as usize).min(segment.bytes.len());
        if found.get(..shared) != segment.bytes.get(..shared) {
            return Ok(false);
        }
        let extent = log.extent_of(parameters, segment);
        let object = self.object_of(&name, Arc::clone(&segment.bytes), &extent).await?;
        self.store.check_claim().await.map_err(|error| error.to_string())?;
        self.store.put(&name, object).await.map_err(|error| error.to_string())?;
        Ok(true)
    }

    /// Whether a segment's object says that it is of an earlier configuration than that.
    pub async fn is_of_before(
        &self,
        parameters: &TimelineParameters,
        number: u64,
        configuration: u64,
    ) -> Result<bool, String> {
        let extent = self.extent_of(&object_name(parameters, number)).await?.flatten();
        Ok(extent.map_or(0, |extent| extent.configuration) < configuration)
    }

    /// WAL under a name that has never had any other.
    async fn put_object(
        &self,
        name: &str,
        wal: Arc<Vec<u8>>,
        extent: &Extent,
    ) -> Result<PutOutcome, String> {
        // Each time: where two of one timeline go apart, the first to store a segment keeps the other from it. One that
        // is on its way while the store is taken still gets there.
        self.store.check_claim().await.map_err(|error| error.to_string())?;
        let object = self.object_of(name, wal, extent).await?;
        let stored = self.store.put_if_absent(name, object).await;
        stored.map_err(|error| error.to_string())
    }

    /// Whether the segment is archived, by reading it. An object that differs is an error.
    pub async fn holds(
        &self,
        parameters: &TimelineParameters,
        segment: &CheckedSegment,
    ) -> Result<bool, String> {
        match self.get(parameters, segment.number).await? {
            None => Ok(false),
            Some(found) if segment.is_held_by(&found, parameters) => Ok(true),
            Some(_) => Err(differs(&object_name(parameters, segment.number))),
        }
    }

    /// Removes all WAL of a timeline that was deleted.
    pub async fn remove_all(&self, parameters: &TimelineParameters) -> Result<(), String> {
        let listed = self.store.list(&format!("{}/", directory(parameters))).await;
        for object in listed.map_err(|error| error.to_string())? {
            self.store.check_claim().await.map_err(|error| error.to_string())?;
            self.store.delete(&object.path).await.map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Whether there is an object for each segment in `[first, end)`. None of them is read.
    pub async fn has_all(
        &self,
        parameters: &TimelineParameters,
        first: u64,
        end: u64,
    ) -> Result<bool, String> {
        let listed = self.store.list(&format!("{}/", directory(parameters))).await;
        let listed = listed.map_err(|error| error.to_string())?;
        let names: HashSet<&str> = listed.iter().map(|object| object.path.as_str()).collect();
        Ok((first..end).all(|number| names.contains(object_name(parameters, number).as_str())))
    }

    /// Fetches a full segment; `None` if it was never stored.
    pub async fn get(
        &self,
        parameters: &TimelineParameters,
        number: u64,
    ) -> Result<Option<Vec<u8>>, ArchiveError> {
        Ok(self.get_segment(parameters, number).await?.map(|(_, segment)| segment))
    }

    async fn get_segment(
        &self,
        parameters: &TimelineParameters,
        number: u64,
    ) -> Result<Option<(Option<Extent>, Vec<u8>)>, ArchiveError> {
        let name = object_name(parameters, number);
        let size = parameters.segment_size as usize;
        let Some((extent, segment)) = self.get_object(&name, size).await? else { return Ok(None) };
        match segment.len() == size {
            true => Ok(Some((extent, segment))),
            false => {
                let length = segment.len();
                let text = format!("{name} is damaged: {length} bytes, not {size}");
                Err(ArchiveError::Damaged(text))
            }
        }
    }

    /// What an object says of itself, if it does; `None` if it was never stored.
    async fn extent_of(&self, name: &str) -> Result<Option<Option<Extent>>, ArchiveError> {
        for most in [SHORT_EXTENT, MAX_EXTENT] {
            let begin = match self.store.get_range(name, 0..most).await {
                Ok(begin) => begin,
                Err(error) if error.is_not_found() => return Ok(None),
                Err(error) => return Err(ArchiveError::away(error)),
            };
            match Extent::decode(&begin) {
                // It may be longer than what was read.
                Err(_) if begin.len() as u64 == most && most < MAX_EXTENT => {}
                Err(error) => {
                    return Err(ArchiveError::Damaged(format!("{name} is damaged: {error}")));
                }
                Ok(extent) => return Ok(Some(extent)),
            }
        }
        Ok(None)
    }

    /// What an object says of itself, if it does, and its WAL, so many bytes at most; `None` if it was never stored.
    async fn get_object(
        &self,
        name: &str,
        size: usize,
    ) -> Result<Option<(Option<Extent>, Vec<u8>)>, ArchiveError> {
        // A frame of a segment that can't be compressed, its checksum, and what it says of itself.
        let limit = zstd::zstd_safe::compress_bound(size) as u64 + 4 + MAX_EXTENT;
        let object = match self.store.get(name, limit).await {
            Ok(object) => object,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(ArchiveError::away(error)),
        };
        let damaged = |error: &dyn std::fmt::Display| {
            ArchiveError::Damaged(format!("{name} is damaged: {error}"))
        };
        let extent = Extent::decode(&object).map_err(|error| damaged(&error))?;
        let wal = self.off_runtime(move || zstd::bulk::decompress(&object, size)).await;
        Ok(Some((extent, wal.map_err(|error| damaged(&error))?)))
    }

    /// An object's bytes.
    async fn object_of(
        &self,
        name: &str,
        wal: Arc<Vec<u8>>,
        extent: &Extent,
    ) -> Result<Bytes, String> {
        // Of a log that no term wrote there is nothing to say.
        let mut object = match extent.history.last() {
            Some(_) => extent.encode(),
            None => Vec::new(),
        };
        let level = self.level;
        let compressed = self.off_runtime(move || compress(&wal, level)).await;
        object.extend(compressed.map_err(|error| format!("can't compress {name}: {error}"))?);
        Ok(Bytes::from(object))
    }

    /// Does what takes long away from the threads that serve connections.
    async fn off_runtime<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        match self.is_off_runtime {
            true => tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?,
            false => work(),
        }
    }
}

fn differs(name: &str) -> String {
    format!(
        "{name} differs from the WAL that is committed here: it is not counted as archived. Move it away, and it is written \
         again"
    )
}

/// One zstd frame with a checksum.
fn compress(segment: &[u8], level: i32) -> io::Result<Vec<u8>> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    compressor.include_checksum(true)?;
    compressor.compress(segment)
}
