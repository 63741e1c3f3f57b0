//! The cheapest few of the nodes that could do one side of a placement.

use super::cost::{Cost, Prefill};
use crate::index::NodeKey;

/// How many of the best of each side are paired, as links differ.
const FINALISTS: usize = 4;

/// One side of a pair: a node, how it would do its part, and what that costs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Side {
    pub(super) key: NodeKey,
    pub(super) cost: Cost,
    pub(super) work: Prefill,
    pub(super) cached: usize,
}

/// The best few of many.
#[derive(Default)]
pub(super) struct Best {
    /// Each with its total cost.
    sides: [Option<(f64, Side)>; FINALISTS],
    offered: usize,
}

impl Best {
    /// One more of the many.
    pub(super) fn offer(&mut self, side: Side) {
        self.offered += 1;
        let total = side.cost.total();
        let worse = |other: &Option<(f64, Side)>| other.is_none_or(|(other, _)| total < other);
        if let Some(at) = self.sides.iter().position(worse) {
            self.sides[at..].rotate_right(1);
            self.sides[at] = Some((total, side));
        }
    }

    /// The best one.
    pub(super) fn first(&self) -> Option<Side> {
        self.sides[0].map(|(_, side)| side)
    }

    /// How many there were.
    pub(super) fn offered(&self) -> usize {
        self.offered
    }

    /// The best first.
    pub(super) fn all(&self) -> impl Iterator<Item = Side> {
        self.sides.iter().flatten().map(|&(_, side)| side)
    }
}
