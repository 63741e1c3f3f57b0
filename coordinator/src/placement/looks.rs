//! What operators may know of placement.

use std::time::Instant;

use baton_proto::ids::{NodeId, RequestId};

use super::Placement;
use crate::index::NodeKey;

/// Where a request stands that waits here.
#[derive(Clone, Debug, PartialEq)]
pub struct WaitsFor {
    /// For which node.
    pub node: NodeId,
    /// Requests before it.
    pub ahead: usize,
    /// Their predicted prefill time on that node, in milliseconds.
    pub ahead_ms: f64,
    /// Requests after it.
    pub behind: usize,
}

/// What a node found in its prefix cache since it joined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    /// Tokens of the prompts that it began to compute.
    pub prompt_tokens: u64,
    /// Of these, found in its cache.
    pub cached_tokens: u64,
    /// Blocks that left its cache.
    pub evicted_blocks: u64,
}

impl Placement {
    /// Where a request stands that waits here.
    #[must_use]
    pub fn waits_for(&self, request: RequestId) -> Option<WaitsFor> {
        let job = self.waiting.get(&request)?;
        let node = self.node(job.node)?;
        let entries = node.queue.entries();
        let at = entries.iter().position(|entry| entry.request == request)?;
        let ahead_ms = entries[..at].iter().map(|entry| entry.ms).sum();
        let behind = entries.len() - at - 1;
        Some(WaitsFor { node: node.id.clone(), ahead: at, ahead_ms, behind })
    }

    /// Nodes that get nothing for a while, as they failed several times in a row.
    pub fn resting(&self, now: Instant) -> impl Iterator<Item = &NodeId> {
        let now = self.ms(now);
        let nodes = self.nodes.iter().flatten();
        nodes.filter(move |node| !node.breaker.admits(now)).map(|node| &node.id)
    }

    /// KV transfers to decode nodes under way.
    #[must_use]
    pub fn transfers(&self) -> usize {
        self.nodes.iter().flatten().map(|node| node.incoming as usize).sum()
    }

    /// A node's cache gave up so many blocks.
    pub fn evicted(&mut self, key: NodeKey, blocks: usize) {
        if let Some(node) = self.node_mut(key) {
            node.hits.evicted_blocks += blocks as u64;
        }
    }

    /// What a node found in its cache.
    #[must_use]
    pub fn hits(&self, key: NodeKey) -> Hits {
        self.node(key).map(|node| node.hits).unwrap_or_default()
    }
}
