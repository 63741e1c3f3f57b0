//! `baton check`: reads a daemon's configuration file as the daemon would, and looks at what it
//! names.

use std::path::{Path, PathBuf};

use baton_coordinator::front::door::{Door, Tls};
use baton_coordinator::{config as coordinator, settings::Settings as CoordinatorSettings};
use baton_identity::{Identity, Part};
use baton_node::{config as node, settings::Settings as NodeSettings};
use baton_proto::config::load_toml;
use clap::{Args, Command, ValueEnum};

use super::CommandError;
use crate::output::print;

/// Command line of `baton check`.
#[derive(clap::Args)]
pub(crate) struct CheckArgs {
    /// The TOML file
    file: PathBuf,
    /// Whose file it is [default: whose keys it has]
    #[arg(long)]
    daemon: Option<Daemon>,
    /// Folder of the identity, if a flag of the daemon names it, as in systemd's units
    #[arg(long, value_name = "DIR")]
    identity: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(super) enum Daemon {
    Coordinator,
    Node,
}

/// Runs `baton check`.
pub(crate) fn run(args: &CheckArgs) -> Result<(), CommandError> {
    let (file, identity) = (&args.file, args.identity.clone());
    let report = match args.daemon.unwrap_or_else(|| guess(file)) {
        Daemon::Coordinator => check_coordinator(file, identity),
        Daemon::Node => check_node(file, identity),
    };
    Ok(print(&report.map_err(|error| named(file, &*error))?)?)
}

/// What is wrong with `file`, which some errors name themselves.
pub(super) fn named(file: &Path, error: &dyn std::error::Error) -> String {
    let (error, name) = (error.to_string(), file.display().to_string());
    if error.starts_with(&name) { error } else { format!("{name}: {error}") }
}

/// The daemon that knows more of the file's keys. A file that cannot be read is reported by whoever
/// reads it next.
pub(super) fn guess(file: &Path) -> Daemon {
    let table: toml::Table = load_toml(file).unwrap_or_default();
    let knows = |command: Command| {
        command.get_arguments().filter(|key| table.contains_key(key.get_id().as_str())).count()
    };
    let coordinator = knows(CoordinatorSettings::augment_args(Command::new("coordinator")));
    let node = knows(NodeSettings::augment_args(Command::new("node")));
    if node > coordinator { Daemon::Node } else { Daemon::Coordinator }
}

/// A coordinator's configuration, and its identity's folder if `identity` or the file names it.
pub(super) fn coordinator_config(
    file: &Path,
    identity: Option<PathBuf>,
) -> Result<(coordinator::Config, Option<PathBuf>), coordinator::ConfigError> {
    let mut settings = CoordinatorSettings::from_file(file)?;
    let identity = identity.or(settings.identity);
    settings.identity = Some(identity.clone().unwrap_or_default());
    Ok((settings.try_into()?, identity))
}

/// The same for a node.
pub(super) fn node_config(
    file: &Path,
    identity: Option<PathBuf>,
) -> Result<(node::Config, Option<PathBuf>), node::ConfigError> {
    let mut settings = NodeSettings::from_file(file)?;
    let identity = identity.or(settings.identity);
    settings.identity = Some(identity.clone().unwrap_or_default());
    Ok((settings.try_into()?, identity))
}

fn check_coordinator(file: &Path, identity: Option<PathBuf>) -> Result<String, CommandError> {
    let (config, identity) = coordinator_config(file, identity)?;
    let who = identity.map(|folder| load_identity(&folder, Part::Coordinator)).transpose()?;
    for (_, folder) in &config.models {
        require(folder, "tokenizer.json")?;
    }
    let names: Vec<&str> = config.models.iter().map(|(name, _)| name.as_str()).collect();
    let door = Door::new(config.api_keys.clone()).map_err(|e| format!("api_keys: {e}"))?;
    config.tls.clone().map(Tls::load).transpose()?;
    let keys = match door.key_count() {
        Some(count) => count.to_string(),
        None => "none, everybody who reaches the ports may do everything".to_owned(),
    };
    let mut lines = vec![
        format!("{}: a coordinator's file, and complete", file.display()),
        say_identity(who.as_ref()),
        format!("nodes join at {}", config.cluster_listen),
        format!("clients: gRPC {}, HTTP {}", config.grpc, config.http),
        format!("encrypted: {}", if config.tls.is_some() { "with TLS 1.3" } else { "no" }),
        format!("API keys: {keys}"),
        format!("models: {}", names.join(", ")),
    ];
    if !config.peers.is_empty() {
        lines.insert(3, format!("beside the coordinators at {}", config.peers.join(", ")));
    }
    Ok(lines.join("\n  ") + "\n")
}

fn check_node(file: &Path, identity: Option<PathBuf>) -> Result<String, CommandError> {
    let (config, identity) = node_config(file, identity)?;
    let who = identity.map(|folder| load_identity(&folder, Part::Node)).transpose()?;
    require(&config.model, "config.json")?;
    let lines = [
        format!("{}: a node's file, and complete", file.display()),
        say_identity(who.as_ref()),
        format!("joins {}", config.coordinators.join(", ")),
        format!("KV transfers arrive at {}", config.kv_listen),
        format!("model: {} from {}", config.model_name, config.model.display()),
    ];
    Ok(lines.join("\n  ") + "\n")
}

/// Of a file that names no identity.
pub(super) const NO_IDENTITY: &str =
    "not in this file; the daemon needs --identity, which systemd's units give";

fn say_identity(identity: Option<&Identity>) -> String {
    let name = identity.map_or(NO_IDENTITY, |identity| identity.node_id().as_str());
    format!("identity: {name}")
}

fn load_identity(folder: &Path, part: Part) -> Result<Identity, CommandError> {
    let identity = Identity::load(folder)?;
    if identity.part() != part {
        return Err(format!("identity: {} is not that of a {part}", folder.display()).into());
    }
    Ok(identity)
}

fn require(folder: &Path, file: &str) -> Result<(), CommandError> {
    let path = folder.join(file);
    match path.is_file() {
        true => Ok(()),
        false => Err(format!("model: there is no {}", path.display()).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_whose_keys_it_has() {
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/etc");
        assert_eq!(guess(&deploy.join("coordinator.toml")), Daemon::Coordinator);
        assert_eq!(guess(&deploy.join("prefill.toml")), Daemon::Node);
        assert_eq!(guess(&deploy.join("decode.toml")), Daemon::Node);
        assert_eq!(guess(Path::new("/nowhere")), Daemon::Coordinator);
    }

    #[test]
    fn an_identity_may_be_a_flag_of_the_unit() {
        let folder = tempfile::tempdir().expect("a folder");
        let (file, model) = (folder.path().join("prefill.toml"), folder.path().join("m"));
        std::fs::create_dir(&model).expect("made");
        std::fs::write(model.join("config.json"), "{}").expect("written");
        let text = format!("model = {model:?}\ncoordinator = [\"c:7400\"]\n");
        std::fs::write(&file, text).expect("written");
        let report = check_node(&file, None).expect("it is complete");
        assert!(report.contains("identity: not in this file"), "{report}");
        let nowhere = Some(folder.path().join("nowhere"));
        assert!(check_node(&file, nowhere).is_err());
    }
}
