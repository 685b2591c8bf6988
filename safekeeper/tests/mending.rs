//! Mending one log, step by step, on disks that lose power, or sectors.
#![allow(clippy::unwrap_used)] // A failed helper fails the test.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::wal::{SEGMENT_SIZE, WalGenerator, parameters};
use pgstrata_env::Disk;
use pgstrata_format::quorum::Quorum;
use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, Term};
use pgstrata_quorum::{
    Append, Chain, Configuration, Elected, ProposerId, TermHistory, TermStart, VoteRequest,
};
use pgstrata_safekeeper::disk_space::{DiskArguments, DiskSpace};
use pgstrata_safekeeper::latch::Latch;
use pgstrata_safekeeper::mend::{DamagedLog, Lack, Mended, Said, Source, Sources};
use pgstrata_safekeeper::meters::Meters;
use pgstrata_safekeeper::segment::{Preparations, Preparer, Zeros};
use pgstrata_safekeeper::timeline::{OpenContext, Timeline, read_control};
use pgstrata_sim::{FaultyDisk, SimDisk};
use pgstrata_wire::safekeeper::Message;

const START: Lsn = Lsn(SEGMENT_SIZE);

fn member(number: u8) -> Member {
    Member { node: NodeId(number.into()), incarnation: Incarnation([number; 16]) }
}

fn chain() -> Chain {
    Chain::found((1..=3).map(member).collect()).unwrap()
}

fn history(entries: &[(u64, Lsn)]) -> TermHistory {
    let entry = |&(term, lsn): &(u64, Lsn)| TermStart { term: Term(term), lsn };
    TermHistory::new(entries.iter().map(entry).collect()).unwrap()
}

/// One member's timeline, and what was ever written to it.
struct Copy {
    disk: Arc<dyn Disk>,
    directory: PathBuf,
    latch: Latch,
    preparations: Option<Preparations>,
    generator: WalGenerator,
    bytes: Vec<u8>,
}

impl Copy {
    fn new(disk: Arc<dyn Disk>, directory: &Path) -> Copy {
        Copy {
            disk,
            directory: directory.to_owned(),
            latch: Latch::default(),
            preparations: None,
            generator: WalGenerator::new(parameters(START), START, Lsn(8)),
            bytes: Vec::new(),
        }
    }

    fn on_sim(disk: &SimDisk) -> Copy {
        disk.create_directory(Path::new("/safekeeper")).unwrap();
        disk.sync_directory(Path::new("/")).unwrap();
        Copy::new(Arc::new(disk.clone()), Path::new("/safekeeper/tenant/timeline"))
    }

    fn context(&mut self) -> OpenContext {
        self.latch = Latch::default();
        let (preparer, preparations) = Preparer::queue(self.latch.clone());
        self.preparations = Some(preparations);
        OpenContext {
            own: member(1),
            preparer,
            latch: self.latch.clone(),
            space: self.space(),
            disk: Arc::clone(&self.disk),
            meters: Meters::new().unwrap(),
        }
    }

    fn space(&self) -> DiskSpace {
        DiskSpace::new(Arc::clone(&self.disk), &self.directory, DiskArguments::default())
    }

    fn create(&mut self) -> Timeline {
        let quorum = Quorum::founded(parameters(START), chain());
        let context = self.context();
        Timeline::create(&context, &self.directory, &quorum, &[]).unwrap()
    }

    /// Follows the winner of a term, which goes on at the end.
    fn follow(&mut self, timeline: &Timeline, history: &TermHistory) {
        let term = history.last().unwrap().term;
        let proposer = ProposerId([term.0 as u8; 16]);
        let configuration = chain().newest().clone();
        timeline.vote(&VoteRequest { term, proposer, configuration }).unwrap();
        timeline.elected(&Elected { term, history: history.clone() }).unwrap();
    }

    /// Appends a record of the term, of which all before it is committed.
    fn append(&mut self, timeline: &Timeline, term: u64, size: usize) -> Lsn {
        let start = self.generator.at;
        let bytes = self.generator.record(size);
        self.bytes.extend_from_slice(&bytes);
        for (index, piece) in bytes.chunks(1 << 18).enumerate() {
            let append = Append {
                term: Term(term),
                start: start + (index << 18) as u64,
                length: piece.len() as u64,
                record_end: start,
                commit_lsn: start,
            };
            let mut batch = timeline.batch();
            assert_eq!(batch.append(&append, piece).unwrap(), None);
            assert!(matches!(batch.finish().unwrap(), Some(Message::Ack(_))));
        }
        while self.preparations.as_ref().unwrap().step() {}
        assert_eq!(timeline.flush_lsn(), self.generator.at);
        self.generator.at
    }

