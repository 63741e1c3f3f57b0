//! One file per command.

pub(crate) mod bench;
pub(crate) mod cache;
pub(crate) mod cancel;
pub(crate) mod certs;
pub(crate) mod check;
mod complete;
pub(crate) mod completions;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod drain;
pub(crate) mod events;
pub(crate) mod explain;
pub(crate) mod generate;
pub(crate) mod keys;
pub(crate) mod nodes;
pub(crate) mod plan;
pub(crate) mod requests;
pub(crate) mod role;
pub(crate) mod status;
pub(crate) mod top;

mod orders;

/// What a command fails with: one line for a person.
pub(crate) type CommandError = Box<dyn std::error::Error + Send + Sync>;

/// A failure that scripts tell from others by the exit status.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failed {
    /// The exit status.
    pub(crate) status: u8,
    message: String,
}

impl Failed {
    /// What was named does not exist.
    pub(crate) const NOT_FOUND: u8 = 3;
    /// No coordinator answers.
    pub(crate) const UNREACHABLE: u8 = 4;
    /// The cluster is not well.
    pub(crate) const UNHEALTHY: u8 = 5;

    pub(crate) fn with(status: u8, message: impl Into<String>) -> CommandError {
        Self { status, message: message.into() }.into()
    }
}

/// No coordinator answers, for now.
pub(crate) fn is_unreachable(error: &(dyn std::error::Error + 'static)) -> bool {
    error.downcast_ref::<Failed>().is_some_and(|failed| failed.status == Failed::UNREACHABLE)
}

/// The command line is wrong in a way that its parser cannot see.
pub(crate) fn usage(problem: &str) -> CommandError {
    clap::Error::raw(clap::error::ErrorKind::ValueValidation, format!("{problem}\n")).into()
}
