//! A prefill node.

use std::collections::VecDeque;

use super::cache::BlockCache;

/// One prompt at a time, first in, first out.
#[derive(Debug)]
pub(super) struct PrefillNode {
    /// How many times as long as usual it takes.
    pub(super) slowdown: f64,
    pub(super) cache: BlockCache,
    /// What the cache will hold when everything queued is computed.
    pub(super) planned: BlockCache,
    pub(super) queue: VecDeque<usize>,
    pub(super) running: Option<Running>,
    /// Tokens to compute, and the time for it, of the queue, as foreseen at dispatch.
    pub(super) queued_tokens: u64,
    pub(super) queued_ms: f64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Running {
    pub(super) request: usize,
    /// Foreseen.
    pub(super) tokens: u64,
    pub(super) ends_ms: f64,
}

impl PrefillNode {
    pub(super) fn new(cache_blocks: usize, slowdown: f64) -> Self {
        Self {
            slowdown,
            cache: BlockCache::new(cache_blocks),
            planned: BlockCache::new(cache_blocks),
            queue: VecDeque::new(),
            running: None,
            queued_tokens: 0,
            queued_ms: 0.0,
        }
    }

    /// Tokens to compute of everything that is not done.
    pub(super) fn outstanding_tokens(&self) -> u64 {
        self.queued_tokens + self.running.map_or(0, |running| running.tokens)
    }

    /// When all that is queued should be done, from now.
    pub(super) fn drain_ms(&self, now_ms: f64) -> f64 {
        let running = self.running.map_or(0.0, |running| (running.ends_ms - now_ms).max(0.0));
        running + self.queued_ms
    }
}