    fn path(&self, number: u64) -> PathBuf {
        self.directory.join(parameters(START).segment_name(number))
    }

    /// Some segments of WAL of term 1, noted as durable.
    fn written(&mut self) -> Timeline {
        let timeline = self.create();
        self.follow(&timeline, &history(&[(1, START)]));
        for _ in 0..120 {
            self.append(&timeline, 1, 30_000);
        }
        timeline.checkpoint().unwrap();
        timeline.note_flushed().unwrap();
        timeline
    }

    fn mend(&mut self, sources: &mut Sources) -> Result<Mended, Lack> {
        let context = self.context();
        let control = read_control(&context, &self.directory.join("control"))?;
        let disk = Arc::clone(&self.disk);
        DamagedLog::open(disk, &self.directory, control, self.space())?.mend(sources)
    }

    fn open(&mut self) -> Result<Timeline, String> {
        let context = self.context();
        let opened = Timeline::open(&context, &self.directory);
        opened.map(|opened| opened.timeline).map_err(|error| error.to_string())
    }

    /// It is as it was.
    fn assert_whole(&mut self, by: &str) {
        let timeline = self.open().unwrap_or_else(|error| panic!("{by}: {error}"));
        assert_eq!(timeline.flush_lsn(), START + self.bytes.len() as u64, "{by}");
        let mut reader = timeline.reader();
        let mut read = vec![0; self.bytes.len()];
        let mut done = 0;
        while done < read.len() {
            let count = reader.read(START + done as u64, &mut read[done..]).unwrap();
            assert!(count > 0, "{by}");
            done += count;
        }
        assert!(read == self.bytes, "{by}: other bytes");
    }

    /// What others say, whose log is that of this one up to `end`.
    fn others(&self, end: Lsn, commit_lsn: Lsn, history: TermHistory) -> Vec<Box<dyn Source>> {
        let bytes = self.bytes[..(end - START) as usize].to_vec();
        vec![Box::new(Other { said: said(end, commit_lsn, history), bytes })]
    }
}

fn said(flush_lsn: Lsn, commit_lsn: Lsn, history: TermHistory) -> Said {
    let term = history.last().map_or(Term(0), |last| last.term);
    let configuration: Configuration = chain().newest().clone();
    let (member, available_lsn) = (member(2), START);
    Said { member, configuration, term, available_lsn, flush_lsn, commit_lsn, history }
}

/// Another member.
struct Other {
    said: Said,
    bytes: Vec<u8>,
}

impl Source for Other {
    fn name(&self) -> String {
        "safekeeper 2".to_owned()
    }

    fn said(&mut self) -> Result<Option<Said>, String> {
        Ok(Some(self.said.clone()))
    }

    fn read(&mut self, from: Lsn, to: Lsn, term: Term) -> Result<Vec<u8>, String> {
        let end = if term == Term(0) { self.said.commit_lsn } else { self.said.flush_lsn };
        let end = to.min(end).max(from);
        Ok(self.bytes[(from - START) as usize..(end - START) as usize].to_vec())
    }
}

fn ask(own: &TermHistory, commit_lsn: Lsn, sources: Vec<Box<dyn Source>>) -> Sources {
    Sources::ask(own.clone(), START, commit_lsn, sources, Vec::new())
}

