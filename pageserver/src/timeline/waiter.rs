//! How far a timeline is ingested, and waiting for it to come so far.
#![expect(clippy::disallowed_types, reason = "a condition needs the plain lock, held for moments")]

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use pgstrata_ids::Lsn;

use crate::lock;

/// How soon to try again while a read waits.
const MOMENT: Duration = Duration::from_millis(5);
/// How long a read waits while ingest is known not to move.
const STALL_PATIENCE: Duration = Duration::from_secs(5);

struct State {
    lsn: Lsn,
    record_start: Lsn,
    failure: Option<String>,
    /// Why it does not move for now.
    stalled: Option<String>,
    /// Reads that wait for more.
    waiting: u32,
    /// Ingest is asked to end.
    stopping: bool,
}

/// The end of the last record ingested; it only grows, but for what was given up with those who had it.
pub struct LsnWaiter {
    state: Mutex<State>,
    moved: Condvar,
    wanted: Condvar,
}

impl LsnWaiter {
    /// Starts at `lsn`, whose last record began at `record_start`.
    pub fn new(lsn: Lsn, record_start: Lsn) -> LsnWaiter {
        LsnWaiter {
            state: Mutex::new(State {
                lsn,
                record_start,
                failure: None,
                stalled: None,
                waiting: 0,
                stopping: false,
            }),
            moved: Condvar::new(),
            wanted: Condvar::new(),
        }
    }

    /// The end of the last record.
    pub fn lsn(&self) -> Lsn {
        self.state.lock().lsn
    }

    /// The end and the start of the last record.
    pub fn last_record(&self) -> (Lsn, Lsn) {
        let state = self.state.lock();
        (state.lsn, state.record_start)
    }

    /// Everything up to `lsn` can be read now.
    pub fn advance(&self, lsn: Lsn, record_start: Lsn) {
        let mut state = self.state.lock();
        debug_assert!(lsn >= state.lsn);
        state.lsn = lsn;
        state.record_start = record_start;
        self.moved.notify_all();
    }

    /// Goes back to `lsn`: what came after that is forgotten, and comes anew from elsewhere.
    pub fn rewind(&self, lsn: Lsn, record_start: Lsn) {
        let mut state = self.state.lock();
        state.lsn = lsn;
        state.record_start = record_start;
    }

    /// Wakes everybody: it will not come any further.
    pub fn fail(&self, reason: String) {
        self.state.lock().failure = Some(reason);
        self.moved.notify_all();
    }

    /// Says why it does not move for now, or that it does again.
    pub fn stall(&self, reason: Option<String>) {
        let mut state = self.state.lock();
        if state.stalled != reason {
            state.stalled = reason;
            self.moved.notify_all();
        }
    }

    /// Why it does not move for now.
    pub fn stalled(&self) -> Option<String> {
        self.state.lock().stalled.clone()
    }

    /// Whether somebody waits for more than there is.
    pub fn is_wanted(&self) -> bool {
        self.state.lock().waiting > 0
    }

    /// Sleeps for `timeout`, or a moment only while somebody waits for more than there is.
    pub fn wait_until_wanted(&self, timeout: Duration) {
        let mut state = self.state.lock();
        let timeout = if state.waiting > 0 { timeout.min(MOMENT) } else { timeout };
        if !state.stopping {
            self.wanted.wait_for(&mut state, timeout);
        }
    }

    /// Whoever sleeps in [`LsnWaiter::wait_until_wanted`] wakes, and nobody sleeps there again.
    pub fn stop(&self) {
        self.state.lock().stopping = true;
        self.wanted.notify_all();
    }

    /// Waits until `lsn` is reached. The error says how far it came.
    pub fn wait(&self, lsn: Lsn, timeout: Duration) -> Result<(), String> {
        lock::assert_none_held();
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock();
        state.waiting += 1;
        self.wanted.notify_all();
        let result = self.wait_locked(&mut state, lsn, deadline);
        state.waiting -= 1;
        result
    }

    fn wait_locked(
        &self,
        state: &mut MutexGuard<'_, State>,
        lsn: Lsn,
        deadline: Instant,
    ) -> Result<(), String> {
        let patience = Instant::now() + STALL_PATIENCE;
        while state.lsn < lsn {
            if let Some(failure) = &state.failure {
                return Err(format!("ingest stopped at {}: {failure}", state.lsn));
            }
            let deadline = match state.stalled {
                Some(_) => deadline.min(patience),
                None => deadline,
            };
            if self.moved.wait_until(state, deadline).timed_out() && state.lsn < lsn {
                let why = state.stalled.as_ref().map(|reason| format!(": {reason}"));
                let (at, why) = (state.lsn, why.unwrap_or_default());
                return Err(format!("{lsn} is not reached yet: ingest is at {at}{why}"));
            }
        }
        Ok(())
    }
}
