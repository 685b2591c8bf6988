//! Counters for `/metrics`.

use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntGauge, IntGaugeVec, Opts, Registry,
};

use crate::repository::{COMPACT, FLUSH, Repository};
use crate::timeline::Timeline;

/// The page server's metrics.
pub struct Metrics {
    registry: Registry,
    /// Pages sent to computes.
    pub pages_served: IntCounter,
    /// Time of page requests.
    pub page_request_seconds: Histogram,
    /// Last ingested LSN, by branch.
    pub last_record_lsn: IntGaugeVec,
    /// LSN up to which everything is in object storage, by branch.
    pub remote_consistent_lsn: IntGaugeVec,
    /// 1 if ingest of a branch stopped for good, or it is not served at all.
    pub failed: IntGaugeVec,
    /// 1 if the last upload of a branch failed.
    pub upload_failing: IntGaugeVec,
    /// 1 if the last compaction of a branch failed.
    pub compaction_failing: IntGaugeVec,
    /// Pages of a branch that are known to be unreadable.
    pub unreadable_pages: IntGaugeVec,
    /// Failed attempts of background work, by job.
    pub background_failures: IntGaugeVec,
    /// Threads that panicked.
    pub panics: IntGauge,
}

impl Metrics {
    /// Registers everything. Fails only if two metrics have one name.
    pub fn new() -> Result<Metrics, prometheus::Error> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| -> Result<IntGaugeVec, prometheus::Error> {
            let gauge = IntGaugeVec::new(Opts::new(name, help), &["branch"])?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let last_record_lsn =
            gauge("pgstrata_pageserver_last_record_lsn", "End of the last record ingested")?;
        let remote_consistent_lsn = gauge(
            "pgstrata_pageserver_remote_consistent_lsn",
            "Everything up to here is in object storage",
        )?;
        let failed = gauge("pgstrata_pageserver_failed", "1 if ingest stopped for good")?;
        let upload_failing =
            gauge("pgstrata_pageserver_upload_failing", "1 if the last upload failed")?;
        let compaction_failing =
            gauge("pgstrata_pageserver_compaction_failing", "1 if the last compaction failed")?;
        let unreadable_pages =
            gauge("pgstrata_pageserver_unreadable_pages", "Pages known to be unreadable")?;
        let background_failures = IntGaugeVec::new(
            Opts::new(
                "pgstrata_pageserver_background_failures",
                "Failed attempts of background work since the start",
            ),
            &["job"],
        )?;
        registry.register(Box::new(background_failures.clone()))?;
        let panics = IntGauge::new(
            "pgstrata_pageserver_panics",
            "Background threads that panicked since the start (a few are counted)",
        )?;
        registry.register(Box::new(panics.clone()))?;
        let pages_served =
            IntCounter::new("pgstrata_pageserver_pages_total", "Pages sent to computes")?;
        registry.register(Box::new(pages_served.clone()))?;
        let buckets = prometheus::exponential_buckets(10e-6, 2.0, 18)?;
        let page_request_seconds = Histogram::with_opts(
            HistogramOpts::new("pgstrata_pageserver_request_seconds", "Time of page requests")
                .buckets(buckets),
        )?;
        registry.register(Box::new(page_request_seconds.clone()))?;
        Ok(Metrics {
            registry,
            pages_served,
            page_request_seconds,
            last_record_lsn,
            remote_consistent_lsn,
            failed,
            upload_failing,
            compaction_failing,
            unreadable_pages,
            background_failures,
            panics,
        })
    }

    /// Takes down where a timeline stands.
    pub fn observe(&self, timeline: &Timeline) {
        let name = timeline.name();
        let set = |gauge: &IntGaugeVec, value: i64| {
            gauge.with_label_values(&[name.as_str()]).set(value);
        };
        set(&self.last_record_lsn, timeline.progress.lsn().0 as i64);
        set(&self.remote_consistent_lsn, timeline.remote_consistent_lsn().0 as i64);
        set(&self.failed, i64::from(timeline.failure().is_some()));
        set(&self.upload_failing, i64::from(timeline.trouble(FLUSH).is_some()));
        set(&self.compaction_failing, i64::from(timeline.trouble(COMPACT).is_some()));
        set(&self.unreadable_pages, timeline.unmakeable().0 as i64);
    }

    /// Takes down what is not of one branch.
    pub fn observe_repository(&self, repository: &Repository) {
        for (id, broken) in repository.broken() {
            let name = broken.name.unwrap_or_else(|| id.to_string());
            self.failed.with_label_values(&[name.as_str()]).set(1);
        }
        for id in repository.namesakes().into_keys() {
            if let Ok(timeline) = repository.timeline(id) {
                self.failed.with_label_values(&[timeline.name().as_str()]).set(1);
            }
        }
        for (job, failures) in repository.failures() {
            self.background_failures.with_label_values(&[job]).set(failures.count as i64);
        }
        self.panics.set(repository.panics().len() as i64);
    }

    /// The text exposition.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let mut bytes = Vec::new();
        prometheus::TextEncoder::new().encode(&self.registry.gather(), &mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}
