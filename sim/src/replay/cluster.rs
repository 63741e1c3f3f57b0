//! The cluster's state, as a policy that knows everything may see it.

use super::batch::Batch;
use super::decode::DecodeNode;
use super::job::Job;
use super::prefill::PrefillNode;
use super::{News, Node, Settings};
use crate::trace::{Request, Trace};

/// All nodes, and what they will do with what was sent to them.
#[derive(Debug)]
pub struct Cluster<'a> {
    pub(super) settings: &'a Settings,
    pub(super) trace: &'a Trace,
    pub(super) prefill: Vec<PrefillNode>,
    pub(super) decode: Vec<DecodeNode>,
    pub(super) jobs: Vec<Job>,
}

impl<'a> Cluster<'a> {
    pub(super) fn new(settings: &'a Settings, trace: &'a Trace) -> Self {
        let (count, wrong) = (settings.prefill_nodes, settings.disturbance);
        let slow = count.saturating_sub(wrong.slow_nodes);
        let slowdown = |at: usize| if at >= slow { wrong.slow_factor } else { 1.0 };
        let blocks = settings.cache_blocks;
        let batch = || Batch::new(settings.decode_cost, settings.prefill_cost);
        Self {
            settings,
            trace,
            prefill: (0..count).map(|at| PrefillNode::new(blocks, slowdown(at))).collect(),
            decode: (0..settings.decode_nodes).map(|_| DecodeNode::new(blocks, batch())).collect(),
            jobs: trace.requests.iter().map(|request| Job::new(request.arrival_ms)).collect(),
        }
    }

    /// What the cluster is made of.
    #[must_use]
    pub fn settings(&self) -> &'a Settings {
        self.settings
    }

    /// Tokens per block.
    #[must_use]
    pub fn block_tokens(&self) -> u32 {
        self.trace.block_tokens
    }

    /// A request.
    #[must_use]
    pub fn request(&self, request: usize) -> &'a Request {
        &self.trace.requests[request]
    }

    /// Its blocks that can be shared.
    #[must_use]
    pub fn full_blocks(&self, request: usize) -> &'a [u32] {
        self.trace.requests[request].full_blocks(self.trace.block_tokens)
    }

    /// Leading blocks that a node will hold when it comes to this request.
    #[must_use]
    pub fn matched_blocks(&self, node: Node, request: usize) -> usize {
        let blocks = self.full_blocks(request);
        match node {
            Node::Prefill(at) => self.prefill[at].planned.matched(blocks),
            Node::Decode(at) => self.decode[at].planned.matched(blocks),
        }
    }

    /// The tokens of as many leading blocks, but for one that is always computed.
    #[must_use]
    pub fn cached_tokens(&self, request: usize, blocks: usize) -> u32 {
        let tokens = blocks as u32 * self.trace.block_tokens;
        tokens.min(self.trace.requests[request].input_tokens - 1)
    }

    /// Prompt tokens that a prefill node has still to compute.
    #[must_use]
    pub fn outstanding_tokens(&self, prefill: usize) -> u64 {
        self.prefill[prefill].outstanding_tokens()
    }

    /// Time until a prefill node has computed them.
    #[must_use]
    pub fn drain_ms(&self, prefill: usize, now_ms: f64) -> f64 {
        self.prefill[prefill].drain_ms(now_ms)
    }

    /// Time that a prefill node needs for a prompt, without noise.
    #[must_use]
    pub fn service_ms(&self, prefill: usize, tokens: u32, cached: u32) -> f64 {
        self.settings.prefill_cost.ms(tokens, cached) * self.prefill[prefill].slowdown
    }

    /// Tokens of all requests on a decode node or on their way to it, with their whole answers.
    #[must_use]
    pub fn promised_tokens(&self, decode: usize) -> u64 {
        self.decode[decode].promised_tokens
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = Node> + use<> {
        let prefill = (0..self.prefill.len()).map(Node::Prefill);
        prefill.chain((0..self.decode.len()).map(Node::Decode))
    }

    /// KV blocks that a request needs on its decode node.
    pub(super) fn needed_blocks(&self, request: usize) -> usize {
        let request = &self.trace.requests[request];
        let tokens = request.input_tokens + request.output_tokens;
        tokens.div_ceil(self.trace.block_tokens) as usize
    }

    pub(super) fn report(&self, node: Node) -> News {
        match node {
            Node::Prefill(at) => News::Report {
                queued_tokens: self.prefill[at].outstanding_tokens(),
                sequences: 0,
                kv_tokens: 0,
                step_ms: 0.0,
                active_blocks: self.prefill[at].cache.active(),
            },
            Node::Decode(at) => {
                let DecodeNode { batch, cache, waiting_tokens, .. } = &self.decode[at];
                News::Report {
                    queued_tokens: waiting_tokens + batch.prompt_tokens(),
                    sequences: batch.sequences(),
                    kv_tokens: batch.kv_tokens(),
                    step_ms: batch.decode_step_ms(),
                    active_blocks: cache.active(),
                }
            }
        }
    }
}
