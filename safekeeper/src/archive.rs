//! Full WAL segments in object storage: ordinary PostgreSQL segments, zstd-compressed.

use std::sync::Arc;

use bytes::Bytes;
use pgstrata_blob::{BlobError, Location, Store};
use pgstrata_ids::{Lsn, TimelineParameters};

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
    /// The archive at `location`.
    pub fn open(location: &Location, s3_endpoint: Option<&str>) -> Result<Archive, BlobError> {
        Store::open(location, s3_endpoint).map(|store| Archive { store })
    }

    /// Stores a full segment. If it is there already, it is the same one: the same position of a
    /// timeline never has other committed bytes.
    pub async fn put(
        &self,
        parameters: &TimelineParameters,
        number: u64,
        segment: &[u8],
    ) -> Result<(), String> {
        let name = object_name(parameters, number);
        let compressed = zstd::bulk::compress(segment, ZSTD_LEVEL)
            .map_err(|error| format!("can't compress {name}: {error}"))?;
        match self.store.put_if_absent(&name, Bytes::from(compressed)).await {
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Fetches a full segment; `None` if it was never stored.
    pub async fn get(
        &self,
        parameters: &TimelineParameters,
        number: u64,
    ) -> Result<Option<Vec<u8>>, String> {
        let name = object_name(parameters, number);
        let compressed = match self.store.get(&name).await {
            Ok(compressed) => compressed,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let size = parameters.segment_size as usize;
        let segment = zstd::bulk::decompress(&compressed, size)
            .map_err(|error| format!("{name} is damaged: {error}"))?;
        match segment.len() == size {
            true => Ok(Some(segment)),
            false => Err(format!("{name} is damaged: {} bytes, not {size}", segment.len())),
        }
    }
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
