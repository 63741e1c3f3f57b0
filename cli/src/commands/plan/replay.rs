//! `baton plan --replay`: a fixed cluster under one policy.

use std::time::Instant;

use baton_sim::replay::{Distribution, Settings, Summary};
use baton_sim::trace::Trace;
use serde_json::{Value, json};

use super::cluster::ClusterArgs;
use crate::commands::{CommandError, usage};
use crate::output::{print, table};

#[derive(clap::Args)]
pub(super) struct ReplayArgs {
    /// Prefill nodes
    #[arg(long, value_name = "N", requires = "replay",
          value_parser = clap::value_parser!(u32).range(0..=4096))]
    prefill: Option<u32>,
    /// Decode nodes; 0 replays the placement of prefills alone
    #[arg(long, value_name = "N", requires = "replay",
          value_parser = clap::value_parser!(u32).range(0..=4096))]
    decode: Option<u32>,
    /// Serve it with all the real machines of a cluster instead of modelled nodes; slower
    #[arg(long, requires = "replay")]
    world: bool,
}

pub(super) fn run(
    args: &ReplayArgs,
    cluster: &ClusterArgs,
    trace: impl FnOnce() -> Result<Trace, CommandError>,
    as_json: bool,
) -> Result<(), CommandError> {
    let (prefill, decode) = (args.prefill.unwrap_or(0) as usize, args.decode.unwrap_or(0) as usize);
    if prefill + decode == 0 {
        return Err(usage("--prefill and --decode are both 0, and somebody must compute"));
    }
    let trace = trace()?;
    let settings = cluster.settings(prefill, decode, &trace);
    let began = Instant::now();
    let summary = if args.world {
        cluster.play_world(&settings, &trace)?
    } else {
        cluster.play(&settings, &trace)?
    };
    let wall_seconds = began.elapsed().as_secs_f64();
    if as_json {
        let value = in_json(&summary, wall_seconds);
        Ok(print(&format!("{}\n", serde_json::to_string_pretty(&value)?))?)
    } else {
        Ok(print(&in_words(&summary, &settings, wall_seconds))?)
    }
}

fn in_json(summary: &Summary, wall_seconds: f64) -> Value {
    let (ttft, tpot) = (summary.ttft_ms, summary.tpot_ms);
    let mut value = json!({
        "requests": summary.requests,
        "completed": summary.completed,
        "rejected": summary.rejected,
        "hit_blocks_ratio": summary.hit_blocks_ratio,
        "hit_tokens_ratio": summary.hit_tokens_ratio,
        "ttft_ms": { "mean": ttft.mean, "p50": ttft.p50, "p90": ttft.p90, "p99": ttft.p99 },
        "tpot_ms": { "mean": tpot.mean, "p50": tpot.p50, "p99": tpot.p99 },
        "remote_ratio": summary.remote_ratio,
        "kv_moved_ratio": summary.kv_moved_ratio,
        "wall_seconds": wall_seconds,
    });
    for (key, extra) in
        [("pulled_ratio", summary.pulled_ratio), ("met_deadline", summary.met_deadline)]
    {
        if let Some(extra) = extra {
            value[key] = extra.into();
        }
    }
    value
}

fn in_words(summary: &Summary, settings: &Settings, wall_seconds: f64) -> String {
    let percent = |ratio: f64| format!("{:.1} %", ratio * 100.0);
    let times = |name: &str, d: Distribution| {
        let mut row = vec![name.to_owned()];
        row.extend([d.mean, d.p50, d.p90, d.p99].map(|ms| format!("{ms:.1}")));
        row
    };
    let mut rows = vec![times("time to first token", summary.ttft_ms)];
    if settings.decode_nodes > 0 {
        rows.push(times("time per output token", summary.tpot_ms));
    }
    let mut text = format!(
        "{} requests: {} completed, {} rejected; replayed in {wall_seconds:.1} s\n\
         cached: {} of the blocks, {} of the tokens\n\
         computed on prefill nodes: {} of the prompts; handed over: {} of the tokens\n",
        summary.requests,
        summary.completed,
        summary.rejected,
        percent(summary.hit_blocks_ratio),
        percent(summary.hit_tokens_ratio),
        percent(summary.remote_ratio),
        percent(summary.kv_moved_ratio),
    );
    if let Some(pulled) = summary.pulled_ratio {
        text += &format!("pulled from other nodes: {} of the tokens\n", percent(pulled));
    }
    if let Some(met) = summary.met_deadline {
        text += &format!("met the deadline: {} of those admitted\n", percent(met));
    }
    text + "\n" + &table(&["MS", "MEAN", "P50", "P90", "P99"], &rows)
}
