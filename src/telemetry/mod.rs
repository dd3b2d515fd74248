//! L0: what operators see (log lines, metrics) and the only clock.

pub mod clock;
mod log;
pub mod metrics;

pub use log::{Format, LogConfig, init};

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{filter}` is not a log filter (try `info` or `rewake=debug`): {reason}")]
    Filter { filter: String, reason: String },
    #[error("logging is already set up in this process")]
    LoggingTwice,
    #[error("the metrics recorder cannot be installed: {0}")]
    Metrics(String),
}
