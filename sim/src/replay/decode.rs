//! A decode node.

use std::collections::VecDeque;

use super::batch::Batch;
use super::cache::BlockCache;

/// A batch, its memory, and who waits for room in it.
#[derive(Debug)]
pub(super) struct DecodeNode {
    pub(super) batch: Batch,
    pub(super) cache: BlockCache,
    /// What the cache will hold when everything that was sent here has arrived.
    pub(super) planned: BlockCache,
    pub(super) waiting: VecDeque<usize>,
    /// Prompt tokens to compute here of requests that wait.
    pub(super) waiting_tokens: u64,
    /// Tokens of all requests that were sent here and have not ended, with their whole answers.
    pub(super) promised_tokens: u64,
    /// Counts how often its next change was planned anew.
    pub(super) generation: u64,
}

impl DecodeNode {
    pub(super) fn new(cache_blocks: usize, batch: Batch) -> Self {
        Self {
            batch,
            cache: BlockCache::new(cache_blocks),
            planned: BlockCache::new(cache_blocks),
            waiting: VecDeque::new(),
            waiting_tokens: 0,
            promised_tokens: 0,
            generation: 0,
        }
    }
}
