//! What a compute does between its driver's turns: the shipped cores that campaign, ask, have the first records committed, and follow.

use bytes::Bytes;
use pgstrata_compute_shim::proposer::{Following, ProposerError, Question, Recording};
use pgstrata_ids::NodeId;

use crate::compute::{Files, Stage};

use super::*;

/// So long a first record may take to be committed, by a driver's clock: who alone has what the term begins with may be gone.
const RECORD_TIMEOUT: Duration = Duration::from_secs(30);

/// An answer to a question is waited for so long.
const NO_ANSWER: Time = 50_000;

impl World {
    /// What has come of its stage by the last turn: an error ends it.
    pub(super) fn lead(&mut self, compute: usize) -> Checked<Result<(), ProposerError>> {
        let (now, time) = (self.instant(), self.now);
        let one = &mut self.computes[compute];
        let Some(driver) = &mut one.driver else { return Ok(Ok(())) };
        let done = match &mut one.stage {
            Stage::Ended => return Ok(Ok(())),
            Stage::Campaigns(campaign) => match campaign.step(now, driver) {
                Ok(None) => return Ok(Ok(())),
                Ok(Some(elected)) => {
                    let (start, won) = (one.written.start, one.won);
                    if (elected.term, elected.start_lsn) != (won, start) {
                        return Err(format!("compute {compute} has won {elected:?}, not {won}"));
                    }
                    if elected.has_record_before(&self.parameters) {
                        one.stage = Stage::Asks(Question::new(start, now));
                        return Ok(self.ask_holders(compute));
                    }
                    one.generator = Some(generator(&self.parameters, start, Lsn(8), won));
                    self.record(compute, 1)
                }
                Err(error) => Err(error),
            },
            Stage::Asks(_) => self.ask_holders(compute),
            Stage::Records(recording, left) => match recording.step(now, driver) {
                Ok(None) => return Ok(Ok(())),
                Ok(Some(end)) if end > one.written.committed => {
                    let committed = one.written.committed;
                    return Err(format!(
                        "compute {compute} takes {end} for committed: {committed}"
                    ));
                }
                Ok(Some(_)) if *left > 0 => {
                    let left = *left - 1;
                    self.record(compute, left)
                }
                Ok(Some(_)) => {
                    let most = if self.rng.one_in(8) { 20_000 } else { 1500 };
                    one.stage = Stage::Drives(time + self.rng.below(most));
                    Ok(())
                }
                Err(error) => Err(error),
            },
            Stage::Drives(until) => {
                let is_over = time >= *until;
                let checked = driver.check();
                if is_over {
                    let commit_lsn = Arc::clone(&one.written.commit_lsn);
                    one.written.told = driver.commit_lsn();
                    one.stage = Stage::Follows(Following::new(driver, commit_lsn, now));
                }
                checked
            }
            Stage::Follows(following) => {
                let mut files = Files {
                    written: &mut one.written,
                    reads: &mut self.outcome.file_reads,
                    most_uncommitted: MOST_PENDING,
                    are_recycled: false,
                    wrong: None,
                };
                let reported = following.report(driver, &mut files);
                if let Some(wrong) = files.wrong {
                    return Err(format!("compute {compute}: {wrong}"));
                }
                following.look(now, driver);
                reported
            }
        };
        Ok(done)
    }

    /// One of the first records of its term is to be committed, and so many after it.
    fn record(&mut self, compute: usize, left: u8) -> Result<(), ProposerError> {
        let now = self.instant();
        let size = self.rng.below(self.plan.record) as usize;
        let one = &mut self.computes[compute];
        let is_elected = one.is_elected();
        let (Some(driver), Some(generator)) = (&mut one.driver, &mut one.generator) else {
            return Ok(());
        };
        let bytes = generator.record(size);
        let appended = Bytes::copy_from_slice(&bytes);
        let recording = Recording::begin(driver, appended, RECORD_TIMEOUT, now)?;
        if is_elected {
            self.truth.wrote(compute, one.won, &bytes);
        }
        one.written.bytes.extend_from_slice(&bytes);
        one.written.is_given();
        one.stage = Stage::Records(recording, left);
        Ok(())
    }

    /// Those who have its log by now are asked where the record before the own ones begins, each on a connection of its own.
    fn ask_holders(&mut self, compute: usize) -> Result<(), ProposerError> {
        let now = self.instant();
        let one = &mut self.computes[compute];
        let (Stage::Asks(question), Some(driver)) = (&mut one.stage, &one.driver) else {
            return Ok(());
        };
        question.check(now, driver)?;
        let life = one.life;
        for (holder, _) in question.to_ask(driver) {
            let node = self.node_of(holder.0);
            let delay = match self.is_cut(compute, node) {
                true => NO_ANSWER,
                false => 2 * self.delay(node),
            };
            self.after(delay, Event::LastRecord { compute, life, node });
        }
        Ok(())
    }

    /// What one of them says: the first answer counts.
    pub(super) fn last_record(&mut self, compute: usize, life: u64, node: usize) -> Checked {
        let is_cut = self.is_cut(compute, node);
        let (now, key) = (self.instant(), self.key());
        let start = self.computes[compute].written.start;
        let found = match self.visit(node).filter(|_| !is_cut) {
            Some(mut visit) => {
                let opened = visit.open(key).map_err(|reason| reason.to_string());
                opened.and_then(|_| visit.last_record(start).map_err(|reason| reason.to_string()))
            }
            None => Err("no answer".to_owned()),
        };
        self.settle(node)?;
        if self.computes[compute].life != life {
            return Ok(());
        }
        self.wake_compute(compute);
        self.log(|| format!("compute {compute} asks for the record before {start}: {found:?}"));
        let one = &mut self.computes[compute];
        let Stage::Asks(question) = &mut one.stage else { return Ok(()) };
        match found {
            Err(why) => question.failed(now, NodeId(node as u64 + 1), &why),
            Ok(Lsn::INVALID) => {
                return Err(format!("safekeeper {} has no record before {start}", node + 1));
            }
            Ok(prev) => {
                one.generator = Some(generator(&self.parameters, start, prev, one.won));
                // Outranked it may be by now, and ends by that.
                if let Err(error) = self.record(compute, 1) {
                    self.log(|| format!("compute {compute}: {error}"));
                    self.end_compute(compute, 2000);
                }
            }
        }
        Ok(())
    }
}
