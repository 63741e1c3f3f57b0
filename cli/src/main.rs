//! `baton`: starts clusters on one machine, asks them for text, and shows what they do.
//!
//! Exit status: 0 done, 1 it failed (one line on stderr says why), 2 the command line is wrong.

mod client;
mod commands;
mod output;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use commands::{
    bench, cache, certs, check, demo, drain, generate, keys, nodes, plan, role, status,
};

#[derive(Parser)]
#[command(name = "baton", version, about = "Serves language models from prefill and decode nodes")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a coordinator and nodes on this machine until interrupted
    Up(Box<baton_cli::up::UpArgs>),
    /// Run a cluster, ask three questions about one document, show what each cost
    Demo(demo::DemoArgs),
    /// Generate text
    Generate(Box<generate::GenerateArgs>),
    /// Say whether the cluster serves, and what
    Status(status::StatusArgs),
    /// List the nodes with their load and KV blocks
    Nodes(nodes::NodesArgs),
    /// Show what the prefix caches hold
    Cache(cache::CacheArgs),
    /// Make a node a prefill or a decode node while it runs
    Role(role::RoleArgs),
    /// Let a node finish what it has and take nothing new
    Drain(drain::DrainArgs),
    /// Make the cluster's certificates
    #[command(subcommand)]
    Certs(certs::CertsCommand),
    /// Make API keys for clients
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// Check a configuration file
    Check(check::CheckArgs),
    /// Measure parts of Baton on this machine
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Say how a trace would be served, or how many nodes it needs
    Plan(Box<plan::PlanArgs>),
}

#[tokio::main]
async fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Up(args) => baton_cli::up::run(*args).await.map_err(Into::into),
        Command::Demo(args) => demo::run(args).await,
        Command::Generate(args) => generate::run(*args).await,
        Command::Status(args) => status::run(args).await,
        Command::Nodes(args) => nodes::run(args).await,
        Command::Cache(args) => cache::run(args).await,
        Command::Role(args) => role::run(args).await,
        Command::Drain(args) => drain::run(args).await,
        Command::Certs(command) => certs::run(&command),
        Command::Keys(command) => keys::run(&command),
        Command::Check(args) => check::run(&args),
        Command::Bench(command) => bench::run(command).await,
        Command::Plan(args) => plan::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has seen enough.
        Err(error) if is_closed_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) if error.is::<clap::Error>() => {
            eprint!("{error}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("baton: {error}");
            ExitCode::FAILURE
        }
    }
}

fn is_closed_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
