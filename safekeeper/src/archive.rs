//! Full WAL segments in object storage: ordinary PostgreSQL segments, zstd-compressed.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use pgstrata_blob::{PutOutcome, Store};
use pgstrata_ids::{Lsn, TimelineParameters};

use crate::checked_segment::CheckedSegment;

/// Compression level: fast, since WAL compresses well at any.
const ZSTD_LEVEL: i32 = 3;

/// See the module.
#[derive(Debug)]
pub struct Archive {
    store: Store,
}

/// The object of one segment.
pub fn object_name(parameters: &TimelineParameters, number: u64) -> String {
    format!(
        "tenants/{}/timelines/{}/wal/{}.zst",
        parameters.tenant,
        parameters.timeline,
        parameters.segment_name(number)
    )
}

impl Archive {
    /// The archive in `store`.
    pub fn new(store: Store) -> Archive {
        Archive { store }
    }

    /// Stores a segment. If an object of its name is there already, that is read, and must be the
    /// same: the same position of a timeline never has other committed bytes.
    pub async fn put(
        &self,
        parameters: &TimelineParameters,
        segment: &CheckedSegment,
    ) -> Result<(), String> {
        let name = object_name(parameters, segment.number);
        if segment.missing > 0 {
            return Err(format!(
                "{name} begins with WAL of the ancestor timeline, which this safekeeper doesn't \
                 have: another member has to write it"
            ));
        }
        // Each time: where two of one timeline go apart, the first to store a segment keeps the other from it. One that
        // is on its way while the store is taken still gets there.
        self.store.check_claim().await.map_err(|error| error.to_string())?;
        let bytes = Arc::clone(&segment.bytes);
        let compressed = off_runtime(move || compress(&bytes)).await;
        let compressed = compressed.map_err(|error| format!("can't compress {name}: {error}"))?;
        match self.store.put_if_absent(&name, Bytes::from(compressed)).await {
            Ok(PutOutcome::Created) => Ok(()),
            Ok(PutOutcome::Exists) => match self.holds(parameters, segment).await? {
                true => Ok(()),
                false => Err(format!("{name} was there, and is gone again")),
            },
            Err(error) => Err(error.to_string()),
        }
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
            Some(_) => Err(format!(
                "{} differs from the WAL that is committed here: it is not counted as archived. \
                 Move it away, and it is written again",
                object_name(parameters, segment.number)
            )),
        }
    }

    /// Whether there is an object for each segment in `[first, end)`. None of them is read.
    pub async fn has_all(
        &self,
        parameters: &TimelineParameters,
        first: u64,
        end: u64,
    ) -> Result<bool, String> {
        let name = object_name(parameters, first);
        let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
        let listed = self.store.list(&format!("{directory}/")).await;
        let listed = listed.map_err(|error| error.to_string())?;
        let names: HashSet<&str> = listed.iter().map(|object| object.path.as_str()).collect();
        Ok((first..end).all(|number| names.contains(object_name(parameters, number).as_str())))
    }

    /// Fetches a full segment; `None` if it was never stored.
    pub async fn get(
        &self,
        parameters: &TimelineParameters,
        number: u64,
    ) -> Result<Option<Vec<u8>>, String> {
        let name = object_name(parameters, number);
        // A frame of a segment that can't be compressed, and its checksum.
        let limit = zstd::zstd_safe::compress_bound(parameters.segment_size as usize) as u64 + 4;
        let compressed = match self.store.get(&name, limit).await {
            Ok(compressed) => compressed,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let size = parameters.segment_size as usize;
        let segment = off_runtime(move || zstd::bulk::decompress(&compressed, size))
            .await
            .map_err(|error| format!("{name} is damaged: {error}"))?;
        match segment.len() == size {
            true => Ok(Some(segment)),
            false => Err(format!("{name} is damaged: {} bytes, not {size}", segment.len())),
        }
    }
}

/// One zstd frame with a checksum.
fn compress(segment: &[u8]) -> io::Result<Vec<u8>> {
    let mut compressor = zstd::bulk::Compressor::new(ZSTD_LEVEL)?;
    compressor.include_checksum(true)?;
    compressor.compress(segment)
}

/// Does what takes long away from the threads that serve connections.
async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Reads archived WAL, keeping the last segment in memory.
#[derive(Debug)]
pub struct ArchiveReader {
    archive: Arc<Archive>,
    last: Option<(TimelineParameters, u64, Vec<u8>)>,
}

impl ArchiveReader {
    /// A reader of `archive`.
    pub fn new(archive: Arc<Archive>) -> ArchiveReader {
        ArchiveReader { archive, last: None }
    }

    /// Fills `buffer` from `at` on, to the end of the segment at most.
    pub async fn read(
        &mut self,
        parameters: &TimelineParameters,
        at: Lsn,
        buffer: &mut [u8],
    ) -> Result<usize, String> {
        let size = u64::from(parameters.segment_size);
        let number = at.segment_number(size);
        let is_it =
            |last: &(TimelineParameters, u64, Vec<u8>)| last.1 == number && last.0 == *parameters;
        if !self.last.as_ref().is_some_and(is_it) {
            self.last = None;
            let Some(segment) = self.archive.get(parameters, number).await? else {
                return Err(format!(
                    "the WAL segment of {at} is neither on this safekeeper nor in object storage"
                ));
            };
            self.last = Some((parameters.clone(), number, segment));
        }
        let Some((_, _, segment)) = &self.last else { return Ok(0) };
        let rest = &segment[at.segment_offset(size) as usize..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
}
