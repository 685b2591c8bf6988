//! What rots on disks, how it is found, and what mends it.

use std::time::Duration;

use pgstrata_ids::Member;
use pgstrata_safekeeper::background::mending::{Archived, Damaged, said};
use pgstrata_safekeeper::checked_segment::checker;
use pgstrata_safekeeper::mend::check::{Found, check, confirm};
use pgstrata_safekeeper::mend::{Said, Source, Sources};
use pgstrata_safekeeper::timeline::{Suspicion, Timeline};
use pgstrata_safekeeper::timelines::TimelineKey;
use pgstrata_safekeeper::timelines::believing::Believed;

use crate::plan::Rot;

use super::*;

/// How seldom all of a log is looked at.
const SCRUB: u64 = 4;

/// How long until mending is tried, or tried again.
const RETRY: Time = 10_000;

/// Another member, as far as it can be reached now.
struct Peer {
    name: String,
    key: TimelineKey,
    visit: Visit,
    believed: Believed,
    /// A mistake: its log is taken for the own one.
    as_own: Option<TermHistory>,
}

impl Source for Peer {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn said(&mut self) -> Result<Option<Said>, String> {
        let status = self.visit.open(self.key).map_err(|reason| reason.to_string())?;
        let mut said = said(status, &self.believed)?;
        if let (Some(said), Some(history)) = (&mut said, &self.as_own) {
            said.history.clone_from(history);
        }
        Ok(said)
    }

    fn read(&mut self, from: Lsn, to: Lsn, term: Term) -> Result<Vec<u8>, String> {
        self.visit.read(from, to, term).map_err(|reason| reason.to_string())
    }
}

/// Where the record begins in which `at` is, if that is known from `begin` on.
fn record_before(timeline: &Timeline, begin: Lsn, at: Lsn) -> Option<Lsn> {
    let mut checker = match begin == timeline.parameters().start_lsn {
        true => checker(timeline.parameters(), begin).at_boundary(),
        false => checker(timeline.parameters(), begin),
    };
    let mut reader = timeline.reader();
    let mut buffer = vec![0; 8192];
    while checker.feed_position() < at {
        let count = buffer.len().min((at - checker.feed_position()) as usize);
        let count = reader.read(checker.feed_position(), &mut buffer[..count]).ok()?;
        checker.check(&buffer[..count]).ok().filter(|()| count > 0)?;
    }
    let is_known = checker.last_record().is_some() || begin == timeline.parameters().start_lsn;
    is_known.then(|| checker.position())
}

impl World {
    /// Something of a log rots, if that of no other member has. Only what is known to have been durable: of what was written in
    /// the last moment a start can't tell whether it ever was.
    pub(super) fn rot(&mut self, index: usize, rot: Rot, part: u64) {
        let newest = self.quorum.chain.newest();
        if !newest.contains(self.nodes[index].member) || !self.may_lose(index) {
            return;
        }
        let Some(timeline) = self.nodes[index].timeline() else { return };
        let begin = timeline.marks().available_lsn.max(self.parameters.start_lsn);
        let node = &self.nodes[index];
        let until = node.noted().min(timeline.commit_lsn());
        if until <= begin || node.is_finished() || node.is_doomed {
            return;
        }
        let at = begin + (until - begin) * part / 1000;
        // What is left, where a log begins, of a record that begins before is checked by nobody, but for whether it can be read.
        let start = at.segment_start(SEGMENT_SIZE);
        let may_be_left = record_before(&timeline, begin, at).is_none_or(|record| record < start);
        let is_written_to = start + SEGMENT_SIZE > until;
        match rot {
            Rot::Bit | Rot::Short if may_be_left => return,
            // Beside other damage it can't be told whether anybody looks at it.
            Rot::Bit if node.is_rotten => return,
            _ => {}
        }
        let path = node.segment_path(&self.parameters, at.segment_number(SEGMENT_SIZE));
        let offset = at.segment_offset(SEGMENT_SIZE);
        let done = match rot {
            Rot::Bit => node.disk.flip(&path, offset, (part % 8) as u8),
            Rot::Sector => node.disk.lose_sector(&path, offset),
            Rot::Short => node.disk.shorten(&path, offset),
            Rot::Gone => node.disk.lose(&path),
        };
        let is_seen = done.is_ok() && self.scrubbed(&timeline).is_some();
        if !is_seen {
            // What pads a segment, or is left of a record that begins before, is not looked at by anybody.
            if rot == Rot::Bit && done.is_ok() {
                let back = self.nodes[index].disk.flip(&path, offset, (part % 8) as u8);
                back.unwrap_or_else(|error| unreachable!("{error}"));
            }
            return;
        }
        self.nodes[index].is_rotten = true;
        self.outcome.rots += 1;
        self.log(|| format!("safekeeper {}: {rot:?} at {at}", index + 1));
        if is_written_to && matches!(rot, Rot::Short | Rot::Gone) {
            // Who went on writing would leave zeros where it had acknowledged something, and more after them: that is taken
            // for a torn end, as rot is that looks so (docs/consensus.md).
            let node = &mut self.nodes[index];
            (node.is_doomed, node.loses_power, node.back_after) = (true, true, 5_000);
            self.crash(index);
        }
    }

