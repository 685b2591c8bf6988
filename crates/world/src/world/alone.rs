//! What safekeepers do by themselves: notes, archive, removal, catching up.

use pgstrata_safekeeper::background::pulling;
use pgstrata_safekeeper::timeline::Timeline;

use super::*;

/// In the place of a member: what is archived.
const ARCHIVE: usize = usize::MAX;

/// How seldom a safekeeper looks where it is decided who the members are.
const DECISION_LOOK: u64 = 20;

/// How seldom a safekeeper asks others whose log a compute feeds.
const FULL_LOOK: u64 = 10;

impl World {
    pub(super) fn background(&mut self, index: usize) -> Checked {
        let delay = BACKGROUND + self.rng.below(BACKGROUND);
        self.after(delay, Event::Background(index));
        if index == 0 {
            self.follow_in_background()?;
        }
        let mut silent = Vec::new();
        for (number, connection) in self.connections.iter().enumerate() {
            let is_open = connection.node == index && connection.listener.is_some();
            if is_open && self.now > connection.heard + 2 * DEAD_AFTER {
                silent.push(number);
            }
        }
        for number in silent {
            self.hang_up(number);
        }
        if self.quiet.is_some() && self.nodes[index].is_left_behind() {
            self.begin_anew(index);
            return Ok(());
        }
        self.register(index);
        self.mend_later(index);
        self.look_at_decision(index)?;
        if self.nodes[index].is_resting() {
            return self.rest_on(index);
        }
        let Some(timeline) = self.nodes[index].timeline() else { return Ok(()) };
        // As `background::write_down` does.
        let behind = timeline.commit_lsn().saturating_sub(timeline.stored_commit_lsn());
        let appended = timeline.has_appended_lately();
        let noted = if appended { timeline.note_flushed() } else { Ok(()) };
        let far = behind >= timeline.files().segment_size();
        let noted = noted.and_then(|()| match far || !appended {
            true => timeline.checkpoint(),
            false => Ok(()),
        });
        if let Err(error) = noted {
            self.log(|| format!("safekeeper {}: {error}", index + 1));
        }
        self.settle(index)?;
        self.look_for_rot(index);
        if self.nodes[index].timeline().is_some() && !timeline.is_left() {
            self.archive(index)?;
            self.settle(index)?;
        }
        let is_led = timeline.has_proposer() && !timeline.lacks_beginning();
        let is_left = timeline.is_left();
        drop(timeline);
        self.let_rest(index);
        if self.nodes[index].timeline().is_some()
            && !is_left
            && (!is_led || self.rng.one_in(FULL_LOOK))
        {
            self.ask_peers(index)?;
        }
        Ok(())
    }

    /// Says who it is, if it has not yet.
    pub(super) fn register(&mut self, index: usize) {
        let node = &self.nodes[index];
        if node.timelines().is_some() && !node.is_registered && !node.is_finished() {
            let registered =
                self.objects.wait(self.outside.decisions.register(&node.registration()));
            self.nodes[index].is_registered = registered.is_ok();
        }
    }

    /// Now and then a safekeeper looks by itself who the members are.
    fn look_at_decision(&mut self, index: usize) -> Checked {
        let lies = self.lie == Some(Lie::DecisionNotTaken);
        if lies || !self.archiving.one_in(DECISION_LOOK) {
            return Ok(());
        }
        let Some(timelines) = self.nodes[index].timelines() else { return Ok(()) };
        if let Err(reason) = timelines.look_at_decision(self.key()) {
            self.check_refusal(index, &reason)?;
        }
        self.has_done(index)
    }

    /// Unless somebody was asked just before.
    pub(super) fn ask_peers(&mut self, index: usize) -> Checked {
        if self.copying[index] {
            return Ok(());
        }
        let timeline = self.nodes[index].timeline();
        let own = timeline.as_ref().map(|timeline| timeline.history());
        let own_lags = timeline.as_ref().is_none_or(|timeline| {
            timeline.lacks_beginning() || timeline.commit_lsn() < self.truth.end()
        });
        let nodes = timeline.map(|one| one.configuration().nodes()).unwrap_or_default();
        let mut statuses = Vec::new();
        for peer in 0..self.nodes.len() {
            let is_one = nodes.contains(&self.nodes[peer].member.node);
            if peer == index || !is_one || self.is_cut_between(peer, index) {
                continue;
            }
            // Who only looks is told by the broker that there is nothing new.
            let is_asked = own_lags || !self.nodes[peer].is_resting() || self.archiving.one_in(20);
            let Some(mut visit) = self.visit(peer).filter(|_| is_asked) else { continue };
            if self.nodes[peer].is_resting() {
                self.wake(peer)?;
            }
            let said = visit.open(self.key());
            drop(visit);
            self.has_done(peer)?;
            let Ok(mut status) = said else { continue };
            if self.lie == Some(Lie::CopyBeyondCommit) {
                status.commit_lsn = status.flush_lsn;
            }
            if let Some(own) = own.as_ref().filter(|_| self.lie == Some(Lie::AnyLogFollowed)) {
                status.history = own.clone();
            }
            statuses.push((peer, status));
        }
        self.copying[index] = true;
        let (delay, life) = (self.delay(index), self.nodes[index].life);
        self.after(delay, Event::Conclude { node: index, life, statuses });
        Ok(())
    }

