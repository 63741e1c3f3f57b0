//! Nodes that could not take a request, and why. Fixed in size: every decision makes one.

use crate::decision::{MOST_LEFT_OUT, Why};
use crate::index::NodeKey;

/// See the module's description.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LeftOut {
    first: [Option<(NodeKey, Why)>; MOST_LEFT_OUT],
    count: usize,
}

impl LeftOut {
    /// One more.
    pub(super) fn add(&mut self, node: NodeKey, why: Why) {
        if let Some(free) = self.first.get_mut(self.count) {
            *free = Some((node, why));
        }
        self.count += 1;
    }

    /// All of `others` as well.
    pub(super) fn add_all(&mut self, others: &Self) {
        others.iter().for_each(|(node, why)| self.add(node, why));
        self.count += others.count - others.iter().count();
    }

    /// The first of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = (NodeKey, Why)> + '_ {
        self.first.iter().copied().flatten()
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_without_a_place_are_counted() {
        let (mut one, mut other) = (LeftOut::default(), LeftOut::default());
        (0..3).for_each(|n| one.add(NodeKey(n), Why::Full));
        (3..23).for_each(|n| other.add(NodeKey(n), Why::Failing));
        one.add_all(&other);
        assert_eq!((one.count(), one.iter().count()), (23, MOST_LEFT_OUT));
        let whys: Vec<_> = one.iter().map(|(_, why)| why).collect();
        assert_eq!(whys[2..4], [Why::Full, Why::Failing]);
    }
}