/// Whatever ends, and when: what is there then is the old log or the mended one, never a shorter one that counts.
#[test]
fn a_mend_that_is_cut_short_ends_right_when_it_is_done_again() {
    let own = history(&[(1, START)]);
    let mut stopped = 0;
    for seed in 0..90 {
        let disk = SimDisk::new(seed);
        let mut copy = Copy::on_sim(&disk);
        let timeline = copy.written();
        let (end, commit_lsn) = (timeline.flush_lsn(), timeline.commit_lsn());
        drop(timeline);
        // In a closed segment, in the one of the commit LSN, and in the acknowledged tail.
        for (number, at) in
            [(2, 5000), (3, 900_000), (end.0 / SEGMENT_SIZE, end.0 % SEGMENT_SIZE - 100)]
        {
            disk.rot(&copy.path(number), at).unwrap();
        }
        assert!(copy.open().is_err());
        disk.end_process();
        disk.stop_after(seed % 30);
        let sources = copy.others(end, commit_lsn, own.clone());
        let first = copy.mend(&mut ask(&own, commit_lsn, sources));
        stopped += u32::from(first.is_err());
        match seed % 2 {
            0 => disk.lose_power(),
            _ => disk.end_process(),
        }
        if copy.open().is_err() {
            assert!(first.is_err(), "seed {seed}: it was mended, and is not any more");
            disk.end_process();
            let sources = copy.others(end, commit_lsn, own.clone());
            copy.mend(&mut ask(&own, commit_lsn, sources)).unwrap();
        }
        disk.end_process();
        copy.assert_whole(&format!("seed {seed}"));
    }
    assert!((20..80).contains(&stopped), "{stopped} were cut short");
}

/// The same where the log is cut, as nobody depends on what is lost.
#[test]
fn a_cut_that_is_cut_short_ends_right_when_it_is_done_again() {
    let mut stopped = 0;
    for seed in 0..60 {
        let disk = SimDisk::new(seed);
        let mut copy = Copy::on_sim(&disk);
        let timeline = copy.written();
        let shared = timeline.flush_lsn();
        // Into the next segment.
        copy.append(&timeline, 1, SEGMENT_SIZE as usize);
        timeline.checkpoint().unwrap();
        timeline.note_flushed().unwrap();
        let own = timeline.history();
        drop(timeline);
        disk.rot(&copy.path(shared.segment_number(SEGMENT_SIZE)), shared.0 % SEGMENT_SIZE + 100)
            .unwrap();
        disk.end_process();
        disk.stop_after(seed % 30);
        let (theirs, end) = (history(&[(1, START), (2, shared)]), shared + 8);
        let said = said(end, end, theirs);
        let bytes = copy.bytes[..(shared - START) as usize].to_vec();
        let others = || -> Vec<Box<dyn Source>> {
            vec![Box::new(Other { said: said.clone(), bytes: bytes.clone() })]
        };
        let first = copy.mend(&mut ask(&own, shared, others()));
        stopped += u32::from(first.is_err());
        disk.lose_power();
        if copy.open().is_err() {
            assert!(first.is_err(), "seed {seed}: it was cut, and is damaged again");
            disk.end_process();
            copy.mend(&mut ask(&own, shared, others())).unwrap();
        }
        disk.end_process();
        assert_eq!(copy.open().unwrap().flush_lsn(), shared, "seed {seed}");
    }
    assert!((10..59).contains(&stopped), "{stopped} were cut short");
}

/// An append that nobody else has: it was acknowledged all the same, and somebody may count on it.
#[test]
fn what_nobody_has_is_not_given_up() {
    for is_committed_elsewhere in [false, true] {
        let disk = SimDisk::new(1);
        let mut copy = Copy::on_sim(&disk);
        let timeline = copy.written();
        let (shared, commit_lsn) = (timeline.flush_lsn(), timeline.commit_lsn());
        copy.append(&timeline, 1, 5000);
        timeline.checkpoint().unwrap();
        let (end, own) = (timeline.flush_lsn(), timeline.history());
        drop(timeline);
        let rotten = (end.0 - 1000) % SEGMENT_SIZE;
        disk.rot(&copy.path(end.segment_number(SEGMENT_SIZE)), rotten).unwrap();
        // The other one follows a later term, of which something is committed, or nothing yet.
        let theirs = history(&[(1, START), (2, shared)]);
        let commit_lsn = if is_committed_elsewhere { shared + 8 } else { commit_lsn };
        let flush_lsn = if is_committed_elsewhere { shared + 8 } else { shared };
        let bytes = copy.bytes[..(shared - START) as usize].to_vec();
        let other = || {
            vec![Box::new(Other {
                said: said(flush_lsn, commit_lsn, theirs.clone()),
                bytes: bytes.clone(),
            }) as Box<dyn Source>]
        };
        let mended = copy.mend(&mut ask(&own, commit_lsn.min(shared), other()));
        match is_committed_elsewhere {
            true => {
                assert_eq!(mended.unwrap().cut, Some(shared));
                assert_eq!(copy.open().unwrap().flush_lsn(), shared);
            }
            false => {
                let lack = mended.unwrap_err().to_string();
                let what = format!("{shared} to {end} at least");
                assert!(lack.contains(&what) && lack.contains("safekeeper 2 "), "{lack}");
                assert!(copy.open().is_err(), "it counts with a shorter log");
                disk.end_process();
                disk.rot(&copy.path(end.segment_number(SEGMENT_SIZE)), rotten).unwrap_or_default();
            }
        }
    }
}

