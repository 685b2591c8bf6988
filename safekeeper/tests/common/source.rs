//! A WAL source that tests write to, and the commits that it hears of.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pgstrata_compute_shim::proposer::{WalChunk, WalSource};
use pgstrata_ids::{Lsn, Term};
use rustix::event::{EventfdFlags, eventfd};

use super::wal::WalGenerator;

#[derive(Debug)]
struct State {
    generator: WalGenerator,
    start: Lsn,
    bytes: Vec<u8>,
    polled: Lsn,
    commit: Lsn,
    fenced: Option<Term>,
    keeps_old: bool,
}

/// The side that tests hold.
#[derive(Clone, Debug)]
pub struct Writer {
    state: Arc<(Mutex<State>, Condvar)>,
    wake: Arc<OwnedFd>,
}

/// The side that the proposer holds.
#[derive(Debug)]
pub struct TestSource(Arc<(Mutex<State>, Condvar)>);

pub fn source(generator: WalGenerator, keeps_old: bool) -> (Writer, TestSource, OwnedFd) {
    let start = generator.at;
    let state = State {
        generator,
        start,
        bytes: Vec::new(),
        polled: start,
        commit: start,
        fenced: None,
        keeps_old,
    };
    let state = Arc::new((Mutex::new(state), Condvar::new()));
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let theirs = wake.try_clone().unwrap();
    let writer = Writer { state: Arc::clone(&state), wake: Arc::new(wake) };
    (writer, TestSource(state), theirs)
}

impl Writer {
    /// Writes records; returns the end of the last.
    pub fn write(&self, count: usize, size: usize) -> Lsn {
        let mut state = self.state.0.lock().unwrap();
        for _ in 0..count {
            let record = state.generator.record(size);
            state.bytes.extend_from_slice(&record);
        }
        let end = state.generator.at;
        drop(state);
        rustix::io::write(&*self.wake, &1u64.to_ne_bytes()).unwrap();
        end
    }

    pub fn wait_commit(&self, lsn: Lsn, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.0.lock().unwrap();
        while state.commit < lsn {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.state.1.wait_timeout(state, left).unwrap().0;
        }
        true
    }

    /// Writes and waits.
    pub fn commit(&self, count: usize, size: usize) -> Lsn {
        let end = self.write(count, size);
        assert!(self.wait_commit(end, Duration::from_secs(20)), "{end} was not committed");
        end
    }

    pub fn commit_lsn(&self) -> Lsn {
        self.state.0.lock().unwrap().commit
    }

    pub fn fenced(&self) -> Option<Term> {
        self.state.0.lock().unwrap().fenced
    }

    pub fn generator(&self) -> WalGenerator {
        self.state.0.lock().unwrap().generator.clone()
    }

    /// Everything written, from where the source started.
    pub fn bytes(&self) -> Vec<u8> {
        self.state.0.lock().unwrap().bytes.clone()
    }
}

impl WalSource for TestSource {
    fn poll_wal(&mut self, max_bytes: usize) -> io::Result<Option<WalChunk>> {
        let mut state = self.0.0.lock().unwrap();
        let from = (state.polled - state.start) as usize;
        let all = state.bytes.len() - from;
        if all == 0 {
            return Ok(None);
        }
        // Cut inside a record when there is too much: only its end is a boundary then.
        let count = all.min(max_bytes);
        let start = state.polled;
        let bytes = Bytes::copy_from_slice(&state.bytes[from..from + count]);
        state.polled = start + count as u64;
        let record_end = if count == all { state.polled } else { state.start };
        Ok(Some(WalChunk { start, bytes, record_end }))
    }

    fn read_range(&mut self, from: Lsn, to: Lsn) -> io::Result<Bytes> {
        let state = self.0.0.lock().unwrap();
        if !state.keeps_old {
            return Ok(Bytes::new());
        }
        // As a compute's first segment file has it: zeros before the position it was made for.
        if from < state.start {
            return Ok(Bytes::from(vec![0; (to.min(state.start) - from) as usize]));
        }
        let range = (from - state.start) as usize..(to - state.start) as usize;
        Ok(Bytes::copy_from_slice(&state.bytes[range]))
    }

    fn on_commit(&mut self, commit: Lsn) {
        let mut state = self.0.0.lock().unwrap();
        assert!(commit > state.commit && state.fenced.is_none());
        state.commit = commit;
        self.0.1.notify_all();
    }

    fn on_fenced(&mut self, by: Term) {
        self.0.0.lock().unwrap().fenced = Some(by);
        self.0.1.notify_all();
    }
}
