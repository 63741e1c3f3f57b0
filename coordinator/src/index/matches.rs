//! What a lookup finds, in memory that is used again.

use super::{NodeKey, Tier};

/// How many leading blocks of a chain a node holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Held {
    /// In device memory.
    pub device_blocks: usize,
    /// In any tier.
    pub blocks: usize,
}

/// The nodes that hold leading blocks of a chain. Kept between lookups, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Matches {
    /// By node; zeros for those that hold nothing.
    held: Vec<Held>,
    nodes: Vec<NodeKey>,
    /// Slots already counted, 64 per word.
    pub(super) seen: Vec<u64>,
}

impl Matches {
    /// What a node holds.
    #[must_use]
    pub fn of(&self, node: NodeKey) -> Held {
        self.held.get(node.0 as usize).copied().unwrap_or_default()
    }

    /// All nodes that hold something, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (NodeKey, Held)> + '_ {
        self.nodes.iter().map(|&node| (node, self.of(node)))
    }

    pub(super) fn clear(&mut self) {
        self.nodes.drain(..).for_each(|node| self.held[node.0 as usize] = Held::default());
        self.seen.clear();
    }

    /// A node holds so many blocks in a tier or faster; the most that is said of it counts.
    pub(super) fn raise(&mut self, node: NodeKey, tier: Tier, blocks: usize) {
        let at = node.0 as usize;
        if self.held.len() <= at {
            self.held.resize(at + 1, Held::default());
        }
        let held = &mut self.held[at];
        if held.blocks == 0 {
            self.nodes.push(node);
        }
        held.blocks = held.blocks.max(blocks);
        if tier == Tier::Device {
            held.device_blocks = held.device_blocks.max(blocks);
        }
    }
}
