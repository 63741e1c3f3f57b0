//! A node's memory for KV blocks: those that requests use, and an LRU cache of the rest.
//!
//! A block's name stands for the whole prefix that ends with it, and prefixes are used from their
//! first block on, so a block is never used later than one that follows it. Evicting the longest
//! unused block therefore never leaves a hole.

use std::collections::HashMap;

const NONE: u32 = u32::MAX;

/// Shared blocks by name, and a count of unnamed ones.
#[derive(Clone, Debug)]
pub(super) struct BlockCache {
    capacity: usize,
    /// Blocks that belong to one request each.
    private: usize,
    /// Only looked up, never walked.
    slots_by_block: HashMap<u32, u32>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Least and most recently used of the blocks that nobody pins.
    oldest: u32,
    newest: u32,
    pinned: usize,
}

#[derive(Clone, Debug)]
struct Slot {
    block: u32,
    pins: u32,
    older: u32,
    newer: u32,
}

/// What a cache gained and lost, in this order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// New blocks, in the order of their prompt.
    pub stored: Vec<u32>,
    /// Blocks that are gone.
    pub evicted: Vec<u32>,
}

impl BlockCache {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            private: 0,
            slots_by_block: HashMap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            oldest: NONE,
            newest: NONE,
            pinned: 0,
        }
    }

    /// How many of the leading blocks are there.
    pub(super) fn matched(&self, blocks: &[u32]) -> usize {
        blocks.iter().take_while(|block| self.slots_by_block.contains_key(block)).count()
    }

    /// Marks leading blocks that are there as just used.
    pub(super) fn touch(&mut self, blocks: &[u32]) {
        self.pin(blocks);
        self.unpin(blocks);
    }

    /// Caches a prompt's blocks, or as many of the first ones as there is room for.
    pub(super) fn insert(&mut self, blocks: &[u32], changes: &mut Changes) {
        let held = self.matched(blocks);
        self.pin(&blocks[..held]);
        let mut end = held;
        while end < blocks.len() && self.make_room(1, changes) {
            self.store(blocks[end], changes);
            end += 1;
        }
        self.unpin(&blocks[..end]);
    }

    /// Keeps leading blocks that are there from being evicted.
    pub(super) fn pin(&mut self, blocks: &[u32]) {
        for block in blocks {
            let slot = self.slots_by_block[block];
            if self.slots[slot as usize].pins == 0 {
                self.unlink(slot);
                self.pinned += 1;
            }
            self.slots[slot as usize].pins += 1;
        }
    }

    /// Ends that. The first block becomes the most recently used.
    pub(super) fn unpin(&mut self, blocks: &[u32]) {
        for block in blocks.iter().rev() {
            let slot = self.slots_by_block[block];
            self.slots[slot as usize].pins -= 1;
            if self.slots[slot as usize].pins == 0 {
                self.pinned -= 1;
                self.link_newest(slot);
            }
        }
    }

    /// Sets room for blocks of one request aside; `false`, and nothing happened, if there is none.
    pub(super) fn reserve(&mut self, blocks: usize, changes: &mut Changes) -> bool {
        let fits = self.pinned + self.private + blocks <= self.capacity;
        if fits {
            self.make_room(blocks, changes);
            self.private += blocks;
        }
        fits
    }

    /// Gives such room back.
    pub(super) fn release(&mut self, blocks: usize) {
        self.private -= blocks;
    }

    /// Turns reserved blocks into shared ones, pinned by the request that reserved them. The caller
    /// has pinned the first `held`; of those that another request stored meanwhile one copy stays.
    pub(super) fn share(&mut self, blocks: &[u32], held: usize, changes: &mut Changes) {
        for &block in &blocks[held..] {
            self.private -= 1;
            if self.slots_by_block.contains_key(&block) {
                self.pin(&[block]);
            } else {
                self.store(block, changes);
            }
        }
    }

    /// Named and unnamed blocks.
    pub(super) fn used(&self) -> usize {
        self.slots_by_block.len() + self.private
    }

    /// Blocks that cannot be evicted.
    pub(super) fn active(&self) -> usize {
        self.pinned + self.private
    }

    fn make_room(&mut self, blocks: usize, changes: &mut Changes) -> bool {
        while self.used() + blocks > self.capacity {
            if self.oldest == NONE {
                return false;
            }
            let slot = self.oldest;
            self.unlink(slot);
            let block = self.slots[slot as usize].block;
            self.slots_by_block.remove(&block);
            self.free.push(slot);
            changes.evicted.push(block);
        }
        true
    }

    /// Stores a block that is not there, pinned once.
    fn store(&mut self, block: u32, changes: &mut Changes) {
        let new = Slot { block, pins: 1, older: NONE, newer: NONE };
        let slot = if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = new;
            slot
        } else {
            self.slots.push(new);
            (self.slots.len() - 1) as u32
        };
        self.slots_by_block.insert(block, slot);
        self.pinned += 1;
        changes.stored.push(block);
    }

    fn unlink(&mut self, slot: u32) {
        let Slot { older, newer, .. } = self.slots[slot as usize];
        if older == NONE {
            self.oldest = newer
        } else {
            self.slots[older as usize].newer = newer
        }
        if newer == NONE { self.newest = older } else { self.slots[newer as usize].older = older }
    }

    fn link_newest(&mut self, slot: u32) {
        let newest = self.newest;
        let entry = &mut self.slots[slot as usize];
        (entry.older, entry.newer) = (newest, NONE);
        if newest == NONE {
            self.oldest = slot
        } else {
            self.slots[newest as usize].newer = slot
        }
        self.newest = slot;
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
