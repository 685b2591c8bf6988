//! The log of a service: lines on standard error, without what colours them.

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Begins it. The environment's `variable` says what is logged, as `debug`, or `info,pgstrata_pageserver::ingest=trace`; what
/// can't be read, or is not there, means `info`. (Filters by fields of spans would take regular expressions, of which the
/// programs need no others.)
pub fn log(variable: &str) {
    let asked = std::env::var(variable).ok().and_then(|text| text.parse::<Targets>().ok());
    let levels = asked.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(LevelFilter::TRACE)
        .finish()
        .with(levels)
        .init();
}
