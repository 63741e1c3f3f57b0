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
    Ok(print(&script(args.shell, command)?)?)
}

fn script(shell: Shell, command: &mut clap::Command) -> Result<String, CommandError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, command, "baton", &mut script);
    Ok(String::from_utf8(script)?)
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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use clap::{CommandFactory, ValueEnum};

    use super::*;
    use crate::Cli;

    /// A command, such as `["baton", "certs", "issue"]`, and what may follow: commands or flags.
    type Line = (Vec<String>, Vec<String>);

    fn lines(command: &clap::Command, above: &[String], all: &mut Vec<Line>) {
        let line = [above, &[command.get_name().to_owned()]].concat();
        let commands: Vec<_> = command.get_subcommands().collect();
        commands.iter().for_each(|command| lines(command, &line, all));
        let flags = command.get_arguments().filter_map(|argument| argument.get_long());
        let follow = match commands.len() {
            0 => flags.map(|flag| format!("--{flag}")).collect(),
            _ => commands.iter().map(|command| command.get_name().to_owned()).collect(),
        };
        all.push((line, follow));
    }

    fn every_line() -> Vec<Line> {
        let mut all = Vec::new();
        lines(&Cli::command(), &[], &mut all);
        assert!(all.iter().any(|(line, _)| line.join(" ") == "baton certs issue"), "{all:?}");
        all
    }

    #[test]
    fn every_command_has_a_page_with_its_flags() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path().join("man1");
        man(&ManArgs { folder: folder.clone() }, Cli::command()).expect("written");
        let mut all = every_line();
        all.extend(["baton-coordinator", "baton-prefill", "baton-decode"].map(|daemon| {
            (vec![daemon.to_owned()], vec!["--config".to_owned(), "--identity".to_owned()])
        }));
        for (line, follow) in all {
            let page = std::fs::read_to_string(folder.join(line.join("-") + ".1"));
            let page = page.unwrap_or_else(|error| panic!("{line:?}: {error}")).replace('\\', "");
            assert!(page.contains(".TH"), "{line:?}");
            for word in follow {
                assert!(page.contains(&word), "{line:?}: {word} is not in its page");
            }
        }
    }

    /// Asks bash itself, with the script, what may follow each command.
    #[test]
    fn bash_completes_every_command() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let script = script(Shell::Bash, &mut Cli::command()).expect("text");
        std::fs::write(file.path(), script).expect("written");
        for (line, follow) in every_line() {
            let begun = follow.first().filter(|word| word.starts_with("--")).map_or("", |_| "--");
            let ask = r#"source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
                _baton baton "${!#}" "${COMP_WORDS[COMP_CWORD - 1]}"; printf '%s\n' "${COMPREPLY[@]}""#;
            let mut bash = Command::new("bash");
            bash.arg("-c").arg(ask).arg(file.path()).args(&line).arg(begun);
            let output = bash.output().expect("there is a bash");
            let offered = String::from_utf8(output.stdout).expect("words");
            let offered: Vec<_> = offered.lines().collect();
            for word in follow {
                assert!(offered.contains(&word.as_str()), "{line:?}: {word} not in {offered:?}");
            }
        }
    }

    #[test]
    fn every_shell_has_a_script_with_every_command() {
        for &shell in Shell::value_variants() {
            let script = script(shell, &mut Cli::command()).expect("text");
            for (line, _) in every_line() {
                let name = line.last().expect("a name");
                assert!(script.contains(name.as_str()), "{shell}: {line:?}");
            }
        }
    }
}
