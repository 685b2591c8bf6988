//! The timeline that the one of a world branched from: its WAL is what the first segment begins with.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgstrata_env::Disk;
use pgstrata_format::quorum::Quorum;
use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, Term, TimelineParameters};
use pgstrata_quorum::{Chain, PeerRange, TermHistory, TermStart};
use pgstrata_safekeeper::chain_reader::{Ancestors, Found};
use pgstrata_safekeeper::disk_space::{DiskArguments, DiskSpace};
use pgstrata_safekeeper::latch::Latch;
use pgstrata_safekeeper::meters::Meters;
use pgstrata_safekeeper::segment::Preparer;
use pgstrata_safekeeper::timeline::{OpenContext, Timeline};
use pgstrata_safekeeper::timelines::TimelineKey;
use pgstrata_sim::SimDisk;
use pgstrata_sim::wal::WalGenerator;
use pgstrata_wire::safekeeper::RefusedReason;

/// Of the header of a record, and of that of its data, in bytes.
const RECORD_HEADER: u64 = 24 + 5;

/// Of a page's header, and of that of a segment's first one, in bytes.
const PAGE_HEADERS: (u64, u64) = (24, 40);

const PAGE: u64 = 8192;

/// What a safekeeper has of it, if it has it.
#[derive(Clone, Debug)]
pub struct Before(pub Option<Arc<Timeline>>);

impl Ancestors for Before {
    fn find(self: Arc<Self>, _: TimelineKey) -> Found {
        Box::pin(std::future::ready(self.0.clone().ok_or(RefusedReason::UnknownTimeline)))
    }
}

/// The ancestor of the timeline that these are of, from the segment on in which that starts, on a disk that is always well.
/// And its bytes.
pub fn ancestor(parameters: &TimelineParameters) -> (Arc<Timeline>, Vec<u8>) {
    let size = u64::from(parameters.segment_size);
    let (start, end) = (parameters.start_lsn.segment_start(size), parameters.start_lsn);
    let own = TimelineParameters {
        timeline: parameters.ancestor.unwrap_or(parameters.timeline),
        start_lsn: start,
        ancestor: None,
        ..parameters.clone()
    };
    let bytes = wal(&own, end);
    let member = Member { node: NodeId(1), incarnation: Incarnation([0x33; 16]) };
    let chain = Chain::found(vec![member]).unwrap_or_else(|error| unreachable!("{error}"));
    let made = make(member, &Quorum::founded(own, chain));
    let timeline = made.unwrap_or_else(|error| unreachable!("{error}"));
    let history = TermHistory::new(vec![TermStart { term: Term(1), lsn: start }]);
    let history = history.unwrap_or_else(|error| unreachable!("{error}"));
    let range = PeerRange { history, commit_lsn: end, start, length: end - start };
    let taken = timeline.peer_range(&range, &bytes);
    assert!(matches!(taken, Ok(None)) && timeline.commit_lsn() == end, "{taken:?}");
    (Arc::new(timeline), bytes)
}

fn make(
    own: Member,
    founded: &Quorum,
) -> Result<Timeline, pgstrata_safekeeper::storage_error::StorageError> {
    let disk = SimDisk::new(0);
    let directory = PathBuf::from("/safekeeper/tenant/timeline");
    let made = disk.create_directory(Path::new("/safekeeper"));
    made.unwrap_or_else(|error| unreachable!("{error}"));
    let latch = Latch::default();
    let (preparer, _) = Preparer::queue(latch.clone());
    let disk: Arc<dyn Disk> = Arc::new(disk);
    let context = OpenContext {
        own,
        preparer,
        latch,
        space: DiskSpace::new(Arc::clone(&disk), &directory, DiskArguments::default()),
        disk,
        // Its names are names that metrics may have.
        meters: Meters::new().unwrap_or_else(|error| unreachable!("{error}")),
    };
    Timeline::create(&context, &directory, founded, &[])
}

/// A few records of a timeline, the last of which ends there.
fn wal(parameters: &TimelineParameters, end: Lsn) -> Vec<u8> {
    let mut generator = WalGenerator::new(parameters.clone(), parameters.start_lsn, Lsn(8));
    let mut bytes = Vec::new();
    while end - generator.at > 2 * PAGE {
        bytes.extend(generator.record(3000));
    }
    let (at, size) = (generator.at, u64::from(parameters.segment_size));
    let pages = (at.0.next_multiple_of(PAGE)..end.0).step_by(PAGE as usize);
    let headers = pages.map(|page| match page.is_multiple_of(size) {
        true => PAGE_HEADERS.1,
        false => PAGE_HEADERS.0,
    });
    let data = (end - at) - RECORD_HEADER - headers.sum::<u64>();
    bytes.extend(generator.record(data as usize));
    assert_eq!(generator.at, end, "a record of {data} bytes at {at}");
    bytes
}
