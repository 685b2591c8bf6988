//! Three acceptors with disks, and a fourth where members change, or five; two computes, and the messages between them.

use std::hash::{DefaultHasher, Hash, Hasher};

use pgstrata_ids::{Incarnation, Lsn, Member, NodeId, Term};

use crate::{
    Acceptor, Ack, Append, Configuration, ControlState, Elected, Fault, Phase, Proposer,
    ProposerId, Vote, VoteRequest,
};

/// Most acceptors of a world.
pub const NODES: usize = 5;

/// The fourth, where members change: it takes the third's place.
const NEWCOMER: u8 = 3;

/// The third, where members change.
pub const LEAVER: u8 = 2;

/// Bytes of a record, so that there are positions inside records.
pub const RECORD: usize = 2;

/// What has happened before everything is possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Beginning {
    /// Nothing.
    Fresh,
    /// The first compute has won the first term, and all acceptors follow it.
    Elected,
    /// Then a change of members was decided, and the first two acceptors have heard of it; the compute has not.
    Heard,
    /// Instead it wrote a record, which only the first acceptor has; the second compute won a second
    /// term with the others, of whom only the second acceptor has heard that it was won, and wrote a record that only that
    /// one has.
    Divided,
    /// Then the first compute, started again, won a third term with the first and the third.
    Retaken,
    /// The same, where the first had written two records in its first run.
    RetakenLonger,
    /// The first compute was elected by both groups, and its record is committed and with all; the new group was decided.
    Joint,
    /// The same, but the member that leaves heard nothing of it; then the first compute ended, and starts
    /// again, and so did the first acceptor.
    Replaced,
}

/// How much of everything happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// Records that each of the two computes may write in all its runs.
    pub records: [u8; 2],
    /// Where it begins.
    pub beginning: Beginning,
    /// Whether there are five acceptors, who stay what they are; else there are three.
    pub five: bool,
    /// Acceptors' crashes, in the middle of anything; a restart follows.
    pub crashes: u8,
    /// Times that a compute starts again as a new proposer.
    pub restarts: u8,
    /// Messages that are delivered twice.
    pub duplicates: u8,
    /// Reconnections of a running compute to an acceptor.
    pub reconnects: u8,
    /// Copies of committed WAL between acceptors.
    pub copies: u8,
    /// Pieces of the log that an acceptor follows, copied from another one that need not follow it yet.
    pub follows: u8,
    /// Proofs of commitment from acceptors' logs.
    pub proofs: u8,
    /// Messages that only tell a commit LSN; else it travels with the next bytes.
    pub tidings: u8,
    /// Steps of a change of members: to both groups, and to the new one.
    pub changes: u8,
    /// Changes of members that are undone while both groups decide.
    pub undos: u8,
    /// Acceptors that hear of a configuration otherwise than by being asked for a vote.
    pub learns: u8,
    /// Campaigns with a configuration that nobody decided on.
    pub made_up: u8,
    /// Safekeepers that lose their directory and start again with an empty one, unless they are asked for nothing.
    pub wipes: u8,
    /// Whether records are also sent in pieces.
    pub pieces: bool,
    /// Whether what was appended may stay unsynced while other messages come.
    pub late_flush: bool,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// A compute hears promised terms from all and campaigns, with the configuration of this number.
    Campaign(u8, u8),
    /// The same, with a configuration that somebody made up: the last of the first members alone.
    CampaignMadeUp(u8),
    /// An acceptor hears of the newest configuration.
    Learn(u8),
    /// An acceptor loses its directory, and starts again with an empty one.
    Wipe(u8),
    /// The next configuration is decided, for whoever asks from now on.
    Change,
    /// The same, and it is the first group again.
    Undo,
    /// A compute dies and another takes its place.
    Restart(u8),
    /// A compute writes a record.
    Write(u8),
    /// A compute sends a member the next bytes: all there are, or half a record.
    Send(u8, u8, bool),
    /// A compute connects to a member again.
    Reconnect(u8, u8),
    /// The message at this place is delivered; `true` keeps a copy in the network.
    Deliver(u8, bool),
    /// The same, but the acceptor crashes after so many outputs, and this much of its unsynced
    /// log survives.
    DeliverAndCrash(u8, u8, u8),
    /// An acceptor makes what it wrote durable and acknowledges it.
    Flush(u8),
    /// The same, with a crash after so many outputs.
    FlushAndCrash(u8, u8, u8),
    /// The second copies committed bytes of the first.
    Copy(u8, u8),
    /// The second reads from the first what it lacks of the log that it follows; the bytes are on their way then.
    Follow(u8, u8),
    /// Two acceptors compare their logs.
    Prove(u8, u8),
}

