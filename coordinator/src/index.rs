//! Which node's prefix cache holds which block.
//!
//! Nodes number their cache events; a gap voids what is known of a node and asks for a snapshot,
//! and nothing waits for it. Memory is bounded: beyond the cap the least recently matched blocks of
//! nodes that have more than their share are forgotten (a clock hand with one reference bit), which
//! costs cache hits, never correctness.
//!
//! A block is known by 64 bits of its hash. Two blocks that share them would be taken for one, and a
//! node credited with a block that it lacks; it finds out by itself, by the whole hash.

use baton_proto::hash::BlockHash;

use holders::{Holders, Sets};
use lives::{Life, Lives, Sync};
use lookup::Run;
use table::{Position, Table};

pub use keys::NodeKeys;
pub use matches::{Held, Matches};

mod clock;
mod holders;
mod keys;
mod lives;
mod lookup;
mod matches;
mod table;

/// Bytes of memory that the index takes at most per block that it may hold, if it may hold more than
/// some ten thousand.
pub const BYTES_PER_BLOCK: usize = 24;
/// How many of them are for sets of holders that several blocks share.
const SET_BYTES_PER_BLOCK: usize = 4;
/// For sets of holders, however few blocks there may be.
const MIN_SET_BYTES: usize = 64 << 10;
/// Blocks that the clock hand passes per block stored while there is something to clear.
const SWEEP_PER_STORED: usize = 2;

/// A node, by a number that the caller gives; memory is taken for all numbers below the largest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NodeKey(pub u32);

/// Where a node keeps blocks. A block in a tier counts for all slower ones too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tier {
    /// Memory that the model computes in.
    Device,
    /// Memory of the machine, from which blocks are copied back.
    Host,
}

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
    /// Holders by hash, and whether the block was asked for since the hand passed it.
    table: Table,
    sets: Sets,
    lives: Lives,
    hand: Position,
    max_blocks: usize,
    lookups: usize,
    /// Empty between lookups.
    runs: Vec<Run>,
}

impl Index {
    /// An empty index of at most `max_blocks` blocks (at least one).
    #[must_use]
    pub fn new(max_blocks: usize) -> Self {
        let set_bytes = max_blocks.saturating_mul(SET_BYTES_PER_BLOCK).max(MIN_SET_BYTES);
        Self {
            table: Table::new(max_blocks),
            sets: Sets::new(set_bytes),
            lives: Lives::default(),
            hand: Position::default(),
            max_blocks: max_blocks.max(1),
            lookups: 0,
            runs: Vec::new(),
        }
    }

    /// Blocks known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether no block is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pairs of a block and who holds it; a block in two tiers of a node counts twice.
    #[must_use]
    pub fn pairs(&self) -> u64 {
        self.lives.pairs()
    }

