//! Everything, one event after the other.

use std::collections::BTreeMap;

use pgstrata_format::quorum::Quorum;
use pgstrata_ids::{Lsn, Term, TimelineId, TimelineParameters};
use pgstrata_quorum::{
    Append, Chain, Configuration, Holding, PeerRange, Proposer, ProposerOutput, Refusal,
    TermHistory, provable_commit,
};
use pgstrata_safekeeper::storage_error::StorageError;
use pgstrata_safekeeper::timeline::{Answer, Missing};
use pgstrata_sim::Rng;
use pgstrata_sim::wal::{SEGMENT_SIZE, WalGenerator, parameters};
use pgstrata_wire::safekeeper::{Message, RefusedReason, Status};

use crate::compute::Compute;
use crate::lies::Lie;
use crate::network::{Connection, Reply, Request};
use crate::node::Node;
use crate::plan::{Plan, Time, Trouble};
use crate::truth::{Checked, Truth};

/// How often a compute looks after its connections.
const TICK: Time = 8_000;

/// Silence after which an end takes a connection for dead.
const DEAD_AFTER: Time = 30_000;

/// How often a safekeeper does what nobody asks it to.
const BACKGROUND: Time = 15_000;

/// Something new must be committed so long after nothing goes wrong any more.
const PATIENCE: Time = 2_000_000;

/// WAL that a compute writes before it waits for some to be committed, in bytes.
const MOST_PENDING: u64 = 256 << 10;

/// WAL of one run, in bytes.
const MOST_WAL: u64 = 3 << 20;

/// Events of one run: many times as many as there ever were.
const MOST_EVENTS: u64 = 100_000;

#[derive(Debug)]
enum Event {
    Begin(usize),
    Tick(usize, u64),
    Write(usize, u64),
    Arrive(usize, Request),
    Serve(usize),
    Answer(usize, Reply),
    Prepare(usize, u64),
    Background(usize),
    Conclude { node: usize, life: u64, statuses: Vec<(usize, Status)> },
    Copy { node: usize, life: u64, peer: usize, status: Box<Status>, missing: Missing, at: Lsn },
    Crash { node: usize, life: u64 },
    Start(usize),
    Trouble(usize),
    Heal(usize),
    SpaceAgain(usize),
    Quiet,
}

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// What must never be, if it was.
    pub violation: Option<String>,
    pub events: u64,
    pub simulated_us: Time,
    pub elections: u64,
    pub crashes: u64,
    pub copies: u64,
    pub archived: u64,
    pub trimmed: u64,
    pub committed_bytes: u64,
    /// What happened, if that was asked for.
    pub trace: Vec<String>,
}

impl Outcome {
    /// Counts another run's figures too.
    pub fn add(&mut self, other: &Outcome) {
        self.events += other.events;
        self.simulated_us += other.simulated_us;
        self.elections += other.elections;
        self.crashes += other.crashes;
        self.copies += other.copies;
        self.archived += other.archived;
        self.trimmed += other.trimmed;
        self.committed_bytes += other.committed_bytes;
    }
}

/// See the module.
#[derive(Debug)]
pub struct World {
    plan: Plan,
    lie: Option<Lie>,
    rng: Rng,
    now: Time,
    queue: BTreeMap<(Time, u64), Event>,
    sequence: u64,
    nodes: Vec<Node>,
    computes: Vec<Compute>,
    connections: Vec<Connection>,
    truth: Truth,
    parameters: TimelineParameters,
    quorum: Quorum,
    /// Nothing goes wrong any more; something new is to be committed beyond this.
    quiet: Option<(Time, Lsn)>,
    /// By number of the trouble: who can't reach whom.
    cut: BTreeMap<usize, (u8, u8)>,
    slow_until: Vec<Time>,
    preparing: Vec<bool>,
    copying: Vec<bool>,
    traces: bool,
    outcome: Outcome,
}

fn is_in(bits: u8, index: usize) -> bool {
    bits & (1 << index) != 0
}

impl World {
    /// The world of a plan, in which somebody may have made a mistake.
    pub fn new(plan: &Plan, lie: Option<Lie>, traces: bool) -> World {
        let mut rng = Rng::new(plan.seed ^ 0x005E_ED0F_7E57);
        let start = Lsn(3 * SEGMENT_SIZE - plan.bytes_to_boundary);
        let parameters =
            TimelineParameters { ancestor: Some(TimelineId([0x33; 16])), ..parameters(start) };
        let nodes: Vec<Node> =
            (0..plan.nodes).map(|index| Node::new(index, rng.bits(), lie)).collect();
        let members = nodes.iter().map(|node| node.member).collect();
        let chain = Chain::found(members).expect("a few members, each once");
        let computes = (0..plan.computes).map(|index| Compute::new(index, plan.nodes)).collect();
        let mut world = World {
            plan: plan.clone(),
            lie,
            rng,
            now: 0,
            queue: BTreeMap::new(),
            sequence: 0,
            slow_until: vec![0; nodes.len()],
            preparing: vec![false; nodes.len()],
            copying: vec![false; nodes.len()],
            nodes,
            computes,
            connections: Vec::new(),
            truth: Truth::new(start),
            quorum: Quorum { parameters: parameters.clone(), chain, is_older: false },
            parameters,
            quiet: None,
            cut: BTreeMap::new(),
            traces,
            outcome: Outcome::default(),
        };
        for (index, &(at, _)) in plan.troubles.iter().enumerate() {
            world.at(at, Event::Trouble(index));
        }
        for node in 0..plan.nodes {
            world.after(BACKGROUND, Event::Background(node));
        }
        for compute in 0..plan.computes {
            // Often at once.
            let most = if world.rng.one_in(3) { 300 } else { plan.quiet_at };
            let at = compute as u64 * world.rng.below(most);
            world.at(at, Event::Begin(compute));
        }
        world.at(plan.quiet_at, Event::Quiet);
        world
    }

