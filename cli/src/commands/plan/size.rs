//! `baton plan`: how many nodes a trace needs.

use std::path::PathBuf;

use baton_sim::plan::{Percentile, Plan, Prices, Targets, Trial, search};
use baton_sim::trace::Trace;
use clap::ValueEnum;
use serde_json::{Value, json};

use super::cluster::{ClusterArgs, positive};
use super::plot;
use crate::commands::CommandError;
use crate::output::{print, table};

#[derive(clap::Args)]
pub(super) struct TargetArgs {
    /// Time to first token that is to be met
    #[arg(long, value_name = "MS", required_unless_present = "replay", conflicts_with = "replay",
          value_parser = positive)]
    ttft_ms: Option<f64>,
    /// Time per output token that is to be met
    #[arg(long, value_name = "MS", required_unless_present = "replay", conflicts_with = "replay",
          value_parser = positive)]
    tpot_ms: Option<f64>,
    /// By how many of the requests, in percent
    #[arg(long, value_enum, default_value_t = Share::P99)]
    percentile: Share,
    /// Price of a prefill node, in any unit
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = positive)]
    prefill_price: f64,
    /// Price of a decode node
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = positive)]
    decode_price: f64,
    /// Nodes of either kind, at most
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    max_nodes: u32,
    /// Draw what was tried
    #[arg(long, value_name = "FILE", conflicts_with = "replay")]
    svg: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Share {
    #[value(name = "90")]
    P90,
    #[value(name = "99")]
    P99,
}

pub(super) fn run(
    args: &TargetArgs,
    cluster: &ClusterArgs,
    trace: impl FnOnce() -> Result<Trace, CommandError>,
    as_json: bool,
) -> Result<(), CommandError> {
    let (targets, prices) = (args.targets(), args.prices());
    let trace = trace()?;
    let fewest = usize::from(!cluster.weighs_local());
    let plan = search(fewest, args.max_nodes as usize, prices, |prefill, decode| {
        let settings = cluster.settings(prefill, decode, &trace);
        let summary = cluster.play(&settings, &trace)?;
        Ok::<_, CommandError>(targets.judge(prefill, decode, &summary))
    })?;
    if let Some(file) = &args.svg {
        std::fs::write(file, plot::svg(&plan, targets))
            .map_err(|error| format!("--svg: {}: {error}", file.display()))?;
    }
    if as_json {
        let value = in_json(&plan, prices);
        print(&format!("{}\n", serde_json::to_string_pretty(&value)?))?;
    } else {
        print(&in_words(&plan, targets, prices))?;
    }
    if plan.smallest.is_none() {
        return Err(args.unmet(&plan).into());
    }
    Ok(())
}

impl TargetArgs {
    fn targets(&self) -> Targets {
        Targets {
            ttft_ms: self.ttft_ms.unwrap_or(f64::INFINITY),
            tpot_ms: self.tpot_ms.unwrap_or(f64::INFINITY),
            percentile: match self.percentile {
                Share::P90 => Percentile::P90,
                Share::P99 => Percentile::P99,
            },
        }
    }

    fn prices(&self) -> Prices {
        Prices { prefill: self.prefill_price, decode: self.decode_price }
    }

    fn unmet(&self, plan: &Plan) -> String {
        let most = self.max_nodes;
        let rejected = plan.trials.last().map_or(0, |trial| trial.rejected);
        if rejected > 0 {
            format!("{rejected} requests cannot be served: a node has too little room for their KV")
        } else {
            format!("{most} prefill and {most} decode nodes (--max-nodes) do not meet the targets")
        }
    }
}

fn in_json(plan: &Plan, prices: Prices) -> Value {
    let trial = |trial: &Trial| {
        json!({
            "prefill": trial.prefill,
            "decode": trial.decode,
            "price": prices.of(trial.prefill, trial.decode),
            "ttft_ms": trial.ttft_ms,
            "tpot_ms": trial.tpot_ms,
            "rejected": trial.rejected,
            "meets": trial.meets,
        })
    };
    json!({
        "smallest": plan.smallest.as_ref().map(trial),
        "cheapest": plan.cheapest.as_ref().map(trial),
        "tried": plan.trials.iter().map(trial).collect::<Vec<_>>(),
    })
}

fn in_words(plan: &Plan, targets: Targets, prices: Prices) -> String {
    let rows: Vec<Vec<String>> = plan.trials.iter().map(|trial| row(trial, plan, prices)).collect();
    let percentile = match targets.percentile {
        Percentile::P90 => "P90",
        Percentile::P99 => "P99",
    };
    let (ttft, tpot) = (format!("TTFT {percentile} MS"), format!("TPOT {percentile} MS"));
    let mut text = table(&["PREFILL", "DECODE", "PRICE", &ttft, &tpot, "MEETS", ""], &rows);
    for (name, best) in [("smallest", plan.smallest), ("cheapest", plan.cheapest)] {
        if let Some(Trial { prefill, decode, .. }) = best {
            let price = prices.of(prefill, decode);
            text += &format!("\n{name}: {prefill} prefill + {decode} decode nodes, price {price}");
        }
    }
    text + "\n"
}

fn row(trial: &Trial, plan: &Plan, prices: Prices) -> Vec<String> {
    let mut marks = Vec::new();
    for (name, best) in [("smallest", plan.smallest), ("cheapest", plan.cheapest)] {
        if best == Some(*trial) {
            marks.push(name);
        }
    }
    vec![
        trial.prefill.to_string(),
        trial.decode.to_string(),
        prices.of(trial.prefill, trial.decode).to_string(),
        format!("{:.0}", trial.ttft_ms),
        format!("{:.1}", trial.tpot_ms),
        if trial.meets { "yes" } else { "no" }.to_owned(),
        marks.join(", "),
    ]
}
