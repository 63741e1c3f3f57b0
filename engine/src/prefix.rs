//! [`PrefixCache`]: a block pool that remembers what freed blocks hold.
//!
//! Full blocks are named by the hash of everything up to their end, so the cached blocks form a
//! forest whose edges are "continues". A block that nobody uses stays cached until its room is
//! needed; then the least recently used *leaf* goes, because a block without its predecessors can
//! never be matched.
//!
//! Whoever uses a cached block uses all its predecessors too. So the blocks that nobody uses are
//! whole subtrees, and all of them can be evicted, one leaf after the other.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use baton_proto::hash::BlockHash;
use baton_proto::message::BlockCounts;

use crate::blocks::{BlockPool, Exhausted, User};

#[cfg(test)]
mod tests;

/// A cached block.
#[derive(Clone, Copy, Debug)]
struct Node {
    block: u32,
    /// The block before it; `None` for the first one of a sequence.
    parent: Option<BlockHash>,
    /// Cached blocks that continue this one.
    children: u32,
    /// When it was last given back; grows.
    last_used: u64,
}

/// What a prompt finds in the cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Match {
    /// Leading blocks that are cached.
    pub blocks: usize,
    /// How many of them nobody uses: taking them takes as many from those available.
    pub unused: usize,
}

/// A block pool with a cache of full blocks.
#[derive(Debug)]
pub struct PrefixCache {
    pool: BlockPool,
    nodes: HashMap<BlockHash, Node>,
    /// The inverse of `nodes`, by block.
    hashes: Vec<Option<BlockHash>>,
    /// Leaves that nobody uses, least recently used first.
    evictable: BTreeSet<(u64, u32)>,
    clock: u64,
    /// Net changes not yet told: `true` was stored, `false` was removed. At most one entry per
    /// block that was or is cached; taken after every step.
    changes: BTreeMap<BlockHash, bool>,
}

impl PrefixCache {
    /// A cache over `blocks` free blocks.
    #[must_use]
    pub fn new(blocks: usize) -> Self {
        Self {
            pool: BlockPool::new(blocks),
            nodes: HashMap::with_capacity(blocks),
            hashes: vec![None; blocks],
            evictable: BTreeSet::new(),
            clock: 0,
            changes: BTreeMap::new(),
        }
    }

    /// Blocks by state.
    #[must_use]
    pub fn counts(&self) -> BlockCounts {
        self.pool.counts()
    }

    /// Size of the pool.
    #[must_use]
    pub fn total(&self) -> usize {
        self.pool.total()
    }

    /// Blocks that can be allocated: the free ones and those held by the cache alone.
    #[must_use]
    pub fn available(&self) -> usize {
        let BlockCounts { free, cached, .. } = self.pool.counts();
        (free + cached) as usize
    }

    /// How many leading blocks of a chain are cached.
    #[must_use]
    pub fn find(&self, chain: &[BlockHash]) -> Match {
        let mut found = Match::default();
        for node in chain.iter().map_while(|hash| self.nodes.get(hash)) {
            found.blocks += 1;
            found.unused += usize::from(!self.pool.used(node.block));
        }
        found
    }

    /// Gives the cached blocks of `chain` to `user` too and appends them to `out`. All of them
    /// must be cached.
    pub fn share(&mut self, chain: &[BlockHash], user: User, out: &mut Vec<u32>) {
        for hash in chain {
            let block = self.nodes.get(hash).expect("shared blocks were found before").block;
            self.retain(block, user);
            out.push(block);
        }
    }

    /// Appends `count` blocks of `user`'s own to `out`, evicting as many cached ones as needed.
    pub fn allocate(
        &mut self,
        count: usize,
        user: User,
        out: &mut Vec<u32>,
    ) -> Result<(), Exhausted> {
        let free = self.available();
        if count > free {
            return Err(Exhausted { needed: count, free });
        }
        for _ in 0..count {
            if self.pool.counts().free == 0 {
                self.evict();
            }
            out.push(self.pool.take(user).expect("as many blocks as counted are there"));
        }
        Ok(())
    }