    /// All of what is committed, as the scrub looks at it.
    fn scrubbed(&self, timeline: &Timeline) -> Option<Suspicion> {
        let begin = timeline.marks().available_lsn.max(self.parameters.start_lsn);
        let end = timeline.commit_lsn();
        match check(timeline, begin, end, end, |_| Some(Duration::ZERO)) {
            Found::Right(_) => None,
            Found::Damaged(found) => Some(found),
        }
    }

    /// Looks into what readers met, and now and then at everything.
    pub(super) fn look_for_rot(&mut self, index: usize) {
        let Some(timeline) = self.nodes[index].timeline() else { return };
        if self.nodes[index].is_rotten && self.rng.one_in(SCRUB) {
            match self.scrubbed(&timeline) {
                Some(found) => timeline.suspect(found.at, found.why),
                // It was trimmed, or written over.
                None => self.nodes[index].is_rotten = false,
            }
        }
        let Some(suspicion) = timeline.take_suspicion() else { return };
        let found = confirm(&timeline, &suspicion);
        if let Some(found) = found
            && self.lie != Some(Lie::RottenNotTakenOut)
        {
            self.log(|| format!("safekeeper {}: {} after {}", index + 1, found.why, found.at));
            if let Some(timelines) = self.nodes[index].timelines() {
                timelines.take_out(&timeline, &found.why);
            }
        }
    }

    /// As `background::mending` has it: now and then, for as long as something is damaged.
    pub(super) fn mend(&mut self, index: usize) -> Checked {
        self.is_mend_due[index] = false;
        if !self.nodes[index].is_mending() {
            return Ok(());
        }
        let (lie, key) = (self.lie, self.key());
        let mut peers: Vec<(String, Visit, Member)> = Vec::new();
        for peer in 0..self.nodes.len() {
            if peer != index && !self.is_cut_between(peer, index) {
                let node = &self.nodes[peer];
                peers.extend(self.visit(peer).map(|visit| (node.name.clone(), visit, node.member)));
            }
        }
        let archive = self.objects.reader();
        let (start, handle) = (self.parameters.start_lsn, self.objects.handle());
        let may_go = !self.quorum.chain.newest().contains(self.nodes[index].member);
        let ask = |damaged: &Damaged<'_>| {
            let state = &damaged.control.state;
            let mut nodes = state.configuration.nodes();
            nodes.extend(damaged.newest.nodes());
            let as_own = (lie == Some(Lie::AnyLogMends)).then(|| state.history.clone());
            let mut sources: Vec<Box<dyn Source>> = Vec::new();
            for (name, visit, member) in peers {
                if nodes.contains(&member.node) {
                    let (believed, as_own) = (damaged.believed(), as_own.clone());
                    sources.push(Box::new(Peer { name, key, visit, believed, as_own }));
                }
            }
            if let Some(given_up) = damaged.given_up.clone() {
                let archive = archive.without(given_up);
                let parameters = damaged.control.parameters.clone();
                sources.push(Box::new(Archived::new(archive, parameters, handle)));
            }
            Sources::ask(state.history.clone(), start, state.commit_lsn, sources, Vec::new())
        };
        let is_unopened = self.nodes[index].is_unopened();
        let mended = self.nodes[index].mend(may_go, ask);
        match mended {
            Ok(_) if self.nodes[index].is_mending() => {
                self.log(|| format!("safekeeper {} is damaged still", index + 1));
            }
            Ok(_) if self.nodes[index].timeline().is_none() => {
                self.log(|| format!("safekeeper {} lets go of what others keep", index + 1));
            }
            Ok(_) if is_unopened => {
                self.log(|| format!("safekeeper {} could open it by now", index + 1));
            }
            Ok(cut) => {
                self.nodes[index].is_rotten = false;
                self.outcome.mended += 1;
                self.log(|| format!("safekeeper {} is mended, and cut at {cut:?}", index + 1));
                if cut.is_some() {
                    self.check_relief(index)?;
                }
            }
            Err(why) => {
                self.log(|| format!("safekeeper {} is not mended: {why}", index + 1));
                // It may have been about to cut what nobody depends on, or have done it, and could not be opened after that.
                let node = &self.nodes[index];
                let may_be_mended = node.is_finished() || node.is_unopened();
                if may_be_mended && self.check_relief(index).is_ok() {
                    self.nodes[index].may_be_cut();
                }
            }
        }
        // Whoever was asked may have been woken.
        (0..self.nodes.len()).try_for_each(|node| self.settle(node))
    }

    /// Mending is tried as long as it is needed.
    pub(super) fn mend_later(&mut self, index: usize) {
        if self.nodes[index].is_mending() && !std::mem::replace(&mut self.is_mend_due[index], true)
        {
            self.after(RETRY, Event::Mend(index));
        }
    }

    /// Nobody depends on what was cut: others have all that is committed, as many as decide, or so many that nobody is elected
    /// without them, where directories were lost since then.
    fn check_relief(&self, index: usize) -> Checked {
        let own = self.nodes[index].member;
        let has_all = |member: Member| {
            let node = &self.nodes[self.node_of(member.node.0)];
            member != own && node.member == member && node.acknowledged() >= self.truth.end()
        };
        let known = self.quorum.chain.configurations();
        let may_lack = |member: Member| !self.is_lost(member) && !has_all(member);
        let is_held = known.iter().any(|one| one.is_quorum(has_all))
            || !self.quorum.chain.newest().is_quorum(may_lack);
        match is_held {
            true => Ok(()),
            false => Err(format!("safekeeper {} was relieved, and is needed", index + 1)),
        }
    }
}
