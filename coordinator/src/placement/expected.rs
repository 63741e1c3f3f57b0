//! Blocks that nodes do not hold yet, and will once they have done what they were asked for.
//!
//! A request that shares its prompt with one that still waits should go where that one goes. What
//! nodes say of their caches comes too late for that, so the blocks of every placed request are
//! expected on its node until that node has had time to tell.
//!
//! Kept as a radix tree without pointers: chains are cut into runs of blocks that the same requests
//! have, and a run is found by its first block, whose hash stands for all blocks before it too. So a
//! request costs a few runs, however long its prompt is.

use std::collections::VecDeque;
use std::sync::Arc;

use baton_proto::hash::BlockHash;
use smallvec::SmallVec;

use crate::block_map::BlockMap;
use crate::index::NodeKey;

/// How long the blocks of a request are expected after it was sent to its node.
const PATIENCE_MS: f64 = 30_000.0;
/// Most blocks expected of requests that were sent; beyond it the oldest are forgotten.
const MOST_SENT: usize = 1 << 22;

/// The blocks that one request will bring to nodes.
#[derive(Clone, Debug)]
pub(super) struct Coming {
    /// Its block hashes.
    pub(super) chain: Arc<Vec<BlockHash>>,
    /// Leading blocks that are expected everywhere anyway.
    pub(super) popular: usize,
}

/// One node that will have a request's blocks, or two.
pub(super) type Nodes = [Option<NodeKey>; 2];

/// See the module's description. Pure; times are milliseconds of the caller's clock.
#[derive(Clone, Debug, Default)]
pub(super) struct Expected {
    /// By their first block. All blocks of a request are in runs, and no run has others too.
    runs: BlockMap<Run>,
    /// Requests that were sent, with the time until which their blocks are expected.
    sent: VecDeque<(f64, Nodes, Coming)>,
    /// Blocks of all of them.
    sent_blocks: usize,
}

/// Consecutive blocks.
#[derive(Clone, Debug)]
struct Run {
    /// They are some of this chain, up to the block before `end`.
    chain: Arc<Vec<BlockHash>>,
    end: usize,
    /// Requests that have them.
    requests: u32,
    /// Who will hold them, each with the number of requests that will bring them there. Nobody, if they
    /// are popular.
    nodes: SmallVec<[(NodeKey, u32); 2]>,
}

impl Run {
    /// Where a chain that has this run's first block at `begin` leaves it.
    fn shared(&self, begin: usize, chain: &[BlockHash]) -> usize {
        let end = self.end.min(chain.len());
        // A hash stands for all blocks before it: up to some block all are equal, and none after.
        let equal = |at: usize| self.chain[at] == chain[at];
        if equal(end - 1) {
            return end;
        }
        let (mut last, mut other) = (begin, end - 1);
        while last + 1 < other {
            let middle = last.midpoint(other);
            if equal(middle) { last = middle } else { other = middle }
        }
        other
    }
}

impl Expected {
    /// A request waits that will bring these blocks to a node.
    pub(super) fn add(&mut self, coming: &Coming, node: NodeKey) {
        self.add_all(coming, [Some(node), None]);
    }

    /// It waits no more.
    pub(super) fn remove(&mut self, coming: &Coming, node: NodeKey) {
        self.remove_all(coming, [Some(node), None]);
    }

    /// A request was sent that brings these blocks to these nodes.
    pub(super) fn send(&mut self, coming: Coming, nodes: Nodes, now: f64) {
        self.add_all(&coming, nodes);
        self.sent_blocks += coming.chain.len();
        self.sent.push_back((now + PATIENCE_MS, nodes, coming));
        while let Some((until, ..)) = self.sent.front()
            && (*until <= now || self.sent_blocks > MOST_SENT)
        {
            self.forget_first();
        }
    }

