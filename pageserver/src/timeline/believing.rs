//! Whether what was taken in is of the log that goes on, and what is done where it is not: see
//! [`receiver::believing`](crate::receiver::believing).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use pgstrata_format::quorum::{self, Quorum};
use pgstrata_ids::Lsn;

use super::Timeline;
use crate::ingest::IngestError;
use crate::layer::OpenLayer;
use crate::lock::wait_for;
use crate::receiver::believing::{Decided, Doubt};

/// Longest wait for object storage.
const PATIENCE: Duration = Duration::from_secs(4);

/// Object storage that did not answer is not asked again for so long: whoever follows and feeds waits for it.
const AWAY_FOR: Duration = Duration::from_secs(10);

/// How soon it is looked at again whether something that ingest does is done.
const MOMENT: Duration = Duration::from_millis(10);

/// What was read so long ago at most is good enough to choose a source by: what comes of that is looked at again.
const GOOD_FOR: Duration = Duration::from_secs(1);

impl Timeline {
    /// Reads what is decided of the members.
    fn read_decided(&self) -> Result<Decided, String> {
        let store = &self.source.store;
        let object = Quorum::object_name(self.info.tenant, self.info.id);
        let read =
            async { tokio::time::timeout(PATIENCE, store.get(&object, quorum::LIMIT)).await };
        let bytes = match wait_for(&self.source.runtime, read) {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) if error.is_not_found() => return Ok(Decided::new(None)),
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => {
                let seconds = PATIENCE.as_secs();
                return Err(format!("{} has not answered for {seconds} s", store.name()));
            }
        };
        let decoded = Quorum::decode(&bytes);
        decoded.map(|quorum| Decided::new(Some(&quorum))).map_err(|error| error.to_string())
    }

    /// Whether a source is followed that knows of configuration `number` of the members, and of no later one.
    pub fn judge(&self, number: u64) -> Result<(), Doubt> {
        let before = self.decided_at.lock().clone();
        let by_before = match before {
            Some((at, None)) if at.elapsed() < GOOD_FOR && !self.is_in_doubt() => {
                self.believing.lock().judge_again(number)
            }
            Some((at, Some(why))) if at.elapsed() < AWAY_FOR => {
                Some(self.believing.lock().judge(number, Err(why)))
            }
            _ => None,
        };
        let judged = match by_before {
            Some(judged) => judged,
            None => {
                let read = self.read_decided();
                *self.decided_at.lock() = Some((Instant::now(), read.as_ref().err().cloned()));
                self.believing.lock().judge(number, read)
            }
        };
        match judged {
            Err(Doubt::Taken(lsn)) => self.parts_at.store(lsn.0, Ordering::Release),
            // Others found it, and it may be durable by now: that is found out where it is to be forgotten.
            Ok(()) if self.is_in_doubt() => {
                return Err(Doubt::Taken(Lsn(self.parts_at.load(Ordering::Acquire))));
            }
            _ => {}
        }
        judged
    }

    /// WAL up to here is about to be taken in from whoever was judged last.
    pub fn took(&self, end: Lsn) {
        if end > self.remote_consistent_lsn() {
            self.believing.lock().took(end);
        }
    }

    /// Whether something that was taken in is known not to be of the log that goes on.
    pub fn is_in_doubt(&self) -> bool {
        self.parts_at.load(Ordering::Acquire) > 0
    }

    /// An error if something that is not durable yet is not of the log that goes on, or that can't be found out: nothing that others
    /// rely on may be made of it.
    pub fn check_taken(&self) -> Result<()> {
        if !self.believing.lock().has_taken() {
            return Ok(());
        }
        let read = self.read_decided();
        match self.believing.lock().parts_at(read) {
            Ok(None) => Ok(()),
            Ok(Some(lsn)) => {
                self.parts_at.store(lsn.0, Ordering::Release);
                Err(IngestError::GivenUp(lsn).into())
            }
            Err(why) => bail!("who was given up of the branch's members can't be found out: {why}"),
        }
    }

    /// Waits until what is not of the log is forgotten, and what is, up to where they part, has come from others.
    pub fn wait_out_doubt(&self, parts_at: Lsn, timeout: Duration) -> Result<(), String> {
        let deadline = Instant::now() + timeout;
        while self.is_in_doubt() {
            if Instant::now() >= deadline {
                return Err(format!(
                    "what was taken in after {parts_at} was given up with the safekeepers that had it, and is not forgotten yet: \
                     try again"
                ));
            }
            std::thread::sleep(MOMENT);
        }
        self.wait(parts_at, deadline.saturating_duration_since(Instant::now()))
    }

    /// Forgets what is only in memory, if it is not of the log that goes on. Only the thread that ingests may call this, without an
    /// ingest.
    pub fn rewind_if_in_doubt(&self) -> Result<(), IngestError> {
        if !self.is_in_doubt() {
            return Ok(());
        }
        let parts_at = Lsn(self.parts_at.load(Ordering::Acquire));
        let _flushing = self.flushing.take();
        let index = self.index.current();
        let parse = |text: &str| {
            text.parse().map_err(|error| IngestError::Storage(anyhow::Error::from(error)))
        };
        let (lsn, record_start): (Lsn, Lsn) =
            (parse(&index.remote_consistent_lsn)?, parse(&index.last_record)?);
        if lsn > parts_at {
            let error = anyhow::anyhow!(
                "its WAL from {parts_at} on was given up with the safekeepers that had it, and is in its layers up to {lsn} by \
                 now: 'pgstrata branch create NAME --from {} --at {parts_at}' makes a branch of what is before",
                index.name
            );
            return Err(IngestError::Wal(error));
        }
        let from = self.progress.lsn();
        let count = self.rewinds.load(Ordering::Acquire) + 1;
        self.partings.write().push((count, parts_at, from));
        // Nobody begins to read what is forgotten then; and who has begun finds it out.
        self.progress.rewind(lsn, record_start);
        {
            let mut layers = self.layers.write();
            self.rewinds.store(count, Ordering::Release);
            layers.open = Arc::new(OpenLayer::new(lsn));
            layers.frozen.clear();
        }
        self.forget_databases();
        self.commit_times.write().clear();
        self.pages.clear();
        self.believing.lock().rewound();
        self.parts_at.store(0, Ordering::Release);
        tracing::warn!(
            timeline = %self.info.id,
            "what was taken in from {lsn} to {from} is taken anew: from {parts_at} on it was given up with the safekeepers that \
             had it"
        );
        Ok(())
    }
}
