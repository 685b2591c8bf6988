//! The end of a log that nobody writes to: the beginning of its last segment.

use std::sync::Arc;

use pgstrata_blob::PutOutcome;
use pgstrata_format::archived::Extent;
use pgstrata_ids::{Lsn, TimelineParameters};

use super::{Archive, ArchiveError, differs, directory};

/// Committed WAL from the begin of a segment, or of the timeline in it, up to the end of a record.
#[derive(Clone, Debug)]
pub struct Tail {
    /// What it is.
    pub extent: Extent,
    /// Its bytes.
    pub bytes: Arc<Vec<u8>>,
}

/// A tail's object, by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    end: Lsn,
    name: String,
}

impl Tail {
    /// Its first byte, where it ends at `end`.
    pub fn start(parameters: &TimelineParameters, end: Lsn) -> Lsn {
        end.segment_start(u64::from(parameters.segment_size)).max(parameters.start_lsn)
    }
}

fn object_name(parameters: &TimelineParameters, end: Lsn) -> String {
    let number = end.segment_number(u64::from(parameters.segment_size));
    format!("{}/tail/{}.{:016X}.zst", directory(parameters), parameters.segment_name(number), end.0)
}

impl Archive {
    /// Stores a tail, as [`Archive::put`] does segments.
    pub async fn put_tail(
        &self,
        parameters: &TimelineParameters,
        tail: &Tail,
    ) -> Result<(), String> {
        let name = object_name(parameters, tail.extent.boundary);
        match self.put_object(&name, Arc::clone(&tail.bytes), &tail.extent).await? {
            PutOutcome::Created => Ok(()),
            PutOutcome::Exists => match self.holds_tail(parameters, tail).await? {
                true => Ok(()),
                false => Err(format!("{name} was there, and is gone again")),
            },
        }
    }

    /// Whether a tail is archived, by reading it. An object that differs is an error.
    pub async fn holds_tail(
        &self,
        parameters: &TimelineParameters,
        tail: &Tail,
    ) -> Result<bool, String> {
        match self.get_tail(parameters, tail.extent.boundary).await? {
            None => Ok(false),
            Some(found) if found.bytes == tail.bytes => Ok(true),
            Some(_) => Err(differs(&object_name(parameters, tail.extent.boundary))),
        }
    }

    /// Fetches the tail that ends there; `None` if it was never stored, or is removed by now.
    async fn get_tail(
        &self,
        parameters: &TimelineParameters,
        end: Lsn,
    ) -> Result<Option<Tail>, ArchiveError> {
        let name = object_name(parameters, end);
        let start = Tail::start(parameters, end);
        let size = (end - start) as usize;
        let Some((extent, wal)) = self.get_object(&name, size).await? else { return Ok(None) };
        let damaged = |why: &str| Err(ArchiveError::Damaged(format!("{name} is damaged: {why}")));
        let Some(extent) = extent else { return damaged("it does not say what it is") };
        if extent.from != start || extent.boundary != end || wal.len() != size {
            return damaged("it is not of the WAL that its name says");
        }
        Ok(Some(Tail { extent, bytes: Arc::new(wal) }))
    }

    /// The tails that there are, the longest log first: one, or two for a moment.
    async fn tails(&self, parameters: &TimelineParameters) -> Result<Vec<Named>, ArchiveError> {
        let listed = self.store.list(&format!("{}/tail/", directory(parameters))).await;
        let listed = listed.map_err(ArchiveError::away)?;
        let named = listed.into_iter().filter_map(|object| {
            let (_, end) = object.path.strip_suffix(".zst")?.rsplit_once('.')?;
            let end = Lsn(u64::from_str_radix(end, 16).ok()?);
            let is_one = object_name(parameters, end) == object.path;
            is_one.then_some(Named { end, name: object.path })
        });
        let mut tails: Vec<Named> = named.collect();
        tails.sort_unstable_by_key(|tail| std::cmp::Reverse(tail.end));
        Ok(tails)
    }

    /// The longest tail of a segment; `None` if there is none.
    pub async fn tail_of(
        &self,
        parameters: &TimelineParameters,
        number: u64,
    ) -> Result<Option<Tail>, ArchiveError> {
        let size = u64::from(parameters.segment_size);
        for named in self.tails(parameters).await? {
            if named.end.segment_number(size) == number
                && let Some(tail) = self.get_tail(parameters, named.end).await?
            {
                return Ok(Some(tail));
            }
        }
        Ok(None)
    }

    /// Removes tails that end before `archived`, up to which this node has seen everything archived.
    pub async fn drop_tails(
        &self,
        parameters: &TimelineParameters,
        archived: Lsn,
    ) -> Result<(), String> {
        for tail in self.tails(parameters).await? {
            if tail.end < archived {
                self.store.check_claim().await.map_err(|error| error.to_string())?;
                self.store.delete(&tail.name).await.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    /// What the archived log is that goes furthest; `None` if nothing is archived, or if what is archived there does not say.
    pub async fn newest(
        &self,
        parameters: &TimelineParameters,
    ) -> Result<Option<Extent>, ArchiveError> {
        let size = u64::from(parameters.segment_size);
        let tail = self.tails(parameters).await?.into_iter().next();
        let listed = self.store.list(&format!("{}/", directory(parameters))).await;
        let listed = listed.map_err(ArchiveError::away)?;
        // Names of segments are in the order of their numbers, of one timeline of PostgreSQL.
        let segments = listed.into_iter().map(|object| object.path);
        let first = parameters.start_lsn.segment_number(size);
        let last = segments.filter_map(|path| number_of(parameters, &path)).max();
        let last = last.filter(|&number| number >= first);
        if let Some(tail) =
            tail.filter(|tail| last.is_none_or(|last| tail.end.segment_number(size) > last))
            && let Some(tail) = self.get_tail(parameters, tail.end).await?
        {
            return Ok(Some(tail.extent));
        }
        let Some(last) = last else { return Ok(None) };
        let name = super::object_name(parameters, last);
        Ok(self.get_object(&name, size as usize).await?.and_then(|(extent, _)| extent))
    }
}

/// The number of the segment that an object is.
fn number_of(parameters: &TimelineParameters, path: &str) -> Option<u64> {
    let name = path.strip_prefix(&directory(parameters))?.strip_prefix('/')?;
    parameters.segment_number(name.strip_suffix(".zst")?)
}
