//! The modelled nodes, who places requests on them, and what disturbs them, as flags.

use baton_sim::device::{DEVICES, Device};
use baton_sim::replay::{
    DecodeCost, Disturbance, Link, PolicyKind, PrefillCost, Settings, Summary, replay,
};
use baton_sim::trace::Trace;
use baton_sim::world::replay_trace;
use clap::ValueEnum;

use crate::commands::{CommandError, usage};

/// A reporting period long enough to cost nothing and short enough to be current.
const REPORT_MS: f64 = 500.0;
/// Links of a machine with eight cards, 50 GB/s each way, where prefill hands over to decode.
const LINK_GBPS: f64 = 400.0;
/// Largest figure of milliseconds, factors and rates.
const MOST: f64 = 1e6;
/// The least that is not 0: smaller figures only make a replay last for ever.
const LEAST: f64 = 1e-6;

#[derive(clap::Args)]
pub(super) struct ClusterArgs {
    /// Who decides where requests go
    #[arg(long, value_enum, default_value_t = PolicyName::Baton)]
    policy: PolicyName,
    #[arg(long, value_name = "NAME", default_value = DEVICES[0].name, value_parser = device,
          help = device_help())]
    device: Device,
    /// A prefill of L tokens, m of them cached, takes a + b (L - m) + c (L^2 - m^2) ms
    #[arg(long, value_name = "A,B,C", value_parser = prefill_cost)]
    prefill_cost: Option<PrefillCost>,
    /// A decode step of B sequences with K tokens of KV takes d0 + d1 B + d2 K ms
    #[arg(long, value_name = "D0,D1,D2", value_parser = decode_cost)]
    decode_cost: Option<DecodeCost>,
    /// KV blocks that a node has room for
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000_000))]
    cache_blocks: Option<u32>,
    /// Bytes of KV per token
    #[arg(long, value_name = "N", value_parser = positive)]
    kv_bytes_per_token: Option<f64>,
    /// Speed of every node's link, each way, in gigabits per second; 400 if there are decode nodes,
    /// otherwise nothing is pulled unless it is given
    #[arg(long, value_name = "X", value_parser = positive, allow_negative_numbers = true)]
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
    #[arg(long, value_name = "SIGMA", default_value_t = 0.0, value_parser = noise)]
    noise: f64,
    /// Age of cache events and reports when the coordinator hears them
    #[arg(long, value_name = "MS", default_value_t = 0.0, value_parser = not_negative)]
    event_lag_ms: f64,
    /// By when requests want their first token; says how many of those admitted got it
    #[arg(long, value_name = "MS", value_parser = positive)]
    deadline_ms: Option<f64>,
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
    fn kind(self) -> PolicyKind {
        match self {
            Self::Baton => PolicyKind::Baton,
            Self::Random => PolicyKind::Random,
            Self::RoundRobin => PolicyKind::RoundRobin,
            Self::LeastLoaded => PolicyKind::LeastLoaded,
            Self::Session => PolicyKind::Session,
            Self::Prefix => PolicyKind::Prefix,
            Self::Sticky => PolicyKind::Sticky,
            Self::MinTtft => PolicyKind::MinTtft,
        }
    }
}

