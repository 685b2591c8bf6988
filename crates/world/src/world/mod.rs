//! Everything, one event after the other.

mod alone;
mod archive;
mod campaign;
mod computes;
mod following;
mod leading;
mod members;
mod recovery;
mod rest;
mod rot;
mod safekeepers;
mod trouble;
mod wires;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_format::quorum::Quorum;
use pgstrata_ids::{Lsn, Member, Term, TimelineId, TimelineParameters};
use pgstrata_quorum::{
    Append, Chain, Configuration, Holding, Proposer, ProposerOutput, Refusal, TermHistory, Vote,
    provable_commit,
};
use pgstrata_safekeeper::archive::ArchiveReader;
use pgstrata_safekeeper::decisions::Decisions;
use pgstrata_safekeeper::pace::Pace;
use pgstrata_safekeeper::storage_error::StorageError;
use pgstrata_safekeeper::timeline::Missing;
use pgstrata_safekeeper::timelines::TimelineKey;
use pgstrata_sim::Rng;
use pgstrata_sim::wal::{WalGenerator, parameters};
use pgstrata_wire::safekeeper::{Message, RefusedReason, Status};

use crate::ancestor::ancestor;
use crate::campaign::Campaign;
use crate::compute::Compute;
use crate::follower::{Follower, Stream};
use crate::lies::Lie;
use crate::network::{Connection, Parcel, Reply};
use crate::node::{Node, Outside};
use crate::objects::Objects;
use crate::plan::{Plan, Time, Trouble};
use crate::truth::{Checked, Truth};
use crate::visit::{Visit, pace};

use self::archive::{Between, Here, Turn};
use self::members::{Command, Stage};

/// Less than PostgreSQL's smallest: most of what a run did would be to make segments and to look at them, and there are more
/// ends of them for each byte.
const SEGMENT_SIZE: u64 = 64 << 10;

/// Silence after which an end takes a connection for dead.
const DEAD_AFTER: Time = 30_000;

/// How often a safekeeper does what nobody asks it to.
const BACKGROUND: Time = 15_000;

/// Something new must be committed so long after nothing goes wrong any more.
const PATIENCE: Time = 2_000_000;

/// WAL that a compute writes before it waits for some to be committed, in bytes.
const MOST_PENDING: u64 = 96 << 10;

/// WAL of one run, in bytes.
const MOST_WAL: u64 = 512 << 10;

/// Events of one run: many times as many as there ever were.
const MOST_EVENTS: u64 = 100_000;

