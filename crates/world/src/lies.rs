//! Mistakes to seed, to show that the world would find them: in disks and drivers, as a patch could make them.
//!
//! None is in what ships. Mistakes with files are made by a disk that leaves something out where it is told to do it, and
//! mistakes with messages on their way. Those of the rules themselves are the explorer's (`pgstrata_quorum::Fault`).

use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use pgstrata_env::{Disk, DiskFile, Space};
use pgstrata_format::safekeeper::{decode_committed, decode_flushed, encode_flushed};
use pgstrata_sim::SimDisk;

/// One mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Acknowledged without a sync of the WAL.
    WalUnsynced,
    /// The directory is not synced when a segment was named.
    SegmentNameUnsynced,
    /// A segment has its name before it is zeroed and synced whole.
    SegmentUnsynced,
    /// The control file has its name before it is synced.
    ControlUnsynced,
    /// The directory is not synced when the control file was named.
    ControlNameUnsynced,
    /// A cut leaves the bytes.
    CutNotZeroed,
    /// A cut is not synced.
    CutUnsynced,
    /// The log's end is noted before the WAL is durable.
    NoteAhead,
    /// The note is not lowered before a cut.
    NoteNotLowered,
    /// Recovery reads from the system's cache, which may have what a failed sync left out.
    CacheBelieved,
    /// A failed sync is tried again until it succeeds.
    SyncRetried,
    /// Bytes of a term that is over are taken as those of the present one.
    StaleAppendTaken,
    /// A safekeeper votes for whoever asks in a term, also if it has voted for another one.
    VoteTwice,
    /// What a peer has is taken for committed.
    CopyBeyondCommit,
    /// What a term began with is taken from whoever has a log, whatever that is.
    AnyLogFollowed,
    /// A segment counts as archived before it is.
    TrimBeforeArchive,
    /// An acknowledgement counts for a safekeeper that did not send it.
    AckCountsTwice,
    /// A compute goes on a connection after bytes on it were lost.
    LossWithinConnection,
    /// A compute goes on with the log of a certain voter, whatever the others have.
    DonorIsFixed,
    /// Who lost its directory comes back as who it was.
    WipedComesBack,
    /// Who changes members overwrites what others decided meanwhile.
    SwapWithoutCompare,
    /// A member says that it has taken what was decided, and has not.
    DecisionNotTaken,
    /// The members after a change decide alone before both groups have committed anything together.
    JointNotUsed,
    /// What was won before members had heard of a change counts as won by both groups.
    OldTermIsJoint,
    /// A compute goes on with other members whatever was promised to others, and whatever log was won.
    AnyLogLedOn,
    /// A newcomer begins later than what is archived ends.
    BeginsBeyondArchive,
    /// What is found to be damaged goes on being used.
    RottenNotTakenOut,
    /// What is read is archived without looking at it.
    RottenArchived,
    /// A segment that replaces a damaged one has its name before it is synced.
    MendedUnsynced,
    /// Damaged WAL is replaced by that of any log.
    AnyLogMends,
    /// A tail is archived to the end of the log, committed or not.
    TailBeyondCommit,
    /// A tail is written in the place of the one before it.
    TailInPlaceOfAnother,
    /// Old tails are removed before what has more is stored.
    TailsDroppedFirst,
    /// What could not be stored counts as archived.
    FailureIsArchived,
    /// What is archived is taken for the beginning of the own log, whatever log it says it is of.
    AnyArchiveFollowed,
    /// What is at rest is removed, whether or not it is archived.
    AwayBeforeArchived,
    /// The directory is not synced when it was noted that what is at rest is removed.
    AwayNameUnsynced,
    /// A compute tells members that what it sends is committed.
    CommitAhead,
    /// What a compute reads from its files for members is not what it wrote there.
    FilesRecycled,
    /// A safekeeper acknowledges what was sent to it, whatever it has.
    AckAhead,
    /// A safekeeper answers with a vote of before, when it had less.
    VoteOfBefore,
    /// An answer comes to another compute than asked.
    AnswerToAnother,
    /// A timeline is founded again.
    FoundedAgain,
    /// The clock by which a compute has patience stands still.
    ClockStands,
    /// A safekeeper sends the page server what is not known to be committed.
    StreamBeyondCommit,
    /// The page server follows whoever was given up.
    FollowsAnybody,
    /// What the page server took in becomes durable, and nobody looks who was given up since it came.
    FlushedUnlooked,
}

impl Lie {
    /// All of them.
    pub const ALL: [Lie; 47] = [
        Lie::WalUnsynced,
        Lie::SegmentNameUnsynced,
        Lie::SegmentUnsynced,
        Lie::ControlUnsynced,
        Lie::ControlNameUnsynced,
        Lie::CutNotZeroed,
        Lie::CutUnsynced,
        Lie::NoteAhead,
        Lie::NoteNotLowered,
        Lie::CacheBelieved,
        Lie::SyncRetried,
        Lie::StaleAppendTaken,
        Lie::VoteTwice,
        Lie::CopyBeyondCommit,
        Lie::AnyLogFollowed,
        Lie::TrimBeforeArchive,
        Lie::AckCountsTwice,
        Lie::LossWithinConnection,
        Lie::DonorIsFixed,
        Lie::WipedComesBack,
        Lie::SwapWithoutCompare,
        Lie::DecisionNotTaken,
        Lie::JointNotUsed,
        Lie::OldTermIsJoint,
        Lie::AnyLogLedOn,
        Lie::BeginsBeyondArchive,
        Lie::RottenNotTakenOut,
        Lie::RottenArchived,
        Lie::MendedUnsynced,
        Lie::AnyLogMends,
        Lie::TailBeyondCommit,
        Lie::TailInPlaceOfAnother,
        Lie::TailsDroppedFirst,
        Lie::FailureIsArchived,
        Lie::AnyArchiveFollowed,
        Lie::AwayBeforeArchived,
        Lie::AwayNameUnsynced,
        Lie::CommitAhead,
        Lie::FilesRecycled,
        Lie::AckAhead,
        Lie::VoteOfBefore,
        Lie::AnswerToAnother,
        Lie::FoundedAgain,
        Lie::ClockStands,
        Lie::StreamBeyondCommit,
        Lie::FollowsAnybody,
        Lie::FlushedUnlooked,
    ];
}

