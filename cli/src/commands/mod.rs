//! One file per command.

pub(crate) mod bench;
pub(crate) mod cache;
pub(crate) mod certs;
pub(crate) mod check;
mod complete;
pub(crate) mod demo;
pub(crate) mod drain;
pub(crate) mod generate;
pub(crate) mod keys;
pub(crate) mod nodes;
pub(crate) mod plan;
pub(crate) mod role;
pub(crate) mod status;

mod orders;

/// What a command fails with: one line for a person.
pub(crate) type CommandError = Box<dyn std::error::Error + Send + Sync>;

/// The command line is wrong in a way that its parser cannot see.
pub(crate) fn usage(problem: &str) -> CommandError {
    clap::Error::raw(clap::error::ErrorKind::ValueValidation, format!("{problem}\n")).into()
}
