//! How far a request has come.

use super::{Dispatch, Record};

/// A request in the cluster.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) dispatch: Option<Dispatch>,
    /// Tokens to compute and the time for it, as foreseen at dispatch.
    pub(super) planned_tokens: u64,
    pub(super) planned_ms: f64,
    /// A pull that has not arrived.
    pub(super) pulling: bool,
    pub(super) prefill_started_ms: f64,
    /// The prompt is computed, the KV has arrived: with both, decoding begins.
    pub(super) prefilled: bool,
    pub(super) landed: bool,
    /// Blocks that the decode node had when it set room aside.
    pub(super) held_blocks: usize,
    pub(super) record: Record,
}

impl Job {
    pub(super) fn new(arrival_ms: f64) -> Self {
        Self {
            dispatch: None,
            planned_tokens: 0,
            planned_ms: 0.0,
            pulling: false,
            prefill_started_ms: 0.0,
            prefilled: false,
            landed: false,
            held_blocks: 0,
            record: Record { arrival_ms, ..Record::default() },
        }
    }
}
