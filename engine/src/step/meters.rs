//! What an engine counts for whoever installed a recorder of metrics before it started.

use std::time::Duration;

use metrics::{Counter, Histogram, counter, histogram};

use crate::scheduler::Plan;

/// Made once, so that a step looks nothing up.
pub(super) struct Meters {
    decode: Histogram,
    prefill: Histogram,
    mixed: Histogram,
    tokens: Histogram,
    preemptions: Counter,
}

impl Meters {
    pub(super) fn new() -> Self {
        Self {
            decode: histogram!("baton_node_step_seconds", "kind" => "decode"),
            prefill: histogram!("baton_node_step_seconds", "kind" => "prefill"),
            mixed: histogram!("baton_node_step_seconds", "kind" => "mixed"),
            tokens: histogram!("baton_node_step_tokens"),
            preemptions: counter!("baton_node_preemptions_total"),
        }
    }

    /// A plan with `decode` generating sequences took so long.
    pub(super) fn step(&self, plan: &Plan, decode: usize, took: Duration) {
        let kind = match (decode, plan.prefill_tokens()) {
            (_, 0) => &self.decode,
            (0, _) => &self.prefill,
            _ => &self.mixed,
        };
        kind.record(took);
        self.tokens.record(plan.tokens() as f64);
        self.preemptions.increment(plan.preempted.len() as u64);
    }
}
