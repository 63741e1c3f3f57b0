//! Logs on standard error, or in systemd's journal with one field for each value.

use std::io;
use std::os::fd::AsFd;
use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::journal::Journal;

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
    /// An entry of systemd's journal, whose fields are named as the values are, in upper case.
    Journal,
}

/// No format has that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be text, json or journal")]
pub struct UnknownFormat;

impl FromStr for LogFormat {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        match name {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            "journal" => Ok(Self::Journal),
            _ => Err(UnknownFormat),
        }
    }
}

/// Logs what `filter` lets through; without a format, to the journal if standard error is connected
/// to it, else as text. A filter or a journal that cannot be used is returned as text.
pub fn start_logging(filter: &str, format: Option<LogFormat>) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|e| format!("log is {filter:?}: {e}"))?;
    let usual = || if is_journal() { LogFormat::Journal } else { LogFormat::Text };
    let lines = tracing_subscriber::fmt().with_ansi(false).with_writer(io::stderr);
    match format.unwrap_or_else(usual) {
        LogFormat::Text => lines.with_env_filter(filter).init(),
        LogFormat::Json => lines.json().with_env_filter(filter).init(),
        LogFormat::Journal => {
            let journal = Journal::open()
                .map_err(|e| format!("log_format is journal, and there is none: {e}"))?;
            tracing_subscriber::registry().with(filter).with(journal).init();
        }
    }
    Ok(())
}

/// Whether standard error is what systemd connected to its journal: see systemd.exec(5),
/// `$JOURNAL_STREAM`.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stderr) = io::stderr().as_fd().try_clone_to_owned() else { return false };
    let Ok(metadata) = std::fs::File::from(stderr).metadata() else { return false };
    use std::os::unix::fs::MetadataExt;
    stream == format!("{}:{}", metadata.dev(), metadata.ino())
}