    /// Memory that all of it takes, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.table.bytes() + self.sets.bytes() + self.lives.bytes()
    }

    /// Blocks known of a node, in any tier.
    #[must_use]
    pub fn blocks_of(&self, node: NodeKey) -> u64 {
        self.lives.of(node).map_or(0, |life| self.lives.blocks(life.slowest()))
    }

    /// A node joined, with tiers down to `slowest`: nothing is known of it until its snapshot, which
    /// it sends unasked.
    pub fn join(&mut self, node: NodeKey, slowest: Tier) {
        self.leave(node);
        if self.lives.is_full() {
            // One round may miss a block that a removal moved behind the hand.
            while self.lives.stale() > 0 {
                self.sweep(self.max_blocks);
            }
        }
        self.lives.begin(node, slowest);
    }

    /// A node left: what it held is void.
    pub fn leave(&mut self, node: NodeKey) {
        self.lives.end(node);
    }

    /// Blocks that entered and left a tier of a node's cache. An event may come in parts with the same
    /// number, those with the blocks that left before the others.
    pub fn event(
        &mut self,
        node: NodeKey,
        sequence: u64,
        tier: Tier,
        stored: &[BlockHash],
        removed: &[BlockHash],
    ) -> Heard {
        let Some(life) = self.lives.of(node) else { return Heard::Fine };
        match life.sync {
            Sync::Asked => return Heard::Fine,
            Sync::Following(last) if sequence < last => return Heard::Fine,
            // What is repeated changes nothing.
            Sync::Following(last) if sequence - last <= 1 => {}
            // A gap, or an event inside a snapshot.
            _ => {
                self.void(node, life);
                return Heard::NeedSnapshot;
            }
        }
        self.lives.set_sync(node, Sync::Following(sequence));
        removed.iter().for_each(|hash| self.remove(life, tier, hash));
        stored.iter().for_each(|hash| self.store(life, tier, hash));
        Heard::Fine
    }

    /// A part of all that a tier of a node's cache held just after event `sequence`; the `last` one of
    /// all tiers.
    pub fn snapshot(
        &mut self,
        node: NodeKey,
        sequence: u64,
        tier: Tier,
        hashes: &[BlockHash],
        last: bool,
    ) {
        let Some(mut life) = self.lives.of(node) else { return };
        match life.sync {
            Sync::Asked => {}
            Sync::Loading(loading) if loading == sequence => {}
            _ => life = self.void(node, life),
        }
        let next = if last { Sync::Following(sequence) } else { Sync::Loading(sequence) };
        self.lives.set_sync(node, next);
        hashes.iter().for_each(|hash| self.store(life, tier, hash));
    }

    /// What is known of a joined node is void; its new life.
    fn void(&mut self, node: NodeKey, life: Life) -> Life {
        self.join(node, if life.host.is_some() { Tier::Host } else { Tier::Device });
        self.lives.of(node).unwrap_or(life)
    }

    fn store(&mut self, life: Life, tier: Tier, hash: &BlockHash) {
        if tier == Tier::Device {
            self.add(life.device, hash);
        }
        if let Some(host) = life.host {
            self.add(host, hash);
        }
        self.sweep(SWEEP_PER_STORED);
    }

    fn remove(&mut self, life: Life, tier: Tier, hash: &BlockHash) {
        self.take(life.device, hash);
        if let (Tier::Host, Some(host)) = (tier, life.host) {
            self.take(host, hash);
        }
    }

    fn add(&mut self, slot: u32, hash: &BlockHash) {
        let known = self.table.find(key(hash));
        let known = known.and_then(|at| Some((at, self.clear_stale(at)?)));
        let Some((at, (holders, marked))) = known else {
            if self.len() >= self.max_blocks {
                self.evict();
            }
            // Without room in this part of the table it stays unknown.
            if self.table.insert(key(hash), Holders::One(slot).pack(false)).is_ok() {
                self.lives.named(slot);
            }
            return;
        };
        if self.sets.contains(holders, slot) {
            return;
        }
        // Without room for another set one holder more stays unknown.
        if let Ok(more) = self.sets.with(holders, slot) {
            self.sets.release(holders);
            self.lives.named(slot);
            self.table.set(at, more.pack(marked));
        }
    }

    fn take(&mut self, slot: u32, hash: &BlockHash) {
        let Some(at) = self.table.find(key(hash)) else { return };
        let Some((_, packed)) = self.table.entry(at) else { return };
        let (holders, _) = Holders::unpack(packed);
        if self.sets.contains(holders, slot) {
            let own = |chunk| if chunk == slot / 64 { 1 << (slot % 64) } else { 0 };
            self.retain(at, |lives, chunk| lives.live(chunk) & !own(chunk));
        }
    }

    /// Keeps those of a block's holders that `keep` has among the slots of a chunk; `None` if that left
    /// none, and no entry.
    fn retain(
        &mut self,
        at: Position,
        keep: impl Fn(&Lives, u32) -> u64,
    ) -> Option<(Holders, bool)> {
        let Self { table, sets, lives, .. } = self;
        let (holders, marked) = Holders::unpack(table.entry(at)?.1);
        let mut all = true;
        sets.each(holders, |chunk| all &= chunk.bits & !keep(lives, chunk.at) == 0);
        if all {
            return Some((holders, marked));
        }
        // Without room for the set that is left the block is forgotten.
        let kept = sets.retained(holders, |chunk| keep(lives, chunk)).unwrap_or(None);
        sets.each(holders, |mut chunk| {
            chunk.bits &= if kept.is_some() { !keep(lives, chunk.at) } else { u64::MAX };
            chunk.each(|slot| lives.unnamed(slot));
        });
        sets.release(holders);
        match kept {
            Some(holders) => table.set(at, holders.pack(marked)),
            None => table.remove(at),
        }
        Some((kept?, marked))
    }
}

fn key(hash: &BlockHash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = hash.0;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests;
