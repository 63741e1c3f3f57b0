//! Which node's prefix cache holds which block.
//!
//! Nodes number their cache events; a gap voids what is known of a node and asks for a snapshot,
//! and nothing waits for it. Memory is bounded: beyond the cap the least recently matched blocks
//! are forgotten (a clock hand with one reference bit), which costs cache hits, never correctness.
//!
//! A block's holders are a set of *slots*. Every life of a node gets a fresh slot, so forgetting
//! a node is O(1): its slot stops being live. The clock hand clears it from the blocks later, and
//! a slot is used again only after the hand has passed every block that might name it.

use std::collections::HashMap;

use baton_proto::hash::BlockHash;
use baton_proto::ids::NodeId;

use crate::bits::Bits;
use crate::cluster::MAX_NODES;

/// Bytes of memory that one block takes, holders beyond the first 64 slots not counted.
pub const BYTES_PER_BLOCK: u64 =
    (size_of::<Entry>() + size_of::<(BlockHash, u32)>() + size_of::<u32>()) as u64;
/// Most slots, live or not; more than nodes, as each life of a node takes one.
const MAX_SLOTS: usize = 4 * MAX_NODES;
/// When the hand has come round so often, it has passed every block that was there at the start.
const LAPS: u8 = 2;
/// Blocks that the clock hand passes per block stored while there is something to clear.
const SWEEP_PER_STORED: usize = 2;

/// What to do after an event of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Heard {
    /// Nothing.
    Fine,
    /// Ask the node for a snapshot.
    NeedSnapshot,
}

/// Blocks by hash, with the nodes that hold them. See the module's description.
#[derive(Debug)]
pub struct Index {
    by_hash: HashMap<BlockHash, u32>,
    entries: Vec<Entry>,
    unused: Vec<u32>,
    hand: usize,
    max_blocks: usize,
    slots: Vec<Slot>,
    /// How many of them are stale.
    stale: usize,
    by_node: HashMap<NodeId, usize>,
    /// Slots of joined nodes.
    live: Bits,
}

#[derive(Debug)]
struct Entry {
    hash: BlockHash,
    /// Empty: the entry is unused. May name slots that are live no more.
    holders: Bits,
    matched: bool,
}

#[derive(Debug)]
enum Slot {
    Unused,
    Live {
        node: NodeId,
        sync: Sync,
        blocks: u64,
    },
    /// Blocks may still name it.
    Stale {
        laps: u8,
    },
}

/// How far a node's events are known.
#[derive(Clone, Copy, Debug)]
enum Sync {
    /// A snapshot is on its way; events before it are part of it.
    Asked,
    /// Some parts of the snapshot taken after this event arrived.
    Loading(u64),
    /// Everything up to this event is known.
    Following(u64),
}

impl Index {
    /// An empty index of at most `max_blocks` blocks (at least one).
    #[must_use]
    pub fn new(max_blocks: usize) -> Self {
        Self {
            by_hash: HashMap::new(),
            entries: Vec::new(),
            unused: Vec::new(),
            hand: 0,
            max_blocks: max_blocks.clamp(1, u32::MAX as usize),
            slots: Vec::new(),
            stale: 0,
            by_node: HashMap::new(),
            live: Bits::default(),
        }
    }