    /// Nothing is expected any more of requests that were sent to this node.
    pub(super) fn leave(&mut self, node: NodeKey) {
        for (until, nodes, coming) in std::mem::take(&mut self.sent) {
            let left = nodes.map(|other| other.filter(|other| *other != node));
            if left != nodes {
                self.remove_all(&coming, nodes);
                if left == [None, None] {
                    self.sent_blocks -= coming.chain.len();
                    continue;
                }
                self.add_all(&coming, left);
            }
            self.sent.push_back((until, left, coming));
        }
    }

    /// Calls `found` with `(node, leading blocks)` for every node of which more than `popular` are
    /// expected; the last call for a node has the largest number.
    pub(super) fn longest(
        &self,
        chain: &[BlockHash],
        popular: usize,
        mut found: impl FnMut(NodeKey, usize),
    ) {
        let mut at = 0;
        while let Some(run) = chain.get(at).and_then(|first| self.runs.get(first)) {
            at = run.shared(at, chain);
            if at > popular {
                if run.nodes.is_empty() {
                    return;
                }
                run.nodes.iter().for_each(|(node, _)| found(*node, at));
            }
            if at < run.end {
                return;
            }
        }
    }

    fn forget_first(&mut self) {
        if let Some((_, nodes, coming)) = self.sent.pop_front() {
            self.sent_blocks -= coming.chain.len();
            self.remove_all(&coming, nodes);
        }
    }

    fn add_all(&mut self, Coming { chain, popular }: &Coming, nodes: Nodes) {
        let mut at = 0;
        while at < chain.len() {
            let begin = at;
            let ends = if begin < *popular { chain.len().min(*popular) } else { chain.len() };
            at = self.cut(begin, &chain[..ends]).unwrap_or(ends);
            let run = self.runs.entry(chain[begin]).or_insert_with(|| Run {
                chain: chain.clone(),
                end: at,
                requests: 0,
                nodes: SmallVec::new(),
            });
            run.requests += 1;
            // Of all chains that have these blocks, the youngest will as a rule be kept the longest.
            run.chain = chain.clone();
            if begin < *popular {
                continue;
            }
            for node in nodes.into_iter().flatten() {
                match run.nodes.iter_mut().find(|(holder, _)| *holder == node) {
                    Some((_, requests)) => *requests += 1,
                    None => run.nodes.push((node, 1)),
                }
            }
        }
    }

    /// Cuts the run that begins with a chain's block `begin` so that the chain has all of it; returns
    /// where it ends, if there is such a run.
    fn cut(&mut self, begin: usize, chain: &[BlockHash]) -> Option<usize> {
        let run = self.runs.get_mut(&chain[begin])?;
        let at = run.shared(begin, chain);
        if at < run.end {
            let rest = run.clone();
            run.end = at;
            self.runs.insert(rest.chain[at], rest);
        }
        Some(at)
    }

