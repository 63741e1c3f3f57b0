//! Between nodes.

use super::Serving;
use crate::replay::cache::BlockCache;
use crate::replay::events::Event;
use crate::replay::{Changes, News, Node};

/// A transfer in progress.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    request: usize,
    from: Node,
    to: Node,
    tokens: u32,
    began_ms: f64,
    /// Leading blocks that a pull brings; `None` for a hand-over.
    pulled: Option<usize>,
}

impl Serving<'_> {
    /// Sends a prompt's KV to its decode node, from the beginning of its prefill on: it leaves layer
    /// by layer while the rest is computed, and can end no earlier than the prefill.
    pub(super) fn hand_over(&mut self, now_ms: f64, prefill: usize, decode: usize, request: usize) {
        let held = self.cluster.jobs[request].held_blocks as u32 * self.cluster.trace.block_tokens;
        let tokens = self.cluster.trace.requests[request].input_tokens - held;
        self.cluster.jobs[request].record.moved_tokens = tokens;
        let (from, to) = (Node::Prefill(prefill), Node::Decode(decode));
        let flow = Flow { request, from, to, tokens, began_ms: now_ms, pulled: None };
        self.begin_flow(now_ms, flow);
    }

    /// Fetches leading blocks for a prefill node, if the source has what the node lacks.
    pub(super) fn pull(&mut self, now_ms: f64, at: usize, request: usize) {
        let dispatch = self.cluster.jobs[request].dispatch;
        let Some((from, wanted)) = dispatch.and_then(|dispatch| dispatch.pull) else { return };
        let blocks = self.cluster.full_blocks(request);
        let blocks = &blocks[..wanted.min(blocks.len())];
        let own = self.cluster.prefill[at].cache.matched(blocks);
        let source = self.cache_mut(from);
        let there = source.matched(blocks);
        if self.network.is_none() || from == Node::Prefill(at) || there <= own {
            return;
        }
        self.cache_mut(from).touch(&blocks[..there]);
        let planned = &mut self.cluster.prefill[at].planned;
        planned.insert(&blocks[..there], &mut Changes::default());
        let tokens = (there - own) as u32 * self.cluster.trace.block_tokens;
        let job = &mut self.cluster.jobs[request];
        job.record.pulled_tokens = tokens;
        job.pulling = true;
        let (to, pulled) = (Node::Prefill(at), Some(there));
        self.begin_flow(now_ms, Flow { request, from, to, tokens, began_ms: now_ms, pulled });
    }

    /// Fetches leading blocks for a prompt that a decode node computes itself; false if the source
    /// has none that the node lacks.
    pub(super) fn pull_local(&mut self, now_ms: f64, at: usize, request: usize) -> bool {
        let dispatch = self.cluster.jobs[request].dispatch;
        let Some((from, wanted)) = dispatch.and_then(|dispatch| dispatch.pull) else {
            return false;
        };
        let blocks = self.cluster.full_blocks(request);
        let blocks = &blocks[..wanted.min(blocks.len())];
        let own = self.cluster.jobs[request].held_blocks;
        let there = self.cache_mut(from).matched(blocks);
        if self.network.is_none() || from == Node::Decode(at) || there <= own {
            return false;
        }
        self.cache_mut(from).touch(&blocks[..there]);
        let tokens = (there - own) as u32 * self.cluster.trace.block_tokens;
        self.cluster.jobs[request].record.pulled_tokens = tokens;
        let (to, pulled) = (Node::Decode(at), Some(there));
        self.begin_flow(now_ms, Flow { request, from, to, tokens, began_ms: now_ms, pulled });
        true
    }

    pub(in crate::replay) fn network_change(&mut self, now_ms: f64, generation: u64) {
        if self.network_generation != generation {
            return;
        }
        let ended = self.network.as_mut().and_then(|network| network.end(now_ms));
        let flow = ended.and_then(|number| self.flows.remove(&number));
        self.plan_network();
        self.end_flow(now_ms, flow.expect("a planned end is that of a transfer"));
    }

    fn begin_flow(&mut self, now_ms: f64, flow: Flow) {
        match (&mut self.network, self.cluster.settings.link) {
            (Some(network), Some(link)) if flow.tokens > 0 => {
                let bytes = f64::from(flow.tokens) * link.bytes_per_token;
                let number = network.begin(now_ms, flow.from, flow.to, bytes);
                self.flows.insert(number, flow);
                self.plan_network();
            }
            _ => self.end_flow(now_ms, flow),
        }
    }

    fn end_flow(&mut self, now_ms: f64, flow: Flow) {
        let Flow { request, from, to, tokens, began_ms, pulled } = flow;
        if tokens > 0 {
            let ms = now_ms - began_ms;
            self.told.push((to, News::Transferred { request, from, tokens, ms }));
        }
        match (to, pulled) {
            (Node::Prefill(at), Some(pulled)) => {
                let blocks = &self.cluster.full_blocks(request)[..pulled];
                let mut changes = Changes::default();
                self.cluster.prefill[at].cache.insert(blocks, &mut changes);
                self.tell_changes(now_ms, to, changes);
                self.cluster.jobs[request].pulling = false;
                self.begin_prefill(now_ms, at);
            }
            (Node::Decode(at), Some(pulled)) => {
                self.begin_local(now_ms, at, request, pulled);
            }
            (Node::Decode(at), None) => {
                self.landed(now_ms, at, request);
                self.begin_decode(now_ms, at, request);
            }
            (Node::Prefill(_), None) => {}
        }
    }

    fn plan_network(&mut self) {
        self.network_generation += 1;
        if let Some(ms) = self.network.as_ref().and_then(|network| network.next_end_ms()) {
            self.events.plan(ms, Event::Network(self.network_generation));
        }
    }

    fn cache_mut(&mut self, node: Node) -> &mut BlockCache {
        match node {
            Node::Prefill(at) => &mut self.cluster.prefill[at].cache,
            Node::Decode(at) => &mut self.cluster.decode[at].cache,
        }
    }
}
