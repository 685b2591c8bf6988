//! What goes wrong.

use super::*;

impl World {
    pub(super) fn trouble(&mut self, index: usize) {
        if self.quiet.is_some() {
            return;
        }
        let trouble = self.plan.troubles[index].1;
        self.log(|| format!("TROUBLE {trouble:?}"));
        match trouble {
            Trouble::Crash { node, after, loses_power, back_after } => {
                self.doom(node, after, loses_power, back_after);
            }
            Trouble::CrashAll { loses_power, back_after } => {
                for node in 0..self.nodes.len() {
                    let back_after = back_after + self.rng.below(back_after);
                    self.doom(node, 0, loses_power, back_after);
                }
            }
            Trouble::Partition { nodes, computes, lasts } => {
                self.cut.insert(index, (nodes, computes));
                self.after(lasts, Event::Heal(index));
            }
            Trouble::Break { compute, node, is_heard } => {
                if let Some(connection) = self.computes[compute].connections[node] {
                    self.connections[connection].is_dead = true;
                    if is_heard {
                        self.close(connection, true);
                    }
                }
            }
            Trouble::Kill { compute, back_after } => {
                if self.computes[compute].driver.is_some() {
                    self.end_compute(compute, back_after);
                }
            }
            Trouble::SyncFails { node, after } => self.nodes[node].disk.fail_sync_after(after),
            Trouble::Full { node, lasts } => {
                self.nodes[node].disk.set_full(true);
                self.after(lasts, Event::SpaceAgain(node));
            }
            Trouble::Slow { node, lasts } => self.slow_until[node] = self.now + lasts,
            Trouble::Wipe { node, back_after, replaced_after } => {
                self.wipe(node, back_after, replaced_after);
            }
            Trouble::LoseMost { nodes, back_after, recovered_after } => {
                self.lose_most(nodes, back_after, recovered_after);
            }
            Trouble::Members { nodes } => {
                let nodes = (0..self.nodes.len()).filter(|&node| is_in(nodes, node));
                let nodes = nodes.map(|node| self.nodes[node].member.node).collect();
                self.want(nodes);
            }
            Trouble::Rot { node, rot, part } => self.rot(node, rot, part),
            Trouble::Idle { lasts } => self.be_idle(lasts),
            Trouble::NoObjects { lasts } => {
                self.no_objects_until = self.now + lasts;
                self.objects.set_away(true);
                self.after(lasts, Event::ObjectsAgain);
            }
        }
    }

    /// The node ends after so many operations on its disk, or a little later if it has nothing to do.
    pub(super) fn doom(&mut self, index: usize, after: u64, loses_power: bool, back_after: Time) {
        let node = &mut self.nodes[index];
        if !node.is_up || node.is_doomed {
            return;
        }
        (node.is_doomed, node.loses_power, node.back_after) = (true, loses_power, back_after);
        node.disk.stop_after(after);
        let life = node.life;
        match after {
            0 => self.crash(index),
            _ => self.after(20_000, Event::Crash { node: index, life }),
        }
    }

    pub(super) fn crash(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        let (loses_power, back_after) = match node.is_doomed {
            true => (node.loses_power, node.back_after),
            // Its latch was thrown.
            false => (false, 2_000),
        };
        for number in 0..self.connections.len() {
            let connection = &mut self.connections[number];
            if connection.node != index {
                continue;
            }
            let is_open = !connection.is_dead && !connection.is_left;
            connection.is_dead = true;
            connection.listener = None;
            connection.inbox.clear();
            // Of a machine that is gone nobody says anything.
            if is_open && !loses_power {
                self.close_later(number, true);
            }
        }
        self.end_streams(index);
        self.leave_turns(index);
        self.outcome.crashes += 1;
        self.nodes[index].end(loses_power);
        self.log(|| {
            let how = if loses_power { "loses power" } else { "ends" };
            format!("safekeeper {} {how}", index + 1)
        });
        self.after(back_after, Event::Start(index));
    }

