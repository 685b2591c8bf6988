//! Connections between computes and safekeepers.

use super::*;

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

    pub(super) fn send(&mut self, compute: usize, node: usize, request: Request) {
        let Some(index) = self.computes[compute].links[node].connection else { return };
        if self.is_gone(index) {
            return;
        }
        let delay = self.delay(node);
        let connection = &mut self.connections[index];
        connection.to_node = (self.now + delay).max(connection.to_node + 1);
        let at = connection.to_node;
        self.at(at, Event::Arrive(index, request));
    }

    pub(super) fn reply(&mut self, index: usize, reply: Reply) {
        if self.connections[index].is_left || self.is_gone(index) {
            return;
        }
        let delay = self.delay(self.connections[index].node);
        let connection = &mut self.connections[index];
        connection.to_compute = (self.now + delay).max(connection.to_compute + 1);
        let at = connection.to_compute;
        self.at(at, Event::Answer(index, reply));
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

    pub(super) fn disconnect(&mut self, compute: usize, node: usize) {
        let link = &mut self.computes[compute].links[node];
        link.next = None;
        link.member = None;
        if let Some(connection) = link.connection.take() {
            // What is on its way still arrives; what the other end sends is heard by nobody.
            self.connections[connection].is_left = true;
        }
    }

    pub(super) fn connect(&mut self, compute: usize, node: usize) {
        let index = self.connections.len();
        self.connections.push(Connection {
            compute,
            node,
            node_life: self.nodes[node].life,
            is_dead: !self.nodes[node].is_up,
            is_left: false,
            to_node: self.now,
            to_compute: self.now,
            heard: self.now,
            inbox: Default::default(),
            is_served: false,
            proposer: None,
            asked: Term(0),
            greeted: None,
            told: 0,
        });
        let link = &mut self.computes[compute].links[node];
        link.connection = Some(index);
        link.last_heard = self.now;
        let known = self.computes[compute].configuration().map_or(0, |one| one.number());
        self.send(compute, node, Request::Greet(known));
    }
}
