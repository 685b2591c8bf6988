//! What a seed means: how large the world is, and what goes wrong in it, and when.

use pgstrata_ids::PAGE_SIZE;
use pgstrata_sim::Rng;

/// Simulated time, in microseconds.
pub type Time = u64;

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A safekeeper ends, after so many operations on its disk, in the middle of whatever it does then; and comes back.
    Crash { node: usize, after: u64, loses_power: bool, back_after: Time },
    /// The same for all of them at once.
    CrashAll { loses_power: bool, back_after: Time },
    /// Nothing gets from these safekeepers (bits) to others and to these computes (bits), for a while.
    Partition { nodes: u8, computes: u8, lasts: Time },
    /// A connection breaks. Its compute hears of it, or not.
    Break { compute: usize, node: usize, is_heard: bool },
    /// A compute ends, and another one takes its place.
    Kill { compute: usize, back_after: Time },
    /// A sync fails, and tells so.
    SyncFails { node: usize, after: u64 },
    /// A disk is full for a while.
    Full { node: usize, lasts: Time },
    /// Messages take much longer for a while.
    Slow { node: usize, lasts: Time },
    /// A directory is lost, if others have what it had, and the safekeeper comes back with an empty one. It is made a member
    /// again, or another one (bits of nodes) in its place.
    Wipe { node: usize, back_after: Time, replaced_after: Time },
    /// A majority of the members are lost for good, these of them (bits of nodes), or all; they come back with empty directories. An
    /// operator has who is left go on, or others with what is archived.
    LoseMost { nodes: u8, back_after: Time, recovered_after: Time },
    /// Somebody wants these nodes (bits) to be the members.
    Members { nodes: u8 },
    /// Something of a log rots: where, in thousandths of what there is.
    Rot { node: usize, rot: Rot, part: u64 },
    /// No compute is there for a while.
    Idle { lasts: Time },
    /// Object storage doesn't answer for a while.
    NoObjects { lasts: Time },
}

/// What becomes of bytes on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rot {
    /// A bit is the other one.
    Bit,
    /// A sector can't be read.
    Sector,
    /// A segment ends there.
    Short,
    /// A segment is gone.
    Gone,
}

/// Safekeepers, of which some may be members only later.
pub const SLOTS: usize = 5;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub seed: u64,
    /// Safekeepers that are members at first.
    pub nodes: usize,
    /// All that there are.
    pub slots: usize,
    pub computes: usize,
    /// Where in its first segment the timeline begins: it is a branch, so that a boundary is near.
    pub bytes_to_boundary: u64,
    /// Most WAL in one message, in bytes.
    pub chunk: usize,
    /// Largest ordinary record, in bytes.
    pub record: u64,
    /// Whether segments are ended before they are full, and removed once they are archived.
    pub switches: bool,
    /// So long nothing is committed before a tail is archived.
    pub tail_after: Time,
    /// One operation of object storage in so many fails, or is done and not answered; none if 0.
    pub storage_fails: u64,
    /// When nothing goes wrong any more.
    pub quiet_at: Time,
    /// By when.
    pub troubles: Vec<(Time, Trouble)>,
}

const MS: Time = 1000;

