//! Connections between computes and safekeepers.

use pgstrata_ids::NodeId;

use crate::visit::bytes_of;

use super::*;

/// So long a connection is tried to be made to a machine that does not answer.
const NO_ANSWER: Time = 20_000;

/// So many bytes are under way at once, at least, when all is well.
pub(super) const LEAST_WHEN_WELL: usize = 4 << 10;

impl World {
    pub(super) fn is_cut(&self, compute: usize, node: usize) -> bool {
        self.cut.values().any(|&(nodes, computes)| is_in(nodes, node) != is_in(computes, compute))
    }

    pub(super) fn is_cut_between(&self, one: usize, other: usize) -> bool {
        self.cut.values().any(|&(nodes, _)| is_in(nodes, one) != is_in(nodes, other))
    }

    pub(super) fn delay(&mut self, node: usize) -> Time {
        let slow = self.slow_until[node] > self.now;
        let usual = self.rng.between(50, 500);
        match (slow, self.rng.one_in(20)) {
            (true, _) => usual + self.rng.below(20_000),
            (false, true) => usual + self.rng.below(3000),
            (false, false) => usual,
        }
    }

    /// When what is sent to the safekeeper now gets there.
    fn arrival_at_node(&mut self, index: usize) -> Time {
        let delay = self.delay(self.connections[index].node);
        let connection = &mut self.connections[index];
        connection.to_node = (self.now + delay).max(connection.to_node + 1);
        connection.to_node
    }

    fn arrival_at_compute(&mut self, index: usize) -> Time {
        let delay = self.delay(self.connections[index].node);
        let connection = &mut self.connections[index];
        connection.to_compute = (self.now + delay).max(connection.to_compute + 1);
        connection.to_compute
    }

    /// Says something to a safekeeper, for who has no wire.
    pub(super) fn send(&mut self, index: usize, message: &Message<'_>) {
        self.send_bytes(index, bytes_of(message));
    }

    /// The other end is closed: the safekeeper hears of it after what was sent before.
    pub(super) fn leave(&mut self, index: usize) {
        self.connections[index].is_left = true;
        if !self.is_gone(index) {
            let at = self.arrival_at_node(index);
            self.at(at, Event::Arrive(index, Parcel::Leave));
        }
    }

    /// Bytes of a compute's, as they are: in one piece, or two.
    pub(super) fn send_bytes(&mut self, index: usize, mut bytes: Vec<u8>) {
        // Whole messages are lost, where they are.
        let loses_messages = self.lie == Some(Lie::LossWithinConnection);
        if !loses_messages && self.is_gone(index) {
            return;
        }
        if bytes.len() > 1 && self.rng.one_in(6) {
            let rest = bytes.split_off(self.rng.between(1, bytes.len() as u64 - 1) as usize);
            let at = self.arrival_at_node(index);
            self.at(at, Event::Arrive(index, Parcel::Bytes(bytes)));
            bytes = rest;
        }
        let at = self.arrival_at_node(index);
        self.at(at, Event::Arrive(index, Parcel::Bytes(bytes)));
    }

    /// An answer goes on its way, as these bytes unless somebody makes a mistake with it.
    pub(super) fn deliver(&mut self, index: usize, mut reply: Reply, mut bytes: Vec<u8>) {
        if self.connections[index].is_left || self.is_gone(index) {
            return;
        }
        let compute = self.connections[index].compute;
        if compute == self.campaign_index() {
            let at = self.arrival_at_compute(index);
            self.at(at, Event::Answer(index, reply));
            return;
        }
        if self.tamper(index, compute, &mut reply) {
            bytes = bytes_of(&reply.message());
        }
        let mut index = index;
        if self.lie == Some(Lie::AnswerToAnother) && self.rng.one_in(4) {
            let node = self.connections[index].node;
            let others = self.computes.iter().filter(|other| other.index != compute);
            index = others.filter_map(|other| other.connections[node]).next().unwrap_or(index);
        }
        // In one piece or two.
        if self.rng.one_in(6) {
            let rest = bytes.split_off(self.rng.between(1, bytes.len() as u64 - 1) as usize);
            let at = self.arrival_at_compute(index);
            self.at(at, Event::Receive(index, bytes));
            bytes = rest;
        }
        let at = self.arrival_at_compute(index);
        self.at(at, Event::Receive(index, bytes));
    }

