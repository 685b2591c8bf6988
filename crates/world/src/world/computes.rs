//! Computes: the loop around the shipped driver, and what they write.

use std::time::{Duration, Instant};

use bytes::Bytes;
use pgstrata_compute_shim::proposer::{Limits, WalChunk};
use pgstrata_ids::NodeId;
use pgstrata_quorum::Phase;

use crate::compute::Files;

use super::*;

/// So many times as fast the driver's clock goes: its patience is that of a network of the real world, and a run has few of its
/// seconds.
pub(super) const CLOCK: u64 = 100;

/// A turn takes so long at least, until the loop is there again.
const TURN: Time = 100;

/// Longest pause before a compute that was outranked campaigns again.
const PAUSE: Time = 1000;

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
        if !self.observe(compute)? {
            return Ok(());
        }
        let one = &mut self.computes[compute];
        let Some(driver) = &mut one.driver else { return Ok(()) };
        let mut files = Files {
            log: &one.log,
            start: one.start,
            committed: one.committed,
            reads: &mut self.outcome.file_reads,
            are_recycled: self.lie == Some(Lie::FilesRecycled),
        };
        let wait = driver.begin_turn(now, Some(&mut files), Duration::from_secs(1));
        let next = one.turn;
        self.carry(compute);
        if !self.observe(compute)? {
            return Ok(());
        }
        let wait = (wait.as_micros() as Time / CLOCK).max(TURN);
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

    /// What the driver has come to. False if its compute has ended by that.
    fn observe(&mut self, compute: usize) -> Checked<bool> {
        let one = &self.computes[compute];
        let Some(driver) = &one.driver else { return Ok(false) };
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
        let Some(driver) = &one.driver else { return Ok(false) };
        let (commit_lsn, ended) = (driver.commit_lsn(), driver.check().err());
        let (fenced, is_refused) = (driver.fenced(), driver.is_refused());
        if commit_lsn < one.committed {
            let before = one.committed;
            return Err(format!(
                "compute {compute} has {before} committed, and then {commit_lsn} only"
            ));
        }
        if commit_lsn > one.committed && one.won > Term(0) {
            one.committed = commit_lsn;
            let term = one.won;
            self.log(|| format!("compute {compute} has {commit_lsn} of term {term} committed"));
            self.truth.committed(term, commit_lsn)?;
        }
        let one = &mut self.computes[compute];
        let campaigns_again = fenced.filter(|_| one.won == Term(0) && !one.tries_again);
        if let Some(term) = campaigns_again {
            if !std::mem::replace(&mut one.pauses, true) {
                let life = one.life;
                self.log(|| format!("compute {compute} is outranked by term {term}"));
                let delay = self.rng.between(50, PAUSE);
                self.after(delay, Event::CampaignAbove(compute, life, term));
            }
        } else if ended.is_some() || is_refused {
            let why = ended.map_or("it is refused".to_owned(), |error| error.to_string());
            self.log(|| format!("compute {compute}: {why}"));
            let most = if self.quiet.is_some() { 10_000 } else { 150_000 };
            let back_after = self.rng.between(2000, most);
            self.end_compute(compute, back_after);
            return Ok(false);
        }
        self.ask_last_record(compute);
        Ok(true)
    }

    pub(super) fn campaign_above(&mut self, compute: usize, life: u64, term: Term) {
        let one = &mut self.computes[compute];
        if let Some(driver) = one.driver.as_mut().filter(|_| one.life == life) {
            one.pauses = false;
            driver.campaign_above(term);
            self.wake_compute(compute);
        }
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
        (one.won, one.history) = (term, history);
        if goes_on {
            if !is_ours {
                // It ends.
                return Ok(());
            }
            // What it begins with is here: nobody else is waited for.
            let again = one.bytes(start).to_vec();
            self.truth.wrote(term, &again);
            self.outcome.led_on += 1;
        } else {
            let life = one.life;
            self.after(BARRIER_PATIENCE, Event::Barrier(compute, life, term));
            let one = &mut self.computes[compute];
            (one.start, one.record_end) = (start, start);
            if start == self.parameters.start_lsn {
                one.generator = Some(generator(&self.parameters, start, Lsn(8), term));
            }
        }
        let (life, delay) = (self.computes[compute].life, self.rng.below(2000));
        self.after(delay, Event::Write(compute, life, term));
        Ok(())
    }

    /// Whether all that was written is committed, and somebody leads.
    pub(super) fn is_all_committed(&self) -> bool {
        let one = &self.computes[0];
        one.is_elected() && one.committed >= one.record_end
    }

    pub(super) fn node_of(&self, id: u64) -> usize {
        id as usize - 1
    }

    /// Asks somebody who has it where the record before the own log begins, so that the first own one can link back to it: on
    /// a connection of its own.
    fn ask_last_record(&mut self, compute: usize) {
        let one = &self.computes[compute];
        let Some(driver) = &one.driver else { return };
        if one.won == Term(0) || one.generator.is_some() || one.asks {
            return;
        }
        let holders = driver.holders(one.start);
        if !holders.is_empty() {
            let life = one.life;
            let (holder, _) = holders[self.rng.index(holders.len())];
            let node = self.node_of(holder.0);
            self.computes[compute].asks = true;
            let delay = 2 * self.delay(node);
            self.after(delay, Event::LastRecord { compute, life, node });
        }
    }

    /// What it says.
    pub(super) fn last_record(&mut self, compute: usize, life: u64, node: usize) {
        if self.computes[compute].life != life || self.computes[compute].driver.is_none() {
            return;
        }
        self.computes[compute].asks = false;
        if self.is_cut(compute, node) {
            return;
        }
        let start = self.computes[compute].start;
        let Some(mut visit) = self.visit(node) else { return };
        let opened = visit.open(self.key());
        let found = opened.and_then(|_| visit.last_record(start));
        self.log(|| format!("compute {compute} asks for the record before {start}: {found:?}"));
        let found = found.ok().filter(|lsn| *lsn > Lsn::INVALID);
        let parameters = self.parameters.clone();
        let one = &mut self.computes[compute];
        if let Some(prev) = found.filter(|_| one.generator.is_none()) {
            one.generator = Some(generator(&parameters, one.start, prev, one.won));
        }
    }

    /// Another one is started where a compute commits nothing in its term.
    pub(super) fn barrier(&mut self, compute: usize, life: u64, term: Term) {
        let one = &self.computes[compute];
        let start = one.history.last().map_or(Lsn::INVALID, |last| last.lsn);
        if one.life == life && one.is_elected() && one.won == term && one.committed < start {
            self.end_compute(compute, 1000);
        }
    }

    /// It writes some records, also while it campaigns to go on with its log.
    pub(super) fn write(&mut self, compute: usize, life: u64, term: Term) -> Checked {
        let now = self.instant();
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
        let is_elected = one.is_elected();
        let Some(driver) = &mut one.driver else { return Ok(()) };
        let written = driver.end_lsn().saturating_sub(self.parameters.start_lsn);
        // The first record, its barrier, is written whatever is not committed: it shows whether the term still stands.
        let has_room = driver.has_room() || one.log.is_empty();
        if let Some(generator) = one.generator.as_mut().filter(|_| has_room) {
            let mut bytes = Vec::new();
            for _ in 0..self.rng.between(1, 4) {
                let is_large = self.rng.one_in(60);
                // The longest fill whole segments.
                let most_large = if self.rng.one_in(8) { 150_000 } else { 20_000 };
                let size = self.rng.below(if is_large { most_large } else { self.plan.record });
                bytes.extend(generator.record(size as usize));
            }
            if self.plan.switches && self.rng.one_in(25) && written < MOST_WAL {
                bytes.extend(generator.switch());
            }
            one.log.extend_from_slice(&bytes);
            let (from, end) = (one.record_end, one.start + one.log.len() as u64);
            one.record_end = end;
            if is_elected {
                self.truth.wrote(term, &bytes);
            }
            // PostgreSQL may have written a part of a record by the time it is looked at.
            let cut = match self.rng.one_in(4) {
                true => self.rng.below(bytes.len() as u64) as usize,
                false => 0,
            };
            let parts = [(from, &bytes[..cut], from), (from + cut as u64, &bytes[cut..], end)];
            for (start, bytes, record_end) in parts.into_iter().filter(|part| !part.1.is_empty()) {
                let bytes = Bytes::copy_from_slice(bytes);
                let appended = driver.append(now, WalChunk { start, bytes, record_end });
                appended.map_err(|error| error.to_string())?;
            }
            self.log(|| format!("compute {compute} writes up to {end}"));
            self.wake_compute(compute);
        }
        let delay = self.rng.between(500, 12_000);
        self.after(delay, Event::Write(compute, life, term));
        Ok(())
    }
}