/// Other bytes at the same place are of another term, and are not taken for what was here.
#[test]
fn what_others_have_of_another_term_is_not_taken() {
    let disk = SimDisk::new(2);
    let mut copy = Copy::on_sim(&disk);
    let timeline = copy.written();
    let shared = timeline.flush_lsn();
    copy.follow(&timeline, &history(&[(1, START), (3, shared)]));
    let before = copy.bytes.clone();
    let mut theirs = copy.generator.clone().numbered(7);
    copy.append(&timeline, 3, 5000);
    timeline.checkpoint().unwrap();
    let (end, own) = (timeline.flush_lsn(), timeline.history());
    drop(timeline);
    disk.rot(&copy.path(end.segment_number(SEGMENT_SIZE)), (end.0 - 1000) % SEGMENT_SIZE).unwrap();
    // Of term 2, as long, never committed, and valid WAL that links back rightly.
    let bytes = [before, theirs.record(5000)].concat();
    let said = said(end, shared, history(&[(1, START), (2, shared)]));
    let lack = copy.mend(&mut ask(&own, shared, vec![Box::new(Other { said, bytes })]));
    assert!(lack.unwrap_err().to_string().contains("safekeeper 2"));
    assert!(copy.open().is_err());
    disk.end_process();
    // Somebody who has the same does.
    let sources = copy.others(end, shared, own.clone());
    copy.mend(&mut ask(&own, shared, sources)).unwrap();
    copy.assert_whole("from who has the same");
}

/// How far a member acknowledged can't be told where the end of its log is gone: only what others committed since can.
#[test]
fn an_end_that_is_gone_is_mended_when_nobody_depends_on_it() {
    let own = history(&[(1, START)]);
    for case in 0..3 {
        let disk = SimDisk::new(3);
        let mut copy = Copy::on_sim(&disk);
        let timeline = copy.written();
        let (noted, commit_lsn) = (timeline.flush_lsn(), timeline.commit_lsn());
        // Acknowledged, and not noted yet.
        copy.append(&timeline, 1, 5000);
        drop(timeline);
        let number = noted.segment_number(SEGMENT_SIZE);
        disk.remove(&copy.path(number)).unwrap();
        disk.end_process();
        // The others have less than this one had; a later term; more than it can have had.
        let (end, commit, theirs) = match case {
            0 => (noted, commit_lsn, own.clone()),
            1 => (noted + 64, noted + 64, history(&[(1, START), (2, noted)])),
            _ => (
                Lsn((number + 1) * SEGMENT_SIZE + 64),
                Lsn((number + 1) * SEGMENT_SIZE + 64),
                own.clone(),
            ),
        };
        let mut bytes = copy.bytes.clone();
        bytes.resize((end - START) as usize, 0);
        let mended = copy.mend(&mut ask(
            &own,
            commit_lsn,
            vec![Box::new(Other { said: said(end, commit, theirs), bytes })],
        ));
        match case {
            0 => {
                assert!(mended.unwrap_err().to_string().contains("how far"));
                assert!(copy.open().is_err(), "it counts with a shorter log");
            }
            _ => {
                let cut = mended.unwrap().cut.unwrap();
                assert!(cut >= noted, "{cut}");
                assert_eq!(copy.open().unwrap().flush_lsn(), cut);
            }
        }
        disk.end_process();
    }
}

