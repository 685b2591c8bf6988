//! Computes: the loop around the shipped cores that campaign and lead, and what is written.

use pgstrata_compute_shim::proposer::{Limits, ProposerError};
use pgstrata_ids::NodeId;
use pgstrata_quorum::Phase;

use crate::compute::{Files, Stage};

use super::*;

/// So many times as fast the driver's clock goes: its patience is that of a network of the real world, and a run has few of its
/// seconds.
pub(super) const CLOCK: u64 = 100;

/// A turn takes so long at least, until the loop is there again.
const TURN: Time = 100;

/// A turn waits so long, by a driver's clock, where the shipped loop looks every millisecond whether another thread is done: here that
/// wakes it.
const WOKEN: Duration = Duration::from_millis(50);

impl World {
    /// The time, by a driver's clock.
    pub(super) fn instant(&self) -> Instant {
        let now = if self.lie == Some(Lie::ClockStands) { 0 } else { self.now };
        self.begun + Duration::from_micros(now * CLOCK)
    }

    pub(super) fn begin(&mut self, compute: usize) -> Checked {
        if self.computes[compute].driver.is_some() || (self.quiet.is_some() && compute > 0) {
            return Ok(());
        }
        if self.now < self.idle_until {
            self.at(self.idle_until, Event::Begin(compute));
            return Ok(());
        }
        // One that it was told of before, perhaps, and hears of the newest only now.
        let known = self.quorum.chain.configurations();
        let back = if self.rng.one_in(3) { self.rng.index(known.len()) } else { 0 };
        let mut nodes: Vec<NodeId> = known[known.len() - 1 - back].nodes();
        if !self.is_founded && self.rng.one_in(3) {
            // Others begin it, or want to.
            nodes = (1..=self.nodes.len() as u64).map(NodeId).collect();
            while nodes.len() > self.plan.nodes {
                nodes.remove(self.rng.index(nodes.len()));
            }
        }
        let limits = Limits {
            chunk: self.plan.chunk,
            backlog: if self.rng.one_in(2) { 8 << 10 } else { 1 << 20 },
            uncommitted: MOST_PENDING,
            queued: if self.rng.one_in(2) { 4 << 10 } else { 1 << 20 },
            old_queued: 16 << 10,
        };
        let tries_again = self.rng.one_in(4);
        // Two may draw alike.
        let seed = if self.rng.one_in(2) { 0 } else { self.rng.bits() };
        let parameters = self.parameters.clone();
        let now = self.instant();
        let begun = self.computes[compute].begin(parameters, nodes, limits, tries_again, seed, now);
        begun.map_err(|error| error.to_string())?;
        let life = self.computes[compute].life;
        self.log(|| format!("compute {compute} begins, the {life}th"));
        self.wake_compute(compute);
        Ok(())
    }

    pub(super) fn end_compute(&mut self, compute: usize, back_after: Time) {
        self.log(|| format!("compute {compute} ends"));
        self.computes[compute].end();
        // With its machine, or only by itself: then its connections are closed.
        match self.rng.one_in(3) {
            true => {
                for index in self.computes[compute].wires.take_left() {
                    self.connections[index].is_left = true;
                }
            }
            false => self.carry(compute),
        }
        self.after(back_after, Event::Begin(compute));
    }

    /// Something has happened for which its loop waits.
    pub(super) fn wake_compute(&mut self, compute: usize) {
        let one = &mut self.computes[compute];
        if one.driver.is_some() && !std::mem::replace(&mut one.is_woken, true) {
            let (life, turn) = (one.life, one.turn);
            let delay = self.rng.between(1, 30);
            self.after(delay, Event::Turn(compute, life, turn));
        }
    }

