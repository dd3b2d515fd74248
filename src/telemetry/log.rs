//! Log lines on stderr.

use std::io::{IsTerminal, stderr};

use serde::{Deserialize, Serialize};
use tracing_subscriber::{EnvFilter, fmt};

use super::Error;

/// The environment variable that overrides the configured filter.
const VARIABLE: &str = "REWAKE_LOG";

/// The `[log]` section of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// What is logged, in the language of `RUST_LOG`: `info`, `rewake=debug`, `warn,rewake::engine=trace`.
    pub filter: String,
    pub format: Format,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { filter: "info".into(), format: Format::Text }
    }
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One readable line an event, coloured on a terminal.
    Text,
    /// One JSON object an event.
    Json,
}

/// Starts logging to stderr for the whole process; `REWAKE_LOG` has the last word on the filter.
pub fn init(config: &LogConfig) -> Result<(), Error> {
    let filter = filter(config, std::env::var(VARIABLE).ok())?;
    let lines = fmt().with_env_filter(filter).with_writer(stderr);
    match config.format {
        Format::Text => lines.with_ansi(stderr().is_terminal()).try_init(),
        Format::Json => lines.json().flatten_event(true).try_init(),
    }
    .map_err(|_| Error::LoggingTwice)
}

fn filter(config: &LogConfig, variable: Option<String>) -> Result<EnvFilter, Error> {
    let filter = variable.filter(|v| !v.trim().is_empty()).unwrap_or_else(|| config.filter.clone());
    EnvFilter::try_new(&filter).map_err(|e| Error::Filter { filter, reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_overrides_the_configured_filter() {
        let config = LogConfig { filter: "warn".into(), ..LogConfig::default() };
        assert_eq!(filter(&config, None).unwrap().to_string(), "warn");
        assert_eq!(filter(&config, Some(" ".into())).unwrap().to_string(), "warn");
        assert_eq!(filter(&config, Some("rewake=debug".into())).unwrap().to_string(), "rewake=debug");
    }

    #[test]
    fn a_bad_filter_is_named() {
        let config = LogConfig { filter: "rewake=loud".into(), ..LogConfig::default() };
        assert!(filter(&config, None).unwrap_err().to_string().contains("`rewake=loud`"));
    }

    #[test]
    fn the_section_refuses_unknown_fields() {
        assert!(serde_json::from_str::<LogConfig>(r#"{"level": "info"}"#).is_err());
        let read: LogConfig = serde_json::from_str(r#"{"format": "json"}"#).unwrap();
        assert_eq!(read, LogConfig { format: Format::Json, ..LogConfig::default() });
    }
}
