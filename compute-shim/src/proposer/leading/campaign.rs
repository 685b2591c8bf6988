//! From the first greeting to a term that is won.

use std::time::{Duration, Instant};

use pgstrata_ids::{NodeId, Term};
use pgstrata_quorum::ProposerId;

use super::super::config::ProposerError;
use super::super::driver::Driver;
use super::super::network::Network;
use super::{Elected, TURN};

/// Two computes that outrank each other in turn pause for so long at least.
const LEAST_PAUSE: Duration = Duration::from_millis(5);

/// And for up to so many milliseconds more, each for others.
const PAUSE_SPREAD: u64 = 64;

/// See the module.
#[derive(Debug)]
pub struct Campaign {
    id: ProposerId,
    /// It was elected before, perhaps, and outranks nobody who came after that.
    yields: bool,
    timeout: Duration,
    deadline: Instant,
    /// It was outranked, and campaigns again then.
    pauses_until: Option<Instant>,
}

impl Campaign {
    /// One that tries for so long, and ends, or not, when it is outranked.
    pub fn new(id: ProposerId, yields: bool, timeout: Duration, now: Instant) -> Campaign {
        Campaign { id, yields, timeout, deadline: now + timeout, pauses_until: None }
    }

    /// How long a turn of the driver may wait.
    pub fn wait(&self, now: Instant) -> Duration {
        let until = self.pauses_until.map(|until| until.saturating_duration_since(now));
        until.map_or(TURN, |until| until.min(TURN))
    }

    /// What has come of it by the last turn: a term, perhaps, without where the record before it starts.
    pub fn step<N: Network>(
        &mut self,
        now: Instant,
        driver: &mut Driver<N>,
    ) -> Result<Option<Elected>, ProposerError> {
        match (driver.fenced(), self.pauses_until) {
            (Some(term), _) if self.yields => return Err(ProposerError::Fenced(term)),
            (Some(term), None) => self.pauses_until = Some(now + self.pause(term)),
            (Some(term), Some(until)) if now >= until => {
                self.pauses_until = None;
                driver.campaign_above(term);
            }
            (Some(_), Some(_)) => {}
            (None, _) => {
                // Members that were changed meanwhile ended it.
                self.pauses_until = None;
                if let Some(election) = driver.election() {
                    return Ok(Some(Elected {
                        term: election.term,
                        start_lsn: election.start_lsn,
                        prev_record_lsn: None,
                        commit_lsn: election.commit_lsn,
                        donor: election.donor.node,
                    }));
                }
            }
        }
        if driver.is_refused() {
            return Err(ProposerError::Refused { details: details(driver) });
        }
        match now >= self.deadline {
            true => {
                let details = details(driver);
                Err(ProposerError::NoQuorum { seconds: self.timeout.as_secs(), details })
            }
            false => Ok(None),
        }
    }

    /// Two that outrank each other in turn must not keep step.
    fn pause(&self, term: Term) -> Duration {
        let spread = u64::from(self.id.0[term.0 as usize % 16]) % PAUSE_SPREAD;
        LEAST_PAUSE + Duration::from_millis(spread)
    }
}

/// What is wrong with each safekeeper, and what to do.
fn details<N: Network>(driver: &Driver<N>) -> String {
    let troubled = driver.troubled();
    let list = |of: &dyn Fn(&NodeId) -> String, between: &str| {
        troubled.iter().map(of).collect::<Vec<_>>().join(between)
    };
    let remedy = match (troubled.is_empty(), driver.configuration().is_known()) {
        (true, _) => "see their logs".to_owned(),
        (false, true) => format!(
            "bring back those that are away ({}), with their directories; where most of the members are gone for good, 'pgstrata quorum \
             recover' goes on without them",
            list(&NodeId::to_string, ", ")
        ),
        (false, false) => format!(
            "a new branch is begun by a majority of all safekeepers: start those that do not answer ({}), and where one is gone for \
             good, or refuses, put another one in its place by {}",
            list(&NodeId::to_string, ", "),
            list(&|node| format!("'pgstrata safekeeper replace {node}'"), ", ")
        ),
    };
    format!("{}. What to do: {remedy}", driver.describe())
}
