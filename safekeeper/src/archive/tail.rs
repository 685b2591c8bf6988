//! The end of a log that nobody writes to: the beginning of its last segment.

use std::sync::Arc;

use pgstrata_blob::PutOutcome;
use pgstrata_format::archived::Extent;
use pgstrata_format::quorum::{AllGivenUp, GivenUp};
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
pub(super) struct Named {
    pub end: Lsn,
    pub name: String,
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

    /// Stores a tail in the place of one of the same end that is of members who were given up. False if there is none such.
    pub async fn replace_tail_given_up(
        &self,
        parameters: &TimelineParameters,
        tail: &Tail,
        given_up: &AllGivenUp,
    ) -> Result<bool, String> {
        let end = tail.extent.boundary;
        let Some(found) = self.get_tail(parameters, end).await? else { return Ok(false) };
        let is_theirs = given_up.denies(found.extent.configuration, end).is_some();
        if given_up.includes(tail.extent.configuration) || !is_theirs {
            return Ok(false);
        }
        let name = object_name(parameters, end);
        let object = self.object_of(&name, Arc::clone(&tail.bytes), &tail.extent).await?;
        self.store.check_claim().await.map_err(|error| error.to_string())?;
        self.store.put(&name, object).await.map_err(|error| error.to_string())?;
        Ok(true)
    }

    /// Whether a tail says that it is of an earlier configuration than that.
    pub async fn is_tail_of_before(
        &self,
        parameters: &TimelineParameters,
        end: Lsn,
        configuration: u64,
    ) -> Result<bool, String> {
        let extent = self.extent_of(&object_name(parameters, end)).await?.flatten();
        Ok(extent.is_some_and(|extent| extent.configuration < configuration))
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
    pub(super) async fn get_tail(
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
    pub(super) async fn tails(
        &self,
        parameters: &TimelineParameters,
    ) -> Result<Vec<Named>, ArchiveError> {
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

    /// Removes tails that end before `archived`, up to which this node has seen everything archived, but for those of who knows
    /// of a later configuration: this node may have been given up, and those may be all that others have.
    pub async fn drop_tails(
        &self,
        parameters: &TimelineParameters,
        archived: Lsn,
        configuration: u64,
    ) -> Result<(), String> {
        for tail in self.tails(parameters).await? {
            if tail.end >= archived {
                continue;
            }
            let extent = self.extent_of(&tail.name).await?.flatten();
            if extent.is_some_and(|extent| extent.configuration <= configuration) {
                self.store.check_claim().await.map_err(|error| error.to_string())?;
                self.store.delete(&tail.name).await.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    /// What the archived log is that goes furthest, but for what is of members who were given up; `None` if nothing is archived,
    /// or if what is archived there does not say.
    pub async fn newest(
        &self,
        parameters: &TimelineParameters,
        given_up: &AllGivenUp,
    ) -> Result<Option<Extent>, ArchiveError> {
        let size = u64::from(parameters.segment_size);
        let listed = self.store.list(&format!("{}/", directory(parameters))).await;
        let listed = listed.map_err(ArchiveError::away)?;
        let segment = |path: &str| {
            let number = number_of(parameters, path)?;
            Some((Lsn(number.checked_add(1)?.checked_mul(size)?), path.to_owned()))
        };
        let segments = listed.iter().filter_map(|object| segment(&object.path));
        let tails = self.tails(parameters).await?;
        let tails = tails.into_iter().map(|tail| (tail.end, tail.name));
        let mut all: Vec<(Lsn, String)> = segments.chain(tails).collect();
        // The last one first; those that are skipped are few.
        all.sort_unstable_by(|one, two| two.cmp(one));
        // What goes furthest of what they share, who were given up, and those who went on.
        let mut shared: Option<Extent> = None;
        for (end, name) in all {
            if shared.as_ref().is_some_and(|shared| shared.boundary >= end) {
                // Nothing that is left goes further, whatever it says of itself.
                break;
            }
            let extent = match self.extent_of(&name).await? {
                Some(Some(extent)) => extent,
                Some(None) => return Err(ArchiveError::Older(end)),
                // There is more by now, or it was taken away: either way this is no answer.
                None => {
                    let text = format!("{name} was listed, and is gone");
                    return Err(ArchiveError::Away(text));
                }
            };
            match given_up.denies(extent.configuration, end) {
                // What both logs have is right in theirs too.
                Some(given_up) if extent.boundary >= given_up.lsn => {
                    let goes_further = |one: &Extent| given_up.lsn > one.boundary;
                    if shared.as_ref().is_none_or(goes_further) {
                        shared = Some(clipped(extent, given_up));
                    }
                }
                Some(_) => {}
                None => {
                    let goes_further = |shared: &Extent| extent.boundary < shared.boundary;
                    return Ok(Some(shared.filter(goes_further).unwrap_or(extent)));
                }
            }
        }
        Ok(shared)
    }
}

/// What is of the log that goes on.
fn clipped(extent: Extent, given_up: &GivenUp) -> Extent {
    Extent {
        boundary: given_up.lsn,
        last_record: given_up.last_record,
        history: extent.history.up_to(given_up.lsn),
        ..extent
    }
}

/// The number of the segment that an object is.
fn number_of(parameters: &TimelineParameters, path: &str) -> Option<u64> {
    let name = path.strip_prefix(&directory(parameters))?.strip_prefix('/')?;
    parameters.segment_number(name.strip_suffix(".zst")?)
}
