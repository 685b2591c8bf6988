//! What is counted as it happens, for `/metrics`. Recording takes no lock.

use std::time::Duration;

use pgstrata_quorum::Refusal;
use pgstrata_wire::safekeeper::{Message, RefusedReason};
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry};

use crate::storage_error::StorageError;
use crate::timeline::Answer;

/// Upper bounds of the histogram of syncs, in seconds: from what memory behind a controller takes to what is given up.
const SYNC_BUCKETS: [f64; 16] = [
    100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0,
];

/// Reasons for which appends are refused; there are no others.
const REASONS: [&str; 6] = ["disk_low", "disk_full", "storage", "invalid_wal", "fenced", "quorum"];

/// See the module. Clones count the same.
#[derive(Clone, Debug)]
pub struct Meters {
    written: IntCounter,
    syncs: IntCounter,
    sync_duration: Histogram,
    refused: IntCounterVec,
    damage_found: IntCounter,
    mended: IntCounter,
}

impl Meters {
    /// Everything at nothing. Fails only if a name is none that a metric may have.
    pub fn new() -> Result<Meters, prometheus::Error> {
        let duration = HistogramOpts::new(
            "wal_sync_duration_seconds",
            "Time of the syncs that acknowledgements of WAL wait for, in seconds",
        );
        let refused = IntCounterVec::new(
            Opts::new(
                "pgstrata_safekeeper_refused_appends_total",
                "Appends of computes that were refused, by reason",
            ),
            &["reason"],
        )?;
        for reason in REASONS {
            refused.get_metric_with_label_values(&[reason])?;
        }
        Ok(Meters {
            written: IntCounter::new(
                "wal_bytes_written_total",
                "Bytes of WAL written to segments since the start, from computes and from other members",
            )?,
            syncs: IntCounter::new(
                "wal_syncs_total",
                "Syncs of WAL segments since the start that acknowledgements waited for",
            )?,
            sync_duration: Histogram::with_opts(duration.buckets(SYNC_BUCKETS.to_vec()))?,
            refused,
            damage_found: IntCounter::new(
                "pgstrata_safekeeper_damage_found_total",
                "Times since the start that segments of a timeline were found to be damaged",
            )?,
            mended: IntCounter::new(
                "pgstrata_safekeeper_mended_total",
                "Times since the start that a timeline's segments were mended",
            )?,
        })
    }

    /// Segments of a timeline are damaged.
    pub fn found_damage(&self) {
        self.damage_found.inc();
    }

    /// They are not any more.
    pub fn mended(&self) {
        self.mended.inc();
    }

    /// So many bytes of WAL were written.
    pub fn wrote(&self, bytes: usize) {
        self.written.inc_by(bytes as u64);
    }

    /// So many segments were synced within this time.
    pub fn synced(&self, files: usize, took: Duration) {
        self.syncs.inc_by(files as u64);
        self.sync_duration.observe(took.as_secs_f64());
    }

    /// An append was refused, for what this answer says.
    pub fn refused(&self, answer: &Result<Answer, StorageError>) {
        self.refused.with_label_values(&[reason(answer)]).inc();
    }

    /// Adds everything to what is shown.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.written.clone()))?;
        registry.register(Box::new(self.syncs.clone()))?;
        registry.register(Box::new(self.sync_duration.clone()))?;
        registry.register(Box::new(self.refused.clone()))?;
        registry.register(Box::new(self.damage_found.clone()))?;
        registry.register(Box::new(self.mended.clone()))
    }
}

/// One of [`REASONS`].
fn reason(answer: &Result<Answer, StorageError>) -> &'static str {
    match answer {
        Err(StorageError::DiskFull { kept_bytes: 0, .. }) => "disk_full",
        Err(StorageError::DiskFull { .. }) => "disk_low",
        Err(_) => "storage",
        Ok(Some(Message::Refused(RefusedReason::InvalidWal(_)))) => "invalid_wal",
        Ok(Some(Message::Refused(RefusedReason::Quorum(Refusal::Fenced { .. })))) => "fenced",
        Ok(_) => "quorum",
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn what_is_recorded_is_shown_and_every_reason_is_there_from_the_start() {
        let meters = Meters::new().unwrap();
        let full = |kept_bytes| {
            let (action, path) = ("write", PathBuf::from("x"));
            Err(StorageError::DiskFull { action, path, kept_bytes })
        };
        meters.wrote(1000);
        meters.synced(2, Duration::from_micros(300));
        meters.synced(1, Duration::from_secs(60));
        meters.refused(&full(1));
        meters.refused(&full(1));
        meters.refused(&full(0));
        let invalid = RefusedReason::InvalidWal(String::new());
        meters.refused(&Ok(Some(Message::Refused(invalid))));
        let registry = Registry::new();
        meters.register(&registry).unwrap();
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for line in [
            "# TYPE wal_sync_duration_seconds histogram",
            "wal_bytes_written_total 1000",
            "wal_syncs_total 3",
            "wal_sync_duration_seconds_bucket{le=\"0.0001\"} 0",
            "wal_sync_duration_seconds_bucket{le=\"0.0005\"} 1",
            "wal_sync_duration_seconds_bucket{le=\"10\"} 1",
            "wal_sync_duration_seconds_bucket{le=\"+Inf\"} 2",
            "wal_sync_duration_seconds_count 2",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in:\n{text}");
        }
        for (reason, count) in REASONS.iter().zip([2, 1, 0, 1, 0, 0]) {
            let line =
                format!("pgstrata_safekeeper_refused_appends_total{{reason=\"{reason}\"}} {count}");
            assert!(text.lines().any(|other| other == line), "{line} is not in:\n{text}");
        }
    }
}
