//! The modelled nodes and what disturbs them, as flags.

use baton_sim::replay::{DecodeCost, Disturbance, Link, PrefillCost, Settings};

/// A reporting period long enough to cost nothing and short enough to be current.
const REPORT_MS: f64 = 500.0;
/// Largest figure of milliseconds, factors and rates.
const MOST: f64 = 1e12;

#[derive(clap::Args)]
pub(super) struct ClusterArgs {
    /// KV blocks that a node has room for
    #[arg(long, value_name = "N", default_value_t = 10_000,
          value_parser = clap::value_parser!(u32).range(1..=1_000_000_000))]
    cache_blocks: u32,
    /// A prefill of L tokens, m of them cached, takes a + b (L - m) + c (L^2 - m^2) ms
    #[arg(long, value_name = "A,B,C", default_value = "20,0.1,0.000001",
          value_parser = prefill_cost)]
    prefill_cost: PrefillCost,
    /// A decode step of B sequences with K tokens of KV takes d0 + d1 B + d2 K ms
    #[arg(long, value_name = "D0,D1,D2", default_value = "18,0.1,0.000029",
          value_parser = decode_cost)]
    decode_cost: DecodeCost,
    /// Bytes of KV per token; with --link-gbps, hand-overs take time and prefixes may be pulled
    #[arg(long, value_name = "N", value_parser = positive, requires = "link_gbps")]
    kv_bytes_per_token: Option<f64>,
    /// Speed of every node's link, each way, in gigabits per second
    #[arg(long, value_name = "X", value_parser = positive, requires = "kv_bytes_per_token")]
    link_gbps: Option<f64>,
    /// Drives random choices and noise
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Prefill nodes that are slower than the others
    #[arg(long, value_name = "N", default_value_t = 0)]
    slow_nodes: usize,
    /// How many times as long they take
    #[arg(long, value_name = "F", default_value_t = 2.0, value_parser = positive)]
    slow_factor: f64,
    /// Multiply every prefill's time by a log-normal factor of mean 1 and this deviation
    #[arg(long, value_name = "SIGMA", default_value_t = 0.0, value_parser = not_negative)]
    noise: f64,
    /// Age of cache events and reports when the coordinator hears them
    #[arg(long, value_name = "MS", default_value_t = 0.0, value_parser = not_negative)]
    event_lag_ms: f64,
    /// By when requests want their first token; says how many of those admitted got it
    #[arg(long, value_name = "MS", value_parser = positive)]
    deadline_ms: Option<f64>,
}

impl ClusterArgs {
    pub(super) fn settings(&self, prefill_nodes: usize, decode_nodes: usize) -> Settings {
        let link = self.link_gbps.zip(self.kv_bytes_per_token);
        Settings {
            prefill_nodes,
            decode_nodes,
            cache_blocks: self.cache_blocks as usize,
            prefill_cost: self.prefill_cost,
            decode_cost: self.decode_cost,
            link: link.map(|(gbps, bytes_per_token)| Link { gbps, bytes_per_token }),
            deadline_ms: self.deadline_ms,
            disturbance: Disturbance {
                slow_nodes: self.slow_nodes,
                slow_factor: self.slow_factor,
                noise: self.noise,
                event_lag_ms: self.event_lag_ms,
            },
            report_ms: REPORT_MS,
            seed: self.seed,
        }
    }
}

pub(super) fn positive(text: &str) -> Result<f64, String> {
    let number = not_negative(text)?;
    if number > 0.0 { Ok(number) } else { Err("0 is not more than 0".to_owned()) }
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(number) if (0.0..=MOST).contains(&number) => Ok(number),
        Ok(number) => Err(format!("{number} is not between 0 and {MOST:e}")),
        Err(_) => Err(format!("`{text}` is not a number")),
    }
}

fn prefill_cost(text: &str) -> Result<PrefillCost, String> {
    let [start_ms, token_ms, square_ms] = three(text, ["a_ms", "b_ms", "c_ms"])?;
    if start_ms + token_ms + square_ms == 0.0 {
        return Err("a prefill takes time".to_owned());
    }
    Ok(PrefillCost { start_ms, token_ms, square_ms })
}

fn decode_cost(text: &str) -> Result<DecodeCost, String> {
    let [step_ms, sequence_ms, kv_token_ms] = three(text, ["d0_ms", "d1_ms", "d2_ms"])?;
    if step_ms == 0.0 {
        return Err("d0_ms: a step takes time".to_owned());
    }
    Ok(DecodeCost { step_ms, sequence_ms, kv_token_ms })
}

fn three(text: &str, names: [&str; 3]) -> Result<[f64; 3], String> {
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() != 3 {
        return Err(format!("{} numbers, and three are needed: {}", parts.len(), names.join(",")));
    }
    let mut numbers = [0.0; 3];
    for ((number, part), name) in numbers.iter_mut().zip(parts).zip(names) {
        *number = not_negative(part).map_err(|problem| format!("{name}: {problem}"))?;
    }
    Ok(numbers)
}
