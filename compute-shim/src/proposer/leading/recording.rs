//! One record of a new term's beginning, until it is committed and that is known.

use std::time::{Duration, Instant};

use bytes::Bytes;
use pgstrata_ids::Lsn;

use super::super::config::{ProposerError, WalChunk};
use super::super::driver::Driver;
use super::super::network::Network;
use super::{SHORT_TURN, TURN};

/// Longest wait for members that are slow to take the commit LSN.
const ANNOUNCE_PATIENCE: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It is being committed.
    Commits,
    /// Members are being told that it is: nothing else is about to be sent that could carry it, and readers of the safekeepers wait
    /// for it.
    Announces { until: Instant },
    /// A last turn sends what was said.
    Sends,
}

/// See the module.
#[derive(Debug)]
pub struct Recording {
    start: Lsn,
    end: Lsn,
    timeout: Duration,
    deadline: Instant,
    state: State,
}

impl Recording {
    /// Appends whole records, whose bytes start at the log's end.
    pub fn begin<N: Network>(
        driver: &mut Driver<N>,
        bytes: Bytes,
        timeout: Duration,
        now: Instant,
    ) -> Result<Recording, ProposerError> {
        let start = driver.end_lsn();
        let end = start + bytes.len() as u64;
        driver.append(now, WalChunk { start, bytes, record_end: end })?;
        Ok(Recording { start, end, timeout, deadline: now + timeout, state: State::Commits })
    }

    /// How long a turn of the driver may wait.
    pub fn wait(&self) -> Duration {
        match self.state {
            State::Commits => TURN,
            State::Announces { .. } => SHORT_TURN,
            State::Sends => Duration::ZERO,
        }
    }

    /// Whether everything up to its end, which is returned, is committed by the last turn.
    pub fn step<N: Network>(
        &mut self,
        now: Instant,
        driver: &Driver<N>,
    ) -> Result<Option<Lsn>, ProposerError> {
        if self.state == State::Commits {
            driver.check()?;
        }
        match self.state {
            State::Commits if driver.commit_lsn() < self.end => {
                if now >= self.deadline {
                    return Err(ProposerError::NotCommitted {
                        what: format!("the record at {}", self.start),
                        seconds: self.timeout.as_secs(),
                        details: driver.describe(),
                    });
                }
            }
            State::Commits => self.announce(now + ANNOUNCE_PATIENCE, now, driver),
            State::Announces { until } => self.announce(until, now, driver),
            State::Sends => return Ok(Some(self.end)),
        }
        Ok(None)
    }

    fn announce<N: Network>(&mut self, until: Instant, now: Instant, driver: &Driver<N>) {
        self.state = match driver.everyone_told() || now >= until {
            true => State::Sends,
            false => State::Announces { until },
        };
    }
}
