//! `baton completions` and `baton man`: what shells and `man` need, made from the command line itself.

use std::path::PathBuf;

use clap_complete::Shell;

use super::CommandError;
use crate::output::print;

/// Command line of `baton completions`.
#[derive(clap::Args)]
pub(crate) struct CompletionsArgs {
    /// For which shell
    shell: Shell,
}

/// Command line of `baton man`.
#[derive(clap::Args)]
pub(crate) struct ManArgs {
    /// Folder to write them to; it is made if it does not exist
    folder: PathBuf,
}

/// Runs `baton completions`.
pub(crate) fn run(args: &CompletionsArgs, command: &mut clap::Command) -> Result<(), CommandError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, command, "baton", &mut script);
    Ok(print(&String::from_utf8(script)?)?)
}

/// Runs `baton man`.
pub(crate) fn man(args: &ManArgs, command: clap::Command) -> Result<(), CommandError> {
    let folder = &args.folder;
    let written =
        std::fs::create_dir_all(folder).and_then(|()| clap_mangen::generate_to(command, folder));
    written.map_err(|error| format!("{}: {error}", folder.display()).into())
}
