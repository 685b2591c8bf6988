//! Timelines with which nothing happens: they are not open, and then their WAL is in object storage only, until somebody needs them.

use crate::node::Woken;

use super::*;

impl World {
    /// Nobody writes for a while.
    pub(super) fn be_idle(&mut self, lasts: Time) {
        self.idle_until = self.now + lasts;
        for compute in 0..self.computes.len() {
            if self.computes[compute].driver.is_some() {
                self.end_compute(compute, lasts);
            }
        }
        self.end_campaign();
    }

    /// Lets a timeline come to rest with which nothing is to be done, if nobody has it.
    pub(super) fn let_rest(&mut self, index: usize) {
        let is_used = self.copying[index] || self.turns.values().any(|turn| turn.is_of(index));
        if self.quiet.is_some() || is_used || !self.archiving.one_in(2) {
            return;
        }
        if self.nodes[index].let_rest() {
            self.outcome.rests += 1;
            self.log(|| format!("safekeeper {} comes to rest", index + 1));
        }
    }

    /// What happens with a timeline at rest that nobody needs.
    pub(super) fn rest_on(&mut self, index: usize) -> Checked {
        if self.quiet.is_some() || self.archiving.one_in(4) {
            return self.wake(index).map(drop);
        }
        if self.nodes[index].has_all_segments() && self.archiving.one_in(2) {
            self.doom_soon(index);
            if self.nodes[index].send_away() {
                self.outcome.sent_away += 1;
                self.log(|| format!("the WAL of safekeeper {} is away", index + 1));
            }
            self.check_away(index)?;
        }
        self.settle(index)
    }

    /// Now and then a safekeeper ends in the middle of what is done with a timeline at rest.
    fn doom_soon(&mut self, index: usize) {
        if self.quiet.is_none() && self.archiving.one_in(8) {
            let after = self.archiving.between(1, 15);
            let loses_power = !self.archiving.one_in(4);
            self.doom(index, after, loses_power, 5_000);
        }
    }

    /// What is only in object storage by now is there.
    fn check_away(&self, index: usize) -> Checked {
        let node = &self.nodes[index];
        match node.has_all_segments() || self.objects.has_all_before(node.acknowledged()) {
            true => Ok(()),
            false => Err(format!("{} has removed what is not archived", node.name)),
        }
    }

    /// Somebody needs a timeline. Whether it can be had.
    pub(super) fn wake(&mut self, index: usize) -> Checked<bool> {
        if !self.nodes[index].is_resting() {
            return Ok(self.nodes[index].timeline().is_some());
        }
        self.doom_soon(index);
        let woken = self.nodes[index].wake();
        let text = match &woken {
            Woken::NotYet(why) => why,
            Woken::IsBack => "its WAL is back",
            Woken::IsOpen => "its WAL is here",
        };
        self.log(|| format!("safekeeper {} is needed: {text}", index + 1));
        self.settle(index)?;
        if let Some(timeline) = self.nodes[index].timeline() {
            self.check_archived(index, &timeline)?;
        }
        Ok(self.nodes[index].timeline().is_some())
    }
}
