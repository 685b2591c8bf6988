//! What the winner of a term asks safekeepers that have its log: all at once, and the first answer counts, so that one that hangs
//! keeps nobody waiting.

use std::fmt::{Display, Write as _};
use std::time::{Duration, Instant};

use pgstrata_ids::{Lsn, NodeId};

use super::super::config::ProposerError;
use super::super::driver::Driver;
use super::super::network::Network;

/// After a quorum could not answer, others are waited for so long.
const GRACE: Duration = Duration::from_millis(20);

/// Longest wait until any safekeeper has answered, which may have to catch up first.
const TIMEOUT: Duration = Duration::from_secs(15);

/// See the module.
#[derive(Debug)]
pub struct Question {
    at: Lsn,
    deadline: Instant,
    asked: Vec<NodeId>,
    failed: usize,
    failed_at: Instant,
    details: String,
}

impl Question {
    /// One to those who have the log up to `at`.
    pub fn new(at: Lsn, now: Instant) -> Question {
        let details = String::new();
        let deadline = now + TIMEOUT;
        Question { at, deadline, asked: Vec::new(), failed: 0, failed_at: now, details }
    }

    /// Who has it by now and was not asked before, with where they are: they are asked now, once.
    pub fn to_ask<N: Network>(&mut self, driver: &Driver<N>) -> Vec<(NodeId, String)> {
        let mut holders = driver.holders(self.at);
        holders.retain(|(node, _)| !self.asked.contains(node));
        self.asked.extend(holders.iter().map(|(node, _)| *node));
        holders
    }

    /// This one gave no answer.
    pub fn failed(&mut self, now: Instant, node: NodeId, why: &dyn Display) {
        self.failed += 1;
        self.failed_at = now;
        // A string takes everything.
        let _ = write!(self.details, "safekeeper {node}: {why}; ");
    }

    /// Whether an answer may still come, and is of use.
    pub fn check<N: Network>(&self, now: Instant, driver: &Driver<N>) -> Result<(), ProposerError> {
        driver.check()?;
        // What so many say, the others will say too; those that are about to have the log get a moment.
        let members = driver.configuration();
        let is_quorum = members.is_quorum(|member| self.asked.contains(&member.node));
        let waited = now.saturating_duration_since(self.failed_at);
        let all_failed = is_quorum && self.failed == self.asked.len() && waited > GRACE;
        match all_failed || now >= self.deadline {
            true => {
                let details = format!("{}{}", self.details, driver.describe());
                Err(ProposerError::Unreadable { at: self.at, details })
            }
            false => Ok(()),
        }
    }
}
