//! Sets of pieces: which (layer, block) of a transfer.

use std::ops::Range;

/// Consecutive blocks of a sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Ordinal of the first block.
    pub first: u32,
    /// How many; at least 1.
    pub count: u32,
}

impl Run {
    /// The ordinals.
    #[must_use]
    pub fn range(self) -> Range<u32> {
        self.first..self.first + self.count
    }
}

/// One layer of consecutive blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerRun {
    /// The layer.
    pub layer: u32,
    /// The blocks.
    pub run: Run,
}

/// Joins ascending ordinals into runs.
pub(crate) fn runs(ordinals: impl Iterator<Item = u32>) -> impl Iterator<Item = Run> {
    let mut ordinals = ordinals.peekable();
    std::iter::from_fn(move || {
        let first = ordinals.next()?;
        let mut count = 1;
        while ordinals.next_if_eq(&(first + count)).is_some() {
            count += 1;
        }
        Some(Run { first, count })
    })
}

/// A set of pieces, one bit each.
pub(crate) struct Grid {
    blocks: u32,
    words: Vec<u64>,
    len: u64,
}

impl Grid {
    pub(crate) fn new(layers: u32, blocks: u32) -> Self {
        let pieces = layers as usize * blocks as usize;
        Self { blocks, words: vec![0; pieces.div_ceil(64)], len: 0 }
    }

    /// Adds a piece; false if it was there.
    pub(crate) fn insert(&mut self, layer: u32, ordinal: u32) -> bool {
        let (word, bit) = self.place(layer, ordinal);
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.len += u64::from(new);
        new
    }

    pub(crate) fn clear(&mut self) {
        self.words.fill(0);
        self.len = 0;
    }

    pub(crate) fn contains(&self, layer: u32, ordinal: u32) -> bool {
        let (word, bit) = self.place(layer, ordinal);
        self.words[word] & bit != 0
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The set's runs of one layer.
    pub(crate) fn layer_runs(&self, layer: u32) -> impl Iterator<Item = LayerRun> + '_ {
        let held = (0..self.blocks).filter(move |&ordinal| self.contains(layer, ordinal));
        runs(held).map(move |run| LayerRun { layer, run })
    }

    fn place(&self, layer: u32, ordinal: u32) -> (usize, u64) {
        debug_assert!(ordinal < self.blocks, "a block of the transfer");
        let piece = layer as usize * self.blocks as usize + ordinal as usize;
        (piece / 64, 1 << (piece % 64))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_a_set(pieces in proptest::collection::vec((0u32..3, 0u32..70), 0..200)) {
            let (mut grid, mut model) = (Grid::new(3, 70), BTreeSet::new());
            for &(layer, ordinal) in &pieces {
                prop_assert_eq!(grid.insert(layer, ordinal), model.insert((layer, ordinal)));
            }
            prop_assert_eq!(grid.len(), model.len() as u64);
            let from_runs: BTreeSet<_> = (0..3)
                .flat_map(|layer| grid.layer_runs(layer).collect::<Vec<_>>())
                .flat_map(|r| r.run.range().map(move |ordinal| (r.layer, ordinal)))
                .collect();
            prop_assert_eq!(from_runs, model);
        }
    }
}