    /// One more owner of a block that has one or is cached.
    pub fn retain(&mut self, block: u32, user: User) {
        if !self.pool.used(block)
            && let Some(node) = self.hashes[block as usize].map(|hash| self.nodes[&hash])
        {
            self.evictable.remove(&(node.last_used, block));
        }
        self.pool.retain(block, user);
    }

    /// One owner less. Blocks of one sequence are released last one first.
    pub fn release(&mut self, block: u32, user: User) {
        self.pool.release(block, user);
        if self.pool.used(block) {
            return;
        }
        let Some(hash) = self.hashes[block as usize] else { return };
        self.clock += 1;
        let node = self.nodes.get_mut(&hash).expect("every hash has a node");
        node.last_used = self.clock;
        if node.children == 0 {
            self.evictable.insert((node.last_used, block));
        }
    }

    /// Caches `block`, which somebody uses and which is full, under `hash`; `parent` names the
    /// cached block before it. Returns the block that the cache holds under this hash, which is
    /// another one if an equal block was cached first.
    pub fn insert(&mut self, parent: Option<BlockHash>, hash: BlockHash, block: u32) -> u32 {
        debug_assert!(self.pool.used(block), "block {block} has no user");
        if let Some(node) = self.nodes.get(&hash) {
            return node.block;
        }
        if let Some(parent) = parent {
            let node = self.nodes.get_mut(&parent).expect("a block is cached after its parent");
            node.children += 1;
        }
        self.nodes.insert(hash, Node { block, parent, children: 0, last_used: 0 });
        self.hashes[block as usize] = Some(hash);
        self.pool.set_cached(block, true);
        self.changed(hash, true);
        block
    }

    /// What entered and left the cache since the last call; nothing is in both.
    pub fn take_changes(&mut self) -> (Vec<BlockHash>, Vec<BlockHash>) {
        let (mut stored, mut removed) = (Vec::new(), Vec::new());
        for (hash, cached) in std::mem::take(&mut self.changes) {
            if cached { stored.push(hash) } else { removed.push(hash) }
        }
        (stored, removed)
    }

    /// All that is cached, in ascending order.
    #[must_use]
    pub fn snapshot(&self) -> Vec<BlockHash> {
        let mut hashes: Vec<BlockHash> = self.hashes.iter().copied().flatten().collect();
        hashes.sort_unstable();
        hashes
    }

    fn changed(&mut self, hash: BlockHash, cached: bool) {
        // A change and its opposite are no change.
        if self.changes.remove(&hash).is_none() {
            self.changes.insert(hash, cached);
        }
    }

    fn evict(&mut self) {
        let (_, block) = self.evictable.pop_first().expect("an unused subtree has a leaf");
        let hash = self.hashes[block as usize].take().expect("evictable blocks are cached");
        let node = self.nodes.remove(&hash).expect("every hash has a node");
        self.pool.set_cached(block, false);
        self.changed(hash, false);
        let Some(parent) = node.parent.and_then(|parent| self.nodes.get_mut(&parent)) else {
            return;
        };
        parent.children -= 1;
        if parent.children == 0 && !self.pool.used(parent.block) {
            self.evictable.insert((parent.last_used, parent.block));
        }
    }

    /// Derives everything anew and compares. For tests and for idle moments.
    ///
    /// # Panics
    /// If the cache contradicts itself.
    pub fn check(&self) {
        self.pool.check();
        let mut children: HashMap<BlockHash, u32> = HashMap::new();
        for (hash, node) in &self.nodes {
            assert_eq!(self.hashes[node.block as usize], Some(*hash), "both ways agree");
            let Some(parent) = node.parent else { continue };
            let above = self.nodes.get(&parent).expect("a cached block's parent is cached");
            let used = self.pool.used(above.block) || !self.pool.used(node.block);
            assert!(used, "who uses a block uses its parent");
            *children.entry(parent).or_default() += 1;
        }
        let mut evictable = BTreeSet::new();
        for (hash, node) in &self.nodes {
            let count = children.get(hash).copied().unwrap_or(0);
            assert_eq!(node.children, count, "children are counted");
            if count == 0 && !self.pool.used(node.block) {
                evictable.insert((node.last_used, node.block));
            }
        }
        assert_eq!(self.evictable, evictable, "unused leaves are listed");
        assert_eq!(self.hashes.iter().flatten().count(), self.nodes.len());
    }
}
