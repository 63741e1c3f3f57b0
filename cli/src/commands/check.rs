//! `baton check`: reads a daemon's configuration file as the daemon would, and looks at what it
//! names.

use std::path::{Path, PathBuf};

use baton_coordinator::front::door::{Door, Tls};
use baton_identity::{Identity, Part};
use clap::ValueEnum;

use super::CommandError;

/// Command line of `baton check`.
#[derive(clap::Args)]
pub(crate) struct CheckArgs {
    /// The TOML file
    file: PathBuf,
    /// Whose file it is [default: a node's, if it has the key `coordinator`]
    #[arg(long)]
    daemon: Option<Daemon>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Daemon {
    Coordinator,
    Node,
}

/// Runs `baton check`.
pub(crate) fn run(args: &CheckArgs) -> Result<(), CommandError> {
    let file = &args.file;
    match args.daemon.unwrap_or_else(|| guess(file)) {
        Daemon::Coordinator => check_coordinator(file),
        Daemon::Node => check_node(file),
    }
    .map_err(|error| {
        let (error, name) = (error.to_string(), file.display().to_string());
        if error.starts_with(&name) { error.into() } else { format!("{name}: {error}").into() }
    })
}

/// Only nodes have coordinators. A file that cannot be read is reported by whoever reads it next.
pub(super) fn guess(file: &Path) -> Daemon {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    match toml::from_str::<toml::Table>(&text) {
        Ok(table) if table.contains_key("coordinator") => Daemon::Node,
        _ => Daemon::Coordinator,
    }
}

fn check_coordinator(file: &Path) -> Result<(), CommandError> {
    let settings = baton_coordinator::settings::Settings::from_file(file)?;
    let config = baton_coordinator::config::Config::try_from(settings)?;
    identity(&config.identity, Part::Coordinator)?;
    for (_, folder) in &config.models {
        require(folder, &["tokenizer.json"])?;
    }
    let names: Vec<&str> = config.models.iter().map(|(name, _)| name.as_str()).collect();
    let door = Door::new(config.api_keys.clone()).map_err(|e| format!("api_keys: {e}"))?;
    config.tls.clone().map(Tls::load).transpose()?;
    println!("{}: a coordinator's file, and complete", file.display());
    println!("  nodes join at {}", config.cluster_listen);
    if !config.peers.is_empty() {
        println!("  beside the coordinators at {}", config.peers.join(", "));
    }
    println!("  clients: gRPC {}, HTTP {}", config.grpc, config.http);
    println!("  encrypted: {}", if config.tls.is_some() { "with TLS 1.3" } else { "no" });
    match door.key_count() {
        Some(count) => println!("  API keys: {count}"),
        None => println!("  API keys: none, everybody who reaches the ports may do everything"),
    }
    println!("  models: {}", names.join(", "));
    Ok(())
}

fn check_node(file: &Path) -> Result<(), CommandError> {
    let settings = baton_node::settings::Settings::from_file(file)?;
    let config = baton_node::config::Config::try_from(settings)?;
    let identity = identity(&config.identity, Part::Node)?;
    require(&config.model, &["config.json"])?;
    println!("{}: a node's file, and complete", file.display());
    println!("  node {} joins {}", identity.node_id(), config.coordinators.join(", "));
    println!("  KV transfers arrive at {}", config.kv_listen);
    println!("  model: {} from {}", config.model_name, config.model.display());
    Ok(())
}

fn identity(folder: &Path, part: Part) -> Result<Identity, CommandError> {
    let identity = Identity::load(folder)?;
    if identity.part() != part {
        let wanted = if part == Part::Node { "a node" } else { "a coordinator" };
        return Err(
            format!("identity: {} is not the identity of {wanted}", folder.display()).into()
        );
    }
    Ok(identity)
}

fn require(folder: &Path, files: &[&str]) -> Result<(), CommandError> {
    for file in files {
        let path = folder.join(file);
        if !path.is_file() {
            return Err(format!("model: there is no {}", path.display()).into());
        }
    }
    Ok(())
}