    /// Runs it to its end.
    pub fn run(mut self) -> Outcome {
        let violation = self.go_on().err();
        // Connections hold on to timelines.
        self.connections.clear();
        self.outcome.violation = violation;
        self.outcome.simulated_us = self.now;
        self.outcome.committed_bytes = self.truth.end() - self.parameters.start_lsn;
        self.outcome
    }

    fn go_on(&mut self) -> Checked {
        loop {
            let Some(((at, _), event)) = self.queue.pop_first() else {
                return Err("nothing happens any more".into());
            };
            self.now = at;
            self.outcome.events += 1;
            if self.outcome.events > MOST_EVENTS {
                return Err("no end comes".into());
            }
            self.handle(event)?;
            if let Some((since, end)) = self.quiet {
                if self.truth.end() > end && self.nodes.iter().all(|node| node.timeline.is_some()) {
                    return self.finish();
                }
                if self.now > since + PATIENCE {
                    return Err(format!(
                        "nothing is committed beyond {} although all is well",
                        self.truth.end()
                    ));
                }
            }
        }
    }

    fn finish(&mut self) -> Checked {
        self.nodes.iter_mut().try_for_each(|node| node.check_all(&self.truth))
    }

    fn at(&mut self, at: Time, event: Event) {
        self.queue.insert((at.max(self.now), self.sequence), event);
        self.sequence += 1;
    }

    fn after(&mut self, delay: Time, event: Event) {
        self.at(self.now + delay, event);
    }

    fn log(&mut self, text: impl FnOnce() -> String) {
        if self.traces {
            let line = format!("{:>9.3} ms  {}", self.now as f64 / 1000.0, text());
            self.outcome.trace.push(line);
        }
    }

    fn handle(&mut self, event: Event) -> Checked {
        match event {
            Event::Begin(compute) => self.begin(compute),
            Event::Tick(compute, life) => return self.tick(compute, life),
            Event::Write(compute, life) => self.write(compute, life),
            Event::Arrive(connection, request) => self.arrive(connection, request),
            Event::Serve(connection) => return self.serve(connection),
            Event::Answer(connection, reply) => return self.answer(connection, reply),
            Event::Prepare(node, life) => {
                self.preparing[node] = false;
                if self.nodes[node].life == life && self.nodes[node].prepare() {
                    self.log(|| format!("safekeeper {} makes a segment ahead", node + 1));
                    self.prepare(node);
                }
                return self.settle(node);
            }
            Event::Background(node) => return self.background(node),
            Event::Conclude { node, life, statuses } => {
                return self.conclude(node, life, &statuses);
            }
            Event::Copy { node, life, peer, status, missing, at } => {
                return self.copy(node, life, peer, status, missing, at);
            }
            Event::Crash { node, life } => {
                if self.nodes[node].life == life && self.nodes[node].is_up {
                    self.crash(node);
                }
            }
            Event::Start(node) => return self.start(node),
            Event::Trouble(index) => self.trouble(index),
            Event::Heal(index) => {
                self.cut.remove(&index);
            }
            Event::SpaceAgain(node) => self.nodes[node].disk.set_full(false),
            Event::Quiet => self.be_quiet(),
        }
        Ok(())
    }

    // ------------------------------------------------------------------ what goes wrong