    /// Blocks known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// Whether no block is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_hash.is_empty()
    }

    /// Blocks known of a node.
    #[must_use]
    pub fn blocks_of(&self, node: &NodeId) -> u64 {
        match self.by_node.get(node).map(|&slot| &self.slots[slot]) {
            Some(Slot::Live { blocks, .. }) => *blocks,
            _ => 0,
        }
    }

    /// A node joined: nothing is known of it until its snapshot, which it sends unasked.
    pub fn join(&mut self, node: &NodeId) {
        self.leave(node);
        let slot = self.unused_slot();
        self.slots[slot] = Slot::Live { node: node.clone(), sync: Sync::Asked, blocks: 0 };
        self.live.insert(slot);
        self.by_node.insert(node.clone(), slot);
    }

    /// A node left: what it held is void.
    pub fn leave(&mut self, node: &NodeId) {
        if let Some(slot) = self.by_node.remove(node) {
            self.live.remove(slot);
            self.slots[slot] = Slot::Stale { laps: 0 };
            self.stale += 1;
        }
    }

    /// Blocks that entered and left a node's cache.
    pub fn event(
        &mut self,
        node: &NodeId,
        sequence: u64,
        stored: &[BlockHash],
        removed: &[BlockHash],
    ) -> Heard {
        match self.sync(node) {
            None | Some(Sync::Asked) => return Heard::Fine,
            Some(Sync::Following(last)) if sequence <= last => return Heard::Fine,
            Some(Sync::Following(last)) if sequence == last + 1 => {}
            // A gap, or an event inside a snapshot.
            Some(_) => {
                self.join(node);
                return Heard::NeedSnapshot;
            }
        }
        self.set_sync(node, Sync::Following(sequence));
        if let Some(&slot) = self.by_node.get(node) {
            removed.iter().for_each(|hash| self.remove(slot, hash));
            stored.iter().for_each(|&hash| self.store(slot, hash));
        }
        Heard::Fine
    }

    /// A part of all that a node's cache held just after event `sequence`.
    pub fn snapshot(&mut self, node: &NodeId, sequence: u64, hashes: &[BlockHash], last: bool) {
        match self.sync(node) {
            None => return,
            Some(Sync::Asked) => {}
            Some(Sync::Loading(loading)) if loading == sequence => {}
            Some(_) => self.join(node),
        }
        let next = if last { Sync::Following(sequence) } else { Sync::Loading(sequence) };
        self.set_sync(node, next);
        if let Some(&slot) = self.by_node.get(node) {
            hashes.iter().for_each(|&hash| self.store(slot, hash));
        }
    }

    /// How many leading blocks of `chain` each node holds; nodes that hold none are left out.
    pub fn longest(&mut self, chain: &[BlockHash]) -> Vec<(NodeId, usize)> {
        let mut found = Vec::new();
        let mut holding = self.live.clone();
        let mut length = 0;
        for hash in chain {
            let Some(&at) = self.by_hash.get(hash) else {
                break;
            };
            let entry = &mut self.entries[at as usize];
            entry.matched = true;
            if length > 0 {
                holding.difference(&entry.holders, |slot| found.push((slot, length)));
            }
            holding.intersect(&entry.holders);
            if holding.is_empty() {
                break;
            }
            length += 1;
        }
        if length > 0 {
            holding.each(|slot| found.push((slot, length)));
        }
        let named = found.into_iter().filter_map(|(slot, length)| match &self.slots[slot] {
            Slot::Live { node, .. } => Some((node.clone(), length)),
            _ => None,
        });
        named.collect()
    }

    /// Clears up to `steps` blocks of nodes that left. Cheap when there are none.
    pub fn sweep(&mut self, steps: usize) {
        for _ in 0..steps {
            if self.stale == 0 {
                return;
            }
            if let Some(at) = self.advance() {
                self.clear_stale(at);
            }
        }
    }

    fn sync(&self, node: &NodeId) -> Option<Sync> {
        match self.slots[*self.by_node.get(node)?] {
            Slot::Live { sync, .. } => Some(sync),
            _ => None,
        }
    }

    fn set_sync(&mut self, node: &NodeId, to: Sync) {
        if let Some(&slot) = self.by_node.get(node)
            && let Slot::Live { sync, .. } = &mut self.slots[slot]
        {
            *sync = to;
        }
    }

    fn unused_slot(&mut self) -> usize {
        if self.slots.len() >= MAX_SLOTS {
            self.sweep((self.entries.len() + 1) * usize::from(LAPS));
        }
        let unused = |slot: &Slot| matches!(slot, Slot::Unused);
        if let Some(slot) = self.slots.iter().position(unused) {
            return slot;
        }
        self.slots.push(Slot::Unused);
        self.slots.len() - 1
    }

    fn store(&mut self, slot: usize, hash: BlockHash) {
        let at = match self.by_hash.get(&hash) {
            Some(&at) => at as usize,
            None => self.new_entry(hash),
        };
        if self.entries[at].holders.insert(slot) {
            self.count(slot, 1);
        }
        self.sweep(SWEEP_PER_STORED);
    }

    fn remove(&mut self, slot: usize, hash: &BlockHash) {
        let Some(&at) = self.by_hash.get(hash) else {
            return;
        };
        if self.entries[at as usize].holders.remove(slot) {
            self.count(slot, -1);
            self.clear_stale(at as usize);
        }
    }

    fn count(&mut self, slot: usize, change: i64) {
        if let Slot::Live { blocks, .. } = &mut self.slots[slot] {
            *blocks = blocks.saturating_add_signed(change);
        }
    }

    fn new_entry(&mut self, hash: BlockHash) -> usize {
        if self.by_hash.len() >= self.max_blocks {
            self.evict();
        }
        let entry = Entry { hash, holders: Bits::default(), matched: false };
        let at = match self.unused.pop() {
            Some(at) => {
                self.entries[at as usize] = entry;
                at as usize
            }
            None => {
                self.entries.push(entry);
                self.entries.len() - 1
            }
        };
        self.by_hash.insert(hash, at as u32);
        at
    }

    /// Forgets one block: one that no live node holds, else one not matched since the last round.
    /// Called at the cap only, when every entry is used.
    fn evict(&mut self) {
        while let Some(at) = self.advance() {
            if self.clear_stale(at) {
                return;
            }
            if !std::mem::take(&mut self.entries[at].matched) {
                let holders = std::mem::take(&mut self.entries[at].holders);
                holders.each(|slot| self.count(slot, -1));
                self.forget(at);
                return;
            }
        }
    }

    /// Moves the hand on; the entry that it passed.
    fn advance(&mut self) -> Option<usize> {
        let at = self.hand;
        self.hand += 1;
        if self.hand >= self.entries.len() {
            self.hand = 0;
            self.lap();
        }
        (at < self.entries.len()).then_some(at)
    }

    /// The hand came round: slots that no block can name any more are free again.
    fn lap(&mut self) {
        for slot in &mut self.slots {
            if let Slot::Stale { laps } = slot {
                *laps += 1;
                if *laps == LAPS {
                    *slot = Slot::Unused;
                    self.stale -= 1;
                }
            }
        }
    }

    /// Takes dead holders out of an entry; true if that left none in a used one.
    fn clear_stale(&mut self, at: usize) -> bool {
        let entry = &mut self.entries[at];
        entry.holders.intersect(&self.live);
        // An unused entry has empty holders as well, but its hash leads elsewhere.
        if !entry.holders.is_empty() || self.by_hash.get(&entry.hash) != Some(&(at as u32)) {
            return false;
        }
        self.forget(at);
        true
    }

    fn forget(&mut self, at: usize) {
        self.by_hash.remove(&self.entries[at].hash);
        self.unused.push(at as u32);
    }
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