impl Plan {
    /// That of a seed.
    pub fn new(seed: u64) -> Plan {
        let mut rng = Rng::new(seed);
        let nodes = if rng.one_in(6) { 5 } else { 3 };
        let computes = rng.between(1, 2) as usize;
        let quiet_at = rng.between(150, 700) * MS;
        let count = rng.between(1, 10);
        let changes = rng.one_in(2);
        let slots = if changes { SLOTS } else { nodes };
        let mut troubles: Vec<(Time, Trouble)> = (0..count)
            .map(|_| {
                let at = rng.between(1, quiet_at / MS) * MS;
                match changes && rng.one_in(3) {
                    true => (at, change(&mut rng, nodes)),
                    false => (at, trouble(&mut rng, slots, computes)),
                }
            })
            .collect();
        troubles.sort_by_key(|&(at, _)| at);
        let most_to_boundary = if rng.one_in(3) { 8000 } else { 1500 };
        let switches = rng.one_in(4);
        let record = [100, 400, 2000, 8000][rng.index(4)];
        // Several of them to a large record, or the other way round; and the rest of a segment is not thousands of them.
        let chunk = match switches {
            true => [4 << 10, 16 << 10, 40_000, 100_000][rng.index(4)],
            false => [record / 4 + 50, record, 8 * record, 32 << 10][rng.index(4)],
        };
        let tail_after = [5, 15, 40, 100][rng.index(4)] * MS;
        let storage_fails = [0, 7, 20, 60][rng.index(4)];
        if rng.one_in(3) {
            let at = rng.between(1, quiet_at / MS) * MS;
            troubles.push((at, Trouble::Idle { lasts: rng.between(50, 300) * MS }));
            troubles.sort_by_key(|&(at, _)| at);
        }
        // Numbers of its own: what else a seed means stays as it was.
        let mut rng = Rng::new(seed ^ 0x1057_A110);
        if changes && rng.one_in(6) {
            let at = rng.between(1, quiet_at / MS) * MS;
            let nodes = if rng.one_in(3) { u8::MAX } else { rng.below(1 << SLOTS) as u8 };
            let (back_after, recovered_after) = (rng.between(1, 50) * MS, rng.between(1, 150) * MS);
            troubles.push((at, Trouble::LoseMost { nodes, back_after, recovered_after }));
            troubles.sort_by_key(|&(at, _)| at);
        }
        Plan {
            seed,
            tail_after,
            storage_fails,
            nodes,
            slots,
            computes,
            bytes_to_boundary: beside_headers(8 * rng.between(1, most_to_boundary)),
            chunk: chunk as usize,
            record,
            switches,
            quiet_at,
            troubles,
        }
    }
}

/// No record begins in a page's header.
fn beside_headers(bytes_to_boundary: u64) -> u64 {
    let page = PAGE_SIZE as u64;
    let offset = (page - bytes_to_boundary % page) % page;
    bytes_to_boundary + if (1..40).contains(&offset) { offset } else { 0 }
}

fn trouble(rng: &mut Rng, nodes: usize, computes: usize) -> Trouble {
    let (node, compute) = (rng.index(nodes), rng.index(computes));
    let back_after = if rng.one_in(3) { rng.between(50, 300) } else { rng.between(1, 30) } * MS;
    match rng.below(22) {
        20.. => {
            let rot = [Rot::Bit, Rot::Sector, Rot::Short, Rot::Gone][rng.index(4)];
            Trouble::Rot { node, rot, part: rng.below(1000) }
        }
        0..8 => {
            let after = if rng.one_in(4) { 0 } else { rng.below(40) };
            Trouble::Crash { node, after, loses_power: !rng.one_in(4), back_after }
        }
        8..10 => Trouble::CrashAll { loses_power: !rng.one_in(4), back_after },
        10..12 => Trouble::Partition {
            nodes: rng.below(1 << nodes) as u8,
            computes: rng.below(1 << computes) as u8,
            lasts: rng.between(5, 150) * MS,
        },
        12..14 => Trouble::Break { compute, node, is_heard: rng.one_in(2) },
        14..16 => Trouble::Kill { compute, back_after },
        16..18 => Trouble::SyncFails { node, after: rng.below(10) },
        18 => Trouble::Full { node, lasts: rng.between(5, 100) * MS },
        _ => Trouble::Slow { node, lasts: rng.between(5, 100) * MS },
    }
}

/// Of who the members are.
fn change(rng: &mut Rng, nodes: usize) -> Trouble {
    match rng.below(10) {
        0..5 => Trouble::Wipe {
            node: rng.index(nodes),
            back_after: rng.between(1, 50) * MS,
            replaced_after: rng.between(1, 100) * MS,
        },
        5..9 => {
            let count = [1, 2, 3, 3, 3, 4, 5, 5][rng.index(8)];
            let mut bits = 0u8;
            while bits.count_ones() < count {
                bits |= 1 << rng.index(SLOTS);
            }
            Trouble::Members { nodes: bits }
        }
        _ => Trouble::NoObjects { lasts: rng.between(5, 100) * MS },
    }
}
