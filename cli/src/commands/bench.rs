//! `baton bench`: how fast parts of Baton are on this machine.

use super::CommandError;

mod place;

#[derive(clap::Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure how fast a coordinator chooses nodes, and what its index takes
    Place(Box<place::PlaceArgs>),
}

/// Runs `baton bench`.
pub(crate) async fn run(command: BenchCommand) -> Result<(), CommandError> {
    match command {
        BenchCommand::Place(args) => place::run(*args).await,
    }
}
