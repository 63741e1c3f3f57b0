//! `baton completions` and `baton man`: what shells and `man` need, made from the command lines themselves.

use std::iter;
use std::path::PathBuf;

use baton_proto::ids::Role;
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

/// Runs `baton man`: the pages of `baton` and of the daemons.
pub(crate) fn man(args: &ManArgs, baton: clap::Command) -> Result<(), CommandError> {
    let folder = &args.folder;
    let daemons = [
        baton_coordinator::settings::command(),
        baton_node::settings::command(Role::Prefill),
        baton_node::settings::command(Role::Decode),
    ];
    let mut commands = iter::once(baton).chain(daemons);
    let written = std::fs::create_dir_all(folder)
        .and_then(|()| commands.try_for_each(|command| clap_mangen::generate_to(command, folder)));
    written.map_err(|error| format!("{}: {error}", folder.display()).into())
}
