//! `baton plan --replay`: a fixed cluster under one policy.

use std::time::Instant;

use baton_sim::replay::{PolicyKind, Settings, Summary, replay};
use baton_sim::trace::Trace;
use clap::ValueEnum;
use serde_json::{Value, json};

use super::cluster::ClusterArgs;
use crate::commands::CommandError;
use crate::output::{print, table};

#[derive(clap::Args)]
pub(super) struct ReplayArgs {
    /// Prefill nodes
    #[arg(long, value_name = "N", default_value_t = 8,
          value_parser = clap::value_parser!(u32).range(0..=4096))]
    prefill: u32,
    /// Decode nodes; 0 replays the placement of prefills alone
    #[arg(long, value_name = "N", default_value_t = 0,
          value_parser = clap::value_parser!(u32).range(0..=4096))]
    decode: u32,
    /// Who decides where requests go
    #[arg(long, value_enum, default_value_t = PolicyName::Baton)]
    policy: PolicyName,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PolicyName {
    /// The coordinator of this program
    Baton,
    /// Any node
    Random,
    /// The nodes in turn
    RoundRobin,
    /// The node with the fewest prompt tokens to compute
    LeastLoaded,
    /// The node that had the first request beginning with the same 1,024 tokens
    Session,
    /// The node that holds most of the prompt
    Prefix,
    /// llm-d's: a node that holds 80 % of the prompt, unless that costs too much
    Sticky,
    /// Mooncake's: the node where the first token comes earliest
    MinTtft,
}

impl PolicyName {
    fn kind(self) -> Result<PolicyKind, CommandError> {
        Ok(match self {
            Self::Baton => return Err("--policy baton: not simulated yet".into()),
            Self::Random => PolicyKind::Random,
            Self::RoundRobin => PolicyKind::RoundRobin,
            Self::LeastLoaded => PolicyKind::LeastLoaded,
            Self::Session => PolicyKind::Session,
            Self::Prefix => PolicyKind::Prefix,
            Self::Sticky => PolicyKind::Sticky,
            Self::MinTtft => PolicyKind::MinTtft,
        })
    }
}

pub(super) fn run(
    args: &ReplayArgs,
    cluster: &ClusterArgs,
    trace: &Trace,
    as_json: bool,
) -> Result<(), CommandError> {
    let (prefill, decode) = (args.prefill as usize, args.decode as usize);
    if prefill + decode == 0 {
        return Err("--prefill and --decode are both 0: there is no node".into());
    }
    let settings = cluster.settings(prefill, decode);
    let began = Instant::now();
    let outcome = replay(&settings, trace, &mut *args.policy.kind()?.build(settings.seed))?;
    let summary = outcome.summary(&settings, trace);
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
    let times = |name: &str, d: baton_sim::replay::Distribution| {
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