    fn trouble(&mut self, index: usize) {
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
                if let Some(connection) = self.computes[compute].links[node].connection {
                    self.connections[connection].is_dead = true;
                    if is_heard {
                        self.disconnect(compute, node);
                    }
                }
            }
            Trouble::Kill { compute, back_after } => {
                if self.computes[compute].proposer.is_some() {
                    self.end_compute(compute, back_after);
                }
            }
            Trouble::SyncFails { node, after } => self.nodes[node].disk.fail_sync_after(after),
            Trouble::Full { node, lasts } => {
                self.nodes[node].disk.set_full(true);
                self.after(lasts, Event::SpaceAgain(node));
            }
            Trouble::Slow { node, lasts } => self.slow_until[node] = self.now + lasts,
        }
    }

    /// The node ends after so many operations on its disk, or a little later if it has nothing to do.
    fn doom(&mut self, index: usize, after: u64, loses_power: bool, back_after: Time) {
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

    fn crash(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        let (loses_power, back_after) = match node.is_doomed {
            true => (node.loses_power, node.back_after),
            // Its latch was thrown.
            false => (false, 2_000),
        };
        for connection in self.connections.iter_mut().filter(|one| one.node == index) {
            connection.is_dead = true;
            connection.proposer = None;
            connection.greeted = None;
        }
        self.outcome.crashes += 1;
        self.nodes[index].end(loses_power);
        self.log(|| {
            let how = if loses_power { "loses power" } else { "ends" };
            format!("safekeeper {} {how}", index + 1)
        });
        self.after(back_after, Event::Start(index));
    }

    fn start(&mut self, index: usize) -> Checked {
        self.nodes[index].start(&self.truth)?;
        self.copying[index] = false;
        let node = &self.nodes[index];
        let text = node.timeline.as_ref().map(|timeline| {
            format!(
                "term {} flush {} commit {}",
                timeline.term(),
                timeline.flush_lsn(),
                timeline.commit_lsn()
            )
        });
        self.log(|| format!("safekeeper {} starts: {}", index + 1, text.unwrap_or_default()));
        self.settle(index)
    }

    /// From now on nothing goes wrong.
    fn be_quiet(&mut self) {
        self.log(|| "nothing goes wrong any more".into());
        self.quiet = Some((self.now, self.truth.end()));
        self.cut.clear();
        for index in 0..self.nodes.len() {
            self.slow_until[index] = 0;
            self.nodes[index].disk.set_full(false);
            if self.nodes[index].is_up {
                if self.nodes[index].is_doomed {
                    self.crash(index);
                }
                self.nodes[index].disk.fail_sync_after(u64::MAX);
            }
        }
        for compute in 1..self.computes.len() {
            self.end_compute(compute, 0);
        }
        if self.computes[0].proposer.is_none() {
            self.after(1000, Event::Begin(0));
        }
    }

    /// After anything that a node did: whether it can go on, and whether what it says is true.
    fn settle(&mut self, index: usize) -> Checked {
        if self.nodes[index].is_up && self.nodes[index].is_finished() {
            let reason = self.nodes[index].latch_reason();
            self.log(|| format!("safekeeper {} can't go on: {reason:?}", index + 1));
            self.crash(index);
            return Ok(());
        }
        self.nodes[index].check(&self.truth)
    }

    fn prepare(&mut self, node: usize) {
        if !std::mem::replace(&mut self.preparing[node], true) {
            let (delay, life) = (self.rng.between(100, 3000), self.nodes[node].life);
            self.after(delay, Event::Prepare(node, life));
        }
    }

    // ------------------------------------------------------------------ network

    fn is_cut(&self, compute: usize, node: usize) -> bool {
        self.cut.values().any(|&(nodes, computes)| is_in(nodes, node) != is_in(computes, compute))
    }

    fn is_cut_between(&self, one: usize, other: usize) -> bool {
        self.cut.values().any(|&(nodes, _)| is_in(nodes, one) != is_in(nodes, other))
    }

    fn delay(&mut self, node: usize) -> Time {
        let slow = self.slow_until[node] > self.now;
        let usual = self.rng.between(50, 500);
        match (slow, self.rng.one_in(20)) {
            (true, _) => usual + self.rng.below(20_000),
            (false, true) => usual + self.rng.below(3000),
            (false, false) => usual,
        }
    }

    fn send(&mut self, compute: usize, node: usize, request: Request) {
        let Some(index) = self.computes[compute].links[node].connection else { return };
        if self.is_lost(index) {
            return;
        }
        let delay = self.delay(node);
        let connection = &mut self.connections[index];
        connection.to_node = (self.now + delay).max(connection.to_node + 1);
        let at = connection.to_node;
        self.at(at, Event::Arrive(index, request));
    }

    fn reply(&mut self, index: usize, reply: Reply) {
        if self.connections[index].is_left || self.is_lost(index) {
            return;
        }
        let delay = self.delay(self.connections[index].node);
        let connection = &mut self.connections[index];
        connection.to_compute = (self.now + delay).max(connection.to_compute + 1);
        let at = connection.to_compute;
        self.at(at, Event::Answer(index, reply));
    }

    /// Whether what is sent now gets lost. Then nothing later comes through either.
    fn is_lost(&mut self, index: usize) -> bool {
        let connection = &self.connections[index];
        let is_cut = self.is_cut(connection.compute, connection.node);
        if self.lie == Some(Lie::LossWithinConnection) && !connection.is_dead {
            return is_cut || self.rng.one_in(50);
        }
        let connection = &mut self.connections[index];
        connection.is_dead |= is_cut;
        connection.is_dead
    }

    fn disconnect(&mut self, compute: usize, node: usize) {
        let link = &mut self.computes[compute].links[node];
        link.next = None;
        link.refills = false;
        if let Some(connection) = link.connection.take() {
            // What is on its way still arrives; what the other end sends is heard by nobody.
            self.connections[connection].is_left = true;
        }
    }

    fn connect(&mut self, compute: usize, node: usize) {
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
            greeted: None,
        });
        let link = &mut self.computes[compute].links[node];
        link.connection = Some(index);
        link.last_heard = self.now;
        self.send(compute, node, Request::Greet);
    }

    // ------------------------------------------------------------------ computes

    fn begin(&mut self, compute: usize) {
        if self.computes[compute].proposer.is_some() || (self.quiet.is_some() && compute > 0) {
            return;
        }
        let skipped = self.rng.below(3) as u32;
        let configuration = self.quorum.chain.newest().clone();
        self.computes[compute].begin(configuration, skipped);
        let life = self.computes[compute].life;
        self.log(|| format!("compute {compute} begins, the {life}th"));
        self.after(0, Event::Tick(compute, life));
    }

    fn end_compute(&mut self, compute: usize, back_after: Time) {
        self.log(|| format!("compute {compute} ends"));
        self.computes[compute].end();
        for node in 0..self.nodes.len() {
            self.disconnect(compute, node);
        }
        self.after(back_after, Event::Begin(compute));
    }

    fn tick(&mut self, compute: usize, life: u64) -> Checked {
        if self.computes[compute].life != life || self.computes[compute].proposer.is_none() {
            return Ok(());
        }
        for node in 0..self.nodes.len() {
            let link = &mut self.computes[compute].links[node];
            // Whoever was asked may be gone.
            link.refills = false;
            match link.connection {
                None => self.connect(compute, node),
                Some(_) if self.now > link.last_heard + DEAD_AFTER => {
                    self.disconnect(compute, node)
                }
                Some(_) => self.send(compute, node, Request::Ping),
            }
        }
        self.pump(compute);
        self.ask_last_record(compute);
        let delay = TICK + self.rng.below(TICK);
        self.after(delay, Event::Tick(compute, life));
        Ok(())
    }

    /// Feeds the proposer, and does what it says.
    fn drive(
        &mut self,
        compute: usize,
        feed: impl FnOnce(&mut Proposer, &mut Vec<ProposerOutput>),
    ) -> Checked {
        let mut outputs = Vec::new();
        let Some(proposer) = &mut self.computes[compute].proposer else { return Ok(()) };
        feed(proposer, &mut outputs);
        if let Err(error) = proposer.invariants() {
            return Err(format!(
                "the proposer of compute {compute} is not as it has to be: {error}"
            ));
        }
        for output in outputs {
            match output {
                ProposerOutput::RequestVote(member, request) => {
                    let node = self.node_of(member.node.0);
                    self.send(compute, node, Request::Vote(request));
                }
                ProposerOutput::AnnounceElected(member, elected) => {
                    let node = self.node_of(member.node.0);
                    self.computes[compute].links[node].next = None;
                    self.send(compute, node, Request::Elected(elected));
                }
                ProposerOutput::Elected(election) => {
                    self.log(|| {
                        let (term, start, donor) =
                            (election.term, election.start_lsn, election.donor.node);
                        format!("compute {compute} wins term {term} at {start}, donor {donor}")
                    });
                    self.outcome.elections += 1;
                    let (start, term) = (election.start_lsn, election.term);
                    let one = &mut self.computes[compute];
                    one.start = start;
                    let history = one.proposer.as_ref().map(|proposer| proposer.history().clone());
                    if start == self.parameters.start_lsn {
                        one.generator = Some(generator(&self.parameters, start, Lsn(8), term));
                    }
                    self.truth.elected(compute, term, start, &history.unwrap_or_default())?;
                    let (life, delay) = (self.computes[compute].life, self.rng.below(2000));
                    self.after(delay, Event::Write(compute, life));
                }
                ProposerOutput::StreamFrom(member, lsn) => {
                    let node = self.node_of(member.node.0);
                    self.computes[compute].links[node].next = Some(lsn);
                }
                ProposerOutput::Committed(lsn) => {
                    let term = self.computes[compute].term();
                    self.log(|| format!("compute {compute} has {lsn} of term {term} committed"));
                    self.truth.committed(term, lsn)?;
                }
                ProposerOutput::Fenced(term) => {
                    self.log(|| format!("compute {compute} is fenced by term {term}"));
                    let most = if self.quiet.is_some() { 10_000 } else { 150_000 };
                    let back_after = self.rng.between(2000, most);
                    self.end_compute(compute, back_after);
                    return Ok(());
                }
            }
        }
        self.pump(compute);
        Ok(())
    }

    fn node_of(&self, id: u64) -> usize {
        id as usize - 1
    }

    /// Sends each safekeeper what it lacks, and what is committed.
    fn pump(&mut self, compute: usize) {
        if !self.computes[compute].is_elected() {
            return;
        }
        for node in 0..self.nodes.len() {
            loop {
                let one = &self.computes[compute];
                let link = &one.links[node];
                let Some(next) = link.next.filter(|_| link.connection.is_some()) else { break };
                let commit_lsn = one.commit_lsn();
                if next < one.start {
                    self.refill(compute, node, next);
                    break;
                }
                let bytes = one.bytes(next, self.plan.chunk).to_vec();
                if bytes.is_empty() && link.told >= commit_lsn {
                    break;
                }
                let length = bytes.len() as u64;
                let append =
                    Append { term: one.term(), start: next, length, record_end: next, commit_lsn };
                let link = &mut self.computes[compute].links[node];
                link.next = Some(next + length);
                link.told = commit_lsn;
                self.send(compute, node, Request::Append(append, bytes));
                if length == 0 {
                    break;
                }
            }
        }
    }

    /// Asks somebody who has it for what is before the own log.
    fn refill(&mut self, compute: usize, target: usize, from: Lsn) {
        let one = &self.computes[compute];
        let (link, to, term) = (&one.links[target], one.start, one.term());
        let Some(connection) = link.connection.filter(|_| !link.refills) else { return };
        let has_it = |node: usize| {
            let flush_lsn = one
                .proposer
                .as_ref()
                .and_then(|proposer| proposer.flush_lsn_of(self.nodes[node].member));
            node != target && flush_lsn >= Some(to) && one.links[node].connection.is_some()
        };
        let donors: Vec<usize> = (0..self.nodes.len()).filter(|&node| has_it(node)).collect();
        if donors.is_empty() {
            return;
        }
        let donor = donors[self.rng.index(donors.len())];
        self.computes[compute].links[target].refills = true;
        self.send(compute, donor, Request::Read { from, to, term, target, connection });
    }

    /// Asks somebody who has it where the record before the own log begins, so that the first own one can link back to it.
    fn ask_last_record(&mut self, compute: usize) {
        let one = &self.computes[compute];
        if !one.is_elected() || one.generator.is_some() {
            return;
        }
        let has_it = |node: usize| {
            let member = self.nodes[node].member;
            let flush_lsn =
                one.proposer.as_ref().and_then(|proposer| proposer.flush_lsn_of(member));
            flush_lsn >= Some(one.start) && one.links[node].connection.is_some()
        };
        let holders: Vec<usize> = (0..self.nodes.len()).filter(|&node| has_it(node)).collect();
        if !holders.is_empty() {
            let (start, node) = (one.start, holders[self.rng.index(holders.len())]);
            self.computes[compute].asks = true;
            self.send(compute, node, Request::LastRecord(start));
        }
    }

    fn write(&mut self, compute: usize, life: u64) {
        let one = &mut self.computes[compute];
        if one.life != life || !one.is_elected() {
            return;
        }
        let pending = one.end_lsn().saturating_sub(one.commit_lsn());
        let written = one.end_lsn().saturating_sub(self.parameters.start_lsn);
        if let Some(generator) = one.generator.as_mut().filter(|_| pending < MOST_PENDING) {
            let mut bytes = Vec::new();
            for _ in 0..self.rng.between(1, 4) {
                let is_large = self.rng.one_in(60);
                let size = self.rng.below(if is_large { 30_000 } else { self.plan.record });
                bytes.extend(generator.record(size as usize));
            }
            if self.plan.switches && self.rng.one_in(25) && written < MOST_WAL {
                bytes.extend(generator.switch());
            }
            one.log.extend_from_slice(&bytes);
            let (end, term) = (one.end_lsn(), one.term());
            if let Some(proposer) = &mut one.proposer {
                proposer.appended(end);
            }
            self.truth.wrote(term, &bytes);
            self.log(|| format!("compute {compute} writes up to {end}"));
            self.pump(compute);
        }
        let delay = self.rng.between(500, 12_000);
        self.after(delay, Event::Write(compute, life));
    }

    fn answer(&mut self, index: usize, reply: Reply) -> Checked {
        let connection = &self.connections[index];
        let (compute, node) = (connection.compute, connection.node);
        let is_current = self.computes[compute].links[node].connection == Some(index);
        if connection.is_dead && self.lie != Some(Lie::LossWithinConnection) || !is_current {
            return Ok(());
        }
        let member = self.nodes[node].member;
        self.computes[compute].links[node].last_heard = self.now;
        match reply {
            Reply::Greeting { promised } => self
                .drive(compute, |proposer, outputs| proposer.connected(member, promised, outputs)),
            Reply::Vote(mut vote) => {
                if self.lie == Some(Lie::DonorIsFixed) && node > 0 {
                    vote.flush_lsn = self.parameters.start_lsn;
                    vote.history = TermHistory::default();
                }
                self.drive(compute, |proposer, outputs| proposer.vote(member, vote, outputs))
            }
            Reply::Ack(ack) => {
                let other = self.nodes[(node + 1) % self.nodes.len()].member;
                if self.lie == Some(Lie::AckCountsTwice) {
                    self.drive(compute, |proposer, outputs| proposer.ack(other, ack, outputs))?;
                }
                self.drive(compute, |proposer, outputs| proposer.ack(member, ack, outputs))?;
                let one = &self.computes[compute];
                if !one.asks && ack.flush_lsn >= one.start {
                    self.ask_last_record(compute);
                }
                Ok(())
            }
            Reply::LastRecord(found) => {
                let parameters = self.parameters.clone();
                let one = &mut self.computes[compute];
                one.asks = false;
                if let Some(prev) = found.filter(|_| one.is_elected() && one.generator.is_none()) {
                    one.generator = Some(generator(&parameters, one.start, prev, one.term()));
                }
                Ok(())
            }
            Reply::Read { from, bytes, target, connection } => {
                let one = &mut self.computes[compute];
                let (term, commit_lsn) = (one.term(), one.commit_lsn());
                let link = &mut one.links[target];
                if link.connection != Some(connection) || link.next != Some(from) {
                    return Ok(());
                }
                link.refills = false;
                if bytes.is_empty() {
                    return Ok(());
                }
                let length = bytes.len() as u64;
                link.next = Some(from + length);
                let append = Append { term, start: from, length, record_end: from, commit_lsn };
                self.send(compute, target, Request::Append(append, bytes));
                self.pump(compute);
                Ok(())
            }
            Reply::Refused(RefusedReason::Quorum(Refusal::Fenced { promised })) => {
                self.disconnect(compute, node);
                self.drive(compute, |proposer, outputs| proposer.outranked(promised, outputs))
            }
            Reply::Refused(_) => {
                self.disconnect(compute, node);
                Ok(())
            }
        }
    }

    // ------------------------------------------------------------------ safekeepers

    fn arrive(&mut self, index: usize, request: Request) {
        let delay = if self.rng.one_in(4) { self.rng.below(2000) } else { 0 };
        let connection = &mut self.connections[index];
        let node = &self.nodes[connection.node];
        if (connection.is_dead && self.lie != Some(Lie::LossWithinConnection))
            || node.life != connection.node_life
        {
            connection.is_dead = true;
            return;
        }
        connection.heard = self.now;
        connection.inbox.push_back(request);
        if !std::mem::replace(&mut connection.is_served, true) {
            self.after(delay, Event::Serve(index));
        }
    }

    /// Looks at all that has arrived, as the connection's thread does.
    fn serve(&mut self, index: usize) -> Checked {
        self.connections[index].is_served = false;
        while let Some(request) = self.connections[index].inbox.pop_front() {
            let node = self.connections[index].node;
            if self.nodes[node].life != self.connections[index].node_life {
                return Ok(());
            }
            let goes_on = match request {
                Request::Append(..) | Request::Ping => self.serve_appends(index, node, request)?,
                other => self.serve_one(index, node, other)?,
            };
            self.settle(node)?;
            if !goes_on {
                self.hang_up(index);
                return Ok(());
            }
        }
        Ok(())
    }

    fn hang_up(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        connection.inbox.clear();
        connection.proposer = None;
        connection.greeted = None;
        // What was sent last still arrives.
        connection.node_life = u64::MAX;
    }

    fn serve_appends(&mut self, index: usize, node: usize, first: Request) -> Checked<bool> {
        let Some(timeline) = self.nodes[node].timeline.clone() else { return Ok(false) };
        if self.connections[index].greeted.is_none() {
            return Ok(false);
        }
        let lie = self.lie;
        let mut batch = timeline.batch();
        let mut refusal: Result<Answer, StorageError> = Ok(None);
        let mut next = Some(first);
        while let Some(request) = next.take() {
            if let Request::Append(mut append, bytes) = request {
                if lie == Some(Lie::StaleAppendTaken) {
                    append.term = timeline.term();
                }
                refusal = batch.append(&append, &bytes);
                if !matches!(refusal, Ok(None)) {
                    break;
                }
            }
            let inbox = &mut self.connections[index].inbox;
            if matches!(inbox.front(), Some(Request::Append(..) | Request::Ping)) {
                next = inbox.pop_front();
            }
        }
        if !matches!(refusal, Ok(None)) {
            drop(batch);
            return self.give(index, node, refusal);
        }
        let answer = batch.finish();
        self.prepare(node);
        if answer.is_ok() {
            self.nodes[node].promise(&timeline, None);
        }
        let goes_on = self.give(index, node, answer);
        timeline.wake_readers();
        goes_on
    }

    /// Sends an answer, if the node is still there to do so. False if it ends the connection.
    fn give(
        &mut self,
        index: usize,
        node: usize,
        answer: Result<Answer, StorageError>,
    ) -> Checked<bool> {
        let message = match answer {
            Ok(None) => return Ok(true),
            Ok(Some(message)) => message,
            Err(error) => {
                let text = error.to_string();
                self.log(|| format!("safekeeper {}: {text}", node + 1));
                Message::Refused(RefusedReason::Storage(text))
            }
        };
        if self.nodes[node].disk.has_stopped() {
            return Ok(false);
        }
        let reply = match message {
            Message::Vote(vote) => Reply::Vote(vote),
            Message::Ack(ack) => Reply::Ack(ack),
            Message::Refused(reason) => {
                self.check_refusal(node, &reason)?;
                Reply::Refused(reason)
            }
            other => return Err(format!("safekeeper {} answers {other:?}", node + 1)),
        };
        let goes_on = !matches!(reply, Reply::Refused(_));
        self.reply(index, reply);
        Ok(goes_on)
    }

    /// Some refusals say that what must never be was.
    fn check_refusal(&mut self, node: usize, reason: &RefusedReason) -> Checked {
        self.log(|| format!("safekeeper {} refuses: {reason}", node + 1));
        match reason {
            RefusedReason::Quorum(Refusal::Fenced { .. }) | RefusedReason::Storage(_) => Ok(()),
            other => Err(format!("safekeeper {} refuses: {other}", node + 1)),
        }
    }

    fn serve_one(&mut self, index: usize, node: usize, request: Request) -> Checked<bool> {
        if let Request::Greet = request {
            if !self.nodes[node].create(&self.quorum) || self.nodes[node].is_finished() {
                return Ok(false);
            }
            let Some(timeline) = &self.nodes[node].timeline else { return Ok(false) };
            self.connections[index].greeted = Some(timeline.compute_connected());
            let promised = timeline.term();
            self.reply(index, Reply::Greeting { promised });
            return Ok(true);
        }
        let Some(timeline) = self.nodes[node].timeline.clone() else { return Ok(false) };
        match request {
            Request::Vote(request) => {
                let mut answer = timeline.vote(&request);
                let mut voted_for = None;
                if let Ok(Some(Message::Vote(vote))) = &mut answer {
                    if self.lie == Some(Lie::VoteForgetsTerm) {
                        vote.history = vote.history.up_to(vote.flush_lsn);
                    }
                    if self.lie == Some(Lie::VoteTwice) && vote.term == request.term {
                        vote.granted = true;
                    }
                    let (granted, flush_lsn) = (vote.granted, vote.flush_lsn);
                    self.log(|| {
                        format!(
                            "safekeeper {} votes in term {}: {granted}, {flush_lsn}",
                            node + 1,
                            request.term
                        )
                    });
                    voted_for = granted.then_some(request.proposer);
                }
                if answer.is_ok() {
                    self.nodes[node].promise(&timeline, voted_for);
                }
                self.give(index, node, answer)
            }
            Request::Elected(elected) => {
                self.nodes[node].begin(&elected.history, Lsn::MAX);
                let answer = timeline.elected(&elected);
                self.prepare(node);
                if answer.is_ok() {
                    self.nodes[node].promise(&timeline, None);
                }
                self.connections[index].proposer = Some(timeline.proposer_connected());
                self.give(index, node, answer)
            }
            Request::LastRecord(end) => {
                let found = match end <= timeline.flush_lsn() {
                    true => timeline.last_record_before(end).ok().flatten(),
                    false => None,
                };
                self.reply(index, Reply::LastRecord(found));
                Ok(true)
            }
            Request::Read { from, to, term, target, connection } => {
                let mut bytes = vec![0; self.plan.chunk.max(4096)];
                let read = timeline.read_range(from, to, term);
                let count = read.and_then(|mut reading| reading.next(&mut bytes));
                bytes.truncate(count.unwrap_or(0));
                self.reply(index, Reply::Read { from, bytes, target, connection });
                Ok(true)
            }
            Request::Greet | Request::Append(..) | Request::Ping => Ok(true),
        }
    }

    // ------------------------------------------------------------------ what safekeepers do by themselves

    fn background(&mut self, index: usize) -> Checked {
        let delay = BACKGROUND + self.rng.below(BACKGROUND);
        self.after(delay, Event::Background(index));
        for connection in self.connections.iter_mut().filter(|one| one.node == index) {
            if self.now > connection.heard + 2 * DEAD_AFTER {
                connection.proposer = None;
                connection.greeted = None;
            }
        }
        let Some(timeline) = self.nodes[index].timeline.clone() else { return Ok(()) };
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
        if self.nodes[index].timeline.is_some() {
            self.archive(index)?;
            self.settle(index)?;
        }
        if self.nodes[index].timeline.is_some() && !timeline.has_proposer() && !self.copying[index]
        {
            self.ask_peers(index);
        }
        Ok(())
    }

    /// Stores the next full segment, and removes those that nobody needs.
    fn archive(&mut self, index: usize) -> Checked {
        let Some(timeline) = self.nodes[index].timeline.clone() else { return Ok(()) };
        let (from, commit_lsn) = (timeline.marks().archived_lsn, timeline.commit_lsn());
        let size = timeline.files().segment_size();
        let to = from.segment_start(size) + size;
        if to <= commit_lsn {
            let number = from.segment_number(size);
            let name = self.nodes[index].name.clone();
            let found = self.nodes[index].segment(&timeline, number);
            match found {
                _ if self.lie == Some(Lie::TrimBeforeArchive) => timeline.note_archived(to),
                Some(bytes) => {
                    let from = Lsn(number * size).max(self.parameters.start_lsn);
                    self.truth.check_served(&name, from, &bytes)?;
                    self.truth.archive(&name, number, bytes)?;
                    timeline.note_archived(to);
                    self.outcome.archived += 1;
                }
                None => {
                    return Err(format!("{name} lacks segment {number}, which is not archived"));
                }
            }
        }
        let consistent =
            commit_lsn.0 - self.rng.below(40_000).min(commit_lsn.0 - self.parameters.start_lsn.0);
        timeline.note_consistent(Lsn(consistent));
        let trimmed = timeline.trim();
        if let Ok(count @ 1..) = trimmed {
            self.outcome.trimmed += count;
            self.log(|| format!("safekeeper {} removes {count} segments", index + 1));
        }
        let available = timeline.marks().available_lsn;
        let first = self.parameters.start_lsn.segment_number(size);
        match (first..available.segment_number(size))
            .find(|&number| !self.truth.is_archived(number))
        {
            Some(number) => Err(format!(
                "safekeeper {} removes segment {number}, which is not archived",
                index + 1
            )),
            None => Ok(()),
        }
    }

    fn ask_peers(&mut self, index: usize) {
        let mut statuses = Vec::new();
        for peer in 0..self.nodes.len() {
            if peer == index || self.is_cut_between(peer, index) {
                continue;
            }
            let Some(timeline) = &self.nodes[peer].timeline else { continue };
            let Ok(mut status) = timeline.status() else { continue };
            if self.lie == Some(Lie::CopyBeyondCommit) {
                status.commit_lsn = status.flush_lsn;
            }
            statuses.push((peer, status));
        }
        if !statuses.is_empty() {
            self.copying[index] = true;
            let (delay, life) = (self.delay(index), self.nodes[index].life);
            self.after(delay, Event::Conclude { node: index, life, statuses });
        }
    }

    /// As `background::catch_up` does.
    fn conclude(&mut self, index: usize, life: u64, asked: &[(usize, Status)]) -> Checked {
        let timeline =
            self.nodes[index].timeline.clone().filter(|_| self.nodes[index].life == life);
        let Some(timeline) = timeline else { return Ok(()) };
        self.copying[index] = false;
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
        if let Some(missing) = missing {
            let (peer, status) = asked[missing.peer].clone();
            self.log(|| {
                format!(
                    "safekeeper {} lacks {} to {} of {}",
                    index + 1,
                    missing.from,
                    missing.target,
                    peer + 1
                )
            });
            self.copying[index] = true;
            let (delay, at) = (self.delay(index), missing.from);
            let status = Box::new(status);
            self.after(delay, Event::Copy { node: index, life, peer, status, missing, at });
        }
        Ok(())
    }

    /// What the logs prove is committed, whether or not a compute ever heard of it.
    fn note_proof(&mut self, own: &Option<(Holding, Configuration)>, peers: &[Status]) -> Checked {
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

    fn copy(
        &mut self,
        index: usize,
        life: u64,
        peer: usize,
        status: Box<Status>,
        missing: Missing,
        at: Lsn,
    ) -> Checked {
        let timeline =
            self.nodes[index].timeline.clone().filter(|_| self.nodes[index].life == life);
        let Some(timeline) = timeline else { return Ok(()) };
        self.copying[index] = false;
        if timeline.has_proposer() || self.is_cut_between(peer, index) {
            return Ok(());
        }
        let to = missing.target.min(at + (self.plan.chunk as u64).max(4096));
        let bytes = match at < status.available_lsn {
            true => self.truth.archived(at, to, SEGMENT_SIZE).to_vec(),
            false => {
                let Some(donor) = self.nodes[peer].timeline.clone() else { return Ok(()) };
                let mut bytes = vec![0; (to - at) as usize];
                let term = Term(0);
                let read =
                    donor.read_range(at, to, term).and_then(|mut reading| reading.next(&mut bytes));
                bytes.truncate(read.unwrap_or(0));
                bytes
            }
        };
        if bytes.is_empty() {
            return Ok(());
        }
        let range = missing.range(&status, at, bytes.len());
        let next = at + bytes.len() as u64;
        let is_last = next >= missing.target;
        self.take(index, &range, &bytes)?;
        if self.nodes[index].life == life && !is_last {
            self.copying[index] = true;
            let delay = self.delay(index);
            self.after(delay, Event::Copy { node: index, life, peer, status, missing, at: next });
        }
        Ok(())
    }

    fn take(&mut self, index: usize, range: &PeerRange, bytes: &[u8]) -> Checked {
        let Some(timeline) = self.nodes[index].timeline.clone() else { return Ok(()) };
        self.nodes[index].begin(&range.history.up_to(range.commit_lsn), range.commit_lsn);
        let answer = timeline.peer_range(range, bytes);
        self.outcome.copies += 1;
        match answer {
            Ok(answer) => {
                if let Some(Message::Refused(reason)) = &answer {
                    // A proposer that came meanwhile may have led it elsewhere, with all that is committed.
                    self.log(|| format!("safekeeper {} doesn't take that: {reason}", index + 1));
                }
                self.nodes[index].promise(&timeline, None);
                self.prepare(index);
            }
            Err(error) => self.log(|| format!("safekeeper {}: {error}", index + 1)),
        }
        self.settle(index)
    }
}

fn generator(parameters: &TimelineParameters, at: Lsn, prev: Lsn, term: Term) -> WalGenerator {
    WalGenerator::new(parameters.clone(), at, prev).numbered(term.0)
}
