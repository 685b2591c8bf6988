//! What a timeline is, fixed when it is created.

use std::fmt;

use crate::{Lsn, SystemId, TenantId, TimelineId};

/// A timeline's parameters. They never change; two sides that disagree must not talk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TimelineParameters {
    /// Whose timeline.
    pub tenant: TenantId,
    /// Which timeline.
    pub timeline: TimelineId,
    /// PostgreSQL's database system identifier.
    pub system_id: SystemId,
    /// PostgreSQL's major version: 15 to 18.
    pub pg_version: u32,
    /// WAL segment size in bytes: a power of two, 1 MiB to 1 GiB.
    pub segment_size: u32,
    /// The first byte that this timeline owns: a record boundary; on a timeline without an
    /// ancestor the start of a segment.
    pub start_lsn: Lsn,
    /// The timeline that owns the bytes before `start_lsn`.
    pub ancestor: Option<TimelineId>,
}

/// Parameters that no timeline can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimelineParametersError {
    /// Not a version that this program reads.
    Version(u32),
    /// Not a power of two from 1 MiB to 1 GiB.
    SegmentSize(u32),
    /// Not a place where a timeline can start.
    Start(Lsn),
}

impl fmt::Display for TimelineParametersError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(version) => {
                write!(f, "PostgreSQL version {version} is not supported (15 to 18 are)")
            }
            Self::SegmentSize(size) => {
                write!(f, "WAL segment size {size} is not a power of two between 1 MiB and 1 GiB")
            }
            Self::Start(lsn) => write!(
                f,
                "a timeline can't start at {lsn}: a root needs a segment start, a branch a \
                 record boundary"
            ),
        }
    }
}

impl std::error::Error for TimelineParametersError {}

impl TimelineParameters {
    /// Checks each value on its own and the start against the rest.
    pub fn check(&self) -> Result<(), TimelineParametersError> {
        if !(15..=18).contains(&self.pg_version) {
            return Err(TimelineParametersError::Version(self.pg_version));
        }
        let size = self.segment_size;
        if !size.is_power_of_two() || !(1 << 20..=1 << 30).contains(&size) {
            return Err(TimelineParametersError::SegmentSize(size));
        }
        let alignment = if self.ancestor.is_some() { 8 } else { u64::from(size) };
        if !self.start_lsn.is_valid() || !self.start_lsn.0.is_multiple_of(alignment) {
            return Err(TimelineParametersError::Start(self.start_lsn));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_parameters_are_named() {
        let good = TimelineParameters {
            tenant: TenantId([1; 16]),
            timeline: TimelineId([2; 16]),
            system_id: SystemId(3),
            pg_version: 15,
            segment_size: 16 << 20,
            start_lsn: Lsn(16 << 20),
            ancestor: None,
        };
        assert_eq!(good.check(), Ok(()));
        let version = TimelineParameters { pg_version: 14, ..good.clone() };
        assert_eq!(version.check(), Err(TimelineParametersError::Version(14)));
        let size = TimelineParameters { segment_size: 3 << 20, ..good.clone() };
        assert_eq!(size.check(), Err(TimelineParametersError::SegmentSize(3 << 20)));
        let root = TimelineParameters { start_lsn: Lsn((16 << 20) + 8), ..good.clone() };
        assert_eq!(root.check(), Err(TimelineParametersError::Start(root.start_lsn)));
        let branch = TimelineParameters { ancestor: Some(TimelineId([4; 16])), ..root };
        assert_eq!(branch.check(), Ok(()));
    }
}