    /// The loop has waited for long enough.
    pub(super) fn turn(&mut self, compute: usize, life: u64, turn: u64) -> Checked {
        let now = self.instant();
        let one = &mut self.computes[compute];
        if one.life != life || one.turn != turn {
            return Ok(());
        }
        one.turn += 1;
        one.is_woken = false;
        let ready = one.wires.ready();
        let Some(driver) = &mut one.driver else { return Ok(()) };
        driver.end_turn(now, &ready);
        self.observe(compute)?;
        if let Err(error) = self.lead(compute)? {
            self.log(|| format!("compute {compute}: {error}"));
            let most = if self.quiet.is_some() { 10_000 } else { 150_000 };
            let back_after = self.rng.between(2000, most);
            self.end_compute(compute, back_after);
            return Ok(());
        }
        let one = &mut self.computes[compute];
        let Some(driver) = &mut one.driver else { return Ok(()) };
        let mut files = Files {
            written: &mut one.written,
            reads: &mut self.outcome.file_reads,
            most_uncommitted: MOST_PENDING,
            are_recycled: self.lie == Some(Lie::FilesRecycled),
            wrong: None,
        };
        let wait = match &mut one.stage {
            Stage::Campaigns(campaign) => campaign.wait(now),
            Stage::Records(recording, _) => recording.wait(),
            Stage::Follows(following) => {
                let wait = following.take(now, driver, &mut files);
                wait.map_err(|error| error.to_string())?
            }
            Stage::Ended | Stage::Asks(_) | Stage::Drives(_) => WOKEN,
        };
        let wait = match one.stage {
            Stage::Follows(_) => driver.begin_turn(now, Some(&mut files), wait),
            _ => driver.begin_turn(now, None, wait),
        };
        if let Some(wrong) = files.wrong {
            return Err(format!("compute {compute}: {wrong}"));
        }
        // The rest of a record is written by the next turn.
        let is_partly_written = one.written.visible < one.written.record_end;
        one.written.visible = one.written.record_end;
        let next = one.turn;
        self.carry(compute);
        self.observe(compute)?;
        let wait = match is_partly_written {
            true => TURN,
            false => (wait.as_micros() as Time / CLOCK).max(TURN),
        };
        self.after(wait, Event::Turn(compute, life, next));
        Ok(())
    }

    /// What the driver has written goes on its way, and what it has asked for begins.
    fn carry(&mut self, compute: usize) {
        let wires = self.computes[compute].wires.clone();
        for (index, bytes) in wires.take_output() {
            self.send_bytes(index, bytes);
        }
        for index in wires.take_left() {
            self.leave(index);
        }
        for (token, node) in wires.asked() {
            self.dial(compute, token, node);
        }
    }

    /// What the driver has come to.
    fn observe(&mut self, compute: usize) -> Checked {
        let one = &self.computes[compute];
        let Some(driver) = &one.driver else { return Ok(()) };
        let core = driver.core();
        if let Err(error) = core.invariants() {
            return Err(format!(
                "the proposer of compute {compute} is not as it has to be: {error}"
            ));
        }
        if core.phase() == Phase::Elected && core.term() != one.won {
            self.won(compute)?;
        }
        let one = &mut self.computes[compute];
        let Some(driver) = &one.driver else { return Ok(()) };
        let (commit_lsn, before) = (driver.commit_lsn(), one.written.committed);
        // Of a log that is not its own it says nothing to anybody.
        let is_others = matches!(driver.check(), Err(ProposerError::MembersChanged(_)));
        if one.won == Term(0) || is_others {
            return Ok(());
        }
        if commit_lsn < before {
            return Err(format!(
                "compute {compute} has {before} committed, and then {commit_lsn} only"
            ));
        }
        if commit_lsn > before {
            one.written.committed = commit_lsn;
            let (term, members) = (one.won, driver.configuration().number());
            if self.truth.has_given_up(members) && !self.is_kept(compute, commit_lsn) {
                // By those who are lost, and others who have not heard yet that they were given up: from where that was decided on
                // commits may be missing.
                self.log(|| {
                    format!("compute {compute} has {commit_lsn} committed by who was given up")
                });
                return Ok(());
            }
            self.log(|| format!("compute {compute} has {commit_lsn} of term {term} committed"));
            self.truth.committed(term, commit_lsn)?;
        }
        Ok(())
    }

    /// Whether one of those who decide now has the compute's log up to there.
    fn is_kept(&self, compute: usize, lsn: Lsn) -> bool {
        let (history, start) = (&self.computes[compute].history, self.parameters.start_lsn);
        self.quorum.chain.newest().all().any(|member| {
            let node = &self.nodes[self.node_of(member.node.0)];
            let (own, flush_lsn) = node.log();
            node.member == member && own.divergence(flush_lsn, history, lsn, start) >= lsn
        })
    }

