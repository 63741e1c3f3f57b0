//! One node, as placement sees it.

use baton_proto::hash::ModelRoot;
use baton_proto::ids::{Epoch, NodeId, Role};
use baton_proto::message::{Hello, Peer, Report};
use baton_proto::share::SharedLoad;

use super::breaker::Breaker;
use super::cost::{Candidate, TAKEN_WINDOW_MS};
use super::fit::{self, Fit};
use super::load::Load;
use super::looks::Hits;
use super::queue::Queue;

/// Coefficients of a prefill before any was measured, in milliseconds: to start, per token, and
/// per pair of tokens. Attention doubles a token's cost after 16,384 others.
pub(super) const PREFILL_PRIOR: [f64; 3] = [1.0, 0.5, 0.5 / (2.0 * 16384.0)];
/// Coefficients of a decode step: its floor, per sequence, and per token of KV.
const STEP_PRIOR: [f64; 3] = [10.0, 0.2, 2e-5];

/// See the module's description.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) epoch: Epoch,
    pub(super) kv_address: String,
    pub(super) root: ModelRoot,
    pub(super) role: Role,
    pub(super) draining: bool,
    pub(super) max_model_len: usize,
    pub(super) total_blocks: u64,
    pub(super) price: f64,
    pub(super) block_tokens: usize,
    pub(super) load: Load,
    /// Promised by other coordinators, and not in `load` yet.
    pub(super) shared: SharedLoad,
    pub(super) queue: Queue,
    pub(super) breaker: Breaker,
    pub(super) prefill: Fit,
    pub(super) step: Fit,
    /// Time that prompts took from its sequences, at some time.
    pub(super) taken: (f64, f64),
    /// Transfers to it under way.
    pub(super) incoming: u32,
    /// Pulls from it under way.
    pub(super) serving: u32,
    /// For operators.
    pub(super) hits: Hits,
}

impl Node {
    pub(super) fn new(id: &NodeId, hello: &Hello, now: f64) -> Self {
        Self {
            id: id.clone(),
            epoch: hello.epoch,
            kv_address: hello.kv_address.clone(),
            root: hello.root,
            role: hello.role,
            draining: false,
            max_model_len: hello.max_model_len as usize,
            total_blocks: hello.total_blocks,
            price: hello.price,
            block_tokens: hello.geometry.block_tokens as usize,
            load: Load::idle(hello.total_blocks),
            shared: SharedLoad::default(),
            queue: Queue::default(),
            breaker: Breaker::new(now),
            prefill: Fit::new(PREFILL_PRIOR),
            step: Fit::new(STEP_PRIOR),
            taken: (0.0, now),
            incoming: 0,
            serving: 0,
            hits: Hits::default(),
        }
    }

    /// `alone`: nobody else gives it work.
    pub(super) fn report(&mut self, report: &Report, alone: bool, now: f64) {
        self.role = report.role;
        self.draining = report.draining;
        let foreign_token_ms = if alone { 0.0 } else { self.prefill.coefficients()[1] };
        self.load.report(report, foreign_token_ms, now);
        let running = f64::from(report.running);
        if report.decode_step_ms > 0.0 && report.running > 0 {
            let held = report.blocks.active as f64 * self.block_tokens as f64;
            self.step.observe(fit::step(running, held), report.decode_step_ms);
        }
    }

    /// Time until the node is through with the prompts that it was given.
    pub(super) fn queue_ms(&self, now: f64) -> f64 {
        self.load.queue_ms(now) + self.shared.prefill_ms
    }

    /// Blocks that no sequence uses or was promised.
    pub(super) fn room(&self) -> u64 {
        self.load.room().saturating_sub(self.shared.blocks)
    }

    /// Time that prompts have lately taken from its sequences.
    pub(super) fn taken_ms(&self, now: f64) -> f64 {
        let (taken, at) = self.taken;
        // Of most nodes nothing was taken, and all are asked for every request.
        if taken == 0.0 {
            return 0.0;
        }
        taken * (-(now - at) / TAKEN_WINDOW_MS).exp()
    }

    /// How to reach this life of the node.
    pub(super) fn peer(&self) -> Peer {
        let (node, kv_address) = (self.id.clone(), self.kv_address.clone());
        Peer { node, epoch: self.epoch, kv_address }
    }

    /// The node in numbers, for a request of which it has `cached` tokens. `typical`: prefills of
    /// nodes in its role that serve the same model.
    pub(super) fn candidate(&self, cached: usize, typical: &Fit, now: f64) -> Candidate {
        let measured = self.prefill.is_known() || typical.observations() == 0;
        let prefill = if measured { &self.prefill } else { typical };
        let kv_tokens = self.load.kv_blocks() as f64 * self.block_tokens as f64;
        Candidate {
            typical: typical.coefficients(),
            cached,
            queue_ms: self.queue_ms(now),
            behind: 0,
            late: false,
            prefill: prefill.coefficients(),
            step: self.step.coefficients(),
            taken_ms: self.taken_ms(now),
            sequences: f64::from(self.load.sequences().saturating_add(self.shared.sequences)),
            kv_tokens,
            room: self.room(),
            total_blocks: self.total_blocks,
            price: self.price,
            caution: self.breaker.caution(now),
        }
    }
}