#[derive(Debug)]
enum Event {
    Begin(usize),
    /// The driver of a compute, by its life, goes on after this one of its turns.
    Turn(usize, u64, u64),
    Dialed {
        compute: usize,
        life: u64,
        token: u64,
        node: usize,
    },
    LastRecord {
        compute: usize,
        life: u64,
        node: usize,
    },
    Write(usize, u64, Term),
    Arrive(usize, Parcel),
    Serve(usize),
    /// To a safekeeper that has members elect.
    Answer(usize, Reply),
    /// By a compute.
    Receive(usize, Vec<u8>),
    /// A compute hears that a connection is over.
    Close(usize, bool),
    Prepare(usize, u64),
    Background(usize),
    Conclude {
        node: usize,
        life: u64,
        statuses: Vec<(usize, Status)>,
    },
    Copy {
        node: usize,
        life: u64,
        peer: usize,
        status: Box<Status>,
        missing: Missing,
        at: Lsn,
        /// Where the log ended when that began.
        begun: Lsn,
    },
    Crash {
        node: usize,
        life: u64,
    },
    Start(usize),
    Trouble(usize),
    Heal(usize),
    SpaceAgain(usize),
    ObjectsAgain,
    /// A step of a change of members, by the number of its command.
    Steward(usize, Stage),
    /// The election without a compute goes on, and is over.
    TickCampaign(u64),
    EndCampaign(u64),
    /// Members whose directories are lost are replaced.
    Replace,
    /// An operator has who is left go on.
    Recover,
    /// The page server goes on, by its life and the number of its turn.
    Follow(u64, u64),
    /// By it, to a safekeeper; and by a safekeeper, to it.
    Ask(usize, Vec<u8>),
    Stream(usize, Vec<u8>),
    /// A safekeeper looks whether there is more for it.
    Feed(usize),
    /// A safekeeper tries to mend what is damaged.
    Mend(usize),
    /// Object storage is asked, or answers, in the turn of this number.
    Archive(u64),
    Quiet,
    Retire,
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
    /// Those of them that were of what a term began with.
    pub beginnings: u64,
    /// Objects of WAL, and those of them that were of a segment's beginning.
    pub archived: u64,
    pub tails: u64,
    /// How often the archive was asked how far it goes, and read instead of a member.
    pub archive_asked: u64,
    pub archive_reads: u64,
    pub trimmed: u64,
    /// Decisions about members.
    pub changes: u64,
    /// Timelines that computes had founded.
    pub founded: u64,
    /// Safekeepers that were taken away for good.
    pub retired: u64,
    /// Directories that were lost.
    pub wipes: u64,
    /// Times that a majority was given up, and those of them where all were; and bytes that were committed, and given up.
    pub recoveries: u64,
    pub restorations: u64,
    pub given_up_bytes: u64,
    /// Streams of the page server, and bytes that came on them.
    pub streams: u64,
    pub followed_bytes: u64,
    /// Pieces that computes read from their files for members, and connections that they made.
    pub file_reads: u64,
    pub dials: u64,
    /// Those that had to wait for room, and those that ended other than by their compute.
    pub blocked: u64,
    pub closed: u64,
    /// Computes whose log went on with other members.
    pub led_on: u64,
    /// Newcomers whose log begins where others had removed what is before.
    pub horizons: u64,
    /// Logs of which something rotted, and those that were mended.
    pub rots: u64,
    pub mended: u64,
    /// Timelines that came to rest, those of which the WAL was removed, and those that got it back.
    pub rests: u64,
    pub sent_away: u64,
    pub brought_back: u64,
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
        self.beginnings += other.beginnings;
        self.archived += other.archived;
        self.tails += other.tails;
        self.archive_asked += other.archive_asked;
        self.archive_reads += other.archive_reads;
        self.trimmed += other.trimmed;
        self.changes += other.changes;
        self.founded += other.founded;
        self.retired += other.retired;
        self.wipes += other.wipes;
        self.recoveries += other.recoveries;
        self.restorations += other.restorations;
        self.given_up_bytes += other.given_up_bytes;
        self.streams += other.streams;
        self.followed_bytes += other.followed_bytes;
        self.file_reads += other.file_reads;
        self.dials += other.dials;
        self.blocked += other.blocked;
        self.closed += other.closed;
        self.led_on += other.led_on;
        self.horizons += other.horizons;
        self.rots += other.rots;
        self.mended += other.mended;
        self.rests += other.rests;
        self.sent_away += other.sent_away;
        self.brought_back += other.brought_back;
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
    /// When that was 0, by the clock that drivers are shown.
    begun: Instant,
    queue: BTreeMap<(Time, u64), Event>,
    sequence: u64,
    nodes: Vec<Node>,
    computes: Vec<Compute>,
    /// First terms of computes that nobody knew before.
    newcomers: BTreeSet<Term>,
    campaign: Campaign,
    connections: Vec<Connection>,
    /// The first vote of each safekeeper, for those who make mistakes with it.
    votes: Vec<Option<Vote>>,
    truth: Truth,
    parameters: TimelineParameters,
    /// Who the members are, as it was decided last.
    quorum: Quorum,
    /// Before that what stands there does not.
    is_founded: bool,
    /// A page server, in some worlds, and its streams.
    follower: Option<Follower>,
    streams: Vec<Stream>,
    /// For what it meets.
    following: Rng,
    /// An operator is at it.
    is_recovering: bool,
    /// Nobody has anything of the timeline any more, nor has the archive.
    is_all_lost: bool,
    /// Decisions that are on their way.
    swaps: u64,
    /// Those who are no members are still to be taken away.
    may_retire: bool,
    /// What everybody has of object storage.
    outside: Outside,
    /// What each safekeeper takes in its time.
    paces: Vec<Arc<Pace>>,
    is_mend_due: Vec<bool>,
    commands: Vec<Command>,
    no_objects_until: Time,
    /// No compute begins before.
    idle_until: Time,
    objects: Objects,
    /// For what archiving meets.
    archiving: Rng,
    /// What each safekeeper archives in, and what it knows between its turns.
    here: Vec<Arc<Here>>,
    between: Vec<Option<Between>>,
    turns: BTreeMap<u64, Turn>,
    /// Those with which safekeepers catch up.
    readers: Vec<Option<ArchiveReader>>,
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
        let parameters = TimelineParameters {
            ancestor: Some(TimelineId([0x33; 16])),
            segment_size: SEGMENT_SIZE as u32,
            ..parameters(start)
        };
        let (before, bytes) = ancestor(&parameters);
        // Numbers of its own: what else a seed means stays as it was.
        let mut archiving = Rng::new(plan.seed ^ 0x0A2C_417E);
        let objects = Objects::new(parameters.clone(), bytes, archiving.fork(), lie);
        let outside = Outside {
            key: (parameters.tenant, parameters.timeline),
            decisions: Decisions::new(objects.raw(), objects.handle()),
            archive: Arc::clone(&objects.archive),
        };
        let nodes: Vec<Node> = (0..plan.slots)
            .map(|index| Node::new(index, rng.bits(), lie, outside.clone()))
            .collect();
        let members = nodes.iter().take(plan.nodes).map(|node| node.member).collect();
        let chain = Chain::found(members).expect("a few members, each once");
        let mut here = Vec::new();
        // What a branch begins with may be on some members only.
        let all_have_it = !archiving.one_in(4);
        for node in &nodes {
            let has_it = all_have_it || archiving.one_in(2);
            let before = has_it.then(|| Arc::clone(&before));
            here.push(Arc::new(Here::new(node.member.node, plan.tail_after, before)));
        }
        let is_founded = archiving.one_in(2);
        let computes: Vec<Compute> =
            (0..plan.computes).map(|index| Compute::new(index, plan.slots)).collect();
        let mut world = World {
            plan: plan.clone(),
            lie,
            rng,
            now: 0,
            begun: Instant::now(),
            queue: BTreeMap::new(),
            sequence: 0,
            slow_until: vec![0; nodes.len()],
            preparing: vec![false; nodes.len()],
            copying: vec![false; nodes.len()],
            paces: nodes.iter().map(|_| pace()).collect(),
            is_mend_due: vec![false; nodes.len()],
            is_founded,
            may_retire: false,
            follower: None,
            streams: Vec::new(),
            following: Rng::new(plan.seed ^ 0x00F0_110E),
            is_recovering: false,
            is_all_lost: false,
            commands: Vec::new(),
            no_objects_until: 0,
            idle_until: 0,
            objects,
            outside,
            archiving,
            here,
            between: nodes.iter().map(|_| None).collect(),
            turns: BTreeMap::new(),
            readers: nodes.iter().map(|_| None).collect(),
            nodes,
            computes,
            newcomers: BTreeSet::new(),
            swaps: 0,
            campaign: Campaign::new(plan.slots),
            connections: Vec::new(),
            votes: vec![None; plan.slots],
            truth: Truth::new(start),
            quorum: Quorum::founded(parameters.clone(), chain),
            parameters,
            quiet: None,
            cut: BTreeMap::new(),
            traces,
            outcome: Outcome::default(),
        };
        world.begin_all();
        for (index, &(at, _)) in plan.troubles.iter().enumerate() {
            world.at(at, Event::Trouble(index));
        }
        for node in 0..plan.slots {
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

    /// All safekeepers are there, and in some worlds the timeline is founded.
    fn begin_all(&mut self) {
        for index in 0..self.nodes.len() {
            let started = self.nodes[index].start(&mut self.truth);
            started.unwrap_or_else(|error| unreachable!("on a disk that is well: {error}"));
            self.register(index);
        }
        if self.is_founded {
            self.objects.found(&self.quorum);
        }
        self.objects.begin_to_fail(self.plan.storage_fails);
        if self.following.one_in(2) {
            self.begin_following();
        }
    }

    fn key(&self) -> TimelineKey {
        (self.parameters.tenant, self.parameters.timeline)
    }

    /// Runs it to its end.
    pub fn run(mut self) -> Outcome {
        let violation = self.go_on().err();
        // Connections hold on to timelines.
        self.connections.clear();
        self.streams.clear();
        self.turns.clear();
        self.outcome.violation = violation;
        (self.outcome.archived, self.outcome.tails) = self.objects.counts();
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
            self.check_objects()?;
            if self.is_all_lost {
                return Ok(());
            }
            if let Some((since, end)) = self.quiet {
                if self.truth.end() > end
                    && !self.may_retire
                    && self.is_all_committed()
                    && self.is_settled()
                    && self.has_followed()
                {
                    return self.finish();
                }
                if self.now > since + PATIENCE {
                    let said = self.computes[0].driver.as_ref().map(|driver| driver.describe());
                    let open = self.nodes.iter().filter_map(Node::timeline);
                    let ends: Vec<(Lsn, Lsn)> =
                        open.map(|one| (one.flush_lsn(), one.commit_lsn())).collect();
                    return Err(format!(
                        "nothing is committed beyond {} although all is well, or members are still changed or lack it: {}; {ends:?}; {}",
                        self.truth.end(),
                        self.is_settled(),
                        said.unwrap_or_default()
                    ));
                }
            }
        }
    }

