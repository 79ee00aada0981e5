//! Sets up logging: text or JSON lines on standard error.
//!
//! The filter is a list of targets and levels, matched by prefix. It is not tracing-subscriber's
//! `EnvFilter`, whose regular expressions cost resident memory for directives nobody uses.

use std::{io, str::FromStr};

use tracing_subscriber::{
    Layer,
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt,
    util::{SubscriberInitExt, TryInitError},
};

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For a person.
    #[default]
    Text,
    /// One JSON object per line, for a machine.
    Json,
}

/// Says why a text names no log format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("log format {text:?} is unknown: use text or json")]
pub struct LogFormatError {
    /// The text as it came.
    pub text: String,
}

impl FromStr for LogFormat {
    type Err = LogFormatError;

    fn from_str(text: &str) -> Result<Self, LogFormatError> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(LogFormatError {
                text: text.to_owned(),
            }),
        }
    }
}

/// What is logged: `info`, `clip_csi=debug`, `warn,clip_csi=info,hyper::proto=trace`.
///
/// A level alone is for everything that no target names; without one that is `warn`, because what
/// the libraries say is seldom of interest.
#[derive(Debug, Clone, PartialEq)]
pub struct LogFilter(Targets);

/// Says which part of a log filter is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "log level {part:?} is malformed: use off, error, warn, info, debug or trace, \
     or target=level, such as clip_csi=debug, separated by commas"
)]
pub struct LogFilterError {
    /// The part as it came.
    pub part: String,
}

impl FromStr for LogFilter {
    type Err = LogFilterError;

    fn from_str(text: &str) -> Result<Self, LogFilterError> {
        let mut targets = Targets::new().with_default(LevelFilter::WARN);
        for part in text.split(',').map(str::trim) {
            let malformed = || LogFilterError {
                part: part.to_owned(),
            };
            targets = match part.split_once('=') {
                None => targets.with_default(parse_level(part).ok_or_else(malformed)?),
                Some((target, level)) if is_target(target) => {
                    targets.with_target(target, parse_level(level).ok_or_else(malformed)?)
                }
                Some(_) => return Err(malformed()),
            };
        }
        Ok(Self(targets))
    }
}

fn parse_level(text: &str) -> Option<LevelFilter> {
    match text.to_ascii_lowercase().as_str() {
        "off" => Some(LevelFilter::OFF),
        "error" => Some(LevelFilter::ERROR),
        "warn" => Some(LevelFilter::WARN),
        "info" => Some(LevelFilter::INFO),
        "debug" => Some(LevelFilter::DEBUG),
        "trace" => Some(LevelFilter::TRACE),
        _ => None,
    }
}

/// A Rust path: with a hyphen, as the package has, it would match nothing.
fn is_target(text: &str) -> bool {
    let of_path = |it: char| it.is_ascii_alphanumeric() || it == '_' || it == ':';
    !text.is_empty() && text.chars().all(of_path)
}

/// Sends the process's log to standard error. Call it once, first.
///
/// # Errors
/// If logging is set up already.
pub fn init(format: LogFormat, filter: LogFilter) -> Result<(), TryInitError> {
    let lines = fmt::layer().with_writer(io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(false).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(filter.0))
        .try_init()
}

/// Writes an error with all its causes, in one line.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn filters_enable_what_they_name() {
        for (text, target, level, want) in [
            ("info", "clip_csi", Level::INFO, true),
            ("info", "clip_csi", Level::DEBUG, false),
            ("INFO", "hyper", Level::INFO, true),
            ("clip_csi=debug", "clip_csi", Level::DEBUG, true),
            ("clip_csi=debug", "hyper", Level::INFO, false),
            ("clip_csi=debug", "hyper", Level::WARN, true),
            (
                "off, hyper::proto=trace",
                "hyper::proto",
                Level::TRACE,
                true,
            ),
            ("off, hyper::proto=trace", "clip_csi", Level::ERROR, false),
        ] {
            let filter: LogFilter = text.parse().unwrap();
            assert_eq!(
                filter.0.would_enable(target, &level),
                want,
                "{text} {target} {level}"
            );
        }
    }

    #[test]
    fn malformed_filters_are_told_which_part() {
        for (text, part) in [
            ("", ""),
            ("loud", "loud"),
            ("info,clip-csi=debug", "clip-csi=debug"),
            ("info,=debug", "=debug"),
            ("clip_csi=", "clip_csi="),
            ("info,", ""),
        ] {
            let err = text.parse::<LogFilter>().unwrap_err();
            assert_eq!(err.part, part, "{text:?}");
        }
    }

    #[test]
    fn formats_are_named() {
        assert_eq!("text".parse(), Ok(LogFormat::Text));
        assert_eq!("json".parse(), Ok(LogFormat::Json));
        let err = "yaml".parse::<LogFormat>().unwrap_err();
        assert_eq!(
            err.to_string(),
            "log format \"yaml\" is unknown: use text or json"
        );
    }

    #[test]
    fn the_chain_names_every_cause() {
        #[derive(Debug, thiserror::Error)]
        #[error("reading layer 7")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("cable cut"));
        assert_eq!(error_chain(&error), "reading layer 7: cable cut");
    }
}
