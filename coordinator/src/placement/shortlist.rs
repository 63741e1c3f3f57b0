//! Which nodes of a large cluster are looked at for one request.
//!
//! All of them in a small one. In a large one, those that have most of the prompt, and of the others
//! as many as are enough to find a good one: the best of 64 is nearly always among the best few in a
//! hundred (the power of many choices; Mitzenmacher, 2001). These are the next in turn each time, so
//! that every node has its turns.

use crate::index::NodeKey;

/// A cluster is large with more nodes than this of one role; so many are looked at.
const MOST_LOOKED_AT: usize = 64;
/// Nodes with a longer part of the prompt than others that are looked at beside them.
const MOST_HOLDERS: usize = 16;

/// See the module's description.
#[derive(Clone, Debug, Default)]
pub(super) struct Shortlist {
    /// Nodes that have more of the prompt than everyone, and how many blocks.
    holders: Vec<(usize, NodeKey)>,
    turn: usize,
    all: bool,
}

impl Shortlist {
    /// Starts the list for a request: `held` are nodes with leading blocks of it, each once, of which
    /// `popular` are nothing special.
    pub(super) fn begin(&mut self, held: impl Iterator<Item = (NodeKey, usize)>, popular: usize) {
        self.turn = self.turn.wrapping_add(MOST_LOOKED_AT);
        self.all = false;
        self.holders.clear();
        self.holders.extend(held.filter(|&(_, n)| n > popular).map(|(key, n)| (n, key)));
        self.holders.sort_unstable_by(|a, b| b.cmp(a));
        self.holders.truncate(MOST_HOLDERS);
    }

    /// From now on, all nodes are looked at; false if they were already.
    pub(super) fn look_at_all(&mut self) -> bool {
        !std::mem::replace(&mut self.all, true)
    }

    /// Those of `all`, which are in ascending order, that are looked at; each once.
    pub(super) fn of<'a>(&'a self, all: &'a [NodeKey]) -> impl Iterator<Item = NodeKey> + 'a {
        let large = all.len() > MOST_LOOKED_AT && !self.all;
        let (at, most) =
            if large { (self.turn % all.len(), MOST_LOOKED_AT) } else { (0, all.len()) };
        let (before, from) = all.split_at(at);
        let in_turn = from.iter().chain(before).copied().take(most);
        let holds = move |key: NodeKey| large && self.holders.iter().any(|&(_, own)| own == key);
        let holders = self.holders.iter().filter(move |_| large).map(|&(_, key)| key);
        let holders = holders.filter(|key| all.binary_search(key).is_ok());
        holders.chain(in_turn.filter(move |&key| !holds(key)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn keys(count: u32) -> Vec<NodeKey> {
        (0..count).map(|n| NodeKey(3 * n)).collect()
    }

    #[test]
    fn a_small_cluster_is_looked_at_as_it_is() {
        let mut list = Shortlist::default();
        let all = keys(64);
        list.begin([(NodeKey(9), 5)].into_iter(), 0);
        assert_eq!(list.of(&all).collect::<Vec<_>>(), all);
    }

    #[test]
    fn in_a_large_one_holders_are_always_looked_at_and_others_in_turn() {
        let (mut list, all) = (Shortlist::default(), keys(1000));
        let held = [(NodeKey(30), 5), (NodeKey(31), 9), (NodeKey(33), 2)];
        let mut seen = BTreeSet::new();
        for _ in 0..1000_usize.div_ceil(MOST_LOOKED_AT) {
            list.begin(held.into_iter(), 2);
            let some: Vec<_> = list.of(&all).collect();
            // Number 31 is of another role, and number 33 has no more than everyone.
            assert_eq!(some[0], NodeKey(30));
            assert_eq!(some.iter().collect::<BTreeSet<_>>().len(), some.len());
            assert!(some.len() <= MOST_LOOKED_AT + 1);
            seen.extend(some);
        }
        assert_eq!(seen.len(), all.len());
        assert!(list.look_at_all() && !list.look_at_all());
        assert_eq!(list.of(&all).collect::<Vec<_>>(), all);
    }
}