    /// As `background::catch_up` does.
    pub(super) fn conclude(
        &mut self,
        index: usize,
        life: u64,
        asked: &[(usize, Status)],
    ) -> Checked {
        if self.nodes[index].life != life {
            return Ok(());
        }
        self.copying[index] = false;
        let Some(timeline) = self.nodes[index].timeline() else { return Ok(()) };
        let mut asked = asked.to_vec();
        let newest = asked.iter().map(|(_, status)| status.configuration.number()).max();
        if newest > Some(timeline.configuration_number())
            && (self.learn(index)?.is_err() || self.nodes[index].life != life)
        {
            return Ok(());
        }
        if timeline.is_left() {
            return Ok(());
        }
        let told = asked.iter().map(|(_, status)| &status.configuration);
        let number = timeline.configuration_number();
        let Some(timelines) = self.nodes[index].timelines() else { return Ok(()) };
        let believed = timelines.believed(&self.parameters, number, told);
        asked.retain(|(_, status)| believed.includes(&status.configuration));
        let own = self.nodes[index].member;
        let answers =
            |member| member == own || asked.iter().any(|(_, status)| status.member == member);
        if !timeline.configuration().is_quorum(answers) {
            let archive = self.ask_archive(index, &timeline)?;
            asked.extend(archive.map(|status| (ARCHIVE, status)));
        }
        if self.nodes[index].life != life || timeline.is_left() {
            return Ok(());
        }
        let statuses: Vec<Status> = asked.iter().map(|(_, status)| status.clone()).collect();
        self.note_proof(&timeline.holding().ok(), &statuses)?;
        let missing = match timeline.conclude(&statuses) {
            Ok(missing) => missing,
            Err(error) => {
                self.log(|| format!("safekeeper {}: {error}", index + 1));
                return self.settle(index);
            }
        };
        self.settle(index)?;
        self.readers[index] = None;
        if let Some(missing) = missing {
            let (peer, status) = asked[missing.peer].clone();
            let (from, target) = (missing.from, missing.target);
            let who = match peer {
                ARCHIVE => "the archive".to_owned(),
                peer => self.nodes[peer].name.clone(),
            };
            self.log(|| format!("safekeeper {} lacks {from} to {target} of {who}", index + 1));
            if missing.term == Term(0) && self.begin_at_horizon(index, peer, &status, &missing)? {
                return Ok(());
            }
            self.copying[index] = true;
            let (delay, at) = (self.delay(index), missing.from);
            let begun = timeline.flush_lsn();
            let status = Box::new(status);
            self.after(delay, Event::Copy { node: index, life, peer, status, missing, at, begun });
        }
        Ok(())
    }

    /// As `pulling::ask_archive`.
    fn ask_archive(&mut self, index: usize, timeline: &Arc<Timeline>) -> Checked<Option<Status>> {
        if self.quorum.chain.newest().number() > timeline.configuration_number() {
            // What becomes of that is seen when others are asked next.
            return self.learn(index).map(|_| None);
        }
        let archive = Arc::clone(&self.objects.archive);
        let newest =
            self.objects.wait(archive.newest(timeline.parameters(), &self.quorum.given_up));
        self.outcome.archive_asked += 1;
        let mut newest = newest.ok().flatten();
        if let (Some(extent), Some(Lie::AnyArchiveFollowed)) = (&mut newest, self.lie) {
            extent.history = timeline.history();
        }
        Ok(newest.map(|extent| pulling::status_of_archive(timeline, extent)))
    }

    /// As `pulling::begin_at_horizon`.
    fn begin_at_horizon(
        &mut self,
        index: usize,
        peer: usize,
        status: &Status,
        missing: &Missing,
    ) -> Checked<bool> {
        let Some(timeline) = self.nodes[index].timeline() else { return Ok(false) };
        let mut status = status.clone();
        if self.lie == Some(Lie::BeginsBeyondArchive) {
            status.available_lsn = missing.target.segment_start(SEGMENT_SIZE);
        }
        let removed = pulling::removed_before(&timeline, &status, missing);
        let Some(removed) = removed else { return Ok(false) };
        let archive = Arc::clone(&self.objects.archive);
        let all = archive.has_all(timeline.parameters(), removed.start, removed.end);
        let is_archived = self.objects.wait(all).unwrap_or(false);
        if !is_archived && self.lie != Some(Lie::BeginsBeyondArchive) {
            return Ok(false);
        }
        if peer == ARCHIVE {
            return Ok(false);
        }
        let key = self.key();
        let Some(mut donor) = self.visit(peer) else {
            return Ok(false);
        };
        let is_there = donor.open(key).is_ok();
        let read = |from: Lsn, to: Lsn, bytes: &mut Vec<u8>| {
            if is_there {
                bytes.extend(donor.read(from, to, Term(0)).unwrap_or_default());
            }
            Ok(())
        };
        let parameters = timeline.parameters();
        let beginning = pulling::beginning_of(parameters, &status, missing, read);
        let Ok(Some(beginning)) = beginning else { return Ok(false) };
        self.nodes[index].begin(&beginning.history.up_to(beginning.commit_lsn), beginning.lsn);
        match timeline.begin_at(&beginning) {
            Ok(None) => {
                self.nodes[index].promise(None);
                self.outcome.horizons += 1;
                self.log(|| format!("safekeeper {} begins at {}", index + 1, beginning.lsn));
            }
            Ok(Some(answer)) => self.log(|| format!("safekeeper {}: {answer:?}", index + 1)),
            Err(error) => self.log(|| format!("safekeeper {}: {error}", index + 1)),
        }
        self.settle(index)?;
        Ok(true)
    }

