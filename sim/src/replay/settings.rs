//! What cluster a trace is replayed on.

use super::{DecodeCost, PrefillCost};

/// The cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Prefill nodes.
    pub prefill_nodes: usize,
    /// Decode nodes; without any, a request ends with its first token.
    pub decode_nodes: usize,
    /// KV blocks that a node has room for.
    pub cache_blocks: usize,
    /// Time of a prefill.
    pub prefill_cost: PrefillCost,
    /// Time of a decode step.
    pub decode_cost: DecodeCost,
    /// Links between nodes; `None`: blocks travel in no time, and are never pulled.
    pub link: Option<Link>,
    /// By when a request wants its first token, after its arrival.
    pub deadline_ms: Option<f64>,
    /// What goes wrong.
    pub disturbance: Disturbance,
    /// Time between two reports of a node.
    pub report_ms: f64,
    /// Drives random choices and noise.
    pub seed: u64,
}

/// What moving KV takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Speed of every node's link, each way, in gigabits per second.
    pub gbps: f64,
    /// Bytes of KV per token.
    pub bytes_per_token: f64,
}

/// Departures from what a policy expects.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Disturbance {
    /// Prefill nodes that are slower than the others, counted from the last one.
    pub slow_nodes: usize,
    /// How many times as long they take.
    pub slow_factor: f64,
    /// Standard deviation of the logarithm of a factor of mean 1 on every prefill.
    pub noise: f64,
    /// Age of a node's reports and cache events when a policy hears them.
    pub event_lag_ms: f64,
}

impl Disturbance {
    /// Whether anything goes wrong: a factor for no nodes disturbs nothing.
    #[must_use]
    pub fn is_any(&self) -> bool {
        self.slow_nodes > 0 || self.noise > 0.0 || self.event_lag_ms > 0.0
    }
}

impl Default for Disturbance {
    fn default() -> Self {
        Self { slow_nodes: 0, slow_factor: 1.0, noise: 0.0, event_lag_ms: 0.0 }
    }
}