    /// Mistakes that answers can have. Whether there was one.
    fn tamper(&mut self, index: usize, compute: usize, reply: &mut Reply) -> bool {
        let node = self.connections[index].node;
        let one = &self.computes[compute];
        let goes_on = one.won > Term(0) && !one.is_elected();
        match (self.lie, reply) {
            (Some(Lie::DonorIsFixed), Reply::Vote(vote)) if node > 0 => {
                vote.flush_lsn = self.parameters.start_lsn;
                vote.history = TermHistory::default();
            }
            (Some(Lie::AnyLogLedOn), Reply::Vote(vote)) if goes_on => {
                vote.flush_lsn = one.written.record_end;
                vote.history = one.history.clone();
            }
            (Some(Lie::AnyLogLedOn), Reply::Greeting(greeting)) if one.won > Term(0) => {
                greeting.term = Term(0);
            }
            (Some(Lie::VoteTwice), Reply::Vote(vote)) => {
                vote.granted = true;
            }
            (Some(Lie::AckAhead), Reply::Ack(ack)) => {
                ack.flush_lsn = ack.flush_lsn.max(self.connections[index].sent);
            }
            (Some(Lie::VoteOfBefore), Reply::Vote(vote)) => {
                let asked = vote.clone();
                let first = self.votes[node].get_or_insert(asked);
                vote.flush_lsn = first.flush_lsn;
                vote.history = first.history.clone();
                vote.commit_lsn = first.commit_lsn;
            }
            (Some(Lie::AckCountsTwice), Reply::Ack(ack)) => {
                let other = one.connections[(node + 1) % self.plan.nodes];
                let bytes = bytes_of(&Message::Ack(*ack));
                if let Some(other) = other.filter(|other| self.connections[*other].is_answered) {
                    let at = self.arrival_at_compute(other);
                    self.at(at, Event::Receive(other, bytes));
                }
            }
            _ => return false,
        }
        true
    }

    /// Bytes come to a compute.
    pub(super) fn receive(&mut self, index: usize, bytes: &[u8]) {
        let connection = &self.connections[index];
        let compute = connection.compute;
        if connection.is_dead && self.lie != Some(Lie::LossWithinConnection) {
            return;
        }
        if self.computes[compute].life == connection.compute_life {
            self.computes[compute].wires.receive(index, bytes);
            self.wake_compute(compute);
        }
    }

    /// The compute hears that a connection is over.
    pub(super) fn close(&mut self, index: usize, is_reset: bool) {
        let connection = &self.connections[index];
        let compute = connection.compute;
        if compute == self.campaign_index()
            || self.is_cut(compute, connection.node)
            || self.computes[compute].life != connection.compute_life
        {
            return;
        }
        self.outcome.closed += 1;
        self.computes[compute].wires.close(index, is_reset);
        self.wake_compute(compute);
    }

    /// The safekeeper's end is gone: the other one hears of it after what was sent before.
    pub(super) fn close_later(&mut self, index: usize, is_reset: bool) {
        let at = self.arrival_at_compute(index);
        self.at(at, Event::Close(index, is_reset));
    }

    /// Whether what is sent now gets lost. Then nothing later comes through either.
    pub(super) fn is_gone(&mut self, index: usize) -> bool {
        let connection = &self.connections[index];
        let is_cut = self.is_cut(connection.compute, connection.node);
        if self.lie == Some(Lie::LossWithinConnection) && !connection.is_dead {
            return is_cut || self.rng.one_in(50);
        }
        let connection = &mut self.connections[index];
        connection.is_dead |= is_cut;
        connection.is_dead
    }

    pub(super) fn connect(&mut self, compute: usize, node: usize) -> usize {
        let index = self.connections.len();
        self.connections.push(Connection {
            compute,
            compute_life: self.computes.get(compute).map_or(0, |one| one.life),
            node,
            node_life: self.nodes[node].life,
            is_dead: !self.nodes[node].is_up,
            is_left: false,
            to_node: self.now,
            to_compute: self.now,
            heard: self.now,
            bytes: Vec::new(),
            sent: Lsn::INVALID,
            inbox: Default::default(),
            is_over: false,
            is_served: false,
            listener: self.listener(node),
            is_answered: false,
        });
        index
    }

    /// A compute wants to be connected to a safekeeper.
    pub(super) fn dial(&mut self, compute: usize, token: u64, node: NodeId) {
        let index = self.node_of(node.0);
        let life = self.computes[compute].life;
        let is_there = self.nodes[index].is_up || !self.nodes[index].loses_power;
        let delay = match self.is_cut(compute, index) || !is_there {
            true => NO_ANSWER,
            false => 2 * self.delay(index),
        };
        self.after(delay, Event::Dialed { compute, life, token, node: index });
    }

    pub(super) fn dialed(&mut self, compute: usize, life: u64, token: u64, node: usize) {
        if self.computes[compute].life != life || self.computes[compute].driver.is_none() {
            return;
        }
        let wires = self.computes[compute].wires.clone();
        if self.is_cut(compute, node) {
            wires.failed(token, std::io::ErrorKind::TimedOut);
        } else if !self.nodes[node].is_up {
            wires.failed(token, std::io::ErrorKind::ConnectionRefused);
        } else {
            self.outcome.dials += 1;
            let index = self.connect(compute, node);
            let mut window = [300, 4 << 10, 64 << 10, 256 << 10][self.rng.index(4)];
            if self.quiet.is_some() {
                // A queue of a mebibyte has to come to its end.
                window = window.max(LEAST_WHEN_WELL);
            }
            wires.made(token, index, window);
            self.computes[compute].connections[node] = Some(index);
        }
        self.wake_compute(compute);
    }
}