    /// It has won a term: its first, or one that goes on with its log with other members.
    fn won(&mut self, compute: usize) -> Checked {
        let one = &self.computes[compute];
        let Some(driver) = &one.driver else { return Ok(()) };
        let (term, history) = (driver.core().term(), driver.core().history().clone());
        let start = history.last().map_or(Lsn::INVALID, |last| last.lsn);
        let goes_on = one.won > Term(0);
        let (is_ours, donor) =
            (driver.check().is_ok(), driver.election().map(|election| election.donor.node));
        self.log(|| format!("compute {compute} wins term {term} at {start}, donor {donor:?}"));
        self.outcome.elections += 1;
        self.truth.elected(compute, term, start, &history)?;
        let one = &mut self.computes[compute];
        match one.yields_above.filter(|_| !goes_on) {
            Some(asked) => {
                // What it asked for, nobody may have heard.
                let newest = self.newcomers.range(..term).next_back();
                if let Some(newer) = newest.filter(|newer| **newer > asked) {
                    return Err(format!(
                        "compute {compute}, which had asked for {asked}, outranks {newer} by {term}"
                    ));
                }
            }
            None if !goes_on => drop(self.newcomers.insert(term)),
            None => {}
        }
        (one.won, one.history) = (term, history);
        if goes_on {
            if !is_ours {
                // It ends.
                return Ok(());
            }
            // What it begins with is here: nobody else is waited for.
            let again = one.written.from(start).to_vec();
            self.truth.wrote(compute, term, &again);
            self.outcome.led_on += 1;
        } else {
            one.written.begin(start);
        }
        let (life, delay) = (self.computes[compute].life, self.rng.below(2000));
        self.after(delay, Event::Write(compute, life, term));
        Ok(())
    }

    /// Whether all that was written is committed, and somebody leads.
    pub(super) fn is_all_committed(&self) -> bool {
        let one = &self.computes[0];
        one.is_elected() && one.follows() && one.written.committed >= one.written.record_end
    }

    pub(super) fn node_of(&self, id: u64) -> usize {
        id as usize - 1
    }

    /// PostgreSQL writes some records, also while it campaigns to go on with its log.
    pub(super) fn write(&mut self, compute: usize, life: u64, term: Term) -> Checked {
        let one = &self.computes[compute];
        if one.life != life || one.won != term {
            return Ok(());
        }
        // What waits now has to be committed with nothing more to come; but a copy whose end is not known is mended when something
        // new is committed.
        let is_mending = self.nodes.iter().any(|node| node.is_mending());
        if self.quiet.is_some_and(|(_, end)| self.truth.end() > end)
            && !is_mending
            && !self.may_retire
        {
            self.after(5_000, Event::Write(compute, life, term));
            return Ok(());
        }
        let one = &mut self.computes[compute];
        let (is_elected, follows) = (one.is_elected(), one.follows());
        let Some(driver) = &mut one.driver else { return Ok(()) };
        let len = one.written.bytes.len() as u64;
        if let Some(generator) = one.generator.as_mut().filter(|_| follows && driver.has_room()) {
            let mut bytes = Vec::new();
            let from = one.written.record_end;
            for _ in 0..self.rng.between(1, 4) {
                let is_large = self.rng.one_in(60);
                // The longest fill whole segments.
                let most_large = if self.rng.one_in(8) { 150_000 } else { 20_000 };
                let size = self.rng.below(if is_large { most_large } else { self.plan.record });
                bytes.extend(generator.record(size as usize));
                one.written.ends.push_back(from + bytes.len() as u64);
            }
            if self.plan.switches && self.rng.one_in(25) && len < MOST_WAL {
                bytes.extend(generator.switch());
                one.written.ends.push_back(from + bytes.len() as u64);
            }
            one.written.bytes.extend_from_slice(&bytes);
            let end = one.written.end();
            one.written.record_end = end;
            // It may have written a part of a record by the time it is looked at.
            let cut = match self.rng.one_in(4) {
                true => self.rng.below(bytes.len() as u64),
                false => bytes.len() as u64,
            };
            one.written.visible = from + cut;
            if is_elected {
                self.truth.wrote(compute, term, &bytes);
            }
            self.log(|| format!("compute {compute} writes up to {end}"));
            self.wake_compute(compute);
        }
        let delay = self.rng.between(500, 12_000);
        self.after(delay, Event::Write(compute, life, term));
        Ok(())
    }
}
