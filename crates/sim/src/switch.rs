//! A switch whose ports are far from each other: what a frame meets on its way from one to another. It has no clock and no
//! devices: frames are given to it and asked for again, with the time. The same frames at the same times meet the same.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// A frame begins with the addresses of its receiver and its sender, and the kind of what is in it.
const HEADER: usize = 14;
/// The kind of a frame that asks who has an address, or answers that. It is never lost: between zones there are routers, so
/// no such question crosses them.
const ADDRESS_RESOLUTION: [u8; 2] = [0x08, 0x06];
/// Stations that are remembered; frames to others go to all ports.
const MAX_STATIONS: usize = 1024;
/// A frame that leaves later than this after its time counts as late: the machine was busy with something else.
const LATE: Duration = Duration::from_millis(1);

type Station = [u8; 6];

/// What became of frames. One that goes to several ports is one for each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub forwarded: u64,
    /// By chance, as was asked for.
    pub lost: u64,
    /// Because too many were on the same way, or the other end did not take them.
    pub dropped: u64,
    /// Of those forwarded.
    pub late: u64,
}

#[derive(Debug)]
struct Travelling {
    due: Instant,
    from: usize,
    to: usize,
    frame: Vec<u8>,
}

/// See the module.
#[derive(Debug)]
pub struct Switch {
    ports: usize,
    delay: Duration,
    loss: f64,
    /// Frames on the way from one port to one other: what comes when there are so many is dropped, as by a router.
    capacity: usize,
    /// In the order of `due`.
    travelling: VecDeque<Travelling>,
    /// How many of them are on each way: `from * ports + to`.
    on_way: Vec<usize>,
    stations: HashMap<Station, usize>,
    random: u64,
    counts: Counts,
}

impl Switch {
    /// One that neither delays nor loses anything yet.
    pub fn new(ports: usize, capacity: usize, seed: u64) -> Switch {
        Switch {
            ports,
            delay: Duration::ZERO,
            loss: 0.0,
            capacity,
            travelling: VecDeque::new(),
            on_way: vec![0; ports * ports],
            stations: HashMap::new(),
            random: seed,
            counts: Counts::default(),
        }
    }

    /// From now on, frames take so long from one port to another, and so many of a hundred are lost. None overtakes those
    /// that are on their way.
    pub fn set(&mut self, delay: Duration, loss_percent: f64) {
        self.delay = delay;
        self.loss = loss_percent / 100.0;
    }

    /// What became of frames so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// A frame came in at a port.
    pub fn arrive(&mut self, now: Instant, from: usize, frame: &[u8]) {
        let (Some((receiver, rest)), true) =
            (frame.split_first_chunk::<6>(), frame.len() >= HEADER)
        else {
            self.counts.dropped += 1;
            return;
        };
        if let Some((sender, _)) = rest.split_first_chunk::<6>()
            && (self.stations.len() < MAX_STATIONS || self.stations.contains_key(sender))
        {
            self.stations.insert(*sender, from);
        }
        match self.stations.get(receiver) {
            Some(&to) => self.send(now, from, to, frame),
            None => (0..self.ports).for_each(|to| self.send(now, from, to, frame)),
        }
    }

    fn send(&mut self, now: Instant, from: usize, to: usize, frame: &[u8]) {
        if from == to {
            return;
        }
        let is_lost = self.chance() < self.loss;
        if is_lost && frame[12..HEADER] != ADDRESS_RESOLUTION {
            self.counts.lost += 1;
            return;
        }
        let way = from * self.ports + to;
        if self.on_way[way] >= self.capacity {
            self.counts.dropped += 1;
            return;
        }
        self.on_way[way] += 1;
        let due = now + self.delay;
        let due = self.travelling.back().map_or(due, |last| last.due.max(due));
        self.travelling.push_back(Travelling { due, from, to, frame: frame.to_vec() });
    }

    /// When the next frame gets to its port.
    pub fn next_due(&self) -> Option<Instant> {
        self.travelling.front().map(|next| next.due)
    }

    /// A frame that has got to its port by now, and which that is.
    pub fn depart(&mut self, now: Instant) -> Option<(usize, Vec<u8>)> {
        let next = self.travelling.pop_front_if(|next| next.due <= now)?;
        self.on_way[next.from * self.ports + next.to] -= 1;
        self.counts.forwarded += 1;
        self.counts.late += u64::from(now - next.due > LATE);
        Some((next.to, next.frame))
    }

    /// One that departed was not taken.
    pub fn not_taken(&mut self) {
        self.counts.forwarded -= 1;
        self.counts.dropped += 1;
    }