#[test]
fn a_sector_that_can_not_be_read_is_replaced() {
    for where_from_end in [2_500_000, 1000, 0] {
        let directory = tempfile::tempdir().unwrap();
        let disk = FaultyDisk::default();
        let mut copy = Copy::new(Arc::new(disk.clone()), &directory.path().join("tenant/timeline"));
        let timeline = copy.written();
        let (end, own, commit_lsn) =
            (timeline.flush_lsn(), timeline.history(), timeline.commit_lsn());
        drop(timeline);
        let lost = Lsn(end.0 - where_from_end);
        let at = lost.segment_offset(SEGMENT_SIZE) / 512 * 512;
        disk.lose(&copy.path(lost.segment_number(SEGMENT_SIZE)), at..at + 512);
        let sources = copy.others(end, commit_lsn, own.clone());
        let mended = copy.mend(&mut ask(&own, commit_lsn, sources));
        if where_from_end == 0 {
            // What was beyond the last byte that was noted, if anything, was in that sector.
            assert!(mended.unwrap_err().to_string().contains("unreadable"));
            continue;
        }
        assert_eq!(mended.unwrap().segments, 1);
        copy.assert_whole(&format!("{where_from_end} before the end"));
    }
}

/// A log that was trimmed begins with what is left of a long record, in which there is no place to go on from.
#[test]
fn what_is_left_of_a_record_is_replaced_from_the_beginning_of_the_log() {
    // On its first page, further on, and on its last one.
    for lost_after in [0, 300_000, 508 << 10] {
        let directory = tempfile::tempdir().unwrap();
        let disk = FaultyDisk::default();
        let mut copy = Copy::new(Arc::new(disk.clone()), &directory.path().join("tenant/timeline"));
        let timeline = copy.create();
        copy.follow(&timeline, &history(&[(1, START)]));
        copy.append(&timeline, 1, (3 << 19) - 3000);
        let end = copy.append(&timeline, 1, 800_000);
        copy.append(&timeline, 1, 100);
        timeline.checkpoint().unwrap();
        timeline.note_flushed().unwrap();
        let second = Lsn(2 * SEGMENT_SIZE);
        timeline.note_archived(second);
        timeline.note_consistent(end);
        assert_eq!(timeline.trim().unwrap(), 1);
        let (end, own, commit_lsn) =
            (timeline.flush_lsn(), timeline.history(), timeline.commit_lsn());
        drop(timeline);
        disk.lose(&copy.path(2), lost_after..lost_after + 512);
        let sources = copy.others(end, commit_lsn, own.clone());
        let mended = copy.mend(&mut ask(&own, commit_lsn, sources));
        assert_eq!(mended.unwrap().segments, 1, "{lost_after}");
        let timeline = copy.open().unwrap();
        let (mut reader, mut read) = (timeline.reader(), vec![0; 600_000]);
        assert_eq!(reader.read(second, &mut read).unwrap(), read.len());
        assert!(read == copy.bytes[(second - START) as usize..][..read.len()], "{lost_after}");
    }
}

/// What a page says of its timeline looks right for itself, and makes the pages after it seem wrong, whoever gives them.
#[test]
fn a_page_that_is_of_another_timeline_is_replaced_itself() {
    let disk = SimDisk::new(9);
    let mut copy = Copy::on_sim(&disk);
    let timeline = copy.written();
    let (end, own, commit_lsn) = (timeline.flush_lsn(), timeline.history(), timeline.commit_lsn());
    drop(timeline);
    let timeline_of_page = 12 * 8192 + 4;
    disk.flip(&copy.path(2), timeline_of_page, 2).unwrap();
    disk.end_process();
    let sources = copy.others(end, commit_lsn, own.clone());
    let mended = copy.mend(&mut ask(&own, commit_lsn, sources)).unwrap();
    assert_eq!(mended.segments, 1);
    copy.assert_whole("of another timeline");
}

