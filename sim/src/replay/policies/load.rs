//! Policies that look at the load.

use std::collections::HashMap;

use super::{Arrival, Choose, Cluster, least};
use crate::replay::Node;

/// Tokens that requests of a session have in common.
const SESSION_TOKENS: u32 = 1024;

pub(super) struct LeastLoaded;

#[derive(Default)]
pub(super) struct Session {
    /// By the name of the block that ends the first 1,024 tokens; only looked up.
    homes: HashMap<u32, usize>,
}

/// Source: Mooncake (FAST'25), algorithm 1, without the transfer.
pub(super) struct MinTtft;

impl Choose for LeastLoaded {
    fn choose(&mut self, Arrival { cluster, random, .. }: Arrival<'_>) -> usize {
        least_loaded(cluster, random)
    }
}

impl Choose for Session {
    fn choose(&mut self, Arrival { request, cluster, random, .. }: Arrival<'_>) -> usize {
        let blocks = &cluster.request(request).blocks;
        let count = SESSION_TOKENS.div_ceil(cluster.block_tokens()) as usize;
        match blocks.get(..count.min(blocks.len())).and_then(<[u32]>::last) {
            Some(&key) => *self.homes.entry(key).or_insert_with(|| least_loaded(cluster, random)),
            None => least_loaded(cluster, random),
        }
    }
}

impl Choose for MinTtft {
    fn choose(&mut self, Arrival { now_ms, request, cluster, random }: Arrival<'_>) -> usize {
        least(random, 0..cluster.settings().prefill_nodes, |at| {
            ttft_ms(cluster, now_ms, request, at)
        })
    }
}

fn least_loaded(cluster: &Cluster<'_>, random: &mut fastrand::Rng) -> usize {
    let nodes = 0..cluster.settings().prefill_nodes;
    least(random, nodes, |at| cluster.outstanding_tokens(at) as f64)
}

/// When the first token would come from a prefill node, from now.
fn ttft_ms(cluster: &Cluster<'_>, now_ms: f64, request: usize, at: usize) -> f64 {
    let matched = cluster.matched_blocks(Node::Prefill(at), request);
    let cached = cluster.cached_tokens(request, matched);
    let tokens = cluster.request(request).input_tokens;
    cluster.drain_ms(at, now_ms) + cluster.service_ms(at, tokens, cached)
}
