//! Leading blocks of a prompt that each node has, or will have.

use crate::index::{Matches, NodeKey};

/// Blocks of one prompt. Kept between requests, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Cached {
    expected: Vec<u32>,
    touched: Vec<NodeKey>,
    popular: usize,
}

impl Cached {
    /// Forgets all; every node has `popular` blocks.
    pub(super) fn clear(&mut self, popular: usize) {
        self.touched.drain(..).for_each(|node| self.expected[node.0 as usize] = 0);
        self.popular = popular;
    }

    /// A node will have so many blocks.
    pub(super) fn expect(&mut self, node: NodeKey, blocks: usize) {
        let at = node.0 as usize;
        if self.expected.len() <= at {
            self.expected.resize(at + 1, 0);
        }
        if self.expected[at] == 0 {
            self.touched.push(node);
        }
        self.expected[at] = blocks as u32;
    }

    /// Nodes that will have some.
    pub(super) fn expecting(&self) -> impl Iterator<Item = NodeKey> {
        self.touched.iter().copied()
    }

    /// Blocks that a node has, or will have.
    pub(super) fn of(&self, node: NodeKey, matches: &Matches) -> usize {
        let expected = self.expected.get(node.0 as usize).copied().unwrap_or(0) as usize;
        matches.of(node).blocks.max(expected).max(self.popular)
    }
}