    /// What the logs prove is committed, whether or not a compute ever heard of it.
    pub(super) fn note_proof(
        &mut self,
        own: &Option<(Holding, Configuration)>,
        peers: &[Status],
    ) -> Checked {
        let Some((own, configuration)) = own else { return Ok(()) };
        let mut holdings = vec![own.clone()];
        holdings.extend(peers.iter().map(|status| Holding {
            member: status.member,
            flush_lsn: status.flush_lsn,
            history: status.history.clone(),
        }));
        match provable_commit(configuration, &holdings) {
            Some((term, lsn)) => self.truth.committed(term, lsn),
            None => Ok(()),
        }
    }

    pub(super) fn copy(
        &mut self,
        index: usize,
        life: u64,
        peer: usize,
        status: Box<Status>,
        missing: Missing,
        (at, begun): (Lsn, Lsn),
    ) -> Checked {
        if self.nodes[index].life != life {
            return Ok(());
        }
        self.copying[index] = false;
        let Some(timeline) = self.nodes[index].timeline() else { return Ok(()) };
        // A proposer sends what is missing.
        let is_fed = timeline.flush_lsn() > at.max(begun);
        if is_fed || (peer != ARCHIVE && self.is_cut_between(peer, index)) {
            return Ok(());
        }
        let to = missing.target.min(at + (self.plan.chunk as u64).max(4096));
        let bytes = match at < status.available_lsn && missing.term == Term(0) {
            true => {
                let mut bytes = vec![0; (to - at) as usize];
                let fresh = || self.objects.reader();
                let reader = self.readers[index].get_or_insert_with(fresh);
                let read = reader.read(timeline.parameters(), at, &mut bytes);
                let count = self.objects.wait(read).unwrap_or(0);
                bytes.truncate(count);
                self.outcome.archive_reads += 1;
                bytes
            }
            false => {
                let Some(mut donor) = self.visit(peer) else { return Ok(()) };
                let opened = donor.open(self.key());
                let read = opened.and_then(|_| donor.read(at, to, missing.term));
                drop(donor);
                self.has_done(peer)?;
                read.unwrap_or_default()
            }
        };
        if bytes.is_empty() {
            return Ok(());
        }
        let next = at + bytes.len() as u64;
        let is_last = next >= missing.target;
        self.take(index, &missing, &status, at, &bytes)?;
        if self.nodes[index].life == life && !is_last {
            self.copying[index] = true;
            let delay = self.delay(index);
            let at = next;
            self.after(delay, Event::Copy { node: index, life, peer, status, missing, at, begun });
        }
        Ok(())
    }

    pub(super) fn take(
        &mut self,
        index: usize,
        missing: &Missing,
        status: &Status,
        at: Lsn,
        bytes: &[u8],
    ) -> Checked {
        let Some(timeline) = self.nodes[index].timeline() else { return Ok(()) };
        match missing.term {
            Term(0) => {
                let committed = status.history.up_to(missing.target);
                self.nodes[index].begin(&committed, missing.target);
            }
            _ => self.nodes[index].begin(&timeline.history(), Lsn::MAX),
        }
        let answer = timeline.take_missing(missing, status, at, bytes);
        self.outcome.copies += 1;
        self.outcome.beginnings += u64::from(missing.term > Term(0));
        match answer {
            Ok(answer) => {
                if let Some(Message::Refused(RefusedReason::InvalidWal(why))) = &answer {
                    return Err(format!(
                        "what safekeeper {} was given is no WAL: {why}",
                        index + 1
                    ));
                }
                if let Some(Message::Refused(reason)) = &answer {
                    // A proposer that came meanwhile may have led it elsewhere, with all that is committed.
                    self.log(|| format!("safekeeper {} doesn't take that: {reason}", index + 1));
                }
                self.nodes[index].promise(None);
                self.prepare(index);
            }
            Err(error) => self.log(|| format!("safekeeper {}: {error}", index + 1)),
        }
        self.settle(index)
    }
}