/// What travels between compute `.0` and acceptor `.1`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Message {
    pub compute: u8,
    pub run: u8,
    pub node: u8,
    pub order: u64,
    pub content: Content,
}

/// With the bytes that go with it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    VoteRequest(VoteRequest),
    Vote(Vote, Vec<u8>),
    Elected(Elected),
    Append(Append, Vec<u8>),
    Ack(Ack),
}

/// An order that makes equal sets of messages equal lists; by a fingerprint, as cores don't order.
impl PartialOrd for Content {
    fn partial_cmp(&self, other: &Content) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Content {
    fn cmp(&self, other: &Content) -> std::cmp::Ordering {
        super::search::fingerprint(self).cmp(&super::search::fingerprint(other))
    }
}

/// An acceptor and its disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    pub core: Acceptor,
    /// The control file.
    pub control: ControlState,
    /// The log as written; what is after `synced` may be lost in a crash.
    pub log: Vec<u8>,
    pub synced: usize,
    /// Highest position that was ever reported committed here.
    pub told_commit: usize,
}

/// A compute and its log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Compute {
    pub core: Proposer,
    pub run: u8,
    pub started: bool,
    pub log: Vec<u8>,
    pub next: [Option<u8>; NODES],
    pub told: [u8; NODES],
    pub records: u8,
    /// The logs that votes spoke of, until the election.
    pub voted: [Vec<u8>; NODES],
}

/// A state.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub nodes: Vec<Node>,
    pub computes: Vec<Compute>,
    pub network: Vec<Message>,
    /// The longest log that was ever reported committed.
    pub committed: Vec<u8>,
    /// For each of its bytes the lowest term in which it was.
    pub committed_in: Vec<u64>,
    /// The number of the newest configuration, as object storage has it.
    pub number: u8,
    /// The number of the one in which the first group became the members again; 0 if it did not.
    pub undone: u8,
    pub left: Bounds,
    /// Whether somebody may campaign with members that he made up.
    pub may_be_made_up: bool,
    pub fault: Option<Fault>,
}

/// The first one; the one of both groups, number 2; or the last. `undone` as in [`World`].
pub fn configuration(number: u8, undone: u8, five: bool) -> Configuration {
    if five {
        let members = (0..NODES as u8).map(|node| member(node, five)).collect();
        // Five different nodes are a configuration.
        return Configuration::new(u64::from(number), members)
            .unwrap_or_else(|error| unreachable!("{error}"));
    }
    let (old, new) = (vec![0, 1, 2], vec![0, 1, 3]);
    // After it was undone the same may begin again.
    let step = if undone > 0 && number >= undone { number + 1 - undone } else { number };
    let (members, incoming) = match step {
        1 => (old, vec![]),
        2 => (old, new),
        _ => (new, vec![]),
    };
    let group = |group: Vec<u8>| group.into_iter().map(|node| member(node, five)).collect();
    // Three different nodes are a configuration.
    Configuration::joint(u64::from(number), group(members), group(incoming))
        .unwrap_or_else(|error| unreachable!("{error}"))
}

/// One that nobody decided on, of the number after the newest.
pub fn made_up(newest: u8) -> Configuration {
    // One node is a configuration.
    Configuration::new(u64::from(newest) + 1, vec![member(LEAVER, false)])
        .unwrap_or_else(|error| unreachable!("{error}"))
}

/// Who an acceptor is: the fourth, if it is not one of five, is the third's node, with another directory.
pub fn member(node: u8, five: bool) -> Member {
    let (node, life) = if node == NEWCOMER && !five { (LEAVER, 2) } else { (node, 1) };
    Member { node: NodeId(u64::from(node) + 1), incarnation: Incarnation([life; 16]) }
}

/// Who an acceptor is after it lost its directory.
pub fn wiped(node: u8, five: bool, fault: Option<Fault>) -> Member {
    match fault {
        Some(Fault::WipedComesBack) => member(node, five),
        _ => Member { incarnation: Incarnation([3; 16]), ..member(node, five) },
    }
}

/// Which acceptor this is.
pub fn index(of: Member, five: bool) -> u8 {
    // Proposers name members of configurations only.
    (0..NODES as u8).find(|&node| member(node, five) == of).unwrap_or_else(|| unreachable!("{of}"))
}

impl World {
    /// The same for states that differ only in the acceptors' names: everything that has to do
    /// with one of them is hashed together, and the hashes are sorted. In a world whose members change, two of four
    /// differ in their names only.
    pub fn fingerprint(&self) -> u64 {
        let mut nodes = [0; NODES];
        for (n, hash) in nodes.iter_mut().enumerate().take(self.nodes.len()) {
            *hash = self.fingerprint_of(n);
        }
        nodes.sort_unstable();
        let mut hasher = DefaultHasher::new();
        (nodes, &self.committed, &self.committed_in, self.left).hash(&mut hasher);
        (self.number, self.undone).hash(&mut hasher);
        for compute in &self.computes {
            compute.core.hash_rest(&mut hasher);
            (compute.run, compute.started, &compute.log, compute.records).hash(&mut hasher);
        }
        hasher.finish()
    }

