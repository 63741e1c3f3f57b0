//! `baton bench place`: the coordinator's own decisions, with as many nodes and cached blocks as
//! wanted, while the nodes go on telling what they cache.

mod caches;
mod cluster;
mod decisions;
mod end_to_end;
mod prompts;
mod times;

use std::path::PathBuf;

use serde_json::Value;

use crate::commands::CommandError;
use crate::output::{FormatArgs, print, table};

/// Longest churn, in hours of events.
const MOST_HOURS: f64 = 1000.0;

/// Command line of `baton bench place`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct PlaceArgs {
    /// Prompts: Mooncake's JSON lines
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Nodes, half of them for prefill; with --end-to-end fewer are more than enough
    #[arg(long, value_name = "N", default_value_t = 1000,
          value_parser = clap::value_parser!(u32).range(2..=1024))]
    nodes: u32,
    /// Cached blocks of 16 tokens, all nodes together
    #[arg(long, value_name = "N", default_value_t = 10_000_000,
          value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    blocks: u64,
    /// Cache events that arrive per second
    #[arg(long, value_name = "N", default_value_t = 100_000,
          value_parser = clap::value_parser!(u32).range(1..))]
    events: u32,
    /// Blocks that every event says are stored; when caches are full, as many are removed
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=256))]
    event_blocks: u16,
    /// Requests that arrive per second while response times are measured
    #[arg(long, value_name = "N", default_value_t = 20_000,
          value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// How long each measurement takes
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Apply the events of so many hours as fast as possible, and look at the memory again
    #[arg(long, value_name = "H", default_value_t = 0.0, value_parser = hours,
          allow_negative_numbers = true)]
    churn_hours: f64,
    /// Measure a whole coordinator instead: clients over gRPC, nodes that join over mutual TLS and
    /// answer at once
    #[arg(long)]
    end_to_end: bool,
    /// With --end-to-end: requests at a time
    #[arg(long, value_name = "N", default_value_t = 32, requires = "end_to_end",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    concurrency: u32,
    /// With --end-to-end: tokens per prompt
    #[arg(long, value_name = "N", default_value_t = 512, requires = "end_to_end",
          value_parser = clap::value_parser!(u32).range(1..=4000))]
    prompt_tokens: u32,
    #[command(flatten)]
    format: FormatArgs,
}

fn hours(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(hours) if (0.0..=MOST_HOURS).contains(&hours) => Ok(hours),
        _ => Err(format!("{text} is not between 0 and {MOST_HOURS}")),
    }
}

/// Something measured: its key in JSON, its value, and the same in words.
struct Figure {
    key: &'static str,
    value: Value,
    words: String,
}

/// Runs `baton bench place`.
pub(crate) async fn run(args: PlaceArgs) -> Result<(), CommandError> {
    let json = args.format.is_json();
    let figures = if args.end_to_end {
        end_to_end::run(&args).await?
    } else {
        // It keeps a processor busy for as long as it takes.
        tokio::task::spawn_blocking(move || decisions::run(&args)).await??
    };
    if json {
        let object = figures.into_iter().map(|figure| (figure.key.to_owned(), figure.value));
        let object = Value::Object(object.collect());
        return Ok(print(&format!("{}\n", serde_json::to_string_pretty(&object)?))?);
    }
    let rows: Vec<_> =
        figures.into_iter().map(|figure| vec![figure.key.to_owned(), figure.words]).collect();
    Ok(print(&table(&["FIGURE", "MEASURED"], &rows))?)
}
