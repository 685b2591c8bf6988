//! Appends to one safekeeper by 1, 8 and 64 computes at once, a timeline each, beside the raw disk: write and sync of the same pieces,
//! in the ways that there are.
//!
//! `cargo bench -p pgstrata-safekeeper --bench append`; `-- SECONDS COMPUTES` for other than 3 seconds each,
//! and one number of computes; `-- SECONDS COMPUTES safekeeper` without the raw disk, to compare two programs.
#![allow(clippy::unwrap_used)] // A failed benchmark ends.

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "append/raw.rs"]
mod raw;

use std::io::Write;
use std::net::TcpStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use common::cluster::{Cluster, Node};
use common::wal::{WalGenerator, parameters};
use pgstrata_ids::{Lsn, NodeId, Term, TimelineId, TimelineParameters};
use pgstrata_quorum::{Append, Elected, ProposerId, TermHistory, VoteRequest};
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::frame::Stamp;
use pgstrata_wire::safekeeper::{AppendHead, Greeting, Message, WAL, chosen, decode, encode};

const SEGMENT: u64 = 16 << 20;
/// What each compute sends, over and over as long as there is time: enough for the quickest.
const LONGEST: u64 = 1 << 30;
/// Main data of a record, in bytes.
const RECORD: usize = 8000;
/// What is on its way at once: one, as of a client that waits for each commit, or as much as this, in bytes, as of a bulk load.
const IN_FLIGHT: u64 = 4 << 20;

/// What was measured.
pub struct Measured {
    pub bytes: u64,
    pub seconds: f64,
    /// From a piece's being sent to its being durable.
    pub times: Vec<Duration>,
    pub answers: usize,
}

impl Measured {
    /// One line of a table.
    pub fn print(mut self, name: &str) {
        self.times.sort_unstable();
        let at =
            |percent: usize| self.times[(self.times.len() - 1) * percent / 100].as_secs_f64() * 1e3;
        println!(
            "{name:<44} {:>8.1} MB/s {:>8.0} answers/s   p50 {:>8.2} ms   p99 {:>8.2} ms",
            self.bytes as f64 / 1e6 / self.seconds,
            self.answers as f64 / self.seconds,
            at(50),
            at(99)
        );
    }

    /// Of all of those that ran at once.
    pub fn together(all: impl IntoIterator<Item = Measured>) -> Measured {
        let none = Measured { bytes: 0, seconds: 0.0, times: Vec::new(), answers: 0 };
        all.into_iter().fold(none, |mut sum, one| {
            sum.bytes += one.bytes;
            sum.answers += one.answers;
            sum.seconds = sum.seconds.max(one.seconds);
            sum.times.extend(one.times);
            sum
        })
    }
}

/// A compute that was elected, with nothing written yet.
struct Compute {
    stream: TcpStream,
    input: FrameBuffer,
    stamp: Stamp,
}

impl Compute {
    fn ask<T>(&mut self, message: &Message<'_>, take: impl Fn(Message<'_>) -> Option<T>) -> T {
        let mut bytes = Vec::new();
        encode(message, self.stamp, &mut bytes);
        self.stream.write_all(&bytes).unwrap();
        self.answer(take)
    }

    fn answer<T>(&mut self, take: impl Fn(Message<'_>) -> Option<T>) -> T {
        loop {
            while self.input.next().unwrap().is_none() {
                assert!(self.input.fill(&mut self.stream).unwrap(), "the safekeeper hung up");
                if let Some(version) = chosen(&mut self.input).unwrap() {
                    self.stamp = Stamp::In(version);
                }
            }
            let frame = self.input.next().unwrap().unwrap();
            let message = decode(frame.kind, frame.body).unwrap();
            assert!(!matches!(message, Message::Refused(_)), "{message:?}");
            let (taken, size) = (take(message), frame.size);
            self.input.consume(size);
            if let Some(taken) = taken {
                return taken;
            }
        }
    }

    fn elected(node: &Node, parameters: &TimelineParameters) -> Compute {
        let stream = TcpStream::connect(&node.wal).unwrap();
        stream.set_nodelay(true).unwrap();
        let (input, stamp) = (FrameBuffer::new(1 << 16), Stamp::First(WAL.speaks));
        let mut compute = Compute { stream, input, stamp };
        let proposer = ProposerId(parameters.timeline.0);
        let greeting =
            Greeting { parameters: parameters.clone(), known: 0, addresses: Vec::new(), proposer };
        let member = compute.ask(&Message::Greeting(greeting), |message| match message {
            Message::GreetingReply(reply) => Some((reply.node, Some(reply.incarnation))),
            _ => None,
        });
        assert_eq!(member.0, NodeId(1));
        let configuration = compute.ask(&Message::Found(vec![member]), |message| match message {
            Message::GreetingReply(reply) => reply.configuration,
            _ => None,
        });
        let term = Term(1);
        let request = VoteRequest { term, proposer, configuration };
        compute.ask(&Message::VoteRequest(request), |message| match message {
            Message::Vote(vote) => Some(vote),
            _ => None,
        });
        let history = TermHistory::default().continued(term, parameters.start_lsn);
        compute.acknowledged(&Message::Elected(Elected { term, history }));
        compute
    }

    fn acknowledged(&mut self, message: &Message<'_>) -> Lsn {
        self.ask(message, |message| match message {
            Message::Ack(ack) => Some(ack.flush_lsn),
            _ => None,
        })
    }
}

/// Appends in pieces that end with records, which all computes send: it is made once.
struct Wal {
    start: Lsn,
    bytes: Vec<u8>,
    /// Ends of pieces of about the size that was asked for.
    ends: Vec<usize>,
}

