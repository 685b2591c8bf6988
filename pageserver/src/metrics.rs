//! Counters for `/metrics`.

use prometheus::{Encoder, Histogram, HistogramOpts, IntCounter, IntGaugeVec, Opts, Registry};

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
    /// 1 if ingest of a branch stopped for good.
    pub failed: IntGaugeVec,
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
    }

    /// The text exposition.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let mut bytes = Vec::new();
        prometheus::TextEncoder::new().encode(&self.registry.gather(), &mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}