    fn finish(&mut self) -> Checked {
        self.nodes.iter_mut().try_for_each(|node| node.check_all(&self.truth))?;
        match self.archiving.one_in(16) {
            true => self.archive_all(),
            false => Ok(()),
        }
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
            Event::Begin(compute) => return self.begin(compute),
            Event::Turn(compute, life, turn) => return self.turn(compute, life, turn),
            Event::Dialed { compute, life, token, node } => {
                self.dialed(compute, life, token, node);
            }
            Event::LastRecord { compute, life, node } => {
                return self.last_record(compute, life, node);
            }
            Event::Write(compute, life, term) => return self.write(compute, life, term),
            Event::Arrive(connection, parcel) => return self.arrive(connection, parcel),
            Event::Serve(connection) => return self.serve(connection),
            Event::Answer(connection, reply) => return self.answer_campaign(connection, reply),
            Event::Receive(connection, bytes) => self.receive(connection, &bytes),
            Event::Close(connection, is_reset) => self.close(connection, is_reset),
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
            Event::Copy { node, life, peer, status, missing, at, begun } => {
                return self.copy(node, life, peer, status, missing, (at, begun));
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
            Event::ObjectsAgain => {
                self.objects.set_away(self.no_objects_until > self.now);
            }
            Event::SpaceAgain(node) => self.nodes[node].disk.set_full(false),
            Event::Steward(command, stage) => return self.steward(command, stage),
            Event::TickCampaign(life) => self.tick_campaign(life),
            Event::EndCampaign(life) => {
                if self.campaign.life == life {
                    self.end_campaign();
                }
            }
            Event::Replace => self.replace(),
            Event::Recover => return self.recover(),
            Event::Follow(life, turn) => return self.follow(life, turn),
            Event::Ask(stream, bytes) => return self.asked(stream, &bytes),
            Event::Stream(stream, bytes) => self.stream(stream, bytes),
            Event::Feed(stream) => return self.feed(stream),
            Event::Mend(node) => return self.mend(node),
            Event::Archive(turn) => return self.go_on_archiving(turn),
            Event::Quiet => self.be_quiet(),
            Event::Retire => self.retire(),
        }
        Ok(())
    }
}

fn generator(parameters: &TimelineParameters, at: Lsn, prev: Lsn, term: Term) -> WalGenerator {
    WalGenerator::new(parameters.clone(), at, prev).numbered(term.0)
}