impl ClusterArgs {
    pub(super) fn settings(
        &self,
        prefill_nodes: usize,
        decode_nodes: usize,
        trace: &Trace,
    ) -> Settings {
        let device = &self.device;
        let link_gbps = self.link_gbps.or((decode_nodes > 0).then_some(LINK_GBPS));
        let room = device.kv_tokens / u64::from(trace.block_tokens);
        let bytes_per_token = self.kv_bytes_per_token.unwrap_or(device.kv_bytes_per_token);
        Settings {
            prefill_nodes,
            decode_nodes,
            cache_blocks: self.cache_blocks.map_or(room as usize, |blocks| blocks as usize),
            prefill_cost: self.prefill_cost.unwrap_or(device.prefill_cost),
            decode_cost: self.decode_cost.unwrap_or(device.decode_cost),
            link: link_gbps.map(|gbps| Link { gbps, bytes_per_token }),
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

    /// The policy that is asked for plays the trace.
    pub(super) fn play(&self, settings: &Settings, trace: &Trace) -> Result<Summary, CommandError> {
        let outcome = replay(settings, trace, &mut *self.policy.kind().build(settings.seed))?;
        Ok(outcome.summary(settings, trace))
    }

    /// A whole cluster of this program's own machines plays the trace.
    pub(super) fn play_world(
        &self,
        settings: &Settings,
        trace: &Trace,
    ) -> Result<Summary, CommandError> {
        if self.policy != PolicyName::Baton {
            return Err(usage("--world plays this program's own policy, baton"));
        }
        Ok(replay_trace(settings, trace)?.summary(settings, trace))
    }

    /// Whether decode nodes compute a prompt wherever that is cheaper.
    pub(super) fn weighs_local(&self) -> bool {
        self.policy == PolicyName::Baton
    }
}

fn device(text: &str) -> Result<Device, String> {
    let known = DEVICES.iter().find(|device| device.name == text).copied();
    known.ok_or_else(|| {
        let names: Vec<&str> = DEVICES.iter().map(|device| device.name).collect();
        format!("there are {}", names.join(", "))
    })
}

fn device_help() -> String {
    let all: Vec<String> =
        DEVICES.iter().map(|device| format!("{} ({})", device.name, device.description)).collect();
    format!("Where constants come from that are not given: {}", all.join(", "))
}

pub(super) fn positive(text: &str) -> Result<f64, String> {
    let number = not_negative(text)?;
    let fine = number >= LEAST;
    if fine { Ok(number) } else { Err(format!("{text} is not between {LEAST} and {MOST}")) }
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text, MOST)
}

/// Beyond this, the mean of any trace is that of its longest prefill.
fn noise(text: &str) -> Result<f64, String> {
    number(text, 5.0)
}

fn number(text: &str, most: f64) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(number) if (0.0..=most).contains(&number) => Ok(number),
        Ok(_) => Err(format!("{text} is not between 0 and {most}")),
        Err(_) => Err(format!("`{text}` is not a number")),
    }
}

fn prefill_cost(text: &str) -> Result<PrefillCost, String> {
    let [start_ms, token_ms, square_ms] = three(text, ["a_ms", "b_ms", "c_ms"])?;
    if start_ms + token_ms + square_ms == 0.0 {
        return Err("a_ms, b_ms and c_ms are all 0, and a prefill takes time".to_owned());
    }
    Ok(PrefillCost { start_ms, token_ms, square_ms })
}

fn decode_cost(text: &str) -> Result<DecodeCost, String> {
    let [step_ms, sequence_ms, kv_token_ms] = three(text, ["d0_ms", "d1_ms", "d2_ms"])?;
    if step_ms == 0.0 {
        return Err("d0_ms is 0, and a step takes time".to_owned());
    }
    Ok(DecodeCost { step_ms, sequence_ms, kv_token_ms })
}

fn three(text: &str, names: [&str; 3]) -> Result<[f64; 3], String> {
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() != 3 {
        return Err(format!(
            "three numbers are needed, {}, and not {}",
            names.join(","),
            parts.len()
        ));
    }
    let mut numbers = [0.0; 3];
    for ((number, part), name) in numbers.iter_mut().zip(parts).zip(names) {
        *number = not_negative(part).map_err(|problem| format!("{name}: {problem}"))?;
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_three_numbers_in_order() {
        let cost = PrefillCost { start_ms: 20.0, token_ms: 0.1, square_ms: 1e-6 };
        assert_eq!(prefill_cost("20,0.1,0.000001"), Ok(cost));
        assert_eq!(prefill_cost("20, 0.1, 1e-6"), Ok(cost));
        for (text, part) in [
            ("20,0.1", "a_ms,b_ms,c_ms"),
            ("20,x,0", "b_ms: `x` is not a number"),
            ("20,-1,0", "b_ms: -1 is not between 0 and 1000000"),
            ("nan,1,0", "a_ms: nan"),
            ("0,0,0", "a prefill takes time"),
        ] {
            let problem = prefill_cost(text).unwrap_err();
            assert!(problem.contains(part), "{problem}");
        }
        assert!(decode_cost("0,1,1").unwrap_err().contains("d0_ms is 0"));
        assert!(positive("0").is_err() && positive("inf").is_err());
    }

    #[test]
    fn devices_go_by_name() {
        assert_eq!(device("h200-8b").unwrap().name, "h200-8b");
        assert!(device("h300").unwrap_err().contains("h200-8b"));
    }
}
