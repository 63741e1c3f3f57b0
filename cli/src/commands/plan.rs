//! `baton plan`: plays a trace against modelled clusters.

mod cluster;
mod plot;
mod replay;
mod size;

use std::path::PathBuf;

use baton_sim::trace::Trace;

use super::CommandError;
use crate::output::FormatArgs;

/// Command line of `baton plan`.
#[derive(clap::Args)]
#[command(
    after_help = "With --replay, a fixed cluster serves the trace. Without, the smallest and \
    the cheapest clusters are sought that meet --ttft-ms and --tpot-ms."
)]
pub(crate) struct PlanArgs {
    /// Serve the trace with the given nodes and say how that went
    #[arg(long, requires = "prefill", requires = "decode")]
    replay: bool,
    #[command(flatten)]
    trace: TraceArgs,
    #[command(flatten)]
    fixed: replay::ReplayArgs,
    #[command(flatten)]
    targets: size::TargetArgs,
    #[command(flatten)]
    cluster: cluster::ClusterArgs,
    #[command(flatten)]
    format: FormatArgs,
}

#[derive(clap::Args)]
struct TraceArgs {
    /// Requests: Mooncake's JSON lines (a log of one's own needs `timestamp` in ms, `input_length`,
    /// `output_length` and, to share prefixes, `hash_ids`), or Azure's CSV
    #[arg(long = "trace", value_name = "FILE")]
    file: PathBuf,
    /// Tokens per block of the trace's `hash_ids`
    #[arg(long, value_name = "N", default_value_t = 512,
          value_parser = clap::value_parser!(u32).range(1..=65536))]
    block_tokens: u32,
    /// Let requests arrive this many times faster
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = cluster::positive,
          allow_negative_numbers = true)]
    scale: f64,
    /// Spread arrivals that share a coarse timestamp evenly over the time until the next one
    #[arg(long)]
    spread: bool,
}

impl TraceArgs {
    fn read(&self) -> Result<Trace, CommandError> {
        let mut trace = Trace::read(&self.file, self.block_tokens)?;
        if self.spread {
            trace.spread();
        }
        trace.scale(self.scale);
        Ok(trace)
    }
}

/// Runs `baton plan`.
pub(crate) fn run(args: &PlanArgs) -> Result<(), CommandError> {
    if args.replay {
        replay::run(&args.fixed, &args.cluster, || args.trace.read(), args.format.is_json())
    } else {
        size::run(&args.targets, &args.cluster, || args.trace.read(), args.format.is_json())
    }
}
