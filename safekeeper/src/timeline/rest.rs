//! What others want to know of a timeline, and whether it is at rest.

use std::sync::Arc;
use std::time::SystemTime;

use pgstrata_format::resting::TimelineSummary;
use pgstrata_format::safekeeper::TimelineControl;
use pgstrata_ids::{Lsn, TenantId, TimelineId};

use super::Timeline;
use crate::checked_segment::Trouble;

/// A timeline as it is at one moment, open or at rest.
#[derive(Clone, Debug)]
pub struct Overview {
    /// How far it is.
    pub summary: Arc<TimelineSummary>,
    /// Whether it is open: at rest it has no file, and nothing goes on with it.
    pub is_open: bool,
    /// Whether a compute that was elected is connected.
    pub has_proposer: bool,
    /// Whether a compute is connected.
    pub has_compute: bool,
    /// How far it is to be caught up from others, as last known.
    pub catch_up_target: Lsn,
    /// Why the last attempt to archive failed, if it did.
    pub archiving_error: Option<Trouble>,
    /// When one failed last.
    pub archiving_failed_at: Option<SystemTime>,
}

impl Overview {
    /// Of one that is not open.
    pub fn of_resting(summary: Arc<TimelineSummary>) -> Overview {
        Overview {
            summary,
            is_open: false,
            has_proposer: false,
            has_compute: false,
            catch_up_target: Lsn::INVALID,
            archiving_error: None,
            archiving_failed_at: None,
        }
    }

    /// The timeline's full name.
    pub fn key(&self) -> (TenantId, TimelineId) {
        (self.summary.parameters.tenant, self.summary.parameters.timeline)
    }

    /// Bytes that it is still to get from others, as far as it was told what there is.
    pub fn catch_up_bytes(&self) -> u64 {
        self.catch_up_target.saturating_sub(self.summary.flush_lsn)
    }

    /// Bytes of its segments on disk.
    pub fn size_bytes(&self) -> u64 {
        self.summary.segments * u64::from(self.summary.parameters.segment_size)
    }
}

/// Whether segments can be removed, with what is known: then something is to be done. The segment of the last record stays,
/// as the next one links back to it.
pub fn can_be_trimmed(summary: &TimelineSummary, remote_consistent_lsn: Lsn) -> bool {
    if is_away(summary) {
        return false;
    }
    let lsn = summary.archived_lsn.min(remote_consistent_lsn).min(summary.commit_lsn);
    let size = u64::from(summary.parameters.segment_size);
    lsn.min(summary.last_record_lsn).segment_start(size) > summary.available_lsn
}

/// Whether there is WAL of it, and none of that on this disk: all is in object storage.
pub fn is_away(summary: &TimelineSummary) -> bool {
    summary.segments == 0 && has_wal(summary)
}

/// Whether anything of it is known to be committed here.
pub fn has_wal(summary: &TimelineSummary) -> bool {
    summary.commit_lsn > summary.parameters.start_lsn
}

/// Whether all of its WAL is in object storage.
pub fn is_archived(summary: &TimelineSummary) -> bool {
    summary.flush_lsn == summary.commit_lsn
        && (summary.archived_lsn == summary.commit_lsn || !has_wal(summary))
}

/// Whether nothing is to be done with a timeline of which all is durable: what is there is committed, and nothing of it is to
/// be archived, or removed, or handed to other members.
fn is_settled(summary: &TimelineSummary) -> bool {
    let configuration = &summary.configuration;
    is_archived(summary)
        && configuration.is_known()
        && configuration.incoming().is_empty()
        && !can_be_trimmed(summary, summary.remote_consistent_lsn)
}

impl Timeline {
    /// How it is now. Waits for no write.
    pub fn overview(&self) -> Overview {
        let commit_lsn = self.commit_lsn();
        Overview {
            summary: Arc::new(self.summary(commit_lsn)),
            is_open: true,
            has_proposer: self.has_proposer(),
            has_compute: self.has_compute(),
            catch_up_target: self.catch_up_target(),
            archiving_error: self.archiving_error(),
            archiving_failed_at: self.archiving_failed_at(),
        }
    }

    fn summary(&self, last_record_lsn: Lsn) -> TimelineSummary {
        let marks = self.marks();
        TimelineSummary {
            parameters: self.parameters().clone(),
            term: self.term(),
            // Read first: the log is never shorter than what is committed.
            commit_lsn: self.commit_lsn(),
            flush_lsn: self.flush_lsn(),
            available_lsn: marks.available_lsn,
            archived_lsn: marks.archived_lsn,
            remote_consistent_lsn: marks.remote_consistent_lsn,
            last_record_lsn,
            segments: self.files.size_bytes() / self.files.segment_size(),
            configuration: self.configuration(),
        }
    }

    /// What is known of the timeline if it is at rest: nobody is connected that could write, all that it says is durable, and
    /// nothing is to be done with it. To let go of it then is what the end of the process would be; bytes of a record that
    /// never was whole go with it, of which nobody was told. For whoever has the timeline for himself.
    ///
    /// One that others keep by now is at rest too, although its log may have an end that nobody else has.
    pub fn at_rest(&self) -> Option<TimelineSummary> {
        let is_doubtful = self.is_retired() || self.suspected.lock().is_some();
        if self.has_compute() || self.archiving_error().is_some() || is_doubtful {
            return None;
        }
        if self.lacks_beginning() {
            return None;
        }
        let marks = self.marks();
        let last_record_lsn = {
            let core = self.core.lock();
            let acceptor = &core.acceptor;
            let flush_lsn = acceptor.flush_lsn();
            let durable = TimelineControl {
                state: acceptor.control(),
                flush_lsn,
                available_lsn: marks.available_lsn,
                archived_lsn: marks.archived_lsn,
                remote_consistent_lsn: marks.remote_consistent_lsn,
                addresses: marks.addresses,
                ..core.stored.clone()
            };
            if core.latch.reason().is_some()
                || acceptor.boundary_lsn() != flush_lsn
                || core.stored != durable
            {
                return None;
            }
            core.checker.last_record().unwrap_or(acceptor.commit_lsn())
        };
        let summary = self.summary(last_record_lsn);
        (self.is_left() || is_settled(&summary)).then_some(summary)
    }
}