    pub(super) fn start(&mut self, index: usize) -> Checked {
        if self.nodes[index].is_retired {
            return Ok(());
        }
        self.nodes[index].start(&mut self.truth)?;
        self.register(index);
        if self.quiet.is_some() && self.commands.iter().all(|command| command.is_over) {
            // It may be one that was lost, and could not be replaced before it said who it is.
            self.last_change();
        }
        self.mend_later(index);
        self.copying[index] = false;
        let node = &self.nodes[index];
        let text = node.timeline().map(|timeline| {
            format!(
                "term {} flush {} commit {}",
                timeline.term(),
                timeline.flush_lsn(),
                timeline.commit_lsn()
            )
        });
        self.log(|| format!("safekeeper {} starts: {}", index + 1, text.unwrap_or_default()));
        if let Some(timeline) = self.nodes[index].timeline() {
            self.check_archived(index, &timeline)?;
        }
        self.settle(index)
    }

    /// From now on nothing goes wrong.
    pub(super) fn be_quiet(&mut self) {
        self.log(|| "nothing goes wrong any more".into());
        self.quiet = Some((self.now, self.truth.end()));
        self.cut.clear();
        (self.no_objects_until, self.idle_until) = (0, 0);
        self.objects.be_well();
        self.computes[0].wires.widen(wires::LEAST_WHEN_WELL);
        for index in 0..self.nodes.len() {
            self.slow_until[index] = 0;
            self.nodes[index].disk.set_full(false);
            if self.nodes[index].is_up {
                if self.nodes[index].is_doomed {
                    self.crash(index);
                }
                self.nodes[index].disk.fail_sync_after(u64::MAX);
                self.register(index);
            }
        }
        for compute in 1..self.computes.len() {
            self.end_compute(compute, 0);
        }
        self.end_campaign();
        self.last_change();
        self.may_retire = self.is_founded && self.archiving.one_in(4);
        if self.may_retire {
            // What is still on its way to be decided has come then.
            self.after(60_000, Event::Retire);
        }
        if self.nodes.iter().any(|node| node.is_rotten) {
            // Its end may be gone: what a later term commits shows that nobody depends on it.
            self.end_compute(0, 1000);
        }
        if self.computes[0].driver.is_none() {
            self.after(1000, Event::Begin(0));
        }
    }

    /// Who is no member any more is taken away for good, and with it what it could tell a compute that knows only of a time before.
    pub(super) fn retire(&mut self) {
        if self.swaps > 0 {
            // A late one may make them members.
            self.after(10_000, Event::Retire);
            return;
        }
        self.may_retire = false;
        let newest = self.quorum.chain.newest().clone();
        let is_over = self.commands.iter().all(|command| command.is_over)
            && !self.is_recovering
            && newest.incoming().is_empty()
            && !newest.all().any(|member| self.is_lost(member))
            && !self.nodes.iter().any(|node| node.is_rotten);
        if !is_over {
            return;
        }
        for index in 0..self.nodes.len() {
            if newest.contains(self.nodes[index].member) {
                continue;
            }
            if self.nodes[index].is_up {
                let node = &mut self.nodes[index];
                (node.is_doomed, node.loses_power, node.back_after) = (true, true, 0);
                self.crash(index);
            }
            self.nodes[index].is_retired = true;
            self.outcome.retired += 1;
        }
        self.end_compute(0, 1000);
    }

    /// After anything that a node did: whether it can go on, and whether what it says is true.
    pub(super) fn settle(&mut self, index: usize) -> Checked {
        if self.nodes[index].is_up && self.nodes[index].is_finished() {
            let reason = self.nodes[index].latch_reason();
            self.log(|| format!("safekeeper {} can't go on: {reason:?}", index + 1));
            self.crash(index);
            return Ok(());
        }
        self.nodes[index].look(&mut self.truth)?;
        self.outcome.brought_back += self.nodes[index].take_fetched();
        Ok(())
    }

    pub(super) fn prepare(&mut self, node: usize) {
        if !std::mem::replace(&mut self.preparing[node], true) {
            let (delay, life) = (self.rng.between(100, 3000), self.nodes[node].life);
            self.after(delay, Event::Prepare(node, life));
        }
    }
}
