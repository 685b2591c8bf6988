//! What `/metrics` shows. `docs/metrics.md` lists it.
//!
//! Of all timelines there are totals. Series of their own have those that matter now, and no more than [`MOST_SHOWN`]: a
//! safekeeper may have thousands, most of which are at rest.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use pgstrata_format::resting::TimelineSummary;
use prometheus::{
    Counter, Encoder, Gauge, GaugeVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::background::{Lag, Lags};
use crate::disk_space::DiskSpace;
use crate::timeline::Overview;
use crate::timelines::Timelines;

/// Where there are no more timelines than this, each is shown, at rest or not.
const ALL_SHOWN: usize = 100;

/// Most timelines that have series of their own.
const MOST_SHOWN: usize = 500;

/// What a timeline's series are labelled with.
const LABELS: [&str; 2] = ["tenant", "timeline"];
/// What those of its members are.
const MEMBER_LABELS: [&str; 3] = ["tenant", "timeline", "member"];

const PREFIX: &str = "pgstrata_safekeeper_";

type Outcome = Result<(), prometheus::Error>;

/// Name, help, value.
type OfTimeline = (&'static str, &'static str, fn(&Row) -> u64);

const OF_TIMELINE: [OfTimeline; 9] = [
    ("term", "Highest promised term", |row| row.summary().term.0),
    ("flush_lsn", "End of the durable log, bytes", |row| row.summary().flush_lsn.0),
    ("commit_lsn", "Known to be committed, bytes", |row| row.summary().commit_lsn.0),
    ("available_lsn", "First byte on disk", |row| row.summary().available_lsn.0),
    ("archived_lsn", "Archived up to, bytes", |row| row.summary().archived_lsn.0),
    ("archiving_failed", "1 if the last attempt to archive WAL failed here", |row| {
        u64::from(row.fails)
    }),
    ("remote_consistent_lsn", "Page server is done up to, bytes", |row| {
        row.summary().remote_consistent_lsn.0
    }),
    (
        "archive_lag_bytes",
        "Committed WAL that is not known to be archived; less than a segment is not archived yet",
        Row::archive_lag_bytes,
    ),
    (
        "catch_up_bytes",
        "WAL that is still to come from other members, as far as they have said what there is",
        |row| row.timeline.catch_up_bytes(),
    ),
];

/// A timeline as it is at one moment.
struct Row {
    timeline: Overview,
    /// How far its members are behind.
    lags: Vec<Lag>,
    /// WAL that is not here, in bytes.
    behind: u64,
    fails: bool,
}

impl Row {
    fn summary(&self) -> &TimelineSummary {
        &self.timeline.summary
    }

    fn archive_lag_bytes(&self) -> u64 {
        self.summary().commit_lsn.saturating_sub(self.summary().archived_lsn)
    }

    /// Which come first, where there are too many: those that fail, those that are behind, those that are used; `None` of
    /// one that is at rest.
    fn rank(&self) -> Option<u8> {
        match () {
            () if self.fails => Some(0),
            () if self.behind > 0 => Some(1),
            () if self.timeline.has_compute => Some(2),
            () => None,
        }
    }

    fn labels(&self) -> [String; 2] {
        let (tenant, timeline) = self.timeline.key();
        [tenant.to_string(), timeline.to_string()]
    }
}

/// Chooses those that have series of their own, by their ranks: their places.
fn chosen(ranks: &[Option<u8>]) -> Vec<usize> {
    let mut places: Vec<usize> = (0..ranks.len()).collect();
    if ranks.len() > ALL_SHOWN {
        places.retain(|&place| ranks[place].is_some());
        places.sort_by_key(|&place| ranks[place]);
        places.truncate(MOST_SHOWN);
    }
    places
}

/// Everything, in Prometheus's text form.
pub fn text(timelines: &Timelines, lags: &Lags) -> Result<String, prometheus::Error> {
    let registry = Registry::new();
    let context = timelines.context();
    context.shared.meters.register(&registry)?;
    register_space(&registry, &context.shared.space)?;
    let lags = lags.last();
    let row = |timeline: Overview| {
        let lags = lags.of(timeline.key()).to_vec();
        let own = lags.iter().find(|lag| lag.node == context.shared.own.node);
        Row {
            behind: own.map_or(0, |lag| lag.bytes).max(timeline.catch_up_bytes()),
            fails: timeline.archiving_error.is_some(),
            lags,
            timeline,
        }
    };
    let mut rows: Vec<Row> = timelines.overviews().into_iter().map(row).collect();
    // In an order that stays, so that of equals the same are shown each time.
    rows.sort_by_key(|row| row.timeline.key());
    let ranks: Vec<_> = rows.iter().map(Row::rank).collect();
    let shown: Vec<&Row> = chosen(&ranks).into_iter().map(|place| &rows[place]).collect();
    register_totals(&registry, timelines, &rows, shown.len())?;
    register_timelines(&registry, &shown)?;
    let mut bytes = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn gauge(registry: &Registry, name: &str, help: &str, value: u64) -> Outcome {
    let gauge = IntGauge::new(name, help)?;
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(Box::new(gauge))
}

fn register_totals(
    registry: &Registry,
    timelines: &Timelines,
    rows: &[Row],
    shown: usize,
) -> Outcome {
    let total = |value: fn(&Row) -> u64| rows.iter().map(value).fold(0, u64::saturating_add);
    gauge(
        registry,
        "wal_size_bytes",
        "Bytes of the WAL segments on disk, of all timelines that are served",
        total(|row| row.timeline.size_bytes()),
    )?;
    let totals: [(&str, &str, u64); 10] = [
        ("timelines", "Timelines that are served", rows.len() as u64),
        (
            "open_timelines",
            "Timelines that are open; the others of those that are served are at rest",
            total(|row| u64::from(row.timeline.is_open)),
        ),
        ("shown_timelines", "Timelines that have series of their own", shown as u64),
        ("damaged_timelines", "Timelines that can't be served", timelines.damaged().len() as u64),
        (
            "connected_timelines",
            "Timelines that a compute is connected about",
            total(|row| u64::from(row.timeline.has_compute)),
        ),
        (
            "behind_timelines",
            "Timelines that lack WAL here that is known to be committed",
            total(|row| u64::from(row.behind > 0)),
        ),
        (
            "archiving_failed_timelines",
            "Timelines whose last attempt to archive WAL failed here",
            total(|row| u64::from(row.fails)),
        ),
        (
            "all_timelines_lag_bytes",
            "Committed WAL that is not here, of all timelines",
            total(|row| row.behind),
        ),
        (
            "all_timelines_archive_lag_bytes",
            "Committed WAL that is not known to be archived, of all timelines",
            total(Row::archive_lag_bytes),
        ),
        (
            "all_timelines_catch_up_bytes",
            "WAL that is still to come from other members, of all timelines",
            total(|row| row.timeline.catch_up_bytes()),
        ),
    ];
    totals.iter().try_for_each(|(name, help, value)| {
        gauge(registry, &format!("{PREFIX}{name}"), help, *value)
    })
}

fn register_timelines(registry: &Registry, shown: &[&Row]) -> Outcome {
    for (name, help, value) in OF_TIMELINE {
        let gauges = IntGaugeVec::new(Opts::new(format!("{PREFIX}{name}"), help), &LABELS)?;
        registry.register(Box::new(gauges.clone()))?;
        for row in shown {
            let value = i64::try_from(value(row)).unwrap_or(i64::MAX);
            gauges.with_label_values(&row.labels()).set(value);
        }
    }
    let opts = |name: &str, help: &str| Opts::new(format!("{PREFIX}{name}"), help);
    let failed_at = GaugeVec::new(
        opts(
            "archiving_failed_timestamp_seconds",
            "When an attempt to archive WAL failed here last, also if one has succeeded since",
        ),
        &LABELS,
    )?;
    let lag_bytes = IntGaugeVec::new(
        opts(
            "lag_bytes",
            "Committed WAL that a member doesn't have; of others as they last said by the broker",
        ),
        &MEMBER_LABELS,
    )?;
    let lag_seconds = GaugeVec::new(
        opts("lag_seconds", "How long there has been WAL that a member doesn't have yet"),
        &MEMBER_LABELS,
    )?;
    registry.register(Box::new(failed_at.clone()))?;
    registry.register(Box::new(lag_bytes.clone()))?;
    registry.register(Box::new(lag_seconds.clone()))?;
    let now = Instant::now();
    for row in shown {
        let [tenant, timeline] = row.labels();
        if let Some(at) = row.timeline.archiving_failed_at {
            failed_at.with_label_values(&[&tenant, &timeline]).set(seconds(at));
        }
        for lag in &row.lags {
            let labels = [&tenant, &timeline, &lag.node.to_string()];
            let bytes = i64::try_from(lag.bytes).unwrap_or(i64::MAX);
            lag_bytes.with_label_values(&labels).set(bytes);
            lag_seconds.with_label_values(&labels).set(lag.time(now).as_secs_f64());
        }
    }
    Ok(())
}

/// Since 1970.
fn seconds(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn register_space(registry: &Registry, space: &DiskSpace) -> Outcome {
    let look = space.last();
    // Nothing rather than a number that is not known.
    if let Some(at) = look.at {
        let name = |name: &str| format!("{PREFIX}{name}");
        let help = "Bytes that are free on the disk of the directory";
        gauge(registry, &name("disk_free_bytes"), help, look.space.free)?;
        let help = "Bytes of the file system of the directory";
        gauge(registry, &name("disk_size_bytes"), help, look.space.total)?;
        let looked_at = Gauge::new(
            name("disk_looked_at_timestamp_seconds"),
            "When it was seen how much is free on the disk",
        )?;
        looked_at.set(seconds(at));
        registry.register(Box::new(looked_at))?;
        let bounds = IntGaugeVec::new(
            Opts::new(
                name("disk_bound_bytes"),
                "Free space below which a state of the disk begins",
            ),
            &["state"],
        )?;
        registry.register(Box::new(bounds.clone()))?;
        for (state, bound) in [
            ("warns", look.bounds.warn),
            ("slows", look.bounds.slow),
            ("refuses", look.bounds.refuse),
        ] {
            let bound = i64::try_from(bound).unwrap_or(i64::MAX);
            bounds.with_label_values(&[state]).set(bound);
        }
    }
    let help = "0: there is enough space, 1: it is warned of, 2: WAL is slowed, 3: WAL is refused";
    gauge(registry, &format!("{PREFIX}disk_state"), help, look.state() as u64)?;
    let paused = Counter::new(
        format!("{PREFIX}append_pause_seconds_total"),
        "Seconds that batches of WAL have waited since the start because the disk had little space",
    )?;
    paused.inc_by(space.paused().as_secs_f64());
    registry.register(Box::new(paused))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_timelines_are_all_shown_and_of_thousands_those_that_matter() {
        let few = vec![None; ALL_SHOWN];
        assert_eq!(chosen(&few).len(), ALL_SHOWN);
        let mut many = vec![None; 10_000];
        assert_eq!(chosen(&many), Vec::<usize>::new());
        many[7] = Some(2);
        many[9000] = Some(0);
        assert_eq!(chosen(&many), [9000, 7]);
        // All are in use, some of the last fail.
        let mut many = vec![Some(2); 10_000];
        many[9990..].fill(Some(0));
        let shown = chosen(&many);
        assert_eq!(shown.len(), MOST_SHOWN);
        assert_eq!(shown[..11], [9990, 9991, 9992, 9993, 9994, 9995, 9996, 9997, 9998, 9999, 0]);
    }
}
