//! Policies that look at the caches.

use std::collections::HashMap;

use super::{Arrival, Choose, least};
use crate::replay::Node;

/// Blocks in more than this share of the requests are on every node, or will soon be.
const UBIQUITOUS: f64 = 0.3;
/// A node with this share of the prompt is warm.
const WARM: f64 = 0.8;
/// Time by which a cold node must be faster than every warm one to be preferred.
const WARM_PENALTY_MS: f64 = 14_000.0;
/// Share of the requests that ignore warmth, so that new nodes get warm too.
const EXPLORED: f64 = 0.01;

#[derive(Default)]
pub(super) struct Prefix {
    /// How many requests had a block; only looked up.
    seen: HashMap<u32, u32>,
    requests: u32,
}

/// Source: llm-d's `prefix-cache-affinity-filter` and `token-load-scorer`.
pub(super) struct Sticky;

impl Choose for Prefix {
    fn choose(&mut self, Arrival { request, cluster, random, .. }: Arrival<'_>) -> usize {
        let everywhere = self.ubiquitous(cluster.full_blocks(request));
        let nodes = 0..cluster.settings().prefill_nodes;
        let own = |at| cluster.matched_blocks(Node::Prefill(at), request).max(everywhere);
        let longest = nodes.clone().map(own).max().unwrap_or_default();
        let load = |at| cluster.outstanding_tokens(at) as f64;
        least(random, nodes.filter(|&at| own(at) == longest), load)
    }
}

impl Prefix {
    /// Counts the request's blocks; how many leading ones nearly everybody has.
    fn ubiquitous(&mut self, blocks: &[u32]) -> usize {
        self.requests += 1;
        for block in blocks {
            *self.seen.entry(*block).or_default() += 1;
        }
        let often = UBIQUITOUS * f64::from(self.requests);
        blocks.iter().take_while(|block| f64::from(self.seen[block]) > often).count()
    }
}

impl Choose for Sticky {
    fn choose(&mut self, Arrival { request, cluster, random, .. }: Arrival<'_>) -> usize {
        let nodes = 0..cluster.settings().prefill_nodes;
        let tokens = cluster.request(request).input_tokens;
        let cached = |at| {
            let matched = cluster.matched_blocks(Node::Prefill(at), request);
            cluster.cached_tokens(request, matched)
        };
        let load = |at| (cluster.outstanding_tokens(at) + u64::from(tokens - cached(at))) as f64;
        let warm = |at: &usize| f64::from(cached(*at)) >= WARM * f64::from(tokens);
        // Its estimate of the time to first token has tokens in it only.
        let token_ms = cluster.settings().prefill_cost.token_ms;
        let fastest = |nodes: &mut dyn Iterator<Item = usize>| {
            nodes.map(|at| load(at) * token_ms).fold(f64::INFINITY, f64::min)
        };
        let warm_ms = fastest(&mut nodes.clone().filter(warm));
        let cold_ms = fastest(&mut nodes.clone().filter(|at| !warm(at)));
        let explores = random.f64() < EXPLORED;
        if explores || !warm_ms.is_finite() || warm_ms - cold_ms > WARM_PENALTY_MS {
            least(random, nodes, load)
        } else {
            least(random, nodes.filter(warm), load)
        }
    }
}
