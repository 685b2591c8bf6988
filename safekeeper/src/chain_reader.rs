//! WAL of a timeline and, before its start, of its ancestors.

use std::pin::Pin;
use std::sync::Arc;

use pgstrata_ids::Lsn;
use pgstrata_wire::safekeeper::RefusedReason;

use crate::archive::{Archive, ArchiveReader};
use crate::segment::SegmentReader;
use crate::storage_error::StorageError;
use crate::timeline::Timeline;
use crate::timelines::{TimelineKey, Timelines};
use crate::verifier::Verifier;

/// Most generations of branches of branches that are followed.
const MAX_DEPTH: usize = 1000;

/// WAL that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is nowhere that we know of.
    #[error("{0}")]
    Missing(String),
    /// It was here, and the archive did not give it.
    #[error("{0}")]
    Archive(String),
    /// It should be here, but can't be read.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// A timeline, once it is there.
pub type Found = Pin<Box<dyn Future<Output = Result<Arc<Timeline>, RefusedReason>> + Send>>;

/// Where the timelines are that others branched from.
pub trait Ancestors: std::fmt::Debug + Send + Sync {
    /// One of them; it may have to be opened first.
    fn find(self: Arc<Self>, key: TimelineKey) -> Found;
}

impl Ancestors for Timelines {
    fn find(self: Arc<Self>, key: TimelineKey) -> Found {
        Box::pin(async move { self.get_async(key).await })
    }
}

/// Where a position's bytes are.
#[derive(Debug)]
struct Place {
    timeline: Arc<Timeline>,
    reader: SegmentReader,
    /// It is the right place from here...
    from: Lsn,
    /// ... to here.
    to: Lsn,
}

/// Reads one timeline's WAL, wherever it is.
#[derive(Debug)]
pub struct ChainReader {
    ancestors: Arc<dyn Ancestors>,
    leaf: Arc<Timeline>,
    archive: Option<ArchiveReader>,
    place: Option<Place>,
}

impl ChainReader {
    /// A reader for `leaf`, that also looks into `archive` for what is no longer on disk.
    pub fn new(
        ancestors: Arc<dyn Ancestors>,
        leaf: Arc<Timeline>,
        archive: Option<Arc<Archive>>,
    ) -> ChainReader {
        ChainReader { ancestors, leaf, archive: archive.map(ArchiveReader::new), place: None }
    }

    /// Fills `buffer` from `at` on, as far as one place and one segment go; at least one byte.
    /// The caller sees to it that everything up to the buffer's end is committed.
    pub async fn read(&mut self, at: Lsn, buffer: &mut [u8]) -> Result<usize, ReadError> {
        let stale = |place: &Place| {
            at < place.from
                || at >= place.to
                || at < place.timeline.marks().available_lsn
                || place.timeline.is_retired()
        };
        if self.place.as_ref().is_none_or(stale) {
            self.place = Some(self.resolve(at).await?);
        }
        let Some(place) = &mut self.place else {
            return Err(ReadError::Missing(format!("WAL at {at} is nowhere")));
        };
        let count = buffer.len().min((place.to.0 - at.0).min(1 << 30) as usize);
        let buffer = &mut buffer[..count];
        if at >= place.timeline.marks().available_lsn {
            let read = place.reader.read(at, buffer);
            if let Err(error) = &read {
                place.timeline.suspect(at, error.to_string());
            }
            let count = read?;
            if count == 0 && at >= place.timeline.marks().available_lsn {
                place.timeline.suspect(at, "its segment is missing or short".to_owned());
            }
            // Trimmed since we looked: the archive has it.
            if count > 0 && at >= place.timeline.marks().available_lsn {
                return Ok(count);
            }
        }
        let parameters = place.timeline.parameters();
        match &mut self.archive {
            Some(archive) => archive.read(parameters, at, buffer).await.map_err(ReadError::Archive),
            None => Err(ReadError::Missing(format!(
                "the WAL segment of {at} is no longer on this safekeeper, and no object store is \
                 configured"
            ))),
        }
    }

    /// A check of what is read from `from` on, up to where another timeline's WAL begins, or that of an ancestor is not
    /// known to be committed yet: a record ends there.
    pub async fn verifier(&self, from: Lsn) -> Result<(Verifier, Lsn), ReadError> {
        let place = self.resolve(from).await?;
        let available_lsn = place.timeline.marks().available_lsn;
        // Of what is here no more than that: the archive may be far away.
        let floor = match from >= available_lsn {
            true => place.from.max(available_lsn),
            false => place.from,
        };
        let parameters = self.leaf.parameters();
        Ok((Verifier::new(parameters, floor, floor == place.from, from), place.to))
    }

    /// What was read last turned out to be wrong, after `at`: if it was read here, that is looked into.
    pub fn suspect(&self, at: Lsn, why: &str) {
        if let Some(place) = &self.place {
            place.timeline.suspect(at, why.to_owned());
        }
    }

    /// The first byte of the timeline that wrote the byte at `at`.
    pub async fn start_of(&self, at: Lsn) -> Result<Lsn, ReadError> {
        self.resolve(at).await.map(|place| place.from)
    }

    async fn resolve(&self, at: Lsn) -> Result<Place, ReadError> {
        let mut timeline = Arc::clone(&self.leaf);
        let mut to = Lsn::MAX;
        for _ in 0..MAX_DEPTH {
            let parameters = timeline.parameters();
            let from = parameters.start_lsn;
            if at >= from {
                if to != Lsn::MAX && at >= timeline.commit_lsn() {
                    return Err(ReadError::Missing(format!(
                        "WAL at {at} of the ancestor timeline {} has not reached this safekeeper yet",
                        parameters.timeline
                    )));
                }
                if to != Lsn::MAX {
                    to = to.min(timeline.commit_lsn());
                }
                let reader = timeline.reader();
                return Ok(Place { reader, from, to, timeline });
            }
            let Some(ancestor) = parameters.ancestor else {
                return Err(ReadError::Missing(format!(
                    "WAL at {at} is before the timeline's beginning at {from}"
                )));
            };
            let key = (parameters.tenant, ancestor);
            to = from;
            let found = Arc::clone(&self.ancestors).find(key).await;
            timeline = found.map_err(|reason| match reason {
                RefusedReason::UnknownTimeline => ReadError::Missing(format!(
                    "WAL at {at} belongs to the ancestor timeline {ancestor}, which this \
                     safekeeper doesn't have"
                )),
                other => ReadError::Missing(other.to_string()),
            })?;
        }
        Err(ReadError::Missing(format!("more than {MAX_DEPTH} ancestors before {at}")))
    }
}
