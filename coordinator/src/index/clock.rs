//! What the index forgets: a hand goes round its blocks. It clears what nodes that left held, and
//! at the cap it finds the block to forget.

use super::Index;
use super::holders::Holders;
use super::lives::Lives;
use super::table::Position;

/// Blocks that the hand passes in search of the one to forget.
const MAX_EVICTION_STEPS: usize = 64;

impl Index {
    /// Clears up to `steps` blocks of nodes that left. Cheap when there are none.
    pub fn sweep(&mut self, steps: usize) {
        for _ in 0..steps {
            if self.lives.stale() == 0 {
                return;
            }
            // What took the place of a block that was forgotten is looked at next.
            let used = self.table.entry(self.hand).is_some();
            if !used || self.clear_stale(self.hand).is_some() {
                self.hand = self.table.after(self.hand);
            }
        }
    }

    /// Forgets one block: one that no joined node holds, else one that was not asked for since the
    /// last round and whose holders all have their share of the index. As long as every node is below
    /// its share, the index is not full; so there is such a block, if perhaps not near the hand.
    pub(super) fn evict(&mut self) {
        let share = (self.max_blocks / self.lives.joined().max(1)) as u64;
        let mut other = None;
        for _ in 0..MAX_EVICTION_STEPS {
            let at = self.next_used();
            let Some((holders, marked)) = self.clear_stale(at) else { return };
            if marked {
                self.table.set(at, holders.pack(false));
            } else if self.all_have(share, holders) {
                return self.forget(at);
            } else {
                other = other.or(self.table.entry(at).map(|(key, _)| key));
            }
            self.hand = self.table.after(at);
        }
        let at = other.and_then(|key| self.table.find(key));
        let at = at.unwrap_or_else(|| self.next_used());
        self.forget(at);
    }

    /// Moves the hand on to a block, unless it is at one. There must be one.
    fn next_used(&mut self) -> Position {
        while self.table.entry(self.hand).is_none() {
            self.hand = self.table.after(self.hand);
        }
        self.hand
    }

    fn all_have(&self, share: u64, holders: Holders) -> bool {
        let mut all = true;
        self.sets.each(holders, |chunk| {
            chunk.each(|slot| {
                let node = self.lives.owner(slot).map(|(node, _)| node);
                all &= node.is_none_or(|node| self.blocks_of(node) >= share);
            });
        });
        all
    }

    fn forget(&mut self, at: Position) {
        self.retain(at, |_, _| 0);
    }

    /// Takes nodes that left from a block's holders; `None` if that left none, and no entry.
    pub(super) fn clear_stale(&mut self, at: Position) -> Option<(Holders, bool)> {
        if self.lives.stale() == 0 {
            return self.table.entry(at).map(|(_, packed)| Holders::unpack(packed));
        }
        self.retain(at, Lives::live)
    }
}
