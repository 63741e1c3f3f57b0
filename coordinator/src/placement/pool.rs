//! What the nodes of one model have in common.

use super::fit::Fit;
use super::links::Links;
use super::node::PREFILL_PRIOR;
use super::popular::Popular;
use crate::index::NodeKey;

/// Time over which the load is averaged.
const LOAD_WINDOW_MS: f64 = 60_000.0;
/// No load is averaged over less.
const LEAST_AGE_MS: f64 = 10_000.0;
/// Bounds the share of time that nodes are busy, so that nothing becomes infinite.
const MOST_BUSY: f64 = 0.952;
/// Tokens of an answer before any was seen.
const FIRST_OUTPUT: f64 = 128.0;
/// Weight of one more answer in the average.
const NOVELTY: f64 = 0.02;
/// Milliseconds per byte of a pull before any was measured: ten gigabytes per second.
const PULL_MS_PER_BYTE: f64 = 1e-7;
/// The same of a handover, most of which is hidden by computing.
const HANDOVER_MS_PER_BYTE: f64 = 2e-8;

/// See the module's description. Times are milliseconds of the caller's clock.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    pub(super) prefill: Vec<NodeKey>,
    pub(super) decode: Vec<NodeKey>,
    /// Of either role: they take nothing.
    pub(super) draining: Vec<NodeKey>,
    /// Prefills on all prefill nodes, and on all decode nodes, which compute prompts between steps.
    pub(super) typical: [Fit; 2],
    pub(super) popular: Popular,
    pub(super) output: f64,
    /// Prefill time placed lately, older work counting less.
    offered_ms: f64,
    offered_at: f64,
    /// When the first was placed.
    offered_since: f64,
    /// Links on which prompts' KV is handed over while they are computed: what it takes beyond that.
    pub(super) handover: Links,
    /// Links on which cached prefixes are fetched.
    pub(super) pulls: Links,
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            prefill: Vec::new(),
            decode: Vec::new(),
            draining: Vec::new(),
            typical: std::array::from_fn(|_| Fit::new(PREFILL_PRIOR)),
            popular: Popular::default(),
            output: FIRST_OUTPUT,
            offered_ms: 0.0,
            offered_at: 0.0,
            offered_since: f64::INFINITY,
            handover: Links::new(HANDOVER_MS_PER_BYTE),
            pulls: Links::new(PULL_MS_PER_BYTE),
        }
    }
}

impl Pool {
    /// Nodes that are joined.
    pub(super) fn len(&self) -> usize {
        self.prefill.len() + self.decode.len() + self.draining.len()
    }

    /// So much prefill time was placed on prefill nodes.
    pub(super) fn offer(&mut self, ms: f64, now: f64) {
        self.offered_ms = self.offered_ms * self.fading(now) + ms;
        self.offered_at = now;
        self.offered_since = self.offered_since.min(now);
    }

    /// `w = rho / (1 - rho)`, with the share `rho` of the time that prefill nodes are busy.
    pub(super) fn scarcity(&self, now: f64) -> f64 {
        // Until the window has passed once, the average is over what there was of it.
        let age = (now - self.offered_since).max(LEAST_AGE_MS);
        let window = LOAD_WINDOW_MS * (1.0 - (-age / LOAD_WINDOW_MS).exp());
        let busy = self.offered_ms * self.fading(now) / window;
        let rho = (busy / self.prefill.len().max(1) as f64).min(MOST_BUSY);
        rho / (1.0 - rho)
    }

    fn fading(&self, now: f64) -> f64 {
        (-(now - self.offered_at) / LOAD_WINDOW_MS).exp()
    }

    /// An answer had so many tokens.
    pub(super) fn answered(&mut self, tokens: usize) {
        self.output += NOVELTY * (tokens as f64 - self.output);
    }

    /// A node is there no more.
    pub(super) fn forget(&mut self, node: NodeKey) {
        for links in [&mut self.handover, &mut self.pulls] {
            links.forget(node);
        }
    }
}
