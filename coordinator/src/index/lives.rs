//! The slots that stand for nodes in sets of holders.
//!
//! Every life of a node gets a fresh slot per tier, so forgetting a node is O(1): its slots stop
//! being live. A slot is used again once no block names it.

use super::{NodeKey, Tier};
use crate::cluster::MAX_NODES;

/// Most slots before those of nodes that left must be cleared at once.
const MAX_SLOTS: usize = 16 * MAX_NODES;

/// How far a node's events are known.
#[derive(Clone, Copy, Debug)]
pub(super) enum Sync {
    /// A snapshot is on its way; events before it are part of it.
    Asked,
    /// Some parts of the snapshot taken after this event arrived.
    Loading(u64),
    /// Everything up to this event is known.
    Following(u64),
}

/// A life of a node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Life {
    pub(super) sync: Sync,
    /// Stands for what is in its device memory.
    pub(super) device: u32,
    /// Stands for what is in its host memory or faster, if it has such a tier.
    pub(super) host: Option<u32>,
}

impl Life {
    /// The slot of everything that it holds.
    pub(super) fn slowest(&self) -> u32 {
        self.host.unwrap_or(self.device)
    }
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    owner: Owner,
    /// How many blocks name it.
    blocks: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Owner {
    None,
    Live(NodeKey, Tier),
    /// Of a node that left.
    Stale,
}

/// Joined nodes and their slots.
#[derive(Debug, Default)]
pub(super) struct Lives {
    /// By node.
    lives: Vec<Option<Life>>,
    joined: usize,
    slots: Vec<Slot>,
    stale: usize,
    /// One bit per slot.
    live: Vec<u64>,
}

impl Lives {
    /// How many nodes are joined.
    pub(super) fn joined(&self) -> usize {
        self.joined
    }

    /// How many slots of nodes that left are still named by blocks.
    pub(super) fn stale(&self) -> usize {
        self.stale
    }

    /// Whether another life could lack a slot.
    pub(super) fn is_full(&self) -> bool {
        self.slots.len() + 2 > MAX_SLOTS
    }

    /// Memory, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.lives.capacity() * size_of::<Option<Life>>()
            + self.slots.capacity() * size_of::<Slot>()
            + self.live.capacity() * size_of::<u64>()
    }

    /// A joined node.
    pub(super) fn of(&self, node: NodeKey) -> Option<Life> {
        *self.lives.get(node.0 as usize)?
    }

    /// Begins a life of a node that is not joined.
    pub(super) fn begin(&mut self, node: NodeKey, slowest: Tier) {
        let device = self.take_slot(Owner::Live(node, Tier::Device));
        let host = (slowest == Tier::Host).then(|| self.take_slot(Owner::Live(node, Tier::Host)));
        let at = node.0 as usize;
        if self.lives.len() <= at {
            self.lives.resize(at + 1, None);
        }
        self.lives[at] = Some(Life { sync: Sync::Asked, device, host });
        self.joined += 1;
    }

    /// Ends a node's life, if it has one.
    pub(super) fn end(&mut self, node: NodeKey) -> Option<Life> {
        let life = self.lives.get_mut(node.0 as usize)?.take()?;
        self.joined -= 1;
        for slot in [Some(life.device), life.host].into_iter().flatten() {
            self.live[slot as usize / 64] &= !(1 << (slot % 64));
            let Slot { owner, blocks } = &mut self.slots[slot as usize];
            *owner = if *blocks == 0 { Owner::None } else { Owner::Stale };
            self.stale += usize::from(*blocks > 0);
        }
        Some(life)
    }

    /// A joined node's events are known so far.
    pub(super) fn set_sync(&mut self, node: NodeKey, sync: Sync) {
        if let Some(Some(life)) = self.lives.get_mut(node.0 as usize) {
            life.sync = sync;
        }
    }

    /// The slots from `64 * chunk` that stand for joined nodes, as bits.
    pub(super) fn live(&self, chunk: u32) -> u64 {
        self.live[chunk as usize]
    }

    /// Whom a slot stands for; `None` if the node left.
    pub(super) fn owner(&self, slot: u32) -> Option<(NodeKey, Tier)> {
        match self.slots[slot as usize].owner {
            Owner::Live(node, tier) => Some((node, tier)),
            _ => None,
        }
    }

    /// How many blocks name a slot.
    pub(super) fn blocks(&self, slot: u32) -> u64 {
        self.slots[slot as usize].blocks
    }

    /// How many blocks name each slot, in all.
    pub(super) fn pairs(&self) -> u64 {
        self.slots.iter().map(|slot| slot.blocks).sum()
    }

    /// A block names a slot from now on.
    pub(super) fn named(&mut self, slot: u32) {
        self.slots[slot as usize].blocks += 1;
    }

    /// A block names a slot no more.
    pub(super) fn unnamed(&mut self, slot: u32) {
        let Slot { owner, blocks } = &mut self.slots[slot as usize];
        *blocks -= 1;
        if *blocks == 0 && *owner == Owner::Stale {
            *owner = Owner::None;
            self.stale -= 1;
        }
    }

    /// The lowest unused slot, so that sets stay dense.
    fn take_slot(&mut self, owner: Owner) -> u32 {
        let unused = self.slots.iter().position(|slot| slot.owner == Owner::None);
        let at = unused.unwrap_or(self.slots.len());
        if at == self.slots.len() {
            self.slots.push(Slot { owner, blocks: 0 });
            self.live.resize(self.slots.len().div_ceil(64), 0);
        }
        self.slots[at].owner = owner;
        self.live[at / 64] |= 1 << (at % 64);
        at as u32
    }
}