/// Whoever gives what is no WAL is not asked again, and what he gave is not kept.
#[test]
fn what_others_give_is_checked() {
    let disk = SimDisk::new(4);
    let mut copy = Copy::on_sim(&disk);
    let timeline = copy.written();
    let (end, own, commit_lsn) = (timeline.flush_lsn(), timeline.history(), timeline.commit_lsn());
    drop(timeline);
    disk.rot(&copy.path(2), 100_000).unwrap();
    disk.end_process();
    let mut sources = copy.others(end, commit_lsn, own.clone());
    let mut bytes = copy.bytes.clone();
    bytes[SEGMENT_SIZE as usize + 300_000] ^= 1;
    let bad = Other { said: said(end, commit_lsn, own.clone()), bytes };
    let lack = copy.mend(&mut ask(&own, commit_lsn, vec![Box::new(bad)])).unwrap_err();
    assert!(lack.to_string().contains("gave what is no WAL"), "{lack}");
    disk.end_process();
    let mut bytes = copy.bytes.clone();
    bytes[SEGMENT_SIZE as usize + 300_000] ^= 1;
    sources.insert(0, Box::new(Other { said: said(end, commit_lsn, own.clone()), bytes }));
    copy.mend(&mut ask(&own, commit_lsn, sources)).unwrap();
    copy.assert_whole("from the second");
}

/// Whoever still holds a timeline that was taken out can do nothing with it, while it is mended and opened anew.
#[test]
fn what_is_taken_out_promises_writes_and_says_nothing() {
    let disk = SimDisk::new(5);
    let mut copy = Copy::on_sim(&disk);
    let timeline = copy.written();
    let next = copy.generator.at.segment_number(SEGMENT_SIZE) + 2;
    timeline.retire("it is damaged");
    let before = disk.operations();
    let configuration = chain().newest().clone();
    let (term, proposer) = (Term(2), ProposerId([2; 16]));
    assert!(timeline.vote(&VoteRequest { term, proposer, configuration }).is_err());
    let history = history(&[(1, START), (2, copy.generator.at)]);
    assert!(timeline.elected(&Elected { term, history }).is_err());
    let start = copy.generator.at;
    let bytes = copy.generator.record(100);
    let (term, length) = (Term(1), bytes.len() as u64);
    let append = Append { term, start, length, record_end: start, commit_lsn: start };
    assert!(timeline.batch().append(&append, &bytes).is_err());
    assert!(timeline.batch().finish().is_err());
    assert!(timeline.status().is_err() && timeline.holding().is_err());
    assert!(timeline.checkpoint().is_err());
    timeline.note_flushed().unwrap();
    let mut buffer = [0; 1000];
    let mut reading = timeline.read_range(START, start, Term(0)).unwrap();
    assert!(reading.next(&mut buffer).is_err());
    // No segment is made either: it could take the place of one that was mended.
    while copy.preparations.as_ref().unwrap().step() {}
    assert!(timeline.files().open_or_make(next, Zeros::Written).is_err());
    assert_eq!(disk.operations(), before);
    assert_eq!(copy.latch.reason(), None, "the process would end");
}

/// Another one that has full segments only, as the archive does, and is not asked for ever.
struct Full {
    said: Said,
    bytes: Vec<u8>,
    asked: u32,
}

impl Source for Full {
    fn name(&self) -> String {
        "the archive".to_owned()
    }

    fn said(&mut self) -> Result<Option<Said>, String> {
        Ok(Some(self.said.clone()))
    }

    fn read(&mut self, from: Lsn, to: Lsn, _term: Term) -> Result<Vec<u8>, String> {
        self.asked += 1;
        assert!(self.asked < 100, "it is asked again and again");
        let end = START + self.bytes.len() as u64;
        if from >= end {
            return Err("has no segment there".to_owned());
        }
        Ok(self.bytes[(from - START) as usize..(to.min(end) - START) as usize].to_vec())
    }
}

/// The record that goes on in a segment that nobody has is looked for once.
#[test]
fn what_others_have_half_of_ends_the_attempt() {
    let own = history(&[(1, START)]);
    let disk = SimDisk::new(7);
    let mut copy = Copy::on_sim(&disk);
    let timeline = copy.written();
    let (end, commit_lsn) = (timeline.flush_lsn(), timeline.commit_lsn());
    drop(timeline);
    let last = end.segment_number(SEGMENT_SIZE);
    disk.remove(&copy.path(last)).unwrap();
    let full = Lsn(last * SEGMENT_SIZE);
    let bytes = copy.bytes[..(full - START) as usize].to_vec();
    let source = Full { said: said(end, commit_lsn, own.clone()), bytes, asked: 0 };
    let lack = copy.mend(&mut ask(&own, commit_lsn, vec![Box::new(source)])).unwrap_err();
    assert!(lack.to_string().contains("the archive"), "{lack}");
}
