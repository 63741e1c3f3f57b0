//! `baton`: starts clusters on one machine, asks them for text, and shows what they do.

mod client;
mod commands;
mod output;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use commands::{Failed, bench, cache, cancel, certs, check, completions, demo, doctor, drain};
use commands::{events, explain, generate, keys, nodes, plan, requests, role, status, top};
use output::complain;

#[derive(Parser)]
#[command(
    name = "baton",
    version,
    about = "Serves language models from prefill and decode nodes",
    after_help = "Exit status: 0 done, 1 it failed (one line on stderr says why), 2 the command line \
                  is wrong, 3 what was named does not exist, 4 no coordinator answers, 5 the cluster \
                  is not well (status --exit-code)."
)]
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
    /// List requests that run, and those that ended or were refused lately
    Requests(requests::RequestsArgs),
    /// Say why a request went where it went, and whether that took what was predicted
    Explain(explain::ExplainArgs),
    /// End a request
    Cancel(cancel::CancelArgs),
    /// Show what happened in the cluster
    Events(events::EventsArgs),
    /// Watch the cluster on the whole terminal
    Top(top::TopArgs),
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
    /// Look for what is wrong with this machine, and say what to do about it
    Doctor(doctor::DoctorArgs),
    /// Measure parts of Baton on this machine
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Say how a trace would be served, or how many nodes it needs
    Plan(Box<plan::PlanArgs>),
    /// Print completions for a shell
    Completions(completions::CompletionsArgs),
    /// Write manual pages, one per command
    Man(completions::ManArgs),
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
        Command::Requests(args) => requests::run(args).await,
        Command::Explain(args) => explain::run(args).await,
        Command::Cancel(args) => cancel::run(args).await,
        Command::Events(args) => events::run(args).await,
        Command::Top(args) => top::run(args).await,
        Command::Role(args) => role::run(args).await,
        Command::Drain(args) => drain::run(args).await,
        Command::Certs(command) => certs::run(&command),
        Command::Keys(command) => keys::run(&command),
        Command::Check(args) => check::run(&args),
        Command::Doctor(args) => doctor::run(args).await,
        Command::Bench(command) => bench::run(command).await,
        Command::Plan(args) => plan::run(&args),
        Command::Completions(args) => completions::run(&args, &mut Cli::command()),
        Command::Man(args) => completions::man(&args, Cli::command()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has seen enough.
        Err(error) if is_closed_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) if error.is::<clap::Error>() => {
            complain(error.to_string().trim_end());
            ExitCode::from(2)
        }
        Err(error) => {
            complain(&format!("baton: {error}"));
            error.downcast_ref::<Failed>().map_or(ExitCode::FAILURE, |f| ExitCode::from(f.status))
        }
    }
}

fn is_closed_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
