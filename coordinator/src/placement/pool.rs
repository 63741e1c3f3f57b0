//! What the nodes of one model have in common.

use std::collections::BTreeMap;

use super::node::Typical;
use super::popular::Popular;
use crate::index::NodeKey;

/// Time over which the load is averaged.
const LOAD_WINDOW_MS: f64 = 60_000.0;
/// Bounds the share of time that nodes are busy, so that nothing becomes infinite.
const MOST_BUSY: f64 = 0.952;
/// Tokens of an answer before any was seen.
const FIRST_OUTPUT: f64 = 128.0;
/// Weight of one more answer, or one more transfer, in an average.
const NOVELTY: f64 = 0.02;
/// Milliseconds per byte of a pull before any was measured: ten gigabytes per second.
const PULL_MS_PER_BYTE: f64 = 1e-7;
/// The same of a handover, most of which is hidden by computing.
const HANDOVER_MS_PER_BYTE: f64 = 2e-8;
/// Most links that are told apart; others count as typical.
const MOST_LINKS: usize = 1 << 16;

/// See the module's description. Times are milliseconds of the caller's clock.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    pub(super) prefill: Vec<NodeKey>,
    pub(super) decode: Vec<NodeKey>,
    pub(super) typical: Typical,
    pub(super) popular: Popular,
    pub(super) output: f64,
    /// Prefill time placed lately, older work counting less.
    offered_ms: f64,
    offered_at: f64,
    handover: Links,
    pulls: Links,
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            prefill: Vec::new(),
            decode: Vec::new(),
            typical: Typical::default(),
            popular: Popular::default(),
            output: FIRST_OUTPUT,
            offered_ms: 0.0,
            offered_at: 0.0,
            handover: Links::new(HANDOVER_MS_PER_BYTE),
            pulls: Links::new(PULL_MS_PER_BYTE),
        }
    }
}

impl Pool {
    /// So much prefill time was placed on prefill nodes.
    pub(super) fn offer(&mut self, ms: f64, now: f64) {
        self.offered_ms = self.offered_ms * self.fading(now) + ms;
        self.offered_at = now;
    }

    /// `w = rho / (1 - rho)`, with the share `rho` of the time that prefill nodes are busy.
    pub(super) fn scarcity(&self, now: f64) -> f64 {
        let busy = self.offered_ms * self.fading(now) / LOAD_WINDOW_MS;
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

    /// Links on which prompts' KV is handed over while they are computed: how long it takes
    /// beyond that, per byte.
    pub(super) fn handover(&mut self) -> &mut Links {
        &mut self.handover
    }

    /// Links on which cached prefixes are fetched.
    pub(super) fn pulls(&mut self) -> &mut Links {
        &mut self.pulls
    }

    /// Milliseconds per byte from one node to another, beyond computing.
    pub(super) fn handover_ms(&self, from: NodeKey, to: NodeKey) -> f64 {
        self.handover.ms_per_byte(from, to)
    }

    /// Milliseconds per byte from one node to another.
    pub(super) fn pull_ms(&self, from: NodeKey, to: NodeKey) -> f64 {
        self.pulls.ms_per_byte(from, to)
    }

    /// A node is there no more.
    pub(super) fn forget(&mut self, node: NodeKey) {
        for links in [&mut self.handover, &mut self.pulls] {
            links.measured.retain(|&(from, to), _| from != node && to != node);
        }
    }
}

/// Measured speeds of links.
#[derive(Clone, Debug)]
pub(super) struct Links {
    measured: BTreeMap<(NodeKey, NodeKey), f64>,
    typical: f64,
    any: bool,
}

impl Links {
    fn new(typical: f64) -> Self {
        Self { measured: BTreeMap::new(), typical, any: false }
    }

    /// So many bytes took so long, with so many other transfers at the same time.
    pub(super) fn observe(&mut self, link: (NodeKey, NodeKey), bytes: f64, ms: f64, others: u32) {
        let each = ms / bytes.max(1.0) / (1.0 + f64::from(others));
        if !self.any {
            (self.typical, self.any) = (each, true);
        }
        self.typical += NOVELTY * (each - self.typical);
        if self.measured.len() < MOST_LINKS || self.measured.contains_key(&link) {
            let own = self.measured.entry(link).or_insert(each);
            *own += 5.0 * NOVELTY * (each - *own);
        }
    }

    fn ms_per_byte(&self, from: NodeKey, to: NodeKey) -> f64 {
        self.measured.get(&(from, to)).copied().unwrap_or(self.typical)
    }
}