/// What was done last to a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    Nothing,
    SegmentNamed,
    ControlNamed,
    AwayNamed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A segment, or what will be one.
    Wal,
    Control,
    Note,
    /// A segment that is to replace a damaged one.
    Mended,
    /// That WAL is away.
    Away,
    Other,
}

/// A disk that makes one of the mistakes.
#[derive(Debug)]
pub struct LyingDisk {
    disk: SimDisk,
    lie: Lie,
    last: Mutex<Last>,
}

#[derive(Debug)]
struct LyingFile {
    file: Arc<dyn DiskFile>,
    kind: Kind,
    lie: Lie,
    /// Zeros were written, and nothing else since.
    is_cut: Mutex<bool>,
}

fn kind(path: &Path) -> Kind {
    match path.file_name().and_then(|name| name.to_str()) {
        Some("zeroed.tmp") => Kind::Wal,
        Some("control.tmp") => Kind::Control,
        Some("mending.tmp") => Kind::Mended,
        Some("away.tmp") => Kind::Away,
        Some("flushed") => Kind::Note,
        Some(name) if name.len() == 24 => Kind::Wal,
        _ => Kind::Other,
    }
}

impl LyingDisk {
    pub fn new(disk: SimDisk, lie: Lie) -> LyingDisk {
        LyingDisk { disk, lie, last: Mutex::new(Last::Nothing) }
    }

    fn wrap(&self, path: &Path, file: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        let is_cut = Mutex::new(false);
        Arc::new(LyingFile { file, kind: kind(path), lie: self.lie, is_cut })
    }
}

impl LyingFile {
    fn is_of(&self, kind: Kind, lie: Lie) -> bool {
        self.kind == kind && self.lie == lie
    }
}

impl DiskFile for LyingFile {
    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        let is_zero = bytes.iter().all(|&byte| byte == 0);
        *self.is_cut.lock() = is_zero;
        // Of a file that is made, or of a log that is cut.
        if self.is_of(Kind::Wal, Lie::CutNotZeroed)
            && is_zero
            && position + bytes.len() as u64 <= self.file.size()?
        {
            return Ok(());
        }
        if self.kind == Kind::Note && bytes.len() < 512 {
            let lsn = decode_flushed(bytes).unwrap_or_default();
            let mut before = [0; 512];
            let count = self.file.read_at(&mut before, 0)?;
            let before = decode_flushed(&before[..count.min(bytes.len())]).unwrap_or_default();
            match self.lie {
                Lie::NoteAhead => {
                    let committed = decode_committed(bytes).unwrap_or_default();
                    return self.file.write_at(&encode_flushed(lsn + 64, committed), position);
                }
                Lie::NoteNotLowered if lsn < before => return Ok(()),
                _ => {}
            }
        }
        self.file.write_at(bytes, position)
    }

    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.file.read_at(buffer, position)
    }

    fn sync_data(&self) -> io::Result<()> {
        let is_cut = *self.is_cut.lock();
        let left_out = match self.lie {
            Lie::WalUnsynced => self.kind == Kind::Wal && !is_cut,
            Lie::CutUnsynced => self.kind == Kind::Wal && is_cut,
            _ => false,
        };
        if left_out {
            return Ok(());
        }
        match self.file.sync_data() {
            Err(_) if self.is_of(Kind::Wal, Lie::SyncRetried) => self.file.sync_data(),
            other => other,
        }
    }

    fn sync_all(&self) -> io::Result<()> {
        let left_out = self.is_of(Kind::Wal, Lie::SegmentUnsynced) && *self.is_cut.lock();
        let left_out = left_out
            || self.is_of(Kind::Control, Lie::ControlUnsynced)
            || self.is_of(Kind::Mended, Lie::MendedUnsynced);
        match left_out {
            true => Ok(()),
            false => self.file.sync_all(),
        }
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn reserve(&self, size: u64) -> io::Result<()> {
        self.file.reserve(size)
    }

    fn evict(&self) -> io::Result<()> {
        if self.lie == Lie::CacheBelieved { Ok(()) } else { self.file.evict() }
    }
}

impl Disk for LyingDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(self.wrap(path, self.disk.create(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(self.wrap(path, self.disk.open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        *self.last.lock() = match kind(from) {
            Kind::Control => Last::ControlNamed,
            Kind::Away => Last::AwayNamed,
            Kind::Wal => Last::SegmentNamed,
            _ => Last::Nothing,
        };
        self.disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }

    fn remove_all(&self, path: &Path) -> io::Result<()> {
        self.disk.remove_all(path)
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        self.disk.create_directory(path)
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        self.disk.space(path)
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        let last = std::mem::replace(&mut *self.last.lock(), Last::Nothing);
        let left_out = match self.lie {
            Lie::SegmentNameUnsynced => last == Last::SegmentNamed,
            Lie::ControlNameUnsynced => last == Last::ControlNamed,
            Lie::AwayNameUnsynced => last == Last::AwayNamed,
            _ => false,
        };
        if left_out { Ok(()) } else { self.disk.sync_directory(path) }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.disk.list(path)
    }
}