impl Wal {
    fn new(parameters: &TimelineParameters, size: u64, piece: usize) -> Wal {
        let start = parameters.start_lsn;
        let mut generator = WalGenerator::new(parameters.clone(), start, Lsn::INVALID);
        let (mut bytes, mut ends, mut last) = (Vec::new(), Vec::new(), 0);
        while (bytes.len() as u64) < size {
            bytes.extend(generator.record(RECORD));
            // A piece is never longer: the next record must fit.
            if bytes.len() - last + RECORD + 400 > piece {
                last = bytes.len();
                ends.push(last);
            }
        }
        Wal { start, bytes, ends }
    }
}

/// Sends pieces until the time is over, and takes answers meanwhile.
fn stream(compute: Compute, wal: &Wal, in_flight: u64, time: Duration) -> Measured {
    let Compute { mut stream, mut input, stamp: Stamp::In(version) } = compute else { panic!() };
    let begun = Instant::now();
    // Positions that were acknowledged, and pieces that are on their way.
    let (acknowledged, answers): (SyncSender<u64>, Receiver<u64>) = sync_channel(1 << 16);
    let (sent, waiting) = sync_channel::<(u64, Instant)>(1 << 16);
    let mut reading = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let (mut times, mut count) = (Vec::new(), 0);
            let mut oldest: Option<(u64, Instant)> = None;
            let start = wal.start;
            'all: loop {
                while input.next().unwrap().is_none() {
                    assert!(input.fill(&mut reading).unwrap(), "the safekeeper hung up");
                }
                let frame = input.next().unwrap().unwrap();
                let Message::Ack(ack) = decode(frame.kind, frame.body).unwrap() else {
                    panic!("it refuses")
                };
                let size = frame.size;
                input.consume(size);
                count += 1;
                let done = ack.flush_lsn - start;
                // The sender waits for nothing any more once it has sent all.
                let _ = acknowledged.send(done);
                loop {
                    if oldest.is_none() {
                        match waiting.try_recv() {
                            Ok(piece) => oldest = Some(piece),
                            Err(std::sync::mpsc::TryRecvError::Empty) => break,
                            Err(std::sync::mpsc::TryRecvError::Disconnected) => break 'all,
                        }
                    }
                    let is_done = |(end, _): &(u64, Instant)| *end <= done;
                    let Some((_, since)) = oldest.filter(is_done) else { break };
                    times.push(since.elapsed());
                    oldest = None;
                }
            }
            (times, count)
        });
        let (mut from, mut done) = (0u64, 0);
        for end in &wal.ends {
            let end = *end as u64;
            if begun.elapsed() > time {
                break;
            }
            while from > done && end - done > in_flight {
                done = answers.recv().unwrap();
            }
            done = answers.try_iter().last().unwrap_or(done);
            let bytes = &wal.bytes[from as usize..end as usize];
            let start = wal.start + from;
            let append = Append {
                term: Term(1),
                start,
                length: bytes.len() as u64,
                record_end: wal.start + end,
                // Nothing is archived meanwhile, which would take the processors.
                commit_lsn: Lsn::INVALID,
            };
            let head = AppendHead::new(&append, bytes).in_version(version);
            sent.send((end, Instant::now())).unwrap();
            stream.write_all(&head.0).unwrap();
            stream.write_all(bytes).unwrap();
            from = end;
        }
        while done < from {
            done = answers.recv().unwrap();
        }
        let seconds = begun.elapsed().as_secs_f64();
        drop(sent);
        // An answer, with which the reader sees that there is nothing more.
        let mut ping = Vec::new();
        encode(&Message::Ping, Stamp::In(version), &mut ping);
        stream.write_all(&ping).unwrap();
        drop(answers);
        let (times, answers) = reader.join().unwrap();
        Measured { bytes: from, seconds, times, answers }
    })
}

fn safekeeper(computes: usize, piece: usize, in_flight: u64, time: Duration) -> Measured {
    let mut parameters = parameters(Lsn(SEGMENT));
    parameters.segment_size = SEGMENT as u32;
    let wal = Wal::new(&parameters, LONGEST / computes as u64, piece);
    let cluster = Cluster::start(1);
    let barrier = Arc::new(Barrier::new(computes));
    std::thread::scope(|scope| {
        let one = |number: usize| {
            let (barrier, node, wal) = (Arc::clone(&barrier), &cluster.nodes[0], &wal);
            let timeline = TimelineId((number as u128 + 1).to_be_bytes());
            let parameters = TimelineParameters { timeline, ..parameters.clone() };
            scope.spawn(move || {
                let compute = Compute::elected(node, &parameters);
                barrier.wait();
                stream(compute, wal, in_flight, time)
            })
        };
        let running: Vec<_> = (0..computes).map(one).collect();
        Measured::together(running.into_iter().map(|one| one.join().unwrap()))
    })
}

/// Where the files lie is `$TMPDIR`'s choice.
fn main() {
    // `cargo bench` adds options of its own.
    let given: Vec<String> = std::env::args().skip(1).filter(|one| !one.starts_with('-')).collect();
    let number = |at: usize| given.get(at).and_then(|text| text.parse::<f64>().ok());
    let time = Duration::from_secs_f64(number(0).unwrap_or(3.0));
    let counts = number(1).map_or(vec![1, 8, 64], |count| vec![count as usize]);
    for (size, piece) in [("8 KiB", 8 << 10), ("1 MiB", 1 << 20)] {
        for count in &counts {
            println!("{size}, {count} at once");
            if given.get(2).is_none() {
                raw::print_all(*count, piece, time);
            }
            safekeeper(*count, piece, 0, time).print("safekeeper, each waits for its answer");
            safekeeper(*count, piece, IN_FLIGHT, time).print("safekeeper, 4 MiB on their way");
        }
    }
}
