//! A term that is led: WAL goes from its source to the driver, and what is committed back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pgstrata_ids::Lsn;

use super::super::config::{ProposerError, WalSource};
use super::super::driver::Driver;
use super::super::network::Network;

/// Pieces taken from the source before sockets are looked at again.
const MAX_PIECES_PER_TURN: usize = 8;

/// Longest wait while nothing is to be done: the driver's timers bound it.
const IDLE_TURN: Duration = Duration::from_secs(1);

/// How often it is looked at whether commits are possible.
const LOOK_AFTER: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub struct Following {
    commit_lsn: Arc<AtomicU64>,
    reported: Lsn,
    looked_at: Instant,
}

impl Following {
    /// Keeps `commit_lsn` up from now on.
    pub fn new<N: Network>(
        driver: &Driver<N>,
        commit_lsn: Arc<AtomicU64>,
        now: Instant,
    ) -> Following {
        let reported = driver.commit_lsn();
        commit_lsn.store(reported.0, Ordering::Release);
        Following { commit_lsn, reported, looked_at: now }
    }

    /// Before a turn, of which it says how long it may wait: takes some of what the source has, if the term still stands.
    pub fn take<N: Network>(
        &mut self,
        now: Instant,
        driver: &mut Driver<N>,
        source: &mut impl WalSource,
    ) -> Result<Duration, ProposerError> {
        Self::check(driver, source)?;
        let mut more = false;
        let most = driver.most_in_a_chunk();
        for piece in 0..MAX_PIECES_PER_TURN {
            if !driver.has_room() {
                break;
            }
            let Some(chunk) = source.poll_wal(most).map_err(ProposerError::Source)? else { break };
            driver.append(now, chunk)?;
            more = piece + 1 == MAX_PIECES_PER_TURN;
        }
        more |= driver.has_room() && source.has_more();
        Ok(if more { Duration::ZERO } else { IDLE_TURN })
    }

    /// After it: whether the term still stands, which the source is told, as it is of what is committed by now. By then
    /// everybody else finds that, too.
    pub fn report<N: Network>(
        &mut self,
        driver: &Driver<N>,
        source: &mut impl WalSource,
    ) -> Result<(), ProposerError> {
        Self::check(driver, source)?;
        let commit_lsn = driver.commit_lsn();
        if commit_lsn > self.reported {
            self.reported = commit_lsn;
            self.commit_lsn.store(commit_lsn.0, Ordering::Release);
            source.on_commit(commit_lsn);
        }
        Ok(())
    }

    fn check<N: Network>(
        driver: &Driver<N>,
        source: &mut impl WalSource,
    ) -> Result<(), ProposerError> {
        if let Some(term) = driver.fenced() {
            source.on_fenced(term);
        }
        driver.check()
    }

    /// Why nothing can be committed, if so; `None` if it isn't time to look.
    pub fn look<N: Network>(&mut self, now: Instant, driver: &Driver<N>) -> Option<Option<String>> {
        let is_due = now.saturating_duration_since(self.looked_at) > LOOK_AFTER;
        is_due.then(|| {
            self.looked_at = now;
            driver.problem()
        })
    }
}
