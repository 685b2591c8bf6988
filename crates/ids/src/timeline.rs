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
    /// PostgreSQL's timeline number, as in the names of WAL files: 1 unless the WAL comes from a
    /// primary that was promoted. The same on all branches.
    pub pg_timeline: u32,
    /// WAL segment size in bytes: a power of two, 1 MiB to 1 GiB.
    pub segment_size: u32,
    /// The first byte that this timeline owns: a record boundary; on a timeline without an
    /// ancestor the start of a segment.
    pub start_lsn: Lsn,
    /// The timeline that owns the bytes before `start_lsn`.
    pub ancestor: Option<TimelineId>,
}

/// The smallest segments of PostgreSQL, in bytes.
pub const SMALLEST_SEGMENT: u32 = 1 << 20;

/// The smallest that simulations have: some pages.
pub const SMALLEST_SIMULATED: u32 = 64 << 10;

/// Parameters that no timeline can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimelineParametersError {
    /// Not a version that this program reads.
    Version(u32),
    /// PostgreSQL counts timelines from 1.
    Timeline,
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
            Self::Timeline => f.write_str("PostgreSQL has no timeline 0"),
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
    /// The name of the WAL file of segment `number`.
    pub fn segment_name(&self, number: u64) -> String {
        let per_high = (1u64 << 32) / u64::from(self.segment_size);
        format!("{:08X}{:08X}{:08X}", self.pg_timeline, number / per_high, number % per_high)
    }

    /// The segment of a WAL file's name, if it is one of this timeline.
    pub fn segment_number(&self, name: &str) -> Option<u64> {
        let per_high = (1u64 << 32) / u64::from(self.segment_size);
        let part = |range| u64::from_str_radix(name.get(range)?, 16).ok();
        let number = part(8..16)?.checked_mul(per_high)?.checked_add(part(16..24)?)?;
        (self.segment_name(number) == name).then_some(number)
    }

    /// Checks each value on its own and the start against the rest.
    pub fn check(&self) -> Result<(), TimelineParametersError> {
        self.check_with(SMALLEST_SEGMENT)
    }

    /// The same, but for segments that are smaller than PostgreSQL has them: simulations reach more boundaries with less WAL then.
    /// Who begins a timeline asks for [`TimelineParameters::check`].
    pub fn check_own(&self) -> Result<(), TimelineParametersError> {
        self.check_with(SMALLEST_SIMULATED)
    }

    fn check_with(&self, smallest: u32) -> Result<(), TimelineParametersError> {
        if !(15..=18).contains(&self.pg_version) {
            return Err(TimelineParametersError::Version(self.pg_version));
        }
        if self.pg_timeline == 0 {
            return Err(TimelineParametersError::Timeline);
        }
        let size = self.segment_size;
        if !size.is_power_of_two() || !(smallest..=1 << 30).contains(&size) {
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
            pg_timeline: 1,
            segment_size: 16 << 20,
            start_lsn: Lsn(16 << 20),
            ancestor: None,
        };
        assert_eq!(good.check(), Ok(()));
        let version = TimelineParameters { pg_version: 14, ..good.clone() };
        assert_eq!(version.check(), Err(TimelineParametersError::Version(14)));
        let size = TimelineParameters { segment_size: 3 << 20, ..good.clone() };
        assert_eq!(size.check(), Err(TimelineParametersError::SegmentSize(3 << 20)));
        let small = TimelineParameters { segment_size: 64 << 10, ..good.clone() };
        assert_eq!(small.check(), Err(TimelineParametersError::SegmentSize(64 << 10)));
        assert_eq!(small.check_own(), Ok(()));
        let smaller = TimelineParameters { segment_size: 32 << 10, ..good.clone() };
        assert_eq!(smaller.check_own(), Err(TimelineParametersError::SegmentSize(32 << 10)));
        let root = TimelineParameters { start_lsn: Lsn((16 << 20) + 8), ..good.clone() };
        assert_eq!(root.check(), Err(TimelineParametersError::Start(root.start_lsn)));
        let branch = TimelineParameters { ancestor: Some(TimelineId([4; 16])), ..root };
        assert_eq!(branch.check(), Ok(()));
        let zero = TimelineParameters { pg_timeline: 0, ..branch };
        assert_eq!(zero.check(), Err(TimelineParametersError::Timeline));
        assert_eq!(zero.segment_name(0x1_02), "000000000000000100000002");
        assert_eq!(zero.segment_number("000000000000000100000002"), Some(0x1_02));
        for other in ["", "000000010000000100000002", "000000000000000100000100", "é000"] {
            assert_eq!(zero.segment_number(other), None, "{other}");
        }
    }
}
