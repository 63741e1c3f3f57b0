//! How starting a cluster fails.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use baton_identity::IssueError;

use super::launch::START_TIMEOUT;

/// Daemons end with one line that says why; before it come progress and warnings.
fn last_line(log_tail: &str) -> &str {
    log_tail.trim_end().lines().next_back().unwrap_or("it said nothing")
}

/// Why a cluster did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The model is not where it should be.
    #[error("the demo model is not found (models/demo beside or above {}); give --model DIR", .0.display())]
    NoDemoModel(PathBuf),
    /// The model's folder is no model.
    #[error("{}: there is no config.json in it", .0.display())]
    NoModel(PathBuf),
    /// The daemons are not installed beside this program.
    #[error(
        "{} is not found; build or install the daemons beside `baton` (cargo build --workspace)",
        .0.display()
    )]
    NoDaemon(PathBuf),
    /// The state folder cannot be used.
    #[error("{}: {source}", path.display())]
    State {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// No certificates.
    #[error(transparent)]
    Certificates(#[from] IssueError),
    /// A daemon ended before it was ready.
    #[error("{name} did not start ({status}): {}", last_line(log_tail))]
    Ended {
        /// Its name.
        name: String,
        /// Its exit status.
        status: ExitStatus,
        /// The end of its log.
        log_tail: String,
    },
    /// A daemon's ready line lacks an address.
    #[error("{name} says {line:?}, which does not name its addresses; is it of another version?")]
    ReadyLine {
        /// Its name.
        name: String,
        /// What it said.
        line: String,
    },
    /// Nothing failed, but it takes too long.
    #[error("the cluster is not ready after {} s: {reason}", START_TIMEOUT.as_secs())]
    Timeout {
        /// What the coordinator waits for.
        reason: String,
    },
}

pub(super) fn state_error(path: &Path) -> impl FnOnce(std::io::Error) -> StartError {
    let path = path.to_owned();
    move |source| StartError::State { path, source }
}
