//! [`BlockPool`]: who owns which block of the KV cache.
//!
//! A block may have owners of three kinds at once: sequences that run, transfers, and the prefix
//! cache. Its state is that of its strongest owner, so that free + active + cached + leased is
//! always the size of the pool.

use baton_proto::message::BlockCounts;

/// An owner of a block that the prefix cache must not take it from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum User {
    /// A sequence that runs here.
    Sequence,
    /// A lease, or a sequence that waits for its KV.
    Transfer,
}

/// Too few blocks are left. Other sequences have to end first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{needed} blocks are needed and {free} are free")]
pub struct Exhausted {
    /// Blocks asked for.
    pub needed: usize,
    /// Blocks that nobody uses.
    pub free: usize,
}

/// The state of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockState {
    /// Holds nothing.
    Free,
    /// Used by a sequence.
    Active,
    /// Held by the prefix cache alone.
    Cached,
    /// Used by transfers and by no running sequence.
    Leased,
}

#[derive(Clone, Copy, Default, Debug)]
struct Block {
    sequences: u32,
    transfers: u32,
    cached: bool,
}

impl Block {
    fn state(self) -> BlockState {
        match self {
            Self { sequences: 1.., .. } => BlockState::Active,
            Self { transfers: 1.., .. } => BlockState::Leased,
            Self { cached: true, .. } => BlockState::Cached,
            _ => BlockState::Free,
        }
    }

    fn users(&mut self, user: User) -> &mut u32 {
        match user {
            User::Sequence => &mut self.sequences,
            User::Transfer => &mut self.transfers,
        }
    }
}

/// The owners of every block, and the free ones.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<u32>,
    counts: BlockCounts,
}

impl BlockPool {
    /// A pool of `blocks` free blocks, numbered from 0.
    #[must_use]
    pub fn new(blocks: usize) -> Self {
        let total = u32::try_from(blocks).expect("a pool has fewer than 2^32 blocks");
        Self {
            blocks: vec![Block::default(); blocks],
            free: (0..total).rev().collect(),
            counts: BlockCounts { free: blocks as u64, ..BlockCounts::default() },
        }
    }

    /// Takes a free block for `user`, if there is one.
    pub fn take(&mut self, user: User) -> Option<u32> {
        let block = self.free.pop()?;
        self.change(block, |b| *b.users(user) += 1);
        Some(block)
    }

    /// One more owner; the block must not be free.
    pub fn retain(&mut self, block: u32, user: User) {
        debug_assert_ne!(self.state(block), BlockState::Free, "block {block} is free");
        self.change(block, |b| *b.users(user) += 1);
    }

    /// One owner less.
    pub fn release(&mut self, block: u32, user: User) {
        self.change(block, |b| {
            let users = b.users(user);
            *users = users.checked_sub(1).expect("an owner releases what it retained");
        });
    }

    /// Whether the prefix cache holds the block.
    pub fn set_cached(&mut self, block: u32, cached: bool) {
        self.change(block, |b| b.cached = cached);
    }

    /// The state of a block.
    #[must_use]
    pub fn state(&self, block: u32) -> BlockState {
        self.blocks[block as usize].state()
    }

    /// Whether a sequence or a transfer uses the block.
    #[must_use]
    pub fn used(&self, block: u32) -> bool {
        matches!(self.state(block), BlockState::Active | BlockState::Leased)
    }

    /// Blocks by state.
    #[must_use]
    pub fn counts(&self) -> BlockCounts {
        self.counts
    }

    /// Size of the pool.
    #[must_use]
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    fn change(&mut self, block: u32, change: impl FnOnce(&mut Block)) {
        let entry = &mut self.blocks[block as usize];
        let before = entry.state();
        change(entry);
        let after = entry.state();
        if before != after {
            *self.count(before) -= 1;
            *self.count(after) += 1;
            if after == BlockState::Free {
                self.free.push(block);
            }
        }
    }

    fn count(&mut self, state: BlockState) -> &mut u64 {
        match state {
            BlockState::Free => &mut self.counts.free,
            BlockState::Active => &mut self.counts.active,
            BlockState::Cached => &mut self.counts.cached,
            BlockState::Leased => &mut self.counts.leased,
        }
    }

    /// Counts everything anew and compares. For tests and for idle moments.
    ///
    /// # Panics
    /// If the pool contradicts itself.
    pub fn check(&self) {
        let count = |state| self.blocks.iter().filter(|b| b.state() == state).count() as u64;
        let counts = BlockCounts {
            free: count(BlockState::Free),
            active: count(BlockState::Active),
            cached: count(BlockState::Cached),
            leased: count(BlockState::Leased),
        };
        assert_eq!(self.counts, counts, "counts follow the blocks");
        let mut free = self.free.clone();
        free.sort_unstable();
        free.dedup();
        assert_eq!(free.len(), self.free.len(), "a block is free once");
        assert_eq!(free.len() as u64, counts.free, "every free block is listed");
        assert!(free.iter().all(|&block| self.state(block) == BlockState::Free));
    }
}