    fn fingerprint_of(&self, n: usize) -> u64 {
        let mut hasher = DefaultHasher::new();
        let node = &self.nodes[n];
        let five = self.left.five;
        let changes = self.nodes.len() > usize::from(NEWCOMER) && !five;
        let leaves_or_comes = if changes { n.saturating_sub(1) } else { 0 };
        leaves_or_comes.hash(&mut hasher);
        node.core.hash_nameless(&mut hasher);
        (node.core.member() == member(n as u8, five)).hash(&mut hasher);
        (&node.control, &node.log, node.synced, node.told_commit).hash(&mut hasher);
        for compute in &self.computes {
            compute.core.hash_member(member(n as u8, five), &mut hasher);
            (compute.next[n], compute.told[n], &compute.voted[n]).hash(&mut hasher);
        }
        for message in self.network.iter().filter(|message| usize::from(message.node) == n) {
            (message.compute, message.run, message.order).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Forgets messages that can't change anything any more, now or later.
    pub fn purge(&mut self) {
        // A faulty acceptor may forget its promise.
        if self.fault.is_some() {
            return;
        }
        let (nodes, computes, five) = (&self.nodes, &self.computes, self.left.five);
        self.network.retain(|message| {
            let promised = nodes[usize::from(message.node)].core.term();
            let compute = &computes[usize::from(message.compute)];
            let heard = compute.run == message.run;
            let phase = compute.core.phase();
            match &message.content {
                Content::VoteRequest(request) => request.term > promised,
                Content::Elected(elected) => elected.term >= promised,
                Content::Append(append, _) => append.term >= promised,
                Content::Vote(..) => heard && phase == Phase::Campaigning,
                Content::Ack(ack) => {
                    let known = compute.core.flush_lsn_of(member(message.node, five));
                    let streams = compute.next[usize::from(message.node)].is_some();
                    heard && phase == Phase::Elected && !(streams && known >= Some(ack.flush_lsn))
                }
            }
        });
    }

    /// The beginning.
    pub fn new(bounds: Bounds, fault: Option<Fault>) -> World {
        let five = bounds.five;
        let node = |node: u8| {
            // The fourth comes to know of the timeline when it is about to become a member.
            let number = if node == NEWCOMER && !five { 2 } else { 1 };
            let control = ControlState::empty(Lsn(0), configuration(number, 0, five));
            // An empty log suits an empty control state.
            let core = Acceptor::restore(member(node, five), control.clone(), Lsn(0))
                .unwrap_or_else(|error| unreachable!("{error}"))
                .with_fault(fault);
            Node { core, control, log: Vec::new(), synced: 0, told_commit: 0 }
        };
        let changes = bounds.changes > 0
            || matches!(
                bounds.beginning,
                Beginning::Heard | Beginning::Joint | Beginning::Replaced
            );
        assert!(!(five && changes), "the members of five do not change");
        let count = match (five, changes) {
            (true, _) => NODES as u8,
            (false, true) => NEWCOMER + 1,
            (false, false) => NEWCOMER,
        };
        World {
            nodes: (0..count).map(node).collect(),
            computes: (0..2)
                .map(|c: u8| Compute::new(c, 0, bounds.records[usize::from(c)], five, fault))
                .collect(),
            network: Vec::new(),
            committed: Vec::new(),
            committed_in: Vec::new(),
            number: 1,
            undone: 0,
            left: bounds,
            may_be_made_up: bounds.made_up > 0,
            fault,
        }
    }
}

impl Compute {
    pub fn new(compute: u8, run: u8, records: u8, five: bool, fault: Option<Fault>) -> Compute {
        Compute {
            core: Compute::proposer(compute, run, configuration(1, 0, five), fault),
            run,
            started: false,
            log: Vec::new(),
            next: [None; NODES],
            told: [0; NODES],
            records,
            voted: Default::default(),
        }
    }

    /// The one of this run that counts these members.
    pub fn proposer(
        compute: u8,
        run: u8,
        configuration: Configuration,
        fault: Option<Fault>,
    ) -> Proposer {
        let mut id = [0; 16];
        id[0] = compute;
        id[1] = run;
        Proposer::new(ProposerId(id), configuration, Term(1)).with_fault(fault)
    }

    /// The two bytes of this compute's next record: they say who wrote it, and in which run.
    pub fn record(&self, compute: u8) -> [u8; RECORD] {
        let who = 1 + compute + 2 * self.run;
        [who * 16 + self.records, who * 16 + 8 + self.records]
    }
}