    /// A number from 0 up to 1, by SplitMix64 (Steele, Lea and Flood, 2014).
    fn chance(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        (mixed >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERYBODY: Station = [0xff; 6];
    const IP: [u8; 2] = [0x08, 0x00];

    fn station(number: u8) -> Station {
        [2, 0, 0, 0, 0, number]
    }

    fn frame(receiver: Station, sender: Station, kind: [u8; 2]) -> Vec<u8> {
        [&receiver[..], &sender, &kind, b"text"].concat()
    }

    /// Ports at which something came out by then.
    fn came(switch: &mut Switch, now: Instant) -> Vec<usize> {
        std::iter::from_fn(|| switch.depart(now)).map(|(port, _)| port).collect()
    }

    #[test]
    fn a_frame_comes_when_it_is_due_and_where_its_receiver_is() {
        let (mut switch, now) = (Switch::new(3, 10, 1), Instant::now());
        let (ms, delay) = (Duration::from_millis(1), Duration::from_millis(20));
        switch.set(delay, 0.0);
        switch.arrive(now, 0, &frame(EVERYBODY, station(0), IP));
        assert_eq!(switch.next_due(), Some(now + delay));
        assert_eq!(came(&mut switch, now + delay - ms), []);
        assert_eq!(came(&mut switch, now + delay), [1, 2]);
        // It is known now where that one is.
        switch.arrive(now, 2, &frame(station(0), station(2), IP));
        assert_eq!(came(&mut switch, now + delay), [0]);
        // Who is at the same port is not sent anything twice.
        switch.arrive(now, 2, &frame(station(2), station(7), IP));
        // None overtakes another.
        switch.arrive(now, 0, &frame(station(2), station(0), IP));
        switch.set(Duration::ZERO, 0.0);
        switch.arrive(now + ms, 2, &frame(station(0), station(2), IP));
        assert_eq!(came(&mut switch, now + ms), []);
        assert_eq!(came(&mut switch, now + delay + 3 * ms), [2, 0]);
        let counts = Counts { forwarded: 5, late: 2, ..Counts::default() };
        assert_eq!((switch.counts(), switch.next_due()), (counts, None));
    }

    #[test]
    fn as_many_are_lost_as_was_asked_for_and_the_same_again() {
        let lost = |seed| {
            let (mut switch, now) = (Switch::new(2, 1, seed), Instant::now());
            switch.set(Duration::ZERO, 1.0);
            let mut each = Vec::new();
            for _ in 0..100_000 {
                switch.arrive(now, 0, &frame(station(1), station(0), IP));
                each.push(came(&mut switch, now).is_empty());
            }
            let lost = switch.counts().lost;
            assert!((800..1200).contains(&lost), "{lost}");
            // Questions for addresses are not.
            for _ in 0..1000 {
                switch.arrive(now, 0, &frame(EVERYBODY, station(0), ADDRESS_RESOLUTION));
                assert_eq!(came(&mut switch, now), [1]);
            }
            each
        };
        assert!(lost(1) == lost(1));
        assert!(lost(1) != lost(2));
    }

    #[test]
    fn what_a_full_way_has_no_room_for_is_dropped() {
        let (mut switch, now) = (Switch::new(3, 2, 1), Instant::now());
        switch.set(Duration::from_millis(20), 0.0);
        for _ in 0..3 {
            switch.arrive(now, 0, &frame(EVERYBODY, station(0), IP));
        }
        // The other ways have room, and this one has again.
        switch.arrive(now, 1, &frame(station(0), station(1), IP));
        assert_eq!(came(&mut switch, now + Duration::from_millis(20)), [1, 2, 1, 2, 0]);
        switch.arrive(now, 0, &frame(station(1), station(0), IP));
        assert_eq!(came(&mut switch, now + Duration::from_millis(20)), [1]);
        switch.not_taken();
        switch.arrive(now, 0, b"short");
        assert_eq!(switch.counts(), Counts { forwarded: 5, dropped: 4, ..Counts::default() });
    }

    #[test]
    fn so_many_stations_are_remembered() {
        let (mut switch, now) = (Switch::new(2, 1, 1), Instant::now());
        for number in 0..2 * MAX_STATIONS as u32 {
            let mut sender = station(0);
            sender[1..5].copy_from_slice(&number.to_be_bytes());
            switch.arrive(now, 0, &frame(EVERYBODY, sender, IP));
        }
        assert_eq!(switch.stations.len(), MAX_STATIONS);
    }
}