    fn remove_all(&mut self, Coming { chain, popular }: &Coming, nodes: Nodes) {
        let mut at = 0;
        while let Some(first) = chain.get(at) {
            let run = self.runs.get_mut(first).expect("all blocks of a request are in runs");
            let begin = std::mem::replace(&mut at, run.end);
            run.requests -= 1;
            if run.requests == 0 {
                self.runs.remove(first);
            } else if begin >= *popular {
                for node in nodes.into_iter().flatten() {
                    let theirs = run.nodes.iter_mut().filter(|(holder, _)| *holder == node);
                    theirs.for_each(|(_, requests)| *requests -= 1);
                }
                run.nodes.retain(|(_, requests)| *requests > 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// A chain that goes on with other blocks wherever `turns` changes: equal beginnings of `turns`
    /// give equal beginnings of the chain.
    fn chain(turns: &[u8]) -> Arc<Vec<BlockHash>> {
        let mut parent = 0_u64;
        let hash = |turn: &u8| {
            parent = (parent ^ (u64::from(*turn) + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            parent ^= parent >> 32;
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&parent.to_le_bytes());
            BlockHash(bytes)
        };
        Arc::new(turns.iter().map(hash).collect())
    }

    fn coming(turns: &[u8], popular: usize) -> Coming {
        Coming { chain: chain(turns), popular }
    }

    fn longest(expected: &Expected, chain: &[BlockHash], popular: usize) -> BTreeMap<u32, usize> {
        let mut best = BTreeMap::new();
        expected.longest(chain, popular, |node, blocks| {
            best.insert(node.0, blocks);
        });
        best
    }

    /// The same, block by block.
    fn by_block(
        expected: &[(Coming, Nodes)],
        chain: &[BlockHash],
        popular: usize,
    ) -> BTreeMap<u32, usize> {
        let mut best = BTreeMap::new();
        for (at, hash) in chain.iter().enumerate().skip(popular) {
            let have = expected
                .iter()
                .filter(|(coming, _)| at >= coming.popular && coming.chain.get(at) == Some(hash));
            let nodes: Vec<_> = have.flat_map(|(_, nodes)| nodes).flatten().collect();
            if nodes.is_empty() {
                break;
            }
            best.extend(nodes.iter().map(|node| (node.0, at + 1)));
        }
        best
    }

    fn node() -> impl Strategy<Value = Option<NodeKey>> {
        proptest::option::of((0..4_u32).prop_map(NodeKey))
    }

    proptest! {
        #[test]
        fn finds_what_a_list_of_blocks_finds(
            requests in proptest::collection::vec(
                (proptest::collection::vec(0..2_u8, 0..12), 0..4_usize, [node(), node()], any::<bool>()),
                1..40,
            ),
            gone in 0..4_u32,
        ) {
            let mut expected = Expected::default();
            let mut model: Vec<(Coming, Nodes)> = Vec::new();
            let check = |expected: &Expected, model: &[(Coming, Nodes)]| {
                for (turns, popular, ..) in &requests {
                    let chain = chain(turns);
                    let found = longest(expected, &chain, *popular);
                    prop_assert_eq!(found, by_block(model, &chain, *popular));
                }
                Ok(())
            };
            for (at, (turns, popular, nodes, ends)) in requests.iter().enumerate() {
                let coming = coming(turns, *popular);
                expected.send(coming.clone(), *nodes, 0.0);
                model.push((coming, *nodes));
                if *ends && let (coming, [Some(node), None]) = &model[at / 2] {
                    // One more and one less of the same change nothing.
                    expected.add(coming, *node);
                    expected.remove(coming, *node);
                }
                check(&expected, &model)?;
            }
            expected.leave(NodeKey(gone));
            for (_, nodes) in &mut model {
                *nodes = nodes.map(|node| node.filter(|node| node.0 != gone));
            }
            check(&expected, &model)?;
            while !expected.sent.is_empty() {
                expected.forget_first();
            }
            prop_assert!(expected.runs.is_empty() && expected.sent_blocks == 0);
        }
    }

    #[test]
    fn expects_until_time_is_over_and_the_oldest_less_long() {
        let mut expected = Expected::default();
        let (long, short) = (coming(&[0; 9], 0), coming(&[0; 4], 0));
        expected.send(long.clone(), [Some(NodeKey(1)), None], 0.0);
        expected.send(short, [Some(NodeKey(2)), None], 1.0);
        assert_eq!(longest(&expected, &long.chain, 0), BTreeMap::from([(1, 9), (2, 4)]));
        expected.send(coming(&[1], 0), [Some(NodeKey(3)), None], PATIENCE_MS);
        assert_eq!(longest(&expected, &long.chain, 0), BTreeMap::from([(2, 4)]));
        let most = Arc::new(vec![BlockHash([7; 16]); MOST_SENT]);
        let most = Coming { popular: MOST_SENT, chain: most };
        expected.send(most, [None, None], PATIENCE_MS);
        assert_eq!(longest(&expected, &long.chain, 0), BTreeMap::new());
    }
}
